"""Whether batches are weighted as their mean losses need: class weights, token means, sums, batch statistics.

A mean loss over rows is additive: of some examples together it is the weighted mean of what it is of each alone.
That is tried on the pieces of batches, and on examples of several batches put together, as unlike in their targets
as the sample set has them: classes of one kind, or texts of one length, would all weigh alike.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessdiag.engine.checks.candidates import Candidate, candidates
from hessdiag.engine.checks.facts import Finding
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.stacking import joined
from hessdiag.samples import divide, leaves, map_tensors, row_count

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}  # rounding of models that cast to float32 inside
LOOKED_AT = 4096  # examples at most, for the most unlike
ROUNDING = 64  # eps: of a loss computed twice, in batches of another size
EQUAL = 1e-2  # of the limit: two weights that fit as well as this are alike
WORST = 4  # examples with a large loss beside them
TOGETHER = 16  # examples of several batches in one
UNTESTED = "untested weighting"  # another check than "weighting": batches may be cut all the same


@dataclass(frozen=True)
class Trial:
    """Examples together and in parts.

    Attributes:
        whole: all of them as one batch.
        parts: the same, divided.
        means: mean loss of the whole, then of each part.
        dtype: in which they were computed.
    """

    whole: Any
    parts: tuple[Any, ...]
    means: tuple[float, ...]
    dtype: torch.dtype

    def off(self, weight: Callable[[Any], float], limit: float) -> float:
        """By how much, relative, the whole is not the sum of its parts if batches count by ``weight``.

        Losses of confident examples are rounding: they are taken relative to what rounding makes ``limit`` of.
        """
        pairs = list(self.weighed(weight))
        whole, *parts = (count * mean for count, mean in pairs)
        rounding = ROUNDING * torch.finfo(self.dtype).eps / limit * pairs[0][0]
        scale = max(abs(whole), math.fsum(abs(part) for part in parts), abs(rounding), 1e-300)
        return abs(whole - math.fsum(parts)) / scale

    def weighed(self, weight: Callable[[Any], float]) -> Iterator[tuple[float, float]]:
        """Weights and means of whole and parts; a part in which nothing counts has no mean."""
        pairs = zip((self.whole, *self.parts), self.means, strict=True)
        weights = ((float(weight(batch)), mean) for batch, mean in pairs)
        return ((count, mean) for n, (count, mean) in enumerate(weights) if n == 0 or count != 0)

    @property
    def sums(self) -> bool:
        """Whether the loss looks like a sum over examples, not a mean."""
        whole, *parts = self.means
        return abs(whole - math.fsum(parts)) <= 1e-4 * abs(whole) and len(parts) > 1


def weighting(operator: Curvature) -> list[Finding]:
    """Whether a batch's loss is the sum over its parts, so that batch sizes do not change the numbers.

    Costs a few forward passes of up to four batches and of 20 examples.
    """
    with operator.timed(), torch.no_grad():
        singles = _unlike(operator.batches)
        trials = _pieces(operator, {0, len(operator.batches) - 1, *(index for index, _ in singles[:2])})
        groups: list[list[Any]] = []
        if len(operator.batches) > 1:
            worst = divide(operator.function.place(operator.trial), 1)
            groups = _alike([*(one for _, one in singles), *itertools.islice(worst, WORST)])
        across = [_across(operator, group) for group in groups]
        trials += [trial for trial in across if trial is not None]
        limit = TOLERANCE[operator.dtype]
        off = max((trial.off(operator.problem.count, limit) for trial in trials), default=0.0)
        if not off <= limit:
            return [_fault(operator, trials, off)]
    compared = (len(across) == 1 and across[0] is not None) or len(operator.batches) == 1
    found = [Finding("ok", "weighting", "any division into batches gives the same loss")] if trials else []
    return found if compared and trials else [*found, _untested(operator)]


def _across(operator: Curvature, group: list[Any]) -> Trial | None:
    """Examples of several batches together and one by one; by fours where one alone is refused (BatchNorm)."""
    if len(group) < 2:
        return None
    whole = joined(group)
    fours = [joined(group[begin : begin + 4]) for begin in range(0, len(group), 4)]
    return _trial(operator, whole, group) or (_trial(operator, whole, fours) if len(fours) > 1 else None)


def _pieces(operator: Curvature, indices: set[int]) -> list[Trial]:
    """Some batches, each in two pieces."""
    found = []
    for index in sorted(indices):
        batch = operator.batches[index]
        rows = row_count(batch)
        if rows is not None and rows > 1:
            trial = _trial(operator, batch, list(divide(batch, rows - max(1, rows // 3))))
            found += [] if trial is None else [trial]
    return found


def _trial(operator: Curvature, whole: Any, parts: list[Any]) -> Trial | None:
    """Mean losses of a whole and its parts; None where the loss cannot be had of them, or nothing counts."""
    try:
        means = tuple(operator._mean(batch) for batch in (whole, *parts))
    except Exception:  # the user's code, on a batch it has not made itself
        return None
    kept = [(part, mean) for part, mean in zip(parts, means[1:], strict=True) if math.isfinite(mean)]
    if not math.isfinite(means[0]) or not kept:
        return None
    return Trial(whole, tuple(part for part, _ in kept), (means[0], *(mean for _, mean in kept)), operator.dtype)


def _unlike(batches: list[Any]) -> list[tuple[int, Any]]:
    """Up to 16 examples, (batch, example): the farthest from those taken before, beginning with the farthest."""
    signatures: dict[int, Tensor] = {}
    for index, batch in enumerate(batches):
        if row_count(batch) is not None:
            signatures[index] = _signature(batch)
        if sum(map(len, signatures.values())) >= LOOKED_AT:
            break
    places = [(index, row) for index, signature in signatures.items() for row in range(len(signature))]
    if not places:
        return []
    width = max(signature.shape[1] for signature in signatures.values())
    padded = [torch.nn.functional.pad(one, (0, width - one.shape[1])) for one in signatures.values()]
    table = torch.cat(padded)
    table = (table - table.mean(0)) / table.std(0, correction=0).clamp(min=1e-12)
    taken = [int(table.norm(dim=1).argmax())]
    near = torch.full((len(table),), math.inf, dtype=torch.float64)
    while len(taken) < min(TOGETHER, len(places)):
        near = torch.minimum(near, (table - table[taken[-1]]).norm(dim=1))
        near[taken] = -1
        taken.append(int(near.argmax()))
    chosen = [places[number] for number in taken]
    return [(index, _row(batches[index], row)) for index, row in chosen]


def _signature(batch: Any) -> Tensor:
    """What may weigh an example, (rows, features) float64: of whole numbers and masks mean, -100s, zeros, spread.

    Of floating-point tensors the mean alone, which tells soft targets and regression targets apart.
    """
    columns = []
    for leaf in leaves(batch):
        flat = leaf.detach().reshape(len(leaf), -1)
        flat = (flat.abs() if flat.is_complex() else flat).double().cpu()
        if flat.shape[1] == 0:
            continue
        columns.append(flat.mean(1))
        if not leaf.is_floating_point():
            columns += [(flat == -100).double().mean(1), (flat == 0).double().mean(1), flat.amax(1)]
    return torch.stack(columns, dim=1) if columns else torch.zeros(row_count(batch) or 0, 1, dtype=torch.float64)


def _row(batch: Any, row: int) -> Any:
    return map_tensors(batch, lambda leaf: leaf[row : row + 1])


def _alike(examples: list[Any]) -> list[list[Any]]:
    """Examples in groups that can be put together."""
    groups: list[list[Any]] = []
    for one in examples:
        for group in groups:
            if joined([group[0], one]) is not None:
                group.append(one)
                break
        else:
            groups.append([one])
    return groups


def _fault(operator: Curvature, trials: list[Trial], off: float) -> Finding:
    problem, rows = operator.problem, row_count(operator.batches[0])
    text = f"the loss of a batch is not the sum over its parts (off by {off:.2g})"
    own = problem.built_in is None or problem.weight is not None
    known = _passing(operator, trials) if own and len(operator.batches) > 1 else None
    if problem.built_in is not None or problem.weight is not None or len(operator.batches) == 1:
        text += f": the numbers hold for batches of {rows} examples only (batch statistics, a contrastive loss, "
        text += "a mask)" if known is None else f"a mask); for batches of any size: Problem({known.text})"
        return Finding("warning", "weighting", text)
    if all(trial.sums for trial in trials):
        return Finding("fault", "weighting", f"{text}: it is a sum: return the mean over the batch's examples")
    text += ": say what its mean stands for with Problem(weight=f(batch)), or measure in one batch (`batch_size`)"
    if known is not None:
        text += f"; this one was tried and fits: {known.text}"
    return Finding("fault", "weighting", text)


def _passing(operator: Curvature, trials: list[Trial]) -> Candidate | None:
    """The weight with which every trial is the sum of its parts; of several the best, of equals the first."""
    limit, fits = TOLERANCE[operator.dtype], []
    for one in candidates(operator.problem, operator.batches):
        try:
            fits.append((max(trial.off(one.weight, limit) for trial in trials), one))
        except Exception:
            continue
    best = min((off for off, _ in fits), default=math.inf)
    return next((one for off, one in fits if off <= min(limit, max(2 * best, EQUAL * limit))), None)


def _untested(operator: Curvature) -> Finding:
    problem = operator.problem
    if len(operator.batches) == 1:
        return Finding("note", UNTESTED, "one batch, which cannot be cut: the numbers hold for it as a whole")
    why = "whether batches count rightly could not be tried (their examples cannot be put together)"
    if problem.built_in is not None and problem.weight is None:
        return Finding("note", UNTESTED, f"{why}; criterion {problem.built_in.shown} counts its terms itself")
    cure = "if the loss is a mean over tokens or with class weights, give Problem(weight=f(batch))"
    return Finding("warning", UNTESTED, f"{why}: {cure}")
