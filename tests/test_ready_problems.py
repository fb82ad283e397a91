"""Factories, options and ready data sets give the problem that was described, or one line saying why not.

Oracles: files written here byte by byte; the facts of the digits (1797 pictures, ten classes).
"""

from __future__ import annotations

import gzip
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from hessdiag.errors import HessdiagError, LoadError, ProblemError, UsageError
from hessdiag.problem import Problem
from hessdiag.samples import draw
from hessdiag.sources import characters, datasets, factory, images, mnist, spec
from hessdiag.sources.datasets import digits
from hessdiag.sources.digits import RECIPES, digits_mlp, problem, train_digits
from hessdiag.sources.factory import build_problem
from hessdiag.sources.spec import parse_options, split_spec

PROJECT = """
import torch
from torch import nn
from hessdiag.problem import Problem
from beside import WIDTH

DATA = (torch.arange(8.0).reshape(4, 2), torch.tensor([0, 1, 0, 1]))
PROBLEM = Problem(nn.Linear(2, 2), {"train": DATA}, "cross_entropy")

def whole(width=WIDTH, *, bias=True):
    return Problem(nn.Linear(width, 2, bias=bias), {"train": DATA}, criterion="cross_entropy")

def fields(**options):
    return {"model": nn.Linear(2, 2), "data": {"train": DATA}, "criterion": "mse", "meta": options}

def triple():
    return nn.Linear(2, 2), lambda model, batch: model(batch[0]).sum(), DATA

def named():
    return nn.Linear(2, 2), "cross_entropy", {"test": DATA}

def own(checkpoint=None, width=2):
    found = whole(width)
    found.meta["from"] = checkpoint
    return found

def needy(checkpoint, width):
    return whole(width)

def late():
    import beside_too
    return whole()

def raising():
    raise ValueError("no such\\nfolder")

def leaving():
    raise SystemExit(3)

def loading():
    from hessdiag.sources import images
    images("none.npz")

def nothing(): pass
def module(): return nn.Linear(2, 2), 5, DATA
def unknown(): return {"model": nn.Linear(2, 2), "data": {"train": DATA}, "critterion": "mse"}
def partial(): return {"model": nn.Linear(2, 2), "criterion": "mse"}

class Zoo:
    @staticmethod
    def small(): return whole()
"""


@pytest.fixture
def project(tmp_path: Path) -> str:
    (tmp_path / "facts.py").write_text(PROJECT)
    (tmp_path / "beside.py").write_text("WIDTH = 2\n")
    (tmp_path / "beside_too.py").write_text("")
    (tmp_path / "broken.py").write_text("def f(:\n")
    (tmp_path / "lacking.py").write_text("import no_such_package\n")
    return str(tmp_path / "facts.py")


@pytest.fixture(autouse=True)
def clean_modules() -> Any:
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if name.startswith(("beside", "facts")):
            del sys.modules[name]


def saved(folder: Path, model: nn.Module) -> str:
    save_file({name: tensor + 1 for name, tensor in model.state_dict().items()}, folder / "c.safetensors")
    return str(folder / "c.safetensors")


def test_what_a_factory_returns_becomes_a_problem(project: str) -> None:
    before = list(sys.path)
    built = build_problem(f"{project}:whole", options={"bias": False})
    assert isinstance(built.problem, Problem)
    assert built.weights is None
    assert "no checkpoint given" in built.notes[0]
    assert built.problem.parameter_names() == ("weight",)
    assert build_problem(f"{project}:fields", options={"lr": 0.1}).problem.meta == {"lr": 0.1}
    assert build_problem(f"{project}:triple").problem.loss is not None
    assert set(build_problem(f"{project}:named").problem.data) == {"test"}
    assert isinstance(build_problem(f"{project}:Zoo.small").problem, Problem)
    assert isinstance(build_problem(f"{project}:late").problem, Problem)
    assert sys.path == before


def test_a_module_is_found_from_the_app_dir(project: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_problem("facts:whole", app_dir=str(Path(project).parent)).problem.has_outputs
    del sys.modules["facts"], sys.modules["beside"]
    monkeypatch.chdir(Path(project).parent)
    assert build_problem("facts:whole").problem.has_outputs


def check_loading(project: str) -> None:
    checkpoint = saved(Path(project).parent, nn.Linear(2, 2))
    built = build_problem(f"{project}:whole", checkpoint=checkpoint)
    assert built.weights is not None
    assert torch.equal(built.problem.model.weight, built.weights.state["weight"])
    own = build_problem(f"{project}:own", checkpoint=checkpoint)
    assert own.problem.meta == {"from": checkpoint}
    assert own.weights is None
    assert "by the factory" in own.notes[0]
    with pytest.raises(LoadError, match="does not fit"):
        build_problem(f"{project}:whole", checkpoint=checkpoint, options={"width": 3})


def test_a_checkpoint_is_loaded_here_or_by_the_factory(project: str) -> None:
    check_loading(project)


REFUSED: dict[str, tuple[str, dict[str, Any], type[HessdiagError], str]] = {
    "unknown option": (
        "facts.py:whole",
        {"options": {"depth": 3}},
        UsageError,
        "'depth'; accepted are width, bias",
    ),
    "missing checkpoint": ("facts.py:needy", {"options": {"width": 2}}, UsageError, "-c FILE"),
    "checkpoint as option": ("facts.py:own", {"options": {"checkpoint": "x"}}, UsageError, "-c FILE"),
    "no such checkpoint": ("facts.py:own", {"checkpoint": "none.pt"}, LoadError, "no such"),
    "no such function": ("facts.py:hole", {}, UsageError, "functions are whole, fields, triple"),
    "not a function": ("facts.py:PROBLEM", {}, UsageError, "is a Problem, not a function"),
    "no such file": ("none.py:f", {}, UsageError, "no such Python file"),
    "raises": ("facts.py:raising", {}, ProblemError, "raised ValueError: no such folder"),
    "leaves": ("facts.py:leaving", {}, ProblemError, "raised SystemExit"),
    "refuses": ("facts.py:loading", {}, LoadError, "none.npz: no such data file"),
    "broken file": ("broken.py:f", {}, ProblemError, "raised SyntaxError"),
    "lacking a package": ("lacking.py:f", {}, ProblemError, "no_such_package"),
    "nothing returned": ("facts.py:nothing", {}, ProblemError, "returned NoneType"),
    "a number for a loss": ("facts.py:module", {}, ProblemError, "must be cross_entropy, mse, causal_lm, one of"),
    "an unknown field": ("facts.py:unknown", {}, ProblemError, "'critterion'; the fields .* model, data"),
    "a missing field": ("facts.py:partial", {}, ProblemError, "no 'data'"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_problem_is_refused_in_one_line(project: str, what: str) -> None:
    where, arguments, error, words = REFUSED[what]
    with pytest.raises(error, match=words) as caught:
        build_problem(str(Path(project).parent / where), **arguments)
    assert "\n" not in str(caught.value)
    assert what not in ("raises", "leaves") or caught.value.__cause__ is not None


def test_a_missing_option_is_named(project: str) -> None:
    checkpoint = saved(Path(project).parent, nn.Linear(2, 2))
    with pytest.raises(UsageError, match="-P width="):
        build_problem(f"{project}:needy", checkpoint=checkpoint)


def test_a_missing_module_is_told_from_a_failing_one() -> None:
    with pytest.raises(UsageError, match="`app_dir`") as caught:
        build_problem("no_such_module_at_all.sub:f")
    assert not isinstance(caught.value, ProblemError)


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "random.py").write_text(f"def f():\n    raise ValueError('number {number}')\n")
    for number in (1, 2):
        with pytest.raises(ProblemError, match=f"number {number}"):
            build_problem(f"{tmp_path}/{number}/random.py:f")


def check_options() -> None:
    pairs = ["a=1", "b=1e-3", "c=true", "d=False", "e=null", "f=[1, 2]", "g=text", 'h="3"', "i=x=y", "j="]
    expected = {"a": 1, "b": 1e-3, "c": True, "d": False, "e": None, "f": [1, 2], "g": "text", "h": "3"}
    assert parse_options(pairs) == {**expected, "i": "x=y", "j": ""}
    for wrong in (["a"], ["=1"], ["a b=1"], ["a=1", "a=1"]):
        with pytest.raises(UsageError, match="-P"):
            parse_options(wrong)


def test_options_are_what_they_look_like() -> None:
    check_options()


def test_a_factory_is_named_with_a_colon() -> None:
    assert split_spec("pkg.module:f") == ("pkg.module", "f")
    assert split_spec("C:/a b/file.py:Zoo.small") == ("C:/a b/file.py", "Zoo.small")
    for wrong, way in (("pkg.module.f", "pkg.module:f"), ("a/file.py", "a/file.py:"), (":f", "f:"), ("", "pkg")):
        with pytest.raises(UsageError, match=way):
            split_spec(wrong)


def test_naming_things_needs_no_torch() -> None:
    code = "import sys, hessdiag.sources.spec; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def check_images(folder: Path) -> None:
    last = np.arange(2 * 4 * 5 * 3, dtype=np.uint8).reshape(2, 4, 5, 3)
    np.savez(
        folder / "i.npz", x=last, y=np.array([3, 1], np.uint8), first=last.transpose(0, 3, 1, 2), grey=last[..., 0]
    )
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    expected = ((last / 255 - np.array(mean)) / np.array(std)).transpose(0, 3, 1, 2)
    for name in ("x", "first"):
        found = images(folder / "i.npz", x=name, mean=mean, std=std)
        pixels = np.stack([found[i][0].numpy() for i in range(len(found))])
        np.testing.assert_allclose(pixels, expected, atol=1e-6)  # float32 rounding of numbers up to 2
    picture, target = images(folder / "i.npz", x="grey")[1]
    assert picture.dtype == torch.float32
    np.testing.assert_allclose(picture.numpy(), last[1:, :, :, 0] / 255, atol=1e-7)  # float32 rounding below 1
    assert (int(target), target.dtype) == (1, torch.int64)


def test_images_are_scaled_and_channels_come_first(tmp_path: Path) -> None:
    check_images(tmp_path)


def test_float_images_and_targets_are_taken_as_they_are(tmp_path: Path) -> None:
    np.savez(tmp_path / "f.npz", x=np.full((2, 3, 3), 7.5), y=np.array([0.5, 2.5]))
    picture, target = images(tmp_path / "f.npz")[1]
    assert picture.tolist() == [[[7.5] * 3] * 3]
    assert (float(target), target.dtype) == (2.5, torch.float32)


PIXELS = np.zeros((2, 4, 4), np.uint8)
BAD_ARRAYS: dict[str, tuple[dict[str, Any], str]] = {
    "other names": ({"a": PIXELS, "b": PIXELS}, "no array 'x'; there are a, b"),
    "too few targets": ({"x": PIXELS, "y": np.zeros(1)}, "2 pictures in x"),
    "a single target": ({"x": PIXELS, "y": np.zeros(())}, "2 pictures in x"),
    "flat pictures": ({"x": np.zeros((2, 16)), "y": np.zeros(2)}, "allowed: uint8 or float"),
    "wide integers": ({"x": PIXELS.astype(np.int32), "y": np.zeros(2)}, "allowed: uint8 or float"),
    "text for targets": ({"x": PIXELS, "y": np.array(["a", "b"])}, "allowed: integers"),
    "objects": ({"x": PIXELS, "y": np.array([{}, {}])}, "Python objects"),
    "NaN": ({"x": np.full((2, 4, 4), np.nan), "y": np.zeros(2)}, "NaN"),
}


@pytest.mark.parametrize("what", BAD_ARRAYS)
def test_arrays_that_are_no_pictures_are_refused(tmp_path: Path, what: str) -> None:
    arrays, words = BAD_ARRAYS[what]
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(LoadError, match=words):
        images(tmp_path / "a.npz")


def test_files_that_are_no_arrays_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "cut.npz", x=np.zeros((40, 4, 4)), y=np.zeros(40))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "cut.npz").read_bytes()[:-40])
    (tmp_path / "text.npz").write_text("hello")
    for name in ("cut.npz", "text.npz", "none.npz"):
        with pytest.raises(LoadError, match=name):
            images(tmp_path / name)
    np.savez(tmp_path / "i.npz", x=PIXELS, y=np.zeros(2))
    for wrong in ({"mean": (0.1, 0.2)}, {"std": 0.0}, {"mean": float("nan")}):
        with pytest.raises(UsageError, match=r"mean|std"):
            images(tmp_path / "i.npz", **wrong)


def write_idx(folder: Path, pack: Callable[[bytes], bytes] = bytes) -> tuple[Path, Path]:
    pixels = bytes(range(24))
    header = b"".join(n.to_bytes(4, "big") for n in (2051, 2, 3, 4))
    (folder / "images").write_bytes(pack(header + pixels))
    (folder / "labels").write_bytes(pack((2049).to_bytes(4, "big") + (2).to_bytes(4, "big") + bytes([9, 4])))
    return folder / "images", folder / "labels"


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_files_are_read(tmp_path: Path, pack: Callable[[bytes], bytes]) -> None:
    found = mnist(*write_idx(tmp_path, pack))
    expected = (np.arange(12, 24).reshape(1, 3, 4) / 255 - 0.1307) / 0.3081
    np.testing.assert_allclose(found[1][0].numpy(), expected, atol=1e-6)  # float32 rounding
    assert [int(found[i][1]) for i in range(2)] == [9, 4]


def check_idx_refusals(folder: Path) -> None:
    pictures, labels = write_idx(folder)
    whole = pictures.read_bytes()
    with pytest.raises(LoadError, match="does not begin with 2051"):
        mnist(labels, labels)
    damaged = (whole[:-1], whole + b"x", whole[:10], b"", gzip.compress(whole)[:-9], b"\x1f\x8bxx")
    for content in damaged:
        (folder / "bad").write_bytes(content)
        with pytest.raises(LoadError, match="bad"):
            mnist(folder / "bad", labels)
    labels.write_bytes((2049).to_bytes(4, "big") + (1).to_bytes(4, "big") + bytes([9]))
    with pytest.raises(LoadError, match="not a pair"):
        mnist(pictures, labels)


def test_idx_files_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    check_idx_refusals(tmp_path)


def check_characters(folder: Path) -> None:
    (folder / "t.txt").write_text("abcabcabcd\n", encoding="utf-8")
    found = characters(folder / "t.txt", 3)
    assert found.vocabulary == "\nabcd"
    spelled = [tuple("".join(found.vocabulary[i] for i in ids) for ids in found[n]) for n in range(len(found))]
    assert spelled == [("abc", "bca"), ("abc", "bca"), ("abc", "bcd")]
    assert len(list(found)) == 3
    assert characters(folder / "t.txt", 3, vocabulary="dcba\n")[0][0].tolist() == [3, 2, 1]


def test_windows_of_text_do_not_overlap(tmp_path: Path) -> None:
    check_characters(tmp_path)
    for wrong, words in (({"block": 11}, "smaller block"), ({"block": 3, "vocabulary": "abc"}, "lacks")):
        with pytest.raises(LoadError, match=words):
            characters(tmp_path / "t.txt", **wrong)
    with pytest.raises(UsageError, match="block 0"):
        characters(tmp_path / "t.txt", 0)
    (tmp_path / "t.txt").write_bytes(b"\xff\xfe\xff" * 99)
    with pytest.raises(LoadError, match="UTF-8"):
        characters(tmp_path / "t.txt")


def check_digits() -> None:
    train, test = digits()
    assert (len(train), len(test)) == (1437, 360)
    everything = torch.cat([train.pixels, test.pixels])
    # facts of the UCI file optdigits.tes: counts per class, and levels 0 to 16
    counts = torch.bincount(torch.cat([train.targets, test.targets])).tolist()
    assert counts == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert (int(everything.min()), int(everything.max())) == (0, 16)
    assert train[0][0].shape == (1, 8, 8)
    assert max(float(train[i][0].max()) for i in range(50)) == 1.0


def test_the_embedded_digits_are_all_there() -> None:
    check_digits()


def test_data_sets_travel_and_draw() -> None:
    train, _ = digits()
    again = pickle.loads(pickle.dumps(train))
    assert draw(train, samples=50).digest == draw(again, samples=50).digest


def test_both_trainings_learn_the_digits() -> None:
    train, _ = digits()
    inputs = train.pixels.float() / 16
    before = torch.random.get_rng_state()
    seen: list[tuple[int, int]] = []
    # a few epochs of the recipe's dozens, to be quick: chance is 0.1, and 0.6 is already far from it
    models = [train_digits(kind, epochs=4, on_epoch=lambda *done: seen.append(done)) for kind in ("plain", "flat")]
    for model in models:
        with torch.no_grad():
            assert float((model(inputs).argmax(-1) == train.targets).float().mean()) > 0.6
    assert seen == 2 * [(i, 4) for i in range(1, 5)]
    assert torch.equal(before, torch.random.get_rng_state())
    again = train_digits("plain", epochs=4)
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), models[0].parameters(), strict=True))
    assert not models[0].training


def test_a_training_that_does_not_exist_is_refused() -> None:
    with pytest.raises(UsageError, match="plain, flat"):
        train_digits("sharp")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="epochs 0"):
        train_digits("flat", epochs=0)
    assert set(RECIPES) == {"plain", "flat"}


def test_the_digits_are_a_factory(tmp_path: Path) -> None:
    model = digits_mlp()
    save_file(model.state_dict(), tmp_path / "d.safetensors")
    built = build_problem("hessdiag.sources.digits:problem", checkpoint=str(tmp_path / "d.safetensors"))
    assert sum(p.numel() for p in built.problem.model.parameters()) == 3466
    assert all(
        torch.equal(a, b) for a, b in zip(built.problem.model.parameters(), model.parameters(), strict=True)
    )
    batch = draw(problem().data["train"], samples=8).batches[0]
    assert built.problem.outputs(built.problem.model, batch).shape == (1, 10)


Patch = pytest.MonkeyPatch


def shuffled(raw: Any) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(raw.reshape(len(raw), -1, *raw.shape[1:3])))


BROKEN: dict[str, tuple[Callable[[Patch], None], Callable[[str], None]]] = {
    "the checkpoint is never put in": (
        lambda patch: patch.setattr(factory, "load_into", lambda *_: ()),
        check_loading,
    ),
    "False is a text": (lambda patch: patch.setattr(spec, "PYTHON_LITERALS", {}), lambda _: check_options()),
    "channels stay last": (
        lambda patch: patch.setattr(datasets, "_channels_first", shuffled),
        lambda project: check_images(Path(project).parent),
    ),
    "bytes are not scaled": (
        lambda patch: patch.setattr(
            datasets.Images, "__getitem__", lambda s, i: (s.pixels[i].float(), s.targets[i])
        ),
        lambda project: check_images(Path(project).parent),
    ),
    "windows overlap": (
        lambda patch: patch.setattr(
            datasets.Characters,
            "__getitem__",
            lambda s, i: (s.ids[i : i + s.block], s.ids[i + 1 : i + 1 + s.block]),
        ),
        lambda project: check_characters(Path(project).parent),
    ),
    "cut files pass": (
        lambda patch: patch.setattr(
            datasets, "array_of_idx", lambda path, magic, n: np.zeros((2, 3, 4)[:n], np.uint8)
        ),
        lambda project: check_idx_refusals(Path(project).parent),
    ),
    "another split of the digits": (
        lambda patch: patch.setattr(datasets, "DIGITS_TRAIN", 1400),
        lambda _: check_digits(),
    ),
}


@pytest.mark.parametrize("breakage", BROKEN)
def test_this_promise_would_notice(breakage: str, project: str, monkeypatch: Patch) -> None:
    do, check = BROKEN[breakage]
    do(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(project)
