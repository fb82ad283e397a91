"""How much memory a device would still give, so that a share of it may be kept for speed."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import torch

from hessdiag.engine.products.devices import offered

MEMINFO, GROUP, GROUPS = Path("/proc/meminfo"), Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
UNKNOWN = 2 * 2**30  # bytes, where the system does not say (macOS, Windows): most machines have them
FILES = (
    ("memory.max", "memory.current", "inactive_file"),  # a control group of version 2
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),  # and of version 1
)
"""The limit, what is used, and the entry of memory.stat that says what of that the system takes back."""


def free_bytes(device: torch.device) -> int:
    """Bytes that could be allocated now: of an accelerator, or of the system, in every control group we are in."""
    asked = offered(device, "mem_get_info")
    if asked is not None:
        free: int = asked(device)[0]
        reserved, used = offered(device, "memory_reserved"), offered(device, "memory_allocated")
        return free if reserved is None or used is None else free + reserved(device) - used(device)
    rooms = [room for room in (_available(), *map(_left, control_groups())) if room is not None]
    return max(0, min(rooms, default=UNKNOWN))


def _available() -> int | None:
    found = _numbers(MEMINFO).get("MemAvailable:")
    return None if found is None else found * 1024


def control_groups() -> list[Path]:
    """The control groups of this process, up to the root; a container may see its own one as the root."""
    try:
        lines = [line.split(":", 2) for line in GROUP.read_text().splitlines()]
    except OSError:
        return []
    found: dict[Path, None] = {}
    for line in lines:
        if len(line) != 3 or line[1] not in ("", "memory"):
            continue
        root = GROUPS / line[1]
        own = root / line[2].strip("/")
        found |= dict.fromkeys((*(p for p in (own, *own.parents) if p.is_relative_to(root)), root))
    return list(found)


def _left(group: Path) -> int | None:
    for limit, used, reclaimable in FILES:
        try:
            most, taken = int((group / limit).read_text()), int((group / used).read_text())
        except (OSError, ValueError):  # not there; or "max", which is no limit
            continue
        return most - taken + _numbers(group / "memory.stat").get(reclaimable, 0)
    return None


def _numbers(path: Path) -> dict[str, int]:
    """The lines "name number" of one of the system's files; none where it cannot be read."""
    try:
        words = [line.split() for line in path.read_text().splitlines()]
    except OSError:
        return {}
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdigit()}


LARGE_PIECE = 1 << 22
"""Bytes: at glibc's own beginning, 128 KiB, clearing fresh memory for every activation took longer than the
products of GPT-2 small; at the 32 MiB that it learns, pieces of gradients stay."""
KEPT_AT_THE_END = 1 << 26  # bytes at the end of the heap
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def give_back() -> None:
    """Have what is freed from here on returned to the system at once, and what is free already now; glibc only.

    Left alone it keeps tensors of up to 32 MiB for the next of their size: of GPT-2 small 1.2 GB after a
    self-test.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):  # musl
        return
    library.mallopt(M_MMAP_THRESHOLD, LARGE_PIECE)
    library.mallopt(M_TRIM_THRESHOLD, KEPT_AT_THE_END)
    library.malloc_trim(0)
