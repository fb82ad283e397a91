"""Worst-case sharpness: how much the loss rises at the worst point near the weights, as far as a search finds it.

A search finds a lower bound of the maximum, so [lo, hi] is [value, ∞). SAM's point is no search: it is one step of
known length, and its rise is exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hessdiag.errors import Refused
from hessdiag.gap.checkpoint import Checkpoint
from hessdiag.gap.measures.ascent import Norm, auto_pgd, largest_in_box
from hessdiag.gap.measures.groups import groups
from hessdiag.gap.measures.perturbations import ANDRIUSHCHENKO, NO_CLASSES
from hessdiag.gap.registry import Reading, exact, found, measure

ASCENT_BYTES = 64 * 2**20  # of one tensor (batches, P) in float64: about eight of them are held
FUNCTION_PRESERVING = ("layer rescaling", "neuron rescaling", "permutation")


def worst_rise(
    checkpoint: Checkpoint, radius: float, norm: Norm, *, adaptive: bool, normalize: bool = False
) -> Reading | Refused:
    """Mean over groups S of max L_S(w + d) − L_S(w) over |d / c| ≤ radius, c = |w| or 1, as far as found.

    Every group of m = min(128, N) examples has a worst point of its own (m-sharpness, with the paper's m),
    however they are divided into batches. Cost: 21 gradients.

    Args:
        checkpoint: at w.
        radius: of the ball.
        norm: of the ball.
        adaptive: whether c = |w|.
        normalize: whether the loss is that of normalised logits.
    """
    op, by_group = checkpoint.operator, groups(checkpoint, normalize=normalize)
    landscape, shares = by_group.landscape, by_group.shares
    before, own = dict(landscape.counts), checkpoint.normalized if normalize else checkpoint.landscape
    c = checkpoint.theta.double().abs() if adaptive else torch.ones(op.size, dtype=torch.float64, device=op.device)
    together = max(1, ASCENT_BYTES // (8 * op.size))
    worst = torch.zeros(by_group.number, dtype=torch.float64)
    for some, pieces in by_group.chunks(together):
        within = slice(pieces.start, pieces.stop)
        group, share = (by_group.of[within] - some.start).to(op.device), shares[within].to(op.device)

        def rise(
            points: Tensor, pieces: range = pieces, group: Tensor = group, share: Tensor = share
        ) -> tuple[Tensor, Tensor]:
            # in units of c: there the ball is round, and a rescaling of the layers is not seen at all
            losses, grads = landscape.losses_and_gradients(points[group] * c, pieces)
            sums = torch.zeros_like(points[:, 0]).index_add_(0, group, losses * share)
            rises = torch.zeros_like(points).index_add_(0, group, grads * share[:, None]) * c
            return sums.nan_to_num(-math.inf, -math.inf), rises.nan_to_num(0.0, 0.0, 0.0)

        found_there = auto_pgd(rise, len(some), op.size, radius, norm, device=op.device)
        worst[some.start : some.stop] = found_there.cpu()
    value = by_group.mean(worst - by_group.losses())
    if landscape is not own:  # what it cost is the checkpoint's
        op.seconds += landscape.operator.seconds
        for what, number in landscape.counts.items():
            own.counts[what] += number - before[what]
    if not math.isfinite(value):
        return Refused("the loss overflows at this checkpoint")
    # the ascent starts at w: below 0 there is only the rounding between two ways of summing
    return found(max(value, 0.0), by_group.note, radius=radius)


@measure(
    "worst_sharpness",
    title="Worst-case sharpness in a ball",
    family="sharpness",
    formula="E_S max L_S(w + d) - L_S(w) over |d|_2 <= rho, rho = 0.5, groups S of m = 128",
    source=ANDRIUSHCHENKO,
    invariant=("permutation",),
    cost="21 gradients and 1 forward pass",
)
def worst_sharpness(checkpoint: Checkpoint, rho: float = 0.5) -> Reading | Refused:
    """S_max with c = 1 and the Euclidean norm; rho |g| + rho²/2 · lambda_max(H) for small rho.

    Source: Andriushchenko et al. 2023, section 2; rho from their grid .25 to 2. By auto-PGD, 20 steps.
    Cost: 21 gradients and 1 forward pass.
    """
    return worst_rise(checkpoint, rho, "l2", adaptive=False)


@measure(
    "worst_sharpness_box",
    title="Worst-case sharpness in a box",
    family="sharpness",
    formula="E_S max L_S(w + d) - L_S(w) over |d_i| <= rho, rho = 0.002, groups S of m = 128",
    source=ANDRIUSHCHENKO,
    invariant=("permutation",),
    cost="21 gradients and 1 forward pass",
)
def worst_sharpness_box(checkpoint: Checkpoint, rho: float = 0.002) -> Reading | Refused:
    """S_max with c = 1 and the maximum norm; rho |g|_1 for small rho.

    Source: as `worst_sharpness`; rho from the grid .0005 to .004. Cost: 21 gradients and 1 forward pass.
    """
    return worst_rise(checkpoint, rho, "linf", adaptive=False)


@measure(
    "worst_sharpness_adaptive",
    title="Adaptive worst-case sharpness in a ball",
    family="sharpness",
    formula="E_S max L_S(w + d) - L_S(w) over |d / w|_2 <= rho, rho = 0.5, groups S of m = 128",
    source=ANDRIUSHCHENKO,
    invariant=FUNCTION_PRESERVING,
    cost="21 gradients and 1 forward pass",
)
def worst_sharpness_adaptive(checkpoint: Checkpoint, rho: float = 0.5) -> Reading | Refused:
    """S_max with c = |w|: the radius is relative to each weight; for small rho, rho |w g| + rho²/2 · λ_max(WHW).

    Source: Andriushchenko et al. 2023, section 2, after Kwon et al. 2021, whose rho it is. The search runs in
    units of |w|, so a rescaling that keeps the function leaves every step as it is.
    Cost: 21 gradients and 1 forward pass.
    """
    return worst_rise(checkpoint, rho, "l2", adaptive=True)


@measure(
    "worst_sharpness_adaptive_box",
    title="Adaptive worst-case sharpness in a box",
    family="sharpness",
    formula="E_S max L_S(w + d) - L_S(w) over |d_i| <= rho |w_i|, rho = 0.02, groups S of m = 128",
    source=ANDRIUSHCHENKO,
    invariant=FUNCTION_PRESERVING,
    cost="21 gradients and 1 forward pass",
)
def worst_sharpness_adaptive_box(checkpoint: Checkpoint, rho: float = 0.02) -> Reading | Refused:
    """S_max with c = |w| and the maximum norm; rho |w g|_1 for small rho.

    Source: as `worst_sharpness_adaptive`; rho = .02 is ours: with weights of about .1 the box is then about that
    of `worst_sharpness_box`. Cost: 21 gradients and 1 forward pass.
    """
    return worst_rise(checkpoint, rho, "linf", adaptive=True)


@measure(
    "worst_sharpness_normalized",
    title="Adaptive worst-case sharpness in a box, on normalised logits",
    family="sharpness",
    formula="as worst_sharpness_adaptive_box, of the loss on centred logits of length 1",
    source=ANDRIUSHCHENKO,
    invariant=(*FUNCTION_PRESERVING, "logit scaling"),
    cost="21 gradients and 2 forward passes",
)
def worst_sharpness_normalized(checkpoint: Checkpoint, rho: float = 0.02) -> Reading | Refused:
    """`worst_sharpness_adaptive_box` of the loss on logits that are centred and divided by their length.

    Source: Andriushchenko et al. 2023, section 2 (logit normalization). Scaling the output layer does not move it.
    Cost: 21 gradients and 2 forward passes.
    """
    if not checkpoint.landscape.positions:
        return NO_CLASSES
    return worst_rise(checkpoint, rho, "linf", adaptive=True, normalize=True)


@measure(
    "sam_sharpness",
    title="SAM ascent",
    family="sharpness",
    formula="L(w + rho g / |g|) - L(w), rho = 0.05",
    source="Foret et al. 2021 (arXiv 2010.01412), section 3",
    invariant=("permutation",),
    cost="1 gradient and 2 forward passes",
)
def sam_sharpness(checkpoint: Checkpoint, rho: float = 0.05) -> Reading | Refused:
    """What SAM adds to the loss: the rise at its point w + rho g / |g|, g the gradient of the whole sample set.

    ``more`` holds the first-order part rho |g|. rho = .05 is the paper's for CIFAR. Cost: 1 gradient and 2 forward
    passes.
    """
    return _one_step(checkpoint, torch.ones_like(checkpoint.gradient), rho)


@measure(
    "asam_sharpness",
    title="Adaptive SAM ascent",
    family="sharpness",
    formula="L(w + rho T² g / |T g|) - L(w), T = diag(|w| + 0.01), rho = 0.5",
    source="Kwon et al. 2021 (arXiv 2102.11600), section 3",
    invariant=("permutation",),
    cost="1 gradient and 2 forward passes",
)
def asam_sharpness(checkpoint: Checkpoint, rho: float = 0.5, eta: float = 0.01) -> Reading | Refused:
    """The same with a radius relative to each weight. With eta = 0 no rescaling of layers would move it; .01 does.

    rho and eta are the paper's for CIFAR. Cost: 1 gradient and 2 forward passes.
    """
    return _one_step(checkpoint, checkpoint.theta.double().abs() + eta, rho)


@measure(
    "keskar_sharpness",
    title="Sharpness of Keskar et al.",
    family="sharpness",
    formula="100 (max L(w + z) - L(w)) / (1 + L(w)) over |z_i| <= eps (|w_i| + 1), eps = 0.001",
    source="Keskar et al. 2017 (arXiv 1609.04836), metric 2.1, full space",
    invariant=("permutation",),
    cost="about 15 gradients",
)
def keskar_sharpness(checkpoint: Checkpoint, eps: float = 1e-3, iterations: int = 10) -> Reading | Refused:
    """Largest loss in a small box, relative, in percent: by 10 iterations of L-BFGS-B from w, as in the paper.

    eps = .001 is one of the paper's two (the other: .0005). The 1 in the box breaks every invariance to scale.
    Cost: about 15 gradients.
    """
    here = checkpoint.loss
    best = largest_in_box(checkpoint.landscape, eps * (checkpoint.theta.double().abs() + 1), iterations)
    if not (math.isfinite(best) and math.isfinite(here)):
        return Refused("the loss overflows in the box")
    if here <= -1:
        return Refused(f"the loss is {here:.3g}: the measure divides by 1 + loss, which must be positive")
    return found(100 * max(best - here, 0.0) / (1 + here), f"L-BFGS-B, {iterations} iterations")


def _one_step(checkpoint: Checkpoint, metric: Tensor, rho: float) -> Reading | Refused:
    stretched = metric * checkpoint.gradient
    length = float(stretched.norm())
    if length == 0:
        return exact(0.0, "the gradient is zero: there is no direction", first_order=0.0)
    landscape = checkpoint.landscape
    both = torch.stack([torch.zeros_like(stretched), metric * stretched * (rho / length)])
    here, there = landscape.mean(landscape.draws(both).losses).tolist()
    if not math.isfinite(there - here):
        return Refused("the loss overflows at SAM's point")
    return exact(there - here, first_order=rho * length)
