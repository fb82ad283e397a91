"""Every tool called as its own documents call it, with its own defaults.

PyHessian: ``example_pyhessian_analysis.py``, which its README runs. hessian-eigenthings: the README's quickstart.
curvlinops: the examples that its README links, for eigenvalues and for a density; its estimators of traces have no
default number of products, and get eigenthings' 99.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from benchmarks.adapters import Case, Meter, curvlinops_operator, eigenthings_operator, pyhessian_object
from benchmarks.methods import Answer, density_answer


@dataclass(frozen=True)
class Said:
    """One answer of a call.

    Attributes:
        answer: a number, or a density.
        stated: the error that the tool states, in the units of the number; None where it states none.
        how: what the stated error is.
    """

    answer: Answer
    stated: float | None = None
    how: str = ""


@dataclass(frozen=True)
class Call:
    """A call and what it answers.

    Attributes:
        tool: a name in `adapters.PACKAGES`.
        text: the call, as it is written.
        ask: (case, meter, seed) to the answers, by the names of `accuracy.GOALS` and "density".
        products: that it will take, where it says; a call that is ended early is extrapolated to them.
    """

    tool: str
    text: str
    ask: Callable[[Case, Meter, int], Mapping[str, Said]]
    products: int | None = None


def _pyhessian_eigenvalues(case: Case, meter: Meter, seed: int) -> dict[str, Said]:
    torch.manual_seed(seed)
    with pyhessian_object(case, meter) as built:
        values, _ = built.eigenvalues()
    return {"lambda_max": Said(Answer(float(values[0]), meter.products))}


def _pyhessian_trace(case: Case, meter: Meter, seed: int) -> dict[str, Said]:
    torch.manual_seed(seed)
    with pyhessian_object(case, meter) as built:
        forms = built.trace()
    return {"trace": Said(Answer(sum(forms) / len(forms), meter.products))}


def _pyhessian_density(case: Case, meter: Meter, seed: int) -> dict[str, Said]:
    torch.manual_seed(seed)
    with pyhessian_object(case, meter) as built:
        nodes, weights = built.density()
    return {"density": Said(density_answer(list(zip(nodes, weights, strict=True)), meter.products))}


def _eigenthings_lanczos(case: Case, meter: Meter, seed: int) -> dict[str, Said]:
    from hessian_eigenthings import lanczos

    found = lanczos(eigenthings_operator(case, meter), k=5, seed=seed)
    best = int(found.eigenvalues.argmax())
    residual = float(found.residuals[best])
    return {"lambda_max": Said(Answer(float(found.eigenvalues[best]), meter.products), residual, "residual")}


def _eigenthings_trace(case: Case, meter: Meter, seed: int) -> dict[str, Said]:
    from hessian_eigenthings import trace

    found = trace(eigenthings_operator(case, meter), num_matvecs=99, seed=seed)
    return {"trace": Said(Answer(found.estimate, meter.products), 2 * found.stderr, "two standard errors")}


def _eigenthings_density(case: Case, meter: Meter, seed: int) -> dict[str, Said]:
    from hessian_eigenthings import spectral_density

    found = spectral_density(eigenthings_operator(case, meter), num_runs=8, lanczos_steps=40, seed=seed)
    runs = list(zip(found.raw_eigenvalues, found.raw_weights, strict=True))
    return {"density": Said(density_answer(runs, meter.products))}


def _curvlinops_eigsh(case: Case, meter: Meter, seed: int) -> dict[str, Said]:
    import numpy as np
    from scipy.sparse.linalg import eigsh

    operator = curvlinops_operator(case, meter, check=True).to_scipy()
    start = np.random.default_rng(seed).standard_normal(operator.shape[0]).astype(operator.dtype)
    values, _ = eigsh(operator, k=3, which="LM", v0=start)
    return {"lambda_max": Said(Answer(float(values.max()), meter.products))}


def _curvlinops(estimator: str, quantity: str, number: int) -> Callable[[Case, Meter, int], dict[str, Said]]:
    def ask(case: Case, meter: Meter, seed: int) -> dict[str, Said]:
        import curvlinops

        torch.manual_seed(seed)
        operator = curvlinops_operator(case, meter, check=True)
        value = float(getattr(curvlinops, estimator)(operator, number))
        return {quantity: Said(Answer(value, meter.products))}

    return ask


def _curvlinops_density(case: Case, meter: Meter, seed: int) -> dict[str, Said]:
    from curvlinops import lanczos_approximate_spectrum

    torch.manual_seed(seed)
    operator = curvlinops_operator(case, meter, check=True)
    grid, density = lanczos_approximate_spectrum(operator, 128, num_repeats=10)
    weights = density / density.sum()
    return {"density": Said(density_answer([(grid, weights)], meter.products))}


CALLS = (
    Call("PyHessian", "eigenvalues()", _pyhessian_eigenvalues),
    Call("PyHessian", "trace()", _pyhessian_trace, 100),
    Call("PyHessian", "density()", _pyhessian_density, 100),
    Call("eigenthings", "lanczos(H, k=5)", _eigenthings_lanczos, 10),
    Call("eigenthings", "trace(H, num_matvecs=99)", _eigenthings_trace, 99),
    Call("eigenthings", "spectral_density(H, num_runs=8, lanczos_steps=40)", _eigenthings_density, 320),
    Call("curvlinops", 'scipy eigsh(H, k=3, which="LM")', _curvlinops_eigsh),
    Call("curvlinops", "hutchpp_trace(H, 99)", _curvlinops("hutchpp_trace", "trace", 99), 99),
    Call("curvlinops", "xtrace(H, 98)", _curvlinops("xtrace", "trace", 98), 98),
    Call(
        "curvlinops", "hutchinson_squared_fro(H, 99)", _curvlinops("hutchinson_squared_fro", "frobenius", 99), 99
    ),
    Call("curvlinops", "lanczos_approximate_spectrum(H, 128, num_repeats=10)", _curvlinops_density, 1280),
)
