"""Cases whose answer is known in closed form, put to every tool for real: who is wrong, and by how much."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import adapters, methods
from benchmarks.adapters import Case, MeanLoss, installed
from benchmarks.models import Attention
from benchmarks.tables import Row
from benchmarks.timing import one_thread
from hessdiag.errors import one_line
from hessdiag.problem import Problem

TOOLS = ("PyHessian", "eigenthings", "curvlinops", "hessdiag")
RIGHT = 1e-2  # relative: right answers to these cases are within 1e-5


@dataclass(frozen=True)
class Known:
    """A question with its answer, and how each tool is asked."""

    name: str
    truth: float
    ask: Mapping[str, Callable[[], float]]
    tolerance: float = field(default=RIGHT)


class Quadratic(nn.Module):
    """f(w) = w·A·w / 2, the same for every example: its Hessian is A."""

    def __init__(self, matrix: Tensor, unused: bool = False) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)
        self.w = nn.Parameter(torch.linspace(0.5, 1.5, len(matrix)))
        if unused:
            self.extra = nn.Linear(2, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return (self.w @ self.matrix @ self.w / 2).expand(len(inputs), 1)


def run(data: str | None = None, quick: bool = False) -> list[Row]:  # noqa: ARG001
    """One row per case and tool."""
    one_thread()
    rows = []
    for case in (
        ragged_batches(),
        padded_targets(),
        negative_trace(),
        negative_extreme(),
        second_measurement(),
        fifth_eigenvalue(),
        unused_parameter(),
        fused_attention(),
    ):
        rows += [_row(case, tool) for tool in TOOLS if tool in case.ask]
    return rows


def _row(case: Known, tool: str) -> Row:
    quantity = f"truth {case.truth:.6g}"
    if not installed(tool):
        return Row(case.name, tool, quantity, None, None, "not installed")
    try:
        value = float(case.ask[tool]())
    except Exception as error:  # a crash is an answer too: the table says which
        return Row(case.name, tool, quantity, None, None, f"crash: {type(error).__name__}: {one_line(error, 90)}")
    off = abs(value - case.truth) / abs(case.truth)
    verdict = "right" if off <= case.tolerance else "WRONG"
    return Row(case.name, tool, quantity, value, None, f"{verdict}, off by {off:.2g}")


def _batches(rows: int = 4) -> list[tuple[Tensor, Tensor]]:
    return [(torch.ones(rows, 1), torch.zeros(rows, 1))]


def _ours(case: Case, quantity: str) -> float:
    from hessdiag.analysis import analyze

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return case.loss(model(batch[0]), batch[1])

    problem = Problem(model=case.model, data={"train": list(case.batches)}, loss=loss)
    return analyze(problem, quantities=(quantity,)).metrics[quantity].value


def _largest(make: Callable[[], Case], steps: int = 40) -> dict[str, Callable[[], float]]:
    """The plain question for lambda_max."""
    return {
        "PyHessian": lambda: methods.pyhessian_lambda_max(make(), 1e-6, 0).value,
        "eigenthings": lambda: methods.eigenthings_lambda_max(make(), steps, 0).value,
        "curvlinops": lambda: methods.curvlinops_lambda_max(make(), 20, 0).value,
        "hessdiag": lambda: _ours(make(), "lambda_max"),
    }


def ragged_batches() -> Known:
    """Least squares on 124 + 4 examples: H = 2 X'X / 128, whatever the batches."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(128, 24, generator=generator)
    inputs[-4:] *= 10
    targets = torch.randn(128, 1, generator=generator)
    truth = float(torch.linalg.eigvalsh(2 * inputs.double().T @ inputs.double() / 128)[-1])
    model = nn.Linear(24, 1, bias=False)
    batches = [(inputs[:124], targets[:124]), (inputs[124:], targets[124:])]

    def make() -> Case:
        return Case(model, nn.MSELoss(), batches)

    ask = _largest(make, steps=20)
    ask["hessdiag"] = lambda: _named(Problem(model=model, data={"train": batches}, criterion="mse"), "lambda_max")
    return Known("lambda_max, batches of 124 and 4", truth, ask)


def padded_targets() -> Known:
    """Softmax regression with targets of -100 that do not count: H = Σ (diag p − pp') ⊗ xx' / counted."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(64, 8, generator=generator)
    targets = torch.randint(3, (64,), generator=generator)
    targets[4:32] = -100
    model = nn.Linear(8, 3, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.randn(3, 8, generator=generator))
        p = F.softmax(inputs.double() @ model.weight.double().T, dim=1)
    blocks = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    kept = targets != -100
    hessian = torch.einsum("ncd,ni,nj->cidj", blocks[kept], inputs[kept].double(), inputs[kept].double())
    truth = float(torch.linalg.eigvalsh(hessian.reshape(24, 24) / int(kept.sum()))[-1])
    batches = [(inputs[:32], targets[:32]), (inputs[32:], targets[32:])]

    def make() -> Case:
        return Case(model, nn.CrossEntropyLoss(), batches)

    ask = _largest(make, steps=20)
    problem = Problem(model=model, data={"train": batches}, criterion="cross_entropy")
    ask["hessdiag"] = lambda: _named(problem, "lambda_max")
    return Known("lambda_max, padding (ignore_index)", truth, ask)


def negative_trace() -> Known:
    """A saddle of known negative trace; 60 products or fewer leave a few percent of random error."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(60, 60, generator=generator)
    matrix = (noise + noise.T) / 4 - torch.diag(torch.linspace(0, 1.2, 60))
    truth = float(matrix.double().trace())

    def make() -> Case:
        return Case(Quadratic(matrix), MeanLoss(), _batches())

    return Known(
        "trace of a saddle",
        truth,
        {
            "PyHessian": lambda: methods.pyhessian_trace_as_is(make(), 2000, 0).value,
            "eigenthings": lambda: methods.eigenthings_trace(make(), 57, 0).value,
            "curvlinops": lambda: methods.curvlinops_hutchpp(make(), 57, 0).value,
            "hessdiag": lambda: _ours(make(), "trace"),
        },
        tolerance=0.15,
    )


def negative_extreme() -> Known:
    """Eigenvalues from −9 to 5: the largest is 5, although −9 is larger in magnitude."""
    matrix = torch.diag(torch.cat([torch.tensor([-9.0, 5.0]), torch.linspace(-1, 1, 38)]))
    return Known(
        "lambda_max = 5 beside −9", 5.0, _largest(lambda: Case(Quadratic(matrix), MeanLoss(), _batches()))
    )


def second_measurement() -> Known:
    """The same model measured twice, at eigenvalue 2, by a new object each time."""
    matrix = torch.diag(torch.linspace(0, 2, 40))

    def make() -> Case:
        return Case(Quadratic(matrix), MeanLoss(), _batches())

    def twice_pyhessian() -> float:
        import importlib
        import warnings

        source = importlib.import_module("pyhessian.hessian")
        case = make()
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            source.hessian(case.model, case.loss, data=case.batches[0], cuda=False)
            second = source.hessian(case.model, case.loss, data=case.batches[0], cuda=False)
        return float(second.eigenvalues(maxIter=2000, tol=1e-6)[0][0])

    def twice(once: Callable[[Case], float]) -> float:
        case = make()
        once(case)
        return once(case)

    ask = {
        "PyHessian": twice_pyhessian,
        "eigenthings": lambda: twice(lambda case: methods.eigenthings_lambda_max(case, 40, 0).value),
        "curvlinops": lambda: twice(lambda case: methods.curvlinops_lambda_max(case, 20, 0).value),
        "hessdiag": lambda: twice(lambda case: _ours(case, "lambda_max")),
    }
    return Known("lambda_max, measured a second time", 2.0, ask)


def fifth_eigenvalue() -> Known:
    """Outliers 100, 8, 6, 4, 2 above a bulk in [0, 1]: is the fifth one counted as 100 again (a ghost)?"""
    outliers = torch.tensor([100.0, 8.0, 6.0, 4.0, 2.0])
    matrix = torch.diag(torch.cat([outliers, torch.linspace(0, 1, 1995)]))
    truth = float(outliers[4])

    def make() -> Case:
        return Case(Quadratic(matrix), MeanLoss(), _batches())

    def eigenthings() -> float:
        from hessian_eigenthings import lanczos

        result = lanczos(adapters.eigenthings_operator(make()), k=30, max_iter=100, which="LA", seed=0)
        return float(result.eigenvalues[4])

    def curvlinops() -> float:
        from scipy.sparse.linalg import eigsh

        operator = adapters.curvlinops_operator(make()).to_scipy()
        return float(sorted(eigsh(operator, k=5, which="LA", return_eigenvectors=False))[0])

    def ours() -> float:
        from hessdiag.analysis import analyze

        case = make()
        problem = Problem(
            model=case.model, data={"train": list(case.batches)}, loss=lambda model, batch: model(batch[0]).mean()
        )
        return analyze(problem, quantities=("lambda_max",), top=5).top[4].value

    return Known(
        "fifth eigenvalue",
        truth,
        {"eigenthings": eigenthings, "curvlinops": curvlinops, "hessdiag": ours},
    )


def unused_parameter() -> Known:
    """A parameter the loss does not see: its rows of the Hessian are zero, the largest eigenvalue stays 2."""
    matrix = torch.diag(torch.linspace(0, 2, 40))
    ask = _largest(lambda: Case(Quadratic(matrix, unused=True), MeanLoss(), _batches()))
    return Known("lambda_max, a parameter without effect", 2.0, ask)


class AttentionLoss(nn.Module):
    """One attention layer; its mean square output is the loss."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.attention = Attention(8, 2)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.attention(inputs).square().mean(dim=(1, 2))[:, None]


def fused_attention() -> Known:
    """torch's scaled_dot_product_attention as it comes; truth from central differences of float64 gradients."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, 6, 8, generator=generator)

    def make() -> Case:
        return Case(AttentionLoss(), MeanLoss(), [(inputs, torch.zeros(4, 1))])

    truth = float(torch.linalg.eigvalsh(_difference_hessian(AttentionLoss().double(), inputs.double()))[-1])
    return Known("lambda_max through attention", truth, _largest(make))


def _difference_hessian(model: nn.Module, inputs: Tensor, step: float = 1e-5) -> Tensor:
    parameters = list(model.parameters())
    start = nn.utils.parameters_to_vector(parameters).detach().clone()

    def gradient(point: Tensor) -> Tensor:
        nn.utils.vector_to_parameters(point, parameters)
        pieces = torch.autograd.grad(model(inputs).mean(), parameters)
        return torch.cat([piece.reshape(-1) for piece in pieces])

    rows = [
        (gradient(start + step * e) - gradient(start - step * e)) / (2 * step)
        for e in torch.eye(len(start)).double()
    ]
    matrix = torch.stack(rows)
    return (matrix + matrix.T) / 2


def _named(problem: Problem, quantity: str) -> float:
    from hessdiag.analysis import analyze

    return analyze(problem, quantities=(quantity,)).metrics[quantity].value
