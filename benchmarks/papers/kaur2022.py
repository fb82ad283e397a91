"""Kaur, Cohen, Lipton, arXiv 2206.10654: five ways to a smaller lambda_max, and which of them generalize."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from benchmarks.papers import kaur2022_findings as findings
from benchmarks.papers.claims import Claim, Outcome, mean_and_error
from benchmarks.papers.kaur2022_measuring import Row, measured
from benchmarks.papers.kaur2022_picture import picture
from benchmarks.papers.kaur2022_training import SIDE, Cell, Run, Split, digits, mnist, network, trained
from hessdiag.criteria import target_of
from hessdiag.problem import Problem

TITLE = "The maximum Hessian eigenvalue and generalization (Kaur, Cohen and Lipton, arXiv 2206.10654)"
FACTORS = ["batch", "lr", "rho", "dropout", "norm"]
ZOO = {25: (0.1, 0.25, 0.6), 100: (0.1, 0.25, 0.6), 1000: (0.1, 0.25, 0.6)}  # rates by batch size
ZOO_SEEDS = range(3)


@dataclass(frozen=True)
class Setting:
    """Sizes of a run."""

    seeds: Mapping[str, int]
    widths: Mapping[str, int]
    train: int = 1000  # the size of the paper's own smaller data sets
    epochs: int = 400
    level: float = 0.99  # the paper's: accuracy on the training set, in eval mode
    points: int = 8  # between iterates, as in the paper
    rtol: float = 0.02  # of lambda_max's certificate; seeds differ by several times as much


FULL = Setting(seeds={"digits": 30, "MNIST": 20}, widths={"digits": 64, "MNIST": 256})
QUICK = replace(FULL, seeds={"digits": 2}, widths={"digits": 8}, train=50, epochs=6, level=0.2, points=2, rtol=0.9)


def run(data: str | None, quick: bool) -> Outcome:
    """Train and measure every cell with every seed: on the digits, and with a data folder on MNIST as well."""
    torch.set_num_threads(1)
    setting = QUICK if quick else FULL
    sources = {"digits": digits(setting.train)}
    if data is not None and not quick:
        sources["MNIST"] = mnist(data, setting.train)
    rows: list[Row] = []
    for name, pictures in sources.items():
        for each in _trained(
            findings.cells(), range(setting.seeds[name]), pictures.training, setting.widths[name], setting
        ):
            train, test = pictures.split(each.seed)
            rows.append({"data": name, **measured(each, train, test, setting.points, setting.rtol)})
    return outcome(pd.DataFrame(rows), setting)


def _trained(
    cells: list[Cell], seeds: range, train: Callable[[int], Split], width: int, setting: Setting
) -> Iterator[Run]:
    return trained(cells, seeds, train, width=width, epochs=setting.epochs, level=setting.level)


def outcome(raw: pd.DataFrame, setting: Setting) -> Outcome:
    """The page of these runs."""
    raw = raw.sort_values(["data", *FACTORS, "seed"], ascending=[False] + [True] * 6, ignore_index=True)
    names, claims = list(raw["data"].unique()), judged(raw)
    columns = ["epochs", "train accuracy", "test accuracy", "lambda_max", "at the iterate", "of 2/lr"]
    there = raw[raw["reached"].astype(bool)]
    cells = {
        f"Every cell on {name}: mean ± standard error": mean_and_error(part, FACTORS, columns)
        for name, part in there.groupby("data", sort=False)
    }
    return Outcome(
        title=TITLE,
        setting=_setting(setting, names),
        claims=claims,
        tables={"Verdict per finding": findings.summary(claims, names)} | cells,
        raw=raw,
        figure=picture(raw),
        remarks=_remarks(raw),
    )


def judged(raw: pd.DataFrame) -> list[Claim]:
    """The verdicts of these runs."""
    return [claim for name, part in raw.groupby("data", sort=False) for claim in findings.claims(part, str(name))]


def _setting(setting: Setting, names: list[str]) -> str:
    tests = {"digits": f"{1797 - setting.train:,} other digits", "MNIST": "10,000 of MNIST"}
    known = {"digits": "the embedded digits", "MNIST": "MNIST"}
    sources = " and of ".join(known[name] for name in names)
    nets = "; ".join(
        f"MLP 64-{setting.widths[name]}-{setting.widths[name]}-10 and {setting.seeds[name]} seeds on {name}"
        for name in names
    )
    return (
        f"{setting.train:,} training pictures at {SIDE} x {SIDE} pixels of {sources}, tested on "
        f"{' and on '.join(tests[name] for name in names)}, drawn anew for every seed; {nets}, with ReLU, "
        "plain SGD at a constant rate, every run stopped at the first epoch with "
        f"{100 * setting.level:g}% training accuracy in eval mode. The paper trains VGG11 on CIFAR-10 and "
        "Fashion-MNIST and an MLP 784-256-256-10, also on 1,000 examples each, to the same level. λ_max is that "
        "of the cross-entropy on the whole training set, so that 2/lr is the edge of stability at batch "
        f"{setting.train:,}; in eval mode for dropout; with BatchNorm in train mode, normalized in batches of the "
        f"size trained with, and at full batch the largest of {setting.points} points between the iterate and one "
        "step further, as the paper does. λ_max is compared at equal training accuracy, not at equal loss. Equal "
        "seeds share training set, weights and batches, so arms are compared in pairs. "
        f"Accuracy counts as unchanged within {100 * findings.MARGIN:g} points."
    )


def _remarks(raw: pd.DataFrame) -> list[str]:
    there = raw["reached"].astype(bool)
    missed = raw[~there].groupby(["data", "batch", "lr"], sort=False).size()
    told = ", ".join(
        f"{count} at batch {batch}, lr {lr:g} on {name}" for (name, batch, lr), count in missed.items()
    )
    plain = raw[(raw["batch"] == findings.LARGE) & there & ~raw["norm"].astype(bool) & (raw["rho"] == 0)]
    full = "; ".join(
        f"{name}, lr {lr:g}: {part['lambda_max'].mean():.3g}, the edge {2 / lr:.3g}"
        for (name, lr), part in plain.groupby(["data", "lr"], sort=False)
    )
    return [
        f"{int((~there).sum())} of {len(raw)} runs diverged or missed the level{': ' * bool(told)}{told}. They "
        "are in no figure, nor is their partner in a pair: what is said of these cells is said of the runs that "
        "got there.",
        f"λ_max at full batch beside the edge of stability 2/lr: {full}. A rate whose edge lies below what the "
        "smallest rate ends at has crossed the edge on the way: there F1 is to be seen (Cohen et al. 2021).",
        "The cells of F2 (20 to 80), F4 (dropout 0.8) and F3's difference of gains were set after a first study "
        "with 6 seeds on one split, which left all five findings open; its batch of 120 diverged or lay at the "
        "edge. Margins and thresholds are those of that study.",
        "Intervals are over seeds, each with its own training set (and on the digits its own test set), so that "
        "they are about these data, not one split. No correction for the number of claims.",
    ]


def problem(width: int = 64) -> Problem:
    """The digits split of this study, for ``hessdiag gap benchmarks/papers/kaur2022.py:problem``."""
    train, test = digits(FULL.train).split(0)
    splits = {"train": train, "test": test}
    return Problem(network(width), splits, criterion="cross_entropy", metric=_right)


def _right(outputs: Tensor, batch: object) -> Tensor:
    return (outputs.argmax(-1) == target_of(batch)).float().mean()


def save_zoo(folder: Path) -> list[Path]:
    """Train learning rate x batch size x seed on the digits and write what reached the level, a file each.

    A file holds ``state_dict``, ``lr``, ``batch_size`` and ``seed``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    one = digits(FULL.train).training(0)  # the split of `problem`
    cells = [Cell(batch, rate) for batch, rates in ZOO.items() for rate in rates]
    files = []
    for each in _trained(cells, ZOO_SEEDS, lambda _: one, FULL.widths["digits"], FULL):
        if not each.reached:
            continue
        facts = asdict(each.cell)
        file = folder / f"b{facts['batch']}-lr{facts['lr']:g}-s{each.seed}.pt"
        scalars = {"lr": facts["lr"], "batch_size": facts["batch"], "seed": each.seed}
        torch.save({"state_dict": each.model.state_dict(), **scalars}, file)
        files.append(file)
    return sorted(files)
