"""The closed form as results: exact estimates for the sweep, with what each tensor adds."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hessdiag.closed_form.network import ThreeLayer
from hessdiag.closed_form.recognize import Recognized, recognize
from hessdiag.closed_form.rows import counting
from hessdiag.closed_form.traces import Plan, Traces, plan, three_layer
from hessdiag.engine.products.curvature import Curvature
from hessdiag.errors import Refused
from hessdiag.results import Bound, Estimate, Layer, Provenance
from hessdiag.resume import once
from hessdiag.spectral.other_bounds import blockwise_ws

MOST = 1e12  # multiply-adds, about a minute on two cores: beyond, probes are the better use of time
ROUNDING = 1e-9  # 1e-14 against dense Hessians; a baseline keeps ten digits, and must not seem changed by that


@dataclass(frozen=True)
class ClosedForm:
    """What the closed form knows of an operator.

    Attributes:
        trace: tr H, kind "exact".
        frobenius_squared: tr H², kind "exact".
        effective_rank: (tr H)² / tr H², kind "exact"; 0 for the zero matrix.
        layers: tr H per parameter tensor, in the operator's order.
        per_sample: what each counting sample adds (N,), as of `Traces`.
        per_batch: tr H of each batch's mean (batches,), 0 where nothing counts.
        found: the network.
        traces: everything the closed form gave.
    """

    trace: Estimate
    frobenius_squared: Estimate
    effective_rank: Estimate
    layers: tuple[Layer, ...]
    per_sample: Tensor
    per_batch: Tensor
    found: Recognized
    traces: Traces

    def blockwise(
        self, *, lambda_max: float | None = None, lambda_min: float | None = None
    ) -> tuple[Bound, Bound]:
        """Bounds on λ_max and λ_min from the traces of hidden and output layer: never looser than ‖H‖_F."""
        one, two, three, four = self.traces.per_tensor
        first, second, mixed = self.traces.blocks
        sizes = _sizes(self.found.net)
        kept = [i for i in (0, 1) if sizes[i]]
        squares = ((first, mixed), (mixed, second))
        return blockwise_ws(
            [(one + two, three + four)[i] for i in kept],
            [[squares[i][j] for j in kept] for i in kept],
            [sizes[i] for i in kept],
            lambda_max=lambda_max,
            lambda_min=lambda_min,
        )


def closed_ws(operator: Curvature, *, most: float = MOST) -> ClosedForm | Refused:
    """Exact tr H and tr H² where the operator is that of a three-layer network; or one line saying why not.

    Args:
        operator: the Hessian or the Gauss-Newton matrix of a problem on its samples.
        most: multiply-adds it may take.

    Returns:
        The estimates, float64 whatever the operator's dtype. Cost: `traces.plan`, and no products.
    """
    found = affordable(operator, most)
    return found if isinstance(found, Refused) else exact_traces(operator, found)


def affordable(operator: Curvature, most: float) -> Recognized | Refused:
    """The three-layer network in an operator, if its traces take at most ``most`` multiply-adds; or why not."""
    found = recognize(operator.problem, operator.samples, kind=operator.kind)
    if isinstance(found, Refused):
        return found
    takes = foreseen(found).cost.multiply_adds
    if takes > most:
        return Refused(f"the closed form takes {takes:.1g} multiply-adds, more than {most:.1g}")
    return found


def foreseen(found: Recognized) -> Plan:
    """What the traces of a network found will take."""
    return plan(found.net, sum(len(y) for _, y in found.batches))


def exact_traces(operator: Curvature, found: Recognized) -> ClosedForm:
    """The estimates of `closed_ws`, of a network already found in the operator."""
    samples = sum(len(y) for _, y in found.batches)
    traces = once(operator, "closed form", partial(three_layer, found.net, found.batches), into=Traces)
    method = f"closed form of a three-layer network, {traces.order} order"
    provenance = Provenance(method=method, settings={"samples": samples}, dtype="float64")
    pairs = zip(found.names, traces.per_tensor, strict=True)
    by_name = {name: value for name, value in pairs if name is not None}
    layers = []
    for name, size in operator.layout:
        lo, hi = _interval(by_name[name], traces)
        layers.append(Layer(name=name, size=size, trace=by_name[name], lo=lo, hi=hi, kind="exact"))
    return ClosedForm(
        _exact("trace", traces.trace, _interval(traces.trace, traces), provenance),
        _exact("frobenius_squared", traces.frobenius_squared, _square(traces), provenance),
        _exact("effective_rank", *_rank(traces), provenance),
        tuple(layers),
        traces.per_sample,
        _by_batch(found, traces.per_sample),
        found,
        traces,
    )


def _exact(quantity: str, value: float, interval: tuple[float, float], provenance: Provenance) -> Estimate:
    lo, hi = interval
    return Estimate(
        quantity=quantity,
        value=value,
        lo=lo,
        hi=hi,
        kind="exact",
        confidence=1.0,
        stderr=0.0,
        provenance=provenance,
    )


def _interval(value: float, traces: Traces) -> tuple[float, float]:
    """Rounding of a sum whose terms may cancel: relative to ‖H‖_F too, which no cancellation makes small."""
    room = ROUNDING * (abs(value) + traces.frobenius_squared**0.5)
    return value - room, value + room


def _square(traces: Traces) -> tuple[float, float]:
    value = traces.frobenius_squared
    return value * (1 - ROUNDING), value * (1 + ROUNDING)


def _rank(traces: Traces) -> tuple[float, tuple[float, float]]:
    t2 = traces.frobenius_squared
    if t2 <= 0:
        return 0.0, (0.0, 0.0)
    root, room = traces.trace / t2**0.5, ROUNDING * (1 + abs(traces.trace) / t2**0.5)
    return root**2, (max(abs(root) - room, 0.0) ** 2, (abs(root) + 2 * room) ** 2)


def _by_batch(found: Recognized, per_sample: Tensor) -> Tensor:
    parts = torch.split(per_sample, [int(counting(targets).sum()) for _, targets in found.batches])
    return torch.stack([part.sum() / max(len(part), 1) for part in parts])


def _sizes(net: ThreeLayer) -> tuple[int, int]:
    """Parameters that count in the hidden and in the output layer."""
    one, two, three, four = (
        t.numel() if c and t is not None else 0 for t, c in zip(net.tensors, net.counts, strict=True)
    )
    return one + two, three + four
