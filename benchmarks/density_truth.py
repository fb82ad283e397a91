"""The eigenvalue density to compare with: all eigenvalues, or two long Lanczos runs on plain double backward.

None of it is hessdiag's. A run of some hundred steps with a float64 basis, orthogonal twice over, gives the
measure of its start; eigenvalues that it has found from the ends inward count 1/d each instead of what the start
weighs them. The mean of two starts is the truth, and half the area between them its error.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import eigh_tridiagonal

from benchmarks.truth import RESULTS, Truth, graph_product
from benchmarks.workloads import Workload
from hessdiag.files import write_whole
from hessdiag.samples import map_tensors

Array = NDArray[np.float64]
Rule = tuple[Array, Array]
Product = Callable[[Array], Array]

KEPT = RESULTS / "densities.json"
STEPS = {150_000: 400, 10**9: 160}  # up to so many parameters
FOUND = 1e-3  # residual of a Ritz value, of its distance to the next


@dataclass(frozen=True)
class DensityTruth:
    """Nodes, ascending, and weights of mass 1; ``error`` is an area as `off` counts it."""

    nodes: Array
    weights: Array
    error: float
    how: str

    def off(self, nodes: Array, weights: Array) -> float:
        """Area between two cumulative densities as a share of the mean |λ|."""
        size = float(np.abs(self.nodes) @ self.weights)
        return _area((self.nodes, self.weights), (np.asarray(nodes), np.asarray(weights))) / size


def density_truth(workload: Workload, data: str | None, known: Truth, keep: bool = True) -> DensityTruth:
    """The density of a workload: from all its eigenvalues, looked up, or computed (and kept)."""
    if known.spectrum:
        number = len(known.spectrum)
        return DensityTruth(np.array(known.spectrum), np.full(number, 1 / number), 0.0, "whole matrix, float64")
    key = f"{workload.name}/{known.digest[:16]}/{known.loss:.9g}"
    kept: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    if key not in kept:
        kept[key] = _measured(workload, data, known)
        if keep:
            write_whole(KEPT, json.dumps(kept, sort_keys=True) + "\n")
    rules = [(np.array(nodes), np.array(weights)) for nodes, weights in kept[key]]
    both = np.concatenate([nodes for nodes, _ in rules])
    order, weights = np.argsort(both), np.concatenate([weights for _, weights in rules]) / len(rules)
    mean = DensityTruth(both[order], weights[order], 0.0, "")
    apart = _area(*rules) / float(np.abs(mean.nodes) @ mean.weights)
    return DensityTruth(
        mean.nodes, mean.weights, apart / 2, f"two runs of {_steps(known)} steps, {apart:.2g} apart"
    )


def _steps(known: Truth) -> int:
    return next(steps for limit, steps in STEPS.items() if known.parameters <= limit)


def _measured(workload: Workload, data: str | None, known: Truth) -> list[Any]:
    problem = workload.problem(data)
    batches = [map_tensors(batch, torch.Tensor.contiguous) for batch in workload.sample_set(problem).batches]
    product = graph_product(problem.model, batches)
    rules = [long_run(product, known.parameters, _steps(known), seed) for seed in (1, 2)]
    return [[[float(f"{x:.9g}") for x in column] for column in rule] for rule in rules]


def long_run(product: Product, size: int, steps: int, seed: int) -> Rule:
    """Nodes and weights of the density from one start."""
    basis, alphas, betas = np.empty((steps, size)), np.empty(steps), np.empty(steps)
    vector = np.random.default_rng(seed).standard_normal(size)
    for step in range(steps):
        basis[step] = vector / np.linalg.norm(vector)
        vector = product(basis[step])
        alphas[step] = vector @ basis[step]
        for _ in range(2):
            vector -= basis[: step + 1].T @ (basis[: step + 1] @ vector)
        betas[step] = np.linalg.norm(vector)
    values, vectors = eigh_tridiagonal(alphas, betas[:-1])
    weights, residuals = vectors[0] ** 2, betas[-1] * np.abs(vectors[-1])
    gaps = np.diff(values)
    sure = residuals <= FOUND * np.minimum(np.append(gaps, np.inf), np.append(np.inf, gaps))
    counted = np.logical_and.accumulate(sure) | np.logical_and.accumulate(sure[::-1])[::-1]
    left = weights[~counted].sum()
    rest = 1 - counted.sum() / size
    return values, np.where(counted, 1 / size, weights * rest / left if left > 0 else weights)


def _area(one: Rule, other: Rule) -> float:
    x = np.unique(np.concatenate([one[0], other[0]]))
    first, second = (_below(rule, x) for rule in (one, other))
    return float(np.abs(first - second)[:-1] @ np.diff(x))


def _below(rule: Rule, x: Array) -> Array:
    order = np.argsort(rule[0])
    return np.append(0.0, np.cumsum(rule[1][order]))[np.searchsorted(rule[0][order], x, side="right")]
