"""tr H, tr H², the Wolkowicz-Styan bounds and their gradient for a three-layer network, exactly.

Two orders of one sum. Pairwise: O(N²), every pair of samples through their inner products. Linear: O(N), H
itself accumulated in compressed blocks. Both pass over the batches in float64; `plan` predicts what each takes.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

from hessdiag.closed_form.gradient import Gradients, square_part, trace_part
from hessdiag.closed_form.linear import Accumulated
from hessdiag.closed_form.network import ThreeLayer
from hessdiag.closed_form.pairwise import Kept, squares, sums
from hessdiag.closed_form.rows import Batch, Rows
from hessdiag.errors import UsageError
from hessdiag.spectral.bounds import WS, wolkowicz_styan
from hessdiag.spectral.moments import ws_derivatives

Order = Literal["auto", "pairwise", "linear"]
Quantity = Literal["trace", "frobenius_squared", "ws_upper", "ws_lower", "ws_spread", "ws_span"]

MEMORY = 2 << 30  # bytes either order may take
TILE_BYTES = 64 << 20  # one tile's largest arrays
PAIR_OVERHEAD = 200  # elementwise work per pair, in multiply-adds of a matrix product (measured)
SAMPLE_OVERHEAD = 100  # likewise per entry of what a sample adds


@dataclass(frozen=True)
class Cost:
    """What an order takes.

    Attributes:
        multiply_adds: of its matrix products, float64.
        memory: bytes at its peak, about.
    """

    multiply_adds: float
    memory: float

    @property
    def seconds(self) -> float:
        """At this machine's measured rate of matrix products."""
        return self.multiply_adds / _rate()


@dataclass(frozen=True)
class Plan:
    """Both orders' costs, and the one to take.

    Attributes:
        pairwise: O(N²).
        linear: O(N).
        order: the cheaper of those that fit into memory; pairwise always does, recomputing its tiles.
        tile: samples at a time.
    """

    pairwise: Cost
    linear: Cost
    order: Literal["pairwise", "linear"]
    tile: int

    @property
    def cost(self) -> Cost:
        """Of the order chosen."""
        return self.pairwise if self.order == "pairwise" else self.linear


@dataclass(frozen=True)
class Traces:
    """The exact traces of a three-layer network's Hessian.

    Attributes:
        trace: tr H.
        frobenius_squared: tr H² = ‖H₁₁‖² + ‖H₂₂‖² + 2‖H₁₂‖².
        size: P.
        per_tensor: tr H of (hidden, hidden_bias, output, output_bias), 0 where one does not count.
        blocks: (‖H₁₁‖², ‖H₂₂‖², ‖H₁₂‖²) of hidden and output layer.
        per_sample: what each counting sample adds, in order (N,): tr H is their sum over what the mean counts.
        order: how tr H² was summed.
        gradients: of tr H and of tr H², if asked for.
    """

    trace: float
    frobenius_squared: float
    size: int
    per_tensor: tuple[float, float, float, float]
    blocks: tuple[float, float, float]
    per_sample: Tensor
    order: str
    gradients: tuple[Gradients, Gradients] | None = None

    def ws(self) -> WS:
        """The Wolkowicz-Styan bounds, guarantees."""
        return wolkowicz_styan(self.trace, self.frobenius_squared, self.size)

    def value(self, quantity: Quantity) -> float:
        """The quantity; ``ws_spread`` is s√(2P) ≥ λ_max − λ_min and ``ws_span`` is upper − lower."""
        return _function(quantity, self)[0]

    def gradient(self, quantity: Quantity = "ws_upper") -> Gradients:
        """The quantity's gradient. Where s = 0 (H = mI), s counts as constant: it has its minimum there.

        Raises:
            UsageError: the traces were made without gradients.
        """
        if self.gradients is None:
            msg = "these traces carry no gradient: ask three_layer(..., gradient=True)"
            raise UsageError(msg)
        _, by_trace, by_square = _function(quantity, self)
        return self.gradients[0].times(by_trace).plus(self.gradients[1], by_square)


def three_layer(
    net: ThreeLayer,
    batches: Sequence[Batch],
    *,
    order: Order = "auto",
    gradient: bool = False,
    memory: float = MEMORY,
) -> Traces:
    """Exact tr H and tr H² of the mean cross-entropy, and their gradients.

    Args:
        net: the network.
        batches: (inputs, targets), of any sizes: the result does not depend on the division.
        order: "pairwise", "linear", or "auto": the one `plan` predicts to be faster and to fit.
        gradient: with respect to all of the network's tensors, whether they count or not.
        memory: bytes.

    Returns:
        The traces. Cost, in multiply-adds, for N samples, d inputs, h hidden units and C classes: pairwise
        N²(h²/2 + 3Ch + C²/2 + d + h)/2, linear N(h²d²/4 + C²h²/4 + Ch²d); about 3 times as much with gradient.

    Raises:
        UsageError: an order that does not exist, or data that do not fit the network.
    """
    if order not in ("auto", "pairwise", "linear"):
        msg = f"order {order!r}: allowed: auto, pairwise, linear"
        raise UsageError(msg)
    chosen = plan(net, sum(len(y) for _, y in batches), gradient=gradient, memory=memory)
    rows = Rows(net, batches, chosen.tile)
    how = chosen.order if order == "auto" else order
    parts, tensors, by_trace = [], torch.zeros(4, dtype=torch.float64), Gradients.zero(net)
    for tile in rows:
        per = tile.traces()
        tensors += (tile.w @ per).cpu()
        parts.append((per.sum(1) * tile.w / rows.scale).cpu())
        if gradient:
            by_trace = by_trace.plus(trace_part(tile))
    blocks, by_square = _squares(net, rows, how, gradient, memory)
    one, two, three, four = tensors.tolist()
    return Traces(
        trace=math.fsum((one, two, three, four)),
        frobenius_squared=math.fsum((blocks[0], blocks[1], 2 * blocks[2])),
        size=net.size,
        per_tensor=(one, two, three, four),
        blocks=blocks,
        per_sample=torch.cat(parts),
        order=how,
        gradients=(by_trace, by_square) if gradient else None,
    )


def _squares(
    net: ThreeLayer, rows: Rows, order: str, gradient: bool, memory: float
) -> tuple[tuple[float, float, float], Gradients]:
    """The blocks' squared norms, and the gradient of tr H² if asked for."""
    accumulated = Accumulated(net, rows) if order == "linear" else None
    kept = Kept(rows, memory / 2) if accumulated is None else ()
    found = Gradients.zero(net)
    if not gradient:
        return (accumulated.squares() if accumulated is not None else squares(kept)), found
    blocks = [0.0, 0.0, 0.0]
    for tile in rows:
        of_tile = accumulated.sums(tile) if accumulated is not None else sums(tile, kept)
        for index, part in enumerate(of_tile.squares(tile)):
            blocks[index] += part
        found = found.plus(square_part(tile, of_tile))
    return (blocks[0], blocks[1], blocks[2]), found


def plan(net: ThreeLayer, samples: int, *, gradient: bool = False, memory: float = MEMORY) -> Plan:
    """Predict time and memory of both orders for N samples, and choose. Nothing is computed but a rate."""
    N, h, C, (k, q) = samples, net.width, net.classes, net.columns
    inner = h * (h + 1) // 2 + C * (C + 1) // 2
    row = inner + 6 * C * h + 2 * h * h + 2 * C * C
    pairwise_tile = max(1, min(512, N, TILE_BYTES // (8 * row)))
    first, second, mixed = h * (h + 1) * k * (k + 1) // 4, C * (C + 1) * q * (q + 1) // 4, C * h * q * k
    widest = row + k * (k + 1) // 2 + q * (q + 1) // 2 + q * k
    linear_tile = max(1, min(512, N, TILE_BYTES // (8 * widest)))
    pairs = N * N / 2 * (inner + 4 * C * h + k + q + PAIR_OVERHEAD)
    each = N * C * h * (h + C)  # K and G themselves
    entries = SAMPLE_OVERHEAD * N
    stored = N * (inner + 3 * C * h)
    pairwise = Cost(
        (4 if gradient else 1) * pairs + each + entries * row,
        8 * (min(stored, memory / 16) + 3 * pairwise_tile * row),
    )
    linear = Cost(
        (3 if gradient else 1) * N * (first + second + mixed) + each + entries * widest,
        8 * (first + second + mixed + 3 * linear_tile * widest),
    )
    fits = linear.memory <= memory
    order: Literal["pairwise", "linear"] = (
        "linear" if fits and linear.multiply_adds < pairwise.multiply_adds else "pairwise"
    )
    return Plan(pairwise, linear, order, linear_tile if order == "linear" else pairwise_tile)


def _function(quantity: Quantity, traces: Traces) -> tuple[float, float, float]:
    """Value, and derivatives by tr H and by tr H²."""
    t1, t2, P = traces.trace, traces.frobenius_squared, traces.size
    if quantity == "trace":
        return t1, 1.0, 0.0
    if quantity == "frobenius_squared":
        return t2, 0.0, 1.0
    reach = {"ws_upper": 1.0, "ws_lower": -1.0, "ws_span": 2.0}
    if quantity not in (*reach, "ws_spread"):
        msg = f"{quantity!r}: allowed: trace, frobenius_squared, ws_upper, ws_lower, ws_spread, ws_span"
        raise UsageError(msg)
    spread = math.sqrt(2 * P) if quantity == "ws_spread" else reach[quantity] * math.sqrt(P - 1)
    mean = 1.0 if quantity in ("ws_upper", "ws_lower") else 0.0
    return ws_derivatives(t1, t2, P, mean=mean, spread=spread, rounding=1e-13)


@lru_cache(maxsize=1)
def _rate() -> float:
    """Multiply-adds per second of a float64 matrix product of 384, best of 3."""
    matrix = torch.ones(384, 384, dtype=torch.float64)
    best = math.inf
    for _ in range(3):
        begun = time.perf_counter()
        torch.mm(matrix, matrix)
        best = min(best, time.perf_counter() - begun)
    return float(384**3 / best)
