"""What falls to each rank: whole batches, and consecutive entries of vectors."""

from __future__ import annotations

from collections.abc import Sequence

from hessdiag.errors import UsageError

SHORTEST = 2_000  # numbers of a shared vector that a rank holds: shorter ones fit anywhere


def dealt(sizes: Sequence[float], ranks: int) -> list[tuple[int, ...]]:
    """Batches by rank: the longest first, each to the rank that has least by then."""
    loads, hands = [0.0] * ranks, [list[int]() for _ in range(ranks)]
    for index in sorted(range(len(sizes)), key=lambda index: -sizes[index]):
        rank = loads.index(min(loads))
        loads[rank] += sizes[index]
        hands[rank].append(index)
    return [tuple(sorted(hand)) for hand in hands]


def width(size: int, ranks: int) -> int:
    """Entries of a vector that a rank holds, the last one fewer.

    Raises:
        UsageError: the vector is too short to be shared.
    """
    if size < SHORTEST * ranks:
        msg = f"`shard_vectors`: vectors of {size:,} numbers fit anywhere; allowed: from {SHORTEST:,} a rank on"
        raise UsageError(msg)
    return -(-size // ranks)
