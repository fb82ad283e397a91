"""What a run's products will take: measured on one product of the whole sample set, with its graphs kept."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

from hessdiag.engine.checks.planner import trial_vectors
from hessdiag.engine.products.composition import beside_outputs
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.devices import is_accelerator
from hessdiag.engine.squares.gauss_newton import EXACT_OUTPUTS, FAILURES, outputs_per_example

BASIS_SECONDS, BASIS_SECONDS_THERE = 1e-9, 1e-11
"""On the CPU and on an accelerator: per number of a basis that a vector is orthogonalized against, both passes."""
LOOK_SECONDS = 1.5e-3  # per step, of the looks at its certificates and its density
BASIS_VECTORS, BUSY = 1.3, 8  # per step, and beside the basis: parameters, gradient, a product
BUSY_BLOCK, STACKED = 8, 3  # vectors per probe of a block; and per probe and batch of a stack
LONG_PRODUCT = 0.5  # seconds: one is then enough
FIXED = 8 * 2**20  # bytes of the rest, whatever the network


@dataclass(frozen=True)
class Price:
    """What a product takes.

    Attributes:
        seconds: of one vector, on a machine that does nothing else.
        kept: bytes of the graphs that are kept.
        passing: bytes of the largest graph beside them that comes and goes.
    """

    seconds: float
    kept: int
    passing: int


def price(operator: Curvature) -> Price:
    """The price of a product; costs one or two, none of the run's own, and the graphs, which stay for it."""
    counted = operator.products, operator.seconds
    rows, graphs = trial_vectors(operator, 1)[:, operator.part], operator.graphs
    graphs.largest, graphs.building = 0, 0.0
    clock, seconds = _timed(operator, rows)
    if operator.device.type == "cpu" and clock > LONG_PRODUCT:
        seconds *= max(1 - graphs.building / clock, 0.1)
    else:  # the first call warms up
        seconds = min(seconds, _timed(operator, rows)[1])
    # a product from a kept graph fills about half of what that holds once more
    passing = graphs.largest // (2 if graphs.held else 1)
    operator.products, operator.seconds = counted
    return Price(seconds, graphs.held, passing)


def _timed(operator: Curvature, rows: torch.Tensor) -> tuple[float, float]:
    """A product's seconds, on the clock and on a machine that does nothing else."""
    begun, used = time.perf_counter(), time.process_time()
    with operator.recorded():  # as a run's
        operator.rows(rows).sum().item()  # waits for an accelerator
    clock, own = time.perf_counter() - begun, time.process_time() - used
    clock = operator.group.number(clock)  # which decides whether there is a second call
    # where others take turns on the processor the clock runs on; where several threads work their sum is larger
    return clock, min(clock, own) if operator.device.type == "cpu" else clock


def seconds_of(operator: Curvature, each: Price, steps: int, probes: int) -> float:
    """Seconds of a run of ``steps`` products and ``probes`` that it deflates, orthogonalizing included."""
    numbers = operator.size * steps * (steps / 2 + 3 * probes)
    each_number = BASIS_SECONDS_THERE if is_accelerator(operator.device) else BASIS_SECONDS
    beside = numbers * each_number + steps * LOOK_SECONDS
    return (steps + probes) * each.seconds + beside


def bytes_of(operator: Curvature, each: Price, steps: int, probes: int) -> int:
    """Bytes at the peak of such a run, beside model and data."""
    batches = len(operator.stacks[0].indices) if operator.method == "stacked_graph" else 0
    block = min(operator.block, probes) * (BUSY_BLOCK + STACKED * batches)
    vectors = BASIS_VECTORS * steps + max(BUSY, block)
    return FIXED + each.kept + each.passing + round(operator.size * operator.dtype.itemsize * vectors)


def exact_trace_likely(operator: Curvature) -> bool:
    """Whether tr(G) can likely be computed exactly; costs a forward pass of 4 examples."""
    try:
        with operator.timed():
            outputs = beside_outputs(operator) or outputs_per_example(operator)
    except FAILURES:
        return False  # the trace will say why
    usual = operator.problem.weight is None and operator.method != "finite_difference"
    return usual and isinstance(outputs, int) and outputs <= EXACT_OUTPUTS
