"""Embeddings that mask their gradient at padding_idx: whether that leaves anything out.

torch.embedding reads the row of the padding and gives it no gradient. Where padded positions do not reach the loss
(an attention mask, labels of -100) nothing is left out, and H is the Hessian. Where they reach it, what is trained
follows no gradient of the loss, and products are no derivative of anything. The self-test sees that on its 16
examples only; here all are looked at.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from hessdiag.engine.checks.facts import Finding
from hessdiag.engine.checks.jumps import moved
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.failures import is_out_of_memory
from hessdiag.engine.products.substitutes import masked_rows
from hessdiag.samples import divide

LEFT_OUT = 1e-5
"""Of the gradient's norm: an attention mask of -10000 leaves exactly 0, rounding less than this."""


def masked_gradients(operator: Curvature) -> list[Finding]:
    """A fault if embeddings leave out a part of the gradient on any example.

    Looked at a little away from the checkpoint, since a head of zeros hides what reaches it. Costs a forward pass
    of two examples; a gradient of the sample set where embeddings mask a row at all.

    Returns:
        Nothing where no row is masked; else one finding.
    """
    theta = moved(operator)
    with operator.timed(), operator.function.measuring():
        if not _gradients(operator, theta, next(divide(operator.batches[0], 2)))[0]:
            return []
        try:
            share, module = _largest(operator, theta)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            text = (
                "an embedding masks its gradient at padding_idx; out of memory on whether padding reaches the loss"
            )
            return [Finding("warning", "padding", f"{text}: a smaller `batch_size`, or set padding_idx = None")]
    if share <= LEFT_OUT:
        return [Finding("ok", "padding", "rows at padding_idx do not reach the loss: masking leaves nothing out")]
    text = f"{module} masks its gradient at padding_idx, but padded positions reach the loss ({share:.2g} of the "
    text += f"gradient is left out): set {module}.padding_idx = None, or keep padding out of the loss by a mask"
    return [Finding("fault", "padding", text)]


def _largest(operator: Curvature, theta: tuple[Tensor, ...]) -> tuple[float, str]:
    """The largest share of a batch's gradient that a mask leaves out, and the module that masks it."""
    names = {id(tensor): name for tensor, name in zip(theta, operator.function.names, strict=True)}
    worst, where = 0.0, ""
    for batch in operator.batches:
        left, whole = _gradients(operator, theta, batch)
        for weight, size in left:
            share = size / max(whole, size, 1e-300)
            if share > worst:
                worst, where = share, names.get(id(weight), "")
    return worst, where.removesuffix(".weight") or "an embedding"


def _gradients(
    operator: Curvature, theta: tuple[Tensor, ...], batch: Any
) -> tuple[list[tuple[Tensor, float]], float]:
    """For each lookup that masks, its table and the size of what is left out; the size of the gradient."""
    function = operator.function
    with masked_rows() as lookups:
        total = function.total(theta, function.place(batch))
    if not lookups or not total.requires_grad:
        return [(weight, 0.0) for weight, _ in lookups], 0.0
    rows = [row for _, row in lookups]
    grads = torch.autograd.grad(total, (*rows, *theta), materialize_grads=True)
    sizes = [float(grad.double().norm()) for grad in grads]
    left = [(weight, size) for (weight, _), size in zip(lookups, sizes, strict=False)]
    return left, math.hypot(*sizes[len(rows) :])
