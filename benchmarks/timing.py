"""CPU time on one thread, as medians, in seconds and in gradients of the same data."""

from __future__ import annotations

import gc
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.problem import Problem


def cpu_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """CPU time of one call (wall time where a GPU does the work), and what it returned."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        start = time.perf_counter()
        result = function()
        torch.cuda.synchronize()
        return time.perf_counter() - start, result
    start = time.process_time()
    result = function()
    return time.process_time() - start, result


def median_seconds(function: Callable[[], Any], repeats: int = 3) -> float:
    """Median CPU time of ``repeats`` calls."""
    return statistics.median(cpu_seconds(function)[0] for _ in range(repeats))


def gradient_seconds(problem: Problem, batches: Sequence[Any], repeats: int = 5) -> float:
    """Median CPU time of one gradient of all the data: forward and one backward per batch, the unit of cost."""
    model = problem.model
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradient() -> tuple[Tensor, ...]:
        total = tuple(torch.zeros_like(p) for p in parameters)
        for batch in batches:
            pieces = torch.autograd.grad(problem.total(model, batch), parameters)
            total = tuple(t + g for t, g in zip(total, pieces, strict=True))
        return total

    gradient()
    return median_seconds(gradient, repeats)


def child_seconds(function: Callable[[], Any]) -> float:
    """CPU time (user and system) that child processes spent during the call."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    function()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def peak_rss_mib() -> float:
    """Peak resident memory of this process so far, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one_thread(model: nn.Module | None = None) -> None:
    """Measure on one thread: CPU time then means the same for every tool."""
    torch.set_num_threads(1)
    if model is not None:
        model.zero_grad(set_to_none=True)
