"""The diagonal of an operator from its products, every entry with its own error.

For signs z, independent of each other, z ∘ Hz has the mean diag(H); entry i spreads by (Σ_{j≠i} Hᵢⱼ²)^½ a probe
(Hutchinson 1989; Bekas, Kokiopoulou and Saad 2007). With a Lanczos run HQ = QT + βqeₖᵀ taken out (P = I − QQᵀ)

    diag(H) = diag(QTQᵀ) + 2β q ∘ Qeₖ + E[z ∘ PHPz],

and probes see the bulk alone. Nothing is assumed on the signs' products but that a mean of them is about normal.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from hessdiag.errors import UsageError
from hessdiag.operator import SymmetricOperator
from hessdiag.results import Kind, at_least
from hessdiag.results.interval import quantile
from hessdiag.spectral.inner import norms, project_out
from hessdiag.spectral.krylov import Krylov
from hessdiag.spectral.probes import rademacher

STREAM = "diagonal"


@dataclass(frozen=True, kw_only=True)
class Diagonal:
    """The diagonal of an operator.

    Attributes:
        value: (d,) float64, units of loss / parameter².
        stderr: (d,) float64, of each entry; 0 where it is exact.
        lo: (d,) lower end of each entry's interval; ``hi`` the upper one. Each holds its entry with
            ``confidence``, so of many some do not.
        error: ‖value − diag H‖ is at most this, with ``confidence``: all entries together.
        kind: "exact" or "probes".
        confidence: of the intervals; 1.0 where only rounding is left.
        method: in words.
        products: spent.
        operator: whose diagonal it is.
    """

    value: Tensor
    stderr: Tensor
    lo: Tensor
    hi: Tensor
    error: float
    kind: Kind
    confidence: float
    method: str
    products: int
    operator: SymmetricOperator = field(repr=False)

    def named(self, part: str = "value") -> dict[str, Tensor]:
        """``value``, ``stderr``, ``lo`` or ``hi`` by parameter name, in parameter shape."""
        if part not in ("value", "stderr", "lo", "hi"):
            msg = f"named({part!r}): must be 'value', 'stderr', 'lo' or 'hi'"
            raise UsageError(msg)
        return self.operator.named(getattr(self, part))

    def __repr__(self) -> str:
        """One line."""
        known = "exact" if self.kind == "exact" else f"‖error‖ <= {self.error:.3g} ({self.confidence:.0%})"
        return f"<diagonal of {len(self.value):,} entries, sum {float(self.value.sum()):.4g}, {known}>"


@dataclass
class Samples:
    """Mean and spread of one value per probe and entry, as they come (Welford 1962).

    Attributes:
        number: of probes so far.
        mean: (d,) float64.
        spread: (d,) float64, sum of squares about the mean.
    """

    mean: Tensor
    spread: Tensor
    number: int = 0

    @classmethod
    def of(cls, op: SymmetricOperator) -> Samples:
        """None yet."""
        zero = torch.zeros(op.size, dtype=torch.float64, device=op.device)
        return cls(zero, zero.clone())

    def add(self, rows: Tensor) -> None:
        """One row per probe."""
        for row in rows.double():
            self.number += 1
            away = row - self.mean
            self.mean += away / self.number
            self.spread += away * (row - self.mean)

    @property
    def stderr(self) -> Tensor:
        """Of the mean, (d,)."""
        return (self.spread / (self.number * max(self.number - 1, 1))).sqrt()

    @property
    def size(self) -> Tensor:
        """Root mean square, (d,)."""
        return (self.spread / max(self.number, 1) + self.mean.square()).sqrt()


def exact_diagonal(op: SymmetricOperator) -> Diagonal:
    """Every entry from a product with its unit vector; cost: d products."""
    before, value, sizes = op.products, [], []
    for begin in range(0, op.size, op.block):
        places = torch.arange(begin, min(begin + op.block, op.size), device=op.device)
        rows = torch.zeros(len(places), op.size, dtype=op.dtype, device=op.device)
        rows[torch.arange(len(places)), places] = 1
        images = op.rows(rows)
        value.append(images[torch.arange(len(places)), places].double())
        sizes.append(norms(images))
    found = torch.cat(value)
    return known(op, found, op.floor * torch.cat(sizes), "every direction", op.products - before)


def known(op: SymmetricOperator, value: Tensor, rounding: Tensor, method: str, products: int) -> Diagonal:
    """A diagonal of which only rounding (d,) is unknown."""
    return Diagonal(
        value=value,
        stderr=torch.zeros_like(value),
        lo=value - rounding,
        hi=value + rounding,
        error=float(torch.linalg.vector_norm(rounding)),
        kind="exact",
        confidence=1.0,
        method=method,
        products=products,
        operator=op,
    )


def probed(
    op: SymmetricOperator,
    probes: int,
    seed: int,
    *,
    krylov: Krylov | None = None,
    among: Tensor | None = None,
    quantity: str = STREAM,
) -> Samples:
    """Z ∘ PHPz for ``probes`` sign vectors, plus what the run knows; fewer where the operator says stop.

    Args:
        op: H, d x d.
        probes: products to spend.
        seed: names the probes' stream.
        krylov: the run to take out.
        among: (d,) bool, entries to look at: the signs of the others are 0, and so are their values. No run then.
        quantity: names the stream.
    """
    samples, begun = Samples.of(op), 0
    while begun < probes and (begun < 2 or not op.stopped):
        group = range(begun, min(begun + op.block, probes))
        signs = torch.stack([rademacher(op, seed, quantity, index) for index in group])
        if among is not None:
            signs *= among.to(signs)
        rows = signs.clone()
        if krylov is not None:
            project_out(rows, krylov.basis)
        images = op.rows(rows)
        if krylov is not None:
            project_out(images, krylov.basis)
        samples.add(signs * images)
        begun = group.stop
    if krylov is not None:
        samples.mean += _of_run(krylov)
    return samples


def estimated(
    op: SymmetricOperator,
    samples: Samples,
    confidence: float,
    method: str,
    products: int,
    exact: tuple[Tensor, Tensor] | None = None,
) -> Diagonal:
    """The diagonal from probes, with t-intervals, and a joint statement.

    The mean's error is about normal with some covariance of trace V = Σ stderr². The 95% quantile of its squared
    length is then at most that of V χ²₁, whatever the covariance (Székely and Bakirov 2003), for confidences above
    0.9; t takes the place of the normal law since V is estimated from as few probes.

    Args:
        op: whose diagonal it is.
        samples: of what is not known.
        confidence: of the intervals.
        method: in words.
        products: spent.
        exact: (d,) added, of which nothing is random, and its rounding (d,).
    """
    at_least(samples.number, 2, "probes", "a standard error")
    stderr, rounding = samples.stderr, op.floor * samples.size
    t = quantile(confidence, samples.number - 1)
    joint = quantile(max(confidence, 0.9), samples.number - 1)
    value = samples.mean
    if exact is not None:
        value, rounding = value + exact[0], rounding + exact[1]
    half = t * stderr + rounding
    error = joint * float(torch.linalg.vector_norm(stderr)) + float(torch.linalg.vector_norm(rounding))
    return Diagonal(
        value=value,
        stderr=stderr,
        lo=value - half,
        hi=value + half,
        error=error,
        kind="probes",
        confidence=confidence,
        method=method,
        products=products,
        operator=op,
    )


def _of_run(krylov: Krylov) -> Tensor:
    """diag(QTQᵀ) + 2β q ∘ Qeₖ, (d,) float64."""
    basis = krylov.basis.double()
    weighted = torch.from_numpy(krylov.T).to(basis) @ basis
    found = (basis * weighted).sum(0)
    if krylov.residual is not None and math.isfinite(krylov.beta):
        found += 2 * krylov.beta * krylov.next.double() * basis[-1]
    return found
