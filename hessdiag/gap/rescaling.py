"""Rescalings of a network's layers that leave its function as it is, found by trying.

In a positively homogeneous network one layer's weights may be multiplied by α and the next layer's divided by it,
and before a BatchNorm a layer may be multiplied outright, its statistics along with it. Consecutive layers are
rescaled on a copy of the model; what leaves the outputs on real samples as they were, to rounding, is kept. α is a
power of two, so that rescaling itself rounds nothing.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from hessdiag.engine.products.functional import Functional
from hessdiag.errors import Refused, UsageError
from hessdiag.gap.checkpoint import Checkpoint
from hessdiag.gap.measures.folding import BATCH_NORMS, norm_after
from hessdiag.problem import Problem
from hessdiag.samples import divide

ALPHA = 4.0  # moves what can move by 16 in the curvature; large factors drown float32 in rounding
TRIED = 32  # examples on which the outputs must stay
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5}  # relative to the largest output; tanh is off by 1e-1

Step = Callable[[dict[str, nn.Module], float], None]


@dataclass(frozen=True)
class Rescaling:
    """A function-preserving rescaling of a problem's layers.

    Attributes:
        problem: the same function with other weights; its model is a copy.
        places: what was rescaled: "0 ×4, 2 ÷4", "conv ×4 before norm".
        alpha: the factor.
        difference: largest change of an output on the sample set, relative to the largest output of its batch.
    """

    problem: Problem
    places: tuple[str, ...]
    alpha: float
    difference: float


def rescaled(checkpoint: Checkpoint, *, alpha: float = ALPHA) -> Rescaling | Refused:
    """A copy of the problem whose layers are rescaled wherever the outputs stay; or why nowhere.

    Cost: a copy of the model, 1 forward of 32 examples per pair of consecutive layers, and 2 of the sample set.

    Raises:
        UsageError: ``alpha`` is no power of two above 1.
    """
    if not (math.isfinite(alpha) and alpha > 1 and math.frexp(alpha)[0] == 0.5):
        msg = f"alpha={alpha}: a power of two above 1 is needed, so that rescaling rounds nothing; for example 4"
        raise UsageError(msg)
    if not checkpoint.problem.has_outputs:
        return Refused("the problem gives a loss only: whether the function stays cannot be seen")
    model = copy.deepcopy(checkpoint.problem.bare_model())
    problem = replace(checkpoint.problem, model=model)
    batch = next(divide(checkpoint.samples.batches[0], TRIED))
    reference, tolerance = _outputs(problem, batch, checkpoint), ROUNDING[_rounds(model, checkpoint)]
    modules, places = dict(model.named_modules()), []
    taken: set[str] = set()
    for place, names, step in _candidates(checkpoint):
        if taken & set(names):
            continue
        step(modules, alpha)
        if _difference(reference, _outputs(problem, batch, checkpoint)) <= tolerance:
            places.append(place.format(alpha=f"{alpha:g}"))
            taken |= set(names)
        else:
            step(modules, 1 / alpha)
    if not places:
        return Refused(_nothing(checkpoint))
    # a clipped activation (ReLU6) may show on other examples than those tried
    difference = max(
        _difference(*(_outputs(one, batch, checkpoint) for one in (checkpoint.problem, problem)))
        for batch in checkpoint.samples.batches
    )
    if difference > tolerance:
        return Refused(
            f"rescaling {', '.join(places)} keeps the outputs on {TRIED} examples, but moves them by "
            f"{difference:.1g} on others: an activation is not positively homogeneous"
        )
    return Rescaling(problem, tuple(places), alpha, difference)


def _candidates(checkpoint: Checkpoint) -> Iterator[tuple[str, tuple[str, ...], Step]]:
    """What may be rescaled: (words, the layers it takes, how), BatchNorms first, then pairs in order."""
    for name, norm in norm_after(checkpoint).items():
        yield f"{name} ×{{alpha}} before {norm.name}", (f"{name} in",), _before_norm(name, norm.name)
    for one, two in itertools.pairwise(checkpoint.layers):
        if one.kind != "embedding" and two.kind != "embedding":
            yield f"{one.name} ×{{alpha}}, {two.name} ÷{{alpha}}", (one.name, two.name), _pair(one.name, two.name)


def _pair(one: str, two: str) -> Step:
    def step(modules: dict[str, nn.Module], alpha: float) -> None:
        _scale(modules[one].weight, alpha)
        _scale(modules[one].bias, alpha)
        _scale(modules[two].weight, 1 / alpha)

    return step


def _before_norm(name: str, norm: str) -> Step:
    def step(modules: dict[str, nn.Module], alpha: float) -> None:
        layer, after = modules[name], modules[norm]
        if not isinstance(after, BATCH_NORMS) or after.running_var is None or after.running_mean is None:
            return
        _scale(layer.weight, alpha)
        _scale(layer.bias, alpha)
        with torch.no_grad():
            # what training with these weights would have left, but for ε, which is kept from changing the function
            after.running_mean.mul_(alpha)
            after.running_var.add_(after.eps).mul_(alpha**2).sub_(after.eps)

    return step


def _scale(tensor: object, factor: float) -> None:
    if isinstance(tensor, Tensor):
        with torch.no_grad():
            tensor.mul_(factor)


def _outputs(problem: Problem, batch: object, checkpoint: Checkpoint) -> Tensor:
    function = Functional(problem, dtype=checkpoint.operator.dtype, device=checkpoint.operator.device)
    with function.measuring(), torch.no_grad():
        return function.outputs(function.theta, function.place(batch)).double()


def _rounds(model: nn.Module, checkpoint: Checkpoint) -> torch.dtype:
    """The coarser of measurement and stored weights: what rescaled BatchNorm statistics are rounded to."""
    tensors = [p for p in model.parameters() if p.is_floating_point()]
    wide = checkpoint.operator.dtype == torch.float64 and all(p.dtype == torch.float64 for p in tensors)
    return torch.float64 if wide else torch.float32


def _difference(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape or not bool(torch.isfinite(other).all()):
        return math.inf
    return float((one - other).abs().max()) / max(float(one.abs().max()), 1e-300)


def _nothing(checkpoint: Checkpoint) -> str:
    layers = checkpoint.layers
    if len(layers) < 2:
        return f"{len(layers)} layer with weights: a rescaling needs two in a row"
    return (
        f"none of {len(layers) - 1} pairs of consecutive layers can be rescaled without changing the outputs: "
        "the activations between them are not positively homogeneous, or other paths join there"
    )
