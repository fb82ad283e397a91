"""Several processes that measure together, forked from one that has imported everything once."""

from __future__ import annotations

import datetime
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

PATIENCE = datetime.timedelta(seconds=60)


def forked(
    target: Callable[..., Any], arguments: list[tuple], meanwhile: Callable[[list[Any]], None] = lambda _: None
) -> list[Any]:
    """A process for each of the arguments, after it has ended; those of a call run side by side.

    ``meanwhile`` is called with them while they run.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.ranks_imports"])
    started = [context.Process(target=target, args=given) for given in arguments]
    for one in started:
        one.start()
    meanwhile(started)
    for one in started:
        one.join(180)
        if one.is_alive():
            one.kill()
            one.join()
    return started


def on_ranks(world: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What ``work(rank, *arguments)`` gives on each rank of a gloo group."""
    with tempfile.TemporaryDirectory() as folder:
        ended = forked(_on_rank, [(rank, world, folder, work, arguments) for rank in range(world)])
        assert [one.exitcode for one in ended] == [0] * world
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world)]


def _on_rank(rank: int, world: int, folder: str, work: Callable[..., Any], arguments: tuple) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=PATIENCE)
    torch.save(work(rank, *arguments), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
