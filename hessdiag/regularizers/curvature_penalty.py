"""What the penalties on curvature share: a strength, products as an operator, right third derivatives."""

from __future__ import annotations

from typing import Any, ClassVar, get_args

import torch
from torch import Tensor
from torch.optim import Optimizer

from hessdiag.engine.products.ranks import Pieces
from hessdiag.engine.training.batch_loss import SECOND_STEP, BatchLoss, Method
from hessdiag.engine.training.training import Curved, norm
from hessdiag.errors import MeasurementError, NonFiniteError, UsageError
from hessdiag.operator import SymmetricOperator
from hessdiag.regularizers.schedules import Schedule
from hessdiag.regularizers.wrapper import Regularizer
from hessdiag.spectral.probes import stream


class CurvaturePenalty(Regularizer):
    """Base of the regularizers that step along ∇L + mu ∇R with R a function of the batch's Hessian H.

    Args:
        optimizer: any torch optimizer but LBFGS; its weight decay and momentum act as without a penalty.
        mu: strength, from 0 (then nothing but the gradient is taken); a number or a function of the steps taken;
            "mu" in a parameter group overrides it for that group's part of ∇R.
        third: how third derivatives are taken. "exact": triple backward, refused where torch 2.13 gets it silently
            wrong (LayerNorm, BatchNorm and InstanceNorm on batch statistics); "difference": central
            differences at θ ± h v, which with ReLU also hold the jumps of the gradient that the step crosses,
            divided by h²: take smooth activations there; "auto": exact unless such a layer is met.
        seed: of the random vectors, which are the same on all ranks.
        options: ``scaler``, ``clip_norm``, ``same_randomness``, ``model``, ``every``, of `Regularizer`.
    """

    second_step: ClassVar[dict[torch.dtype, float]] = SECOND_STEP
    kept: tuple[str, ...] = ("seed",)  # with the number of steps it gives all further random vectors

    def __init__(
        self, optimizer: Optimizer, mu: Schedule, *, third: Method = "auto", seed: int = 0, **options: Any
    ) -> None:
        super().__init__(optimizer, **options)
        if third not in get_args(Method):
            msg = f"third={third!r}: allowed: {', '.join(get_args(Method))}"
            raise UsageError(msg)
        self.mu, self.third, self.seed = mu, third, seed
        self.scheduled("mu", mu)

    def form_gradient(self, batch: BatchLoss, curved: Curved, v: Pieces, y: Pieces | None = None) -> Pieces:
        """The gradient of v·H y with v and y held constant, y = v by default.

        Raises:
            MeasurementError: exact where torch is known to be wrong.
            NonFiniteError: it is not finite.
        """
        if self.third == "exact" and not curved.third_order_is_exact:
            msg = "third='exact': torch's third derivatives of LayerNorm, BatchNorm and InstanceNorm on batch "
            raise MeasurementError(msg + "statistics are wrong; use third='auto' or 'difference', or model.eval()")
        exact = self.third == "exact" or (self.third == "auto" and curved.third_order_is_exact)
        if y is None and not exact:
            return self.second_difference(batch, curved.gradient, v)
        return finite("third derivative", batch.third(curved, v, y, method="exact" if exact else "difference"))

    def second_difference(self, batch: BatchLoss, here: Pieces, v: Pieces) -> Pieces:
        """The gradient of v·Hv from gradients alone, as `BatchLoss` forms it, with |hv| by ``second_step``."""
        return finite("third derivative", batch.second_difference(here, v, self.second_step))

    def penalised(self, gradient: Pieces, pieces: Pieces, factor: float = 1.0) -> Pieces:
        """∇L + mu · factor · ``every`` · ∇R; a parameter that takes no part in the loss stays None."""
        sides = zip(gradient, pieces, self.scheduled("mu", self.mu), strict=True)
        factor *= self.every
        return tuple(g if g is None or p is None else g + (mu * factor) * p.to(g.dtype) for g, p, mu in sides)

    def signs(self, params: tuple[Tensor, ...], draw: int) -> tuple[Tensor, ...]:
        """Random signs for this step's probe, one tensor per parameter; the same on every rank and device."""
        generator = stream(self.seed, type(self).__name__, self.steps, draw)
        return tuple(
            torch.randint(2, p.shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1).to(p.device, p.dtype)
            for p in params
        )


class BatchHessian(SymmetricOperator):
    """The Hessian of one batch as an operator on flat vectors, for Lanczos."""

    def __init__(self, curved: Curved) -> None:
        self.curved = curved
        first = curved.params[0]
        dtype = torch.float64 if first.dtype == torch.float64 else torch.float32
        super().__init__(sum(p.numel() for p in curved.params), dtype=dtype, device=first.device)

    def split(self, row: Tensor) -> tuple[Tensor, ...]:
        """A vector (P,) as tensors shaped like the parameters."""
        params = self.curved.params
        pieces = torch.split(row, [p.numel() for p in params])
        return tuple(piece.view_as(p).to(p.device, p.dtype) for piece, p in zip(pieces, params, strict=True))

    def multiply(self, rows: Tensor) -> Tensor:
        """Products with the Hessian of the batch's loss, a row at a time."""
        products = (self.curved.product(self.split(row)) for row in rows)
        flat = [torch.cat([piece.reshape(-1).to(rows) for piece in pieces]) for pieces in products]
        return torch.stack(flat)


def finite(what: str, pieces: Pieces) -> Pieces:
    """The pieces, refused if one is NaN or infinite."""
    if not norm(pieces) < float("inf"):
        msg = f"the {what} is not finite: take a smaller mu or learning rate; the weights were not changed"
        raise NonFiniteError(msg)
    return pieces
