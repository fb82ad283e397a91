"""Generalizability tests: a checkpoint's score as its test data move away from its training data.

Those tests of Sandler, Klabjan and Luo (arXiv 2102.11210) that one checkpoint, or several on the same data, can be
put to; T1 to T8 number them in the order of the paper's code. Inputs are arrays or tensors with one example per
row; scores are one number per example, 1 and 0 for right and wrong. Each test gives a `ShiftCurve`; `compare` sets
curves of several checkpoints side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from hessdiag.errors import UsageError
from hessdiag.shift.compare import CurveDifference, compare
from hessdiag.shift.curve import curve
from hessdiag.shift.features import Weighted, nearest
from hessdiag.shift.images import crop_and_rotate
from hessdiag.shift.inputs import digest, make_levels, per_example, rows
from hessdiag.shift.results import LEAST, Array, ShiftCurve, ShiftPoint, Slope
from hessdiag.shift.settings import SCALE, SHIFTS, STRENGTHS
from hessdiag.spectral.probes import stream

__all__ = [
    "CurveDifference",
    "ShiftCurve",
    "ShiftPoint",
    "Slope",
    "augmented",
    "by_distance",
    "compare",
    "covariate_shift",
    "other_source",
]

SHARE = 0.5  # of the shifts drawn must be usable: fewer would be a curve of other shifts than were asked for
MOST_BINS = 10
Measure = Literal["euclidean", "cosine"]


def covariate_shift(
    inputs: Any,
    scores: Any,
    *,
    reference: Any,
    shifts: int = SHIFTS,
    scale: float = SCALE,
    components: int | None = None,
    exclude: Sequence[int] = (),
    weighted: Weighted | None = None,
    least: float = LEAST,
    seed: int = 0,
    **options: Any,
) -> ShiftCurve:
    """Importance weighting: the score if the features' mean moved by δ, for many random δ (test T1).

    A test example weighs exp(δ·x − |δ|²/2), the ratio of the normal densities N(δ, I) and N(0, I) at its features
    x, standardized on the training inputs; δⱼ is normal with standard deviation ``scale``. The curve is the score
    against |δ|₁. Features count as independent normals, as in the paper; where they are correlated (pixels), take
    principal components, which are at least uncorrelated. A note says so if mean weights are far from 1.

    Cost: no model; shifts · examples numbers held, 4 · resamples times as many operations.

    Args:
        inputs: test examples, (n, ...), flattened.
        scores: of each, (n,).
        reference: training inputs, (m, ...), what the features are standardized on.
        shifts: how many δ are drawn.
        scale: standard deviation of each δⱼ, in standard deviations of the feature.
        components: shift this many leading principal components, whitened, instead of the features themselves.
        exclude: features that are not shifted (the paper leaves one out).
        weighted: the weights, where `Weighted.of` made them of these inputs before; all above then goes unread.
        least: effective examples a level needs, or it is left out.
        seed: names the streams of shifts and bootstrap.
        options: ``confidence``, ``resamples`` and ``notes`` of `curve`.

    Raises:
        UsageError: shapes that do not fit, numbers that are not finite.
        BudgetError: too few shifts or training inputs, or half of the shifts leave too few effective examples.
    """
    x, s = rows(inputs, "inputs"), per_example(scores, inputs)
    if weighted is None:
        drawn: dict[str, Any] = {"shifts": shifts, "scale": scale, "seed": seed}
        weighted = Weighted.of(x, rows(reference, "reference"), components=components, exclude=exclude, **drawn)
    made = weighted

    def nearer() -> str:
        fits = made.fitting(scale, least, SHARE)
        if len(x) < least:
            return ""
        return "fewer `components`, more features to `exclude`" if fits is None else f"`scale={fits:.2g}`"

    return curve(
        make_levels(weighted.shifts, weighted.weights, s[None], digest(inputs)),
        test="covariate shift",
        parameter="|δ|₁ in standard deviations of the training features",
        least=least,
        share=SHARE,
        seed=seed,
        notes=(*weighted.notes, *options.pop("notes", ())),
        nearer=nearer,
        **options,
    )


def augmented(
    inputs: Tensor,
    score: Callable[[Tensor], Any],
    *,
    strengths: Sequence[float] = STRENGTHS,
    augment: Callable[[Tensor, float, torch.Generator], Tensor] = crop_and_rotate,
    draws: int = 1,
    least: float = LEAST,
    seed: int = 0,
    **options: Any,
) -> ShiftCurve:
    """Augmented test sets: the score on the test examples distorted ever more strongly (test T2).

    Every strength distorts the same examples, and the same seed gives every checkpoint the same distortions, so
    that curves are pairs. Cost: strengths · draws forward passes of the test set.

    Args:
        inputs: test examples, (n, channels, height, width) for the default distortion.
        score: of a batch like ``inputs``, (n,): what `images.scorer` makes of a problem.
        strengths: levels. The paper's two sets are strengths 1 and 2 of the default distortion.
        augment: ``f(inputs, strength, generator)``, the distorted inputs.
        draws: distortions per example and level; an example's score is their mean.
        least: effective examples a level needs.
        seed: names the streams of distortions and bootstrap.
        options: ``confidence``, ``resamples`` and ``notes`` of `curve`.

    Raises:
        UsageError: scores that do not fit, fewer than two strengths.
        BudgetError: fewer than ``least`` examples.
    """
    levels = np.unique(np.asarray(strengths, float))
    if len(levels) < 2 or levels[0] < 0 or not np.isfinite(levels).all() or draws < 1:
        msg = f"strengths={tuple(strengths)}, draws={draws}: at least two different strengths from 0, and one draw"
        raise UsageError(msg)
    scores = np.empty((len(levels), len(inputs)))
    for row, strength in enumerate(levels):
        tries = []
        for draw in range(draws if strength else 1):
            # one stream per draw, not per strength: a stronger distortion is the same one taken further
            own = stream(seed, "shift", "augment", draw)
            moved = augment(inputs, float(strength), own) if strength else inputs
            tries.append(per_example(score(moved), inputs))
        scores[row] = np.mean(tries, axis=0)
    return curve(
        make_levels(levels, np.ones_like(scores), scores, digest(inputs)),
        test="augmented",
        parameter=f"strength of {getattr(augment, '__name__', 'augment')}",
        least=least,
        seed=seed,
        farther=f"`strengths` beyond {levels[-1]:g}",
        **options,
    )


def by_distance(
    inputs: Any,
    scores: Any,
    *,
    reference: Any,
    measure: Measure = "euclidean",
    bins: int | Sequence[float] | None = None,
    groups: Any = None,
    distance: Array | None = None,
    least: float = LEAST,
    seed: int = 0,
    **options: Any,
) -> ShiftCurve:
    """Binned test sets: the score of examples ever farther from their nearest reference example (test T5).

    The paper bins augmented images by closeness to the original test images, by Euclidean distance or largest
    cosine similarity; the reference may as well be the training set. Cost: no model; n · m · d operations.

    Args:
        inputs: test examples, (n, ...), flattened.
        scores: of each, (n,).
        reference: (m, ...), what distances are taken to.
        measure: "euclidean", or "cosine" (1 - similarity).
        bins: number of bins of equally many examples, or the bins' edges; by default as many as hold twice
            ``least`` examples, 3 to 10.
        groups: (n,) integers: examples derived from one original share one, and are resampled together.
        distance: (n,), where `nearest` found them before; reference and measure then go unread.
        least: examples a bin needs, or it is left out.
        seed: names the bootstrap's stream.
        options: ``confidence``, ``resamples`` and ``notes`` of `curve`.

    Raises:
        UsageError: shapes that do not fit, no such measure, or all examples are equally far.
        BudgetError: fewer than two bins have enough examples.
    """
    x, s = rows(inputs, "inputs"), per_example(scores, inputs)
    if distance is None:
        distance = nearest(x, rows(reference, "reference"), measure)
    if np.ptp(distance) == 0:
        msg = f"all {len(x)} examples are {distance[0]:.3g} from the reference: give another reference"
        raise UsageError(msg)
    number = int(np.clip(len(x) // (2 * least), 3, MOST_BINS)) if bins is None else bins
    edges = np.unique(np.quantile(distance, np.linspace(0, 1, number + 1)) if isinstance(number, int) else number)
    place = np.clip(np.searchsorted(edges, distance, side="right") - 1, 0, None)
    place[distance == edges[-1]] = len(edges) - 2
    inside = (distance >= edges[0]) & (distance <= edges[-1])
    filled = [b for b in range(len(edges) - 1) if (inside & (place == b)).any()]
    if not filled:
        msg = f"no example lies in the bins; distances are {distance.min():.3g} to {distance.max():.3g}"
        raise UsageError(msg)
    weights = np.array([inside & (place == b) for b in filled], float)
    return curve(
        make_levels(weights @ distance / weights.sum(1), weights, s[None], digest(inputs), groups),
        test="by distance",
        parameter=f"{measure} distance to the nearest reference example, mean of the bin",
        least=least,
        seed=seed,
        **options,
    )


def other_source(
    home: Any, other: Any, *, identity: str = "", least: float = LEAST, seed: int = 0, **options: Any
) -> ShiftCurve:
    """Another source's test set against one's own: the change of the score (tests T3, T4 and T6).

    Level 0 is home, level 1 the other source, so the slope is the change; both sets are resampled, each by itself.

    Args:
        home: scores of one's own test examples, (n,).
        other: scores of the other source's, (m,).
        identity: names the two sets, so that only checkpoints tested on the same ones are compared.
        least: examples each set needs.
        seed: names the bootstrap's stream.
        options: ``confidence``, ``resamples`` and ``notes`` of `curve`.

    Raises:
        UsageError: scores that are not one number per example.
        BudgetError: fewer than ``least`` examples in a set.
    """
    sets = [per_example(part, part) for part in (home, other)]
    where = np.repeat([0, 1], [len(part) for part in sets])
    weights = np.array([where == 0, where == 1], float)
    levels = make_levels(np.array([0.0, 1.0]), weights, np.concatenate(sets)[None], identity, strata=where)
    parameter = "0 for home, 1 for the other source"
    return curve(levels, test="other source", parameter=parameter, least=least, seed=seed, **options)
