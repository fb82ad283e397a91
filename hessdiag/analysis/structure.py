"""What needs no product: of a positive semidefinite matrix, how many eigenvalues are negative."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.semidefinite import rank_at_most
from hessdiag.results import Estimate, Metric, Provenance
from hessdiag.settings import Settings

CONVEX = "G is positive semidefinite: the loss is convex in the outputs"


def by_structure(operator: Curvature, settings: Settings) -> dict[str, Metric]:
    """The quantities asked for that are exact without a product, by name.

    The share of negative eigenvalues is zero; so is lambda_min where G has fewer outputs than parameters, which
    costs a forward pass of the sample set.
    """
    if not operator.semidefinite:
        return {}
    found: dict[str, Metric] = {}
    if settings.wants("negative_mass"):
        found["negative_mass"] = _zero("negative_mass", CONVEX, operator)
    if settings.wants("lambda_min") and operator.samples.examples < operator.size:
        outputs = rank_at_most(operator)
        if outputs < operator.size:
            method = f"{CONVEX}, and of rank {outputs} at most"
            found["lambda_min"] = _zero("lambda_min", method, operator)
    return found


def _zero(quantity: str, method: str, operator: Curvature) -> Estimate:
    return Estimate(
        quantity=quantity,
        value=0.0,
        lo=0.0,
        hi=0.0,
        kind="exact",
        confidence=1.0,
        provenance=Provenance(method=method, dtype=str(operator.dtype).removeprefix("torch.")),
        stderr=0.0,
    )


def sought(settings: Settings, known: Mapping[str, Metric]) -> Settings:
    """The settings without what is known already; unchanged where that is everything."""
    left = tuple(name for name in settings.quantities if name not in known)
    return replace(settings, quantities=left) if left else settings
