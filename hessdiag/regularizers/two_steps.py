"""SAM's step in two calls, as other packages have it: the user differentiates, by ``loss.backward()``, twice."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _NormBase

from hessdiag.engine.products.ranks import Pieces, mean_over_ranks
from hessdiag.engine.products.real_pairs import real
from hessdiag.engine.products.restoring import Weights
from hessdiag.engine.training.batch_loss import BatchLoss
from hessdiag.engine.training.closures import Closures
from hessdiag.engine.training.training import norm
from hessdiag.errors import NonFiniteError, UsageError
from hessdiag.regularizers.wrapper import Regularizer


class TwoSteps(Regularizer):
    """A regularizer whose gradient is made of those at w and at w + e, in one call or in two.

        loss_of(batch).backward()
        sam.first_step()  # the weights go to w + e
        loss_of(batch).backward()
        sam.second_step(zero_grad=True)  # back to w, and the inner optimizer steps

    Gradients are the caller's, so what ``step(closure)`` does by itself is left to the caller here: dropout masks
    differ between the two passes, and NaN in the second leaves w only after `put_back`. BatchNorm statistics are
    those after the first pass if ``model=`` is given; else they move twice.

    A subclass implements `ascent` and, where the step is not the gradient at w + e, `combined`.
    """

    _begun: tuple[Weights, Pieces, list[tuple[Tensor, Tensor]]] | None = None

    @abstractmethod
    def ascent(self, params: tuple[Tensor, ...], gradient: Pieces) -> Pieces:
        """The move e from w."""

    def combined(self, here: Pieces, there: Pieces) -> Pieces:  # noqa: ARG002 - variants take both
        """The gradient to step with, of those at w and at w + e."""
        return there

    def regularized(self, batch: BatchLoss) -> Pieces:
        """Of ∇L(w) and ∇L(w + e), what the variant makes of them."""
        here = batch.gradient()
        with batch.moved(self.ascent(batch.params, here)):
            there = batch.gradient()
        self._measured = {"penalty": float(batch.losses[1] - batch.losses[0])}
        return self.combined(here, there)

    def first_step(self, zero_grad: bool = True) -> None:
        """Moves the weights to w + e by the gradients in ``.grad``.

        Args:
            zero_grad: empty ``.grad`` for the second pass. False leaves it to the caller.

        Raises:
            UsageError: it was called already, there are no gradients, or ``scaler=`` or ``every=`` is set.
            NonFiniteError: a gradient is NaN or infinite; the weights were not moved.
        """
        if self._begun is not None:
            self._refuse(".first_step was called already: backward() at the moved weights, then second_step()")
        if self._scaler is not None or self.every > 1:
            self._refuse(" with scaler= or every= steps in one call: step(closure), closure returning the loss")
        params = self.trained()
        here = self._gradients(params, "first_step: call loss.backward() before it")
        pairs = tuple(real(param.detach()) for param in params)
        moves = self.ascent(pairs, here)
        weights = Weights(pairs)
        with torch.no_grad():
            for pair, move in zip(pairs, moves, strict=True):
                if move is not None:
                    pair.add_(move)
        self._begun = (weights, here, self._statistics())
        if zero_grad:
            self.zero_grad()

    def second_step(self, zero_grad: bool = False) -> None:
        """Puts the weights back to w and steps with the gradients in ``.grad``, taken at w + e.

        Args:
            zero_grad: empty ``.grad`` afterwards.

        Raises:
            UsageError: `first_step` was not called, or there are no gradients; in the latter case the weights stay
                at w + e.
            NonFiniteError: a gradient is NaN or infinite; the weights are back at w.
        """
        if self._begun is None:
            self._refuse(".second_step without first_step: backward(), first_step(), backward() come before it")
        params, here = self.trained(), self._begun[1]
        try:
            there = self._gradients(params, "second_step: call loss.backward() at the moved weights before it")
        except NonFiniteError:
            self.put_back()
            raise
        self.put_back()
        self._measured, self._loss = {}, torch.tensor(math.nan)
        self._assign(params, self.combined(here, there), 1.0)
        self._move(params)
        self.steps += 1
        if zero_grad:
            self.zero_grad()

    def put_back(self) -> None:
        """Gives up a step after `first_step`: the weights are at w again, bit for bit. Else nothing happens."""
        if self._begun is not None:
            weights, _, statistics = self._begun
            self._begun = None
            weights.restore()
            for buffer, value in statistics:
                buffer.copy_(value)

    def step(self, closure: Closures | None = None) -> Tensor:  # type: ignore[override]
        """One step in one call, see `Regularizer.step`; refused between `first_step` and `second_step`."""
        self._refuse_between("step")
        return super().step(closure)

    def backward(self, closure: Closures) -> Tensor:
        """The first half of `step`, see `Regularizer.backward`; refused between `first_step` and `second_step`."""
        self._refuse_between("backward")
        return super().backward(closure)

    def state_dict(self) -> dict[str, Any]:
        """See `Regularizer`; refused between `first_step` and `second_step`, where the weights are not w."""
        self._refuse_between("state_dict")
        return super().state_dict()

    def __getstate__(self) -> dict[str, Any]:
        self._refuse_between("a copy")
        return super().__getstate__()

    def _refuse_between(self, what: str) -> None:
        if self._begun is not None:
            msg = f"{what} between first_step and second_step: the weights are moved; second_step() or put_back()"
            raise UsageError(msg)

    def _gradients(self, params: tuple[Tensor, ...], missing: str) -> Pieces:
        """What is in ``.grad``, the mean over ranks (under DistributedDataParallel it is that already)."""
        held = tuple(None if param.grad is None else real(param.grad.detach()).clone() for param in params)
        _, pieces = mean_over_ranks(torch.zeros((), device=params[0].device), held, tuple(real(p) for p in params))
        if all(piece is None for piece in pieces):
            msg = f"no parameter has a gradient in {type(self).__name__}.{missing}"
            raise UsageError(msg)
        if not math.isfinite(norm(pieces)):
            msg = (
                f"{type(self).__name__}: the gradient's norm is {norm(pieces)}; the weights are as before the step"
            )
            raise NonFiniteError(msg)
        return pieces

    def _statistics(self) -> list[tuple[Tensor, Tensor]]:
        layers = [] if self._model is None else [m for m in self._model.modules() if isinstance(m, _NormBase)]
        return [(b, b.clone()) for layer in layers for b in layer.buffers(recurse=False)]
