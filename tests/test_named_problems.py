"""Promise: a model, data and a loss by name give the problem that the names say, on every verb. (15 s)

What a scheme of hessdiag's own does with its library is held by `test_named_models_*`; here models come from an
entry point, as another package would add them.
"""

from __future__ import annotations

import json
import struct
from importlib.metadata import EntryPoint
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import hessdiag
from hessdiag.errors import HessdiagError
from hessdiag.schemes import address, assemble, known, losses, pictures
from hessdiag.schemes.address import parse_address
from hessdiag.schemes.assemble import build, read_data
from hessdiag.schemes.recipe import Recipe
from tests.command import call

DEMO = "tests/data/demo.safetensors"
KNOWN = {"npz": "npz:FILE", "digits": "digits:"}
FACTORY = "hessdiag.sources.digits:problem"


def tiny(place, checkpoint=None, width=4):
    """The entry point of another package."""
    torch.manual_seed(0)
    if place == "broken":
        sizes = {}
        sizes["never"]
    if place == "text":
        return "no module"
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, 10))


def halves(place, rows=40):
    inputs, targets = torch.arange(rows * 64.0).reshape(rows, 1, 8, 8) / 1e3, torch.arange(rows) % 10
    return {"train": (inputs, targets), "test": (inputs[:10], targets[:10])}


def absolute(outputs, targets):
    return (outputs - nn.functional.one_hot(targets, 10)).abs().mean()


@pytest.fixture(autouse=True)
def others(monkeypatch):
    """Another package's entry points."""
    mine = {
        "hessdiag.models": [EntryPoint("tiny", f"{__name__}:tiny", "hessdiag.models")],
        "hessdiag.data": [EntryPoint("halves", f"{__name__}:halves", "hessdiag.data")],
        "hessdiag.losses": [
            EntryPoint("absolute", f"{__name__}:absolute", "hessdiag.losses"),
            EntryPoint("gone", "no.such.module:f", "hessdiag.losses"),
        ],
    }
    monkeypatch.setattr(known, "entry_points", lambda group: mine[group])


def mnist_folder(folder: Path) -> Path:
    for name, count in (("train", 3), ("t10k", 2)):
        pixels, labels = folder / f"{name}-images-idx3-ubyte", folder / f"{name}-labels-idx1-ubyte"
        pixels.write_bytes(struct.pack(">IIII", 2051, count, 8, 8) + bytes(range(64)) * count)
        labels.write_bytes(struct.pack(">II", 2049, count) + bytes(range(count)))
    return folder


# addresses


def test_an_address_has_a_scheme_a_place_and_options():
    found = parse_address("npz:a b/c?d.npz?x=in&y=out&n=3&flag=true&l=[1,2]&t=a%26b", "data", KNOWN)
    assert (found.scheme, found.place) == ("npz", "a b/c?d.npz")
    assert found.options == {"x": "in", "y": "out", "n": 3, "flag": True, "l": [1, 2], "t": "a&b"}
    assert parse_address("digits", "data", KNOWN).scheme == "digits"


ADDRESSES = {
    "mnist:there": "allowed: npz:FILE, digits:",
    "there.npz": "allowed: npz:FILE, digits:",
    "npz:a?x=1&x=2": "x is given twice",
    "npz:a?x=1&y": "'y' is no option",
}


@pytest.mark.parametrize("text", ADDRESSES)
def test_what_is_no_address_is_refused(text):
    with pytest.raises(HessdiagError) as caught:
        parse_address(text, "data", KNOWN)
    assert ADDRESSES[text] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_options_are_of_the_kind_of_their_default():
    found = parse_address("npz:a?block=64", "data", KNOWN)
    assert found.take({"block": 128, "other": None}) == {"block": 64, "other": None}
    for text, words in {
        "block=x": "must be a number",
        "block=0": "at least 1",
        "bloc=2": "allowed: block",
    }.items():
        with pytest.raises(HessdiagError, match=words):
            parse_address(f"npz:a?{text}", "data", KNOWN).take({"block": 128})


# data


def splits(*data):
    return read_data(Recipe(model="tiny:", data=data))


def test_splits_are_those_of_the_data_or_those_named():
    assert list(splits("digits:")) == ["train", "test"]
    assert len(splits("digits:")["train"].rows) == 1437
    swapped = splits("train=digits:?split=test", "test=digits:?split=train")
    assert [len(rows.rows) for rows in swapped.values()] == [360, 1437]
    assert list(splits("test=digits:")) == ["test"]
    mixed = splits("digits:", "test=halves:")
    assert [len(mixed["train"].rows), len(mixed["test"].rows[0])] == [1437, 10]


@pytest.mark.parametrize("data", [("digits:", "halves:"), ("digits:?split=val",), ("val=digits:",)])
def test_splits_that_are_not_there_are_refused(data):
    with pytest.raises(HessdiagError) as caught:
        splits(*data)
    assert "train" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_arrays_are_tensors_or_pictures(tmp_path):
    rng = np.random.default_rng(0)
    pixels, floats = rng.integers(0, 255, (5, 4, 4, 3), "uint8"), rng.normal(size=(5, 7))
    np.savez(tmp_path / "a.npz", x=pixels, y=np.arange(5), floats=floats, real=floats[:, 0])
    rows = splits(f"npz:{tmp_path}/a.npz?mean=0.5&std=[0.1,0.2,0.5]")["train"]
    assert rows.kind == "images"
    image, target = rows.rows[2]
    assert (np.asarray(image) == pixels[2]).all()
    assert target == 2
    given, _ = assemble.NamedModel(model=nn.Identity()).prepare(rows)[2]
    wanted = (pixels[2].transpose(2, 0, 1) / 255 - 0.5) / np.array([0.1, 0.2, 0.5])[:, None, None]
    assert np.allclose(given, wanted, atol=1e-6)
    table = splits(f"npz:{tmp_path}/a.npz?x=floats&y=real")["train"]
    assert table.kind == "tensors"
    assert [tensor.dtype for tensor in table.rows[0]] == [torch.float32, torch.float32]
    found = splits(f"mnist:{mnist_folder(tmp_path)}")
    assert [len(found["train"].rows), len(found["test"].rows)] == [3, 2]


BAD_DATA = {
    "npz:none.npz": "none.npz",
    "npz:{d}/a.npz?x=z": "z",
    "npz:{d}/a.npz?y=few": "one row and one target each",
    "npz:{d}/a.npz?x=flat&size=8": "size is for pictures",
    "npz:{d}/a.npz?size=-1": "whole number of pixels",
    "npz:{d}/a.npz?std=0": "above 0",
    "npz:{d}/a.npz?mean=blue": "must be a number",
    "npz:{d}/a.npz?x=broken&y=few": "NaN",
    "mnist:{d}/none": "train-images-idx3-ubyte",
    "digits:?size=3": "allowed: none",
    "cifar:here": "allowed: digits:",
    "halves:?rowz=3": "rowz",
}


@pytest.mark.parametrize("text", BAD_DATA)
def test_bad_data_is_one_line(text, tmp_path):
    pixels = np.zeros((5, 4, 4), "uint8")
    broken = np.array([[0.0], [np.nan]])
    np.savez(tmp_path / "a.npz", x=pixels, y=np.arange(5), few=np.arange(2), flat=np.ones((5, 2)), broken=broken)
    code, out, err = call(
        "analyze", "--model", "tiny:", "--loss", "cross_entropy", "--data", text.format(d=tmp_path)
    )
    assert code in (2, 4), err
    assert out == ""
    assert BAD_DATA[text] in err
    assert err.count("\n") == 1


# losses


def test_losses_have_names():
    assert losses.loss_of("cross_entropy") == "cross_entropy"
    smooth = losses.loss_of("nn.CrossEntropyLoss(label_smoothing=0.25)")
    assert (type(smooth), smooth.label_smoothing) == (nn.CrossEntropyLoss, 0.25)
    assert losses.loss_of("absolute") is absolute
    assert losses.loss_of(f"{__name__}:absolute") is absolute


BAD_LOSSES = {
    "crossentropy": "allowed: cross_entropy, mse",
    "CrossEntropyLoss(smoothing=0.1)": "label_smoothing=0.1",
    "CrossEntropyLoss(__import__('os'))": "by name",
    "CrossEntropyLoss(weight=open('x'))": "by name",
    "MSELoss(reduction='none')": "no scalar",
    "no.such.module:f": "no module",
    "gone": "does not load",
    f"{__name__}:DEMO": "not a function",
}


@pytest.mark.parametrize("text", BAD_LOSSES)
def test_what_is_no_loss_is_refused(text):
    with pytest.raises(HessdiagError) as caught:
        losses.loss_of(text)
    assert BAD_LOSSES[text] in str(caught.value)
    assert "\n" not in str(caught.value)


# problems


def test_the_numbers_are_those_of_the_problem_written_out():
    train = halves("")["train"]
    model = tiny("", width=3)
    parameters = list(model.parameters())

    def loss(*values):
        names = [name for name, _ in model.named_parameters()]
        outputs = torch.func.functional_call(model, dict(zip(names, values, strict=True)), train[0])
        return nn.functional.cross_entropy(outputs, train[1], label_smoothing=0.1)

    blocks = torch.autograd.functional.hessian(loss, tuple(parameters))
    H = torch.cat(
        [torch.cat([b.reshape(p.numel(), -1) for b in row], 1) for p, row in zip(parameters, blocks, strict=True)]
    )
    named = hessdiag.load("tiny:", "halves:", options={"width": 3}, loss="CrossEntropyLoss(label_smoothing=0.1)")
    found = hessdiag.analyze(named, quantities=["lambda_max", "trace"], samples=40)
    assert found.lambda_max.value == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-3)
    assert found.trace.lo - 1e-3 <= float(H.trace()) <= found.trace.hi + 1e-3


def test_a_checkpoint_is_put_in_strictly(tmp_path):
    model = tiny("", width=5)
    nn.init.constant_(model[1].weight, 0.5)
    torch.save(model.state_dict(), tmp_path / "five.pt")
    problem = hessdiag.load("tiny:", "digits:", loss="mse", checkpoint=tmp_path / "five.pt", options={"width": 5})
    assert bool((problem.model[1].weight == 0.5).all())
    with pytest.raises(HessdiagError, match=r"five\.pt"):
        hessdiag.load("tiny:", "digits:", loss="mse", checkpoint=tmp_path / "five.pt")


BAD_PROBLEMS = {
    "analyze": "hessdiag analyze --help",
    "analyze resnet": "hf:DIR",
    f"analyze {FACTORY} --model tiny:": "both FACTORY",
    "analyze tiny: --data digits:": "give it as --model tiny:",
    "analyze tiny:x": "give it as --model tiny:x",
    f"analyze {FACTORY} --loss mse": "--loss mse goes with --model",
    f"analyze {FACTORY} --use-ema": "--use-ema goes with --model",
    "analyze --model tiny: --data digits:": "--loss cross_entropy",
    "analyze --model tiny: --loss mse": "no data; give --data",
    "analyze --model tiny:broken --data digits: --loss mse": "KeyError",
    "analyze --model tiny:text --data digits: --loss mse": "must return an nn.Module",
    "analyze --model tiny: --data digits: --loss mse -P wide=3": "wide",
    "analyze --model tiny: --data digits: --loss mse --adapter none": "--adapter none",
    "analyze --model tiny: --data digits: --loss mse -c none.pt": "no such checkpoint none.pt",
    "compare a b --data digits:": "--model",
}


@pytest.mark.parametrize("line", BAD_PROBLEMS)
def test_bad_problems_are_one_line(line):
    code, out, err = call(*line.split())
    assert (code, out) == (2 if "none.pt" not in line and "--adapter" not in line else 4, ""), err
    assert BAD_PROBLEMS[line] in err
    assert err.count("\n") == 1


NAMED = ("--model", "tiny:", "--data", "halves:", "--loss", "cross_entropy")
QUICK = ("--samples", "20", "--quantities", "trace")


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in range(3):
        model = tiny("")
        nn.init.normal_(model[1].weight, generator=torch.Generator().manual_seed(seed))
        torch.save(model.state_dict(), tmp_path / f"{seed}.pt")
    return tmp_path


def test_every_verb_takes_names(runs):
    assert call("doctor", *NAMED, *QUICK)[0] == 0
    assert call("analyze", *NAMED, "-c", "0.pt", *QUICK, "-o", "out")[0] == 0
    assert call("compare", "0.pt", "1.pt", *NAMED, *QUICK)[0] == 0
    code, out, err = call("gap", *NAMED, "-c", "*.pt", "--samples", "20", "--measures", "trace", "--json")
    assert (code, len(json.loads(out)["records"])) == (0, 3), err
    assert call("shift", *NAMED, "-c", "*.pt", "--tests", "t1", "-q")[0] in (0, 2, 4)
    code, out, err = call("init", *NAMED, "-c", "0.pt", "--samples", "20", "-q")
    assert code == 0, err
    assert 'model = "tiny:"' in Path("hessdiag.toml").read_text()
    assert call("check", "-q")[0] == 0


def test_places_of_a_configuration_hang_at_its_folder(runs, monkeypatch):
    np.savez(runs / "a.npz", x=np.zeros((12, 8, 8), "float32"), y=np.arange(12) % 10)
    Path("sub").mkdir()
    named = ("--model", "tiny:", "--data", "train=npz:a.npz", "--loss", "cross_entropy")
    assert call("init", *named, "-c", "0.pt", "--quantities", "trace", "-q")[0] == 0
    monkeypatch.chdir("sub")
    code, _, err = call("check", "--fresh", "-q")
    assert code == 0, err


def test_print_config_says_what_and_from_where(runs):
    code, out, _ = call("analyze", *NAMED, "-c", "0.pt", "--samples", "20", "--print-config", "--json")
    rows = {row["what"]: (row["value"], row["source"]) for row in json.loads(out)}
    assert code == 0
    assert rows["loss"] == ("cross_entropy/mean", "as asked")
    assert rows["samples"] == ("20", "--samples")
    assert rows["weights"] == ("0.pt", "as asked")
    assert rows["seed"] == ("0", "default")
    assert rows["model"][0] == "Sequential"


def test_ls_lists_other_packages_too():
    for kind, word in {
        "models": "tiny:...",
        "data": "halves:...",
        "losses": "absolute",
        "measures": "trace",
    }.items():
        code, out, _ = call("ls", kind, "--json")
        assert code == 0
        assert word in {row["name"] for row in json.loads(out)}
        assert word in call("ls", kind)[1]


def test_a_recipe_tells_factories_from_models():
    assert Recipe.of(FACTORY).factory == FACTORY
    assert Recipe.of("tiny:").model == "tiny:"
    assert Recipe.of("p.py:f", data=None, loss=None).loss is None
    one, other = Recipe.of("tiny:", data="digits:"), Recipe.of("tiny:", data="halves:")
    assert one.identity() != other.identity()
    assert one.keys() == {"model": "tiny:", "data": ["digits:"]}


# what these tests must notice


def first_split_wins(patch):
    patch.setattr(assemble, "read_data", lambda recipe: dict(list(read_data(recipe).items())[:1]))


def check_unnormalised(folder):
    np.savez(folder / "a.npz", x=np.full((2, 4, 4), 255, "uint8"), y=np.arange(2))
    rows = read_data(Recipe(model="tiny:", data=(f"npz:{folder}/a.npz?mean=0.5",)))["train"]
    assert float(assemble.NamedModel(model=nn.Identity()).prepare(rows)[0][0].max()) == pytest.approx(0.5)


BREAKAGES = {
    "only the first split is read": (first_split_wins, lambda folder: check_both_splits()),
    "the loss asked for is not taken": (
        lambda patch: patch.setattr(assemble, "loss_of", lambda text, app_dir: "mse"),
        lambda folder: check_loss(),
    ),
    "weights are not loaded": (
        lambda patch: patch.setattr(assemble, "load_into", lambda model, weights: ()),
        test_a_checkpoint_is_put_in_strictly,
    ),
    "pictures are not normalised": (
        lambda patch: patch.setattr(pictures, "_per_channel", lambda n, v, default, t: torch.tensor(default)),
        check_unnormalised,
    ),
    "unknown options are ignored": (
        lambda patch: patch.setattr(address.Address, "take", lambda self, allowed: {**allowed, **self.options}),
        lambda folder: test_options_are_of_the_kind_of_their_default(),
    ),
    "all data are one": (
        lambda patch: patch.setattr(Recipe, "identity", lambda self: str(self.model)),
        lambda folder: test_a_recipe_tells_factories_from_models(),
    ),
}


def check_both_splits():
    assert list(hessdiag.load("tiny:", "digits:", loss="mse").data) == ["train", "test"]


def check_loss():
    assert (
        build(Recipe.of("tiny:", data="digits:", loss="cross_entropy")).problem.loss_name == "cross_entropy/mean"
    )


@pytest.mark.parametrize("name", BREAKAGES)
def test_this_promise_would_notice(name, monkeypatch, tmp_path):
    damage, check = BREAKAGES[name]
    check(tmp_path)
    damage(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(tmp_path)
