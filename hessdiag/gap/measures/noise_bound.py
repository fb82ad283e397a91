"""The bound of noise stability optimization, of a checkpoint's own numbers: its trace term, and the whole.

With probability 1 − δ over the n training examples, for every hypothesis W within r of the start of training,

    L(W) ≤ (1 + ε) L̂(W) + (1 + ε) √(C α r² / n) + ξ,    ξ = O(n^(−3/4) log(1/δ))

(Zhang, Li and Ju, arXiv 2306.08553, theorem on the Hessian trace), C the largest loss, α the largest trace of an
example's Hessian, both over all data and hypotheses. The paper gives no constant of ξ. What δ costs is known from
the inequality it starts from (McAllester 2013, arXiv 1307.2118, theorem 2): with β = 1 / (1 + ε),

    L(Q) ≤ L̂(Q)/β + C (KL(Q|P) + ln(1/δ)) / (2 β (1 − β) n).

N(w₀, s² I) as prior and N(W, s² I) as posterior give KL = r²/(2s²), and to second order L(Q) = L(W) + s²/2 · tr H.
The best s is s² = r √(C/(2nα)) / (1 − β), at which both parts together are (1 + ε) √(C α r²/(2n)): the paper's
constant 1 is the larger one, and the one reported. Left out are the third order in s and how far the trace over
the sample is from that over all data; nobody's constant of these is known.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from hessdiag.engine.squares.curved import curved_tensors
from hessdiag.engine.squares.gauss_newton import gauss_newton_trace
from hessdiag.errors import Refused
from hessdiag.gap.checkpoint import Checkpoint
from hessdiag.gap.measures.pac_bayes import distance_squared
from hessdiag.gap.measures.weighted_trace import CONFIDENCE
from hessdiag.gap.registry import Reading, largest_seen, measure
from hessdiag.results.interval import mean_interval

EPSILON = 0.1
"""Fixed before any data are seen, as the theorem asks: the loss counts a tenth more, δ costs 6 C log(1/δ)/n."""
DELTA = 0.05
ZHANG = "Zhang, Li and Ju (arXiv 2306.08553), theorem on the Hessian trace"
COST = "one gradient per output and example"
NO_CERTIFICATE = "not a certificate: C, alpha and r are maxima over what was measured"


@dataclass(frozen=True, kw_only=True)
class Largest:
    """What the theorem wants over all data and hypotheses, as large as it was among those measured.

    Attributes:
        loss: C.
        trace: α, of one example.
        distance: r = |w − w₀|, of this run alone.
        examples: n, trained on.
        note: what α is of, where it is not the Hessian.
    """

    loss: float
    trace: float
    distance: float
    examples: int
    note: str = ""

    @property
    def term(self) -> float:
        """√(C α r²/n)."""
        return self.distance * math.sqrt(max(self.loss * self.trace, 0.0) / self.examples)

    def numbers(self) -> dict[str, float]:
        """By the names of the theorem."""
        return {"C": self.loss, "alpha": self.trace, "r": self.distance, "n": float(self.examples)}


def largest(checkpoint: Checkpoint) -> Largest | Refused:
    """The theorem's maxima among the examples measured. One gradient per output and example, once a checkpoint."""
    return checkpoint.once("maxima of NSO's bound", lambda: _largest(checkpoint))


@measure(
    "nso_trace_term",
    title="Trace term of NSO's bound (not a certificate)",
    family="pac-bayes",
    formula="sqrt(C alpha r²/n), C the largest loss, alpha the largest trace, r = |w - w0|",
    source=ZHANG,
    invariant=("permutation",),
    cost=COST,
)
def nso_trace_term(checkpoint: Checkpoint) -> Reading | Refused:
    """The term √(C α r²/n), with the constant 1 of the paper; for the whole bound see `nso_bound`.

    C is the largest loss and α the largest trace of an example's Hessian among those measured, r = |w − w₀| this
    run's own distance: the theorem wants their suprema over all data and all hypotheses, and a bounded loss, so
    this is never a certificate: among more examples both maxima can only be larger, so its interval has no upper
    end. Deriving it from a Gaussian posterior gives a constant of 1/2 (``half_constant``).
    Cost: one gradient per output and example.
    """
    known = largest(checkpoint)
    if isinstance(known, Refused):
        return known
    half = known.term / math.sqrt(2)
    return largest_seen(known.term, NO_CERTIFICATE + known.note, half_constant=half, **known.numbers())


@measure(
    "nso_bound",
    title="NSO's PAC-Bayes bound as a whole (not a certificate)",
    family="pac-bayes",
    formula="(1 + e) L + (1 + e) sqrt(C alpha r²/n) + C (1 + e)² log(1/d) / (2 e n), e = 0.1, d = 0.05",
    source=f"{ZHANG}; its last term: McAllester 2013 (arXiv 1307.2118), theorem 2",
    invariant=("permutation",),
    cost=COST,
)
def nso_bound(checkpoint: Checkpoint) -> Reading | Refused:
    """The bound on the loss over all data: training loss, trace term, and what the confidence 1 − δ costs.

    In units of the loss. ``more`` has the three terms (``loss_term``, ``trace_term``, ``confidence_term``, which
    add up to the value), their constants (``C``, ``alpha``, ``r``, ``n``, ``epsilon``, ``delta``), the bound with
    the derived constant 1/2 (``half_constant``), and the noise s at which the derivation attains it (``sigma``).
    ε = 0.1 and δ = 0.05 are ours, fixed before any data are seen. Maxima are of a sample, so the interval has no
    upper end; below, it reaches down by the error of the training loss where not all examples were measured. A
    value of C or more says nothing, and the note says so. Where the training set was learned by heart, C and α
    are tiny there, and the value falls below the measured gap: see `hessdiag explain zhang2023`.
    Cost: one gradient per output and example.
    """
    known = largest(checkpoint)
    if isinstance(known, Refused):
        return known
    more = bound_terms(checkpoint.loss, known)
    value = more["loss_term"] + more["trace_term"] + more["confidence_term"]
    less = 0.0
    if checkpoint.examples < checkpoint.training_size:
        _, low, _ = mean_interval(checkpoint.scores.loss.cpu().double().numpy(), CONFIDENCE, what="examples")
        less = (1 + EPSILON) * max(float(checkpoint.scores.loss.mean()) - low, 0.0)
    vacuous = "; it says nothing: no loss measured is larger" if value >= known.loss else ""
    return largest_seen(value, NO_CERTIFICATE + known.note + vacuous, less=less, **more)


def bound_terms(
    loss: float, known: Largest, *, epsilon: float = EPSILON, delta: float = DELTA
) -> dict[str, float]:
    """The terms of the bound and the constants in them.

    Args:
        loss: mean over the training examples.
        known: the maxima.
        epsilon: ε, chosen before the data are seen.
        delta: δ, the chance that the bound fails.
    """
    factor, n = 1 + epsilon, known.examples
    parts = {
        "loss_term": factor * loss,
        "trace_term": factor * known.term,
        "confidence_term": known.loss * factor**2 * math.log(1 / delta) / (2 * epsilon * n),
    }
    share = 1 - 1 / factor  # 1 − β
    noise = known.distance * math.sqrt(known.loss / (2 * n * known.trace)) / share if known.trace > 0 else 0.0
    half = sum(parts.values()) - parts["trace_term"] * (1 - math.sqrt(0.5))
    return {
        **parts,
        "half_constant": half,
        "sigma": math.sqrt(noise),
        "epsilon": epsilon,
        "delta": delta,
        **known.numbers(),
    }


def _largest(checkpoint: Checkpoint) -> Largest | Refused:
    distance = distance_squared(checkpoint)
    if isinstance(distance, Refused):
        return distance
    trace = gauss_newton_trace(checkpoint.operator, seed=checkpoint.seed)
    if isinstance(trace, Refused):
        return Refused(f"traces of single examples cannot be had: {trace}")
    if not trace.exact:
        return Refused("traces of single examples are estimated here, and the largest of estimates would be noise")
    kept = trace.counts > 0
    curved = checkpoint.operator.kind == "hessian" and bool(curved_tensors(checkpoint.operator))
    return Largest(
        loss=float(checkpoint.scores.loss.max()),
        trace=float((trace.per_example[0][kept] / trace.counts[kept]).max()),
        distance=math.sqrt(distance),
        examples=checkpoint.training_size,
        note="; alpha is of the Gauss-Newton matrix" * curved,
    )
