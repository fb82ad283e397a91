"""Sandler, Klabjan, Luo, arXiv 2102.11210: regularizing the Hessian's spectral radius, and shifted test data."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from benchmarks.papers.claims import Claim, Outcome, interval, judge, mean_and_error
from benchmarks.papers.samples import drawn, mnist
from hessdiag.engine.products.curvature import Curvature
from hessdiag.problem import Problem
from hessdiag.regularizers import SpectralRadius
from hessdiag.samples import draw
from hessdiag.shift.experiments import augmented, covariate_shift, other_source
from hessdiag.shift.images import correct, scorer
from hessdiag.shift.results import ShiftCurve
from hessdiag.sources import datasets
from hessdiag.spectral import extremes

TITLE = "Spectral radius regularization (Sandler et al., arXiv 2102.11210)"
SIDE = 16  # pixels, as the paper's USPS; its MNIST test set was resized to that as well
MUS = (0.03, 0.1)  # rows of the paper's runs with K = 0
DECAYS = (1e-3, 1e-2, 1e-1)
PLAIN, DECAY, EARLY, EQUAL = "plain", "weight decay", "early stopping", "plain at equal loss"
RIVALS = (PLAIN, EARLY, DECAY)
SEVERAL, ORDER, COST = 3.0, 10.0, 0.02
"""rho falls 36.6 to 2.2 in the paper, 17-fold, for 1 to 2 points of accuracy: several-fold, an order, the cost."""


def arm_of(mu: float) -> str:
    """Its name in the tables."""
    return f"mu={mu:g}"


JUDGED, LARGEST = (arm_of(mu) for mu in MUS)


@dataclass(frozen=True)
class Setting:
    """Sizes of a run."""

    seeds: int
    train: int
    validation: int
    test: int
    epochs: int
    shifts: int
    rate: float = 3e-3
    batch: int = 100
    width: int = 32
    components: int = 54  # features of the paper's covariate shift test
    scale: float = 0.25  # of a shift of one of them: 0.05 as in the paper moves accuracy by 0.2 points
    resamples: int = 100


FULL = Setting(seeds=30, train=1000, validation=1000, test=10000, epochs=25, shifts=300)
QUICK = replace(FULL, seeds=2, train=100, validation=50, test=200, epochs=2, shifts=20, components=10)


@dataclass(frozen=True)
class Data:
    """Pictures (n, 1, 16, 16) normalised on the pool, and classes.

    Attributes:
        pool: every seed draws its own training and validation set from it.
        test: of all seeds.
        other: another source of the same digits.
    """

    pool: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    other: tuple[Tensor, Tensor] | None

    def drawn(self, seed: int, setting: Setting) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Training and validation set of a seed."""
        train, validation, _ = drawn(self.pool, seed, setting.train, setting.validation)
        return train, validation


def load(data: str | None, setting: Setting) -> Data:
    """MNIST, with the embedded digits as the other source; without ``data`` the digits alone."""
    small = [pictures(part) for part in datasets.digits()]
    if data is None:
        pool, test, other = small[0], small[1], None
    else:
        pool, test = map(pictures, mnist(data))
        other = (torch.cat([small[0][0], small[1][0]]), torch.cat([small[0][1], small[1][1]]))
    test = (test[0][: setting.test], test[1][: setting.test])
    mean, std = pool[0].mean(), pool[0].std()
    pool, test = ((pool[0] - mean) / std, pool[1]), ((test[0] - mean) / std, test[1])
    return Data(pool, test, None if other is None else ((other[0] - mean) / std, other[1]))


def pictures(images: datasets.Images) -> tuple[Tensor, Tensor]:
    """Grey levels 0 to 1 at 16 x 16, bilinear, and classes."""
    x = images.pixels.float() * images.scale
    return F.interpolate(x, (SIDE, SIDE), mode="bilinear", antialias=True), images.targets


def trained(
    train: tuple[Tensor, Tensor], seed: int, setting: Setting, *, mu: float = 0.0, decay: float = 0.0
) -> Iterator[nn.Module]:
    """An MLP with ReLU trained by Adam, after every epoch; equal seeds start alike and see the same batches."""
    torch.manual_seed(seed)
    w = setting.width
    layers = nn.Linear(SIDE**2, w), nn.ReLU(), nn.Linear(w, w), nn.ReLU(), nn.Linear(w, 10)
    model = nn.Sequential(nn.Flatten(), *layers)
    adam = torch.optim.AdamW(model.parameters(), setting.rate, weight_decay=decay)
    optimizer = SpectralRadius(adam, mu, 0.0, seed=seed, model=model, same_randomness=False)
    x, y = train
    order = torch.Generator().manual_seed(seed)
    for _ in range(setting.epochs):
        for chosen in torch.randperm(len(x), generator=order).split(setting.batch):  # type: ignore[no-untyped-call]
            inputs, targets = x[chosen], y[chosen]
            optimizer.step(lambda inputs=inputs, targets=targets: F.cross_entropy(model(inputs), targets))
        yield deepcopy(model).eval()


@torch.no_grad()
def scored(model: nn.Module, data: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Cross-entropy and accuracy."""
    out = model(data[0])
    return float(F.cross_entropy(out, data[1])), float((out.argmax(1) == data[1]).float().mean())


def arms(data: Data, seed: int, setting: Setting) -> Iterator[tuple[str, nn.Module]]:
    """Every arm of a seed at its end; plain training also where validation is best, and at the penalty's loss."""
    train, validation = data.drawn(seed, setting)
    plain = list(trained(train, seed, setting))
    yield PLAIN, plain[-1]
    yield EARLY, max(plain, key=lambda model: scored(model, validation)[1])
    decayed = [list(trained(train, seed, setting, decay=decay))[-1] for decay in DECAYS]
    yield DECAY, max(decayed, key=lambda model: scored(model, validation)[1])
    ends = {mu: list(trained(train, seed, setting, mu=mu))[-1] for mu in MUS}
    yield from ((arm_of(mu), model) for mu, model in ends.items())
    level = scored(ends[MUS[0]], train)[0]
    yield EQUAL, min(plain, key=lambda model: abs(scored(model, train)[0] - level))


def runs(data: Data, setting: Setting) -> Iterator[tuple[dict[str, object], dict[str, ShiftCurve]]]:
    """Per seed and arm: one row of figures, and the curves."""
    for seed in range(setting.seeds):
        train, _ = data.drawn(seed, setting)
        splits = {"train": TensorDataset(*train), "test": TensorDataset(*data.test)}
        if data.other is not None:
            splits["other"] = TensorDataset(*data.other)
        for arm, model in arms(data, seed, setting):
            yield measured(Problem(model, splits, criterion="cross_entropy"), train, arm, seed, setting)


def measured(
    problem: Problem, train: tuple[Tensor, Tensor], arm: str, seed: int, setting: Setting
) -> tuple[dict[str, object], dict[str, ShiftCurve]]:
    """Spectral radius on the whole training set, accuracies, and the curves of the shift tests."""
    everything = {
        name: draw(problem.data[name], split=name, samples=len(problem.data[name])) for name in problem.data
    }
    ends = extremes(Curvature(problem, everything["train"], method="double_backward"))
    found = [end.value for end in (ends.lambda_max, ends.lambda_min) if end is not None]
    right = {name: correct(problem, samples.batches) for name, samples in everything.items()}
    inputs, score = scorer(problem, everything["test"])
    curves = {
        "T1": covariate_shift(
            inputs,
            right["test"],
            reference=train[0],
            shifts=setting.shifts,
            components=setting.components,
            scale=setting.scale,
            resamples=setting.resamples,
        ),
        "T2": augmented(inputs, score, resamples=setting.resamples),
    }
    far = sorted(curves["T1"].points, key=lambda point: point.shift)[-len(curves["T1"].points) // 4 :]
    levels = {point.shift: point.score for point in curves["T2"].points}
    row: dict[str, object] = {
        "arm": arm,
        "seed": seed,
        "rho": max(map(abs, found)),
        "lambda_min": min(found),
        "train loss": scored(problem.model, train)[0],
        "train accuracy": right["train"].mean(),
        "test accuracy": right["test"].mean(),
        "T1 far": np.mean([point.score for point in far]),
        "T1 slope": slope_of(curves["T1"]),
        "T2 Aug1": levels[1.0],
        "T2 Aug2": levels[2.0],
    }
    if "other" in right:
        curves["T3"] = other_source(right["test"], right["other"], resamples=setting.resamples)
        row["T3 other"] = right["other"].mean()
    return row, curves


def slope_of(curve: ShiftCurve) -> float:
    """Least squares slope of the points; the curve's own is withheld where one test set cannot tell it."""
    shifts, scores = np.array([(point.shift, point.score) for point in curve.points]).T
    return float(np.polyfit(shifts, scores, 1)[0])


def judged(raw: pd.DataFrame) -> list[Claim]:
    """Verdicts over seeds, regularized against the other arms of the same seed."""
    wide = raw.pivot(index="seed", columns="arm")

    def gain(column: str, arm: str, rival: str) -> list[float]:
        return list((wide[column][arm] - wide[column][rival]).astype(float))

    def fall(arm: str, rival: str) -> list[float]:
        return list((wide["rho"][rival] / wide["rho"][arm]).astype(float))

    def losses(*names: str) -> str:
        return ", ".join(f"{name} {wide['train loss'][name].mean():.3g}" for name in names)

    found = [
        judge(f"rho falls several-fold ({JUDGED}), at the end of training", fall(JUDGED, PLAIN), above=SEVERAL),
        judge(f"by an order of magnitude (tables; {LARGEST})", fall(LARGEST, PLAIN), above=ORDER),
        judge("a larger mu gives a smaller rho", fall(LARGEST, JUDGED), above=1.0),
        judge(f"rho is smaller at equal training loss ({JUDGED})", fall(JUDGED, EQUAL), above=1.0),
    ]
    at = [losses(JUDGED, PLAIN), losses(LARGEST, PLAIN), losses(*(LARGEST, JUDGED)), losses(JUDGED, EQUAL)]
    found = [
        replace(claim, evidence=f"ratio of rho: {claim.evidence.removeprefix('mean ')}; training losses {loss}")
        for claim, loss in zip(found, at, strict=True)
    ]
    found += [
        judge(
            f"at a cost of at most 2 points unshifted ({arm})",
            gain("test accuracy", arm, PLAIN),
            above=-COST,
            what="accuracy gained",
        )
        for arm in (JUDGED, LARGEST)
    ]
    names = {"T1 far": "T1, large covariate shift", "T2 Aug1": "T2 Aug1", "T2 Aug2": "T2 Aug2", "T3 other": "T3"}
    for column, test in names.items():
        found += [
            judge(
                f"{test}: {JUDGED} is more accurate than {rival}",
                gain(column, JUDGED, rival),
                above=0.0,
                what="accuracy gained",
            )
            for rival in (RIVALS if column in raw else ())
        ]
    slopes = gain("T1 slope", JUDGED, PLAIN)
    return [*found, judge("T1: accuracy falls less per |δ|₁", slopes, above=0.0, what="slope gained")]


def figure(raw: pd.DataFrame, curves: dict[tuple[str, int], dict[str, ShiftCurve]]) -> Figure:
    """Radius, its price, and both kinds of shift."""
    drawn = Figure(figsize=(11, 8), layout="constrained")
    panels = drawn.subplots(2, 2)
    seeds = sorted(raw["seed"].unique())
    for place, (arm, part) in enumerate(raw.groupby("arm", sort=False)):
        colour = f"C{place}"
        panels[0, 0].plot(np.full(len(part), place), part["rho"], "o", color=colour, alpha=0.6)
        panels[0, 1].plot(part["rho"], 100 * part["test accuracy"], "o", color=colour, label=arm)
        of = [curves[arm, seed] for seed in seeds]
        by_shift = [{point.shift: point.score for point in each["T1"].points} for each in of]
        shifts = np.array(sorted(set.intersection(*map(set, by_shift))))  # where every seed has examples enough
        one = np.array([[scores[shift] for shift in shifts] for scores in by_shift])
        base = raw[raw["arm"] == arm].set_index("seed").loc[seeds, "test accuracy"].to_numpy(float)
        order = np.array_split(np.argsort(shifts), min(10, len(shifts) // 2))
        lost = np.array([(one[:, bin].mean(1) - base) for bin in order]) * 100
        middle = np.array([shifts[bin].mean() for bin in order]) + (place - 2) * 0.004 * np.ptp(shifts)
        panels[1, 0].errorbar(middle, lost.mean(1), errors(lost), fmt="o-", ms=4, color=colour, label=arm)
        two = np.array([[point.score for point in each["T2"].points] for each in of]).T * 100
        strength = np.array([point.shift for point in of[0]["T2"].points])
        panels[1, 1].errorbar(strength, two.mean(1), errors(two), fmt="o-", ms=4, color=colour, label=arm)
    panels[0, 0].set(yscale="log", ylabel="spectral radius of the training loss", title="Radius, one dot per seed")
    names = list(raw["arm"].unique())
    panels[0, 0].set_xticks(range(len(names)), names, rotation=20, ha="right")
    panels[0, 1].set(xscale="log", xlabel="spectral radius", ylabel="test accuracy (%)", title="What it costs")
    panels[1, 0].axhline(0, color="0.6", lw=0.8)
    panels[1, 0].set(
        xlabel="|δ|₁",
        ylabel="accuracy − own at zero shift (points)",
        title="T1: covariate shift by importance weights",
    )
    panels[1, 1].set(
        xlabel="strength (1 = Aug1, 2 = Aug2)", ylabel="accuracy (%)", title="T2: rotated and moved test pictures"
    )
    for axis in (panels[0, 0].yaxis, panels[0, 1].xaxis):
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("{x:g}")
    for panel in (panels[0, 1], panels[1, 0], panels[1, 1]):
        panel.legend(frameon=False)
    return drawn


def errors(values: np.ndarray) -> np.ndarray:
    """Standard error over seeds, the last axis."""
    spread: np.ndarray = values.std(1, ddof=1) / np.sqrt(values.shape[1])
    return spread


def run(data: str | None, quick: bool) -> Outcome:
    """Train every arm with every seed, measure, shift, judge."""
    setting = QUICK if quick else FULL
    torch.set_num_threads(1)
    loaded = load(None if quick else data, setting)
    return outcome(loaded, list(runs(loaded, setting)), setting)


def outcome(
    loaded: Data, found: list[tuple[dict[str, object], dict[str, ShiftCurve]]], setting: Setting
) -> Outcome:
    """The page of these runs."""
    raw = pd.DataFrame([row for row, _ in found])
    curves = {(str(row["arm"]), int(str(row["seed"]))): each for row, each in found}
    where = "MNIST" if loaded.other is not None else "the embedded digits"
    text = (
        f"{setting.train} training pictures (each seed its own) and {len(loaded.test[0])} test pictures of "
        f"{where} at 16 x 16, MLP 256-"
        f"{setting.width}-{setting.width}-10 with ReLU on logits, Adam {setting.rate:g}, batches of "
        f"{setting.batch}, {setting.epochs} epochs, {setting.seeds} seeds. The paper trains an MLP on 372,000 "
        "forest cover types and a CNN on 6,200 USPS digits for 100 epochs (Adam 0.001, batches of 128), feeds "
        "softmax outputs into the cross-entropy (a second softmax) and has one seed; its rho is a mean over "
        "batches, here it is that of the whole training set. T1 shifts "
        f"{setting.components} principal components by {setting.scale:g} N(0, 1) each; the paper 53 "
        "standardized features by 0.05, which moves accuracy by 0.2 points here. Weight decay (AdamW) and early "
        f"stopping are chosen by {setting.validation} validation pictures of the seed."
    )
    others = [c for c in raw.columns if c not in ("arm", "seed", "lambda_min", "T1 slope")]
    slopes = pd.DataFrame(
        [(arm, *interval(list(part["T1 slope"]))) for arm, part in raw.groupby("arm", sort=False)],
        columns=["arm", "slope of accuracy per unit of shift", "lo", "hi"],
    )
    return Outcome(
        title=TITLE,
        setting=text,
        claims=judged(raw),
        tables={
            "Mean ± standard error over seeds": mean_and_error(raw, ["arm"], others),
            "T1: regression lines, t intervals over seeds": slopes,
        },
        raw=raw,
        figure=figure(raw, curves),
        remarks=remarks(curves, setting),
    )


def remarks(curves: dict[tuple[str, int], dict[str, ShiftCurve]], setting: Setting) -> list[str]:
    """What the curves say of themselves, for the first seed."""
    first = curves["plain", 0]["T1"]
    least = min(point.effective for point in first.points)
    return [
        f"T1: {len(first.points)} of {setting.shifts} shifts used, at least {least:.0f} effective test examples; "
        + "; ".join(first.notes),
        f"{JUDGED} was the arm to judge in a first study with 5 seeds on one training set, which left most claims "
        "open; the scale of T1, weight decay and early stopping, and the sets of each seed came after it.",
        "A penalty's step costs 13 gradients, a plain one 1: arms are compared at equal steps. Early stopping and "
        "weight decay are what an equal gain costs otherwise.",
        "Intervals of the claims are over seeds, each with its own training set.",
        "T3's other source are the embedded digits, which fill their frame where MNIST leaves a margin.",
    ]
