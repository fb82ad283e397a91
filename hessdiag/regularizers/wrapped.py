"""An optimizer around another: shared parameter groups, copies, pickles and states, without a step of its own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NoReturn

from torch import Tensor
from torch.optim import LBFGS, Optimizer

from hessdiag.errors import UsageError
from hessdiag.regularizers.schedules import ByLearningRate, Schedule


class Wrapped(Optimizer):
    """What every regularizer keeps of the optimizer it wraps; see `Regularizer` for the step.

    Attributes:
        inner: the optimizer that moves the weights; ``param_groups`` and ``state`` are its own objects.
        steps: steps that came to their end, those a GradScaler skipped included.
    """

    kept: tuple[str, ...] = ()  # attributes of a subclass that `state_dict` is to hold

    def __init__(self, optimizer: Optimizer) -> None:
        """Wraps any torch optimizer but LBFGS.

        Raises:
            UsageError: not a torch optimizer, LBFGS, or another regularizer.
        """
        if not isinstance(optimizer, Optimizer) or isinstance(optimizer, LBFGS | Wrapped):
            kind = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
            what = f"{kind}: {self.example()}, then step(closure)"
            self._refuse(f" wraps a torch optimizer such as SGD or AdamW, not {what}")
        super().__init__(optimizer.param_groups, {})
        self.inner, self.steps = optimizer, 0
        self._share()

    @classmethod
    def example(cls) -> str:
        """How to make one, for messages."""
        return f"{cls.__name__}(torch.optim.SGD(model.parameters(), lr=0.1))"

    def scheduled(self, name: str, schedule: Schedule) -> tuple[float, ...]:
        """The present value of a setting, one per parameter that requires a gradient.

        Args:
            name: of the setting; a number under this key in a parameter group overrides the schedule there.
            schedule: a number, a function of the number of steps taken, or one tied to the group's learning rate.

        Raises:
            UsageError: a value is negative, NaN, infinite or no number.
        """
        if isinstance(schedule, ByLearningRate):
            values = ((g[name] if name in g else schedule.of(float(g["lr"]))) for _, g in self._members())
            return tuple(self._valid(name, value) for value in values)
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
        """The inner optimizer's state, and under "regularizer" this one's: its name, steps and own state.

        ``torch.load`` reads it with ``weights_only=True``.
        """
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
        """Of the inner optimizer; not needed between steps with a closure, which replace ``.grad``."""
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


def whole(name: str, value: object) -> int:
    """``value`` if it is a whole number from 1 up.

    Raises:
        UsageError: it is not.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        msg = f"{name}={value!r}: allowed: whole numbers from 1 up"
        raise UsageError(msg)
    return value


def between(name: str, value: object, low: float, high: float = math.inf) -> float:
    """``value`` if it is a finite number from low to high.

    Raises:
        UsageError: it is not.
    """
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not low <= value <= high
        or value == math.inf
    ):
        said = f"finite numbers from {low:g} up" if high == math.inf else f"numbers from {low:g} to {high:g}"
        msg = f"{name}={value!r}: allowed: {said}"
        raise UsageError(msg)
    return float(value)
