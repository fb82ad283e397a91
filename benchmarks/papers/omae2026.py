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

from benchmarks.papers.claims import Claim, Outcome, judge, mean_and_error
from hessdiag.analysis import analyze
from hessdiag.problem import Problem
from hessdiag.regularizers import HSR, SAM
from hessdiag.sources.datasets import Images, digits

TITLE = (
    "The bound of a three-layer network, and training that lowers it (Omae et al., arXiv 2604.10202, 2606.28662)"
)
COMPARABLE = 1.25  # "comparable to SAM": no sharper than it by more than a quarter
COLOURS = {"GD": "#555555", "SAM": "#0072b2", "HSR penalty": "#d55e00", "HSR direction": "#009e73"}
QUANTITIES = ("lambda_max", "lambda_min", "ws_upper", "ws_lower")


@dataclass(frozen=True)
class Setting:
    """Sizes, and the strengths that are tuned between."""

    seeds: int
    train: int
    validation: int
    units: int
    rate: float
    steps: int
    checkpoints: int
    rho: tuple[float, ...]
    mu: dict[str, tuple[float, ...]]


FULL = Setting(
    seeds=5,
    train=100,
    validation=400,
    units=10,
    rate=0.5,
    steps=300,
    checkpoints=5,
    rho=(0.05, 0.1, 0.2, 0.5, 1.0),
    mu={"penalty": (0.01, 0.1), "direction": (0.01, 0.1)},
)
QUICK = replace(
    FULL, seeds=2, train=30, units=4, steps=10, checkpoints=1, rho=(0.05,), mu=dict.fromkeys(FULL.mu, (0.01,))
)


@dataclass(frozen=True)
class Split:
    """The digits of one seed: to train, to tune and to test on, pixels in [0, 1] as rows of 64."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Run:
    """A trained network at its checkpoints."""

    arm: str
    strength: float
    seed: int
    states: dict[int, dict[str, Tensor]]
    validation: float


def split(setting: Setting, seed: int) -> Split:
    """Another part of the training digits for each seed; the test digits are all the same."""
    first, second = (rows(part) for part in digits())
    order = torch.randperm(len(first[1]), generator=torch.Generator().manual_seed(seed))
    taken, left = order[: setting.train], order[setting.train : setting.train + setting.validation]
    return Split((first[0][taken], first[1][taken]), (first[0][left], first[1][left]), second)


def rows(images: Images) -> tuple[Tensor, Tensor]:
    """Pictures as rows, float64."""
    return images.pixels.double().flatten(1) * images.scale, images.targets


def network(setting: Setting, seed: int) -> nn.Sequential:
    """64 inputs, one tanh layer, 10 classes, with biases, by torch's own initialisation."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, setting.units), nn.Tanh(), nn.Linear(setting.units, 10)).double()


def loss(model: nn.Module, data: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy."""
    return F.cross_entropy(model(data[0]), data[1])


def arms(setting: Setting) -> list[tuple[str, float]]:
    """Every algorithm with every strength."""
    hsr = [(f"HSR {rule}", mu) for rule, values in setting.mu.items() for mu in values]
    return [("GD", 0.0), *(("SAM", rho) for rho in setting.rho), *hsr]


def train(setting: Setting, arm: str, strength: float, seed: int, data: Split) -> Run:
    """Full-batch descent from the seed's start; all arms share it."""
    model = network(setting, seed)
    step = stepper(setting, arm, strength, model, data.train)
    marks = set(np.linspace(0, setting.steps, setting.checkpoints + 1).round().astype(int).tolist())
    states = {}
    for done in range(setting.steps + 1):
        if done in marks:
            states[done] = deepcopy(model.state_dict())
        if done < setting.steps:
            step()
    with torch.no_grad():
        return Run(arm, strength, seed, states, float(loss(model, data.validation)))


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


def chosen(runs: list[Run]) -> dict[str, float]:
    """Per algorithm the strength of the least cross-entropy on the validation digits, mean over seeds."""
    frame = pd.DataFrame([(r.arm, r.strength, r.validation) for r in runs], columns=["arm", "strength", "value"])
    means = frame.groupby(["arm", "strength"], sort=False)["value"].mean()
    return {arm: float(means[arm].idxmin()) for arm in COLOURS}


def measured(setting: Setting, run: Run, data: Split) -> list[dict[str, float | str]]:
    """One row per checkpoint, the curvature on the training digits."""
    found: list[dict[str, float | str]] = []
    for step, state in run.states.items():
        model = network(setting, run.seed)
        model.load_state_dict(state)
        problem = Problem(model, {"train": data.train}, criterion="cross_entropy")
        metrics = analyze(problem, QUANTITIES, batch_size=setting.train, samples=setting.train).metrics
        value = {name: metrics[name].value for name in QUANTITIES}
        slopes = torch.autograd.grad(loss(model, data.train), list(model.parameters()))
        with torch.no_grad():
            accuracy = float((model(data.test[0]).argmax(1) == data.test[1]).double().mean())
            losses = {"train_loss": float(loss(model, data.train)), "test_loss": float(loss(model, data.test))}
        found.append(
            {
                "algorithm": run.arm,
                "strength": run.strength,
                "seed": run.seed,
                "step": step,
                **value,
                "range": value["lambda_max"] - value["lambda_min"],
                "ws_interval": value["ws_upper"] - value["ws_lower"],
                "gradient_norm": float(torch.cat([g.flatten() for g in slopes]).norm()),
                **losses,
                "test_accuracy": accuracy,
            }
        )
    return found


def run(data: str | None, quick: bool) -> Outcome:  # noqa: ARG001  (the digits are embedded)
    """All algorithms with all strengths; curvature along training at the strengths the validation digits chose."""
    setting = QUICK if quick else FULL
    splits = [split(setting, seed) for seed in range(setting.seeds)]
    runs = [train(setting, *arm, seed, s) for arm in arms(setting) for seed, s in enumerate(splits)]
    best = chosen(runs)
    kept = [r for r in runs if r.strength == best[r.arm]]
    raw = pd.DataFrame([row for r in kept for row in measured(setting, r, splits[r.seed])])
    ends = raw[raw["step"] == setting.steps]
    tuning = pd.DataFrame(
        [(r.arm, r.strength, r.seed, r.validation) for r in runs],
        columns=["algorithm", "strength", "seed", "validation_loss"],
    )
    columns = [*QUANTITIES, "range", "ws_interval", "train_loss", "test_loss", "test_accuracy", "gradient_norm"]
    return Outcome(
        title=TITLE,
        setting=describe(setting, best),
        claims=claims(raw, ends),
        tables={
            f"After {setting.steps} steps": mean_and_error(ends, ["algorithm", "strength"], columns),
            "Strengths tried": mean_and_error(tuning, ["algorithm", "strength"], ["validation_loss"]),
        },
        raw=raw,
        figure=picture(raw),
        remarks=[
            "HSR moves towards where loss and bound together are stationary, not the loss alone: its λ_min is not "
            "that of a critical point of the loss. How far each arm is from one, the gradient norm says.",
            "All arms take the same number of steps; SAM's cost 2 gradients each, HSR's the closed form's.",
        ],
    )


def describe(setting: Setting, best: dict[str, float]) -> str:
    """What was run, and how that differs from the papers."""
    tuned = ", ".join(f"{arm} {value:g}" for arm, value in best.items() if arm != "GD")
    return (
        f"64-{setting.units}-10 tanh network with biases under softmax cross-entropy, {setting.train} embedded "
        f"digits per seed, {setting.steps} full-batch steps of rate {setting.rate:g}, {setting.seeds} seeds (data "
        "and start). rho of SAM and mu of both rules of HSR are tuned alike: the least mean cross-entropy on "
        f"{setting.validation} validation digits, no part of training or test ({tuned}). HSR is exact. "
        "Only the papers' abstracts were at hand: activation, update rule, data and widths are choices made here; "
        "'penalty' adds mu times the bound's gradient to the loss's, 'direction' mu times its unit vector. The "
        "claims are those of the abstracts, their thresholds fixed before the first run."
    )


def claims(raw: pd.DataFrame, ends: pd.DataFrame) -> list[Claim]:
    """The abstracts' sentences, per update rule where they are about HSR."""
    highest = (raw["lambda_max"] / raw["ws_upper"]).groupby(raw["seed"]).max()
    lowest = (raw["lambda_min"] / raw["ws_lower"]).groupby(raw["seed"]).max()
    found = [
        judge(
            "The bound holds (2604.10202): λ_max ≤ U and λ_min ≥ its lower one along every training",
            np.maximum(highest, lowest).tolist(),
            below=1.0,
            what="largest ratio to the bound",
        )
    ]
    for arm in ("HSR penalty", "HSR direction"):
        for column, words in (
            ("ws_upper", "lowers the bound it descends"),
            ("lambda_max", "avoids sharp minima: a smaller λ_max than plain descent"),
            ("range", "narrows the range of eigenvalues"),
            ("ws_interval", "narrows the Wolkowicz-Styan interval"),
            ("lambda_min", "avoids saddle points: a negative λ_min closer to zero"),
        ):
            ratios = against(ends, arm, "GD", column)
            what = f"{column} over plain descent's"
            found.append(judge(f"{arm} {words} (2606.28662)", ratios, below=1.0, what=what))
        text = f"{arm} finds minima about as flat as SAM's (2606.28662): λ_max at most a quarter larger"
        ratios = against(ends, arm, "SAM", "lambda_max")
        found.append(judge(text, ratios, below=COMPARABLE, what="λ_max over SAM's"))
    return found


def against(ends: pd.DataFrame, arm: str, other: str, column: str) -> list[float]:
    """Ratios of two arms, seed by seed; of λ_min where both are negative parts."""
    table = ends.pivot(index="seed", columns="algorithm", values=column)
    ratios: list[float] = (table[arm] / table[other]).tolist()
    return ratios


def picture(raw: pd.DataFrame) -> Figure:
    """Six panels along training, bands of a standard error over seeds."""
    figure = Figure(figsize=(12, 7), layout="constrained")
    panels: list[Axes] = list(figure.subplots(2, 3, sharex=True).flat)
    shown = {
        "lambda_max": "λ_max (dashed: its bound U)",
        "lambda_min": "λ_min",
        "range": "λ_max − λ_min",
        "ws_interval": "Wolkowicz–Styan interval, U − lower",
        "train_loss": "training cross-entropy",
        "test_loss": "test cross-entropy",
    }
    for axes, (column, title) in zip(panels, shown.items(), strict=True):
        for arm, part in raw.groupby("algorithm", sort=False):
            along(axes, part, column, str(arm), "-")
            if column == "lambda_max":
                along(axes, part, "ws_upper", "", "--")
        if column != "lambda_min":
            axes.set_yscale("log")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    for axes in panels[3:]:
        axes.set_xlabel("step")
    panels[2].legend(fontsize="small")
    return figure


def along(axes: Axes, part: pd.DataFrame, column: str, label: str, style: str) -> None:
    """Mean over seeds with its band."""
    of = part.groupby("step")[column]
    mean, error = of.mean(), of.sem().fillna(0.0)
    colour = COLOURS[str(part["algorithm"].iloc[0])]
    axes.plot(mean.index, mean, style, color=colour, label=label or None)
    if style == "-":
        axes.fill_between(mean.index, mean - error, mean + error, color=colour, alpha=0.2, linewidth=0)
