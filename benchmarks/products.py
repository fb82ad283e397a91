"""What one product H·v costs in gradients of the same data, amortized over a sweep: every way and every peer.

The unit is a plain forward and backward, measured before and after every sweep. A sweep is `VECTORS` products with
everything a tool keeps between them, in blocks of `BLOCK` where it takes blocks (probes, densities); one at a time
is what Lanczos asks for. What building and the first call cost on top (trials, compilation) stands beside it as
"set-up"; where that matters, a row of its own spreads it over the sweep.
"""

from __future__ import annotations

import importlib
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import adapters
from benchmarks.adapters import Case, installed
from benchmarks.models import GPT, ResNet20
from benchmarks.tables import Row
from benchmarks.timing import cpu_seconds, gradient, median_seconds, one_thread, paired
from hessdiag.analysis import hessian
from hessdiag.engine.products.methods import METHODS
from hessdiag.errors import one_line
from hessdiag.problem import Problem

VECTORS, BLOCK, ROUNDS = 32, 8, 3
STEADY = ("double_backward", "forward_over_reverse", "finite_difference", "eigenthings", "curvlinops")
FEW = 8  # vectors for those, which keep nothing from one product or block to the next
BATCHES = 4


@dataclass(frozen=True)
class Tool:
    """A way to products.

    Attributes:
        products: of rows (k, P), as rows.
        forget: drops what is kept from one product to the next, so that a sweep pays for it.
        way: which one was chosen, where there is a choice.
    """

    products: Callable[[Tensor], Tensor]
    forget: Callable[[], object] = lambda: None
    method: Callable[[], str] = lambda: ""

    def sweep(self, rows: Tensor, block: int = 1) -> None:
        """Products of all rows, a block at a time, from a fresh start."""
        self.forget()
        with sdpa_kernel(SDPBackend.MATH):
            for chunk in torch.split(rows, block):
                self.products(chunk)


@dataclass(frozen=True)
class Subject:
    """A network with random weights and data of the right shape: products cost the same."""

    name: str
    model: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor]]
    size: int
    attends: bool = False


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))


def _pixels(*shape: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    return lambda n: (torch.randn(n, *shape), torch.randint(10, (n,)))


def characters(n: int) -> tuple[Tensor, Tensor]:
    """Sequences of 64 out of 65 characters, and what follows."""
    return torch.randint(65, (n, 64)), torch.randint(65, (n, 64))


SUBJECTS = (
    Subject("mlp", mlp, _pixels(784), 512),
    Subject("resnet20", ResNet20, _pixels(3, 32, 32), 64),
    Subject("gpt", lambda: GPT(width=128, layers=4), characters, 16, attends=True),
)
SMALL = Subject(
    "small mlp", lambda: nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)), _pixels(64), 64
)


def run(data: str | None, quick: bool = False, names: Sequence[str] = (), device: str = "cpu") -> list[Row]:  # noqa: ARG001
    """Rows per network, for one batch and for several, and tool."""
    one_thread()
    for _, build in tools(problem_of(SMALL, 2, device)):
        with suppress(Exception):  # no import is timed; what fails will say so below
            build().sweep(vectors(problem_of(SMALL, 2, device), 1))
    chosen = [SMALL] if quick else [s for s in SUBJECTS if not names or s.name in names]
    return [
        row for subject in chosen for number in (1, BATCHES) for row in compare(subject, number, device, quick)
    ]


def problem_of(subject: Subject, number: int, device: str) -> Problem:
    """The problem on ``number`` batches, the model on the device."""
    torch.manual_seed(0)
    model = subject.model().eval().to(device)
    batches = [subject.batch(subject.size) for _ in range(number)]
    return Problem(model=model, data={"train": batches}, criterion="cross_entropy")


def vectors(problem: Problem, number: int) -> Tensor:
    """Normal rows (number, P)."""
    size = sum(p.numel() for p in problem.model.parameters())
    rows = torch.randn(number, size, generator=torch.Generator().manual_seed(0))
    return rows.to(next(problem.model.parameters()).device)


def compare(subject: Subject, number: int, device: str, quick: bool) -> list[Row]:
    """All tools on ``number`` batches."""
    problem = problem_of(subject, number, device)
    data = f"{subject.name}, batch {subject.size}" if number == 1 else f"{subject.name}, {number} x {subject.size}"
    measure = gradient(problem, problem.data["train"])
    measure()
    exact = _reference(problem, vectors(problem, BLOCK)[0])
    rows = [attention(data, measure)] if subject.attends else []
    missing = [name for name in PEERS if not installed(name)]
    rows += [Row(data, name, "product [gradients]", None, None, "not installed") for name in missing]
    ready: dict[str, tuple[Tool, float, str]] = {}
    for name, build in tools(problem):
        try:
            ready[name] = _first(problem, build, exact, measure)
        except Exception as error:  # a tool may fail in any way: the table says how
            rows.append(Row(data, name, "product [gradients]", None, None, f"crash: {one_line(error, 120)}"))
    for quantity, block in ((f"product, in blocks of {BLOCK}", BLOCK), ("product, one at a time", 1)):
        if number > 1 and block == 1:
            continue
        most = FEW if quick or number > 1 or block == 1 else VECTORS
        sizes = {name: FEW if any(word in name for word in STEADY) else most for name in ready}
        calls = {name: partial(ready[name][0].sweep, vectors(problem, sizes[name]), block) for name in ready}
        found = paired(calls, measure, 1 if quick else ROUNDS)
        costs = {name: statistics.median(values) / sizes[name] for name, values in found.items()}
        rows += _rows(data, f"{quantity} [gradients]", costs, ready, VECTORS if block == BLOCK else None)
    return rows


def attention(data: str, measure: Callable[[], object]) -> Row:
    """The unit is with torch's fused attention, which has no second derivative: what a gradient takes without."""

    def plainly() -> None:
        with sdpa_kernel(SDPBackend.MATH):
            measure()

    plainly()
    cost = statistics.median(paired({"": plainly}, measure, ROUNDS)[""])
    return Row(
        data, "a gradient", "with the attention of products [gradients]", cost, None, "fused attention is 1"
    )


def tools(problem: Problem) -> Iterator[tuple[str, Callable[[], Tool]]]:
    """Every tool with what builds it: hessdiag's own choice, each of its ways, the peers installed."""
    data = problem.data["train"]
    samples = sum(len(batch[1]) for batch in data)

    def of_method(method: str) -> Tool:
        operator = hessian(problem, samples=samples, method=method, block=BLOCK)
        return Tool(operator.rows, lambda: operator.graphs.release(), lambda: f"{operator.method}, ")

    yield "hessdiag", lambda: of_method("auto")
    for method in METHODS:
        yield f"hessdiag ({method})", partial(of_method, method)
    case = adapters.classification(problem.model, data, whole=False)
    for name, build in PEERS.items():
        if installed(name):
            yield name, partial(build, case)


def _first(
    problem: Problem, build: Callable[[], Tool], exact: Tensor, measure: Callable[[], object]
) -> tuple[Tool, float, str]:
    """The tool after its first call, the gradients that this and building took on top, and how exact it is."""
    rows = vectors(problem, BLOCK)
    with sdpa_kernel(SDPBackend.MATH):
        began, tool = cpu_seconds(build)
        first, found = cpu_seconds(lambda: tool.products(rows))
    again, _ = cpu_seconds(partial(tool.sweep, rows, BLOCK))
    off = float((found[0].double() - exact).norm() / exact.norm())
    setup = max(began + first - again, 0.0) / median_seconds(measure)
    return tool, setup, f"{tool.method()}off by {off:.1g}, set-up {setup:.2g} gradients"


def _rows(
    data: str,
    quantity: str,
    costs: dict[str, float],
    ready: dict[str, tuple[Tool, float, str]],
    spread: int | None,
) -> list[Row]:
    best = min((cost for name, cost in costs.items() if name in PEERS), default=None)
    rows = []
    for name, cost in costs.items():
        _, setup, note = ready[name]
        rows.append(Row(data, name, quantity, cost, cost / best if best else None, note))
        if spread is not None and setup / spread > cost / 10:
            whole = cost + setup / spread
            told = f"set-up spread over {spread} products"
            rows.append(
                Row(data, name, f"{quantity}, set-up included", whole, whole / best if best else None, told)
            )
    return rows


def _reference(problem: Problem, row: Tensor) -> Tensor:
    """H·v (P,) by double backward of the whole loss, without hessdiag's engine.

    In the model's own precision: in another one, a unit may stand on the other side of its ReLU's kink.
    """
    parameters = list(problem.model.parameters())
    device = parameters[0].device
    total, terms = torch.zeros_like(row, dtype=torch.float64), 0.0
    with sdpa_kernel(SDPBackend.MATH):
        for inputs, labels in problem.data["train"]:
            loss = problem.total(problem.model, (inputs.to(device), labels.to(device)))
            slopes = torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters, create_graph=True)])
            pieces = torch.autograd.grad(slopes, parameters, row)
            total += torch.cat([piece.flatten() for piece in pieces]).double()
            terms += labels.numel()
    return total / terms


def _pyhessian(case: Case) -> Tool:
    shapes = [p for p in case.model.parameters() if p.requires_grad]
    source = importlib.import_module("pyhessian.utils")
    kept: list[Any] = []

    def product(row: Tensor) -> Tensor:
        if not kept:
            with adapters.pyhessian_object(case, adapters.Meter()) as built:
                kept.append(built)  # with the graph of its gradient, if there is one batch
        split = row.split([p.numel() for p in shapes])
        pieces = [piece.reshape(p.shape) for piece, p in zip(split, shapes, strict=True)]
        if len(case.batches) == 1:
            result = source.hessian_vector_product(kept[0].gradsH, kept[0].params, pieces)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # "Using backward() with create_graph=True ..."
                result = kept[0].dataloader_hv_product(pieces)[1]
        return torch.cat([piece.flatten() for piece in result])

    return Tool(lambda rows: torch.stack([product(row) for row in rows]), kept.clear)


def _eigenthings(case: Case) -> Tool:
    operator = adapters.eigenthings_operator(case)
    return Tool(lambda rows: torch.stack([operator.matvec(row) for row in rows]))


def _curvlinops(case: Case) -> Tool:
    operator = adapters.curvlinops_operator(case)
    return Tool(lambda rows: (operator @ rows.T.contiguous()).T)


PEERS: dict[str, Callable[[Case], Tool]] = {
    "PyHessian": _pyhessian,
    "eigenthings": _eigenthings,
    "curvlinops": _curvlinops,
}
