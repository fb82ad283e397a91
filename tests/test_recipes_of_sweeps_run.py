"""Promise: the page's scripts for joblib, submitit and Ray run as they stand; `hessdiag gap` finds what they kept.

They need joblib, submitit or ray; what is not installed is skipped. (20 s)
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import hessdiag
from hessdiag import pages
from hessdiag.gap import look
from hessdiag.survey import Examination
from tests.command import call

PROBLEM = """
import hessdiag
import torch
from torch import nn


def cifar():
    x = torch.rand(60, 4, generator=torch.Generator().manual_seed(0))
    y = torch.arange(60) % 3
    data = {"train": (x, y), "test": (x[:30], y[:30])}
    return hessdiag.Problem(nn.Linear(4, 3), data, criterion="cross_entropy")
"""
BLOCK = re.compile(r"^```python\n# (?P<name>sweep_\w+\.py)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE)
SCRIPTS = {block["name"]: block["body"] for block in BLOCK.finditer(pages.source("sweeps.md"))}
COMMAND = (
    "gap",
    "problem.py:cifar",
    "-c",
    "runs/*/last.safetensors",
    "--measures",
    "weight_norm,trace",
    "--no-guard",
)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three checkpoints under the names that the page has."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "problem.py").write_text(PROBLEM)
    for seed in range(3):
        torch.manual_seed(seed)
        (tmp_path / f"runs/r{seed}").mkdir(parents=True)
        save_file(torch.nn.Linear(4, 3).state_dict(), tmp_path / f"runs/r{seed}/last.safetensors")
    (tmp_path / "runs/broken").mkdir()
    (tmp_path / "runs/broken/last.safetensors").write_bytes(b"")
    return tmp_path


def run(name: str) -> list[str]:
    """The lines of a script of the page, in the order of their names."""
    Path(name).write_text(SCRIPTS[name])
    paths = [
        str(Path(hessdiag.__file__).parent.parent),
        *filter(None, os.environ.get("PYTHONPATH", "").split(":")),
    ]
    around = {**os.environ, "PYTHONPATH": ":".join(paths)}
    done = subprocess.run([sys.executable, name], env=around, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return sorted(line for line in done.stdout.splitlines() if line.startswith(("r", "broken")))


def check(name: str) -> None:
    assert run(name) == ["broken unreadable", "r0 measured", "r1 measured", "r2 measured"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(look, "examine", None)
        code, _, err = call(*COMMAND, "--csv", "kept.csv")
    assert (code, err.count("kept from before")) == (4, 3), err
    assert list(Path().rglob("*.claim")) == []


def test_the_page_has_the_scripts() -> None:
    assert set(SCRIPTS) == {"sweep_joblib.py", "sweep_ray.py", "sweep_submitit.py"}


def test_joblib(project: Path) -> None:
    pytest.importorskip("joblib")
    check("sweep_joblib.py")
    call(*COMMAND, "--csv", "fresh.csv", "--cache", "other")
    assert Path("kept.csv").read_bytes() == Path("fresh.csv").read_bytes()


@pytest.mark.thorough
def test_submitit(project: Path) -> None:
    pytest.importorskip("submitit")
    check("sweep_submitit.py")


@pytest.mark.thorough
def test_ray(project: Path) -> None:
    pytest.importorskip("ray")
    check("sweep_ray.py")


def check_defaults(project: Path) -> None:
    """A plain loop in this process asks for what the command asks for."""
    (body,) = [SCRIPTS["sweep_joblib.py"].replace("from joblib import Parallel, delayed", "")]
    head, _, _ = body.partition("if __name__")
    names: dict[str, object] = {}
    exec(head, names)
    measure: Callable[[object], tuple[str, str]] = names["measure"]  # type: ignore[assignment]
    files = names["checkpoints"](["runs/r*/last.safetensors"])  # type: ignore[operator]
    assert [measure(file) for file in files] == [(f"r{seed}", "measured") for seed in range(3)]
    code, _, err = call(*COMMAND[:3], "runs/r*/last.safetensors", *COMMAND[4:], "--only-kept")
    assert (code, err.count("kept from before")) == (0, 3), err


def test_python_asks_for_what_the_command_asks_for(project: Path) -> None:
    check_defaults(project)


BREAKAGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "other defaults": lambda m: m.setattr(
        Examination, "of", classmethod(lambda cls, **options: cls(settings=hessdiag.Settings(), **options))
    ),
    "another folder": lambda m: m.setattr("hessdiag.survey.records", lambda: Path("x")),
}


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_this_promise_would_notice(breakage: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    BREAKAGES[breakage](monkeypatch)
    with pytest.raises(AssertionError):
        check_defaults(project)
