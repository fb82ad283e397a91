"""What regularizers share: one call, ``step(closure)``, that differentiates and lets the inner optimizer move."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, Optimizer

from hessdiag.engine.products.ranks import Pieces
from hessdiag.engine.products.real_pairs import like
from hessdiag.engine.training.batch_loss import BatchLoss
from hessdiag.engine.training.training import Closures
from hessdiag.errors import NonFiniteError, UsageError

Scaler = torch.amp.GradScaler
Schedule = float | Callable[[int], float]


class Regularizer(Optimizer):
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

    Attributes:
        inner: the optimizer that moves the weights.
        steps: calls of `step` that came to their end, those a GradScaler skipped included.
    """

    kept: tuple[str, ...] = ()  # attributes of a subclass that `state_dict` is to hold
    # GradScaler.step then hands over without looking for gradients, and `step` says what to do instead
    _step_supports_amp_scaling = True

    def __init__(
        self,
        optimizer: Optimizer,
        *,
        scaler: Scaler | None = None,
        clip_norm: float | None = None,
        same_randomness: bool = True,
        model: nn.Module | None = None,
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
            unknown: options that do not exist, such as the inner optimizer's own; refused.

        Raises:
            UsageError: not a torch optimizer, LBFGS, another regularizer, an unknown option, or clip_norm not
                positive.
        """
        example = f"{type(self).__name__}(torch.optim.SGD(model.parameters(), lr=0.1))"
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, LBFGS | Regularizer):
            kind = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
            what = f"{kind}: {example}, then step(closure)"
            self._refuse(f" wraps a torch optimizer such as SGD or AdamW, not {what}")
        if unknown:
            names = ", ".join(unknown)
            self._refuse(f" has no option {names}: the inner optimizer takes its own, as in {example}")
        if clip_norm is not None and not (math.isfinite(clip_norm) and clip_norm > 0):
            msg = f"clip_norm={clip_norm}: allowed: positive numbers, or None for no clipping"
            raise UsageError(msg)
        super().__init__(optimizer.param_groups, {})
        self.inner, self.steps = optimizer, 0
        self._scaler, self._clip_norm = scaler, clip_norm
        self._passes: dict[str, Any] = {"same_randomness": same_randomness, "model": model}
        self._share()

    @abstractmethod
    def regularized(self, batch: BatchLoss) -> Pieces:
        """The gradient to step with, one piece per parameter of ``batch.params``, None to leave one alone.

        All passes go through ``batch`` (`gradient`, `curved`, `third`, `moved`), which counts them, updates
        BatchNorm once, replays randomness, averages over ranks and refuses NaN. The weights are back at the
        step's own when it returns.
        """

    def step(self, closure: Closures | None = None) -> Tensor:  # type: ignore[override]
        """One optimization step.

        Args:
            closure: returns the scalar loss of the current batch without calling backward; or a list of them.

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
        if closure is None:
            self._refuse(".step needs a closure that returns the loss: step(lambda: loss_of(batch))")
        params = self.trained()
        scaler = self._scaler if self._scaler is not None and self._scaler.is_enabled() else None
        scale = 1.0
        if scaler is not None:
            scaler.scale(torch.zeros((), device=params[0].device))  # the scaler is set up by its first use
            scale = scaler.get_scale()
        try:
            with BatchLoss(closure, params, scale=scale, **self._passes) as batch:
                pieces = self.regularized(batch)
        except NonFiniteError:
            if scaler is None:
                raise
            pieces = (torch.full_like(params[0], math.inf), *[None] * (len(params) - 1))
        self._move(params, pieces, scaler, scale)
        self.steps += 1
        return batch.loss if batch.loss is not None else torch.tensor(math.nan, device=params[0].device)

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

    def scheduled(self, name: str, schedule: Schedule) -> tuple[float, ...]:
        """The present value of a setting, one per parameter of `trained`.

        Args:
            name: of the setting; a number under this key in a parameter group overrides the schedule there.
            schedule: a number, or a function of the number of steps taken.

        Raises:
            UsageError: a value is negative, NaN, infinite or no number.
        """
        value = self._valid(name, schedule(self.steps) if callable(schedule) else schedule)
        return tuple(self._valid(name, group[name]) if name in group else value for _, group in self._members())

    def own_state(self) -> dict[str, Any]:
        """What the subclass keeps between steps: the numbers and tensors named in ``kept``."""
        return {name: getattr(self, name) for name in self.kept}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """The inverse of `own_state`."""
        for name in self.kept:
            setattr(self, name, state[name])

    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state, and under "regularizer" this one's: its name, steps and own state."""
        own = {"name": type(self).__name__, "steps": self.steps} | self.own_state()
        return self.inner.state_dict() | {"regularizer": own}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken.

        Raises:
            UsageError: the state is of another regularizer or of a bare optimizer.
        """
        own, name = state_dict.get("regularizer"), type(self).__name__
        if own is None or own["name"] != name:
            found = "a bare optimizer" if own is None else own["name"]
            msg = f"this state is of {found}, not of {name}: load an optimizer's own state into {name}.inner"
            raise UsageError(msg)
        self.inner.load_state_dict({key: value for key, value in state_dict.items() if key != "regularizer"})
        self._share()
        self.steps = int(own["steps"])
        self.load_own_state(own)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Of the inner optimizer; not needed between steps, as `step` replaces ``.grad``."""
        self.inner.zero_grad(set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """To the inner optimizer, whose groups these are."""
        if not hasattr(self, "inner"):  # torch's constructor adds the first groups
            super().add_param_group(param_group)
            return
        self.inner.add_param_group(param_group)

    def __getstate__(self) -> dict[str, Any]:
        """All but hooks and the methods that a scheduler has wrapped: they are bound to this object's weights."""
        return {
            name: value
            for name, value in self.__dict__.items()
            if not name.startswith("_optimizer_") and not (callable(value) and hasattr(type(self), name))
        }

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"

    def _refuse(self, why: str) -> NoReturn:
        msg = type(self).__name__ + why
        raise UsageError(msg)

    def _members(self) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        for group in self.inner.param_groups:
            for param in group["params"]:
                if param.requires_grad:
                    yield param, group

    def _share(self) -> None:
        self.param_groups, self.state = self.inner.param_groups, self.inner.state
        self.defaults = self.inner.defaults

    @staticmethod
    def _valid(name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
            msg = f"{name}={value!r}: allowed: finite numbers from 0 up, or a function of the step giving one"
            raise UsageError(msg)
        return float(value)

    def _move(self, params: tuple[Tensor, ...], pieces: Pieces, scaler: Scaler | None, scale: float) -> None:
        for param, piece in zip(params, pieces, strict=True):
            own = None if piece is None else like(piece, param)
            param.grad = own if own is None or scaler is None else own * scale
        if scaler is not None:
            scaler.unscale_(self.inner)
        if self._clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(params, self._clip_norm)
        if scaler is None:
            self.inner.step()
            return
        scaler.step(self.inner)
        scaler.update()
