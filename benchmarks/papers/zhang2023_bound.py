"""Zhang, Li and Ju: the PAC-Bayes bound of NSO on the fine-tuning runs, beside the gap that was measured."""

from __future__ import annotations

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import replace

import pandas as pd
from scipy.stats import kendalltau
from torch import nn

from benchmarks.papers.claims import interval, mean_and_error
from benchmarks.papers.samples import Split as Pair
from benchmarks.papers.zhang2023_picture import EARLY
from benchmarks.papers.zhang2023_sensing import Row
from benchmarks.papers.zhang2023_training import Digits, Recipe, Training, beginning, finetuned, pretrained, scores
from hessdiag.engine.products.curvature import Curvature
from hessdiag.gap.checkpoint import Checkpoint
from hessdiag.gap.measures.noise_bound import bound_terms, largest, nso_bound
from hessdiag.problem import Problem
from hessdiag.samples import draw

BATCH = 1000
BOUNDED = "bound - train loss"
TITLE = "Fine-tuning: NSO's bound beside the measured gap of the cross-entropy"
MAXIMA = {"": "training", " of all": "training and test"}
"""Which pictures C and alpha are maxima of: those trained on, as `nso_bound` has it, or those tested on too."""


def bounds(sizes: Training, data: str | None, recipes: Iterable[Recipe]) -> list[Row]:
    """Bound and gap at the end of every judged run, and at SGD's look of least validation error.

    The runs are trained again, without their curvature on the way: they are those of the study to the last bit,
    which "train loss" and "test error %" show.
    """
    digits = Digits(sizes, data)
    start = pretrained(sizes, digits)
    rows: list[Row] = []
    for recipe in recipes:
        for seed in range(sizes.seeds):
            networks: list[nn.Module] = []

            def keep(model: nn.Module, _: Pair, kept: list[nn.Module] = networks) -> dict[str, float]:
                kept.append(deepcopy(model))
                return {}

            looks = sizes.looks if recipe.method == "SGD" else 1
            run = list(finetuned(sizes, digits, start, recipe, seed, looks=looks, measure=keep))
            found = list(zip(run, networks, strict=True))
            ends = {recipe.method: found[-1]}
            if recipe.method == "SGD":
                ends[EARLY] = min(found, key=lambda each: each[0]["validation error %"])
            for arm, (look, model) in ends.items():
                values = look | {"test loss": scores(model, digits.test)[0]}
                values |= bound(model, beginning(start, seed), digits.training(seed), digits.test)
                at = values.pop("gradients")
                rows += [("bound", seed, arm, at, name, value) for name, value in values.items()]
    return rows


def bound(model: nn.Module, before: nn.Module, train: Pair, test: Pair) -> dict[str, float]:
    """``hessdiag.gap``'s `nso_bound` on the whole training set, and once more with the maxima of the test set."""
    points = {name: checkpoint(model, before, pair) for name, pair in (("train", train), ("test", test))}
    reading, seen = nso_bound(points["train"]), {name: largest(point) for name, point in points.items()}
    all_ = replace(
        seen["train"],
        loss=max(each.loss for each in seen.values()),
        trace=max(each.trace for each in seen.values()),
    )
    terms = bound_terms(points["train"].loss, all_)
    whole = sum(terms[name] for name in ("loss_term", "trace_term", "confidence_term"))
    return {
        "r": reading.more["r"],
        "C": reading.more["C"],
        "alpha": reading.more["alpha"],
        "bound": reading.value,
        "C of all": all_.loss,
        "alpha of all": all_.trace,
        "bound of all": whole,
    }


def checkpoint(model: nn.Module, before: nn.Module, pair: Pair) -> Checkpoint:
    """The network on these pictures, all of them."""
    problem = Problem(model, {"train": pair}, criterion="cross_entropy")
    samples = draw(problem.data["train"], split="train", samples=len(pair[0]), batch_size=BATCH)
    return Checkpoint(problem, samples, Curvature(problem, samples), start=dict(before.named_parameters()))


def bounded(raw: pd.DataFrame) -> pd.DataFrame:
    """One row per arm, seed and kind of maxima: the measured gap of the cross-entropy beside the bounded one."""
    part = raw[raw.part == "bound"]
    wide = part.pivot_table(index=["arm", "seed"], columns="measure", values="value", sort=False).reset_index()
    found = []
    for which, pictures in MAXIMA.items():
        one = wide[["arm", "seed"]].assign(maxima=pictures, gap=wide["test loss"] - wide["train loss"])
        one[BOUNDED] = wide[f"bound{which}"] - wide["train loss"]
        found.append(one)
    rows = pd.concat(found, ignore_index=True)
    return rows.assign(ratio=rows[BOUNDED] / rows["gap"], above=rows[BOUNDED] >= rows["gap"])


def table(raw: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, and in how many runs the bound is not below the gap."""
    rows = bounded(raw)
    by = ["maxima", "arm"]
    shown = mean_and_error(rows, by, ["gap", BOUNDED, "ratio"]).drop(columns="seeds")
    counts = rows.groupby(by, sort=False)["above"].agg(["sum", "size"])
    shown["bound >= gap"] = [f"{above} of {runs}" for above, runs in counts.itertuples(index=False)]
    return shown.rename(columns={"maxima": "C, alpha of"})


def remark(raw: pd.DataFrame) -> str:
    """What the table says, and what it does not."""
    told = []
    for pictures, rows in bounded(raw).groupby("maxima", sort=False):
        ranks = [float(kendalltau(run[BOUNDED], run["gap"]).statistic) for _, run in rows.groupby("seed")]
        tau, low, high = interval(ranks)
        told.append(
            f"with C and α of the {pictures} pictures it is not below the gap in {int(rows['above'].sum())} of "
            f"{len(rows)} runs (Kendall's tau of both over the {rows['arm'].nunique()} arms of a seed {tau:.2g} "
            f"[{low:.2g}, {high:.2g}] over {len(ranks)} seeds)"
        )
    ends = raw[raw.part == "bound"].pivot_table(index="arm", columns="measure", values="value")
    widest, best = (ends["test loss"] - ends["train loss"]).idxmax(), ends["test error %"].idxmin()
    return (
        "NSO's bound is `nso_bound` of `hessdiag gap` (ε = 0.1, δ = 0.05, constant 1 as in the paper; r from the "
        "weights before fine-tuning, new head included), at the ends of the runs, at unequal training losses. "
        f"It comes out so: {'; '.join(told)}. Neither is a certificate: the theorem wants both maxima over "
        "all data and all weights within reach, and cross-entropy has no largest value. A network that has "
        "learned its training pictures has a tiny C there, which says little of other pictures. "
        f"The mean gap of the cross-entropy is largest for {widest}, the mean test error smallest for {best}."
    )
