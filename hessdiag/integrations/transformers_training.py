"""Regularizers in the Trainer of transformers: a mix-in, which imports nothing of transformers itself."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hessdiag.errors import UsageError
from hessdiag.regularizers.wrapper import Regularizer


class RegularizedTraining:
    """Put before ``Trainer``; ``regularize`` wraps the optimizer that the Trainer makes, or the one it is given.

        class Flat(RegularizedTraining, Trainer):
            regularize = staticmethod(lambda optimizer: NSO(optimizer, sigma=0.01))

    Gradient accumulation, clipping by ``max_grad_norm``, schedulers, checkpoints and DDP are the Trainer's; a step
    takes all passes at its last micro-batch, and "penalty" and "share" of `Regularizer.report` are logged. Half
    precision: ``bf16=True``; the scaler of ``fp16=True`` is refused.
    """

    regularize: Callable[[Optimizer], Regularizer] | None = None

    def create_optimizer(self, *args: Any, **options: Any) -> Any:
        """The Trainer's optimizer, wrapped."""
        made = super().create_optimizer(*args, **options)  # type: ignore[misc]
        if self.regularize is not None and not isinstance(made, Regularizer):
            self.optimizer = made = self.regularize(made)
        return made

    def training_step(self: Any, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Keeps the micro-batch; at the last of a step sets ``.grad`` to the regularized gradient."""
        own = getattr(self.optimizer, "optimizer", self.optimizer)  # accelerate wraps it
        if not isinstance(own, Regularizer) or self.accelerator.scaler is not None:
            msg = "RegularizedTraining needs a regularizer (`regularize`), and bf16=True in place of fp16=True"
            raise UsageError(msg)
        model.train()
        self._held = [*getattr(self, "_held", ()), self._prepare_inputs(inputs)]
        if not self.accelerator.sync_gradients:
            return torch.zeros((), device=self.args.device)
        held, self._held = self._held, []
        kept = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        factor = len(held) if kept or self.compute_loss_func is not None else 1  # then losses add up to the mean

        def loss_of(rows: dict[str, Any]) -> Any:
            with self.compute_loss_context_manager():  # and a copy, as label smoothing takes the labels out
                return self.compute_loss(model, dict(rows), num_items_in_batch=num_items_in_batch).mean() * factor

        return own.backward([partial(loss_of, rows) for rows in held])

    def log(self: Any, logs: dict[str, float], *args: Any, **options: Any) -> None:
        """Adds the penalty and its share to what is logged with the loss."""
        found = getattr(getattr(self.optimizer, "optimizer", None), "report", {}) if "loss" in logs else {}
        extra = {name: found[name] for name in ("penalty", "share") if name in found}
        super().log(logs | extra, *args, **options)  # type: ignore[misc]
