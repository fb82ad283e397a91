"""What the callbacks share: rank 0 measures alone, at steps that every rank knows, and the others wait for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from hessdiag.track import pacing
from hessdiag.track.tracker import Tracker

CALLBACK = "SharpnessCallback"


class OneRank:
    """A tracker on rank 0, and on the other ranks the steps at which it may measure.

    Whether the budget allows for a measurement, rank 0 knows alone; so all wait at every step that is due, whether
    or not something is measured. However rank 0 ends, it comes to the barrier: what it raises is raised after it.

    Args:
        loss: of the model, as `hessdiag.Tracker` takes it; by default the training's own.
        data: to draw samples from; by default the loader of the training.
        every: steps between two measurements, at least.
        log: further loggers, beside the trainer's own.
        trainer: of transformers, whose reports take what is measured.
        **options: of `hessdiag.Tracker`.

    Attributes:
        tracker: from the start of the training on, on rank 0; None elsewhere.
    """

    def __init__(
        self,
        loss: Any = None,
        data: Any = None,
        *,
        every: int = 100,
        log: Any = None,
        trainer: Any = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.loss, self.data, self.every, self.trainer, self.options = loss, data, every, trainer, options
        self.loggers = log if isinstance(log, list) else [] if log is None else [log]
        self.tracker: Tracker | None = None
        self.state: Mapping[str, Any] | None = None
        self._last: int | None = None

    def start(self, model: Any, loss: Any, data: Any, *, optimizer: Any, log: list[Any]) -> None:
        """Make the tracker, and let it go on from a state that was loaded."""
        given = {"every": self.every, "optimizer": optimizer, "log": [*self.loggers, *log], **self.options}
        data = data if self.data is None else self.data
        self.tracker = Tracker(model, loss, data, **given)
        if self.state:
            self.tracker.load_state_dict(self.state)
            self.state = None

    def due(self, step: int) -> bool:
        """Whether all ranks meet at this step."""
        reached, self._last = pacing.due(step, self._last, self.every), step
        return reached

    def step(self, step: int) -> None:
        """Let the tracker measure, on the rank that has one."""
        self._last = step
        if self.tracker is not None:
            self.tracker.step(step)

    @contextmanager
    def waiting(self, barrier: Callable[[], Any]) -> Iterator[None]:
        """A context at whose end the ranks meet."""
        try:
            yield
        finally:
            barrier()


def barrier() -> None:
    """Wait for the other ranks, where there are some."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def made(module: str, name: str, bases: Callable[[], tuple[type, ...]]) -> type:
    """The class `SharpnessCallback` of a module.

    Args:
        module: where it is looked up.
        name: that is looked up.
        bases: of the class; imports the library.

    Raises:
        AttributeError: another name was looked up.
    """
    if name != CALLBACK:
        msg = f"module {module!r} has no attribute {name!r}"
        raise AttributeError(msg)
    found = bases()
    return type(name, found, {"__module__": module, "__doc__": found[0].__doc__})
