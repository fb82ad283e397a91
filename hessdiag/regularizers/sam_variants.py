"""Variants of SAM on its base: another move, another combination of the two gradients, or fewer of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hessdiag.engine.products.ranks import Pieces
from hessdiag.engine.training.batch_loss import BatchLoss
from hessdiag.engine.training.training import dot, norm
from hessdiag.errors import UsageError
from hessdiag.regularizers.pieces import added, fitting
from hessdiag.regularizers.reference_call import two_calls
from hessdiag.regularizers.sam import SAM
from hessdiag.regularizers.schedules import Schedule
from hessdiag.regularizers.wrapped import between


class USAM(SAM):
    """SAM without the norm: e = rho ∇L(w) (Andriushchenko and Flammarion 2022, arXiv 2206.06232).

    The step takes ∇L(w + rho ∇L(w)), to first order the gradient of L + (rho/2) |∇L|², so the move vanishes where
    the gradient does. Cost: 2 gradients.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> loss = USAM(torch.optim.SGD([w], lr=0.1), rho=0.1).step(lambda: (w**2).sum() / 2)
    >>> [round(float(x), 2) for x in w.detach()]
    [2.67, 3.56]

    Args:
        optimizer: as for `SAM`.
        rho: from 0, in units of weight per gradient, not a length: SAM's rho over a typical |∇L| is a start. Below
            1 / lambda_max, or the move leaves the range in which it is small.
        options: of `SAM` and `Regularizer`.
    """

    def ascent(self, params: tuple[Tensor, ...], gradient: Pieces) -> Pieces:
        """The move rho T² g; T = 1 unless ``adaptive``."""
        sides = zip(params, gradient, self.scheduled("rho", self.rho), strict=True)
        return tuple(None if g is None else g * self.metric(w) * self.metric(w) * rho for w, g, rho in sides)


class MSAM(SAM):
    """m-SAM: a worst point for each micro-batch, m of its examples (Foret et al. 2021, section 4.1, m-sharpness).

    The step takes the mean over micro-batches B of ∇L_B(w + rho g_B / |g_B|), g_B = ∇L_B(w), to first order the
    gradient of mean L_B + rho |∇L_B|; `SAM` on a list of closures takes one move for their mean. Micro-batches are
    the closures of ``step([closure, ...])``, on each rank its own. Smaller m did better in arXiv 2206.06232.

    Cost: 2 gradients of the whole batch. Two calls per step (`first_step`) are refused.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> sam = MSAM(torch.optim.SGD([w], lr=0.1), rho=0.5)
    >>> loss = sam.step([lambda: w[0] ** 2, lambda: w[1] ** 2])  # each moves its own weight, by 0.5
    >>> w.grad.tolist()
    [1.5, 1.5]

    Args:
        optimizer: as for `SAM`.
        rho: radius of every micro-batch, as of `SAM`.
        options: of `SAM` and `Regularizer`.
    """

    def regularized(self, batch: BatchLoss) -> Pieces:
        """The mean over micro-batches of the gradient at their own worst points."""
        parts: list[BatchLoss] = []
        total: Pieces | None = None
        for part in batch.parts():  # one by one: each begins with the random numbers that the last one left
            parts.append(part)
            with batch.moved(self.ascent(batch.params, part.gradient())):
                total = added(total, part.gradient(), 1.0)
        gradient = batch.mean_of_parts(parts, tuple(g if g is None else g / len(parts) for g in total or ()))
        self._measured = {"penalty": float(batch.losses[1] - batch.losses[0])}
        return gradient

    def first_step(self, zero_grad: bool = True) -> None:  # noqa: ARG002 - as SAM's
        """Refused: ``.grad`` holds the sum over micro-batches only."""
        msg = "MSAM moves by micro-batch: step([closure, ...]), closures returning losses; SAM takes two calls"
        raise UsageError(msg)


class GSAM(SAM):
    """Surrogate gap guided SAM (Zhuang et al. 2022, arXiv 2203.08065, algorithm 1).

    With g = ∇L(w), g_p = ∇L(w + e) and g⊥ the part of g orthogonal to g_p, the step takes g_p − alpha g⊥: it
    descends the loss at w + e as SAM does, and climbs L along g⊥, which to first order leaves that loss as it is.
    So the surrogate gap L(w + e) − L(w) shrinks; at a minimum it is about rho² lambda_max / 2.

    Cost: 2 gradients.

    >>> import torch
    >>> from hessdiag.regularizers.schedules import proportional_to_lr
    >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> rho = proportional_to_lr(0.1, lr_max=0.05)
    >>> sam = GSAM(torch.optim.SGD([w], lr=0.05), rho, alpha=0.2)
    >>> loss = sam.step(lambda: w[0] ** 2 + 3 * w[1] ** 2)

    Args:
        optimizer: as for `SAM`.
        rho: radius; in the paper tied to the learning rate, see `schedules.proportional_to_lr`.
        alpha: strength of the climb, from 0 (`SAM`); L falls while alpha |g⊥|² < g·g_p.
        options: of `SAM` and `Regularizer`.
    """

    @two_calls
    def __init__(self, optimizer: Optimizer, rho: Schedule = 0.05, alpha: float = 0.2, **options: Any) -> None:
        super().__init__(optimizer, rho, **options)
        self.alpha = between("alpha", alpha, 0)

    def combined(self, here: Pieces, there: Pieces) -> Pieces:
        """g_p − alpha g⊥."""
        return added(there, across(here, there), -self.alpha)


class LookSAM(SAM):
    """SAM whose second gradient is taken every k-th step (Liu et al. 2022, arXiv 2203.02714, algorithm 1).

    On those steps g_v, the part of ∇L(w + e) orthogonal to g = ∇L(w), is kept; the steps between take
    g + alpha (|g| / |g_v|) g_v. It changes slowly, says the paper, so it serves k steps.

    Cost: 1 + 1/k gradients a step, and a copy of the weights' size for g_v.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> sam = LookSAM(torch.optim.SGD([w], lr=0.05), every=5)
    >>> losses = [sam.step(lambda: w[0] ** 2 + 3 * w[1] ** 2) for _ in range(10)]  # 12 gradients

    Args:
        optimizer: as for `SAM`.
        rho: radius, as of `SAM`.
        alpha: strength of the kept part, from 0 (`SAM` with ``every``); 0.7 in public implementations.
        every: k; the paper takes 5.
        options: of `SAM` and `Regularizer`.

    Attributes:
        part: g_v, one tensor per parameter; None before the first step.
    """

    kept = ("part",)

    @two_calls
    def __init__(
        self, optimizer: Optimizer, rho: Schedule = 0.05, alpha: float = 0.7, every: int = 5, **options: Any
    ) -> None:
        super().__init__(optimizer, rho, every=every, **options)
        self.alpha = between("alpha", alpha, 0)
        self.part: Pieces | None = None

    def combined(self, here: Pieces, there: Pieces) -> Pieces:
        """∇L(w + e), its part across ∇L(w) kept."""
        self.part = across(there, here)
        return there

    def between(self, batch: BatchLoss) -> Pieces:
        """The gradient g + alpha (|g| / |g_v|) g_v."""
        gradient, part = batch.gradient(), fitting(self.part, batch.params)
        length = norm(part) if part else 0.0
        return added(gradient, part, self.alpha * norm(gradient) / length) if part and length else gradient


class FriendlySAM(SAM):
    """Friendly-SAM (Li et al. 2024, arXiv 2403.12350): the move follows the gradient's noise, not its mean.

    m ← decay m + (1 − decay) g is the running mean of the batches' gradients, from 0; d = g − removed m estimates
    the noise of this batch, and e = rho d / |d|. The step takes ∇L(w + e). With full batches d only measures how
    the gradient changes: it is meant for mini-batches.

    Cost: 2 gradients, and a copy of the weights' size for m.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> loss = FriendlySAM(torch.optim.SGD([w], lr=0.05)).step(lambda: w[0] ** 2 + 3 * w[1] ** 2)

    Args:
        optimizer: as for `SAM`.
        rho: radius, as of `SAM`.
        removed: the paper's sigma, from 0 (`SAM`) to 1, its setting.
        decay: the paper's lambda, from 0 to 1; 0.9 in its public code.
        options: of `SAM` and `Regularizer`.

    Attributes:
        mean: m, one tensor per parameter; None before the first step.
    """

    kept = ("mean",)

    @two_calls
    def __init__(
        self, optimizer: Optimizer, rho: Schedule = 0.05, removed: float = 1.0, decay: float = 0.9, **options: Any
    ) -> None:
        super().__init__(optimizer, rho, **options)
        self.removed, self.decay = between("removed", removed, 0, 1), between("decay", decay, 0, 1)
        self.mean: Pieces | None = None
        self._next: Pieces | None = None

    def ascent(self, params: tuple[Tensor, ...], gradient: Pieces) -> Pieces:
        """The move rho d / |d|."""
        old = fitting(self.mean, params) or tuple(None if g is None else torch.zeros_like(g) for g in gradient)
        decayed = tuple(None if m is None else m * self.decay for m in old)
        self._next = added(decayed, gradient, 1 - self.decay)
        return super().ascent(params, added(gradient, self._next, -self.removed))

    def combined(self, here: Pieces, there: Pieces) -> Pieces:
        """∇L(w + e); the running mean moves only now, as a failed step must leave it."""
        self.mean, self._next = self._next, None
        return super().combined(here, there)


def across(a: Pieces, b: Pieces) -> Pieces:
    """The part of a orthogonal to b, over all parameters together."""
    square = dot(b, b)
    return added(a, b, -dot(a, b) / square) if square else a
