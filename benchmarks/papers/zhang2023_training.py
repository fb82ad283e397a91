"""Zhang, Li and Ju: fine-tuning with NSO against SGD and its usual remedies, at equal numbers of gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Generator, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

import hessdiag
from benchmarks.papers.samples import Split as Pair
from benchmarks.papers.samples import drawn, mnist
from benchmarks.papers.zhang2023_sensing import Row
from hessdiag.problem import Problem
from hessdiag.regularizers import NSO, SAM
from hessdiag.sources import datasets

SMALL = 14  # pixels a side; MNIST is halved to it
TWICE = ("SAM", "NSO")  # two gradients a step


@dataclass(frozen=True)
class Training:
    """Sizes and grids.

    Attributes:
        seeds: judged; each draws its own training set.
        tuning: seeds that rate and strength are chosen with; none of them is judged.
        pretrain: pictures turned by 90 degrees that the network is trained on first.
        train: upright pictures to fine-tune on.
        level: training cross-entropy at which curvature is compared, interpolated between looks.
    """

    seeds: int = 10
    tuning: int = 2
    gradients: int = 1600
    pretrain: int = 8000
    train: int = 400
    validation: int = 2000
    width: int = 48
    batch: int = 50
    rates: tuple[float, ...] = (0.02, 0.05, 0.1)
    strengths: dict[str, tuple[float, ...]] = field(
        default_factory=lambda: {
            "SGD": (0.0,),
            "weight decay": (1e-3, 5e-3, 2e-2),
            "one-point": (0.03, 0.06, 0.1, 0.2),
            "SAM": (0.05, 0.1, 0.2),
            "NSO": (0.03, 0.06, 0.1, 0.2),
        }
    )
    level: float = 0.03
    looks: int = 25


class Digits:
    """Pictures to pretrain on, to fine-tune on (each seed its own), to choose by, and to test on."""

    def __init__(self, sizes: Training, data: str | None) -> None:
        train, test = datasets.digits() if data is None else mnist(data)
        self.sizes = sizes
        ends = np.cumsum([sizes.pretrain, sizes.validation])
        self.before = _pair(train, slice(0, ends[0]), turned=True)
        self.validation = _pair(train, slice(ends[0], ends[1]))
        self.pool = _pair(train, slice(ends[1], None))
        self.test = _pair(test, slice(None))

    def training(self, seed: int) -> Pair:
        """The training set of a seed."""
        return drawn(self.pool, seed, self.sizes.train)[0]


def _pair(images: datasets.Images, part: slice, *, turned: bool = False) -> Pair:
    x = (images.pixels[part].float() * images.scale - images.mean) / images.std
    pooled = F.avg_pool2d(x, 2) if x.shape[-1] > SMALL else x
    return (pooled.rot90(1, (2, 3)) if turned else pooled).flatten(1), images.targets[part]


def pretrained(sizes: Training, digits: Digits, seed: int = 0) -> nn.Sequential:
    """A network that knows the turned pictures."""
    torch.manual_seed(seed)
    x, y = digits.before
    width = sizes.width
    model = nn.Sequential(
        nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9)
    order = Generator().manual_seed(seed)
    for _ in range(sizes.gradients):
        chosen = torch.randint(len(x), (sizes.batch,), generator=order)
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model


def study(sizes: Training, data: str | None) -> list[Row]:
    """Rate and strength of every method by validation error, then the judged seeds with curvature on the way."""
    digits = Digits(sizes, data)
    start = pretrained(sizes, digits)
    rows: list[Row] = []
    for method, strengths in sizes.strengths.items():
        errors = {}
        for rate in sizes.rates:
            for strength in strengths:
                ends = [
                    list(finetuned(sizes, digits, start, Recipe(method, rate, strength), 100 + seed))[-1]
                    for seed in range(sizes.tuning)
                ]
                errors[rate, strength] = float(np.mean([end["validation error %"] for end in ends]))
        rate, strength = min(errors, key=lambda pair: errors[pair])
        rows += [("chosen", -1, method, 0, "rate", rate), ("chosen", -1, method, 0, "strength", strength)]
        for seed in range(sizes.seeds):
            recipe = Recipe(method, rate, strength)
            for look in finetuned(sizes, digits, start, recipe, seed, looks=sizes.looks, measure=curvature):
                at = look.pop("gradients")
                rows += [("training", seed, method, at, name, value) for name, value in look.items()]
    return rows


@dataclass(frozen=True)
class Recipe:
    """A method with the rate and the strength chosen for it."""

    method: str
    rate: float
    strength: float


def beginning(start: nn.Sequential, seed: int) -> nn.Sequential:
    """The pretrained network, its head drawn anew by the seed."""
    model = deepcopy(start)
    torch.manual_seed(seed)
    model[-1].reset_parameters()  # type: ignore[operator]
    return model


def finetuned(
    sizes: Training,
    digits: Digits,
    start: nn.Sequential,
    recipe: Recipe,
    seed: int,
    *,
    looks: int = 1,
    measure: Callable[[nn.Module, Pair], dict[str, float]] | None = None,
) -> Iterator[dict[str, float]]:
    """One run, looked at on the way; head, training set and order of the examples are those of the seed.

    Args:
        sizes: of the study.
        digits: all pictures.
        start: the pretrained network.
        recipe: what to train by.
        seed: of the run.
        looks: at the run; 1: at its end.
        measure: what else to take at a look, of the network and its training set.
    """
    method, rate, strength = recipe.method, recipe.rate, recipe.strength
    x, y = digits.training(seed)
    model = beginning(start, seed)
    decay = strength if method == "weight decay" else 0.0
    base = SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=decay)
    optimizer: Optimizer = base
    if method == "SAM":
        optimizer = SAM(base, strength)
    elif method in ("NSO", "one-point"):
        optimizer = NSO(base, strength, seed=seed, two_point=method == "NSO")
    cost = 2 if method in TWICE else 1
    steps = sizes.gradients // cost
    schedule = CosineAnnealingLR(base, steps)
    order = Generator().manual_seed(seed)
    # evenly in the logarithm: the loss falls fastest at the beginning
    at = (
        set(np.geomspace(max(1, steps // 50), steps, looks).round().astype(int).tolist()) if looks > 1 else {steps}
    )
    for step in range(1, steps + 1):
        chosen = torch.randint(len(x), (sizes.batch,), generator=order)
        batch = x[chosen], y[chosen]
        if isinstance(optimizer, SAM | NSO):
            optimizer.step(lambda batch=batch: F.cross_entropy(model(batch[0]), batch[1]))
        else:
            optimizer.zero_grad()
            F.cross_entropy(model(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
        if step in at:
            yield {
                "gradients": step * cost,
                "train loss": scores(model, (x, y))[0],
                "validation error %": scores(model, digits.validation)[1],
                "test error %": scores(model, digits.test)[1],
            } | (measure(model, (x, y)) if measure else {})


@torch.no_grad()
def scores(model: nn.Module, data: Pair) -> tuple[float, float]:
    """Cross-entropy and error in percent."""
    out = model(data[0])
    return float(F.cross_entropy(out, data[1])), 100 * float((out.argmax(1) != data[1]).float().mean())


def curvature(model: nn.Module, data: Pair) -> dict[str, float]:
    """Trace and largest eigenvalue of the training loss's Hessian, on the whole training set."""
    problem = Problem(model, {"train": data}, criterion="cross_entropy")
    found = hessdiag.analyze(
        problem, ("trace", "lambda_max"), samples=len(data[0]), rtol=0.01, second_opinion=False
    )
    return {name: float(found.metrics[name].value) for name in ("trace", "lambda_max")}
