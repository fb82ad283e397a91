"""What regularizers share: one call, ``step(closure)``, that differentiates and lets the inner optimizer move."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hessdiag.engine.products.ranks import Pieces
from hessdiag.engine.products.real_pairs import like
from hessdiag.engine.training.batch_loss import BatchLoss
from hessdiag.engine.training.closures import Closures
from hessdiag.errors import NonFiniteError, UsageError
from hessdiag.regularizers.schedules import Schedule
from hessdiag.regularizers.wrapped import Wrapped, whole

__all__ = ["Regularizer", "Schedule"]


class Regularizer(Wrapped):
    """Base of the wrappers: ``SAM(optimizer, rho=0.05)``, then ``loss = sam.step(closure)``.

    ``closure()`` computes and returns the loss of the current batch, anew at each call, and calls no ``backward``.
    A list of closures, one per micro-batch, is gradient accumulation: the loss is their mean. A step is:

    1. the subclass's `regularized` gradient, by passes over the batch that leave the weights as they were;
    2. ``.grad`` is set to it (whatever was there is replaced), clipped if asked;
    3. the inner optimizer steps: weight decay and momentum act on the unperturbed weights.

    An exception, KeyboardInterrupt, NaN or infinity in any pass leaves weights, BatchNorm statistics, ``.grad``
    and the optimizer's state as they were. BatchNorm statistics move once, in the first pass. A complex parameter
    counts as two real ones. Learning-rate schedulers take the wrapper or the inner optimizer alike:
    ``param_groups`` and ``state`` are the same objects. Under ``torch.distributed`` losses, gradients and products
    are means over all ranks, with or without ``DistributedDataParallel``, whose hooks do not fire.

    Gains in accuracy at equal gradients may measure early stopping: with two gradients a step half as many
    steps are left. Compare with early stopping and weight decay, and curvature at equal loss (docs: regularizers).

    Attributes:
        inner: the optimizer that moves the weights.
        steps: calls of `step` that came to their end, those a GradScaler skipped included.
    """

    # GradScaler.step then hands over without looking for gradients, and `step` says what to do instead
    _step_supports_amp_scaling = True

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        scaler: torch.amp.GradScaler | None = None,
        clip_norm: float | None = None,
        same_randomness: bool = True,
        model: nn.Module | None = None,
        every: int = 1,
        backward_inside: bool = False,
        **unknown: Any,
    ) -> None:
        """Wraps an optimizer.

        Args:
            optimizer: any torch optimizer but LBFGS.
            scaler: a GradScaler for float16 autocast. `step` scales, unscales, steps and updates it: do not call
                it yourself. Infinity in any pass skips the step and lowers the scale.
            clip_norm: the largest norm of the final gradient, over all parameters, as ``clip_grad_norm_``.
            same_randomness: all passes of a step draw the same random numbers, so that dropout masks agree.
            model: where BatchNorm layers are. Not needed, a hook finds them, but ``torch.compile`` compiles anew
                at every hook: give it the module that was compiled.
            every: k: the penalty acts at every k-th step only, the others take one plain gradient (`between`).
                Strengths mu count k times and NSO's variance sigma² k times, so that their mean over the steps
                stays; the radius of SAM does not change. Of c gradients a step, c/k + 1 − 1/k are left.
            backward_inside: the closure calls ``zero_grad`` and ``backward`` by itself, as closures for LBFGS and
                those of Lightning's automatic optimization do. Not for penalties that need products.
            unknown: options that do not exist, such as the inner optimizer's own; refused.

        Raises:
            UsageError: not a torch optimizer, LBFGS, another regularizer, an unknown option, clip_norm not
                positive, or ``every`` no whole number from 1 up.
        """
        super().__init__(optimizer)
        if unknown:
            names = ", ".join(unknown)
            self._refuse(f" has no option {names}: the inner optimizer takes its own, as in {self.example()}")
        if clip_norm is not None and not (math.isfinite(clip_norm) and clip_norm > 0):
            msg = f"clip_norm={clip_norm}: allowed: positive numbers, or None for no clipping"
            raise UsageError(msg)
        if backward_inside and scaler is not None:
            msg = "scaler= needs the loss of every pass: let the closure return it, without backward_inside=True"
            raise UsageError(msg)
        self.every, self._measured = whole("every", every), dict[str, float]()
        self._loss, self._ready = torch.tensor(math.nan), False
        self._scaler, self._clip_norm, self._model = scaler, clip_norm, model
        self._passes: dict[str, Any] = {"same_randomness": same_randomness, "model": model}
        self._passes["backward_inside"] = backward_inside

    @abstractmethod
    def regularized(self, batch: BatchLoss) -> Pieces:
        """The gradient to step with, one piece per parameter of ``batch.params``, None to leave one alone.

        All passes go through ``batch`` (`gradient`, `curved`, `third`, `moved`), which counts them, updates
        BatchNorm once, replays randomness, averages over ranks and refuses NaN. The weights are back at the
        step's own when it returns.
        """

    def between(self, batch: BatchLoss) -> Pieces:
        """The gradient of the steps that ``every`` leaves without a penalty: the plain one."""
        return batch.gradient()

    def step(self, closure: Closures | None = None) -> Tensor:  # type: ignore[override]
        """One optimization step.

        Args:
            closure: returns the scalar loss of the current batch without calling backward; or a list of them.
                None after `backward`, which has taken the gradient.

        Returns:
            The loss of the first pass, detached, the mean over micro-batches and ranks.

        Raises:
            UsageError: no closure, or one that does not return a fresh loss; the weights are untouched.
            NonFiniteError: NaN or infinity in a pass, and no GradScaler to skip the step.
        """
        if hasattr(self, "found_inf"):
            del self.found_inf, self.grad_scale  # type: ignore[attr-defined]  # set by GradScaler.step
            call = f"{type(self).__name__}(optimizer, scaler=scaler)"
            self._refuse(f" calls its GradScaler by itself: {call}, then step(closure)")
        if closure is None and not self._ready:
            self._refuse(".step needs a closure that returns the loss: step(lambda: loss_of(batch))")
        params, scaler, scale = self.trained(), self._scaler, 1.0
        scaler = scaler if scaler is not None and scaler.is_enabled() else None
        if scaler is not None:
            scaler.scale(torch.zeros((), device=params[0].device))  # the scaler is set up by its first use
            scale = scaler.get_scale()
        if closure is not None:
            self._assign(params, self._pieces(closure, params, scale, skips=scaler is not None), scale)
        self._move(params, scaler)
        self._ready = False
        self.steps += 1
        return self._loss

    def backward(self, closure: Closures) -> Tensor:
        """The first half of `step`, for loops that clip or look at ``.grad``: sets it; then call ``step()``.

        It takes the place of ``loss.backward()``; the weights do not move. Arguments, results and errors are those
        of `step`; ``clip_norm`` acts in ``step()``.
        """
        if self._scaler is not None:
            self._refuse(" with scaler= steps in one call: step(closure), which scales and clips")
        params = self.trained()
        self._assign(params, self._pieces(closure, params, 1.0, skips=False), 1.0)
        self._ready = True
        return self._loss

    @property
    def report(self) -> dict[str, float]:
        """What the last step measured, without extra passes, to log or plot.

        Returns:
            "steps" and "loss", and where the regularizer knows it "penalty", in units of the loss, "share" of the
            penalty in loss + penalty, and its own: "lambda" (eigenvalue), "trace", "bound". With ``every`` they
            are of the last step that took the penalty. One batch and few probes: means over steps are meant.
        """
        found = {"steps": float(self.steps), "loss": float(self._loss)} | self._measured
        whole = found["loss"] + found.get("penalty", math.nan)
        return found | ({"share": found["penalty"] / whole} if whole > 0 else {})

    def _pieces(self, closure: Closures, params: tuple[Tensor, ...], scale: float, *, skips: bool) -> Pieces:
        """The gradient to step with; where a scaler skips bad steps, infinity instead of an error."""
        try:
            with BatchLoss(closure, params, scale=scale, **self._passes) as batch:
                regular = self.steps % self.every == 0
                pieces = self.regularized(batch) if regular else self.between(batch)
        except NonFiniteError:
            if not skips:
                raise
            pieces = (torch.full_like(params[0], math.inf), *[None] * (len(params) - 1))
        self._loss = torch.full((), math.nan, device=params[0].device) if batch.loss is None else batch.loss
        return pieces

    def trained(self) -> tuple[Tensor, ...]:
        """The parameters that count, in the order of the groups: those that require a gradient now.

        Raises:
            UsageError: there are none, or none that can be trained so.
        """
        params = tuple(param for param, _ in self._members())
        if not params:
            self._refuse(": every parameter of the optimizer is frozen; set requires_grad on some")
        if any(hasattr(param, "device_mesh") for param in params):
            self._refuse(": parameters are sharded (DTensor), norms would be of a shard: use DDP")
        if self._scaler is not None and any(param.is_complex() for param in params):
            self._refuse(": torch's GradScaler cannot unscale complex gradients: train without one")
        return params

    def _assign(self, params: tuple[Tensor, ...], pieces: Pieces, scale: float) -> None:
        for param, piece in zip(params, pieces, strict=True):
            own = None if piece is None else like(piece, param)
            param.grad = own if own is None or scale == 1.0 else own * scale

    def _move(self, params: tuple[Tensor, ...], scaler: torch.amp.GradScaler | None = None) -> None:
        if scaler is not None:
            scaler.unscale_(self.inner)
        if self._clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, self._clip_norm)
        if scaler is None:
            self.inner.step()
            return
        scaler.step(self.inner)
        scaler.update()
