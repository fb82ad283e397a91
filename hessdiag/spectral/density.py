"""The eigenvalue density by stochastic Lanczos quadrature, with the run's subspace taken out exactly.

tr f(H) = tr QᵀfQ + (d−k) E[uᵀf(H)u] with u uniform on the unit sphere of Q's complement is an identity, so
deflating loses nothing and outliers carry no sampling noise. uᵀf(H)u comes from Lanczos on H itself. The
known part comes from the main run: of its K vectors the first k = K/2 are called known and the others serve to
know them well: the leading k x k block of f(T) equals QᵀfQ for every polynomial of degree 2(K − k) + 1.

Nodes and weights are the result; nothing here smooths.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hessdiag.former import formerly
from hessdiag.operator import SymmetricOperator, as_operator
from hessdiag.results import Quadrature, Spectrum, at_least
from hessdiag.results.quadrature import gauss, share_below
from hessdiag.resume import once
from hessdiag.spectral.deflation import Forms, from_values, unit_probes
from hessdiag.spectral.inner import dots
from hessdiag.spectral.krylov import Krylov
from hessdiag.spectral.lockstep import lanczos_block
from hessdiag.spectral.zone import Part, unresolved

Array = NDArray[np.float64]

STREAM = "density"
"""Name of the starts' stream."""

BASIS_BYTES = 1 << 31
"""Reorthogonalize the probes' runs while their bases fit in 2 GiB; three-term recurrences beyond."""

OUTLIER_WIDTH = 3.0
"""An outlier lies this many root-mean-squares of the bulk from its mean; a semicircle ends at 2."""


@dataclass(frozen=True, kw_only=True)
class DensityRun:
    """A density and what can be said from the same products.

    Attributes:
        spectrum: nodes and weights.
        negative: (n, 2) per probe, limits between which the share of negative eigenvalues lies, rigorous for
            the probe's own measure; one row where ``exact``.
        forms: the quadratic forms of the starts. Their trace is worse known than that of as many probes of
            `hessdiag.spectral.deflation`, which are not of unit length and need not be.
        exact: whether the probes were a basis, so that nothing is random.
        products: spent on probes, and on the run that deflated them.
    """

    spectrum: Spectrum
    negative: Array
    forms: Forms
    exact: bool
    products: int


@formerly(probes="num_probes")
def spectrum(
    operator: Any, *, probes: int = 8, steps: int = 40, seed: int = 0, krylov: Krylov | None = None
) -> Spectrum:
    """The eigenvalue density of a symmetric operator, as raw quadrature.

    Args:
        operator: anything `as_operator` takes; H, d x d.
        probes: random starts (8: papers use 10 to 20 without deflation); with d or more, a basis instead.
        steps: Lanczos steps per probe: the measure's first 2 · steps moments are exact. Where steps ≥ d and
            the probes are a basis, the density is the spectrum.
        seed: names the probes' stream.
        krylov: a run whose first half is taken out of the probes and known exactly.

    Returns:
        Spectrum. Cost: probes · steps products.

    Raises:
        BudgetError: no probe or no step.

    >>> import hessdiag, torch
    >>> hessdiag.spectrum(torch.eye(3), probes=3, steps=1).quantile(0.5)
    1.0
    """
    return density(as_operator(operator), probes, steps, seed, krylov).spectrum


def density(op: SymmetricOperator, probes: int, steps: int, seed: int, krylov: Krylov | None = None) -> DensityRun:
    """As `spectrum`, with brackets of the negative share and the forms of the same products.

    Raises:
        BudgetError: no probe or no step.
    """
    at_least(steps, 1, "steps", "a quadrature")
    known = known_half(krylov)
    left = op.size - (known.size if known is not None else 0)
    at_least(probes, min(1, left), "probes", "a density")
    keep = min(probes, left, op.block) * steps * op.width * op.dtype.itemsize <= BASIS_BYTES
    rules: list[tuple[Array, Array]] = []
    values: list[Array] = [np.zeros((2, 0))]
    spent = 0
    exact = probes >= left
    for block in unit_probes(op, known, probes, seed, STREAM):
        if rules and not exact and op.left < len(block):
            break
        before = op.products
        form = partial(lanczos_block, op, block, steps, reorthogonalize=keep)
        alphas, betas, lengths = once(op, f"{len(block)} starts", form)
        spent += op.products - before
        steps = alphas.shape[1] if alphas.shape[1] < min(steps, op.size) else steps
        rules += [(a[:m], b[:m]) for a, b, m in zip(alphas, betas, lengths, strict=True)]
        values.append(_first_forms(known, block, alphas[:, 0], betas[:, 0]))
    traces, squares = np.concatenate(values, axis=1)
    if exact:
        traces, squares = traces.sum(keepdims=True), squares.sum(keepdims=True)
    forms = from_values(op, known, traces, squares, seed=seed, exact=exact, spent=spent)
    return _assemble(op, krylov, known, rules, forms, steps)


def known_half(krylov: Krylov | None) -> Krylov | None:
    """The part of a run that a density calls known: half of it, or all of it where it is complete."""
    if krylov is None or krylov.exhausted:
        return krylov
    size = max(krylov.size // 2, krylov.smallest_part)
    return krylov.leading(min(size, krylov.size))


def _first_forms(known: Krylov | None, block: torch.Tensor, alphas: Array, betas: Array) -> Array:
    """uᵀHu = α₁ and ‖PHu‖² = α₁² + β₁² less what HQ = QT + βqeₖᵀ says of QᵀHu, (2, n)."""
    squares = alphas**2 + betas**2
    if known is not None and known.residual is not None:
        overlap = dots(block, known.next.expand_as(block)).cpu().numpy()
        squares = squares - (known.beta * overlap) ** 2
    return np.stack([alphas, squares.clip(min=0)])


def _assemble(
    op: SymmetricOperator,
    krylov: Krylov | None,
    known: Krylov | None,
    rules: list[tuple[Array, Array]],
    forms: Forms,
    steps: int,
) -> DensityRun:
    share = (op.size - forms.known) / op.size
    quadratures = [gauss(a, b[:-1]) for a, b in rules]
    if op.semidefinite:  # what is below zero is rounding
        quadratures = [(nodes.clip(min=0.0), weights) for nodes, weights in quadratures]
    known_nodes, known_weights = _known_quadrature(krylov, forms.known, op.size)
    ends = [nodes[[0, -1]] for nodes, _ in quadratures] + ([known_nodes[[0, -1]]] if len(known_nodes) else [])
    resolution = op.floor * float(np.abs(ends).max())
    limits = np.array([_negative((a, b, share), resolution) for a, b in rules]).reshape(len(rules), 2)
    if forms.exact:
        limits = limits.mean(axis=0, keepdims=True) if len(rules) else np.zeros((1, 2))
    parts = [(a, b, share / len(rules)) for a, b in rules]
    if krylov is not None and krylov.exhausted:
        limits = limits + np.array([(known_nodes < -resolution).mean(), (known_nodes <= resolution).mean()])
    elif krylov is not None and known is not None:
        part = _known_part(known_nodes, known_weights, krylov.size - known.size)
        limits = limits + _negative(part, resolution)
        parts.append(part)
    if op.semidefinite:
        limits = np.zeros_like(limits)
    probes = [Quadrature(nodes=tuple(n.tolist()), weights=tuple((share * w).tolist())) for n, w in quadratures]
    result = Spectrum(
        known=Quadrature(nodes=tuple(known_nodes.tolist()), weights=tuple(known_weights.tolist())),
        probes=tuple(probes) or (Quadrature(nodes=(), weights=()),),
        dimension=op.size,
        steps=steps,
        outliers=_outliers(krylov, known, forms),
        resolution=resolution,
        unresolved=unresolved(parts, resolution, semidefinite=op.semidefinite),
        semidefinite=op.semidefinite,
    )
    return DensityRun(spectrum=result, negative=limits, forms=forms, exact=forms.exact, products=forms.products)


def _known_quadrature(krylov: Krylov | None, known: int, dimension: int) -> tuple[Array, Array]:
    if krylov is None:
        return np.zeros(0), np.zeros(0)
    nodes, vectors = krylov.ritz
    if known == dimension:
        return nodes, np.full(known, 1 / known)
    return nodes, (vectors[:known] ** 2).sum(axis=0) / dimension


def _known_part(nodes: Array, weights: Array, steps: int) -> Part:
    """The Jacobi matrix of the known part, and its share.

    Its quadrature is exact to degree 2(K − k) + 1 only, so as many Lanczos steps on the discrete measure
    itself give the Jacobi matrix that is truly its own, and Radau brackets from there.
    """
    total = float(weights.sum())
    if steps == 0:
        return np.zeros(0), np.zeros(0), total
    start = torch.from_numpy(np.sqrt(weights / total))[None]
    # One step more would use a moment the run does not know: its alpha is dropped, its beta is not.
    alphas, betas, _ = lanczos_block(as_operator(torch.diag(torch.from_numpy(nodes))), start, steps)
    return alphas[0], betas[0], total


def _negative(part: Part, resolution: float) -> Array:
    """Limits of its share below zero, (2,)."""
    alphas, betas, share = part
    return share * np.array([share_below(alphas, betas, s * resolution, closed=s > 0) for s in (-1, 1)])


def _outliers(krylov: Krylov | None, known: Krylov | None, forms: Forms) -> tuple[float, ...]:
    """Converged Ritz values away from the bulk, descending; the bulk is what the probes see."""
    if krylov is None or known is None or forms.known == forms.dimension:
        return ()
    left = forms.dimension - forms.known
    mean = (float(forms.trace.mean()) - float(np.trace(known.T))) / left
    square = (float(forms.squares.mean()) - forms.known_squares) / left
    width = OUTLIER_WIDTH * math.sqrt(max(square - mean**2, 0.0))
    values, vectors = krylov.ritz
    converged = krylov.beta * np.abs(vectors[-1]) <= 0.01 * np.abs(values - mean)
    chosen = values[converged & (np.abs(values - mean) > max(width, forms.floor * krylov.scale))]
    return tuple(sorted(chosen.tolist(), reverse=True))
