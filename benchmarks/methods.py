"""How each peer is asked for the same numbers, with its fastest settings and the budgets it is given."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.adapters import Case, Meter, curvlinops_operator, eigenthings_operator, pyhessian_object


@dataclass(frozen=True)
class Answer:
    """A number and the products it took; of a density, whose mean it is, also nodes and weights."""

    value: float
    products: int
    nodes: tuple[float, ...] = ()
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Method:
    """A tool's way to a quantity, and the budgets it is given, growing."""

    tool: str
    how: str
    quantity: str
    ask: Callable[[Case, float, int], Answer]
    budgets: tuple[float, ...]
    averages: bool = False  # a plain mean over probes: the error falls as 1/√budget, so it may be extrapolated

    @property
    def name(self) -> str:
        return f"{self.tool} ({self.how.split(',')[0]})"


def pyhessian_lambda_max(case: Case, budget: float, seed: int) -> Answer:
    torch.manual_seed(seed)
    meter = Meter()
    with pyhessian_object(case, meter) as built:
        values, _ = built.eigenvalues(maxIter=2000, tol=budget)
        return Answer(values[0], meter.products)


def pyhessian_trace(case: Case, budget: float, seed: int) -> Answer:
    torch.manual_seed(seed)
    meter = Meter()
    with pyhessian_object(case, meter) as built:
        forms = built.trace(maxIter=int(budget), tol=-1e30)  # its own rule stops by luck; -1e30 turns it off
        return Answer(sum(forms) / len(forms), meter.products)


def pyhessian_trace_as_is(case: Case, budget: float, seed: int) -> Answer:
    torch.manual_seed(seed)
    meter = Meter()
    with pyhessian_object(case, meter) as built:
        forms = built.trace(maxIter=int(budget))
        return Answer(sum(forms) / len(forms), meter.products)


def pyhessian_density(case: Case, budget: float, seed: int) -> Answer:
    """The value of a density is its first moment, the mean eigenvalue."""
    torch.manual_seed(seed)
    meter = Meter()
    with pyhessian_object(case, meter) as built:
        nodes, weights = built.density(iter=int(budget), n_v=DENSITY_PROBES)
        return density_answer(list(zip(nodes, weights, strict=True)), meter.products)


def eigenthings_lambda_max(case: Case, budget: float, seed: int, which: str = "LA") -> Answer:
    from hessian_eigenthings import lanczos

    operator = eigenthings_operator(case, meter := Meter())
    steps = min(int(budget), operator.size)
    result = lanczos(operator, k=1, max_iter=steps, which=which, seed=seed, reorthogonalize=True)
    return Answer(float(result.eigenvalues[0]), meter.products)


def eigenthings_lambda_min(case: Case, budget: float, seed: int) -> Answer:
    return eigenthings_lambda_max(case, budget, seed, which="SA")


def eigenthings_trace(case: Case, budget: float, seed: int) -> Answer:
    from hessian_eigenthings import trace

    operator = eigenthings_operator(case, meter := Meter())
    found = trace(operator, num_matvecs=int(budget), method="hutch++", seed=seed)
    return Answer(found.estimate, meter.products)


def eigenthings_square(case: Case, budget: float, seed: int) -> Answer:
    """tr H² by Hutch++ on H², two products each."""
    from hessian_eigenthings import LambdaOperator, trace

    once = eigenthings_operator(case, meter := Meter())
    squared = LambdaOperator(lambda v: once.matvec(once.matvec(v)), once.size, once.device, once.dtype)
    found = trace(squared, num_matvecs=int(budget), method="hutch++", seed=seed)
    return Answer(found.estimate, meter.products)


def eigenthings_density(case: Case, budget: float, seed: int) -> Answer:
    from hessian_eigenthings import spectral_density

    operator = eigenthings_operator(case, meter := Meter())
    found = spectral_density(operator, num_runs=DENSITY_PROBES, lanczos_steps=int(budget), seed=seed)
    return density_answer(list(zip(found.raw_eigenvalues, found.raw_weights, strict=True)), meter.products)


def curvlinops_lambda_max(case: Case, budget: float, seed: int, which: str = "LA", tol: float = 1e-2) -> Answer:
    import numpy as np
    from scipy.sparse.linalg import LinearOperator, eigsh

    plain = curvlinops_operator(case, meter := Meter()).to_scipy()
    operator = LinearOperator(plain.shape, matvec=lambda v: plain @ v.astype(plain.dtype), dtype=plain.dtype)
    start = np.random.default_rng(seed).standard_normal(plain.shape[0])
    ncv = int(budget)  # size of ARPACK's basis; its products come in lots of about that many
    values = eigsh(operator, k=1, which=which, tol=tol, ncv=ncv, v0=start, return_eigenvectors=False)
    return Answer(float(values[0]), meter.products)


def curvlinops_lambda_min(case: Case, budget: float, seed: int) -> Answer:
    return curvlinops_lambda_max(case, budget, seed, which="SA", tol=0.1)  # of λ_min itself, which is small


def curvlinops_hutchpp(case: Case, budget: float, seed: int) -> Answer:
    from curvlinops import hutchpp_trace

    torch.manual_seed(seed)
    return Answer(float(hutchpp_trace(curvlinops_operator(case), int(budget))), int(budget))


def curvlinops_xtrace(case: Case, budget: float, seed: int) -> Answer:
    from curvlinops import xtrace

    torch.manual_seed(seed)
    return Answer(float(xtrace(curvlinops_operator(case), int(budget))), int(budget))


def curvlinops_square(case: Case, budget: float, seed: int) -> Answer:
    from curvlinops import hutchinson_squared_fro

    torch.manual_seed(seed)
    return Answer(float(hutchinson_squared_fro(curvlinops_operator(case), int(budget))), int(budget))


def curvlinops_square_xtrace(case: Case, budget: float, seed: int) -> Answer:
    """tr H² by XTrace on H², two products each."""
    from curvlinops import xtrace

    torch.manual_seed(seed)
    once = curvlinops_operator(case)
    return Answer(float(xtrace(once @ once, int(budget))), 2 * int(budget))


def curvlinops_density(case: Case, budget: float, seed: int) -> Answer:
    """Only its Lanczos runs: the boundaries of the spectrum, which it would find with ARPACK, are a present."""
    from curvlinops.papyan2020traces.spectrum import fast_lanczos

    torch.manual_seed(seed)
    operator = curvlinops_operator(case)
    runs = [fast_lanczos(operator, int(budget)) for _ in range(DENSITY_PROBES)]
    return density_answer([(values, vectors[0].square()) for values, vectors in runs], len(runs) * int(budget))


def density_answer(runs: Sequence[tuple[Any, Any]], products: int) -> Answer:
    """The mean of some runs' (nodes, weights), a run that ended early filled with NaN."""
    pairs = [
        (float(node), float(weight) / len(runs))
        for nodes, weights in runs
        for node, weight in zip(nodes, weights, strict=True)
        if not math.isnan(float(node))
    ]
    nodes, weights = (tuple(column) for column in zip(*pairs, strict=True))
    return Answer(sum(node * weight for node, weight in pairs), products, nodes, weights)


DENSITY_PROBES, DENSITY_STEPS = 8, 40
STEPS = (6, 8, 11, 16, 23, 32, 45, 64)
PRODUCTS = (30, 60, 90, 120, 180, 270, 404)
METHODS = (
    Method(
        "PyHessian",
        "power iteration, tol",
        "lambda_max",
        pyhessian_lambda_max,
        (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7),
    ),
    Method("eigenthings", "Lanczos, steps", "lambda_max", eigenthings_lambda_max, STEPS),
    Method("curvlinops", "SciPy eigsh, ncv", "lambda_max", curvlinops_lambda_max, (4, 6, 8, 11, 16, 23, 32)),
    Method("eigenthings", "Lanczos, steps", "lambda_min", eigenthings_lambda_min, STEPS),
    Method("curvlinops", "SciPy eigsh, ncv", "lambda_min", curvlinops_lambda_min, (8, 11, 16, 23, 32, 45)),
    Method("PyHessian", "Hutchinson, probes", "trace", pyhessian_trace, (32, 128, 512), averages=True),
    Method("eigenthings", "Hutch++, products", "trace", eigenthings_trace, (30, 60, 90, 120, 180, 270, 405)),
    Method("curvlinops", "Hutch++, products", "trace", curvlinops_hutchpp, (30, 60, 90, 120, 180, 270, 405)),
    Method("curvlinops", "XTrace, products", "trace", curvlinops_xtrace, PRODUCTS),
    Method(
        "curvlinops", "Hutchinson on H², probes", "frobenius", curvlinops_square, (8, 32, 128, 512), averages=True
    ),
    Method("curvlinops", "XTrace on H², pairs", "frobenius", curvlinops_square_xtrace, (8, 16, 30, 60, 90, 120)),
    Method("eigenthings", "Hutch++ on H², pairs", "frobenius", eigenthings_square, (9, 15, 30, 60, 90, 120)),
    Method("PyHessian", "SLQ, steps", "density", pyhessian_density, (DENSITY_STEPS,)),
    Method("eigenthings", "SLQ, steps", "density", eigenthings_density, (DENSITY_STEPS,)),
    Method("curvlinops", "SLQ, steps", "density", curvlinops_density, (DENSITY_STEPS,)),
)
