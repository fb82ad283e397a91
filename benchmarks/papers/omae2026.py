"""Omae et al., arXiv 2604.10202 and 2606.28662: a three-layer network's Wolkowicz-Styan bound, and its descent."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

from benchmarks.papers.claims import (
    UNSURE,
    Claim,
    Outcome,
    falls_to,
    interval,
    judge,
    mean_and_error,
    would_decide,
)
from hessdiag.analysis import hessian
from hessdiag.problem import Problem
from hessdiag.regularizers import HSR, SAM
from hessdiag.sources.datasets import Images, digits
from hessdiag.spectral import wolkowicz_styan

TITLE = (
    "The bound of a three-layer network, and training that lowers it (Omae et al., arXiv 2604.10202, 2606.28662)"
)
COMPARABLE = 1.25  # "comparable to SAM": no sharper than it by more than a quarter
COLOURS = {"GD": "#555555", "SAM": "#0072b2", "HSR penalty": "#d55e00", "HSR direction": "#009e73"}
QUANTITIES = ("lambda_max", "lambda_min", "ws_upper", "ws_lower")


@dataclass(frozen=True)
class Setting:
    """Sizes, and the strengths that are tuned between.

    Attributes:
        seeds: judged, each with its own data and start.
        tuning: seeds that strengths are chosen with, after ``tuned`` steps; none of them is judged.
        checkpoints: looked at, evenly in the logarithm of the step.
    """

    seeds: int
    tuning: int
    train: int
    validation: int
    units: int
    rate: float
    tuned: int
    steps: int
    checkpoints: int
    rho: tuple[float, ...]
    mu: dict[str, tuple[float, ...]]


FULL = Setting(
    seeds=20,
    tuning=4,
    train=100,
    validation=400,
    units=10,
    rate=0.5,
    tuned=300,
    steps=2000,
    checkpoints=16,
    rho=(0.05, 0.1, 0.2, 0.5, 1.0),
    mu={"penalty": (0.001, 0.003, 0.01, 0.03, 0.1), "direction": (0.001, 0.003, 0.01, 0.03, 0.1)},
)
QUICK = replace(
    FULL,
    seeds=2,
    tuning=1,
    train=30,
    units=4,
    tuned=5,
    steps=10,
    checkpoints=3,
    rho=(0.05,),
    mu=dict.fromkeys(FULL.mu, (0.01,)),
)
SOURCES = ("digits", "moons", "normals")


@dataclass(frozen=True)
class Split:
    """The digits of one seed: to train, to tune and to test on, pixels in [0, 1] as rows of 64."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Run:
    """A trained network at its checkpoints."""

    source: str
    arm: str
    strength: float
    seed: int
    states: dict[int, dict[str, Tensor]]
    validation: float


def split(setting: Setting, source: str, seed: int) -> Split:
    """Other examples for each seed."""
    rng = torch.Generator().manual_seed(seed)
    if source == "digits":
        first, second = (rows(part) for part in digits())
        order = torch.randperm(len(first[1]), generator=rng)
        taken, left = order[: setting.train], order[setting.train : setting.train + setting.validation]
        return Split((first[0][taken], first[1][taken]), (first[0][left], first[1][left]), second)
    draw = moons if source == "moons" else normals
    return Split(draw(setting.train, rng), draw(setting.validation, rng), draw(2000, rng))


def rows(images: Images) -> tuple[Tensor, Tensor]:
    """Pictures as rows, float64."""
    return images.pixels.double().flatten(1) * images.scale, images.targets


def moons(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two half circles that reach into each other, with noise: classes that no network separates."""
    y = torch.arange(count) % 2
    angle = torch.rand(count, generator=rng, dtype=torch.float64) * torch.pi
    x = torch.stack([angle.cos() + y, angle.sin() * (1 - 2 * y) + 0.5 * y], 1)
    return x + 0.3 * torch.randn(count, 2, generator=rng, dtype=torch.float64), y


def normals(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Three normal classes in eight dimensions, at the corners of a triangle, that overlap."""
    y = torch.arange(count) % 3
    x = torch.randn(count, 8, generator=rng, dtype=torch.float64)
    x[torch.arange(count), y] += 2.0
    return x, y


def network(setting: Setting, data: Split, seed: int) -> nn.Sequential:
    """One tanh layer, with biases, by torch's own initialisation."""
    torch.manual_seed(seed)
    inputs, classes = data.train[0].shape[1], int(data.test[1].max()) + 1
    return nn.Sequential(nn.Linear(inputs, setting.units), nn.Tanh(), nn.Linear(setting.units, classes)).double()


def loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(model(data[0]), data[1])


def arms(setting: Setting) -> list[tuple[str, float]]:
    """Every algorithm with every strength."""
    hsr = [(f"HSR {rule}", mu) for rule, values in setting.mu.items() for mu in values]
    return [("GD", 0.0), *(("SAM", rho) for rho in setting.rho), *hsr]


def train(setting: Setting, source: str, arm: str, strength: float, seed: int, data: Split, steps: int) -> Run:
    """Full-batch descent from the seed's start; all arms share it."""
    model = network(setting, data, seed)
    step = stepper(setting, arm, strength, model, data.train)
    marks = {0, *np.geomspace(1, steps, setting.checkpoints).round().astype(int).tolist()}
    states = {}
    for done in range(steps + 1):
        if done in marks:
            states[done] = deepcopy(model.state_dict())
        if done < steps:
            step()
    with torch.no_grad():
        return Run(source, arm, strength, seed, states, float(loss(model, data.validation)))


def stepper(
    setting: Setting, arm: str, strength: float, model: nn.Sequential, data: tuple[Tensor, Tensor]
) -> Callable[[], object]:
    """What does one step of the algorithm."""
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.rate)
    if arm == "SAM":
        sam = SAM(optimizer, rho=strength)
        return lambda: sam.step(lambda: loss(model, data))
    if arm == "HSR penalty":
        penalty = HSR(optimizer, model, strength, rule="penalty", traces="closed_form")
        return lambda: penalty.step(lambda: loss(model, data))
    if arm == "HSR direction":
        direction = HSR(optimizer, model, strength, rule="direction", traces="closed_form")
        return lambda: direction.step(lambda: loss(model, data))

    def plain() -> None:
        optimizer.zero_grad()
        loss(model, data).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return plain


def chosen(setting: Setting, source: str) -> tuple[dict[str, float], list[Run]]:
    """Per algorithm the strength of the least cross-entropy on validation examples, mean over the tuning seeds."""
    seeds = range(1000, 1000 + setting.tuning)
    splits = {seed: split(setting, source, seed) for seed in seeds}
    tried = [
        train(setting, source, *arm, seed, splits[seed], setting.tuned) for arm in arms(setting) for seed in seeds
    ]
    frame = pd.DataFrame([(r.arm, r.strength, r.validation) for r in tried], columns=["arm", "strength", "value"])
    means = frame.groupby(["arm", "strength"], sort=False)["value"].mean()
    return {arm: float(means[arm].idxmin()) for arm in COLOURS}, tried


def measured(setting: Setting, run: Run, data: Split) -> list[dict[str, float | str]]:
    """One row per checkpoint, the curvature on the training digits."""
    found: list[dict[str, float | str]] = []
    for step, state in run.states.items():
        model = network(setting, data, run.seed)
        model.load_state_dict(state)
        problem = Problem(model, {"train": data.train}, criterion="cross_entropy")
        H = hessian(problem, samples=setting.train, batch_size=setting.train).dense().double()
        eigenvalues = np.linalg.eigvalsh(H.numpy())
        bounds = wolkowicz_styan(float(H.trace()), float(H.square().sum()), len(H))
        value = {
            "lambda_max": float(eigenvalues[-1]),
            "lambda_min": float(eigenvalues[0]),
            "ws_upper": bounds.upper.value,
            "ws_lower": bounds.lower.value,
        }
        slopes = torch.autograd.grad(loss(model, data.train), list(model.parameters()))
        below = eigenvalues[eigenvalues < 0]
        with torch.no_grad():
            accuracy = float((model(data.test[0]).argmax(1) == data.test[1]).double().mean())
            losses = {"train_loss": float(loss(model, data.train)), "test_loss": float(loss(model, data.test))}
        found.append(
            {
                "data": run.source,
                "algorithm": run.arm,
                "strength": run.strength,
                "seed": run.seed,
                "step": step,
                **value,
                "range": value["lambda_max"] - value["lambda_min"],
                "ws_interval": value["ws_upper"] - value["ws_lower"],
                "negative_sum": float(-below.sum()),
                "negative_share": float(-below.sum() / np.abs(eigenvalues).sum()),
                "gradient_norm": float(torch.cat([g.flatten() for g in slopes]).norm()),
                **losses,
                "test_accuracy": accuracy,
            }
        )
    return found


def run(data: str | None, quick: bool) -> Outcome:  # noqa: ARG001  (digits are embedded, the others drawn)
    """All algorithms on all data: strengths by the tuning seeds, then curvature along the judged runs."""
    setting = QUICK if quick else FULL
    found: list[dict[str, float | str]] = []
    tuning: list[tuple[str, str, float, int, float]] = []
    best = {}
    for source in SOURCES:
        best[source], tried = chosen(setting, source)
        tuning += [(source, r.arm, r.strength, r.seed, r.validation) for r in tried]
        for seed in range(setting.seeds):
            parts = split(setting, source, seed)
            for arm, strength in best[source].items():
                ended = train(setting, source, arm, strength, seed, parts, setting.steps)
                found += measured(setting, ended, parts)
    raw = pd.DataFrame(found)
    ends = raw[raw["step"] == setting.steps]
    tried_ = pd.DataFrame(tuning, columns=["data", "algorithm", "strength", "seed", "validation_loss"])
    columns = [*QUANTITIES, "negative_sum", "negative_share", "ws_interval", "train_loss", "test_loss"]
    columns += ["test_accuracy", "gradient_norm"]
    return Outcome(
        title=TITLE,
        setting=describe(setting, best),
        claims=judged(raw),
        tables={
            f"After {setting.steps} steps": mean_and_error(ends, ["data", "algorithm", "strength"], columns),
            "Strengths tried": mean_and_error(tried_, ["data", "algorithm", "strength"], ["validation_loss"]),
        },
        raw=raw,
        figure=picture(raw),
        remarks=[
            "HSR moves towards where loss and bound together are stationary, not the loss alone. Saddles are "
            "judged where both arms first come to the smallest gradient norm of the loss that both reach.",
            "All arms take the same number of steps; SAM's cost 2 gradients each, HSR's the closed form's. "
            "Curvature is compared at equal training loss, interpolated between checkpoints.",
            "An earlier version of this page judged saddles by λ_min after 300 steps, with 5 seeds.",
        ],
    )


def describe(setting: Setting, best: dict[str, dict[str, float]]) -> str:
    """What was run, and how that differs from the papers."""
    tuned = "; ".join(
        f"{source}: " + ", ".join(f"{arm} {value:g}" for arm, value in each.items() if arm != "GD")
        for source, each in best.items()
    )
    return (
        f"d-{setting.units}-C tanh networks with biases under softmax cross-entropy on {setting.train} examples "
        "per seed: embedded digits (64-10), noisy two moons (2-2), three overlapping normal classes (8-3); "
        f"{setting.steps:,} full-batch steps of rate {setting.rate:g}, {setting.seeds} seeds of data and start. "
        "rho of SAM and mu of both rules of HSR are tuned alike: the least mean cross-entropy on "
        f"{setting.validation} validation examples after {setting.tuned} steps, over {setting.tuning} other seeds "
        f"({tuned}). HSR is exact. "
        "Only the papers' abstracts were at hand: activation, update rule, data and widths are choices made here; "
        "'penalty' adds mu times the bound's gradient to the loss's, 'direction' mu times its unit vector."
    )


def judged(raw: pd.DataFrame) -> list[Claim]:
    """The verdicts of these runs."""
    return [claim for source in SOURCES for claim in claims(raw[raw["data"] == source], source)]


def claims(raw: pd.DataFrame, source: str) -> list[Claim]:
    """The abstracts' sentences on one data set, per update rule where they are about HSR."""
    highest = (raw["lambda_max"] / raw["ws_upper"]).groupby(raw["seed"]).max()
    lowest = (raw["lambda_min"] / raw["ws_lower"]).groupby(raw["seed"]).max()
    found = [
        judge(
            "the bound holds (2604.10202): λ_max ≤ U and λ_min ≥ its lower one along every training",
            np.maximum(highest, lowest).tolist(),
            below=1.0,
            what="largest ratio to the bound",
        )
    ]
    for arm in ("HSR penalty", "HSR direction"):
        for column, words in (
            ("ws_upper", "lowers the bound it descends"),
            ("lambda_max", "avoids sharp minima: a smaller λ_max than plain descent"),
            ("ws_interval", "narrows the Wolkowicz-Styan interval"),
        ):
            found.append(compared(raw, arm, "GD", column, "train_loss", f"{arm} {words}, at equal training loss"))
        for column, words in (("negative_sum", "Σ|λ<0|"), ("negative_share", "its share of Σ|λ|")):
            text = f"{arm} avoids saddle points: less {words} than plain descent, at equal gradient norm"
            found.append(compared(raw, arm, "GD", column, "gradient_norm", text))
        text = f"{arm} finds minima as flat as SAM's: λ_max at most a quarter larger, at equal training loss"
        found.append(compared(raw, arm, "SAM", "lambda_max", "train_loss", text, COMPARABLE))
    return [replace(claim, text=f"{source}: {claim.text}") for claim in found]


def compared(
    raw: pd.DataFrame, arm: str, other: str, column: str, by: str, text: str, below: float = 1.0
) -> Claim:
    """Ratio of two arms where ``by`` first falls to the smallest value that both reach; geometric mean."""
    logs, levels = [], []
    for _, runs in raw.groupby("seed"):
        first, second = (runs[runs["algorithm"] == name].sort_values("step") for name in (arm, other))
        level = max(first[by].min(), second[by].min())
        values = [falls_to(part, by, level, column) for part in (first, second)]
        if min(values) > 0:
            logs.append(np.log(values[0] / values[1]))
            levels.append(level)
    if len(logs) < 2:
        return Claim(text, UNSURE, f"{len(logs)} seeds can be compared")
    found = judge(text, logs, below=float(np.log(below)))
    mean, low, high = np.exp(interval(logs))
    evidence = (
        f"ratio {mean:.3g} [{low:.3g}, {high:.3g}] over {len(logs)} seeds, where {by.replace('_', ' ')} is "
        f"{np.median(levels):.3g} (median); asked: < {below:g}"
    )
    if found.verdict == UNSURE:
        evidence += f"; {would_decide(logs, -np.inf, float(np.log(below)))}"
    return Claim(text, found.verdict, evidence)


def picture(raw: pd.DataFrame) -> Figure:
    """A row per data set along training, bands of a standard error over seeds."""
    shown = {
        "lambda_max": "λ_max (dashed: its bound U)",
        "negative_sum": "Σ|λ<0|",
        "train_loss": "training cross-entropy",
        "test_loss": "test cross-entropy",
    }
    figure = Figure(figsize=(14, 9), layout="constrained")
    grid = figure.subplots(len(SOURCES), len(shown), sharex=True, squeeze=False)
    for line, source in zip(grid, SOURCES, strict=True):
        row_of(list(line), raw[raw["data"] == source], shown)
        line[0].set_ylabel(source)
    for axes in grid[-1]:
        axes.set_xlabel("step")
    grid[0][0].legend(fontsize="small")
    return figure


def row_of(panels: list[Axes], raw: pd.DataFrame, shown: dict[str, str]) -> None:
    """The panels of one data set."""
    for axes, (column, title) in zip(panels, shown.items(), strict=True):
        for arm, part in raw.groupby("algorithm", sort=False):
            along(axes, part, column, str(arm), "-")
            if column == "lambda_max":
                along(axes, part, "ws_upper", "", "--")
        axes.set(yscale="log", xscale="symlog", title=title)
        axes.grid(alpha=0.3)


def along(axes: Axes, part: pd.DataFrame, column: str, label: str, style: str) -> None:
    """Mean over seeds with its band."""
    of = part.groupby("step")[column]
    mean, error = of.mean(), of.sem().fillna(0.0)
    colour = COLOURS[str(part["algorithm"].iloc[0])]
    axes.plot(mean.index, mean, style, color=colour, label=label or None)
    if style == "-":
        axes.fill_between(mean.index, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
