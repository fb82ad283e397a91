"""Ranks that measure together must have drawn the same examples and read the same weights."""

from __future__ import annotations

from hessdiag.engine.products.curvature import Curvature
from hessdiag.hashing import of_tensors


def require_alike(operator: Curvature) -> None:
    """Compare hashes of data and weights between ranks, and take rank 0's buffers; nothing in a process alone.

    In training each rank counts running statistics of its own, of which `DistributedDataParallel` keeps rank 0's.

    Raises:
        MeasurementError: a rank has others.
    """
    group, function = operator.group, operator.function
    if group.size == 1:
        return
    buffers = {name for name, _ in operator.problem.bare_model().named_buffers()}
    held = function.tensors(function.theta)
    weights = of_tensors(held[name].detach() for name in sorted(held.keys() - buffers))
    group.require_alike({"samples": operator.samples.digest, "weights": weights})
    if buffers:
        first = group.first(lambda: {name: function.fixed[name].cpu() for name in sorted(buffers)})
        function.fixed.update({name: tensor.to(function.device) for name, tensor in first.items()})
