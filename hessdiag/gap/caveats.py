"""What a reader of a gap report must know, in plain words, where it applies."""

from __future__ import annotations

from collections.abc import Sequence

from hessdiag.gap.record import CheckpointRecord
from hessdiag.shown import counted

NOT_SMALL = 0.1  # ‖∇L‖ ‖θ‖ / L: the loss still falls by a tenth along a step of the weights' own length
FEW_TEST = 1000  # an accuracy of 95% is then known to ± 1.4 points, as large as most gaps between runs
APART = 0.1  # of the largest training loss: runs stopped at losses this different are not compared like with like

ALWAYS = (
    "Flatter is not better by itself: which measure goes with generalization, and with which sign, differs "
    "between families of runs (Kaur et al. 2022; Andriushchenko et al. 2023).",
    "An association over these checkpoints is no cause, and holds for runs like these only.",
)


def caveats(records: Sequence[CheckpointRecord], ranked: Sequence[CheckpointRecord]) -> list[str]:
    """Sentences that apply to these checkpoints.

    Args:
        records: all that were measured.
        ranked: those that rank statistics were taken over.
    """
    found = _confounded(ranked) if len(ranked) > 1 else []
    found += ALWAYS
    if moving := [r.name for r in records if r.gradient_share > NOT_SMALL]:
        found.append(
            f"The gradient is not small at {_some(moving)}: these are not minima, and curvature there says as "
            "much about where training stopped as about the solution."
        )
    if any(r.batch_norm for r in records):
        found.append(
            "BatchNorm layers are in evaluation mode: weights before them may be rescaled without changing the "
            "function, and training saw the curvature of batch statistics, another number."
        )
    found.append(
        "Examples are taken as the problem gives them: with random augmentation in the dataset, one draw of it; "
        "the gap of augmented training examples is not that of the originals."
    )
    if few := _fewest(records):
        found.append(few)
    moved = [name for r in records for name, one in r.guard.items() if one.verdict == "moved"]
    if moved:
        number = len(set(moved))
        found.append(
            f"{counted(number, 'measure')} change{'s' * (number == 1)} when the layers are rescaled while the "
            "function does not (Dinh et al. 2017): between runs of different scale they compare scale as much as "
            "flatness."
        )
    return found


def _fewest(records: Sequence[CheckpointRecord]) -> str:
    sizes = [(split.n, split.split) for r in records for split in r.performance.splits if split.split != "train"]
    if not sizes or min(sizes)[0] >= FEW_TEST:
        return ""
    n, split = min(sizes)
    return f"Only {n} examples of {split}: the interval of a gap is then often wider than what separates two runs."


def _confounded(ranked: Sequence[CheckpointRecord]) -> list[str]:
    found = []
    losses = [r.loss for r in ranked]
    apart = max(losses) - min(losses) > APART * max(losses)
    short = [r.name for r in ranked if r.performance.loss_floor == "no" and r.performance.accuracy_floor != "yes"]
    if apart and short:
        found.append(
            "Training losses of the examples measured run from "
            f"{min(losses):.3g} to {max(losses):.3g}, and {len(short)} of {len(ranked)} "
            f"runs were stopped above {ranked[0].performance.floor:g}: how far a run was trained is confounded "
            "with everything else (train all to one level)."
        )
    sizes = {r.fingerprint.n_params for r in ranked}
    if len(sizes) > 1:
        found.append(
            f"The checkpoints have {len(sizes)} different numbers of parameters: raw traces and norms grow with "
            "size."
        )
    data = {r.fingerprint.data_sha256 for r in ranked}
    if len(data) > 1:
        found.append("The checkpoints were measured on different samples: their numbers differ by the data too.")
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
