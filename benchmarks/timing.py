"""CPU time on one thread or device time, in seconds and in gradients of the same data; and peak memory."""

from __future__ import annotations

import gc
import os
import resource
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.engine.products.devices import offered, started, wait
from hessdiag.problem import Problem
from hessdiag.samples import map_tensors

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")  # Linux


@contextmanager
def bounded_memory(share: float = 0.6) -> Iterator[None]:
    """Beyond this share of the machine's memory an allocation fails, instead of the system ending the process.

    Nothing is bounded where an accelerator maps its own.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    most = int(share * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    stricter = [limit for limit in (soft, hard) if limit != resource.RLIM_INFINITY]
    if started() is None:
        resource.setrlimit(resource.RLIMIT_DATA, (min([most, *stricter]), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def unit(device: str = "cpu") -> str:
    """What `cpu_seconds` counts there."""
    return "CPU s" if device == "cpu" else f"{device} s"


def clock() -> float:
    """CPU time so far, or wall time where a GPU does the work: for parts of a call that is timed as a whole."""
    if started() is not None:
        wait()
        return perf_counter()
    return process_time()


def cpu_seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    """CPU time of one call, and what it returned; where a GPU does the work, time between events around it."""
    gc.collect()
    return _seconds(function)


def _seconds(function: Callable[[], Any]) -> tuple[float, Any]:
    if torch.cuda.is_initialized():
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        result = function()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1000, result
    if started() is not None:
        wait()
        start = perf_counter()
        result = function()
        wait()
        return perf_counter() - start, result
    start = process_time()
    result = function()
    return process_time() - start, result


def median_seconds(function: Callable[[], Any], repeats: int = 3) -> float:
    """Median time of ``repeats`` calls."""
    gc.collect()
    return statistics.median(_seconds(function)[0] for _ in range(repeats))


def gradient(problem: Problem, batches: Sequence[Any]) -> Callable[[], tuple[Tensor, ...]]:
    """One gradient of all the data: forward and one backward per batch, the unit of cost."""
    model = problem.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    placed = [map_tensors(batch, lambda leaf: leaf.to(parameters[0].device)) for batch in batches]

    def once() -> tuple[Tensor, ...]:
        total = torch.autograd.grad(problem.total(model, placed[0]), parameters)
        for batch in placed[1:]:
            pieces = torch.autograd.grad(problem.total(model, batch), parameters)
            total = tuple(t + g for t, g in zip(total, pieces, strict=True))
        return total

    return once


def gradient_seconds(problem: Problem, batches: Sequence[Any], repeats: int = 5) -> float:
    """Median time of `gradient`."""
    once = gradient(problem, batches)
    once()
    return median_seconds(once, repeats)


def paired(
    calls: Mapping[str, Callable[[], Any]], measure: Callable[[], Any], rounds: int
) -> dict[str, list[float]]:
    """Time of every call over that of ``measure``, before and after it: a busy machine is busy for both.

    Returns:
        Per call one ratio per round.
    """
    costs: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        before = median_seconds(measure)
        for name, call in calls.items():
            taken = cpu_seconds(call)[0]
            after = median_seconds(measure)
            costs[name].append(2 * taken / (before + after))
            before = after
    return costs


def peak_mib(function: Callable[[], Any]) -> tuple[float, Any]:
    """Memory in MiB at the peak of a call above what was held before it, and what it returned.

    On an accelerator by torch's own account. On the CPU resident memory by Linux's, best in a process whose freed
    memory goes back at once (`GIVING_BACK`); elsewhere the growth of the largest resident size so far.
    """
    gc.collect()
    device = started()
    if device is not None:
        wait()
        offered(device, "reset_peak_memory_stats")()
        before = offered(device, "memory_allocated")()
        result = function()
        wait()
        return (offered(device, "max_memory_allocated")() - before) / 2**20, result
    if STATUS.exists():
        CLEAR.write_text("5")  # the peak begins anew at what is held now
    before = _peak_kib()
    result = function()
    return max(_peak_kib() - before, PAGE_KIB) / 1024, result


PAGE_KIB = 4  # less cannot be told from nothing
GIVING_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def _peak_kib() -> int:
    if STATUS.exists():
        line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def child_seconds(function: Callable[[], Any]) -> float:
    """CPU time (user and system) that child processes spent during the call."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    function()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def one_thread(model: nn.Module | None = None) -> None:
    """Measure on one thread: CPU time then means the same for every tool."""
    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays anyway: collecting before every measurement need not look at it
    if model is not None:
        model.zero_grad(set_to_none=True)
