"""Truths to compare with, made without hessdiag's engine or estimators.

Extremes: SciPy's ``eigsh`` finds the eigenvectors on plain double backward in the model's own dtype; a fresh
product in float64 then gives the Rayleigh quotient and its residual. The quotient's error is of the order of the
residual squared over the gap, and never more than the residual, which is written beside it.

Trace: where the network is piecewise linear in its weights, by one backward per example and class in float64
(trace of H = trace of the Gauss-Newton matrix); for the digits MLP and tiny models, from the whole matrix;
otherwise, and for the squares, quadratic forms of random signs in the complement of the top eigenvectors, with
their standard error.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.timing import one_thread
from benchmarks.workloads import Workload
from hessdiag.files import write_whole
from hessdiag.samples import SampleSet, map_tensors

RESULTS = Path(__file__).parent / "results"
KEPT = RESULTS / "truth.json"
_MEASURED: dict[str, dict[str, Any]] = {}  # by this process, also where nothing is to be written
DENSE_LIMIT = 3000  # parameters: below it the whole matrix is formed
BUDGETS = {150_000: (40, 1000), 10**9: (6, 20)}  # up to so many parameters: top eigenvectors, random signs


@dataclass(frozen=True)
class Fact:
    """A true value: within ``error`` of ``value``, which is rounding, a residual or a standard error."""

    value: float
    error: float
    how: str


@dataclass(frozen=True)
class Truth:
    """What is known of one workload on one sample set."""

    workload: str
    digest: str  # of the sample set
    examples: int
    parameters: int
    loss: float
    facts: dict[str, Fact]
    spectrum: tuple[float, ...] = ()  # all eigenvalues, ascending, where the whole matrix was formed

    def __getitem__(self, quantity: str) -> Fact:
        return self.facts[quantity]


def truth(workload: Workload, data: str | None, device: str = "cpu", keep: bool = True) -> Truth:
    """The truth of a workload: looked up by its name, samples and weights, or computed (and kept)."""
    one_thread()
    problem = workload.problem(data)
    samples = workload.sample_set(problem)
    weights = float(sum(p.detach().double().abs().sum() for p in problem.model.parameters()))
    key = f"{workload.name}/{samples.digest[:16]}/{weights:.9g}"
    entry = _kept().get(key) or _MEASURED.get(key)
    if entry is None:
        entry = _MEASURED[key] = asdict(measure(workload, problem.model, samples, device))
        if keep:
            known = _kept() | {key: entry}  # read again: another process may have added to it
            write_whole(KEPT, json.dumps(known, indent=1, sort_keys=True) + "\n")
    facts = {name: Fact(**fact) for name, fact in entry["facts"].items()}
    return Truth(**{**entry, "facts": facts, "spectrum": tuple(entry["spectrum"])})


def _kept() -> dict[str, Any]:
    return json.loads(KEPT.read_text()) if KEPT.exists() else {}


def measure(workload: Workload, model: nn.Module, samples: SampleSet, device: str = "cpu") -> Truth:
    """Everything that can be known of the Hessian of mean cross-entropy on these samples."""
    model = copy.deepcopy(model).eval().to(device)
    double = copy.deepcopy(model).double()
    batches = [map_tensors(batch, lambda leaf: leaf.to(device)) for batch in samples.batches]
    size = sum(p.numel() for p in model.parameters())
    loss = mean_loss(double, batches)
    known = Truth(workload.name, samples.digest, samples.examples, size, loss, {})
    if size <= DENSE_LIMIT:
        eigenvalues = dense_spectrum(double, batches)
        return replace(known, facts=from_spectrum(eigenvalues), spectrum=tuple(eigenvalues.tolist()))
    product = graph_product(model, batches)
    deflated, signs = next(budget for limit, budget in BUDGETS.items() if size <= limit)
    vectors = extremes(product, size, deflated)
    facts = judged(double, batches, vectors)
    forms = deflated_forms(product, vectors[:, 1:], signs)
    facts["frobenius_squared"] = forms["frobenius_squared"]
    facts["trace"] = forms["trace"]
    if not workload.smooth:
        facts["trace_by_signs"] = forms["trace"]
        facts["trace"] = piecewise_linear_trace(double, batches)
    trace, squares = facts["trace"], facts["frobenius_squared"]
    rank = trace.value**2 / squares.value
    relative = ((2 * trace.error / trace.value) ** 2 + (squares.error / squares.value) ** 2) ** 0.5
    facts["effective_rank"] = Fact(rank, rank * relative, "trace² / squares")
    return replace(known, facts=facts)


def mean_loss(model: nn.Module, batches: Sequence[Any]) -> float:
    """Mean cross-entropy over all examples (or tokens), in the model's dtype."""
    with torch.no_grad():
        return sum(float(_loss_sum(model, batch)) for batch in batches) / _terms(batches)


def graph_product(model: nn.Module, batches: Sequence[Any]) -> Callable[[np.ndarray], np.ndarray]:
    """H·v by double backward, keeping every batch's graph: memory for time."""
    parameters = list(model.parameters())
    terms = _terms(batches)
    graphs = []
    with sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            gradient = torch.autograd.grad(_loss_sum(model, batch) / terms, parameters, create_graph=True)
            graphs.append(torch.cat([g.reshape(-1) for g in gradient]))

    def product(vector: np.ndarray) -> np.ndarray:
        v = torch.as_tensor(np.asarray(vector).reshape(-1)).to(graphs[0])
        total = torch.zeros(len(v), dtype=torch.float64)
        with sdpa_kernel(SDPBackend.MATH):
            for graph in graphs:
                pieces = torch.autograd.grad(graph, parameters, v, retain_graph=True)
                total += torch.cat([p.reshape(-1) for p in pieces]).to("cpu", torch.float64)
        return total.numpy()

    return product


def fresh_product(model: nn.Module, batches: Sequence[Any], vector: Tensor) -> Tensor:
    """H·v by double backward from scratch, batch by batch, in the model's dtype."""
    parameters = list(model.parameters())
    v = vector.to(parameters[0])
    total = torch.zeros_like(v)
    with sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            gradient = torch.autograd.grad(_loss_sum(model, batch), parameters, create_graph=True)
            flat = torch.cat([g.reshape(-1) for g in gradient])
            total += torch.cat([p.reshape(-1) for p in torch.autograd.grad(flat, parameters, v)])
    return total / _terms(batches)


def dense_spectrum(model: nn.Module, batches: Sequence[Any]) -> Tensor:
    """All eigenvalues, ascending, from d products with the unit vectors."""
    product = graph_product(model, batches)
    size = sum(p.numel() for p in model.parameters())
    matrix = torch.from_numpy(np.stack([product(row) for row in np.eye(size)]))
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2)


def from_spectrum(eigenvalues: Tensor) -> dict[str, Fact]:
    """Every quantity from all the eigenvalues."""
    trace, squares = float(eigenvalues.sum()), float(eigenvalues.square().sum())
    values = {
        "lambda_max": float(eigenvalues[-1]),
        "lambda_min": float(eigenvalues[0]),
        "trace": trace,
        "frobenius_squared": squares,
        "effective_rank": trace**2 / squares,
    }
    rounding = 1e-12
    return {name: Fact(value, rounding * abs(value), "whole matrix, float64") for name, value in values.items()}


def extremes(product: Callable[[np.ndarray], np.ndarray], size: int, number: int) -> np.ndarray:
    """Eigenvectors (d, 1 + number) of the smallest eigenvalue and of the largest ones, ascending."""
    operator = LinearOperator((size, size), matvec=product, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(size)
    top = eigsh(operator, k=number, which="LA", v0=start, tol=1e-4, ncv=3 * number)
    low = eigsh(operator, k=1, which="SA", v0=start, tol=1e-3, ncv=20)
    return np.concatenate([low[1], top[1]], axis=1)


def judged(model: nn.Module, batches: Sequence[Any], vectors: np.ndarray) -> dict[str, Fact]:
    """Rayleigh quotients of the first and the last vector by fresh float64 products, with their residuals."""
    facts = {}
    for name, column in (("lambda_min", 0), ("lambda_max", -1)):
        y = torch.from_numpy(vectors[:, column] / np.linalg.norm(vectors[:, column])).to(_device(model))
        image = fresh_product(model, batches, y)
        value = float(y @ image)
        residual = float((image - value * y).norm())
        facts[name] = Fact(value, residual, "eigsh, judged by a fresh float64 product; error is the residual")
    return facts


def piecewise_linear_trace(model: nn.Module, batches: Sequence[Any]) -> Fact:
    """Trace of the Gauss-Newton matrix, one backward per example and class.

    With J_c the gradient of logit c and p the softmax: Σ_c p_c ‖J_c − Σ_k p_k J_k‖² per example.
    """
    parameters = list(model.parameters())
    total, count = 0.0, 0
    for inputs, _ in batches:
        for example in inputs.to(parameters[0].dtype):
            logits = model(example[None])[0]
            p = F.softmax(logits.detach(), dim=0)
            rows = []
            for logit in logits:
                pieces = torch.autograd.grad(logit, parameters, retain_graph=True)
                rows.append(torch.cat([g.reshape(-1) for g in pieces]))
            jacobian = torch.stack(rows)
            total += float(p @ (jacobian - p @ jacobian).square().sum(dim=1))
            count += 1
    value = total / count
    return Fact(value, 1e-10 * value, "one backward per example and class, float64")


def deflated_forms(
    product: Callable[[np.ndarray], np.ndarray], vectors: np.ndarray, signs: int
) -> dict[str, Fact]:
    """Trace and sum of squares: top eigenvectors exactly, the rest by random signs, with standard error."""
    basis, _ = np.linalg.qr(vectors)
    images = np.stack([product(column) for column in basis.T], axis=1)
    generator = np.random.default_rng(1)
    forms, squares = [], []
    for _ in range(signs):
        z = generator.choice([-1.0, 1.0], size=len(basis))
        z -= basis @ (basis.T @ z)
        image = product(z)
        forms.append(z @ image)
        # tr H² = ‖HQ‖² + E‖H P z‖²
        squares.append(image @ image)
    how = f"{basis.shape[1]} eigenvectors and {signs} random signs; error is the standard error"
    error = [float(np.std(x, ddof=1) / len(x) ** 0.5) for x in (forms, squares)]
    trace = float(np.sum(basis * images) + np.mean(forms))
    frobenius = float(np.sum(images**2) + np.mean(squares))
    return {"trace": Fact(trace, error[0], how), "frobenius_squared": Fact(frobenius, error[1], how)}


def _loss_sum(model: nn.Module, batch: Any) -> Tensor:
    inputs, labels = batch
    dtype = next(model.parameters()).dtype
    outputs = model(inputs.to(dtype) if inputs.is_floating_point() else inputs)
    return F.cross_entropy(outputs.flatten(0, -2), labels.flatten(), reduction="sum")


def _terms(batches: Sequence[Any]) -> int:
    return sum(batch[1].numel() for batch in batches)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
