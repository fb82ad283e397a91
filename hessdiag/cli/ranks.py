"""``torchrun -m hessdiag``: the processes of a launcher measure together, and one of them speaks for all.

Every rank runs the whole command; rank 0 alone prints and writes. What fails on one rank is said once: by rank 0
where all know of it, else by whoever is first to say that it cannot go on.
"""

from __future__ import annotations

import datetime
import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from hessdiag.cli import stdout
from hessdiag.errors import UsageError

if TYPE_CHECKING:
    from hessdiag.engine.products.group import Group

DIVIDED = ("analyze", "doctor", "check", "compare")
PATIENCE = datetime.timedelta(hours=1)  # for the slowest rank's part of a sum; one that is gone is noticed at once
MEETING = datetime.timedelta(minutes=10)  # until all have imported torch
LAST_WORDS = datetime.timedelta(seconds=5)  # that other ranks stay, or torchrun would end rank 0 before it speaks
STUCK = 8.0  # seconds after a signal that a process may take to end by itself; torchrun waits for 30
_JOINED: list[tuple[Group, Any]] = []  # at most one, with the store in which ranks leave each other words
_SAID = "said"


def world() -> int:
    """How many processes a launcher has started: torchrun, or srun with torch's variables."""
    size = os.environ.get("WORLD_SIZE", "1")
    return int(size) if size.isdigit() and "RANK" in os.environ else 1


def join(verb: str) -> None:
    """Become one of the launcher's ranks; nothing happens in a process that none has started.

    Raises:
        UsageError: the verb's work is not divided, or the ranks do not find each other.
    """
    if world() == 1:
        return
    if os.environ["RANK"] != "0":
        stdout.silence()
    if verb.startswith("-"):
        return
    if verb not in DIVIDED:
        msg = f"{verb} does its work in one process: start it without torchrun; allowed under torchrun: "
        raise UsageError(msg + ", ".join(DIVIDED))
    import torch
    import torch.distributed as dist
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    from hessdiag.engine.products.group import Group

    backend = "gloo"
    if torch.cuda.is_available():
        place, there = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
        torch.cuda.set_device(place % there)
        if int(os.environ.get("LOCAL_WORLD_SIZE", "1")) <= there:  # else ranks share a GPU, which NCCL refuses
            backend = "cpu:gloo,cuda:nccl"
    try:
        found, rank, size = next(iter(rendezvous("env://", timeout=MEETING)))
        store = PrefixStore("hessdiag", found)  # a training may have started this command, and use the other
        store.set(f"{rank}", "here")
        store.wait([f"{one}" for one in range(size)], MEETING)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        msg = f"not all of {world()} ranks are there: start them with torchrun; alone, unset WORLD_SIZE and RANK"
        raise UsageError(msg) from error
    _end_even_if_stuck(store)
    _JOINED.append((Group(dist.group.WORLD), store))


def require_alone(*given: Any) -> None:
    """Refuse options, or something false, whose work is not divided, where there are several ranks.

    Raises:
        UsageError: one was given.
    """
    for option in filter(None, given if _JOINED else ()):
        msg = f"{option} does its work in one process: start it without torchrun"
        raise UsageError(msg)


def leads() -> bool:
    """Whether this process writes the result."""
    return not _JOINED or _JOINED[0][0].rank == 0


def group(*, shard_vectors: bool = False) -> Group:
    """The ranks that measure together; this process alone without a launcher.

    Args:
        shard_vectors: each rank is to hold a part of every vector.

    Raises:
        UsageError: vectors are to be shared by one process.
    """
    from hessdiag.engine.products.group import Group

    if not _JOINED:
        return Group(shard_vectors=shard_vectors)
    if shard_vectors:
        import torch.distributed as dist

        _JOINED[0] = (Group(dist.group.WORLD, shard_vectors=True), _JOINED[0][1])
    return _JOINED[0][0]


def end() -> None:
    """Wait until rank 0 has written everything."""
    if _JOINED:
        import torch.distributed as dist

        _JOINED[0][0].end()
        _JOINED.clear()
        dist.destroy_process_group()


def failed(error: BaseException, explain: Callable[[BaseException], int], *, signalled: bool) -> int:
    """Let one rank say why nothing came of it; the exit code."""
    if not _JOINED:
        return explain(error)
    from hessdiag.engine.products.common_errors import GoneError, rank_of

    ours, store = _JOINED.pop()
    alone = signalled or isinstance(error, KeyboardInterrupt)
    if not alone and rank_of(error) is None:
        error = ours.common(error)
    with suppress(KeyboardInterrupt):  # torchrun ends those that are left
        if alone or isinstance(error, GoneError) or rank_of(error) is None:
            return _only_one(store, lambda: explain(error))
        code = explain(error)
        _wait_for_rank_0(store)
    return code


def where(error: BaseException) -> str:
    """On which of the ranks that did the same something failed."""
    if world() == 1:
        return ""
    from hessdiag.engine.products.common_errors import rank_of

    rank = rank_of(error)
    return "" if rank is None or rank < 0 else f" (rank {rank} of {world()})"


def why_ended() -> str:
    """Where a launcher may have done it."""
    return " of the launcher, or because another rank ended: what that one said, or who killed it, tells why" * (
        world() > 1
    )


def _only_one(store: Any, say: Callable[[], int]) -> int:
    """Say it unless another rank has said that it cannot go on."""
    if _first_to_speak(store):
        stdout.speak()
        return say()
    stdout.silence()
    return say()


def _first_to_speak(store: Any) -> bool:
    with suppress(Exception):  # the store went with the process that held it
        return int(store.add(_SAID, 1)) == 1
    return True


def _wait_for_rank_0(store: Any) -> None:
    with suppress(Exception):
        if stdout.silent():
            store.wait([_SAID], LAST_WORDS)
        else:
            store.add(_SAID, 1)


def _end_even_if_stuck(store: Any) -> None:
    """End after a signal also where the main thread waits inside of NCCL, and no handler of Python runs."""
    with suppress(ValueError):  # not the main thread
        read, write = os.pipe()
        os.set_blocking(write, False)
        signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        threading.Thread(target=_watch, args=(read, store), daemon=True).start()


def _watch(read: int, store: Any) -> None:
    number = 0
    while number not in (signal.SIGTERM, signal.SIGINT):
        number = os.read(read, 1)[0]
    threading.Event().wait(STUCK)
    if _first_to_speak(store):
        stdout.message(f"hessdiag: ended by {signal.Signals(number).name}{why_ended()}", always=True)
    os._exit(128 + number)
