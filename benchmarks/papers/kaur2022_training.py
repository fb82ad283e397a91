"""Training of kaur2022: networks of one cell, and of several, stacked so that one pass serves all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.papers import samples
from benchmarks.papers.samples import Split, drawn
from hessdiag.sources import datasets

SIDE = 8  # pixels, of the embedded digits
MOMENTUM, EPSILON = 0.1, 1e-5  # of running statistics, torch's own


@dataclass(frozen=True, order=True)
class Cell:
    """How a network is trained: plain SGD at a constant rate, and at most one of the paper's other factors."""

    batch: int
    lr: float
    rho: float = 0.0
    dropout: float = 0.0
    norm: bool = False


@dataclass(frozen=True)
class Run:
    """A network at its stopping level, at the last epoch allowed, or diverged."""

    cell: Cell
    seed: int
    model: nn.Sequential
    epochs: int
    reached: bool


class Pictures:
    """Pictures of which every seed draws its own training set: seeds are then draws of the data, too.

    Attributes:
        pool: to draw from, standardized by its own mean and spread.
        test: of every seed; None tests a seed on what it did not draw.
        train: size of a training set.
    """

    def __init__(self, pool: Split, test: Split | None, train: int) -> None:
        mean, std = pool[0].mean(0), pool[0].std(0).clamp(min=0.1)  # corners are black but for a few pictures
        self.pool = ((pool[0] - mean) / std, pool[1])
        self.test = None if test is None else ((test[0] - mean) / std, test[1])
        self.train = train

    def split(self, seed: int) -> tuple[Split, Split]:
        """Training and test set of a seed."""
        chosen, others = drawn(self.pool, seed, self.train)
        return chosen, self.test or others

    def training(self, seed: int) -> Split:
        """The training set of a seed."""
        return self.split(seed)[0]


def digits(train: int) -> Pictures:
    """The embedded digits: every seed trains on ``train`` of them and is tested on the others."""
    parts = datasets.digits()
    pool = (torch.cat([_rows(part) for part in parts]), torch.cat([part.targets for part in parts]))
    return Pictures(pool, None, train)


def mnist(data: str, train: int) -> Pictures:
    """MNIST at 8 x 8 pixels: every seed trains on ``train`` of its training pictures; one test set for all."""
    first, second = samples.mnist(data)
    return Pictures((_rows(first), first.targets), (_rows(second), second.targets), train)


def _rows(images: datasets.Images) -> Tensor:
    x = images.pixels.float() * images.scale
    if x.shape[-1] != SIDE:
        x = F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True)
    return x.flatten(1)


def network(width: int, norm: bool = False) -> nn.Sequential:
    """Two hidden layers of ReLU on 64 pixels, for 10 classes: the paper's MLP, narrower."""
    layers: list[nn.Module] = []
    for inputs in (SIDE**2, width):
        layers += [nn.Linear(inputs, width), *([nn.BatchNorm1d(width)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


class Fleet:
    """Networks of one architecture and batch size side by side: every tensor has a first dimension of runs."""

    def __init__(self, runs: list[tuple[Cell, int]], width: int) -> None:
        models = []
        for cell, seed in runs:
            torch.manual_seed(seed)
            models.append(network(width, cell.norm))
        self.template = models[0]
        parameters, buffers = torch.func.stack_module_state(models)
        self.weights = {name: value.detach().requires_grad_() for name, value in parameters.items()}
        self.buffers = buffers
        self.lr, self.rho, self.dropout = (
            torch.tensor([getattr(cell, name) for cell, _ in runs]) for name in ("lr", "rho", "dropout")
        )

    def keep(self, rows: Tensor) -> None:
        """Go on with these runs alone."""
        self.weights = {name: value.detach()[rows].requires_grad_() for name, value in self.weights.items()}
        self.buffers = {name: value[rows] for name, value in self.buffers.items()}
        self.lr, self.rho, self.dropout = self.lr[rows], self.rho[rows], self.dropout[rows]

    def outputs(self, x: Tensor, training: bool) -> Tensor:
        """Logits (runs, batch, 10) of pictures (runs, batch, 64)."""
        for place, layer in enumerate(self.template):
            if isinstance(layer, nn.Linear):
                x = torch.baddbmm(self.weights[f"{place}.bias"][:, None], x, self.weights[f"{place}.weight"].mT)
            elif isinstance(layer, nn.BatchNorm1d):
                x = self._normalized(x, place, training)
            else:
                x = torch.relu(x)
                if training and bool(self.dropout.any()):
                    kept = 1 - self.dropout[:, None, None]
                    x = x * (torch.rand(x.shape) < kept) / kept
        return x

    def _normalized(self, x: Tensor, place: int, training: bool) -> Tensor:
        mean, var = self.buffers[f"{place}.running_mean"], self.buffers[f"{place}.running_var"]
        if training:
            var_here, mean_here = torch.var_mean(x, 1, correction=0)
            unbiased = var_here.detach() * x.shape[1] / max(x.shape[1] - 1, 1)
            self.buffers[f"{place}.running_mean"] = mean.lerp(mean_here.detach(), MOMENTUM)
            self.buffers[f"{place}.running_var"] = var.lerp(unbiased, MOMENTUM)
            mean, var = mean_here, var_here
        scale = self.weights[f"{place}.weight"] * (var + EPSILON).rsqrt()
        shift = self.weights[f"{place}.bias"] - mean * scale
        normalized: Tensor = x * scale[:, None] + shift[:, None]
        return normalized

    def gradients(self, x: Tensor, y: Tensor) -> list[Tensor]:
        """Of every run's own mean cross-entropy: a run's weights matter to no other run's loss."""
        logits = self.outputs(x, training=True)
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / y.shape[1]
        return list(torch.autograd.grad(loss, list(self.weights.values())))

    def step(self, x: Tensor, y: Tensor) -> None:
        """SGD, or SAM over it: one ascent step of length rho on the same batch."""
        found = self.gradients(x, y)
        if bool(self.rho.any()):
            norm = torch.stack([g.flatten(1).square().sum(1) for g in found]).sum(0).sqrt()
            climb = [_along(self.rho / norm.clamp(min=1e-12), g) for g in found]
            self._add(climb, 1.0)
            found = self.gradients(x, y)
            self._add(climb, -1.0)
        self._add([_along(self.lr, g) for g in found], -1.0)

    @torch.no_grad()
    def _add(self, directions: list[Tensor], factor: float) -> None:
        for value, direction in zip(self.weights.values(), directions, strict=True):
            value.add_(direction, alpha=factor)

    @torch.no_grad()
    def accuracy(self, x: Tensor, y: Tensor) -> Tensor:
        """Per run on its own pictures (runs, n, 64), in eval mode."""
        right: Tensor = self.outputs(x, training=False).argmax(-1) == y
        return right.float().mean(1)

    def finite(self) -> Tensor:
        """Per run, whether it has not diverged."""
        return torch.stack([value.detach().flatten(1).isfinite().all(1) for value in self.weights.values()]).all(0)

    def model(self, row: int) -> nn.Sequential:
        """One run as a module of its own, in eval mode."""
        alone = network(self.template[0].out_features, isinstance(self.template[1], nn.BatchNorm1d))  # type: ignore[arg-type]
        state = {name: value.detach()[row].clone() for name, value in (self.weights | self.buffers).items()}
        alone.load_state_dict(state)
        return alone.eval()


def _along(factor: Tensor, gradient: Tensor) -> Tensor:
    return factor.reshape(-1, *[1] * (gradient.dim() - 1)) * gradient


def trained(
    cells: Iterable[Cell],
    seeds: Iterable[int],
    train: Callable[[int], Split],
    *,
    width: int,
    epochs: int,
    level: float,
) -> Iterator[Run]:
    """Every cell with every seed up to a level of training accuracy.

    Equal seeds share start, training set and batches. ``train`` gives the training set of a seed, all of one size.
    """

    def kind(run: tuple[Cell, int]) -> tuple[int, bool, bool, bool]:
        cell = run[0]
        return cell.batch, cell.norm, cell.rho > 0, cell.dropout > 0

    for _, group in groupby(sorted(product(set(cells), seeds), key=lambda run: (kind(run), run)), key=kind):
        yield from _together(Fleet(runs := list(group), width), runs, train, epochs, level)


def _together(
    fleet: Fleet, runs: list[tuple[Cell, int]], train: Callable[[int], Split], epochs: int, level: float
) -> Iterator[Run]:
    batch = runs[0][0].batch
    torch.manual_seed(0)  # of the dropout
    orders = {seed: torch.Generator().manual_seed(seed) for _, seed in runs}
    sets = {seed: train(seed) for seed in orders}
    x, y = (torch.stack([sets[seed][part] for _, seed in runs]) for part in (0, 1))
    for epoch in range(1, epochs + 1):
        drawn = {seed: torch.randperm(y.shape[1], generator=each) for seed, each in orders.items()}
        order = torch.stack([drawn[seed] for _, seed in runs])
        for chosen in order.split(batch, 1):  # type: ignore[no-untyped-call]
            own = torch.arange(len(runs))[:, None]
            fleet.step(x[own, chosen], y[own, chosen])
        reached = fleet.accuracy(x, y) >= level
        over = (reached | ~fleet.finite()) if epoch < epochs else torch.ones_like(reached)
        for row in over.nonzero().flatten().tolist():
            cell, seed = runs[row]
            yield Run(cell, seed, fleet.model(row), epoch, bool(reached[row]))
        left = (~over).nonzero().flatten()
        if not len(left):
            return
        if len(left) < len(runs):
            fleet.keep(left)
            x, y = x[left], y[left]
            runs = [runs[row] for row in left.tolist()]
