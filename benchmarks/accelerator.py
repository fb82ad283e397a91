"""An accelerator's numbers beside the CPU's, and the price of a product there by how it is launched.

The first rows measure the same networks on the device and on the CPU, by the same method and from the same seeds.
The others are products of one sweep, in gradients of the same data on the device: kept graphs of the data in one
batch and in eight, several vectors at once (``is_grads_batched``), compiled products, and a CUDA graph of one
product. From them the defaults for accelerators are chosen; on a CPU they show that the benchmark runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.products import SMALL, SUBJECTS, Subject, problem_of, vectors
from benchmarks.tables import Row
from benchmarks.timing import cpu_seconds, gradient, one_thread, paired, unit
from hessdiag.analysis import analyze, hessian
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.graphs import GradientGraph
from hessdiag.errors import one_line
from hessdiag.problem import Problem

QUANTITIES = ("lambda_max", "lambda_min", "trace", "frobenius_squared")
SPLITS = (1, 2, 4, 8)  # batches of the same data
BLOCKS = (1, 8, 16)  # vectors that pass backward through a graph together
ROUNDS, WARM = 3, 3
Product = Callable[[Tensor], Tensor]


def run(data: str | None, quick: bool = False, names: tuple[str, ...] = (), device: str = "cpu") -> list[Row]:  # noqa: ARG001
    """Rows per network: both devices' numbers, then products by the way they are launched."""
    one_thread()
    chosen = [SMALL] if quick else [s for s in SUBJECTS if not names or s.name in names]
    found: list[Row] = []
    for subject in chosen:
        found += [*numbers(subject, device), *by_batches(subject, device), *by_launch(subject, device, quick)]
    return found


def numbers(subject: Subject, device: str) -> Iterator[Row]:
    """Every number of a short analysis on both, and what it takes."""
    asked = {"quantities": QUANTITIES, "method": "retained_graph", "batch_size": subject.size, "probes": 16}
    results, seconds = [], []
    for place in ("cpu", device):
        problem = problem_of(subject, 2, "cpu")
        call = partial(analyze, problem, device=place, samples=_samples(problem), **asked)
        taken, result = cpu_seconds(call)
        results.append(result)
        seconds.append(taken)
    here, there = results
    for name in QUANTITIES:
        a, b = here[name], there[name]
        half = max((a.hi - a.lo) / 2, 1e-300)
        off = abs(a.value - b.value)
        said = f"CPU {a.value:.8g}; off by {off / max(abs(a.value), 1e-300):.1g}, {off / half:.1g} half-widths"
        yield Row(subject.name, f"hessdiag on {device}", name, b.value, None, said)
    said = f"{seconds[0]:.3g} CPU s there, a first call; {there.cost.products} products"
    yield Row(subject.name, f"hessdiag on {device}", f"analysis [{unit(device)}]", seconds[1], None, said)


def by_batches(subject: Subject, device: str) -> Iterator[Row]:
    """A product from kept graphs, the same data in ever more batches: what launches cost."""
    problem = problem_of(subject, 1, device)
    measure = gradient(problem, problem.data["train"])
    measure()
    splits = [number for number in SPLITS if number <= subject.size]
    operators = {number: _operator(problem, -(-subject.size // number)) for number in splits}
    rows = vectors(problem, max(BLOCKS))
    for op in operators.values():
        op.rows(rows[:1])
    calls = {str(number): partial(_one_by_one, op, rows) for number, op in operators.items()}
    for number, ratios in paired(calls, measure, ROUNDS).items():
        cost, launches = statistics.median(ratios) / len(rows), len(operators[int(number)].batches)
        said = f"{launches} graphs kept, one vector at a time"
        yield Row(
            subject.name, "hessdiag (retained_graph)", f"product, batches: {number} [gradients]", cost, None, said
        )


def by_launch(subject: Subject, device: str, quick: bool) -> Iterator[Row]:
    """One batch's product: several vectors at once, compiled, captured."""
    problem = problem_of(subject, 1, device)
    measure = gradient(problem, problem.data["train"])
    measure()
    rows = vectors(problem, max(BLOCKS))
    exact = _operator(problem, subject.size).rows(rows)
    ways: dict[str, Callable[[], Product]] = {
        f"vectors at once: {n}": partial(_batched, problem, n) for n in BLOCKS
    }
    if not quick:
        ways["compiled, forward over reverse"] = partial(_compiled, problem)
    if torch.device(device).type == "cuda":
        ways["CUDA graph of a retained graph"] = partial(_captured, problem)
    for name, build in ways.items():
        quantity = f"product, {name} [gradients]"
        try:
            with sdpa_kernel(SDPBackend.MATH):
                setup, product = cpu_seconds(build)
                first, found = cpu_seconds(partial(product, rows))
                ratios = paired({name: partial(product, rows)}, measure, 1 if quick else ROUNDS)[name]
        except Exception as error:  # a compiler or a capture may fail in any way: the table says how
            yield Row(subject.name, "torch", quantity, None, None, f"crash: {one_line(error, 120)}")
            continue
        off = float((found.double() - exact.double()).norm() / exact.double().norm())
        said = f"off by {off:.1g}, {setup + first:.2g} {unit(device)} to set up and the first time"
        yield Row(subject.name, "torch", quantity, statistics.median(ratios) / len(rows), None, said)


def _operator(problem: Problem, batch_size: int) -> Curvature:
    options = {"samples": _samples(problem), "batch_size": batch_size, "method": "retained_graph"}
    return hessian(problem, **options)


def _samples(problem: Problem) -> int:
    return sum(len(batch[1]) for batch in problem.data["train"])


def _one_by_one(op: Curvature, rows: Tensor) -> None:
    for row in rows:
        op.multiplied(row[None])


def _loss(problem: Problem) -> Callable[[dict[str, Tensor]], Tensor]:
    """The mean loss of the one batch as a function of the parameters."""
    model = problem.model
    inputs, labels = (leaf.to(next(model.parameters()).device) for leaf in problem.data["train"][0])

    def loss(named: dict[str, Tensor]) -> Tensor:
        outputs = torch.func.functional_call(model, named, (inputs,))
        return F.cross_entropy(outputs.reshape(-1, outputs.shape[-1]), labels.reshape(-1))

    return loss


def _named(problem: Problem) -> dict[str, Tensor]:
    return {name: p.detach().clone().requires_grad_() for name, p in problem.model.named_parameters()}


def _batched(problem: Problem, number: int) -> Product:
    """Products from a graph that is kept, ``number`` vectors in one backward pass."""
    named = _named(problem)
    theta = list(named.values())
    slope = torch.autograd.grad(_loss(problem)(named), theta, create_graph=True)
    sizes = [t.numel() for t in theta]

    def product(rows: Tensor) -> Tensor:
        parts = []
        for some in torch.split(rows, number):
            pieces = [p.view(-1, *t.shape) for p, t in zip(some.split(sizes, 1), theta, strict=True)]
            if number == 1:
                pieces = [piece[0] for piece in pieces]
            found = torch.autograd.grad(slope, theta, pieces, retain_graph=True, is_grads_batched=number > 1)
            parts.append(torch.cat([g.reshape(len(some), -1) for g in found], dim=1))
        return torch.cat(parts)

    return product


def _compiled(problem: Problem) -> Product:
    named = {name: value.detach() for name, value in _named(problem).items()}
    loss = _loss(problem)

    @torch.compile
    def along(tangents: dict[str, Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = torch.func.jvp(torch.func.grad(loss), (named,), (tangents,))[1]
        return found

    sizes = [value.numel() for value in named.values()]

    def product(rows: Tensor) -> Tensor:
        parts = []
        for row in rows:
            split = zip(named.items(), row.split(sizes), strict=True)
            found = along({name: piece.view_as(value) for (name, value), piece in split})
            parts.append(torch.cat([found[name].reshape(-1) for name in named]))
        return torch.stack(parts)

    return product


def _captured(problem: Problem) -> Product:
    """One product of a kept graph, recorded and replayed: the graph is built on the stream that is recorded."""
    op = _operator(problem, _samples(problem))
    side, static = torch.cuda.Stream(), torch.zeros(1, op.size, dtype=op.dtype, device=op.device)
    side.wait_stream(torch.cuda.current_stream())
    with op.function.measuring():
        with torch.cuda.stream(side):
            graph = GradientGraph(op.function, "hessian", op.batches[0])
            for _ in range(WARM):
                graph.products(static)
        torch.cuda.current_stream().wait_stream(side)
        recorded = torch.cuda.CUDAGraph()
        with torch.cuda.graph(recorded, stream=side):
            image = graph.products(static)

    def product(rows: Tensor) -> Tensor:
        parts = []
        for row in rows:
            static.copy_(row[None])
            recorded.replay()
            parts.append(image[0] / op.total_weight)
        return torch.stack(parts)

    return product
