"""Why a loss is another the second time, or is not finite: the cause among those that look alike."""

from __future__ import annotations

import math
from typing import Any

import torch

from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.restoring import random_states
from hessdiag.engine.products.stacking import joined
from hessdiag.samples import divide, leaves, row_count

SAME = 1e-6  # relative: the same loss twice


def differ(a: float, b: float) -> bool:
    """Whether two finite losses that ought to be the same are not."""
    return math.isfinite(a) and abs(a - b) > SAME * max(abs(a), abs(b))


def why_it_changes(operator: Curvature, batch: Any) -> str:
    """What makes the loss of a batch change from pass to pass; two more passes, from the same random state."""
    function = operator.function
    replayed = []
    with function.measuring(), torch.no_grad():
        for _ in range(2):
            with random_states(operator.device):
                replayed.append(float(function.total(function.theta, batch)))
    if differ(*replayed):
        return (
            "something in the model or the loss changes from pass to pass, and it is not the random numbers of "
            "torch, numpy or Python (a counter in forward, a buffer that each pass rewrites, a generator of its "
            "own): let evaluation mode leave it alone"
        )
    return (
        "the model draws random numbers in evaluation mode (functional dropout, noise, sampling); switch that off"
    )


def why_not_finite(operator: Curvature) -> str:
    """What makes the mean loss NaN or infinite: data, a mean over nothing, or arithmetic; and the way out.

    Costs a forward pass of each example of one batch.
    """
    losses, weights = operator.batch_losses, operator.weights.tolist()
    pairs = list(zip(losses, weights, strict=True))
    bad = next((n for n, (loss, weight) in enumerate(pairs) if weight and not math.isfinite(loss)), None)
    arithmetic = "look for overflow or log(0); try `dtype='float64'`"
    if bad is None:
        return arithmetic
    batch = operator.batches[bad]
    row = _not_finite_row(batch)
    if row is not None:
        return f"row {row} of batch {bad} (from 0) is NaN or infinite in the data itself: take that example out"
    fine = next((n for n, (loss, _) in enumerate(pairs) if math.isfinite(loss)), None)
    with operator.timed(), torch.no_grad():
        whole = joined([batch, operator.batches[fine]]) if fine is not None else None
        # what is NaN stays NaN in company; a mean over no terms does not
        if (whole is not None and math.isfinite(_loss(operator, whole))) or _all_negative(batch):
            return (
                f"no target of batch {bad} (from 0) counts, they are all ignored, and the mean over none is 0/0: "
                "leave such examples out, or take a larger `batch_size`"
            )
        ones = [_loss(operator, one) for one in divide(batch, 1)]
    rows = [n for n, loss in enumerate(ones) if not math.isfinite(loss)]
    if rows and len(rows) < len(ones):
        some = f"{len(rows)} of {len(ones)} examples of batch {bad} (from 0), first row {rows[0]}"
        return f"so it is for {some}: {arithmetic}"
    return arithmetic


def _not_finite_row(batch: Any) -> int | None:
    rows = row_count(batch)
    for leaf in leaves(batch):
        if rows and len(leaf) == rows and (leaf.is_floating_point() or leaf.is_complex()):
            wrong = (~torch.isfinite(leaf)).reshape(rows, -1).any(1)
            if bool(wrong.any()):
                return int(wrong.nonzero()[0])
    return None


def _all_negative(batch: Any) -> bool:
    """Whether a tensor of whole numbers is negative throughout: labels that do not count, in every batch."""
    whole = [leaf for leaf in leaves(batch) if not leaf.is_floating_point() and not leaf.is_complex()]
    return any(leaf.numel() > 0 and bool((leaf < 0).all()) for leaf in whole)


def _loss(operator: Curvature, batch: Any) -> float:
    try:
        return operator._mean(batch)
    except Exception:  # the user's code, on a batch it has not made itself
        return math.nan
