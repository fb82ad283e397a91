"""What one product H·v costs in gradients of the same data, amortized over a block of eight vectors."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import adapters, ours
from benchmarks.adapters import Case, installed
from benchmarks.tables import Row
from benchmarks.timing import gradient_seconds, median_seconds, one_thread
from benchmarks.workloads import PEER_WORKLOADS, WORKLOADS, Workload
from hessdiag.engine.planner import hessian
from hessdiag.errors import one_line

VECTORS = 8


def run(data: str | None, quick: bool = False, names: Sequence[str] = ()) -> list[Row]:
    """One row per workload and tool."""
    one_thread()
    names = names or (("digits_mlp",) if quick or data is None else PEER_WORKLOADS)
    return [row for name in names for row in compare(WORKLOADS[name], data)]


def compare(workload: Workload, data: str | None, repeats: int = 3) -> list[Row]:
    """Median CPU time of `VECTORS` products, setting up included, per product and gradient."""
    problem = workload.problem(data)
    samples = workload.sample_set(problem)
    gradient = gradient_seconds(problem, samples.batches)
    case = adapters.classification(problem.model, samples.batches)
    size = sum(p.numel() for p in problem.model.parameters())
    block = torch.randn(VECTORS, size, generator=torch.Generator().manual_seed(0))
    costs: dict[str, float] = {}
    rows = []
    for tool, products in PEERS.items():
        if not installed(tool):
            rows.append(Row(workload.name, tool, "product [gradients]", None, None, "not installed"))
            continue
        try:
            with sdpa_kernel(SDPBackend.MATH):
                products(case, block)
                seconds = median_seconds(lambda call=products: call(case, block), repeats)
        except Exception as error:  # a peer may fail in any way: the table says how
            rows.append(
                Row(workload.name, tool, "product [gradients]", None, None, f"crash: {one_line(error, 90)}")
            )
            continue
        costs[tool] = seconds / VECTORS / gradient
    operator = hessian(ours.frozen(problem, workload), samples=workload.samples)
    operator.rows(block)
    cost = median_seconds(lambda: operator.rows(block), repeats) / VECTORS / gradient
    best = min(costs.values(), default=None)
    note = f"CPU, {VECTORS} vectors, gradient {gradient:.3g} s"
    for tool, cost in costs.items():
        rows.append(Row(workload.name, tool, "product [gradients]", cost, cost / best if best else None, note))
    ratio = cost / best if best else None
    rows.append(Row(workload.name, "hessdiag", "product [gradients]", cost, ratio, f"{operator.way}, {note}"))
    return rows


def _pyhessian(case: Case, block: torch.Tensor) -> None:
    shapes = [p for p in case.model.parameters() if p.requires_grad]
    source = importlib.import_module("pyhessian.utils")
    with adapters.pyhessian_object(case) as (built, _):
        for row in block:
            split = row.split([p.numel() for p in shapes])
            pieces = [piece.reshape(p.shape) for piece, p in zip(split, shapes, strict=True)]
            if len(case.batches) == 1:
                source.hessian_vector_product(built.gradsH, built.params, pieces)
            else:
                built.dataloader_hv_product(pieces)


def _eigenthings(case: Case, block: torch.Tensor) -> None:
    operator = adapters.eigenthings_operator(case)
    for row in block:
        operator.matvec(row)


def _curvlinops(case: Case, block: torch.Tensor) -> None:
    _ = adapters.curvlinops_operator(case) @ block.T.contiguous()


PEERS: dict[str, Callable[[Case, torch.Tensor], None]] = {
    "PyHessian": _pyhessian,
    "eigenthings": _eigenthings,
    "curvlinops": _curvlinops,
}
