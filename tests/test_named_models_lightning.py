"""Promise: a LightningModule by name has the loss, gradient and Hessian of its own training step. (40 s)

The truth is Lightning's: `load_from_checkpoint` of what its trainer saved, in evaluation mode, its own
`training_step` on the whole data, and a dense Hessian of that.
"""

from __future__ import annotations

import json
import pickle
import re
import shlex
import warnings
from inspect import signature
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pytorch_lightning")

import hessdiag
from hessdiag.schemes.assemble import build
from hessdiag.schemes.models import lightning_data, lightning_loss, lightning_modules, stand_in_trainer
from hessdiag.schemes.recipe import Recipe
from tests import tiny_lightning as tiny
from tests.bad_files import Hostile
from tests.command import call

MODULE = "tests.tiny_lightning"


@pytest.fixture(autouse=True)
def arrays(tmp_path, monkeypatch):
    """The rows as a file, for `data`."""
    monkeypatch.chdir(tmp_path)
    import numpy as np

    inputs, targets = tiny.rows().tensors
    np.savez("rows.npz", x=inputs.numpy(), y=targets.numpy())


def load(kind, checkpoint, data="npz:rows.npz", **options):
    return hessdiag.load(f"lightning:{MODULE}:{kind}", data, checkpoint=checkpoint, **options)


# the library's own loss


class Step(torch.nn.Module):
    def __init__(self, module, name):
        super().__init__()
        self.module, self.name = module, name

    def forward(self, batch):
        method = getattr(self.module, self.name)
        found = method(batch, 0) if "batch_idx" in signature(method).parameters else method(batch)
        return found["loss"] if isinstance(found, dict) else found


def library(kind, checkpoint):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = getattr(tiny, kind).load_from_checkpoint(checkpoint, weights_only=False).eval()
    epoch = torch.load(checkpoint, weights_only=False)["epoch"]
    module.trainer = SimpleNamespace(
        logger=None, barebones=True, is_global_zero=False, world_size=1, current_epoch=epoch, global_step=0
    )
    return module


def dense(module, batch, name="training_step"):
    """Loss, gradient and Hessian."""
    step = Step(module, name)
    named = dict(step.named_parameters())

    def loss(*values):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of logging without a trainer
            return torch.func.functional_call(step, dict(zip(named, values, strict=True)), (batch,))

    values = tuple(p.detach().clone().requires_grad_() for p in named.values())
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss(*values), values)])
    blocks = torch.autograd.functional.hessian(loss, values)
    H = torch.cat(
        [torch.cat([b.reshape(p.numel(), -1) for b in row], 1) for p, row in zip(values, blocks, strict=True)]
    )
    return float(loss(*values).detach()), gradient, H


def check_equal(problem, truth):
    loss, gradient, H = truth
    samples = hessdiag.draw(problem.data["train"], samples=100, batch_size=10)
    counts = sum(problem.count(batch) for batch in samples.batches)
    total = sum(problem.total(problem.model.eval(), batch) for batch in samples.batches) / counts
    parameters = [dict(problem.model.named_parameters())[name] for name in problem.parameter_names()]
    own = torch.cat([g.reshape(-1) for g in torch.autograd.grad(total, parameters)])
    assert float(total.detach()) == pytest.approx(loss, rel=1e-5)
    assert torch.allclose(own, gradient, rtol=1e-4, atol=1e-6)
    asked = {"samples": 100, "batch_size": 10, "probes": 30, "second_opinion": False}
    found = hessdiag.analyze(problem, quantities=["lambda_max", "trace"], **asked)
    assert found.lambda_max.value == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-3)
    half = (found.trace.hi - found.trace.lo) / 2
    assert abs(found.trace.value - float(H.trace())) < 2 * half + 1e-3 * float(H.norm())


def whole(seed=0):
    return tiny.rows(seed).tensors


def own_step(kind, made=None):
    """A case: the class, and its loss at a checkpoint."""

    def truth(checkpoint):
        module = library(kind, checkpoint)
        batch = module.on_after_batch_transfer(whole(), 0) if kind == "Scaled" else whole()
        return dense(module, batch, "hessdiag_loss" if kind == "Stated" else "training_step")

    return kind, made or (lambda: getattr(tiny, kind)(width=6)), truth


FAMILIES = {
    "a step that logs, prints and counts": own_step("Plain"),
    "dropout, BatchNorm, a dict": own_step("Dropped"),
    "one argument of all hyper-parameters": own_step("Bag", made=lambda: bag()),
    "a loss by epoch": own_step("Warm"),
    "a hook before the step": own_step("Scaled"),
    "a module of Lightning inside": own_step("Outer"),
    "its own loss for hessdiag": own_step("Stated"),
}


def bag():
    module = tiny.Bag(tiny_attributes(width=6, lr=0.25))
    module.configure_model()
    return module


def tiny_attributes(**values):
    from pytorch_lightning.utilities.parsing import AttributeDict

    return AttributeDict(values)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_gradient_and_hessian_are_the_modules_own(family, tmp_path):
    check_family(family, tmp_path)


def check_family(family, folder):
    kind, made, truth = FAMILIES[family]
    # manual steps count as Lightning's optimizer steps
    checkpoint = tiny.saved(folder, made(), steps=8)
    if kind == "Bag":
        restore = tiny.Bag.__init__  # Lightning gives the argument as a plain dict, which has no attributes
        tiny.Bag.__init__ = lambda self, config: restore(self, tiny_attributes(**config))
        try:
            wanted = truth(checkpoint)
        finally:
            tiny.Bag.__init__ = restore
    else:
        wanted = truth(checkpoint)
    problem = load(kind, checkpoint)
    assert problem.loss_name.startswith(kind)
    check_equal(problem, wanted)


def test_the_other_name_of_lightning_is_the_same(tmp_path):
    pytest.importorskip("lightning.pytorch")
    text = Path(tiny.__file__).read_text().replace("import pytorch_lightning as", "import lightning.pytorch as")
    (tmp_path / "other.py").write_text(text)
    checkpoint = tiny.saved(tmp_path, tiny.Plain(width=6))
    problem = hessdiag.load("lightning:other.py:Plain", "npz:rows.npz", checkpoint=checkpoint)
    check_equal(problem, dense(library("Plain", checkpoint), whole()))


def test_a_file_names_the_class_and_its_code_counts(tmp_path):
    text = Path(tiny.__file__).read_text()
    (tmp_path / "mine.py").write_text(text)
    checkpoint = tiny.saved(tmp_path, tiny.Plain(width=6))
    recipe = Recipe.of("lightning:mine.py:Plain", data="npz:rows.npz")
    before = recipe.identity()
    problem = hessdiag.load("lightning:mine.py:Plain", "npz:rows.npz", checkpoint=checkpoint)
    assert problem.model.hparams.width == 6
    (tmp_path / "mine.py").write_text(text + "\n")
    assert recipe.identity() != before


# data


def test_loaders_of_the_module_are_read_in_order(tmp_path):
    checkpoint = tiny.saved(tmp_path, tiny.Loaders(width=6))
    problem = hessdiag.load(f"lightning:{MODULE}:Loaders", checkpoint=checkpoint)
    assert list(problem.data) == ["train", "val"]
    check_equal(problem, dense(library("Loaders", checkpoint), whole()))
    first = hessdiag.draw(problem.data["train"], samples=100).batches[0][0]
    assert torch.equal(first, whole()[0][: len(first)])
    code, _, err = call("analyze", "--model", f"lightning:{MODULE}:Loaders", "-c", checkpoint, "--print-config")
    assert (code, err) == (0, "")
    named = load("Loaders", checkpoint, data=["val=npz:rows.npz"])
    assert list(named.data) == ["val"]


def check_data_module(folder):
    checkpoint = tiny.saved(folder, tiny.Plain(width=6), data=Fetched(seed=3))
    problem = hessdiag.load(
        f"lightning:{MODULE}:Plain", checkpoint=checkpoint, options={"datamodule": f"{MODULE}:Data"}
    )
    inputs, targets = whole(3)
    check_equal(problem, dense(library("Plain", checkpoint), (inputs * 2, targets)))


class Fetched(tiny.Data):
    def prepare_data(self):
        """Nothing is fetched."""


def test_a_data_module_has_its_own_arguments_and_hooks(tmp_path):
    check_data_module(tmp_path)


def test_data_are_fetched_once_it_is_allowed(tmp_path):
    options = {"options": {"datamodule": f"{MODULE}:Data"}}
    assert list(hessdiag.load(f"lightning:{MODULE}:Plain", **options).data) == ["train"]
    with pytest.raises(hessdiag.HessdiagError, match="nothing to fetch from"):
        hessdiag.load(f"lightning:{MODULE}:Plain", allow_download=True, **options)


# losses, and what the checkpoint says


def test_a_loss_by_name_gives_the_gauss_newton_matrix(tmp_path):
    checkpoint = tiny.saved(tmp_path, tiny.Scaled(width=6))
    problem = load("Scaled", checkpoint, loss="cross_entropy")
    assert problem.has_outputs
    module = library("Scaled", checkpoint)
    check_equal(problem, dense(module, module.on_after_batch_transfer(whole(), 0)))
    found = hessdiag.analyze(problem, operator="ggn", quantities=["trace"], samples=100)
    assert found.trace.value > 0
    manual = load("Manual", tiny.saved(tmp_path, tiny.Manual()), loss="cross_entropy")
    assert manual.loss_name == "cross_entropy/mean"


def test_what_is_asked_comes_before_what_is_kept(tmp_path):
    checkpoint = tiny.saved(tmp_path, tiny.Needs(width=6))
    assert load("Needs", checkpoint, options={"lr": 0.5}).model.hparams == {"width": 6, "lr": 0.5}
    kept = tiny.saved(tmp_path, bag())
    assert load("Bag", kept, options={"lr": 0.5}).model.hparams == {"width": 6, "lr": 0.5}
    code, out, _ = call(
        *("analyze", "--model", f"lightning:{MODULE}:Needs", "--data", "npz:rows.npz", "-c", checkpoint),
        *("-P", "lr=0.5", "--print-config", "--json"),
    )
    found = {row["what"]: (row["value"], row["source"]) for row in json.loads(out)}
    assert code == 0
    assert found["width"] == ("6", "hyper-parameters of the checkpoint")
    assert found["lr"] == ("0.5", "as asked")
    assert found["loss"] == ("Needs.training_step", "the model's own")


def test_the_rate_of_the_optimizer_is_known(tmp_path):
    checkpoint = tiny.saved(tmp_path, tiny.Plain(width=6))
    found = build(Recipe.of(f"lightning:{MODULE}:Plain", data="npz:rows.npz"), checkpoint)
    assert {"lr": 0.25, "epoch": 1, "global_step": 3}.items() <= found.weights.facts.items()
    assert found.problem.optimizer.state_dict()["param_groups"][0]["lr"] == 0.25


def test_the_module_is_left_silent_and_as_it_was(tmp_path, capfd):
    checkpoint = tiny.saved(tmp_path, tiny.Plain(width=6))
    problem = load("Plain", checkpoint)
    before = {name: tensor.clone() for name, tensor in problem.model.state_dict().items()}
    mode = problem.model.training
    capfd.readouterr()
    hessdiag.analyze(problem, quantities=["lambda_max"], samples=20)
    assert "step" not in "".join(capfd.readouterr())
    assert problem.model.training == mode
    assert all(torch.equal(before[name], tensor) for name, tensor in problem.model.state_dict().items())


def test_the_lines_of_the_page_run(tmp_path):
    page = Path(hessdiag.__file__).parent / "docs" / "schemes_vision.md"
    lines = re.findall(r"^    \$ hessdiag (.* lightning:.*)$", page.read_text(), re.MULTILINE)
    tiny.saved(tmp_path, tiny.Loaders(width=6))
    text = Path(tiny.__file__).read_text().replace("class Loaders(", "class Classifier(")
    (tmp_path / "mine.py").write_text(text)
    assert len(lines) == 2
    for line in lines:
        code, _, err = call(*shlex.split(line), "--samples", "4", "--quantities", "lambda_max", "-q")
        assert code == 0, err


# bad input


def file_of(folder, **entries):
    """A checkpoint of the trainer, changed."""
    content = torch.load(tiny.saved(folder, tiny.Plain(width=6)), weights_only=False)
    torch.save({**content, **entries}, folder / "changed.ckpt")
    return folder / "changed.ckpt"


def cut(folder):
    whole_file = Path(tiny.saved(folder, tiny.Plain())).read_bytes()
    (folder / "cut.ckpt").write_bytes(whole_file[: len(whole_file) // 2])
    return folder / "cut.ckpt"


def foreign(folder):
    (folder / "foreign.ckpt").write_bytes(pickle.dumps({"state_dict": {}}))
    return folder / "foreign.ckpt"


def of(kind, **hyper):
    """A checkpoint of a class."""
    return lambda folder: tiny.saved(folder, getattr(tiny, kind)(**hyper), steps=1)


def none(folder):
    return None


BAD = {
    "no class named": ("Plain", none, "names no class", {"model": f"lightning:{MODULE}"}),
    "no such file": ("Plain", none, "no such Python file", {"model": "lightning:none.py:Plain"}),
    "no such class": ("Plainn", none, "did you mean Plain?", {}),
    "no LightningModule": ("TensorDataset", none, "is no LightningModule", {}),
    "a data module": ("Data", none, "is no LightningModule", {}),
    "no step": ("Stepless", none, "has no training_step", {}),
    "an unknown argument": ("Plain", of("Plain"), "allowed: width, lr", {"extra": ["-P", "wide=3"]}),
    "an argument that nobody says": ("Needs", none, "give -P width=", {}),
    "hyper-parameters without it": ("Needs", lambda f: file_of(f, hyper_parameters={"lr": 1}), "are lr", {}),
    "hyper-parameters of the wrong kind": (
        "Plain",
        lambda f: file_of(f, hyper_parameters={"width": "6"}),
        "Plain(width='6')",
        {},
    ),
    "objects among them": (
        "Plain",
        lambda f: file_of(f, hyper_parameters={"width": Hostile()}),
        "can run code",
        {},
    ),
    "another width": ("Plain", of("Plain"), "shapes differ", {"extra": ["-P", "width=9"]}),
    "another class's file": ("Dropped", of("Plain"), "does not fit the model", {}),
    "a constructor that raises": ("Raises", none, "RuntimeError: no GPU here", {}),
    "a constructor that exits": ("Exits", none, "SystemExit", {}),
    "a step that gives nothing": ("Nothing", none, "returned NoneType", {}),
    "a step that gives a vector": ("Vector", none, "a tensor of shape", {}),
    "a step that asks the trainer": ("Asks", none, "trainer.max_epochs", {}),
    "a step that asks its optimizers": ("AsksOptimizers", none, "asks for its optimizers", {}),
    "its own optimization": ("Manual", none, "automatic_optimization=False", {}),
    "a file that is closed": ("Closed", none, "closed file", {}),
    "noise": ("Draws", none, "draws random numbers", {}),
    "a file cut short": ("Plain", cut, "damaged or cut short", {}),
    "a pickle of its own": ("Plain", foreign, "trust-pickle", {}),
    "no averages": ("Plain", of("Plain"), "no averaged weights", {"extra": ["--use-ema"]}),
    "no data": ("Plain", of("Plain"), "no loaders of its own", {"data": None}),
    "a data module the file names": (
        "Plain",
        lambda f: file_of(f, hyper_parameters={"width": 6, "datamodule": "os:system"}),
        "-P datamodule=os:system, if you trust that",
        {"data": None},
    ),
    "data that cannot be made": (
        "Plain",
        none,
        "--allow-download calls its prepare_data() before",
        {"data": None, "extra": ["-P", f"datamodule={MODULE}:Missing"]},
    ),
    "data of two kinds": ("Plain", none, "drop one", {"extra": ["-P", f"datamodule={MODULE}:Data"]}),
    "several loaders": (
        "Plain",
        none,
        "not one loader",
        {"data": None, "extra": ["-P", f"datamodule={MODULE}:Several"]},
    ),
}


def refusal(kind, made, asked, folder):
    checkpoint = made(folder)
    arguments = ["--model", asked.get("model", f"lightning:{MODULE}:{kind}")]
    arguments += ["--data", "npz:rows.npz"] if asked.get("data", True) else []
    arguments += ["-c", str(checkpoint)] if checkpoint else []
    code, out, err = call("analyze", *arguments, *asked.get("extra", ()), "--quantities", "trace", "-q")
    assert code in (2, 4), (code, out, err)
    return err


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, tmp_path):
    check_bad(name, tmp_path)


def check_bad(name, folder):
    kind, made, words, asked = BAD[name]
    err = refusal(kind, made, asked, folder)
    assert words in err
    assert err.count("\n") == 1, err
    assert not (folder / "marker").exists()


# what these tests must notice


BREAKAGES = {
    "the epoch is not the checkpoint's": (
        lambda patch: patch.setattr(stand_in_trainer, "_count", lambda value: 0),
        lambda folder: check_family("a loss by epoch", folder),
    ),
    "hooks are forgotten": (
        lambda patch: patch.setattr(lightning_loss, "HOOKS", ()),
        lambda folder: check_family("a hook before the step", folder),
    ),
    "hooks of the data are forgotten": (
        lambda patch: patch.setattr(lightning_loss, "HOOKS", ()),
        check_data_module,
    ),
    "the data's own arguments are forgotten": (
        lambda patch: patch.setattr(lightning_modules, "OF_DATA", "hyper_parameters"),
        check_data_module,
    ),
    "the step's loss is taken for hessdiag's": (
        lambda patch: patch.setattr(lightning_loss, "OWN", "training_step"),
        lambda folder: check_family("its own loss for hessdiag", folder),
    ),
    "a vector is averaged": (
        lambda patch: patch.setattr(lightning_loss, "_scalar", lambda loss, what: loss.mean()),
        lambda folder: check_bad("a step that gives a vector", folder),
    ),
    "the trainer answers everything": (
        lambda patch: patch.setattr(stand_in_trainer.StandInTrainer, "__getattr__", lambda self, name: 1),
        lambda folder: check_bad("a step that asks the trainer", folder),
    ),
    "inner modules are not silenced": (
        lambda patch: patch.setattr(stand_in_trainer, "is_lightning", lambda kind, name: kind is tiny.Outer),
        lambda folder: check_family("a module of Lightning inside", folder),
    ),
    "a class that the file names is imported": (
        lambda patch: patch.setattr(lightning_modules, "_refuse_without_data", lambda *_: None),
        lambda folder: check_bad("a data module the file names", folder),
    ),
    "training data that cannot be made are left out": (
        lambda patch: patch.setattr(lightning_data, "STAGES", {"test": ("test",)}),
        lambda folder: check_bad("data that cannot be made", folder),
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_this_promise_would_notice(name, monkeypatch, tmp_path):
    damage, check = BREAKAGES[name]
    check(tmp_path)
    damage(monkeypatch)
    with pytest.raises((AssertionError, hessdiag.HessdiagError, RuntimeError, AttributeError, TypeError)):
        check(tmp_path)
