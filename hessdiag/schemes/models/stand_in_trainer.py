"""What a training step may ask of its trainer and its logger, where there are none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from hessdiag.errors import ProblemError

WAY_OUT = (
    "give the class a method hessdiag_loss(self, batch) that returns the mean loss, or `loss='cross_entropy'` "
    "of what forward returns"
)
FAMILIES = ("pytorch_lightning", "lightning.pytorch")


def is_lightning(kind: type, name: str) -> bool:
    """Whether a class is one of Lightning's, or derived from it; Lightning comes under two names."""
    return any(one.__name__ == name and one.__module__.startswith(FAMILIES) for one in kind.__mro__)


class StandInTrainer:
    """Answers what holds for one process that takes one step; anything else is refused by name.

    Attributes:
        current_epoch: of the checkpoint.
        global_step: of the checkpoint.
    """

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.current_epoch, self.global_step = (_count(facts.get(name)) for name in ("epoch", "global_step"))
        self.local_rank = self.global_rank = self.node_rank = 0
        self.world_size = self.num_nodes = self.num_devices = 1
        self.is_global_zero = self.training = True
        self.validating = self.testing = self.predicting = self.sanity_checking = self.fast_dev_run = False
        self.log_every_n_steps = 50  # Lightning's default; decides what is logged alone
        self.logger, self.loggers, self.callbacks = Silent(), [Silent()], list[Any]()
        self.progress_bar_callback = None
        self.datamodule: Any = None

    def __getattr__(self, name: str) -> Any:
        """Everything else.

        Raises:
            ProblemError: naming it.
        """
        if name.startswith("__"):
            raise AttributeError(name)
        msg = f"the module asks for trainer.{name}, and there is no trainer here: {WAY_OUT}"
        raise ProblemError(msg)


class Silent:
    """A logger that takes everything and keeps nothing."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Silent()

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Silent again: ``logger.experiment.add_scalar(...)``."""
        return Silent()


def attach(model: nn.Module, trainer: StandInTrainer) -> None:
    """Put the stand-in into a module and the modules of Lightning in it, and silence what they log and print."""
    for module in model.modules():
        if is_lightning(type(module), "LightningModule"):
            stand_ins = {"_trainer": trainer, "optimizers": _no_optimizers, "lr_schedulers": _no_optimizers}
            stand_ins |= dict.fromkeys(("log", "log_dict", "print"), _nothing)
            for name, value in stand_ins.items():
                setattr(module, name, value)


def _nothing(*_: Any, **__: Any) -> None:
    """In the place of ``self.log`` and its kin."""


def _no_optimizers(*_: Any, **__: Any) -> Any:
    msg = f"training_step asks for its optimizers, and there are none here: {WAY_OUT}"
    raise ProblemError(msg)


def _count(value: Any) -> int:
    return value if isinstance(value, int) and value >= 0 else 0
