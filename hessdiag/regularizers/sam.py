"""Sharpness-aware minimization: the gradient is taken where the loss is largest, to first order, within rho."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from hessdiag.engine.products.ranks import Pieces
from hessdiag.engine.training.training import norm
from hessdiag.regularizers.reference_call import two_calls
from hessdiag.regularizers.schedules import Schedule
from hessdiag.regularizers.two_steps import TwoSteps
from hessdiag.regularizers.wrapped import between


class SAM(TwoSteps):
    """SAM (Foret et al. 2021, arXiv 2010.01412, section 3): min over w of max over |e| <= rho of L(w + e).

    To first order the maximum is at e = rho g / |g|, with g = ∇L(w) and |g| over all parameters together. The step
    takes ∇L(w + e), e held constant, on the same batch: a descent direction of L + rho |∇L| up to O(rho²).
    A gradient of zero has no direction: e = 0 then.

    Four calls do the same: ``step(closure)``; `backward` and ``step()``; `first_step` and `second_step`; and the
    constructor of the reference implementation, ``SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1)``.

    Cost: 2 gradients and one copy of the weights and of the gradient.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([3.0, 4.0]))
    >>> sam = SAM(torch.optim.SGD([w], lr=0.1), rho=0.5)
    >>> loss = sam.step(lambda: (w**2).sum() / 2)  # at w + e the gradient is 1.1 w
    >>> [round(float(x), 3) for x in w.detach()], round(sam.report["penalty"], 3)
    ([2.67, 3.56], 2.625)

    Args:
        optimizer: any torch optimizer but LBFGS; its weight decay and momentum act at w.
        rho: radius, from 0; 0.05 is the paper's CIFAR setting, 0.01 to 0.2 what others sweep. A number or a
            schedule (`hessdiag.regularizers.schedules`); "rho" in a parameter group overrides it there (the norm
            |g| stays over all groups).
        adaptive: as `ASAM`, with eta = 0 as in the reference implementation.
        options: ``scaler``, ``clip_norm``, ``same_randomness``, ``model``, ``every``, ``backward_inside``, of
            `Regularizer`.
    """

    @two_calls
    def __init__(
        self, optimizer: Optimizer, rho: Schedule = 0.05, *, adaptive: bool = False, **options: Any
    ) -> None:
        super().__init__(optimizer, **options)
        self.rho, self.adaptive, self.eta = rho, adaptive, 0.0
        self.scheduled("rho", rho)

    def ascent(self, params: tuple[Tensor, ...], gradient: Pieces) -> Pieces:
        """The move e from w to the worst point within rho, to first order; None where the gradient is."""
        stretched = tuple(None if g is None else g * self.metric(w) for w, g in zip(params, gradient, strict=True))
        length = norm(stretched) or 1.0
        sides = zip(params, stretched, self.scheduled("rho", self.rho), strict=True)
        return tuple(None if g is None else g.mul_(self.metric(w)).mul_(rho / length) for w, g, rho in sides)

    def metric(self, weight: Tensor) -> Tensor | float:
        """The diagonal of T, in whose inverse the radius is measured: |T⁻¹ e| <= rho; 1, or |w| + eta."""
        return weight.detach().abs() + self.eta if self.adaptive else 1.0


class ASAM(SAM):
    """Adaptive SAM (Kwon et al. 2021, arXiv 2102.11600, section 3): the radius is relative to each weight.

    max over |T⁻¹ e| <= rho with T = diag(|w| + eta), so e = rho T² g / |T g|: rescaling a layer and undoing it in
    the next changes nothing (up to eta). The step takes ∇L(w + e) with e and T held constant.

    Cost: 2 gradients, as `SAM`, with the same calls.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    >>> asam = ASAM(torch.optim.SGD([w], lr=0.1), rho=0.5)
    >>> loss = asam.step(lambda: (w**2).sum())

    Args:
        optimizer: as for `SAM`.
        rho: relative radius, from 0; 0.5 is the paper's CIFAR setting, swept from 0.1 to 2 there.
        eta: keeps the radius of weights near zero positive; 0.01 in the paper.
        options: of `Regularizer`.
    """

    @two_calls
    def __init__(self, optimizer: Optimizer, rho: Schedule = 0.5, eta: float = 0.01, **options: Any) -> None:
        options.setdefault("adaptive", True)
        super().__init__(optimizer, rho, **options)
        self.eta = between("eta", eta, 0)
