"""How each tool is asked for the same two numbers, with its fastest settings."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

PACKAGES = {
    "PyHessian": ("pyhessian", "pyhessian"),
    "eigenthings": ("hessian_eigenthings", "hessian-eigenthings"),
    "curvlinops": ("curvlinops", "curvlinops-for-pytorch"),
}


class FlatLogits(nn.Module):
    """The model with logits as (n, classes): two of the peers know no others."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        return self.model(inputs).flatten(0, -2)


@dataclass(frozen=True)
class Case:
    """What a peer is given: a model, a mean loss of its outputs, and batches of (inputs, targets)."""

    model: nn.Module
    loss: nn.Module  # with a ``reduction`` of "mean", as curvlinops asks
    batches: Sequence[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Answer:
    """A number and the products it took."""

    value: float
    products: int


def classification(model: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> Case:
    """Mean cross-entropy; tokens become rows."""
    rows = [(inputs, labels.flatten()) for inputs, labels in batches]
    flat = model if batches[0][1].dim() == 1 else FlatLogits(model)
    return Case(flat, nn.CrossEntropyLoss(), rows)


def installed(tool: str) -> bool:
    """Whether the tool can be imported here."""
    return tool == "hessdiag" or importlib.util.find_spec(PACKAGES[tool][0]) is not None


def version(tool: str) -> str:
    """Its version, or "not installed"."""
    name = "hessdiag" if tool == "hessdiag" else PACKAGES[tool][1]
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        import hessdiag

        return hessdiag.__version__ if tool == "hessdiag" else "not installed"


@contextmanager
def pyhessian_object(case: Case) -> Iterator[tuple[Any, list[int]]]:
    """A fresh PyHessian object and its product counter; gradients it leaves behind are dropped."""
    source = importlib.import_module("pyhessian.hessian")  # the package hides it behind a class of that name
    count = [0]
    plain = source.hessian_vector_product

    def counted(*arguments: Any) -> Any:
        count[0] += 1
        return plain(*arguments)

    whole = {"data": case.batches[0]} if len(case.batches) == 1 else {"dataloader": list(case.batches)}
    with patch.object(source, "hessian_vector_product", counted), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Using backward() with create_graph=True ..."
        try:
            built = source.hessian(case.model, case.loss, cuda=False, **whole)
            through_loader = built.dataloader_hv_product

            def counted_loader(vector: Any) -> Any:
                count[0] += 1
                return through_loader(vector)

            built.dataloader_hv_product = counted_loader
            yield built, count
        finally:
            case.model.zero_grad(set_to_none=True)


def pyhessian_lambda_max(case: Case, budget: float, seed: int) -> Answer:
    torch.manual_seed(seed)
    with pyhessian_object(case) as (built, count):
        values, _ = built.eigenvalues(maxIter=2000, tol=budget)
        return Answer(values[0], count[0])


def pyhessian_trace(case: Case, budget: float, seed: int) -> Answer:
    torch.manual_seed(seed)
    with pyhessian_object(case) as (built, count):
        forms = built.trace(maxIter=int(budget), tol=-1e30)  # its own rule stops by luck; -1e30 turns it off
        return Answer(sum(forms) / len(forms), count[0])


def pyhessian_trace_as_is(case: Case, budget: float, seed: int) -> Answer:
    torch.manual_seed(seed)
    with pyhessian_object(case) as (built, count):
        forms = built.trace(maxIter=int(budget))
        return Answer(sum(forms) / len(forms), count[0])


def eigenthings_operator(case: Case, **options: Any) -> Any:
    from hessian_eigenthings import HessianOperator

    class Counted(HessianOperator):  # type: ignore[misc]
        products = 0

        def matvec(self, v: Tensor) -> Tensor:
            self.products += 1
            return super().matvec(v)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return case.loss(model(batch[0]), batch[1])

    return Counted(case.model, list(case.batches), loss, **options)


def eigenthings_lambda_max(case: Case, budget: float, seed: int) -> Answer:
    from hessian_eigenthings import lanczos

    operator = eigenthings_operator(case)
    steps = min(int(budget), operator.size)
    result = lanczos(operator, k=1, max_iter=steps, which="LA", seed=seed, reorthogonalize=True)
    return Answer(float(result.eigenvalues[0]), operator.products)


def eigenthings_trace(case: Case, budget: float, seed: int) -> Answer:
    from hessian_eigenthings import trace

    operator = eigenthings_operator(case)
    return Answer(
        trace(operator, num_matvecs=int(budget), method="hutch++", seed=seed).estimate, operator.products
    )


def curvlinops_operator(case: Case) -> Any:
    from curvlinops import HessianLinearOperator

    parameters = [p for p in case.model.parameters() if p.requires_grad]
    return HessianLinearOperator(case.model, case.loss, parameters, list(case.batches), check_deterministic=False)


def curvlinops_lambda_max(case: Case, budget: float, seed: int) -> Answer:
    import numpy as np
    from scipy.sparse.linalg import LinearOperator, eigsh

    plain = curvlinops_operator(case).to_scipy()
    count = [0]

    def product(vector: Any) -> Any:
        count[0] += 1
        return plain @ vector.astype(plain.dtype)

    operator = LinearOperator(plain.shape, matvec=product, dtype=plain.dtype)
    start = np.random.default_rng(seed).standard_normal(plain.shape[0])
    ncv = int(budget)  # size of ARPACK's basis; its products come in lots of about that many
    values = eigsh(operator, k=1, which="LA", tol=1e-2, ncv=ncv, v0=start, return_eigenvectors=False)
    return Answer(float(values[0]), count[0])


def curvlinops_hutchpp(case: Case, budget: float, seed: int) -> Answer:
    from curvlinops import hutchpp_trace

    torch.manual_seed(seed)
    return Answer(float(hutchpp_trace(curvlinops_operator(case), int(budget))), int(budget))


def curvlinops_xtrace(case: Case, budget: float, seed: int) -> Answer:
    from curvlinops import xtrace

    torch.manual_seed(seed)
    return Answer(float(xtrace(curvlinops_operator(case), int(budget))), int(budget))


@dataclass(frozen=True)
class Method:
    """A tool's way to a quantity, and the budgets it is given, growing."""

    tool: str
    how: str
    quantity: str
    ask: Callable[[Case, float, int], Answer]
    budgets: tuple[float, ...]
    averages: bool = False  # a plain mean over probes: the error falls as 1/√budget, so it may be extrapolated


METHODS = (
    Method(
        "PyHessian",
        "power iteration, tol",
        "lambda_max",
        pyhessian_lambda_max,
        (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7),
    ),
    Method("eigenthings", "Lanczos, steps", "lambda_max", eigenthings_lambda_max, (6, 8, 11, 16, 23, 32, 45, 64)),
    Method("curvlinops", "SciPy eigsh, ncv", "lambda_max", curvlinops_lambda_max, (4, 6, 8, 11, 16, 23, 32)),
    Method("PyHessian", "Hutchinson, probes", "trace", pyhessian_trace, (32, 128, 512), averages=True),
    Method("eigenthings", "Hutch++, products", "trace", eigenthings_trace, (30, 60, 90, 120, 180, 270, 405)),
    Method("curvlinops", "Hutch++, products", "trace", curvlinops_hutchpp, (30, 60, 90, 120, 180, 270, 405)),
    Method("curvlinops", "XTrace, products", "trace", curvlinops_xtrace, (30, 60, 90, 120, 180, 270, 404)),
)


class MeanLoss(nn.Module):
    """The outputs are the losses; used for functions of known Hessian."""

    reduction = "mean"

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:  # noqa: ARG002
        return outputs.mean()
