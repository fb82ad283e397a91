"""`SharpnessCallback` for the Trainer of transformers: docs/tracker.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hessdiag.integrations.one_rank import OneRank, barrier, made
from hessdiag.integrations.own_loss import loss_of_transformer
from hessdiag.schemes.known import require

STATE = "hessdiag_tracker.pt"  # in each checkpoint of the trainer


class _Sharpness(OneRank):
    """As `hessdiag.Tracker`; give it ``trainer=`` and what is measured goes wherever the trainer reports."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Draw the samples and measure the first weights, on rank 0."""
        with self.waiting(barrier):
            if state.is_world_process_zero:
                places = [args.resume_from_checkpoint, f"{args.output_dir}/checkpoint-{state.global_step}"]
                kept = [Path(one) / STATE for one in places if isinstance(one, str) and state.global_step]
                self.state = next((torch.load(f, weights_only=True) for f in kept if f.is_file()), None)
                loss, optimizer = self.loss or loss_of_transformer(given["model"]), given.get("optimizer")
                optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
                self.start(given["model"], loss, given["train_dataloader"], optimizer=optimizer, log=[self._log])
                self._control, self._of = control, state
            self.step(state.global_step)

    def on_step_end(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Measure where it is due."""
        if self.due(state.global_step):
            with self.waiting(barrier):
                self.step(state.global_step)

    def on_save(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
        """Put the tracker's state beside the weights."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.tracker is not None and folder.is_dir():
            torch.save(self.tracker.state_dict(), folder / STATE)

    def _log(self, values: dict[str, float], step: int) -> None:
        if self.trainer is None:
            self._of.log_history.append({**values, "step": step})
            return
        due = self._control.should_log  # the trainer takes what it reports for the log that is due
        self.trainer.log(values)
        self._control.should_log = self.trainer.control.should_log = due


def _bases() -> tuple[type, ...]:
    return _Sharpness, require("transformers", "hf", "SharpnessCallback").TrainerCallback


def __getattr__(name: str) -> Any:
    return globals().setdefault(name, made(__name__, name, _bases))
