"""How often `hessdiag check` is wrong: operating curves on networks whose sharpness is known in full.

A baseline is recorded as `hessdiag baseline update` does and goes through its text; a checkpoint is then measured,
compared and decided as `hessdiag check` does, second look included. A hundred baselines have seeds of their own,
and every check its own machine: batch size, threads, way of forming products, last bits of the weights.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import binomtest
from torch import nn

from benchmarks.gate_subjects import LEVELS, METRICS, SUBJECTS, GateSubject, Truths
from benchmarks.tables import Row
from benchmarks.timing import one_thread
from hessdiag.check.baseline_text import Baseline, parsed, text
from hessdiag.check.budgets import Budget, Limit, Scope
from hessdiag.check.gate import Gate, Plan
from hessdiag.check.subject import Recordings, Subject
from hessdiag.check.verdict import Verdict
from hessdiag.engine.products.methods import EXACT_METHODS
from hessdiag.errors import MeasurementError
from hessdiag.files import write_whole
from hessdiag.present import png

LIMIT = 0.10
RUNS = 500  # of the same checkpoint, per workload
BASELINES = 100  # of these with probes of their own; further runs meet the same baseline on another machine
SEEDS = 40  # per level that differs
NAIVE_PROBES, NAIVE_RUNS = 16, 2000
TRAIN = Scope("train")
LAST_BIT = 2.0**-23
THREADS = (0.9, 0.05, 0.05)  # shares of measurements on 1, 2 and 3: on so small a network more are slower
AUTO = 0.7  # share of runs with "auto"; the rest takes each exact way alike
OUTCOMES = (Verdict.PASS, Verdict.UNSURE, Verdict.FAIL)


@dataclass(frozen=True)
class Point:
    """What was decided of one metric at one true change.

    Attributes:
        workload: its name.
        metric: its name.
        rule: "hessdiag" or "naive".
        change: the true one, as a share.
        counts: of the outcomes.
    """

    workload: str
    metric: str
    rule: str
    change: float
    counts: Counter[str]

    @property
    def total(self) -> int:
        """Runs."""
        return sum(self.counts.values())

    def rate(self, outcome: str) -> tuple[float, float, float]:
        """Share of an outcome with its 95% Clopper-Pearson interval."""
        count = self.counts[outcome]
        ends = binomtest(count, self.total).proportion_ci()
        return count / self.total, float(ends.low), float(ends.high)


def run(
    data: str | None = None,  # noqa: ARG001
    quick: bool = False,
    names: Sequence[str] = (),
    runs: int | None = None,
    seeds: int | None = None,
    image: Path | None = None,
) -> list[Row]:
    """Rows of all workloads.

    Args:
        data: not needed.
        quick: two runs of one small network.
        names: of workloads; by default all.
        runs: of the same checkpoint; by default `RUNS`.
        seeds: per level that differs; by default `SEEDS`.
        image: where the picture goes; by default nowhere.
    """
    one_thread()
    rows: list[Row] = []
    points: list[Point] = []
    for name in names or (("mlp",) if quick else SUBJECTS):
        subject = SUBJECTS[name](quick)
        begun = time.process_time()
        for point in curve(subject, runs or (2 if quick else RUNS), seeds or (1 if quick else SEEDS), quick):
            spent = f"{time.process_time() - begun:.0f} CPU s"
            click.echo(
                f"{name} {point.metric} {point.change:+.4f} {point.rule} {dict(point.counts)}, {spent}", err=True
            )
            points.append(point)
            rows += rows_of(point, subject)
    if image is not None:
        write_whole(image, picture(points))
    return rows


def curve(subject: GateSubject, runs: int, seeds: int, quick: bool = False) -> Iterator[Point]:
    """The operating curve of a workload: the same checkpoint first, then those that are truly sharper."""
    placed = {metric: subject.sharper(metric, (0.15,) if quick else LEVELS[1:]) for metric in METRICS}
    drawn = min(runs, BASELINES)
    baselines = [baseline(subject, seed) for seed in range(drawn)]
    same = [
        check(subject, subject.trained, baselines[i % drawn], i % drawn, turn=1 + i // drawn) for i in range(runs)
    ]
    for metric in METRICS:
        yield Point(subject.name, metric, "hessdiag", 0.0, Counter(found[metric] for found in same))
    yield naive(subject, subject.known, 0.0, 100 if quick else NAIVE_RUNS)
    for metric in METRICS:
        for model, truth in placed[metric]:
            change = truth[metric] / subject.known[metric] - 1
            seen = [
                check(subject, model, baselines[s % drawn], s % drawn, (metric,), turn=1 + s // drawn)
                for s in range(seeds)
            ]
            yield Point(subject.name, metric, "hessdiag", change, Counter(found[metric] for found in seen))
            if metric == "trace":
                yield naive(subject, truth, change, 100 if quick else NAIVE_RUNS)


def plan_of(metrics: Sequence[str]) -> Plan:
    """The plan of a check with one relative limit on each metric, everything else at its default."""
    limits = (Limit(kind="max_increase", value=LIMIT, relative=True),)
    return Plan(budgets=tuple(Budget(key=m, metric=m, scope=TRAIN, limits=limits) for m in metrics))


def machine(subject: GateSubject, rng: np.random.Generator, seed: int) -> dict[str, Any]:
    """Options of a measurement that must not matter, and the number of threads set."""
    torch.set_num_threads(int(rng.choice((1, 2, 3), p=THREADS)))
    method = str(
        rng.choice(("auto", *EXACT_METHODS), p=(AUTO, *[(1 - AUTO) / len(EXACT_METHODS)] * len(EXACT_METHODS)))
    )
    return {"seed": seed, "batch_size": int(rng.choice(subject.sizes)), "method": method}


def baseline(subject: GateSubject, seed: int) -> Recordings:
    """What `hessdiag baseline update` records, as it is read back from its text."""
    plan = plan_of(METRICS)
    torch.set_num_threads(1)
    run = {"seed": seed, "batch_size": max(subject.sizes)}
    measured = Subject(subject.problem(subject.trained), run).entry(
        TRAIN, METRICS, probes=plan.max_probes, rtol=plan.rtol, confidence=plan.look_confidence
    )
    return Recordings(parsed(text(Baseline(entries={TRAIN.label: measured}))).entries, "no baseline")


def check(
    subject: GateSubject,
    model: nn.Module,
    base: Recordings,
    seed: int,
    metrics: Sequence[str] = METRICS,
    turn: int = 1,
) -> dict[str, str]:
    """The outcome of `hessdiag check` for every metric; on another machine, half the time with other last bits."""
    rng = np.random.default_rng([seed, turn])
    run = machine(subject, rng, seed)
    new = Subject(subject.problem(rounded(model, rng) if rng.random() < 0.5 else model), run)
    try:
        report = Gate(plan_of(metrics), base, new).run()
    except MeasurementError as error:
        return dict.fromkeys(metrics, f"error: {error}")
    return {row.metric: row.verdict.value for row in report.rows}


def rounded(model: nn.Module, rng: np.random.Generator) -> nn.Module:
    """The same weights, two thirds of them off by their last bit."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            signs = torch.from_numpy(rng.integers(-1, 2, size=parameter.shape).astype(np.float32))
            parameter.mul_(1 + LAST_BIT * signs)
    return model


def naive(subject: GateSubject, truth: Truths, change: float, runs: int) -> Point:
    """Fail if the mean of 16 plain Hutchinson probes, fresh on both sides, is more than the limit above."""
    rng = np.random.default_rng(0)

    def estimates(matrix: np.ndarray) -> np.ndarray:
        signs = rng.choice((-1.0, 1.0), size=(runs * NAIVE_PROBES, len(matrix)))
        return np.einsum("ij,ij->i", signs @ matrix, signs).reshape(runs, NAIVE_PROBES).mean(1)

    beyond = estimates(truth.hessian) > (1 + LIMIT) * estimates(subject.known.hessian)
    counts = Counter({Verdict.FAIL.value: int(beyond.sum()), Verdict.PASS.value: int((~beyond).sum())})
    return Point(subject.name, "trace", "naive", change, counts)


def rows_of(point: Point, subject: GateSubject) -> Iterator[Row]:
    """One row per outcome."""
    tool = "hessdiag" if point.rule == "hessdiag" else f"{NAIVE_PROBES} plain probes"
    which = "same checkpoint" if point.change == 0 else f"truly {100 * point.change:+.2f}%"
    for outcome in (*OUTCOMES, *(o for o in point.counts if o not in OUTCOMES)):
        if point.rule == "naive" and outcome == Verdict.UNSURE:
            continue
        rate, low, high = point.rate(outcome)
        note = f"{point.counts[outcome]} of {point.total} runs, [{low:.4f}, {high:.4f}]; {judged(point, outcome)}"
        quantity = f"{point.metric} ≤ +{100 * LIMIT:g}%, {which}: {outcome}"
        yield Row(subject.name, tool, quantity, rate, None, note + subject.about)


def judged(point: Point, outcome: str) -> str:
    """Whether an outcome is right; nothing is said of "cannot tell"."""
    if outcome == Verdict.UNSURE:
        return ""
    if outcome not in OUTCOMES:
        return "WRONG; "
    wrong = Verdict.FAIL if point.change <= LIMIT else Verdict.PASS
    if outcome != wrong:
        return "right; "
    return "WRONG; " if point.counts[outcome] else "never, as it must be; "


def picture(points: Sequence[Point]) -> bytes:
    """The operating curves: a panel per workload and metric, rates with 95% Clopper-Pearson intervals."""
    names = list(dict.fromkeys(point.workload for point in points))
    figure = Figure(figsize=(2 + 3.2 * len(names), 6), layout="constrained")
    grid = figure.subplots(len(METRICS), len(names), sharex=True, sharey=True, squeeze=False)
    for (row, metric), (column, name) in product(enumerate(METRICS), enumerate(names)):
        axes = grid[row, column]
        axes.axvline(100 * LIMIT, color="0.5", linewidth=1, linestyle=":")
        for rule, outcome, colour, marker in CURVES:
            chosen = sorted(
                (p for p in points if (p.workload, p.metric, p.rule) == (name, metric, rule)),
                key=lambda p: p.change,
            )
            if not chosen:
                continue
            rates = np.array([p.rate(outcome) for p in chosen]).T
            errors = np.abs(rates[1:] - rates[0])
            style = {"color": colour, "marker": marker, "markersize": 4, "capsize": 2, "linewidth": 1}
            label = outcome if rule == "hessdiag" else f"{NAIVE_PROBES} plain probes: {outcome}"
            axes.errorbar([100 * p.change for p in chosen], 100 * rates[0], 100 * errors, label=label, **style)
        axes.set_title(f"{name}: {metric}", fontsize=9)
    grid[0, 0].legend(fontsize=7)
    figure.supxlabel("true change since the baseline [%]; the limit is dotted", fontsize=9)
    figure.supylabel("share of runs [%]", fontsize=9)
    return png(figure, dpi=110)


CURVES = (
    ("hessdiag", "pass", "#009E73", "o"),
    ("hessdiag", "cannot tell", "#E69F00", "s"),
    ("hessdiag", "fail", "#D55E00", "^"),
    ("naive", "fail", "#999999", "x"),
)
