"""The term of noise stability optimization's bound that a checkpoint's own numbers give."""

from __future__ import annotations

import math

from hessdiag.engine.squares.curved import curved_tensors
from hessdiag.engine.squares.gauss_newton import gauss_newton_trace
from hessdiag.errors import Refused
from hessdiag.gap.checkpoint import Checkpoint
from hessdiag.gap.measures.pac_bayes import distance_squared
from hessdiag.gap.registry import Reading, found, measure


@measure(
    "nso_trace_term",
    title="Trace term of NSO's bound (not a certificate)",
    family="pac-bayes",
    formula="sqrt(C alpha r²/m), C the largest loss, alpha the largest trace, r = |w - w0|",
    source="Zhang, Li and Ju (arXiv 2306.08553), theorem on the Hessian trace",
    invariant=("permutation",),
    cost="one gradient per output and example",
)
def nso_trace_term(checkpoint: Checkpoint) -> Reading | Refused:
    """The term √(C α r²/m) of L(w) ≤ (1 + e) L̂(w) + (1 + e) √(C α r²/m) + ξ, with the constant 1 of the paper.

    C is the largest loss and α the largest trace of an example's Hessian among those measured, r = |w − w₀| this
    run's own distance: the theorem wants their suprema over all data and all hypotheses, and a bounded loss, so
    this is never a certificate: among more examples both maxima can only be larger, so its interval has no upper
    end. Deriving it from a Gaussian posterior gives a constant of 1/2 (``half_constant``); ``bound`` is L̂ plus
    the term.
    Cost: one gradient per output and example.
    """
    distance = distance_squared(checkpoint)
    if isinstance(distance, Refused):
        return distance
    trace = gauss_newton_trace(checkpoint.operator, seed=checkpoint.seed)
    if isinstance(trace, Refused):
        return Refused(f"traces of single examples cannot be had: {trace}")
    if not trace.exact:
        return Refused("traces of single examples are estimated here, and the largest of estimates would be noise")
    kept = trace.counts > 0
    alpha = float((trace.per_example[0][kept] / trace.counts[kept]).max())
    worst = float(checkpoint.scores.loss.max())
    value = math.sqrt(max(worst * alpha, 0.0) * distance / checkpoint.training_size)
    curved = checkpoint.operator.kind == "hessian" and bool(curved_tensors(checkpoint.operator))
    note = "not a certificate: C, alpha and r are maxima over what was measured"
    more = {"half_constant": value / math.sqrt(2), "C": worst, "alpha": alpha, "r": math.sqrt(distance)}
    more["bound"] = checkpoint.loss + value
    return found(value, note + "; alpha is of the Gauss-Newton matrix" * curved, **more)
