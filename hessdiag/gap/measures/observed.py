"""What goes into and comes out of single layers, read off one forward pass of the sample set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hessdiag.errors import Refused
from hessdiag.gap.checkpoint import Checkpoint, WeightLayer

CONSTANT = 1e-10  # of a feature's mean square: single precision leaves 1e-13 in sums taken in double


class Passage(NamedTuple):
    """One call of a layer: its batch's index, input and output."""

    batch: int
    input: Tensor
    output: Tensor


def passages(checkpoint: Checkpoint, layer: nn.Module) -> Iterator[tuple[Tensor, list[Passage]]]:
    """For every batch the model's outputs and the calls of ``layer``; one forward pass."""
    calls: list[Passage] = []

    def note(_: nn.Module, given: Any, output: Any) -> None:
        if given and isinstance(given[0], Tensor) and isinstance(output, Tensor):
            calls.append(Passage(index, given[0].detach(), output.detach()))

    index = 0
    handle = layer.register_forward_hook(note)
    try:
        for index in range(len(checkpoint.operator.batches)):
            calls.clear()
            outputs = checkpoint.landscape.outputs(index).detach()
            yield outputs, list(calls)
    finally:
        handle.remove()


def input_spread(checkpoint: Checkpoint, layer: WeightLayer) -> Tensor | Refused:
    """Standard deviation of every input feature (or channel) of a layer, (features,) float64; 0 where constant.

    Refused where the layer was not called once per batch with floating-point inputs. One forward pass.
    """
    count, total, square = 0, torch.zeros(()), torch.zeros(())
    for _, calls in passages(checkpoint, layer.module):
        if len(calls) != 1 or not calls[0].input.is_floating_point():
            why = "is called more than once a pass, or not with numbers: its inputs have no one scale"
            return Refused(f"{layer.name} {why}")
        x = calls[0].input.double()
        features = x.movedim(1, -1) if _convolves(layer.module) else x
        rows = features.reshape(-1, features.shape[-1])
        count, total, square = count + len(rows), total + rows.sum(0), square + rows.square().sum(0)
    variance = square / count - (total / count).square()
    # what is left of a constant feature is rounding
    constant = variance <= CONSTANT * (square / count)
    return torch.where(constant, torch.zeros_like(variance), variance.clamp(min=0).sqrt())


def same_tensor_pairs(
    checkpoint: Checkpoint, pairs: Sequence[tuple[nn.Module, nn.Module]]
) -> list[tuple[nn.Module, nn.Module]]:
    """Of (first, second), those where the second is always given exactly what the first returned; one batch."""
    returned: dict[int, list[int]] = {}
    given: dict[int, list[int]] = {}
    alive: list[Tensor] = []  # an id is only a name while its tensor lives

    def note(module: nn.Module, inputs: Any, output: Any) -> None:
        for where, value in ((given, inputs[0] if inputs else None), (returned, output)):
            if isinstance(value, Tensor):
                where.setdefault(id(module), []).append(id(value))
                alive.append(value)

    handles = [module.register_forward_hook(note) for pair in pairs for module in dict.fromkeys(pair)]
    try:
        checkpoint.landscape.outputs(0)
    finally:
        for handle in handles:
            handle.remove()
    return [
        (one, two)
        for one, two in pairs
        if returned.get(id(one)) and set(returned[id(one)]) == set(given.get(id(two), []))
    ]


def _convolves(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
