"""`SharpnessCallback` for the Trainer of ``lightning.pytorch`` and of ``pytorch_lightning``: docs/tracker.md."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from hessdiag.integrations.one_rank import OneRank, made
from hessdiag.integrations.own_loss import loss_in_training
from hessdiag.schemes.known import require

HOMES = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}


class _Sharpness(OneRank):
    """As `hessdiag.Tracker`, with the module's own loss and the trainer's loader where none is given."""

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Draw the samples and measure the first weights, on rank 0."""
        with self.waiting(trainer.strategy.barrier):
            if trainer.is_global_zero:
                own = [*trainer.loggers, lambda values, _: _keep(trainer, values)]
                loss = self.loss or loss_in_training(pl_module, trainer)
                optimizer = trainer.optimizers[0] if len(trainer.optimizers) == 1 else None
                self.start(pl_module, loss, trainer.train_dataloader, optimizer=optimizer, log=own)
            self.step(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *_: Any, **__: Any) -> None:
        """Measure where it is due."""
        if self.due(trainer.global_step):
            with self.waiting(trainer.strategy.barrier):
                self.step(trainer.global_step)

    def state_dict(self) -> dict[str, Any]:
        """Of the tracker; a checkpoint of Lightning holds it."""
        return {} if self.tracker is None else self.tracker.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Kept until there is a tracker."""
        self.state = dict(state_dict) or None


def _keep(trainer: Any, values: Mapping[str, float]) -> None:
    """What ``ModelCheckpoint(monitor=...)`` looks at, as LearningRateMonitor gives it."""
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in values.items()})


def _bases() -> tuple[type, ...]:
    homes = [home for package, home in HOMES.items() if find_spec(package)]
    if not homes:
        require("pytorch_lightning", "lightning", "SharpnessCallback")
    return (_Sharpness, *dict.fromkeys(import_module(home).Callback for home in homes))


def __getattr__(name: str) -> Any:
    return globals().setdefault(name, made(__name__, name, _bases))
