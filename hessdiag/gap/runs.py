"""Which checkpoints belong to one training run: they share most of what they are, and are no independent draws."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from pathlib import PurePath
from typing import Any

from hessdiag.gap.record import CheckpointRecord
from hessdiag.sources.many import natural
from hessdiag.sources.spec import split_key

POSITIONS = ("epoch", "epochs", "step", "steps", "global_step", "iteration", "iter")
"""Facts of a checkpoint that say where its run stood."""
COUNTED = re.compile(
    r"(?:^|[^a-z])(epochs?|ep|e|global_?step|steps?|iterations?|iters?|it|checkpoints?|ckpts?|cp|model|net|weights|"
    r"snapshot|state)[-_=]?\d",
    re.IGNORECASE,
)
"""A word before the number in a file's name that counts along a run; "seed3" or "lr0.1" does not."""
FOLDER = re.compile(
    r"^(?:.*[^a-z])?(epochs?|ep|global_?step|steps?|iterations?|iters?|checkpoints?|ckpts?)[-_=]?\d+$",
    re.IGNORECASE,
)
"""A folder that holds one checkpoint of a run, "checkpoint-500" or "global_step100"; "model1" may be a run."""
NUMBER = re.compile(r"\d+(?:\.\d+)?(?:[eE][+-]\d+)?")


def runs(
    records: Sequence[CheckpointRecord], outcomes: Collection[str], *, one_run: bool | None = None
) -> tuple[tuple[CheckpointRecord, ...], ...]:
    """The records of each run together, in the order of training.

    Records belong to one run where their files lie in one folder, or each in a numbered one (checkpoint-500), have
    one name but for numbers, agree in every hyper-parameter, and either count along a run by their names or say
    epochs or steps that differ.

    Args:
        records: of checkpoints.
        outcomes: facts that are no hyper-parameters.
        one_run: who knows better says that all are of one run (True) or each of its own (False).
    """
    if one_run is not None:
        return (
            (tuple(sorted(records, key=_position)),) if one_run and records else tuple((one,) for one in records)
        )
    found: dict[Any, list[CheckpointRecord]] = {}
    for index, record in enumerate(records):
        found.setdefault(_run(record, outcomes) or index, []).append(record)
    groups: list[tuple[CheckpointRecord, ...]] = []
    for key, group in found.items():
        ordered = sorted(group, key=_position)
        apart = isinstance(key, tuple) and not _along(ordered)
        groups += [(one,) for one in group] if apart else [tuple(ordered)]
    return tuple(groups)


def _run(record: CheckpointRecord, outcomes: Collection[str]) -> tuple[Any, ...] | None:
    if not record.file:
        return None
    path = PurePath(split_key(record.file)[0])
    facts = sorted((name, str(value)) for name, value in record.meta.items() if name not in outcomes)
    place = path.parent
    if FOLDER.search(place.name):
        place = place.with_name(NUMBER.sub("#", place.name))
    return str(place), NUMBER.sub("#", path.name), tuple(facts)


def _along(group: Sequence[CheckpointRecord]) -> bool:
    files = {split_key(record.file)[0] for record in group}
    stems = {PurePath(file).stem for file in files}
    counted = all(COUNTED.search(stem) or stem.isdecimal() for stem in stems)
    counted |= all(FOLDER.search(PurePath(file).parent.name) for file in files)
    told = [tuple(str(record.meta.get(name)) for name in POSITIONS) for record in group]
    positions = len({one for one in told if set(one) != {"None"}})
    return len(group) > 1 and (len(files) == 1 or counted or positions > 1)


def _position(record: CheckpointRecord) -> tuple[Any, ...]:
    told = [record.meta.get(name) for name in POSITIONS]
    numbers = [float(one) for one in told if isinstance(one, int | float) and not isinstance(one, bool)]
    return (numbers[0] if numbers else 0.0, natural(record.file))
