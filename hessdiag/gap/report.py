"""The gap report: records of many checkpoints, what goes with the gap, and what to beware of."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, get_args

from hessdiag.errors import Refused, UsageError
from hessdiag.gap.caveats import caveats
from hessdiag.gap.record import SCHEMA, CheckpointRecord
from hessdiag.gap.registry import Reading
from hessdiag.gap.runs import runs
from hessdiag.gap.statistics.means import Score
from hessdiag.gap.statistics.rank_results import RankReport, Readings, RunTable
from hessdiag.gap.statistics.ranks import rank_report
from hessdiag.results.plain import as_json, json_text
from hessdiag.shown import table

if TYPE_CHECKING:
    import pandas as pd

GapKind = Literal["error", "loss"]
OUTCOMES = frozenset(
    (
        *("epoch", "epochs", "step", "steps", "global_step", "loss", "accuracy", "acc", "train_loss", "test_loss"),
        *("val_loss", "val_acc", "best_loss", "best_acc", "best_prec1", "version", "pytorch-lightning_version"),
    )
)
"""Entries of checkpoints that are no hyper-parameters: where a run stood, and what came of it."""
COLUMNS = ("checkpoint", "kind", "name", "value", "lo", "hi", "how", "note", "rescaled", "guard", "code")


@dataclass(frozen=True)
class GapReport:
    """Many checkpoints side by side.

    Attributes:
        records: those that were measured, in the order given.
        failures: by checkpoint, why it could not be measured; a `Refused` says it with its code.
        gap: which gap measures are ranked against: "error", "loss", or None: error where there are classes.
        group_by: hyper-parameters to group by; None: all that vary.
        confidence: of the rank statistics.
        seed: names their random streams.
        one_run: whether all checkpoints are of one run, or each of its own; None: as files and facts tell.
    """

    records: tuple[CheckpointRecord, ...]
    failures: Mapping[str, str | Refused] = field(default_factory=dict)
    gap: GapKind | None = None
    group_by: Sequence[str] | None = None
    confidence: float = 0.95
    seed: int = 0
    one_run: bool | None = None

    def __post_init__(self) -> None:
        """Refuse an unknown gap.

        Raises:
            UsageError: it is neither "error" nor "loss".
        """
        if self.gap is not None and self.gap not in get_args(GapKind):
            msg = f"`gap={self.gap}`: allowed: {', '.join(get_args(GapKind))}"
            raise UsageError(msg)

    @cached_property
    def gap_kind(self) -> GapKind:
        """The gap ranked against: as asked, or error where most checkpoints have one."""
        if self.gap is not None:
            return self.gap
        known = [r.gap("error").value is not None for r in self.records]
        return "error" if 2 * sum(known) > len(known) else "loss"

    @cached_property
    def measures(self) -> tuple[str, ...]:
        """Names of all measures taken, in their order."""
        return tuple(dict.fromkeys(name for record in self.records for name in record.readings))

    @cached_property
    def ranks(self) -> RankReport:
        """Every measure against the gap.

        Raises:
            UsageError: a hyper-parameter to group by that no checkpoint has.
        """
        records = self.independent
        gaps = [record.gap(self.gap_kind) for record in records]
        n_test = min((gap.n for gap in gaps if gap.value is not None), default=None)
        table = RunTable(
            names=[record.name for record in records],
            gap=_column(gaps),
            measures={name: _column([r.readings.get(name) for r in records]) for name in self.measures},
            settings=[self._hyperparameters(record) for record in records],
            confidence=self.confidence,
            n_test=n_test if self.gap_kind == "error" else None,
        )
        return rank_report(table, hyperparameters=self.group_by, confidence=self.confidence, seed=self.seed)

    @cached_property
    def caveats(self) -> tuple[str, ...]:
        """What to beware of."""
        ranked = [record for record in self.independent if record.gap(self.gap_kind).value is not None]
        return tuple(caveats(self.records, ranked))

    @cached_property
    def runs(self) -> tuple[tuple[CheckpointRecord, ...], ...]:
        """The checkpoints of each run together, in its order: epochs of one run are no independent draws."""
        return runs(self.records, OUTCOMES, one_run=self.one_run)

    @cached_property
    def independent(self) -> tuple[CheckpointRecord, ...]:
        """The last checkpoint of each run, in the order given."""
        last = {id(run[-1]) for run in self.runs}
        return tuple(record for record in self.records if id(record) in last)

    def to_frame(self) -> pd.DataFrame:
        """Tidy: a row per checkpoint and number (columns `COLUMNS`); a refused one is empty, with its reason."""
        return table(self._rows(), COLUMNS)

    def to_json(self) -> str:
        """One document: records, failures, rank statistics and caveats."""
        plain = {
            "schema": SCHEMA,
            "gap": self.gap_kind,
            "records": [record.to_dict() for record in self.records],
            "failures": {name: str(why) for name, why in self.failures.items()},
            "codes": {name: _code(why) for name, why in self.failures.items()},
            "ranks": as_json(self.ranks),
            "caveats": list(self.caveats),
        }
        return json_text(plain)

    def _hyperparameters(self, record: CheckpointRecord) -> dict[str, object]:
        """Of the run: what training was asked for, not what came of it."""
        wanted = self.group_by
        return {
            name: value
            for name, value in record.meta.items()
            if (name in wanted if wanted is not None else name not in OUTCOMES)
            and isinstance(value, str | int | float | bool)
        }

    def _rows(self) -> Iterator[tuple[Any, ...]]:
        for record in self.records:
            for split in record.performance.splits:
                for what in ("loss", "score", "calibration"):
                    yield _score(record.name, "performance", f"{what}[{split.split}]", getattr(split, what))
            for kind in get_args(GapKind):
                yield _score(record.name, "gap", kind, record.gap(kind))
            for name, one in record.readings.items():
                moved = record.guard.get(name)
                beside = (moved.after, moved.verdict) if moved else (None, "")
                if isinstance(one, Reading):
                    hi = one.hi if math.isfinite(one.hi) else None
                    yield (record.name, "measure", name, one.value, one.lo, hi, one.kind, one.note, *beside, "")
                else:
                    empty = (None, None, None)
                    yield (record.name, "measure", name, *empty, "refused", one.reason, *beside, one.code)
        for name, why in self.failures.items():
            yield (name, "failure", "", None, None, None, "failed", str(why), None, "", _code(why))


def _code(why: str | Refused) -> str:
    return why.code if isinstance(why, Refused) else ""


def _column(cells: Sequence[Score | Reading | Refused | None]) -> Readings:
    found = [
        None if cell is None or isinstance(cell, Refused) else (cell.value, cell.lo, cell.hi) for cell in cells
    ]
    parts = [[None if cell is None else cell[index] for cell in found] for index in range(3)]
    return Readings(values=parts[0], lo=parts[1], hi=parts[2])


def _score(checkpoint: str, kind: str, name: str, one: Score) -> tuple[Any, ...]:
    how = one.method if one.value is not None else "refused"
    return (checkpoint, kind, name, one.value, one.lo, one.hi, how, one.reason, None, "", "")
