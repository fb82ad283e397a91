"""Norms of the weights, margins and the Fisher-Rao norm: the simple measures that curvature has to beat.

Layerwise norms take BatchNorm (evaluation mode) folded into the layer before it, as Dziugaite et al. (2020) do. A
convolution counts as its kernel reshaped to (out, in · k · k).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hessdiag.criteria import IGNORE_INDEX
from hessdiag.engine.landscape.scores import classes
from hessdiag.errors import Refused, UsageError, one_line
from hessdiag.gap.checkpoint import Checkpoint
from hessdiag.gap.measures.folding import folded_matrices, path_outputs
from hessdiag.gap.measures.noise import example_statistics
from hessdiag.gap.registry import Reading, exact, measure

JIANG = "Jiang et al. 2020, appendix C"
QUANTILE = 0.1  # of the margins: robust to a few misfits (Jiang et al. 2020, section 6)
HOMOGENEOUS = 1e-4  # relative, single precision: rounding leaves 1e-6
BLIND = ("layer rescaling", "neuron rescaling", "permutation")


@measure(
    "weight_norm",
    title="Norm of the weights",
    family="norms",
    formula="‖θ‖₂",
    source=JIANG,
    invariant=("permutation",),
    cost="none",
)
def weight_norm(checkpoint: Checkpoint) -> Reading | Refused:
    """‖θ‖₂ of the parameters that count, as trained. No invariance but permutation. Cost: none."""
    return exact(float(checkpoint.theta.double().norm()))


@measure(
    "distance_from_start",
    title="Distance from the initial weights",
    family="norms",
    formula="‖θ − θ₀‖₂",
    source=JIANG + "; Nagarajan & Kolter 2019",
    cost="none",
)
def distance_from_start(checkpoint: Checkpoint) -> Reading | Refused:
    """‖θ − θ₀‖₂; needs the initial weights. No invariance: θ₀ stays where it was. Cost: none."""
    if checkpoint.start is None:
        return Refused("the initial weights are not known: give them to know how far training went")
    return exact(float((checkpoint.theta.double() - checkpoint.start.double()).norm()))


@measure(
    "frobenius_sum",
    title="Sum of squared Frobenius norms",
    family="norms",
    formula="Σ_l ‖W_l‖_F²",
    source=JIANG,
    invariant=("permutation",),
    cost="1 forward of a batch, where there is BatchNorm",
)
def frobenius_sum(checkpoint: Checkpoint) -> Reading | Refused:
    """Σ ‖W_l‖_F², BatchNorm folded. No invariance but permutation."""
    weights = folded_matrices(checkpoint)
    return weights if isinstance(weights, Refused) else exact(sum(float(W.square().sum()) for W in weights))


@measure(
    "log_spectral_product",
    title="Product of spectral norms (log)",
    family="norms",
    formula="Σ_l ln ‖W_l‖₂",
    source=JIANG + "; Bartlett et al. 2017",
    invariant=("layer rescaling", "permutation"),
    cost="1 forward of a batch, where there is BatchNorm",
)
def log_spectral_product(checkpoint: Checkpoint) -> Reading | Refused:
    """Σ ln ‖W_l‖₂, BatchNorm folded. Invariant to the scale of layers, not of neurons."""
    value = _log_spectral(checkpoint)
    return value if isinstance(value, Refused) else exact(value)


@measure(
    "log_spectral_over_margin",
    title="Product of squared spectral norms over the squared margin (log)",
    family="norms",
    formula="2 Σ_l ln ‖W_l‖₂ − 2 ln γ, γ the 10th percentile of the margin",
    source=JIANG + " (spectral-product over margin); Bartlett et al. 2017",
    invariant=("layer rescaling", "logit scaling", "permutation"),
    cost="1 forward",
)
def log_spectral_over_margin(checkpoint: Checkpoint) -> Reading | Refused:
    """The log of Π‖W_l‖₂² / γ². Invariant to the scale of layers, that of the logits included; not of neurons."""
    value, margin = _log_spectral(checkpoint), typical_margin(checkpoint)
    if isinstance(value, Refused):
        return value
    if isinstance(margin, Refused):
        return margin
    return exact(2 * value - 2 * math.log(margin))


@measure(
    "path_norm",
    title="Path norm",
    family="norms",
    formula="√(Σ_c f_c(1; θ²)): every weight squared, the input all ones",
    source="Neyshabur et al. 2015; " + JIANG,
    invariant=BLIND,
    cost="3 forwards of one example",
)
def path_norm(checkpoint: Checkpoint) -> Reading | Refused:
    """Root of the sum over paths of squared products of weights, BatchNorm folded, biases as paths of their own.

    A last softmax or log-softmax module is the loss's, and left out. Where activations are not piecewise linear it
    is refused, by value: with squared weights the network must be linear along the ray of ones. Invariant to the
    scale of layers and of neurons. Cost: 3 forwards of one example.
    """
    try:
        outputs = [path_outputs(checkpoint, scale) for scale in (1.0, 2.0, 3.0)]
    except (RuntimeError, TypeError, ValueError, UsageError) as error:
        return Refused(f"the network does not run on squared weights and an input of ones: {one_line(error, 120)}")
    if any(x is None for x in outputs):
        return Refused("the input is not made of numbers (tokens): paths start at input features")
    one, two, three = (x for x in outputs if x is not None)
    bend = float((three - 2 * two + one).abs().max())
    if not math.isfinite(bend) or bend > 1e-9 * float(three.abs().max()) or bool((one < 0).any()):
        return Refused(
            "some layer is not positively homogeneous (tanh, GELU, LayerNorm): its paths have no length"
        )
    return exact(math.sqrt(float(one.sum())))


@measure(
    "inverse_margin",
    title="Inverse squared margin",
    family="norms",
    formula="1/γ², γ the 10th percentile of (true logit − best other)",
    source=JIANG,
    invariant=BLIND,
    cost="1 forward",
)
def inverse_margin(checkpoint: Checkpoint) -> Reading | Refused:
    """1/γ². A function of the outputs alone: blind to every rescaling that keeps them. Cost: 1 forward."""
    margin = typical_margin(checkpoint)
    return margin if isinstance(margin, Refused) else exact(margin**-2, margin=margin)


@measure(
    "fisher_rao",
    title="Fisher-Rao norm",
    family="norms",
    formula="√(E ⟨θ, ∇ℓ⟩²), ℓ at the given labels",
    source="Liang et al. 2019, Definition 2 and Theorem 3.1",
    invariant=BLIND,
    cost="1 gradient per example, shared with the measures of gradient noise",
)
def fisher_rao(checkpoint: Checkpoint) -> Reading | Refused:
    """Root of the mean of ⟨θ, ∇ℓ⟩² over examples.

    For a network positively homogeneous of degree L with cross-entropy, ⟨θ, ∇ℓ⟩ = L (⟨p, f⟩ − f_y); where
    f(2θ) = 2ᴸ f(θ) holds, that side is given too (``closed_form``). Invariant to the scale of layers and neurons.
    """
    statistics = example_statistics(checkpoint)
    if isinstance(statistics, Refused):
        return statistics
    value = float(statistics.along.square().mean().sqrt())
    closed = _closed_fisher_rao(checkpoint)
    return exact(value) if closed is None else exact(value, degree=closed[0], closed_form=closed[1])


def typical_margin(checkpoint: Checkpoint) -> float | Refused:
    """γ, the 10th percentile of the margins; or why 1/γ says nothing."""
    margins = checkpoint.scores.margin
    if margins is None or not len(margins):
        return Refused("there are no integer classes, and so no margins")
    margin = float(torch.quantile(margins.double(), QUANTILE))
    if margin <= 0:
        return Refused(
            f"the margin's 10th percentile is {margin:.3g}: more than a tenth is misclassified, 1/γ says nothing"
        )
    return margin


def _log_spectral(checkpoint: Checkpoint) -> float | Refused:
    weights = folded_matrices(checkpoint)
    if isinstance(weights, Refused):
        return weights
    norms = [float(torch.linalg.matrix_norm(W, 2)) for W in weights]
    if min(norms) <= 0:
        return Refused("a layer's weights are all zero: the logarithm of its norm does not exist")
    return sum(math.log(norm) for norm in norms)


def _closed_fisher_rao(checkpoint: Checkpoint) -> tuple[float, float] | None:
    """(L, L √(E (⟨p, f⟩ − f_y)²)) where the outputs are homogeneous of degree L, shown by value; else None."""
    problem, landscape = checkpoint.problem, checkpoint.landscape
    known = problem.built_in
    if known is None or known.name != "cross_entropy" or not known.plain or problem.weight is not None:
        return None
    here, there = (landscape.outputs(0, shift).detach().double() for shift in (None, checkpoint.theta))
    largest = float(here.abs().max())
    if largest == 0 or not bool(torch.isfinite(there).all()):
        return None
    degree = round(math.log2(max(float(there.abs().max()) / largest, 0.5)))
    if degree < 1 or float((there - 2.0**degree * here).abs().max()) > HOMOGENEOUS * 2.0**degree * largest:
        return None
    squares = [_radial(checkpoint, index) for index in range(len(checkpoint.operator.batches))]
    if any(part is None for part in squares):
        return None
    return float(degree), degree * float(torch.cat([p for p in squares if p is not None]).mean().sqrt())


def _radial(checkpoint: Checkpoint, index: int) -> Tensor | None:
    """(⟨p, f⟩ − f_y)² per example of a batch; None where an example is not one class."""
    outputs = checkpoint.landscape.outputs(index).detach()
    found = classes(checkpoint.problem, outputs, checkpoint.operator.batches[index])
    if found is None or outputs.dim() != 2 or bool((found[1] == IGNORE_INDEX).any()):
        return None
    logits, labels = found[0].double(), found[1]
    true = logits.gather(1, labels[:, None])[:, 0]
    return ((logits.softmax(1) * logits).sum(1) - true).square().cpu()
