"""The picture of kaur2022: a column per finding; sharpness, and below it accuracy, on each data set."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.papers.kaur2022_findings import DROPOUTS, PLAIN, RATES, RHOS, SCALED, SMALL, of
from benchmarks.papers.kaur2022_training import Cell
from hessdiag.present.axes import COLOURS

Curve = dict[float, Cell]
TITLES = (
    "F1: learning rate",
    "F2: batch and rate together",
    "F3: SAM",
    f"F4: dropout (batch {SMALL})",
    "F5: BatchNorm",
)
LABELS = ("learning rate", "batch size = rate / 0.015", "rho", "dropout", "batch size")
LOGARITHMIC = (True, True, False, False, True)


def picture(raw: pd.DataFrame) -> Figure:
    """Means over seeds with standard errors."""
    names = list(raw["data"].unique())
    figure = Figure(figsize=(17, 5.6 * len(names)), layout="constrained")
    axes = figure.subplots(2 * len(names), len(TITLES), squeeze=False)
    for place, name in enumerate(names):
        part = raw[raw["data"] == name]
        for column, curves in enumerate(_curves()):
            above, below = axes[2 * place][column], axes[2 * place + 1][column]
            _draw(above, part, curves, "lambda_max", 1.0)
            _draw(below, part, curves, "test accuracy", 100.0)
            above.set_title(TITLES[column] if place == 0 else "")
            below.set_xlabel(LABELS[column])
            for ax in (above, below):
                _scale(ax, column, curves)
            if column == 0:
                _edge(above)
            if len(part[part["reached"].astype(bool)]):
                above.set_yscale("log")
            above.yaxis.set_major_formatter("{x:g}")
            above.yaxis.set_minor_formatter("{x:g}")
            above.tick_params(axis="y", which="both", labelsize=8)
            if len(curves) > 1:
                above.legend(frameon=False, fontsize=8)
        axes[2 * place][0].set_ylabel(f"{name}\nλ_max")
        axes[2 * place + 1][0].set_ylabel(f"{name}\ntest accuracy, %")
        for row in axes[2 * place : 2 * place + 2]:
            _same_limits(list(row))
    return figure


def _curves() -> list[dict[str, Curve]]:
    rates = {f"batch {batch}": {lr: Cell(batch, lr) for lr in several} for batch, several in RATES.items()}
    scaled = {"": {float(cell.batch): cell for cell in SCALED}}
    sam = {
        f"batch {b}, lr {cell.lr:g}": {rho: replace(cell, rho=rho) for rho in RHOS} for b, cell in PLAIN.items()
    }
    dropout = {"": {p: replace(PLAIN[SMALL], dropout=p) for p in DROPOUTS}}
    norm = {
        name: {float(b): replace(cell, norm=on) for b, cell in PLAIN.items()}
        for name, on in (("without", False), ("with, between iterates", True))
    }
    return [rates, scaled, sam, dropout, norm]


def _draw(ax: Axes, raw: pd.DataFrame, curves: dict[str, Curve], column: str, factor: float) -> None:
    for colour, (name, curve) in zip(COLOURS, curves.items(), strict=False):
        found = {x: of(raw, cell)[column].astype(float) * factor for x, cell in curve.items()}
        shown = {x: values for x, values in found.items() if len(values)}
        means = [values.mean() for values in shown.values()]
        errors = [values.sem() if len(values) > 1 else 0.0 for values in shown.values()]
        ax.errorbar(list(shown), means, errors, fmt="o-", ms=4, capsize=2, color=colour, label=name)


def _scale(ax: Axes, column: int, curves: dict[str, Curve]) -> None:
    places = sorted({x for curve in curves.values() for x in curve})
    if LOGARITHMIC[column]:
        ax.set_xscale("log")
    ax.set_xticks(places, [f"{x:g}" for x in places])
    ax.set_xticks([], minor=True)


def _edge(ax: Axes) -> None:
    low, high = ax.get_ylim()
    rates = np.geomspace(min(RATES[1000]) / 2, max(RATES[1000]) * 1.1, 50)
    ax.plot(rates, 2 / rates, "--", color="0.5", lw=1, label="2/lr, full batch")
    ax.set_ylim(low, high)


def _same_limits(row: list[Axes]) -> None:
    limits = np.array([ax.get_ylim() for ax in row])
    for ax in row:
        ax.set_ylim(limits[:, 0].min(), limits[:, 1].max())
