"""Zhang, Li and Ju: the measurements in the shape that claims and picture take them from, and the picture."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.papers.claims import falls_to
from benchmarks.papers.zhang2023_sensing import TOO_LARGE
from hessdiag.present.axes import COLOURS

PLATEAUS = {"gd": 1.8, "one-point": 2.5e-3, "nso": 6e-4}  # the authors' curves, read off a log axis
EARLY = "early stopping"
RIVALS = ("SGD", "weight decay", "SAM", "one-point")
SHOWN = dict(zip(("SGD", "NSO", "SAM", "one-point", "weight decay", EARLY), COLOURS, strict=False))
NAMES = {"gd": "gradient descent", "one-point": "one-point", "nso": "NSO"}


def variance_ratios(raw: pd.DataFrame) -> pd.DataFrame:
    """Measured variance over the law's, one row per (arm, seed, sigma) at sigmas that claims are made of."""
    part = raw[(raw.part == "variance") & (raw["at"] > 0)]
    wide = part.pivot_table(index=["arm", "seed", "at"], columns="measure", values="value").reset_index()
    for kind in ("loss", "gradient"):
        wide[f"{kind} ratio"] = wide[kind] / wide[f"{kind} law"]
        wide[f"{kind} of estimate"] = 4 * wide[kind] / wide["at"] ** 4
    return wide


def looks(raw: pd.DataFrame) -> pd.DataFrame:
    """One row per look at a run of the training study, a column per measure."""
    part = raw[raw.part == "training"]
    wide = part.pivot_table(index=["arm", "seed", "at"], columns="measure", values="value", sort=False)
    return wide.reset_index().sort_values(["arm", "seed", "at"], ignore_index=True)


def ends(raw: pd.DataFrame) -> pd.DataFrame:
    """The last look of every run, and SGD's look of least validation error as an arm of its own."""
    found = looks(raw)
    last = found.groupby(["arm", "seed"], sort=False).tail(1)
    sgd = found[found.arm == "SGD"]
    early = sgd.loc[sgd.groupby("seed")["validation error %"].idxmin()].assign(arm=EARLY)
    return pd.concat([last, early], ignore_index=True)


def at_level(raw: pd.DataFrame, level: float) -> pd.DataFrame:
    """Trace and λ_max of every run where its training loss first falls to a level, interpolated in logarithms."""
    rows = []
    for (arm, seed), run in looks(raw).groupby(["arm", "seed"], sort=False):
        if not run["train loss"].min() <= level < run["train loss"].iloc[0]:
            continue
        values = {column: falls_to(run, "train loss", level, column) for column in ("trace", "lambda_max")}
        rows.append({"arm": arm, "seed": seed, **values})
    return pd.DataFrame(rows, columns=["arm", "seed", "trace", "lambda_max"])


def picture(raw: pd.DataFrame, level: float) -> Figure:
    """Matrix sensing and variances above, fine-tuning below."""
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    axes = figure.subplots(2, 3)
    _draw_sensing(axes[0, 0], raw)
    wide = variance_ratios(raw)
    _draw_variance(axes[0, 1], wide, "loss", "estimate of tr H")
    _draw_variance(axes[0, 2], wide, "gradient", "estimate of its gradient")
    for ax, measure, title in zip(
        axes[1], ("trace", "lambda_max"), ("trace of the Hessian", "largest eigenvalue"), strict=False
    ):
        _draw_paths(ax, looks(raw), measure, title, level)
    _draw_errors(axes[1, 2], ends(raw))
    return figure


def _draw_sensing(ax: Axes, raw: pd.DataFrame) -> None:
    part = raw[(raw.part == "sensing") & (raw.measure == "validation")]
    for colour, (arm, level) in zip(COLOURS, PLATEAUS.items(), strict=False):
        logs = np.log(part[part.arm == arm].pivot_table(index="at", columns="seed", values="value"))
        mean, error = logs.mean(axis=1), logs.sem(axis=1)
        ax.plot(logs.index, np.exp(mean), color=colour, label=NAMES[arm])
        ax.fill_between(logs.index, np.exp(mean - 2 * error), np.exp(mean + 2 * error), color=colour, alpha=0.25)
        ax.axhline(level, color=colour, linestyle=":", linewidth=1)
    ax.set(
        yscale="log",
        xlabel="step",
        ylabel="relative validation error",
        title="Matrix sensing (dotted: the paper's)",
    )
    ax.legend(frameon=False)


def _draw_variance(ax: Axes, wide: pd.DataFrame, kind: str, title: str) -> None:
    for colour, (arm, part) in zip(COLOURS[1:], wide.groupby("arm"), strict=False):
        sigmas = part["at"]
        ax.plot(
            sigmas,
            part[f"{kind} of estimate"],
            "o",
            color=colour,
            markersize=4,
            alpha=0.6,
            label=f"{arm}, each seed",
        )
        law = (4 * part[f"{kind} law"] / sigmas**4).groupby(sigmas).mean()
        ax.plot(law.index, law, color=colour, linewidth=1, label="law, mean")
    ax.axvspan(TOO_LARGE * 1.4, float(wide["at"].max()) * 1.2, color="0.5", alpha=0.12, linewidth=0)
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="σ (grey: no claim)",
        ylabel="variance",
        title=f"Variance of the {title}",
    )
    ax.legend(frameon=False, fontsize=8)


def _draw_paths(ax: Axes, found: pd.DataFrame, measure: str, title: str, level: float) -> None:
    for arm, part in found.groupby("arm", sort=False):
        mean = np.exp(np.log(part[["train loss", measure]].clip(lower=1e-8)).groupby(part["at"]).mean())
        ax.plot(mean["train loss"], mean[measure], "o-", color=SHOWN[str(arm)], markersize=3, label=arm)
    ax.axvline(level, color="0.4", linestyle=":", linewidth=1)
    ax.invert_xaxis()
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="training loss (dotted: where they are compared)",
        title=f"Fine-tuning: {title}",
    )
    ax.legend(frameon=False, fontsize=8)


def _draw_errors(ax: Axes, runs: pd.DataFrame) -> None:
    arms = list(dict.fromkeys(runs["arm"]))
    for place, arm in enumerate(arms):
        values = runs.loc[runs.arm == arm, "test error %"]
        ax.errorbar(place, values.mean(), values.sem(), fmt="o", color=SHOWN[arm], capsize=3)
    ax.set_xticks(range(len(arms)), arms, rotation=35, ha="right")
    ax.set(title="Fine-tuning: test error (± standard error)", ylabel="%")
