"""Promise: Trainer, accelerate, Lightning's automatic optimization and torch.compile train as a plain loop. (15 s)

Each library in its real form; what is not installed is skipped.
"""

from __future__ import annotations

import importlib.util
import json
import logging
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hessdiag.errors import UsageError
from hessdiag.integrations import transformers_training
from hessdiag.regularizers import GSAM, HSR, MSAM, NSO, SAM, FriendlySAM, LookSAM, SpectralRadius, TracePenalty
from tests.models import same
from tests.training_runs import KINDS, X, Y, loss_of, near, net, sgd, state

missing = {
    name for name in ("transformers", "accelerate", "pytorch_lightning") if not importlib.util.find_spec(name)
}
hugging = pytest.mark.skipif(
    bool(missing & {"transformers", "accelerate"}), reason="transformers is not installed"
)
lightning = pytest.mark.skipif("pytorch_lightning" in missing, reason="pytorch-lightning is not installed")
# of the libraries, not of hessdiag
pytestmark = [pytest.mark.filterwarnings("ignore")]

# ------------------------------------------------------------------------------------------ Hugging Face Trainer


def language_model() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    small = {"vocab_size": 20, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    dropless = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(**small, **dropless, bos_token_id=0, eos_token_id=0))


def sentences() -> list[dict[str, torch.Tensor]]:
    """Eleven, with unequal numbers of counted tokens: accumulation by tokens differs from that by batches."""
    rows = torch.randint(20, (11, 8), generator=torch.Generator().manual_seed(1))
    labels = rows.clone()
    for index in range(len(rows)):
        labels[index, : index % 5] = -100
    return [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]


def trained(folder: Path, regularize, *, mixed: bool = True, kind=None, **arguments):
    """The model after a Trainer's run, and the trainer."""
    from transformers import Trainer, TrainingArguments
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    mixin = kind or transformers_training.RegularizedTraining
    bases = (mixin, Trainer) if mixed else (Trainer,)
    own = type("Own", bases, {"regularize": None if regularize is None else staticmethod(regularize)})
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
    settings |= {"learning_rate": 0.05, "logging_steps": 1, "seed": 3, "report_to": [], "use_cpu": True}
    args = TrainingArguments(str(folder), **settings | {"save_strategy": "no", "disable_tqdm": True} | arguments)
    trainer = own(model=language_model(), args=args, train_dataset=sentences())
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [value.detach().clone() for value in model.state_dict().values()]


def the_trainer_accumulates_as_ever(folder: Path, kind=None) -> None:
    """With a radius of zero the run is the Trainer's own: loss by tokens, clipping, schedule, the odd batch."""
    for arguments in ({}, {"label_smoothing_factor": 0.1}, {"max_grad_norm": 0.1}):
        plain, own = (
            trained(folder, regularize, mixed=regularize is not None, kind=kind, **arguments)
            for regularize in (None, partial(SAM, rho=0.0))
        )
        logs = []
        for trainer in (plain, own):
            trainer.train()
            logs.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        near(weights(own.model), weights(plain.model), 1e-5)
        assert logs[0] == pytest.approx(logs[1], rel=1e-4)
        assert own.optimizer.optimizer.steps == own.state.global_step == 6


@hugging
def test_the_trainer_accumulates_as_ever(tmp_path: Path):
    the_trainer_accumulates_as_ever(tmp_path)


@hugging
def test_the_trainer_regularizes(tmp_path: Path):
    """One step of each equals step(closure) on the whole batch; penalty and share are logged; it resumes."""
    whole = {"per_device_train_batch_size": 11, "max_grad_norm": 0.0}
    for regularize in (partial(SAM, rho=0.3), partial(NSO, sigma=0.05), partial(GSAM, rho=0.3)):
        trainer = trained(tmp_path, regularize, max_steps=1, optim="sgd", **whole)
        trainer.train()
        model, rows = language_model(), sentences()
        decayed = trainer.get_decay_parameter_names(model)  # the Trainer's order, which names the noise of NSO
        groups = [[p for n, p in model.named_parameters() if (n in decayed) == kind] for kind in (True, False)]
        own = regularize(torch.optim.SGD([p for group in groups for p in group], lr=0.05))
        batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        tokens = (batch["labels"] != -100).sum()  # as the Trainer counts them
        own.step(lambda model=model, batch=batch, n=tokens: model(**batch, num_items_in_batch=n).loss)
        near(weights(trainer.model), weights(model), 1e-4)
        logged = [entry for entry in trainer.state.log_history if "penalty" in entry]
        assert logged[0]["penalty"] == pytest.approx(own.report["penalty"], rel=1e-2)
        json.dumps(logged)


@hugging
def test_the_trainer_resumes(tmp_path: Path):
    """Noise, momentum and steps go on from a checkpoint: the same weights as in one run."""
    regularize = partial(NSO, sigma=0.05)
    whole = trained(tmp_path / "whole", regularize)
    whole.train()
    first = trained(tmp_path / "parts", regularize, save_strategy="steps", save_steps=3)
    first.train()
    second = trained(tmp_path / "parts", regularize)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-3"))
    assert second.optimizer.optimizer.steps == 6
    near(weights(second.model), weights(whole.model), 1e-6)


@hugging
def test_what_the_trainer_cannot_is_refused(tmp_path: Path):
    plain = trained(tmp_path, None)
    with pytest.raises(UsageError, match="needs a regularizer") as caught:
        plain.train()
    assert "\n" not in str(caught.value)


# --------------------------------------------------------------------------------------------------- accelerate


@hugging
def test_accelerate_trains():
    """prepare() and step(closure): the weights of a plain loop; its GradScaler is refused in our words."""
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)  # a Trainer's run leaves it in the middle of a step
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True)
    for name, make in KINDS.items():
        plain, model = net(dtype=torch.float32), net(dtype=torch.float32)
        own, (wrapped, optimizer) = make(sgd(plain)), accelerator.prepare(model, make(sgd(model)))
        for _ in range(3):
            own.step(loss_of(plain))
            optimizer.step(loss_of(wrapped))
        assert same(state(plain, own.inner), state(model, optimizer.optimizer.inner)), name
    model = net()
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(torch.zeros(()))
    scaled = AcceleratedOptimizer(SAM(sgd(model)), scaler=scaler)
    with pytest.raises(UsageError, match="calls its GradScaler by itself"):
        scaled.step(loss_of(model))


# ---------------------------------------------------------------------------------------------------- Lightning


def lightning_runs(folder: Path, *, automatic: bool, make) -> tuple[list[torch.Tensor], int]:
    """The weights after two epochs, and the steps Lightning has counted."""
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader, TensorDataset

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.automatic_optimization = net(dtype=torch.float32), automatic

        def configure_optimizers(self):
            return make(sgd(self.model))

        def training_step(self, batch, index):
            def loss():
                return F.cross_entropy(self.model(batch[0]), batch[1])

            return loss() if automatic else self.optimizers().step(loss)

    module = Module()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(
        max_epochs=2, accelerator="cpu", default_root_dir=folder, enable_checkpointing=False, **quiet
    )
    trainer.fit(module, DataLoader(TensorDataset(X.float(), Y), batch_size=4))
    return state(module.model), trainer.global_step


@lightning
def test_lightning_trains_in_both_ways(tmp_path: Path, makers=KINDS):
    """Automatic optimization with backward_inside=True has the weights and steps of manual optimization."""
    for name in ("SAM", "NSO", "GSAM", "MSAM"):
        manual = lightning_runs(tmp_path, automatic=False, make=KINDS[name])
        automatic = lightning_runs(tmp_path, automatic=True, make=partial(makers[name], backward_inside=True))
        near(automatic[0], manual[0], 1e-6)
        assert automatic[1] == manual[1] == 6
    with pytest.raises(UsageError, match="backward_inside=True"):
        lightning_runs(tmp_path, automatic=True, make=KINDS["SAM"])


# ------------------------------------------------------------------------------------- torch.compile, GradScaler


def test_compiled_models_train():
    """Of what needs gradients only: the weights of the eager model, compiled once."""
    makers = KINDS | {
        "LookSAM, every=2": lambda opt, **o: LookSAM(opt, rho=0.3, every=2, **o),
        "TracePenalty": lambda opt, **o: TracePenalty(opt, mu=0.1, third="difference", **o),
    }
    for name, make in makers.items():
        torch._dynamo.reset()
        eager, model, graphs = net(nn.BatchNorm1d(6)), net(nn.BatchNorm1d(6)), []
        compiled = torch.compile(model, backend=lambda graph, _, graphs=graphs: graphs.append(1) or graph.forward)
        plain, own = make(sgd(eager), model=eager), make(sgd(model), model=model)
        for _ in range(3):
            plain.step(loss_of(eager))
            own.step(loss_of(compiled))
        near(state(model, own.inner), state(eager, plain.inner))
        assert len(graphs) == 1, name


def test_compiled_models_have_no_products():
    """torch says itself that compiled graphs are differentiated once; hessdiag says it in a line."""
    for make in (lambda opt: SpectralRadius(opt, mu=0.1), lambda opt: HSR(opt, mu=0.1)):
        torch._dynamo.reset()
        model = net()
        before = state(model)
        with pytest.raises(UsageError, match=r"torch\.compile.*differentiated once") as caught:
            make(sgd(model)).step(loss_of(torch.compile(model, backend="aot_eager")))
        assert "\n" not in str(caught.value)
        assert same(state(model), before)


def test_a_scaler_outside_is_refused():
    """For every class, with and without gradients, in our words; and ours steps with scaler=."""
    for make in (*KINDS.values(), FriendlySAM, MSAM, lambda opt, **o: TracePenalty(opt, third="difference", **o)):
        model = net(dtype=torch.float32)
        scaler, own = torch.amp.GradScaler("cpu", init_scale=4.0), make(sgd(model))
        for backward in (False, True):
            loss = scaler.scale(loss_of(model)())
            if backward:
                loss.backward()
            with pytest.raises(UsageError, match="calls its GradScaler by itself"):
                scaler.step(own)
        before = state(model)
        make(sgd(model), scaler=torch.amp.GradScaler("cpu", init_scale=4.0)).step(loss_of(model))
        assert not same(state(model), before)


# ---------------------------------------------------------------------------------------------------- breakages


class Unweighted(transformers_training.RegularizedTraining):
    """Micro-batches counted alike, whatever tokens they hold."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        return super().training_step(model, inputs)


class Last(transformers_training.RegularizedTraining):
    """The last micro-batch alone."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self._held = []
        return super().training_step(model, inputs, num_items_in_batch)


@hugging
@pytest.mark.parametrize("broken", [Unweighted, Last])
def test_this_promise_would_notice(broken, tmp_path):
    with pytest.raises(AssertionError):
        the_trainer_accumulates_as_ever(tmp_path, broken)


@lightning
def test_this_promise_would_notice_half_a_step(tmp_path):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test_lightning_trains_in_both_ways(tmp_path, {name: partial(SAM, rho=0.0) for name in KINDS})
