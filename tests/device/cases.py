"""What is measured on both devices, small enough for a second each."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag import Problem, analyze
from hessdiag.gap.examine import About, Examination, examine
from hessdiag.regularizers import HSR, LabelNoise, SpectralRadius, TracePenalty
from hessdiag.settings import Settings
from tests.models import generator
from tests.training_runs import KINDS, X, Y, net, sgd, state

THERE = "pretend"
FEW = {"steps": 6, "probes": 4, "density_probes": 2, "max_steps": 12, "second_opinion": False, "block": 3}

CURVED = {
    "SpectralRadius": lambda optimizer, model: SpectralRadius(optimizer, mu=0.1),
    "SpectralRadius, differences": lambda optimizer, model: SpectralRadius(optimizer, mu=0.1, third="difference"),
    "TracePenalty": lambda optimizer, model: TracePenalty(optimizer, mu=0.1, probes=2),
    "HSR": lambda optimizer, model: HSR(optimizer, model, mu=0.1, traces="closed_form"),
    "HSR, probes": lambda optimizer, model: HSR(optimizer, mu=0.1, probes=2),
    "LabelNoise": lambda optimizer, model: LabelNoise(optimizer, sigma=0.3),
}
REGULARIZERS = (*KINDS, *CURVED)


def narrowed(problem: Problem) -> Problem:
    """The same in float32."""
    problem.bare_model().float()
    for split, (x, y) in problem.data.items():
        problem.data[split] = (
            x.float() if x.is_floating_point() else x,
            y.float() if y.is_floating_point() else y,
        )
    return problem


def moved(problem: Problem, device: str) -> Problem:
    """Model and data on a device."""
    problem.bare_model().to(device)
    for split, (x, y) in problem.data.items():
        problem.data[split] = (x.to(device), y.to(device))
    return problem


def numbers(found: Any) -> Any:
    """What a result says, without its clocks."""
    if dataclasses.is_dataclass(found) and not isinstance(found, type):
        return {
            f.name: numbers(getattr(found, f.name)) for f in dataclasses.fields(found) if "seconds" not in f.name
        }
    if isinstance(found, dict):
        return {name: numbers(one) for name, one in found.items()}
    if isinstance(found, list | tuple):
        return [numbers(one) for one in found]
    if isinstance(found, Tensor):
        return found.tolist()
    return "nan" if isinstance(found, float) and math.isnan(found) else found


def analysis(problem: Problem, device: str | None, **options: Any) -> Any:
    """The numbers of an analysis."""
    asked = {**FEW, "device": device, "batch_size": 7, **options}
    return numbers(dict(analyze(problem, **asked).metrics))


def regularized(name: str, device: str, dropout: float = 0.2) -> list[Tensor]:
    """Weights and gradients after two steps, on the host; with dropout, whose masks a step's passes share."""
    model = net(nn.Dropout(dropout)) if name in KINDS else net()
    model.to(device)
    x, y = X.to(device), Y.to(device)
    own = KINDS[name](sgd(model)) if name in KINDS else CURVED[name](sgd(model), model)
    torch.manual_seed(7)
    for _ in range(2):
        if isinstance(own, LabelNoise):
            own.step(lambda: nn.functional.cross_entropy(model(x), own.targets(y, classes=3)))
        else:
            own.step(lambda: nn.functional.cross_entropy(model(x), y))
    return [tensor.cpu() for tensor in state(model)]


def examined(problem: Problem, device: str | None, *measures: str) -> dict[str, Any]:
    """The readings of one checkpoint of a gap report, by measure."""
    problem.data["test"] = problem.data["train"]
    draws = generator(5)
    named = problem.bare_model().named_parameters()
    start = {name: torch.randn(p.shape, generator=draws, dtype=p.dtype) for name, p in named}
    quantities = ("lambda_max", "trace", "frobenius_squared")
    settings = Settings(quantities=quantities, method="retained_graph", batch_size=7, device=device, **FEW)
    asked = Examination(settings=settings, measures=measures, guard=False)
    found = examine(problem, asked, About(), start=start)
    return numbers(dict(found.readings))
