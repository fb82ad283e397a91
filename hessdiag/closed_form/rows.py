"""A user's batches as tiles of samples: flattened, in float64, weighted as the mean loss weights them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hessdiag.closed_form.network import ThreeLayer, Tile
from hessdiag.criteria import IGNORE_INDEX
from hessdiag.errors import UsageError

Batch = tuple[Tensor, Tensor]


class Rows:
    """Batches of (inputs, targets) as tiles of at most ``tile`` samples, converted to float64 as they pass.

    Args:
        net: the network.
        batches: inputs (n, d) or (n, ...) to be flattened; targets (n,) classes, -100 not counting, or (n, C)
            weights of the classes, which need not sum to 1.
        tile: most samples at a time.

    Raises:
        UsageError: shapes that do not fit the network, classes that do not exist, or nothing that counts.
    """

    def __init__(self, net: ThreeLayer, batches: Sequence[Batch], tile: int) -> None:
        self.net, self.batches, self.tile = net, batches, tile
        self.samples = sum(int(counting(y).sum()) for _, y in batches)
        if self.samples == 0:
            msg = "no sample counts: give at least one input with a target"
            raise UsageError(msg)
        self.scale = 1 / self.samples

    def __iter__(self) -> Iterator[Tile]:
        """Tiles in the order of the batches."""
        for inputs, targets in self.batches:
            keep = counting(targets)
            x, y, w = self._double(inputs[keep], targets[keep])
            for begin in range(0, len(x), self.tile):
                part = slice(begin, begin + self.tile)
                yield self.net.tile(x[part], y[part], w[part] * self.scale)

    def _double(self, inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        net = self.net
        x = inputs.detach().to(net.hidden.device, torch.float64).flatten(1)
        if x.shape[1] != net.hidden.shape[1]:
            msg = f"inputs of {x.shape[1]} features for a first layer of {net.hidden.shape[1]}: give (n, d)"
            raise UsageError(msg)
        targets = targets.detach().to(net.hidden.device)
        if not targets.is_floating_point():
            low, high = (int(targets.min()), int(targets.max())) if len(targets) else (0, 0)
            if low < 0 or high >= net.classes:
                msg = f"targets from {low} to {high}: allowed: 0 to {net.classes - 1}"
                raise UsageError(msg)
            y = torch.nn.functional.one_hot(targets.long(), net.classes).double()
            return x, y, torch.ones(len(x), dtype=torch.float64, device=x.device)
        y = targets.double()
        if y.dim() != 2 or y.shape[1] != net.classes:
            msg = f"targets of shape {tuple(y.shape)} for {net.classes} classes: give (n,) or (n, {net.classes})"
            raise UsageError(msg)
        mass = y.sum(1)
        if bool((mass == 0).any()) and bool(y[mass == 0].any()):
            msg = "a target's class weights cancel to 0: they must sum to something"
            raise UsageError(msg)
        return x, y / torch.where(mass == 0, 1.0, mass)[:, None], mass


def counting(targets: Tensor) -> Tensor:
    """Which targets (n,) count: all but -100; soft ones (n, C) always."""
    if targets.is_floating_point():
        return torch.ones(len(targets), dtype=torch.bool, device=targets.device)
    return targets != IGNORE_INDEX
