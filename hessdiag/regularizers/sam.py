"""Sharpness-aware minimization: the gradient is taken where the loss is largest, to first order, within rho."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from hessdiag.engine.products.ranks import Pieces
from hessdiag.engine.training.batch_loss import BatchLoss
from hessdiag.engine.training.training import norm
from hessdiag.errors import UsageError
from hessdiag.regularizers.wrapper import Regularizer, Schedule


class SAM(Regularizer):
    """SAM (Foret et al. 2021, arXiv 2010.01412, section 3): min over w of max over |e| <= rho of L(w + e).

    To first order the maximum is at e = rho g / |g|, with g = ∇L(w) and |g| over all parameters together. The step
    takes ∇L(w + e), e held constant, on the same batch: a descent direction of L + rho |∇L| up to O(rho²).
    A gradient of zero has no direction: e = 0 then.

    Cost: 2 gradients and one copy of the weights and of the gradient.

    Args:
        optimizer: any torch optimizer but LBFGS; its weight decay and momentum act at w.
        rho: radius, from 0; 0.05 is the paper's CIFAR setting. A number or a function of the steps taken; "rho" in
            a parameter group overrides it there (the norm |g| stays over all groups).
        options: ``scaler``, ``clip_norm``, ``same_randomness``, ``model``, of `Regularizer`.
    """

    def __init__(self, optimizer: Optimizer, rho: Schedule = 0.05, **options: Any) -> None:
        super().__init__(optimizer, **options)
        self.rho = rho
        self.scheduled("rho", rho)

    def regularized(self, batch: BatchLoss) -> Pieces:
        """∇L(w + e)."""
        moves = self.ascent(batch.params, batch.gradient())
        with batch.moved(moves):
            return batch.gradient()

    def ascent(self, params: tuple[Tensor, ...], gradient: Pieces) -> Pieces:
        """The move e from w to the worst point within rho, to first order; None where the gradient is."""
        stretched = tuple(None if g is None else g * self.metric(w) for w, g in zip(params, gradient, strict=True))
        length = norm(stretched) or 1.0
        sides = zip(params, stretched, self.scheduled("rho", self.rho), strict=True)
        return tuple(None if g is None else g.mul_(self.metric(w)).mul_(rho / length) for w, g, rho in sides)

    def metric(self, weight: Tensor) -> Tensor | float:  # noqa: ARG002 - ASAM's depends on it
        """The diagonal of T, in whose inverse the radius is measured: |T⁻¹ e| <= rho."""
        return 1.0

    def first_step(self, *_: Any, **__: Any) -> None:
        """Two calls per step, as other SAM packages have them, do not exist here.

        Raises:
            UsageError: always, with the call to make instead.
        """
        msg = f"{type(self).__name__} steps in one call: step(closure), closure returning the loss, no backward()"
        raise UsageError(msg)

    second_step = first_step


class ASAM(SAM):
    """Adaptive SAM (Kwon et al. 2021, arXiv 2102.11600, section 3): the radius is relative to each weight.

    max over |T⁻¹ e| <= rho with T = diag(|w| + eta), so e = rho T² g / |T g|: rescaling a layer and undoing it in
    the next changes nothing (up to eta). The step takes ∇L(w + e) with e and T held constant.

    Cost: 2 gradients, as `SAM`.

    Args:
        optimizer: as for `SAM`.
        rho: relative radius, from 0; 0.5 is the paper's CIFAR setting.
        eta: keeps the radius of weights near zero positive; 0.01 in the paper.
        options: of `Regularizer`.
    """

    def __init__(self, optimizer: Optimizer, rho: Schedule = 0.5, eta: float = 0.01, **options: Any) -> None:
        super().__init__(optimizer, rho, **options)
        if isinstance(eta, bool) or not 0 <= eta < float("inf"):
            msg = f"eta={eta!r}: allowed: finite numbers from 0 up"
            raise UsageError(msg)
        self.eta = eta

    def metric(self, weight: Tensor) -> Tensor | float:
        """|w| + eta."""
        return weight.detach().abs() + self.eta
