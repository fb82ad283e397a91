"""The loss that a training minimises, out of its module: that of a LightningModule, that of a transformer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from hessdiag.schemes.models.lightning_loss import loss_of_module
from hessdiag.schemes.models.stand_in_trainer import Silent, StandInTrainer, attach

CRITERIA = {"ForCausalLM": "causal_lm", "ForSequenceClassification": "cross_entropy"}


class _Quiet(StandInTrainer):
    """The trainer of a module in training, but that nothing is logged."""

    def __init__(self, trainer: Any) -> None:
        self._of = trainer
        self.logger, self.loggers = Silent(), [Silent()]
        self.datamodule = getattr(trainer, "datamodule", None)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._of, name)


def loss_in_training(module: nn.Module, trainer: Any) -> Callable[[nn.Module, Any], Tensor]:
    """``f(module, batch)`` of a module that is being trained: as `loss_of_module`, and nothing is logged.

    Raises:
        ProblemError: the training step moves the weights by itself, or takes no batch.
    """
    quiet = _Quiet(trainer)
    own = loss_of_module(module, quiet)

    def loss(module: nn.Module, batch: Any) -> Tensor:
        with _silenced(module, quiet):
            return own(module, batch)

    loss.__qualname__ = own.__qualname__
    return loss


@contextmanager
def _silenced(module: nn.Module, trainer: StandInTrainer) -> Iterator[None]:
    """Another trainer for the time of a pass; then the module's attributes are as they were."""
    before = [(vars(one), dict(vars(one))) for one in module.modules()]
    try:
        attach(module, trainer)
        yield
    finally:
        for now, then in before:
            now.clear()
            now.update(then)


def loss_of_transformer(model: Any) -> Any:
    """A criterion where the model's own loss is known to be it, else ``f(model, batch)`` that is that loss."""
    config = model.config
    single = (
        getattr(config, "problem_type", None) in (None, "single_label_classification") and config.num_labels > 1
    )
    known = CRITERIA.get(getattr(model, "loss_type", None) or "") if single else None
    return known or (lambda model, batch: model(**batch).loss)
