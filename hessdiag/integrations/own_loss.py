"""The loss that a training minimises, out of its module: that of a LightningModule, that of a transformer."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from hessdiag.errors import ProblemError

CRITERIA = {"ForCausalLM": "causal_lm", "ForSequenceClassification": "cross_entropy"}
OWN = "hessdiag_loss"
WAY_OUT = f"give SharpnessCallback(loss), or the module a method {OWN}(self, batch) that returns the mean loss"


def loss_of_module(module: Any) -> Callable[[Any, Any], Tensor]:
    """``f(module, batch)``: `hessdiag_loss` where the module has it, else its training step.

    Raises:
        ProblemError: the training step makes the optimizer's steps itself.
    """
    if callable(getattr(module, OWN, None)):
        return lambda module, batch: getattr(module, OWN)(batch)
    name = type(module).__name__
    if not getattr(module, "automatic_optimization", True):
        msg = f"{name} optimizes by itself (automatic_optimization=False): its step is no loss; {WAY_OUT}"
        raise ProblemError(msg)
    further = [0] * (len(inspect.signature(module.training_step).parameters) - 1)  # batch_idx, dataloader_idx

    def loss(module: Any, batch: Any) -> Tensor:
        with_logging = vars(module).keys() & {"log", "log_dict"}
        before = {each: vars(module)[each] for each in with_logging}
        vars(module).update(log=_silent, log_dict=_silent)
        try:
            found = module.training_step(batch, *further)
        finally:
            for each in ("log", "log_dict"):
                del vars(module)[each]
            vars(module).update(before)
        found = found.get("loss") if isinstance(found, Mapping) else found
        if not isinstance(found, Tensor):
            msg = f"{name}.training_step returned {type(found).__name__}, no loss of the batch: {WAY_OUT}"
            raise ProblemError(msg)
        return found

    loss.__qualname__ = f"{name}.training_step"  # how results name the loss
    return loss


def loss_of_transformer(model: Any) -> Any:
    """A criterion where the model's own loss is known to be it, else ``f(model, batch)`` that is that loss."""
    config = model.config
    single = (
        getattr(config, "problem_type", None) in (None, "single_label_classification") and config.num_labels > 1
    )
    known = CRITERIA.get(getattr(model, "loss_type", None) or "") if single else None
    return known or (lambda model, batch: model(**batch).loss)


def _silent(*_: Any, **__: Any) -> None:
    """In the place of ``self.log`` and ``self.log_dict``."""
