"""The user's own loss and gradient, against those that are measured: is this the function that was meant?

The self-test compares products with differences of the same functional model, so it cannot see that another
function is measured. Nothing here goes through that model: the user's module, with its own weights, is called the
way a training loop calls it, in evaluation mode, and differentiated by ``model.parameters()``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hessdiag.engine.checks.facts import Finding
from hessdiag.engine.checks.plain_pass import Passed, PlainModel, Returned
from hessdiag.engine.checks.readings import Reading
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.failures import KEPT_GRAPH, is_kept_graph, is_out_of_memory
from hessdiag.engine.products.real_pairs import real
from hessdiag.engine.products.windows import norm
from hessdiag.errors import HessdiagError, one_line
from hessdiag.problem import Problem
from hessdiag.results import SecondOpinion
from hessdiag.samples import row_count

LOSS_LIMIT = 1e-5
"""Relative. Rounding and another attention kernel leave 1e-6; a shift of the labels moves the loss of a language
model that has learned nothing yet by 1e-3."""
GRADIENT_LIMIT = 1e-2
"""Relative, of a tensor, as for the self-test: half a dependence lost is 0.1 and more."""
HALF_LIMITS = (5e-2, 0.3)
"""The same where the model computes in half precision and is measured in single: a bfloat16 gradient is known to
some percents, tensor by tensor."""
LOSS_FLOOR = 1e-6  # absolute: the rounding of a confident example's cross-entropy in single precision


def second_opinion(operator: Curvature, gradient: Tensor) -> tuple[SecondOpinion | None, list[Finding]]:
    """Compare the measured loss and gradient with the user's own; costs one gradient of the sample set.

    Where batches are mappings that hold labels, and the model returns a loss for them, also with that: two more
    forward passes of a batch.

    Args:
        operator: what will be measured.
        gradient: its gradient (P,) of the mean loss, float64.

    Returns:
        The numbers, and what they say; None, and a warning, where the user's own pass cannot be made.
    """
    own = PlainModel(operator)
    loss_limit, gradient_limit = HALF_LIMITS if own.half else (LOSS_LIMIT, GRADIENT_LIMIT)
    try:
        with own.evaluating():
            passed = own.gradient()
            returned = own.returned_losses()
    except HessdiagError:
        raise
    except Exception as error:  # the user's code can raise anything
        if is_kept_graph(error):
            return None, [Finding("fault", "second opinion", KEPT_GRAPH)]
        return None, [Finding("warning", "second opinion", _not_made(operator, error))]
    off, worst = _worst_tensor(operator, gradient, passed)
    scale = max(abs(passed.loss), passed.loss_scale)
    numbers = SecondOpinion(
        loss=passed.loss,
        loss_off=abs(passed.loss - operator.loss()) / max(scale, 1e-300),
        gradient_off=off,
        worst_tensor=worst,
        model_loss=returned[0].theirs if returned else None,
    )
    findings = [*_outside(passed.outside), *_returned(operator.problem, returned, loss_limit)]
    if not numbers.loss_off * scale <= loss_limit * scale + LOSS_FLOOR:
        findings.append(Finding("fault", "second opinion", _another_loss(operator, numbers)))
    elif not off <= gradient_limit:
        findings.append(Finding("fault", "second opinion", _another_gradient(numbers, passed)))
    else:
        text = f"the model's own loss agrees to {numbers.loss_off:.1g}, its gradient to {off:.1g} (worst {worst})"
        findings.append(Finding("ok", "second opinion", text))
    return numbers, findings


def _worst_tensor(operator: Curvature, gradient: Tensor, own: Passed) -> tuple[float, str]:
    """Largest relative difference over tensors, and its name; next to no gradient counts against the whole."""
    whole = math.hypot(*own.sizes)
    worst, name = 0.0, operator.layout[0][0]
    pieces = zip(operator.layout, operator.function.split(gradient), own.gradient, own.sizes, strict=True)
    for (label, count), measured, theirs, size in pieces:
        theirs = real(theirs)
        off = norm(measured.to(theirs.device, torch.float64) - theirs.double())
        share = 0.02 * whole * math.sqrt(count / operator.size)
        error = off / max(size, norm(measured), share, 1e-300) if off else 0.0
        if not error <= worst:
            worst, name = error, label
    return worst, name


def _not_made(operator: Curvature, error: Exception) -> str:
    if is_out_of_memory(error):
        rows = row_count(operator.batches[0])
        return f"out of memory on the plain model: not made; a `batch_size` below {rows} makes it"
    text = f"not made, the plain model fails on a batch ({type(error).__name__}: {one_line(error, 120)}): "
    return text + "nothing but hessdiag itself has checked which function is measured"


def _outside(shapes: Sequence[tuple[int, ...]]) -> list[Finding]:
    if not shapes:
        return []
    numbers = sum(math.prod(shape) for shape in shapes)
    text = f"the loss also depends on {numbers:,} trainable numbers that the model does not hold (first shape "
    text += f"{shapes[0]}; a criterion's own?): they stay fixed; make them a part of Problem(model=...) to count"
    return [Finding("warning", "parameters", text)]


def _returned(problem: Problem, returned: Sequence[Returned], limit: float) -> list[Finding]:
    """What the model's own ``model(**batch).loss`` says to the criterion."""
    for one in returned:
        if abs(one.ours - one.theirs) > limit * max(abs(one.ours), abs(one.theirs)) + LOSS_FLOOR:
            text = f"criterion={_name(problem)} gives {one.ours:.6g} where model(**batch).loss is {one.theirs:.6g}"
            text += f": {ANSWERS[one.reading]}"
            if problem.loss_chosen:
                return [Finding("note", "model's loss", f"{text.partition(': ')[0]}: another loss was asked for")]
            return [Finding("fault" if problem.built_in is not None else "warning", "model's loss", text)]
    return []


_UNMASKED = (
    'the labels of padding count, which the model leaves out by attention_mask: give batch["labels"] as '
    'batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)'
)
ANSWERS: dict[Reading, str] = {
    "as is": 'the model compares position t with label t: give criterion="cross_entropy"',
    "shifted": 'the model compares position t with label t + 1: give criterion="causal_lm"',
    "masked by attention_mask": f'{_UNMASKED}, and criterion="cross_entropy"',
    "shifted, masked by attention_mask": f'{_UNMASKED}, and criterion="causal_lm"',
    "other": "give loss=lambda model, batch: model(**batch).loss",
}
"""The cause, where it is known, and the line to type."""


def _name(problem: Problem) -> str:
    return problem.loss_name if problem.built_in is None else problem.built_in.shown


def _another_loss(operator: Curvature, numbers: SecondOpinion) -> str:
    return (
        f"the model's own loss is {numbers.loss:.6g}, the measured one {operator.loss():.6g}: the model computes "
        f"another function with copies of its weights ({_dtype(operator)}, evaluation mode); look in its forward "
        "for weights or buffers that are not read from the module, for casts and for a dependence on the batch"
    )


def _dtype(operator: Curvature) -> str:
    return str(operator.dtype).removeprefix("torch.")


def _another_gradient(numbers: SecondOpinion, own: Passed) -> str:
    text = f"the gradient by model.parameters() differs from the measured one by {numbers.gradient_off:.2g} in "
    text += f"{numbers.worst_tensor}: "
    if own.custom:
        return text + f"{own.custom[0]} is written by hand and reads weights past its arguments; pass them to it"
    return text + "a part of the model reads that weight otherwise than from its module; read it there in forward"
