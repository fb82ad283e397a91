"""What one step of each regularizer costs, in gradients of the same batch, on ResNet-20."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import SGD

from benchmarks.models import ResNet20
from benchmarks.tables import Row
from benchmarks.timing import one_thread, paired
from hessdiag.regularizers import (
    ASAM,
    GSAM,
    HSR,
    MSAM,
    NSO,
    SAM,
    USAM,
    FriendlySAM,
    LabelNoise,
    LookSAM,
    SpectralRadius,
    TracePenalty,
)
from hessdiag.regularizers.wrapper import Regularizer

Step = Callable[[], object]
TWO_PASSES = "SAM by its definition"
SLACK = 0.15
KEPT, PRODUCT = (1.3, 2.0), (1.5, 2.6)  # of a pass with its graph kept and of a product: the docstrings' figures


@dataclass(frozen=True)
class Stepper:
    """A step to be measured.

    Attributes:
        make: from a model and its batch to a function that does one step.
        states: least and most gradients, as the docstring says.
    """

    make: Callable[[nn.Module, Tensor, Tensor], Step]
    states: tuple[float, float]


def run(data: str | None, quick: bool = False) -> list[Row]:  # noqa: ARG001 - costs do not depend on the data
    """One row per step: medians over rounds, in each of which every step follows a gradient."""
    one_thread()
    torch.manual_seed(0)
    size, rounds = (2, 1) if quick else (64, 7)
    x, y = torch.randn(size, 3, 32, 32), torch.randint(10, (size,))
    model = ResNet20()
    gradient = _gradient(copy.deepcopy(model), x, y)
    chosen = list(STEPPERS)[: 3 if quick else None]
    steps = {name: STEPPERS[name].make(copy.deepcopy(model), x, y) for name in chosen}
    for call in (gradient, *steps.values()):
        call()
    costs = paired(steps, gradient, rounds)
    return [_row(f"resnet20, batch {size}", name, costs) for name in steps]


def _row(workload: str, name: str, costs: dict[str, list[float]]) -> Row:
    cost = statistics.median(costs[name])
    low, high = STEPPERS[name].states
    if name == TWO_PASSES:
        return Row(workload, "two passes", f"{name} [gradients]", cost, 1.0, "2 by count")
    pairs = [own / peer for own, peer in zip(costs[name], costs[TWO_PASSES], strict=True)]
    said = f"states {low:g}" if low == high else f"states {low:g} to {high:g}"
    over = cost / high - 1
    verdict = f"within {SLACK:.0%}" if over <= SLACK else f"over by {over:.0%}"
    ratio = statistics.median(pairs) if (low, high) == (2, 2) else None
    return Row(workload, "hessdiag", f"{name} [gradients]", cost, ratio, f"{said}: {verdict}")


def _gradient(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    parameters = list(model.parameters())
    return lambda: torch.autograd.grad(F.cross_entropy(model(x), y), parameters)


def _sam_by_definition(model: nn.Module, x: Tensor, y: Tensor, rho: float = 0.05) -> Step:
    """Foret et al. 2021, algorithm 1, as training loops do it: backward, ascend, backward, put back, step."""
    parameters = list(model.parameters())
    optimizer = _sgd(model)

    def ascend() -> list[Tensor]:
        grads = [p.grad for p in parameters if p.grad is not None]
        length = torch.stack([g.norm() for g in grads]).norm()
        kept = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters:
                if p.grad is not None:
                    p.add_(p.grad * (rho / (length + 1e-12)))
        optimizer.zero_grad()
        return kept

    def descend(kept: list[Tensor]) -> None:
        with torch.no_grad():
            for p, old in zip(parameters, kept, strict=True):
                p.copy_(old)
        optimizer.step()
        optimizer.zero_grad()

    def step() -> None:
        torch.autograd.backward(F.cross_entropy(model(x), y))
        kept = ascend()
        torch.autograd.backward(F.cross_entropy(model(x), y))
        descend(kept)

    return step


def _sgd(model: nn.Module) -> SGD:
    return SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)


def _label_noise(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    noisy = LabelNoise(_sgd(model), sigma=0.1)
    return lambda: noisy.step(lambda: F.cross_entropy(model(x), noisy.targets(y, classes=10)))


def _wrapped(wrap: Callable[[SGD], Regularizer], steps: int = 1, parts: int = 1) -> Callable[..., Step]:
    def make(model: nn.Module, x: Tensor, y: Tensor) -> Step:
        regularizer = wrap(_sgd(model))
        pairs = list(zip(x.chunk(parts), y.chunk(parts), strict=True))
        closures = [lambda x=x, y=y: F.cross_entropy(model(x), y) for x, y in pairs]
        return lambda: [regularizer.step(closures) for _ in range(steps)]

    return make


def _in_two_calls(model: nn.Module, x: Tensor, y: Tensor) -> Step:
    sam = SAM(_sgd(model), model=model)

    def step() -> None:
        torch.autograd.backward(F.cross_entropy(model(x), y))
        sam.first_step()
        torch.autograd.backward(F.cross_entropy(model(x), y))
        sam.second_step(zero_grad=True)

    return step


def _stated(kept: int, products: int, gradients: int) -> tuple[float, float]:
    low, high = (k * kept + p * products + gradients for k, p in zip(KEPT, PRODUCT, strict=True))
    return round(low, 1), round(high, 1)


STEPPERS = {
    TWO_PASSES: Stepper(_sam_by_definition, (2, 2)),
    "SAM": Stepper(_wrapped(SAM), (2, 2)),
    "NSO, k = 1": Stepper(_wrapped(NSO), (2, 2)),
    "ASAM": Stepper(_wrapped(ASAM), (2, 2)),
    "SAM in two calls": Stepper(_in_two_calls, (2, 2)),
    "USAM": Stepper(_wrapped(USAM), (2, 2)),
    "m-SAM, 4 micro-batches": Stepper(_wrapped(MSAM, parts=4), (2, 2)),
    "GSAM": Stepper(_wrapped(GSAM), (2, 2)),
    "FriendlySAM": Stepper(_wrapped(FriendlySAM), (2, 2)),
    "LookSAM, every=5, five steps": Stepper(_wrapped(LookSAM, steps=5), (6, 6)),
    "LabelNoise": Stepper(_label_noise, (1, 1)),
    "TracePenalty, differences": Stepper(_wrapped(lambda sgd: TracePenalty(sgd, third="difference")), (3, 3)),
    "SpectralRadius, 3 products": Stepper(
        _wrapped(lambda sgd: SpectralRadius(sgd, iterations=3)), _stated(kept=1, products=3, gradients=2)
    ),
    "HSR, 1 probe": Stepper(_wrapped(lambda sgd: HSR(sgd, probes=1)), _stated(kept=3, products=3, gradients=0)),
    "SpectralRadius, 3 products, every=4, four steps": Stepper(
        _wrapped(lambda sgd: SpectralRadius(sgd, iterations=3, every=4), steps=4),
        _stated(kept=1, products=3, gradients=2 + 3),
    ),
    "HSR, 1 probe, every=4, four steps": Stepper(
        _wrapped(lambda sgd: HSR(sgd, probes=1, every=4), steps=4), _stated(kept=3, products=3, gradients=3)
    ),
}
