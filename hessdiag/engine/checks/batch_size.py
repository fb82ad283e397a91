"""Batches for an accelerator: as large as its memory allows, since each of them is launched on its own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hessdiag.engine.products.devices import empty_cache, is_accelerator, offered, wait
from hessdiag.engine.products.failures import is_out_of_memory
from hessdiag.engine.products.functional import Functional
from hessdiag.engine.products.graphs import GradientGraph
from hessdiag.engine.products.group import ALONE, Group
from hessdiag.engine.products.memory import free_bytes
from hessdiag.engine.products.stacking import joined
from hessdiag.problem import Problem
from hessdiag.samples import DATA_BLOCKS, SampleSet, divide, entries, row_count

TRIED = 4, 16  # examples whose gradient and product are measured
SHARE = 0.5  # of the free memory, for one batch: vectors, kept graphs and several vectors at once take the rest
SAME_SUM = 1e-4  # relative: rounding leaves 1e-6, a loss that looks across examples more


def for_device(
    problem: Problem,
    samples: SampleSet,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    group: Group = ALONE,
) -> SampleSet:
    """The samples in eight batches, or as many more as memory makes necessary; on the CPU as they come.

    Eight, not one: error bars over data are a spread over batches. What an example takes is measured on 4 and 16
    of them; a batch of the size that follows is tried, and halved while memory runs out.

    Cost: on an accelerator the gradients of 20 examples and of one batch, and a product with each; elsewhere none.

    Args:
        problem: what will be measured.
        samples: on what; left alone where its batches cannot be put together, or the loss is no sum over examples.
        dtype: of the measurement.
        device: of the measurement; by default where the model is.
        group: the ranks that measure together; rank 0 divides the samples for all.
    """
    first = next(iter(problem.bare_model().parameters()), torch.empty(0))
    where = device or first.device
    if not is_accelerator(where) or offered(where, "max_memory_allocated") is None:
        return samples
    return group.first(lambda: _divided(problem, samples, dtype, device))


def _divided(
    problem: Problem, samples: SampleSet, dtype: torch.dtype | None, device: torch.device | None
) -> SampleSet:
    whole = _together(samples)
    try:
        function = Functional(problem.on(samples.batches), dtype=dtype, device=device)
        rows = None if whole is None else _rows(function, whole)
    except Exception:  # the user's code; the checks that follow name what is wrong with it
        rows = None
    if whole is None or rows is None:
        return samples
    number = -(-samples.examples // rows)
    return replace(samples, batches=tuple(divide(whole, -(-samples.examples // number))))


def _together(samples: SampleSet) -> Any | None:
    """All examples as one batch; None where a batch holds more than tensors, or is too small to tell."""
    if samples.examples < 2 * sum(TRIED) or any(row_count(batch) is None for batch in samples.batches):
        return None
    if not all(isinstance(entry, Tensor) for batch in samples.batches for entry in entries(batch)):
        return None
    return joined(samples.batches)


def _rows(function: Functional, whole: Any) -> int | None:
    """Examples per batch; None where the loss of a batch is not the sum over its parts."""
    few, more = TRIED
    if not _is_sum(function, next(divide(whole, few + more)), few):
        return None
    small, large = (_bytes(function, next(divide(whole, rows))) for rows in TRIED)
    each = max(1.0, (large - small) / (more - few))
    room = SHARE * free_bytes(function.device) - max(0.0, small - few * each)
    most = (row_count(whole) or 1) // DATA_BLOCKS
    rows = max(1, min(most, int(room / each)))
    while rows > 1 and _runs_out(function, next(divide(whole, rows))):
        empty_cache(function.device)
        rows //= 2
    return rows


def _is_sum(function: Functional, batch: Any, first: int) -> bool:
    pieces = [batch, *divide(batch, first)]
    with function.measuring(), torch.no_grad():
        totals = [float(function.total(function.theta, function.place(piece))) for piece in pieces]
    return abs(totals[0] - sum(totals[1:])) <= SAME_SUM * abs(totals[0])


def _runs_out(function: Functional, batch: Any) -> bool:
    try:
        _bytes(function, batch)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return True
    return False


def _bytes(function: Functional, batch: Any) -> int:
    """What the graph of a batch's gradient and a product with it take at their peak."""
    device = function.device
    offered(device, "reset_peak_memory_stats")(device)
    before = offered(device, "memory_allocated")(device)
    with function.measuring():
        graph = GradientGraph(function, "hessian", function.place(batch))
        graph.products(torch.ones(1, function.size, dtype=function.dtype, device=device), keep=False)
    wait(device)
    peak: int = offered(device, "max_memory_allocated")(device)
    return peak - int(before)
