"""Whatever a user gets wrong is one line on stderr, with the right exit code, and leaves every file as it was.

Each case names what its line must say: the cause, and the way out. The factories are in ``bad_problems.py``.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hessdiag import cli, files
from hessdiag.engine.products.curvature import Curvature
from hessdiag.errors import LoadError
from hessdiag.sources import archive
from tests.bad_files import write_bad_files
from tests.models import differentiable_once

HERE = Path(__file__).parent
GOOD = "analyze p.py:good"
HOSTILE = "can run code", "--trust-pickle"

Case = tuple[str, int, tuple[str, ...]]
EARLY: list[Case] = [
    # the command line
    ("analyze", 2, ("FACTORY", "hessdiag analyze --help")),
    ("nonsense", 2, ("nonsense", "hessdiag --help")),
    (f"{GOOD} --nonsense", 2, ("--nonsense", "hessdiag analyze --help")),
    (f"{GOOD} extra", 2, ("extra", "--help")),
    (f"{GOOD} --samples many", 2, ("--samples", "integer")),
    (f"{GOOD} --operator fisher", 2, ("fisher", "'hessian', 'ggn'")),
    (f"{GOOD} --dtype float16", 2, ("float16", "'float32', 'float64'")),
    (f"{GOOD} --method magic", 2, ("magic", "forward_over_reverse")),
    (f"{GOOD} --cross-check nothing", 2, ("nothing", "pyhessian")),
    ("completion tcsh", 2, ("tcsh", "fish")),
    ("demo -o p.py/out", 4, ("cannot write p.py/out", "-o")),
    # settings that do not exist, or contradict themselves
    (f"{GOOD} --quantities lambda_maxx", 2, ("lambda_maxx", "did you mean lambda_max?")),
    (f"{GOOD} --quantities loudness", 2, ("loudness", "allowed: lambda_max")),
    (f"{GOOD} --quantities ,", 2, ("no quantities", "at least one of")),
    (f"{GOOD} --samples 0", 2, ("--samples 0", "at least 1")),
    (f"{GOOD} --batch-size -3", 2, ("--batch-size -3", "at least 1")),
    (f"{GOOD} --block 0", 2, ("--block 0", "at least 1")),
    (f"{GOOD} --top 0", 2, ("--top 0", "at least 1")),
    (f"{GOOD} --max-steps 0", 2, ("--max-steps 0", "at least 1")),
    (f"{GOOD} --rtol 2", 2, ("--rtol 2", "less than 1")),
    (f"{GOOD} --rtol nan", 2, ("--rtol nan", "less than 1")),
    (f"{GOOD} --confidence 1.5", 2, ("--confidence 1.5", "0.5 to less than 1")),
    (f"{GOOD} --probes 1", 2, ("--probes 1", "at least 2")),
    (f"{GOOD} --steps 1", 2, ("--steps 1", "at least 2")),
    (f"{GOOD} --density-probes 1", 2, ("--density-probes 1", "at least 2")),
    (f"{GOOD} --operator ggn --method finite_difference", 2, ("--operator ggn", "drop one")),
    (f"{GOOD} -o p.py/out", 4, ("cannot write p.py/out", "-o")),
    (f"{GOOD} -o /proc/nowhere", 4, ("cannot write /proc/nowhere", "-o")),
    # the factory
    ("analyze p.py", 2, ("'p.py'", "p.py:problem")),
    ("analyze package.module", 2, ("package.module", "did you mean package:module?")),
    ("analyze missing.py:problem", 2, ("no such file missing.py", "path/file.py:function")),
    ("analyze p:good --app-dir nowhere", 2, ("--app-dir nowhere", "no such folder")),
    (f"{GOOD} -P depth", 2, ("-P depth", "name=value")),
    (f"{GOOD} -P width=1 -P width=2", 2, ("given twice", "keep one")),
    # the checkpoint
    (f"{GOOD} -c missing.pt", 4, ("missing.pt", "give an existing file with -c")),
]
"""Refused before torch is imported."""
CASES: list[Case] = [
    *EARLY,
    # settings that do not exist, or contradict themselves
    (f"{GOOD} --split val", 2, ("--split val", "train")),
    (f"{GOOD} --device cuda:77", 2, ("--device cuda:77", "cpu")),
    (f"{GOOD} --device toaster", 2, ("--device toaster", "cpu")),
    (f"{GOOD} --params 'q*'", 2, ("--params 'q*'", "0.weight")),
    (f"{GOOD} --params '!*'", 2, ("--params '!*'", "0.weight")),
    # the factory
    ("analyze missing_module:problem", 2, ("no module 'missing_module'", "--app-dir")),
    ("analyze p.py:goood", 2, ("no 'goood'", "did you mean good?")),
    ("analyze p.py:zzz", 2, ("no 'zzz'", "functions are", "...")),
    ("analyze p.py:number", 2, ("int, not a function", "def number()")),
    (f"{GOOD} -P depth=3", 2, ("no option 'depth'", "accepted are width")),
    (f"{GOOD} -P checkpoint=a.pt", 2, ("-P checkpoint", "-c FILE")),
    ("analyze p.py:needs_option", 2, ("'root'", "-P root=")),
    ("analyze p.py:needs_checkpoint", 2, ("needs a checkpoint", "-c FILE")),
    ("analyze syntax.py:problem", 2, ("SyntaxError", "syntax.py, line 1", "--debug")),
    ("analyze binary.py:problem", 2, ("binary.py", "--debug")),
    ("analyze imports.py:problem", 2, ("No module named 'not_installed'", "--debug")),
    ("analyze p.py:raises", 2, ("RuntimeError: the data disk is not mounted", "--debug")),
    ("analyze p.py:leaves", 2, ("usage: train.py --data DIR", "--debug")),
    ("analyze p.py:interrupted", 130, ("interrupted", "nothing half-written")),
    ("analyze p.py:nothing", 2, ("NoneType", "return a Problem")),
    ("analyze p.py:pair", 2, ("tuple", "(model, loss, data)")),
    ("analyze p.py:misnamed_field", 2, ("'dataset'", "fields of a problem are model, data")),
    ("analyze p.py:class_for_model", 2, ("model is type", "Problem(model=")),
    ("analyze p.py:two_losses", 2, ("give one of criterion", "loss f(model, batch)")),
    ("analyze p.py:unknown_criterion", 2, ("'hinge'", "allowed: cross_entropy, mse")),
    ("analyze p.py:module_criterion", 2, ("class indices", "give nn.CrossEntropyLoss()")),
    # the checkpoint
    (f"{GOOD} -c empty.pt", 4, ("empty.pt is empty", "interrupted")),
    (f"{GOOD} -c cut.pt", 4, ("cut.pt is damaged or cut short", "save it again")),
    (f"{GOOD} -c cut.safetensors", 4, ("cut.safetensors is damaged", "save it again")),
    (f"{GOOD} -c picture.pt", 4, ("picture.pt is not a checkpoint", "torch.save")),
    (f"{GOOD} -c picture.safetensors", 4, ("not a safetensors file", "save it again")),
    (f"{GOOD} -c page.bin", 4, ("page.bin is a web page", "download the file")),
    (f"{GOOD} -c p.py", 4, ("p.py is not a checkpoint", "torch.save")),
    (f"{GOOD} -c pointer.ckpt", 4, ("Git LFS pointer", "git lfs pull")),
    (f"{GOOD} -c folder", 4, ("folder is a folder", "give a checkpoint file")),
    (f"{GOOD} -c module.pt", 4, (*HOSTILE, "Sequential", "torch.save(model")),
    (f"{GOOD} -c hostile.pt", 4, HOSTILE),
    (f"{GOOD} -c hostile.ckpt", 4, HOSTILE),
    (f"{GOOD} -c hostile.bin", 4, HOSTILE),
    (f"{GOOD} -c hostile.pkl", 4, HOSTILE),
    (f"{GOOD} -c hostile.safetensors", 4, HOSTILE),
    (f"{GOOD} -c stranger.pt", 4, ("0 of 4 tensors matched", "another architecture", "and 24 more")),
    (f"{GOOD} -c classes.pt", 4, ("2.bias (7,)", "number of classes?", "7 in place of 3", "-P")),
    (f"{GOOD} -c lacking.pt", 4, ("3 of 4 tensors matched", "missing: 2.bias")),
    (f"{GOOD} -c more.pt", 4, ("unexpected: 3.bias",)),
    (f"{GOOD} -c prefix.pt", 4, ("'backbone.'", "more or other tensors")),
    (f"{GOOD} -c integers.pt", 4, ("int8", "give the original weights")),
    (f"{GOOD} -c nan.pt", 4, ("NaN or infinity", "0.bias", "earlier checkpoint")),
    (f"{GOOD} -c inf.pt", 4, ("NaN or infinity", "0.bias", "earlier checkpoint")),
    (f"{GOOD} -c nothing.pt", 4, ("no tensors", "torch.save(model")),
    (f"{GOOD} -c good.pt::ema", 4, ("no entry 'ema'", "leave it off")),
    # model, data and loss
    ("analyze p.py:nan_weights", 4, ("0.weight", "NaN", "earlier checkpoint")),
    ("analyze p.py:nan_loss", 4, ("loss", "nan", "--dtype float64")),
    ("analyze p.py:inf_loss", 4, ("loss", "inf", "--dtype float64")),
    ("analyze p.py:float_loss", 2, ("not a scalar", "mean loss of the batch")),
    ("analyze p.py:vector_loss --batch-size 4", 2, ("(4,), not a scalar", "mean loss of the batch")),
    ("analyze p.py:float_loss --operator ggn", 2, ("--operator ggn", "criterion(outputs, batch)")),
    ("analyze p.py:empty", 2, ("data['train'] is empty",)),
    ("analyze p.py:no_batches", 2, ("data['train'] is empty",)),
    ("analyze p.py:uneven", 2, ("lengths [5, 12]", "as many")),
    ("analyze p.py:ragged --batch-size 4", 2, ("do not make a batch", "DataLoader")),
    ("analyze p.py:data_is_a_number", 2, ("is int", "DataLoader")),
    ("analyze p.py:data_raises", 2, ("image 3 cannot be read", "--debug")),
    ("analyze p.py:label_too_large --batch-size 12", 2, ("Target 3 is out of bounds", "check shapes and labels")),
    ("analyze p.py:label_too_large_later --batch-size 2", 2, ("Target 3 is out of bounds", "later batch")),
    ("analyze p.py:loss_of_another_model", 4, ("does not depend on the parameters", "the model given to")),
    ("analyze p.py:label_negative", 2, ("Target -1 is out of bounds", "check shapes and labels")),
    ("analyze p.py:all_ignored", 2, ("every target is ignored", "other samples")),
    ("analyze p.py:other_width", 2, ("first batch", "check shapes and labels")),
    ("analyze p.py:no_targets", 2, ("no targets", "(inputs, targets)")),
    ("analyze p.py:returns_tuple", 2, ("must be Tensor, not tuple", "first batch")),
    ("analyze p.py:model_raises", 2, ("ValueError: two lines from forward", "first batch")),
    ("analyze p.py:forward_leaves", 4, ("'no GPU'", "raise an error instead")),
    ("analyze p.py:frozen", 2, ("no trainable", "unfreeze")),
    ("analyze p.py:integers", 2, ("no trainable", "unfreeze")),
    ("analyze p.py:no_parameters", 2, ("no trainable", "0 in all")),
    ("analyze p.py:meta", 4, ("meta device", "load them fully")),
    ("analyze p.py:differentiable_once", 4, (differentiable_once()[0], "--method finite_difference")),
    ("analyze p.py:detached_backward", 4, ("custom Detached", "in torch operations")),
    ("analyze p.py:once", 4, ("custom Once", "in torch operations")),
    ("analyze p.py:padding", 4, ("padding_idx", "padding_idx = None")),
    ("analyze p.py:functional_dropout", 4, ("same loss twice", "switch that off")),
    ("analyze p.py:augmentation", 4, ("same loss twice", "switch that off")),
    ("doctor p.py:augmentation", 4, ("same loss twice", "switch that off")),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    shutil.copy(HERE / "bad_problems.py", folder / "p.py")
    write_bad_files(folder)
    return folder


def content(folder: Path) -> dict[str, str]:
    """Every file below, by hash, but for Python's own."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.parent.name != "__pycache__")
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def run(arguments: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, list[str]]:
    """Exit code, stdout, and what stderr holds beside the notes (which begin with spaces)."""
    given = shlex.split(arguments)
    if given[0] == "analyze":  # what must fail shall not succeed at length
        given += [] if "-o" in given else ["-o", "out"]
        given += [] if "--quantities" in given else ["--quantities", "lambda_max"]
    code = cli.run(given)
    out, err = capsys.readouterr()
    return code, out, [line for line in err.splitlines() if line and not line.startswith("  ")]


def check(case: Case, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, expected, fragments = case
    before = content(folder)
    code, out, lines = run(arguments, capsys)
    assert code == expected, lines
    assert len(lines) == 1, lines
    assert lines[0].startswith("hessdiag: ")
    for fragment in fragments:
        assert fragment in lines[0]
    assert out == ""
    assert not re.match(r"hessdiag: unexpected \w+:", lines[0])
    assert content(folder) == before


@pytest.mark.parametrize("case", CASES, ids=lambda case: case[0])
def test_bad_input_is_one_line(
    case: Case, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    check(case, folder, capsys)


def full_disk(monkeypatch: pytest.MonkeyPatch, room: int = 0) -> None:
    """A disk with room for so many files."""
    calls = iter(range(room))

    def fsync(handle: int) -> None:
        if next(calls, None) is None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, "fsync", fsync)


def control_c(monkeypatch: pytest.MonkeyPatch, after: int = 5) -> None:
    """Ctrl-C during a product."""
    apply, calls = Curvature.multiply, iter(range(after))

    def interrupted(self: Curvature, rows: torch.Tensor) -> torch.Tensor:
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return apply(self, rows)

    monkeypatch.setattr(Curvature, "multiply", interrupted)


MISHAPS: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], int, tuple[str, ...]]] = {
    "full disk": (full_disk, 4, ("No space left", "-o")),
    "disk full after the test file": (lambda m: full_disk(m, 1), 4, ("No space left", "-o")),
    "Ctrl-C in the middle": (control_c, 130, ("interrupted",)),
    "no memory": (
        lambda m: m.setattr(Curvature, "multiply", lambda *_: (_ for _ in ()).throw(MemoryError("of 8 GiB"))),
        4,
        ("MemoryError", "of 8 GiB"),
    ),
}


@pytest.mark.parametrize("mishap", MISHAPS)
def test_mishaps_are_one_line(
    mishap: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    patch, code, fragments = MISHAPS[mishap]
    monkeypatch.chdir(folder)
    patch(monkeypatch)
    before = content(folder)
    found, out, lines = run(GOOD, capsys)
    assert (found, out, len(lines)) == (code, "", 1), lines
    assert lines[0].startswith("hessdiag: ")
    assert all(fragment in lines[0] for fragment in fragments), lines
    assert content(folder) == before


def test_a_disk_that_fills_later_leaves_no_part_of_a_run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    full_disk(monkeypatch, room=3)
    code, _, lines = run(f"{GOOD} -o {tmp_path}/out", capsys)
    assert (code, len(lines)) == (4, 1)
    assert list((tmp_path / "out").iterdir()) == []


def test_a_traceback_is_shown_only_on_request(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    code = cli.run(["analyze", "p.py:raises", "--debug"])
    text = capsys.readouterr().err
    assert code == 2
    assert "Traceback" in text
    assert "p.py" in text.split("in raises")[0].splitlines()[-1]
    assert text.splitlines()[-1].startswith("hessdiag: ")


WITHOUT_TORCH = """
import shlex, sys
from hessdiag.cli import run
codes = [run(shlex.split(line)) for line in sys.stdin.read().split("\\n")]
print(*codes, file=sys.stderr)
print("heavy:", *{"torch", "scipy", "pandas", "matplotlib", "numpy"} & set(sys.modules), file=sys.stderr)
"""


def test_help_and_usage_errors_never_wait_for_torch(folder: Path) -> None:
    helpful = ["", "--help", "--version", "completion bash", "schema"]
    helpful += [f"{verb} --help" for verb in cli.VERBS]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        input="\n".join([*helpful, *(case[0] for case in EARLY)]),
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        timeout=60,
        check=True,
    )
    *_, codes, heavy = done.stderr.splitlines()
    assert heavy == "heavy:"
    assert codes == " ".join(str(code) for code in [0] * len(helpful) + [case[1] for case in EARLY])


def unrestricted(path: Path, kind: archive.Format) -> Any:
    return archive.unpickle_trusted(path, kind)


def leaves_its_test_file(folder: Path) -> None:
    files.write_whole(Path(folder) / "test", "")


BROKEN: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "tracebacks": (
        f"{GOOD} -c missing.pt",
        lambda m: m.setattr(cli, "refuse", lambda error, text, code, debug: refuse(error, text, code, True)),
    ),
    "a line without our name": (
        f"{GOOD} -c missing.pt",
        lambda m: m.setattr(cli, "refuse", lambda error, text, code, debug: print(text, file=sys.stderr) or code),
    ),
    "another exit code": (f"{GOOD} -c cut.pt", lambda m: m.setattr(LoadError, "exit_code", 1)),
    "a pickle that runs": (
        f"{GOOD} -c hostile.pt",
        lambda m: m.setattr(archive, "unpickle_safely", unrestricted),
    ),
    "a file of the user's removed": (
        f"{GOOD} -c empty.pt",
        lambda m: m.setattr(archive, "locate", lambda path: path.unlink()),
    ),
    "a file left in the output folder": (
        "analyze p.py:nan_loss",
        lambda m: m.setattr(files, "require_writable", leaves_its_test_file),
    ),
    "no self-test": (
        "analyze p.py:detached_backward",
        lambda m: m.setattr("hessdiag.analysis.measurement.require_sound", lambda checked: None),
    ),
    "settings that are not checked": (
        f"{GOOD} --rtol 2",
        lambda m: m.setattr("hessdiag.settings.Settings.__post_init__", lambda self: None),
    ),
}
refuse = cli.refuse


@pytest.mark.parametrize("breakage", BROKEN)
def test_this_promise_would_notice(
    breakage: str,
    tmp_path: Path,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments, break_it = BROKEN[breakage]
    case = next(case for case in CASES if case[0] == arguments)
    project = shutil.copytree(folder, tmp_path / "project")
    monkeypatch.chdir(project)
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        check(case, project, capsys)
