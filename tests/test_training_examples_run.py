"""Promise: the examples of training run and learn; a plain loop and Lightning resume to the same bits. (20 s)"""

from __future__ import annotations

import logging
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from hessdiag.errors import UsageError
from hessdiag.regularizers import NSO, SAM
from hessdiag.regularizers.wrapper import Regularizer
from tests import example_flat_training, example_lightning, example_plain_loop
from tests.command import call
from tests.models import same

LEARNED = 0.9  # test accuracy; a tenth by guessing, 0.94 measured after two epochs
# Lightning's own: no loader workers, and torch's pytree, which it imports, has moved on
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning.*"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*"),
]


@pytest.fixture(autouse=True, scope="module")
def quiet():
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def trainer(folder: Path, epochs: int):
    return example_lightning.lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[example_lightning.SharpnessCallback(every=20)],
    )


def fitted(folder: Path, epochs: int, resume: str | None = None, kind=example_lightning.Digits):
    """The module and its trainer after so many epochs in all."""
    torch.manual_seed(0)
    module, run = kind(), trainer(folder, epochs)
    run.fit(module, example_lightning.loader(0), ckpt_path=resume, weights_only=True)
    return module, run


def weights(model: nn.Module) -> list[Tensor]:
    return [value.detach().clone() for value in model.state_dict().values()]


def test_the_plain_loop_learns(tmp_path: Path) -> None:
    model, losses, tracker = example_plain_loop.train(epochs=2)
    assert losses[1] < losses[0] / 2
    assert example_plain_loop.accuracy(model) > LEARNED
    assert tracker.history.step.tolist()[:1] == [20]


def test_the_plain_loop_resumes(tmp_path: Path) -> None:
    whole, _, _ = example_plain_loop.train(epochs=3)
    file = tmp_path / "run.pt"
    example_plain_loop.train(epochs=1, file=file, total=3)
    model, losses, tracker = example_plain_loop.train(epochs=3, file=file)
    assert len(losses) == 2
    assert tracker.state_dict()["last"] == 3 * 12
    assert same(weights(model), weights(whole))


def test_lightning_learns(tmp_path: Path) -> None:
    module, run = fitted(tmp_path, epochs=2)
    (optimizer,) = run.optimizers
    assert isinstance(optimizer, NSO)
    assert optimizer.steps == run.global_step == 2 * len(example_lightning.loader(0))
    (found,) = run.test(module, example_lightning.loader(1), verbose=False)
    assert found["accuracy"] > LEARNED


def test_lightning_resumes(tmp_path: Path) -> None:
    """Noise and momentum go on where the checkpoint was taken, or the bits would differ."""
    whole, _ = fitted(tmp_path / "whole", epochs=3)
    _, first = fitted(tmp_path / "parts", epochs=1)
    saved = first.checkpoint_callback.best_model_path
    module, second = fitted(tmp_path / "parts", epochs=3, resume=saved)
    assert second.optimizers[0].steps == 3 * len(example_lightning.loader(0))
    assert same(weights(module), weights(whole))


def test_flat_training_is_compared(tmp_path: Path, monkeypatch) -> None:
    """The recipe's script: every arm spends the same gradients, and gap compares what it has written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(example_flat_training, "GRADIENTS", 80)
    spent = Counter()
    gradient = torch.autograd.grad
    x, y = default_collate(list(example_flat_training.few().data["train"]))
    for arm, (wrap, cost) in example_flat_training.ARMS.items():
        if wrap is not None:
            with monkeypatch.context() as patch:
                patch.setattr(
                    torch.autograd, "grad", lambda *a, n=arm, **o: spent.update([n]) or gradient(*a, **o)
                )
                logged = example_flat_training.trained(example_flat_training.digits_mlp(), x, y, arm, 0)
            assert spent[arm] == 80 == cost * len(logged)
            assert {"loss", "penalty", "share"} <= set(logged[0])
    example_flat_training.run(tmp_path / "runs", seeds=1)
    code, out, err = call(*example_flat_training.command(tmp_path / "runs", ["path_norm"]), "-q")
    assert code == 0, err
    for task, arms in example_flat_training.TASKS.items():
        assert all(f"{task}-{arm}-seed0" in out for arm in arms)


class Automatic(example_lightning.Digits):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = True

    def training_step(self, batch, index):
        return nn.functional.cross_entropy(self.model(batch[0]), batch[1])


def test_automatic_optimization_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no graph"):
        fitted(tmp_path, epochs=1, kind=Automatic)


def no_move(self, params, scaler=None):
    for param in params:
        param.grad = torch.zeros_like(param)
    self.inner.step()


BROKEN = {
    "nothing is learned, plain": (test_the_plain_loop_learns, SAM, "_move", no_move),
    "nothing is learned, Lightning": (test_lightning_learns, NSO, "_move", no_move),
    "half the gradients": (
        lambda folder: test_flat_training_is_compared(folder, pytest.MonkeyPatch()),
        SAM,
        "regularized",
        lambda self, batch: batch.gradient(),
    ),
    "steps start again": (
        test_lightning_resumes,
        Regularizer,
        "load_state_dict",
        lambda self, state: self.inner.load_state_dict({k: state[k] for k in ("state", "param_groups")}),
    ),
    "momentum is lost": (
        test_the_plain_loop_resumes,
        Regularizer,
        "load_state_dict",
        lambda self, state: setattr(self, "steps", state["regularizer"]["steps"]),
    ),
    "a loss without a graph goes": (
        test_automatic_optimization_is_refused,
        NSO,
        "step",
        lambda self, closure: closure(),
    ),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage, tmp_path, monkeypatch):
    promise, where, name, broken = breakage
    monkeypatch.setattr(where, name, broken)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        promise(tmp_path)
