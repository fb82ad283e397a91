"""One result of a measurement as a line of JSON with its checksum."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A result, and what forming it changed.

    Attributes:
        number: of the entry, from 0.
        what: its name.
        value: in the types of JSON.
        products: formed by the operator, by the one it rests on, and so on.
        seconds: in products.
        shown: what the products showed per batch and per tensor, packed; None where nobody asked. A record of the
            engine until it is written.
        notes: of the operator, new ones.
        changed: attributes of the operator that are others now.
        clock: readings that were taken since the entry before.
        at: the time, on the measurement's clock.
        written: the time of day.
        fills: whether it filled rows of a basis.
        anew: whether these rows took the place of those that the same run filled before.
        file: that holds its tensors.
        sums: checksums of these by name.
    """

    number: int
    what: str
    value: Any = None
    products: Sequence[int] = ()
    seconds: float = 0.0
    shown: Any = None
    notes: Sequence[str] = ()
    changed: Mapping[str, Any] = field(default_factory=dict)
    clock: Sequence[float] = ()
    at: float = 0.0
    written: float = 0.0
    fills: bool = False
    anew: bool = False
    file: str = ""
    sums: Mapping[str, int] = field(default_factory=dict)


def usable(entries: Sequence[Entry], whole: Callable[[Entry], bool]) -> int:
    """Entries from the first on that can be used: rows are missing only where later ones took their place.

    Args:
        entries: in their order.
        whole: whether the tensors of an entry are all there.
    """
    good, lacking, before = 0, False, False
    for entry in entries:
        if lacking and not (entry.fills and before):  # the run has ended without them
            break
        there = whole(entry)
        if not entry.fills and not there:
            break
        lacking = not there if entry.anew else lacking or not there
        before = entry.fills
        good = good if lacking else entry.number + 1
    return good


def replaced(entries: Sequence[Entry]) -> set[int]:
    """Numbers of the entries whose rows have been taken the place of by later ones of their run."""
    found: set[int] = set()
    run: set[int] = set()
    for entry in entries:
        found |= run if entry.anew else set()
        run = {entry.number} if entry.anew else {*run, entry.number} if entry.fills else set()
    return found


def line_of(entry: Entry) -> bytes:
    """The line, with a checksum before it."""
    text = json.dumps(asdict(entry)).encode()
    return b"[%d, %s]\n" % (zlib.crc32(text), text)


def entry_of(line: bytes) -> Entry | None:
    """An entry; None where its line is torn."""
    total, _, rest = line.partition(b", ")
    if not rest.endswith(b"]\n") or total != b"[%d" % zlib.crc32(rest[:-2]):
        return None
    try:
        return Entry(**json.loads(rest[:-2]))
    except (ValueError, TypeError):
        return None
