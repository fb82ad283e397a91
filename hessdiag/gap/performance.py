"""How well a checkpoint does on each split, and the gap between them, from numbers per example.

Every interval is for the population that the examples were drawn from (`means`, `calibration`). The training
examples are treated as such a sample too; where all of them were measured the gap is known a little better.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from hessdiag.errors import UsageError
from hessdiag.gap.statistics.calibration import BINS, PER_BIN, calibration_error
from hessdiag.gap.statistics.means import EXACT, Method, Score, difference, mean_score
from hessdiag.results import a_share

FLOOR = 0.01  # of the cross-entropy, at which Jiang et al. 2020 (section 4) stop all runs
FLOOR_ACCURACY = 0.99  # at which Kaur et al. 2022 stop theirs

Reached = Literal["yes", "no", "cannot tell"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """What one forward pass over a split says, per example.

    Attributes:
        loss: (n,) in the units of the problem's loss.
        score: (n,) the metric; 0 or 1 for accuracy.
        confidence: (n,) probability of the predicted class; None where there is none.
    """

    loss: ArrayLike
    score: ArrayLike | None = None
    confidence: ArrayLike | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPerformance:
    """One split.

    Attributes:
        split: its name.
        n: examples.
        loss: mean loss.
        score: mean metric, accuracy where it is 0 or 1.
        calibration: expected calibration error, over 15 bins of equal mass.
    """

    split: str
    n: int
    loss: Score
    score: Score
    calibration: Score


@dataclass(frozen=True, slots=True, kw_only=True)
class Performance:
    """All splits of one checkpoint, and what lies between training and test.

    Attributes:
        splits: in the order given.
        loss_gap: test minus train.
        score_gap: test minus train; of accuracy usually negative.
        loss_floor: whether the training loss is at or below ``floor``.
        accuracy_floor: whether the training score is at least 0.99; "cannot tell" where it is not 0 or 1.
        floor: as asked.
        confidence: of every interval.
    """

    splits: tuple[SplitPerformance, ...]
    loss_gap: Score
    score_gap: Score
    loss_floor: Reached
    accuracy_floor: Reached
    floor: float
    confidence: float


def performance(
    splits: Mapping[str, Examples],
    *,
    train: str = "train",
    test: str = "test",
    floor: float = FLOOR,
    confidence: float = 0.95,
    method: Method = "hall",
    seed: int = 0,
) -> Performance:
    """Performance per split, gaps, and whether training came to its end.

    Args:
        splits: per split the numbers per example.
        train: name of the split the model was trained on.
        test: name of the other.
        floor: training loss that counts as reached.
        confidence: of every interval.
        method: for mean losses, "hall" or "bca" (`means`).
        seed: names the random streams.

    Raises:
        UsageError: numbers per example that do not match in length, or ``confidence`` outside (0, 1).
    """
    a_share(confidence, "confidence")
    found = {name: _split(name, examples, confidence, method, seed) for name, examples in splits.items()}
    missing = [name for name in (train, test) if name not in found]
    if missing:
        reason = f"cannot tell: no split {missing[0]!r}; there are {', '.join(found) or 'none'}"
        loss_gap = score_gap = Score(reason=reason)
    else:
        loss_gap = difference(found[train].loss, found[test].loss)
        score_gap = difference(found[train].score, found[test].score)
    loss = found[train].loss if train in found else Score()
    score = found[train].score if train in found else Score()
    share = score if score.method == EXACT else Score()
    return Performance(
        splits=tuple(found.values()),
        loss_gap=loss_gap,
        score_gap=score_gap,
        loss_floor=_side(loss.lo, loss.hi, floor),
        accuracy_floor=_FLIPPED[_side(share.lo, share.hi, FLOOR_ACCURACY)],
        floor=floor,
        confidence=confidence,
    )


def _split(name: str, examples: Examples, confidence: float, method: Method, seed: int) -> SplitPerformance:
    n = int(np.size(np.asarray(examples.loss)))
    for what, given in (("score", examples.score), ("confidence", examples.confidence)):
        if given is not None and (size := int(np.size(np.asarray(given)))) != n:
            msg = f"split {name}: {size} values of {what} for {n} losses; give one per example"
            raise UsageError(msg)

    def rng(what: str) -> np.random.Generator:
        return np.random.default_rng([seed, *f"{name}\0{what}".encode()])

    loss = mean_score(examples.loss, confidence, method=method, rng=rng("loss"))
    if examples.score is None:
        score = Score(n=n, reason="cannot tell: no metric per example; give the problem a metric")
    else:
        score = mean_score(examples.score, confidence, share=True, method=method, rng=rng("score"))
    calibration = _calibration(examples, score, confidence, rng("calibration"))
    return SplitPerformance(split=name, n=n, loss=loss, score=score, calibration=calibration)


def _calibration(examples: Examples, score: Score, level: float, rng: np.random.Generator) -> Score:
    n = score.n
    if examples.confidence is None or examples.score is None or score.reason:
        return Score(n=n, reason=score.reason or "cannot tell: no confidence per example; not a classifier")
    correct = np.asarray(examples.score, np.float64).ravel()
    confidence = np.asarray(examples.confidence, np.float64).ravel()
    if score.method != EXACT:
        return Score(n=n, reason="cannot tell: the metric is not right or wrong (0 or 1) per example")
    if not ((confidence >= 0) & (confidence <= 1)).all():
        return Score(n=n, reason="cannot tell: a confidence is not a probability")
    if n < BINS * PER_BIN:
        return Score(n=n, reason=f"cannot tell: {n} examples, needs {BINS * PER_BIN - n} more")
    value, lo, hi = calibration_error(correct, confidence, level, rng)
    return Score(value=value, lo=lo, hi=hi, n=n, method=f"{BINS} bins of equal mass, test inversion")


_FLIPPED: dict[Reached, Reached] = {"yes": "no", "no": "yes", "cannot tell": "cannot tell"}


def _side(lo: float | None, hi: float | None, level: float) -> Reached:
    if lo is None or hi is None or lo <= level < hi:
        return "cannot tell"
    return "yes" if hi <= level else "no"
