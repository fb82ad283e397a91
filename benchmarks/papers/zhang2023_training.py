"""Zhang, Li and Ju: NSO against SGD and SAM on handwritten digits, all with the same number of gradients."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import MultiStepLR

import hessdiag
from benchmarks.papers.zhang2023_sensing import Row
from hessdiag.problem import Problem
from hessdiag.regularizers import NSO, SAM
from hessdiag.sources import datasets

Pair = tuple[Tensor, Tensor]
SMALL = 14  # pixels a side; MNIST is halved to it
SAMPLES = 512  # that the curvature is measured on


@dataclass(frozen=True)
class Training:
    """Sizes; the strengths hold the paper's (sigma .008 to .014, rho .01 to .05) and larger ones."""

    seeds: int = 5
    gradients: int = 2000
    train: int = 2000
    validation: int = 3000
    width: int = 32
    batch: int = 64
    rate: float = 0.05
    sigmas: tuple[float, ...] = (0.01, 0.03, 0.06)
    rhos: tuple[float, ...] = (0.02, 0.05, 0.15)
    level: float = 0.05  # training cross-entropy at which runs are compared too: in reach of this budget
    looks: int = 100

    @property
    def arms(self) -> list[tuple[str, float]]:
        """Every method with every strength."""
        return [("SGD", 0.0), *(("SAM", rho) for rho in self.rhos), *(("NSO", sigma) for sigma in self.sigmas)]


def splits(sizes: Training, data: str | None) -> dict[str, Pair]:
    """MNIST with its own test set, or the embedded digits; validation is disjoint from both."""
    if data is None:
        train, test = datasets.digits()
    else:
        folder = Path(data) / "mnist"
        train, test = (
            datasets.mnist(folder / f"{part}-images-idx3-ubyte.gz", folder / f"{part}-labels-idx1-ubyte.gz")
            for part in ("train", "t10k")
        )
    first, second = slice(0, sizes.train), slice(sizes.train, sizes.train + sizes.validation)
    return {"train": _pair(train, first), "validation": _pair(train, second), "test": _pair(test, slice(None))}


def _pair(images: datasets.Images, part: slice) -> Pair:
    x = (images.pixels[part].float() * images.scale - images.mean) / images.std
    pooled = F.avg_pool2d(x, 2) if x.shape[-1] > SMALL else x
    return pooled.flatten(1), images.targets[part]


def train(sizes: Training, parts: dict[str, Pair], arm: str, strength: float, seed: int) -> list[Row]:
    """One run: curvature, losses and errors at its end, and curvature where the training loss first is `level`.

    SGD takes two steps where SAM and NSO take one of two gradients; the rate falls tenfold after each third.
    Start and order of the examples are the same in all arms of a seed.
    """
    x, y = parts["train"]
    torch.manual_seed(seed)
    width = sizes.width
    model = nn.Sequential(
        nn.Linear(x.shape[1], width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
    )
    base = SGD(model.parameters(), lr=sizes.rate, momentum=0.9)
    optimizer: Optimizer = base
    if arm != "SGD":
        optimizer = SAM(base, strength) if arm == "SAM" else NSO(base, strength, seed=seed)
    steps = sizes.gradients // (1 if arm == "SGD" else 2)
    schedule = MultiStepLR(base, [steps // 3, 2 * steps // 3], 0.1)
    order = Generator().manual_seed(seed)
    label = f"{arm} {strength:g}" if strength else arm
    rows: list[Row] = []
    every = max(1, steps // sizes.looks)
    for step in range(steps):
        chosen = torch.randint(len(x), (sizes.batch,), generator=order)
        batch = x[chosen], y[chosen]
        if isinstance(optimizer, SAM | NSO):
            optimizer.step(lambda batch=batch: F.cross_entropy(model(batch[0]), batch[1]))
        else:
            optimizer.zero_grad()
            F.cross_entropy(model(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        schedule.step()
        if not rows and (step + 1) % every == 0:
            loss, _ = scores(model, parts["train"])
            if loss <= sizes.level:
                rows += [
                    ("training", seed, label, strength, f"{name} at level", value)
                    for name, value in (curvature(model, parts["train"]) | tested(model, parts)).items()
                ]
    ended = curvature(model, parts["train"]) | tested(model, parts)
    return rows + [("training", seed, label, strength, name, value) for name, value in ended.items()]


@torch.no_grad()
def scores(model: nn.Module, data: Pair) -> tuple[float, float]:
    """Cross-entropy and error in percent."""
    out = model(data[0])
    return float(F.cross_entropy(out, data[1])), 100 * float((out.argmax(1) != data[1]).float().mean())


def tested(model: nn.Module, parts: dict[str, Pair]) -> dict[str, float]:
    """Training loss, validation error and test error."""
    loss, _ = scores(model, parts["train"])
    return {
        "train loss": loss,
        "validation error %": scores(model, parts["validation"])[1],
        "test error %": scores(model, parts["test"])[1],
    }


def curvature(model: nn.Module, data: Pair) -> dict[str, float]:
    """Trace and largest eigenvalue of the training loss's Hessian over all parameters and `SAMPLES` examples."""
    problem = Problem(model, {"train": data}, criterion="cross_entropy")
    found = hessdiag.analyze(problem, ("trace", "lambda_max"), samples=min(SAMPLES, len(data[0])), rtol=0.01)
    return {name: float(found.metrics[name].value) for name in ("trace", "lambda_max")}
