"""Calls in processes of their own that end when they are no longer wanted, however that comes about."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from multiprocessing import active_children, get_context, parent_process
from typing import Any, TypeVar

Result = TypeVar("Result")
THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def side_by_side(
    function: Callable[..., Result], calls: Mapping[str, tuple[Any, ...]], *, jobs: int, threads: int | None
) -> Generator[tuple[str, Result | BaseException], None, None]:
    """Call a function in several processes, and yield name and result, or exception, of each call as it is done.

    Closing the iterator, an exception and Ctrl-C end the processes.

    Args:
        function: picklable.
        calls: its arguments by name.
        jobs: processes at once.
        threads: of the numerical libraries in each process, unless the environment says; not torch's.
    """
    others = set(active_children())
    context = get_context("spawn")  # a forked torch hangs in its own threads
    pool = ProcessPoolExecutor(min(jobs, len(calls)), mp_context=context, initializer=_serve)
    try:
        with _interrupts_wait(), _environment(threads):
            names = {pool.submit(function, *arguments): name for name, arguments in calls.items()}
        for future in as_completed(names):
            error = future.exception()
            yield names[future], future.result() if error is None else error
    except BaseException:
        for process in set(active_children()) - others:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _environment(threads: int | None) -> Iterator[None]:
    """What processes begun meanwhile inherit: on the digits MLP, idle BLAS threads took a tenth of the time."""
    mine = [] if threads is None else [name for name in THREADS if name not in os.environ]
    os.environ.update(dict.fromkeys(mine, str(threads)))
    try:
        yield
    finally:
        for name in mine:
            del os.environ[name]


@contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Ctrl-C waits; processes begun meanwhile never get it, where the system can do that (not on Windows)."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve() -> None:
    """In a process of the pool: leave Ctrl-C to the parent, and end when it ends, however that is."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
