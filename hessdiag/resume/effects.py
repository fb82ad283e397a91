"""What forming products changes beside their images: counters, records, notes. Taken down, and done again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from hessdiag.operator import SymmetricOperator
from hessdiag.resume.entry import Entry
from hessdiag.resume.values import packed, unpacked

MOVING = ("method", "micro_batch", "block")
"""Attributes of an operator that running out of memory changes."""


@contextmanager
def effects(op: SymmetricOperator) -> Iterator[dict[str, Any]]:
    """Fields of an `Entry`, filled at the end of what is done inside; what products show is left where it is."""
    found: dict[str, Any] = {}
    chain = _chain(op)
    products, before, records = [one.products for one in chain], _state(op), getattr(chain[-1], "records", None)
    # what nobody asks for is not computed
    recorded = records.opened() if records is not None and records.wanted else nullcontext()
    with recorded as record:
        yield found
    after = _state(op)
    found |= {
        "products": [one.products - earlier for one, earlier in zip(chain, products, strict=True)],
        "seconds": after["seconds"] - before["seconds"],
        "shown": record,
        "notes": after["notes"][len(before["notes"]) :],
        "changed": {name: after[name] for name in MOVING if after[name] != before[name]},
    }


def with_shown(entry: Entry) -> Entry:
    """With what its products showed in the types of JSON: copied from the device only now."""
    record: Any = entry.shown
    shown = [] if record is None or not record.batches else [record.batches, record.tensors]
    return replace(entry, shown=[packed(torch.stack(part)) for part in shown] or None)


def repeat(op: SymmetricOperator, entry: Entry) -> None:
    """Change an operator as the products of an entry did."""
    chain = _chain(op)
    base: Any = chain[-1]
    for one, products in zip(chain, entry.products, strict=True):
        one.products += products
    if hasattr(base, "seconds"):
        base.seconds += entry.seconds
        base.notes += entry.notes
    if entry.shown is not None:
        base.records.again(*map(unpacked, entry.shown))
    for name, value in entry.changed.items():
        setattr(base, name, value)
    for one in chain:
        if one.watch is not None:
            one.watch(one.products)


def _chain(op: SymmetricOperator) -> list[SymmetricOperator]:
    """The operator, the one that it rescales, and so on."""
    chain = [op]
    while (base := getattr(chain[-1], "base", None)) is not None:
        chain.append(base)
    return chain


def _state(op: SymmetricOperator) -> dict[str, Any]:
    base = _chain(op)[-1]
    state = {name: getattr(base, name, None) for name in MOVING}
    return {**state, "seconds": getattr(base, "seconds", 0.0), "notes": list(getattr(base, "notes", ()))}
