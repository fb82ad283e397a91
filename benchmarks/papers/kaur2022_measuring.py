"""Measurements of kaur2022: lambda_max at the end of a run; for BatchNorm at full batch between iterates, too."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.papers.kaur2022_training import EPSILON, Run, Split
from hessdiag.engine.products.curvature import Curvature
from hessdiag.problem import Problem
from hessdiag.samples import draw
from hessdiag.spectral import extremes

Row = dict[str, float | int | bool | str]


def measured(run: Run, train: Split, test: Split, points: int, rtol: float) -> Row:
    """One row: how it was trained, where that ended, and how sharp it is there if it ended at the level."""
    row: Row = {**asdict(run.cell), "seed": run.seed, "epochs": run.epochs, "reached": run.reached}
    row |= {"train accuracy": accuracy(run.model, train), "test accuracy": accuracy(run.model, test)}
    if not run.reached:
        return row | dict.fromkeys(("at the iterate", "lambda_max", "of 2/lr"), float("nan"))
    here = sharpness(run.model, train, run.cell.batch, rtol)
    full = run.cell.batch == len(train[1])
    largest = here if not (run.cell.norm and full) else max(here, *between_iterates(run, train, points, rtol))
    return row | {"at the iterate": here, "lambda_max": largest, "of 2/lr": largest * run.cell.lr / 2}


def accuracy(model: nn.Module, data: Split) -> float:
    """In eval mode."""
    with torch.no_grad():
        return float((model(data[0]).argmax(1) == data[1]).float().mean())


def batch_statistics(model: nn.Module, batch: Any, *, chunk: int) -> Tensor:
    """Logits of a Sequential in train mode, ``chunk`` pictures at a time, running statistics left alone."""
    x: Tensor = batch[0]
    for layer in model.children():
        if isinstance(layer, nn.BatchNorm1d):
            parts = x.reshape(-1, min(chunk, len(x)), x.shape[1])
            var, mean = torch.var_mean(parts, 1, correction=0, keepdim=True)
            parts = (parts - mean) * (var + EPSILON).rsqrt() * layer.weight + layer.bias
            x = parts.reshape(x.shape)
        else:
            x = layer(x)
    return x


def sharpness(model: nn.Sequential, train: Split, batch: int, rtol: float) -> float:
    """lambda_max of the mean cross-entropy; with BatchNorm in train mode, on batches of the size trained with."""
    normalizing = any(isinstance(layer, nn.BatchNorm1d) for layer in model)
    forward = partial(batch_statistics, chunk=batch) if normalizing else None
    problem = Problem(model, {"train": train}, criterion="cross_entropy", forward=forward)
    size = len(train[1])
    operator = Curvature(problem, draw(train, samples=size, batch_size=size), method="retained_graph")
    found = extremes(operator, which=("max",), rtol=rtol).lambda_max
    return float("nan") if found is None else found.value


def between_iterates(run: Run, train: Split, points: int, rtol: float) -> list[float]:
    """lambda_max on the way to where one more step leads, at the later of ``points`` equally spaced places.

    The paper takes 8 places and the first is the iterate itself, which is left out here.
    """
    order = torch.randperm(len(train[1]), generator=torch.Generator().manual_seed(run.seed))
    chosen = order[: run.cell.batch]
    x, y = train[0][chosen], train[1][chosen]
    model = deepcopy(run.model)
    weights = list(model.parameters())
    loss = F.cross_entropy(batch_statistics(model, (x, y), chunk=len(y)), y)
    gradients = torch.autograd.grad(loss, weights)
    found = []
    for _ in range(points - 1):
        with torch.no_grad():
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.sub_(gradient, alpha=run.cell.lr / (points - 1))
        found.append(sharpness(model, train, run.cell.batch, rtol))
    return found
