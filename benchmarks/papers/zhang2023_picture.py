"""Zhang, Li and Ju: the measurements in the shape that claims and picture take them from, and the picture."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.papers.zhang2023_sensing import TOO_LARGE
from hessdiag.present.axes import COLOURS

PLATEAUS = {"gd": 1.8, "one-point": 2.5e-3, "nso": 6e-4}  # the authors' curves, read off a log axis
NAMES = {"gd": "gradient descent", "one-point": "one-point", "nso": "NSO"}


def variance_ratios(raw: pd.DataFrame) -> pd.DataFrame:
    """Measured variance over the law's, one row per (arm, seed, sigma) at sigmas that claims are made of."""
    part = raw[(raw.part == "variance") & (raw["at"] > 0)]
    wide = part.pivot_table(index=["arm", "seed", "at"], columns="measure", values="value").reset_index()
    for kind in ("loss", "gradient"):
        wide[f"{kind} ratio"] = wide[kind] / wide[f"{kind} law"]
        wide[f"{kind} of estimate"] = 4 * wide[kind] / wide["at"] ** 4
    return wide


def finals(raw: pd.DataFrame) -> pd.DataFrame:
    """One row per run of the training study, a column per measure."""
    part = raw[raw.part == "training"]
    return part.pivot_table(index=["arm", "seed"], columns="measure", values="value", sort=False)


def picture(raw: pd.DataFrame, chosen: dict[str, str]) -> Figure:
    figure = Figure(figsize=(13, 7.6), layout="constrained")
    axes = figure.subplots(2, 3)
    _draw_sensing(axes[0, 0], raw)
    wide = variance_ratios(raw)
    _draw_variance(axes[0, 1], wide, "loss", "estimate of tr H")
    _draw_variance(axes[0, 2], wide, "gradient", "estimate of its gradient")
    runs = finals(raw)
    titles = {"trace": "trace of the Hessian", "lambda_max": "largest eigenvalue", "test error %": "test error, %"}
    for ax, (measure, title) in zip(axes[1], titles.items(), strict=True):
        _draw_arms(ax, runs, measure, title, chosen)
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


def _draw_arms(ax: Axes, runs: pd.DataFrame, measure: str, title: str, chosen: dict[str, str]) -> None:
    arms = list(dict.fromkeys(runs.index.get_level_values("arm")))
    methods = {"SGD": COLOURS[0], "SAM": COLOURS[4], "NSO": COLOURS[2]}
    for column, face, shift, label in (
        (measure, None, -0.12, "end"),
        (f"{measure} at level", "white", 0.12, "equal loss"),
    ):
        for place, arm in enumerate(arms) if column in runs else ():
            values = runs.loc[arm, column].dropna()
            colour = methods[arm.split()[0]]
            if len(values):
                ax.errorbar(
                    place + shift,
                    values.mean(),
                    values.sem(),
                    fmt="o",
                    color=colour,
                    markerfacecolor=face or colour,
                    capsize=3,
                )
        ax.plot([], [], "o", color="0.3", markerfacecolor=face or "0.3", label=label)
    ax.set_xticks(
        range(len(arms)), [f"{arm} *" if arm in chosen.values() else arm for arm in arms], rotation=35, ha="right"
    )
    ax.set(title=f"{title} (mean ± standard error)", yscale="linear" if "error" in measure else "log")
    ax.legend(frameon=False, fontsize=8)
