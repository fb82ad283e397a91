"""What a training step may ask of its trainer, where there is none."""

from __future__ import annotations

from typing import Any

from hessdiag.errors import ProblemError


class StandInTrainer:
    """Answers what concerns one process at its first step; anything else is refused by name."""

    def __init__(self) -> None:
        self.current_epoch = self.global_step = self.local_rank = self.global_rank = self.node_rank = 0
        self.world_size = self.num_nodes = self.num_devices = self.max_epochs = self.accumulate_grad_batches = 1
        self.max_steps = -1
        self.is_global_zero = True
        self.training, self.validating, self.testing, self.sanity_checking = True, False, False, False
        self.logger: Any = None
        self.datamodule: Any = None
        self.loggers: list[Any] = []
        self.callbacks: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        """Everything else.

        Raises:
            ProblemError: naming it.
        """
        if name.startswith("__"):
            raise AttributeError(name)
        msg = (
            f"training_step asks for trainer.{name}, and there is no trainer here: give the class a method "
            "hessdiag_loss(self, batch) that returns the mean loss"
        )
        raise ProblemError(msg)


def silent(*_: Any, **__: Any) -> None:
    """In the place of ``self.log`` and ``self.log_dict``."""
