"""Zhang, Li, Ju, arXiv 2306.08553 v4 (TMLR 2024): noise stability optimization."""

from __future__ import annotations

import numpy as np
import pandas as pd

from benchmarks.papers import zhang2023_bound
from benchmarks.papers.claims import UNSURE, Claim, Outcome, interval, judge, mean_and_error
from benchmarks.papers.zhang2023_picture import (
    EARLY,
    NAMES,
    PLATEAUS,
    RIVALS,
    at_level,
    ends,
    picture,
    variance_ratios,
)
from benchmarks.papers.zhang2023_sensing import NOISE, TOO_LARGE, Noise, Row, Sensing, sensing, variances
from benchmarks.papers.zhang2023_training import Recipe, Training, study

COLUMNS = ("part", "seed", "arm", "at", "measure", "value")
READING = 1.5  # by what factor such a reading may be off
TAIL = 0.1  # share of the steps that a plateau is the mean of
QUICK = (
    Sensing(size=8, rank=1, steps=40, rate=0.01, seeds=2, fresh=20, every=4),
    Noise(seeds=2, hidden=2, samples=40, sigmas=(0.005, 0.02, 0.05), losses=200, gradients=15),
    Training(
        seeds=2,
        tuning=1,
        gradients=20,
        pretrain=64,
        train=64,
        validation=64,
        width=4,
        rates=(0.05,),
        strengths={"SGD": (0.0,), "weight decay": (0.001,), "one-point": (0.02,), "SAM": (0.05,), "NSO": (0.02,)},
        level=2.35,
        looks=3,
    ),
)


def run(data: str | None, quick: bool) -> Outcome:
    """The three studies; without a data folder the last one takes the embedded digits."""
    sizes, noise, training = QUICK if quick else (Sensing(), Noise(), Training())
    if data is None and not quick:
        training = Training(pretrain=700, train=200, validation=300)
    rows: list[Row] = sensing(sizes)
    rows += [row for seed in range(noise.seeds) for row in variances(noise, seed)]
    rows += study(training, data)
    recipes = [
        Recipe(str(arm), chosen.rate, chosen.strength)
        for arm, chosen in picked(pd.DataFrame(rows, columns=list(COLUMNS))).iterrows()
    ]
    rows += zhang2023_bound.bounds(training, data, recipes)
    return outcome(pd.DataFrame(rows, columns=list(COLUMNS)), sizes, noise, training, data)


def outcome(raw: pd.DataFrame, sizes: Sensing, noise: Noise, training: Training, data: str | None) -> Outcome:
    """The page of these runs."""
    return Outcome(
        title="Noise stability optimization (Zhang, Li and Ju, arXiv 2306.08553)",
        setting=_setting(sizes, noise, training, data),
        claims=judged(raw, sizes, training.level),
        tables=_tables(raw, sizes, training.level),
        raw=raw[(raw.part != "sensing") | (raw["at"] % (5 * sizes.every) == 0)],
        figure=picture(raw, training.level),
        remarks=_remarks(raw, training),
    )


def judged(raw: pd.DataFrame, sizes: Sensing | None = None, level: float = Training.level) -> list[Claim]:
    """The verdicts of these runs."""
    return [*sensing_claims(raw, sizes or Sensing()), *variance_claims(raw), *training_claims(raw, level)]


def picked(raw: pd.DataFrame) -> pd.DataFrame:
    """Rate and strength of every method, in the order of the study."""
    return raw[raw.part == "chosen"].pivot_table(index="arm", columns="measure", values="value", sort=False)


def plateaus(raw: pd.DataFrame, sizes: Sensing, share: float = 1.0) -> pd.DataFrame:
    """Mean over the last tenth of the first ``share`` of the steps: by (arm, seed), a column each measure."""
    end = share * sizes.steps
    part = raw[(raw.part == "sensing") & (raw.measure != "agreement")]
    late = part[(part["at"] >= (1 - TAIL) * end) & (part["at"] <= end)]
    return late.pivot_table(index=["arm", "seed"], columns="measure", values="value")


def sensing_claims(raw: pd.DataFrame, sizes: Sensing) -> list[Claim]:
    """Levels and order of the validation errors."""
    last = plateaus(raw, sizes)["validation"]
    half = plateaus(raw, sizes, 0.5)["validation"]
    claims = [
        judge(
            f"matrix sensing, figure: validation error of {NAMES[arm]} levels off at about {level:g}",
            last[arm].tolist(),
            above=level / READING,
            below=level * READING,
            what="relative validation error",
        )
        for arm, level in PLATEAUS.items()
    ]
    for text, ratio in (
        (
            "matrix sensing: one-point noise generalizes better than gradient descent",
            last["one-point"] / last["gd"],
        ),
        ("matrix sensing: NSO generalizes better than one-point noise", last["nso"] / last["one-point"]),
        ("the same at equal gradient count, NSO after half of the steps", half["nso"] / last["one-point"]),
    ):
        claims.append(judge(text, ratio.tolist(), below=1.0, what="ratio of validation errors"))
    return claims


def variance_claims(raw: pd.DataFrame) -> list[Claim]:
    """The laws within 10%, and what becomes of the estimates of tr H and its gradient as sigma goes to 0."""
    wide = variance_ratios(raw)
    wide = wide[wide["at"] <= TOO_LARGE]
    laws = {
        ("one-point", "loss"): "σ²‖g‖² + (σ⁴/2)‖H‖²",
        ("two-point", "loss"): "(σ⁴/2)‖H‖²",
        ("one-point", "gradient"): "σ²‖H‖² + (σ⁴/2)‖∇³L‖² (our derivation)",
        ("two-point", "gradient"): "(σ⁴/2)‖∇³L‖² (our derivation)",
    }
    claims, slopes = [], []
    for (arm, kind), law in laws.items():
        part = wide[wide.arm == arm]
        ratio = part.groupby("seed")[f"{kind} ratio"].mean()
        text = f"variance of the {arm} {kind} is {law}, σ <= {TOO_LARGE:g}"
        claims.append(judge(text, ratio.tolist(), above=0.9, below=1.1, what="measured/predicted"))
        slope = [
            float(np.polyfit(np.log(run["at"]), np.log(run[f"{kind} of estimate"]), 1)[0])
            for _, run in part.groupby("seed")
        ]
        of = "tr H" if kind == "loss" else "its gradient"
        bounds, how = ((-2.2, -1.8), "grows as 1/σ²") if arm == "one-point" else ((-0.2, 0.2), "stays finite")
        text = f"as σ goes to 0 the variance of the {arm} estimate of {of} {how}"
        slopes.append(judge(text, slope, above=bounds[0], below=bounds[1], what="slope in log-log"))
    return claims + slopes


def training_claims(raw: pd.DataFrame, level: float) -> list[Claim]:
    """NSO against every other method: curvature at equal training loss, test error at equal gradients."""
    runs, claims = ends(raw), []
    level_rows = at_level(raw, level)
    for measure, name in (("trace", "the trace"), ("lambda_max", "the largest eigenvalue")):
        for rival in RIVALS:
            text = f"fine-tuning: NSO lowers {name} against {rival}, at a training loss of {level:g}"
            both = pd.concat(
                [level_rows[level_rows.arm == arm].set_index("seed")[measure] for arm in ("NSO", rival)],
                axis=1,
                join="inner",
            ).dropna()
            if len(both) < 2:
                claims.append(Claim(text, UNSURE, f"both reached that loss in {len(both)} seeds"))
                continue
            logs = np.log(both.iloc[:, 0] / both.iloc[:, 1])
            mean, low, high = interval(logs.tolist())
            found = judge(text, logs.tolist(), below=0.0, what="log-ratio")
            ratio = f"ratio {np.exp(mean):.3g} [{np.exp(low):.3g}, {np.exp(high):.3g}], {found.evidence}"
            claims.append(Claim(text, found.verdict, ratio))
    errors = runs.pivot_table(index="seed", columns="arm", values="test error %")
    for rival in (*RIVALS, EARLY):
        text = f"fine-tuning: NSO lowers the test error against {rival}, at equal gradient count"
        claims.append(
            judge(text, (errors["NSO"] - errors[rival]).tolist(), below=0.0, what="difference in points")
        )
    return claims


def _setting(sizes: Sensing, noise: Noise, training: Training, data: str | None) -> str:
    source = "the embedded digits" if data is None else "MNIST at 14 x 14"
    return (
        f"(1) Matrix sensing, as in the paper: d = {sizes.size}, rank {sizes.rank}, m = {sizes.measurements} "
        f"symmetric Gaussian A_i, U {sizes.size} x {sizes.size} from N(0, 1), rate {sizes.rate:g}, {sizes.steps} "
        f"steps, σ = {NOISE:g}; {sizes.fresh} fresh A_i validate; errors are relative to mean y². {sizes.seeds} "
        "seeds change X*, start and noise (which one-point and NSO share) under one draw of the A_i, so intervals "
        "are given that draw. "
        f"(2) Variances: digits at 4 x 4 through a half-trained tanh layer of {noise.hidden}, {noise.samples} "
        f"examples, float64, {noise.losses} noise vectors for the loss and {noise.gradients} steps of hessdiag's "
        "NSO for the gradient; H and ∇³L are exact. "
        f"(3) Fine-tuning, the paper's use: a ReLU MLP with two layers of {training.width}, pretrained on "
        f"{training.pretrain:,} pictures of {source} turned by 90 degrees, its head drawn anew, fine-tuned on "
        f"{training.train} upright ones (each seed its own) by SGD with momentum 0.9 and a cosine rate, "
        f"{training.gradients:,} gradients of batch {training.batch} for every method (SAM, NSO: half the steps). "
        f"Rate and strength by the error on {training.validation:,} other pictures, mean of {training.tuning} "
        "seeds that are not judged. The paper fine-tunes ImageNet-pretrained ResNet-34 with Adam. Early stopping "
        "is SGD at its look of least validation error. Trace and λ_max are those of all parameters on the whole "
        "training set (hessdiag), not the paper's per-layer sums; they are compared at equal training loss, "
        "interpolated between looks in the logarithms."
    )


def _tables(raw: pd.DataFrame, sizes: Sensing, level: float) -> dict[str, pd.DataFrame]:
    ratios = variance_ratios(raw).rename(columns={"at": "sigma"})
    return {
        "Matrix sensing, mean of the last tenth of the steps": mean_and_error(
            plateaus(raw, sizes).reset_index(), ["arm"], ["train", "validation", "distance2"]
        ),
        "Variance, measured over predicted": mean_and_error(
            ratios, ["arm", "sigma"], ["loss ratio", "gradient ratio"]
        ),
        "Fine-tuning, at the end of the runs": mean_and_error(
            ends(raw), ["arm"], ["train loss", "trace", "lambda_max", "validation error %", "test error %"]
        ),
        f"Fine-tuning, where the training loss is {level:g}": mean_and_error(
            at_level(raw, level), ["arm"], ["trace", "lambda_max"]
        ),
        zhang2023_bound.TITLE: zhang2023_bound.table(raw),
    }


def _remarks(raw: pd.DataFrame, training: Training) -> list[str]:
    agreement = raw[raw.measure == "agreement"].value.max()
    wide = variance_ratios(raw)
    near = wide[np.isclose(wide["at"], TOO_LARGE)].set_index(["arm", "seed"])["loss"]
    factor, low, high = interval((near["one-point"] / near["two-point"]).tolist())
    chosen = picked(raw)
    told = "; ".join(
        f"{arm}: rate {row.rate:g}" + (f", {row.strength:g}" if row.strength else "")
        for arm, row in chosen.iterrows()
    )
    grids = {arm: grid for arm, grid in training.strengths.items() if len(grid) > 1}
    edge = [arm for arm, grid in grids.items() if chosen.loc[arm, "strength"] in (min(grid), max(grid))]
    return [
        "All arms of matrix sensing share one pass over the A_i, at the points w ± u of NSO's own noise; over the "
        f"first steps this is `NSO.step` to a relative {agreement:.1g}.",
        f"At σ = {TOO_LARGE:g} the one-point loss has {factor:.3g} [{low:.3g}, {high:.3g}] times the variance of "
        "the two-point.",
        f"Chosen by validation error: {told}."
        + (f" At an end of its grid: {', '.join(edge)}." if edge else " None is at an end of its grid."),
        "An earlier version of this page trained from scratch and compared curvature at the end of runs whose "
        "losses differed twentyfold; its verdicts 'does not hold' were about that set-up.",
        "A gain at equal gradients stands beside early stopping and weight decay: part of it is theirs.",
        zhang2023_bound.remark(raw),
    ]
