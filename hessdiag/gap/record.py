"""One checkpoint of a gap report: what was found, and its form on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from hessdiag.errors import Refused, UsageError, one_line
from hessdiag.gap.performance import Performance, SplitPerformance
from hessdiag.gap.registry import Reading
from hessdiag.gap.statistics.means import Score
from hessdiag.results import Fingerprint
from hessdiag.results.plain import json_text

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Moved:
    """A measure after a function-preserving rescaling of the layers.

    Attributes:
        verdict: "moved", "did not move", "cannot tell"; "refused" where there is no number at either.
        after: its value at the rescaled weights; None where it has none there.
    """

    verdict: str
    after: float | None = None


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    """A checkpoint and everything a report says of it.

    Attributes:
        name: in tables.
        file: as given.
        sha256: of the file; None where the factory loaded it.
        meta: hyper-parameters and facts of the run, from ``Problem.meta`` and the file.
        performance: per split, with the gaps.
        readings: by measure; a `Refused` has the reason why there is none.
        guard: by measure; empty where nothing could be rescaled.
        rescaled: what the guard rescaled, or why it could not.
        fingerprint: of the measurement, field by field.
        gradient_share: ‖∇L‖ · ‖θ‖ / L, how far from a minimum; small at one.
        loss: mean loss of the samples.
        first_loss: mean loss of the first batch: the same weights in other code have another.
        batch_norm: whether the model has BatchNorm layers.
        products: with H.
        seconds: of wall time in all.
        model_seconds: of these, in evaluations of the model.
        notes: what to know.
    """

    name: str
    file: str
    sha256: str | None
    meta: Mapping[str, Any]
    performance: Performance
    readings: Mapping[str, Reading | Refused]
    guard: Mapping[str, Moved] = field(default_factory=dict)
    rescaled: str = ""
    fingerprint: Fingerprint = field(default_factory=Fingerprint)
    gradient_share: float = 0.0
    loss: float = 0.0
    first_loss: float = 0.0
    batch_norm: bool = False
    products: int = 0
    seconds: float = 0.0
    model_seconds: float = 0.0
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The record as JSON can hold it; infinite ends are null."""
        plain = asdict(self) | {"schema": SCHEMA, "fingerprint": dict(self.fingerprint)}
        plain["readings"] = {name: _reading_out(one) for name, one in self.readings.items()}
        plain["meta"] = {name: _fact(value) for name, value in self.meta.items()}
        return plain

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> CheckpointRecord:
        """The inverse of `to_dict`.

        Raises:
            UsageError: it is of another schema, or not a record.
        """
        try:
            if plain["schema"] != SCHEMA:
                msg = (
                    f"record of schema {plain['schema']}, this hessdiag reads {SCHEMA}: measure with `fresh=True`"
                )
                raise UsageError(msg)
            fields = {name: value for name, value in plain.items() if name != "schema"}
            fields["fingerprint"] = Fingerprint.of(plain.get("fingerprint", {}))
            fields["performance"] = _performance_in(plain["performance"])
            fields["readings"] = {name: _reading_in(one) for name, one in plain["readings"].items()}
            fields["guard"] = {name: Moved(**one) for name, one in plain["guard"].items()}
            fields["notes"] = tuple(plain["notes"])
            return cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            msg = f"not a record of a checkpoint ({one_line(error, 80)}): measure again with `fresh=True`"
            raise UsageError(msg) from error

    def to_json(self) -> str:
        """One document, keys sorted."""
        return json_text(self.to_dict())

    def gap(self, kind: str) -> Score:
        """The generalization gap, larger is worse: "loss" (test − train), or "error" (1 − score)."""
        if kind == "loss":
            return self.performance.loss_gap
        found = self.performance.score_gap
        if found.value is None or found.lo is None or found.hi is None:
            return found
        return Score(value=-found.value, lo=-found.hi, hi=-found.lo, n=found.n, method=found.method)


def _reading_out(one: Reading | Refused) -> dict[str, Any]:
    if isinstance(one, Refused):
        return {"reason": one.reason, "code": one.code} if one.code else {"reason": one.reason}
    hi = one.hi if math.isfinite(one.hi) else None
    more = {name: value for name, value in one.more.items() if math.isfinite(value)}
    return {"value": one.value, "lo": one.lo, "hi": hi, "kind": one.kind, "note": one.note, "more": more}


def _reading_in(plain: Mapping[str, Any]) -> Reading | Refused:
    if "reason" in plain:
        return Refused(str(plain["reason"]), str(plain.get("code", "")))
    hi = math.inf if plain["hi"] is None else plain["hi"]
    return Reading(plain["value"], plain["lo"], hi, plain["kind"], plain["note"], plain["more"])


def _performance_in(plain: Mapping[str, Any]) -> Performance:
    splits = []
    for split in plain["splits"]:
        scores = {name: Score(**split[name]) for name in ("loss", "score", "calibration")}
        splits.append(SplitPerformance(split=split["split"], n=split["n"], **scores))
    rest = {name: plain[name] for name in ("loss_floor", "accuracy_floor", "floor", "confidence")}
    loss_gap, score_gap = Score(**plain["loss_gap"]), Score(**plain["score_gap"])
    return Performance(splits=tuple(splits), loss_gap=loss_gap, score_gap=score_gap, **rest)


def _fact(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
