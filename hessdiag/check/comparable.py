"""Whether two measurements may be compared at all: field by field, with the likely cause and the way out.

What differs in its subject is another matrix, and gets no verdict. What differs in how it was measured only
widens intervals: probes pair by their common beginning.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hessdiag.check.recorded import Entry, Recorded
from hessdiag.results import Fingerprint
from hessdiag.results.fingerprint import HOW, IDENTITY, MISSING, SUBJECT

RECORD = 'hessdiag baseline update --reason "..."'
SURROUNDINGS: Mapping[str, str] = {
    "hessdiag": "see its changelog under 'Numbers changed'",
    "torch": "its kernels may round otherwise",
    "device": "devices round otherwise",
    "device_name": "devices round otherwise",
}
NUMERIC_FLOOR: Mapping[str, float] = {"float32": 1e-4, "float64": 1e-9}
"""Rounding that repeating a measurement may show, relative to its scale: products in single precision carry 1e-7
each, and order of summation, threads and the Krylov space multiply it."""
DIFFERENCES_FLOOR = 5e-2  # differences of gradients in single precision: what the self-test allows them
IN_EIGENVALUES = frozenset({"lambda_max", "lambda_min", "ws_lower", "ws_upper", "trace"})
SHARES = frozenset({"negative_mass"})
HASH_DIGITS = 12


@dataclass(frozen=True, slots=True)
class Difference:
    """One field in which two subjects differ.

    Attributes:
        field: of the fingerprint.
        baseline: as recorded; `MISSING` if it was not.
        measured: as measured now.
        hint: the likely cause, and the way out.
    """

    field: str
    baseline: Any
    measured: Any
    hint: str

    def __str__(self) -> str:
        """On one line, hash values cut where they differ."""
        old, new = shortened(self.field, self.baseline, self.measured)
        return f"{self.field} was {old} in the baseline and is {new}: {self.hint}, or {RECORD}"


def differences(base: Fingerprint, new: Fingerprint) -> tuple[Difference, ...]:
    """The fields that forbid a comparison; none if two fingerprints have the same subject.

    A field that one side lacks differs, as does one that `Fingerprint` does not know: a later hessdiag wrote it.

    Args:
        base: fingerprint recorded.
        new: fingerprint measured.
    """
    unknown = sorted({*base, *new} - {*SUBJECT} - HOW - IDENTITY)
    found = []
    for name in (*SUBJECT, *unknown):
        old, now = base.get(name, MISSING), new.get(name, MISSING)
        if old != now or name not in base or name not in new:
            hint = SUBJECT.get(name, "another version of hessdiag wrote one of them: use the same")
            found.append(Difference(name, old, now, hint))
    return tuple(found)


def explain(label: str, diffs: Iterable[Difference]) -> tuple[str, ...]:
    """One line per difference, for `Report.problems`.

    Args:
        label: of the scope.
        diffs: of its fingerprints.
    """
    return tuple(f"{label}: {difference}" for difference in diffs)


def surroundings(base_env: Mapping[str, Any], new_env: Mapping[str, Any]) -> tuple[str, ...]:
    """What differs in versions and devices, one line each: it forbids no comparison, but may explain a change.

    Args:
        base_env: `Entry.env` recorded.
        new_env: `Entry.env` measured.
    """
    found = []
    for name, effect in SURROUNDINGS.items():
        old, now = base_env.get(name, MISSING), new_env.get(name, MISSING)
        if name == "device":  # cuda:0 and cuda:1 are told apart by their names, if at all
            old, now = str(old).partition(":")[0], str(now).partition(":")[0]
        if old != now:
            found.append(f"baseline measured with {name} {old}, now {now}: {effect}")
    return tuple(found)


def same_weights(base: Fingerprint, new: Fingerprint) -> bool:
    """Whether two fingerprints are of the same weights and optimizer; unknown weights are not.

    What a baseline of an earlier hessdiag does not know of frozen parameters and buffers is taken to be the same.
    """
    weights, fixed = new.weights_sha256, (base.fixed_sha256, new.fixed_sha256)
    same = weights is not None and weights == base.weights_sha256 and (None in fixed or fixed[0] == fixed[1])
    return same and base.optimizer_sha256 == new.optimizer_sha256


def reproduced(base: Entry, new: Entry) -> tuple[str, ...]:
    """Metrics of the same weights, samples and seed that do not agree: what measured them is not deterministic.

    They must agree within the sum of both half-widths and `NUMERIC_FLOOR`. Of probes the mean over those that both
    sides drew is compared; an interval over probes says nothing sure of another kind of number, so those are left.

    Args:
        base: recorded.
        new: measured.

    Returns:
        One line for each such metric; none where weights or subject differ.
    """
    if not same_weights(base.fingerprint, new.fingerprint) or differences(base.fingerprint, new.fingerprint):
        return ()
    methods = {side.env.get("method", side.env.get("way")) for side in (base, new)}  # "way" before version 0.2
    one_law = base.fingerprint.probe_law == new.fingerprint.probe_law
    found = []
    for name, old in base.metrics.items():
        now = new.metrics.get(name)
        if now is None or ("probes" in (old.kind, now.kind) and (old.kind != now.kind or not one_law)):
            continue
        floor = max(NUMERIC_FLOOR.get(side.dtype, NUMERIC_FLOOR["float32"]) for side in (old, now))
        if "finite_difference" in methods:
            floor = DIFFERENCES_FLOOR
        allowed = _half_width(old) + _half_width(now) + floor * _scale(name, base, new)
        before, after = _on_common_probes(old, now)
        if not abs(after - before) <= allowed:
            text = f"{name} of the same weights, data and seed was {before:.6g} and is {after:.6g}, rounding and "
            text += (
                f"both intervals explain {allowed:.2g}: look for dropout, sampling or changed code in the model"
            )
            found.append(f"{text} and its loss")
    return tuple(found)


def shortened(name: str, old: Any, new: Any) -> tuple[str, str]:
    """Two values of a field as a line shows them: hashes cut, but not before they differ."""
    texts = str(old), str(new)
    if not name.endswith("_sha256"):
        return texts
    apart = (place for place, (a, b) in enumerate(zip(*texts, strict=False)) if a != b)
    keep = max(HASH_DIGITS, next(apart, 0) + 1)
    first, second = (text if text == MISSING or len(text) <= keep else text[:keep] + "…" for text in texts)
    return first, second


def _half_width(recorded: Recorded) -> float:
    # From the value to the farther end: certificates are one-sided.
    return max(recorded.hi - recorded.value, recorded.value - recorded.lo)


def _on_common_probes(old: Recorded, new: Recorded) -> tuple[float, float]:
    shared = min(len(old.per_probe), len(new.per_probe))
    drawn = min(len(old.per_draw), len(new.per_draw))
    if not shared or (len(old.per_probe), len(old.per_draw)) == (len(new.per_probe), len(new.per_draw)):
        return old.value, new.value
    first, second = (
        math.fsum(side.per_probe[:shared]) / shared + _mean(side.per_draw[:drawn]) - _mean(side.per_draw)
        for side in (old, new)
    )
    return first, second


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else 0.0


def _scale(name: str, *entries: Entry) -> float:
    """What rounding is relative to: never a number that is small because larger ones cancel in it."""
    names = IN_EIGENVALUES if name in IN_EIGENVALUES else {name}
    sides = [entry.metrics[other] for entry in entries for other in names if other in entry.metrics]
    sizes = [abs(number) for side in sides for number in (side.value, *side.per_probe)]
    return max(sizes + [1.0] * (name in SHARES))
