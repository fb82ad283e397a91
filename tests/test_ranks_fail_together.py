"""Promise: where one rank fails, all end soon, one line says why, and nothing is left half-written. (15 s)"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch.distributed as dist

from hessdiag import cli
from hessdiag.cli import ranks, stdout
from hessdiag.engine.products.group import Group
from hessdiag.errors import OutputError
from tests.command import call
from tests.ranks import forked

PROBLEM = f"{Path(__file__).parent / 'ranks_problems.py'}:problem"
SAMPLES = ("--samples", "100", "--batch-size", "9", "--seed", "0")
QUICK = ("--effort", "quick", "--method", "retained_graph")
IN_LOSS, IN_PRODUCT = 3, 14  # passes of rank 1 before
SOON = 30.0  # seconds


def as_rank(
    rank: int, world: int, folder: str, port: int, arguments: tuple[str, ...], damage: tuple[str, Any] | None
) -> None:
    """The command as a launcher starts it, whose store outlives it."""
    os.chdir(folder)
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    elastic = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": 0}
    os.environ |= {name: str(value) for name, value in (place | elastic).items()}
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = (open(descriptor, "w", closefd=False) for descriptor in (1, 2))  # noqa: SIM115
    sys.argv = ["hessdiag", *arguments]
    if damage is not None:
        patch(damage[0], damage[1]).start()
    cli.main()


def launched(
    folder: Path,
    *arguments: str,
    world: int = 2,
    meanwhile: Callable[[list[Any]], None] = lambda _: None,
    damage: tuple[str, Any] | None = None,
) -> SimpleNamespace:
    """Exit codes, lines of hessdiag on stderr, stdout of each rank, and seconds of a command on several ranks."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    begun = time.monotonic()
    given = [(rank, world, str(folder), store.port, arguments, damage) for rank in range(world)]
    ended = forked(as_rank, given, meanwhile)
    seconds = time.monotonic() - begun
    err = [(folder / f"{rank}.err").read_text() for rank in range(world)]
    lines = [line for text in err for line in text.splitlines() if line.startswith("hessdiag:")]
    out = [(folder / f"{rank}.out").read_text() for rank in range(world)]
    return SimpleNamespace(codes=[one.exitcode for one in ended], lines=lines, out=out, err=err, seconds=seconds)


def analyzed(folder: Path, *options: str, **launch: Any) -> SimpleNamespace:
    return launched(folder, "analyze", PROBLEM, *SAMPLES, *QUICK, *options, "-o", "out", **launch)


FAILURES = {
    "raises in the first loss": (
        ("raise", IN_LOSS),
        "model or loss fails on a later batch (ValueError: this image is broken): check shapes and labels "
        "(rank 1 of 2)",
        2,
    ),
    "raises in a product": (("raise", IN_PRODUCT), "unexpected ValueError: this image is broken", 4),
    "nan in a product": (("nan", IN_PRODUCT), "not finite", 4),
    "out of memory for ever": (("memory", IN_PRODUCT), "out of memory with one vector and one example", 4),
    "other weights": (("weights", 0), "rank 1 has other weights than rank 0", 4),
    "cannot load": (("load", 0), "FileNotFoundError: not on this machine", 2),
}
GONE = {"exit": 9, "kill": -signal.SIGKILL}


ALWAYS = {"raises in a product", "other weights"}
more = pytest.mark.thorough


@pytest.mark.parametrize("name", [n if n in ALWAYS else pytest.param(n, marks=more) for n in FAILURES])
def test_a_failure_on_one_rank_ends_all(name, tmp_path):
    (kind, at), text, code = FAILURES[name]
    found = analyzed(tmp_path, "-P", f"kind={kind}", "-P", f"at={at}")
    ends_together(found, text, [code, code], tmp_path)


@pytest.mark.parametrize("kind", [pytest.param("exit", marks=more), "kill"])
def test_a_rank_that_is_gone_ends_all(kind, tmp_path):
    found = analyzed(tmp_path, "-P", f"kind={kind}", "-P", f"at={IN_PRODUCT}")
    ends_together(found, "another rank has ended, or was silent for too long", [4, GONE[kind]], tmp_path)


def _full_disk(*_: Any, **__: Any) -> None:
    if os.environ["RANK"] == "0":
        raise OutputError("out: no space left")


@more
def test_rank_0_that_cannot_write_ends_all(tmp_path):
    found = analyzed(tmp_path, damage=("hessdiag.cli.analyze.write_run", _full_disk))
    ends_together(found, "out: no space left", [4, 4], tmp_path)


SIGNALS = {
    "SIGTERM of one": ((1,), signal.SIGTERM, "ended by SIGTERM of the launcher, or because", [4, 143]),
    "Ctrl-C": ((0, 1), signal.SIGINT, "interrupted; nothing half-written", [130, 130]),
}


@pytest.mark.parametrize("name", [pytest.param("SIGTERM of one", marks=more), "Ctrl-C"])
def test_a_signal_ends_all(name, tmp_path):
    hit, number, text, codes = SIGNALS[name]

    def meanwhile(started: list[Any]) -> None:
        until = time.monotonic() + 60
        while not all((tmp_path / str(rank)).exists() for rank in range(2)) and time.monotonic() < until:
            time.sleep(0.05)
        for rank in hit:
            os.kill(started[rank].pid, number)

    options = ("-P", "kind=slow", "-P", f"at={IN_PRODUCT}", "-P", f"marks={tmp_path}")
    found = analyzed(tmp_path, *options, "--method", "finite_difference", meanwhile=meanwhile)
    ends_together(found, text, codes, tmp_path)


def ends_together(found: SimpleNamespace, text: str, codes: list[int], folder: Path) -> None:
    assert len(found.lines) == 1, found.lines
    assert text in found.lines[0]
    assert "Traceback" not in "".join(found.err)
    assert found.codes == codes
    assert found.seconds < SOON
    assert not (folder / "out").exists() or not list((folder / "out").iterdir())


def test_a_sound_run_is_written_and_said_once(tmp_path):
    found = analyzed(tmp_path)
    assert found.codes == [0, 0]
    assert found.lines == []
    assert "lambda_max" in found.out[0]
    assert found.err[0].count("written: out/run.json") == 1
    assert found.out[1] == found.err[1] == ""
    both = json.loads((tmp_path / "out/run.json").read_text())
    code, _, _ = call("analyze", PROBLEM, *SAMPLES, *QUICK, "-o", str(tmp_path / "one"))
    one = json.loads((tmp_path / "one/run.json").read_text())
    assert code == 0
    assert both["environment"]["ranks"] == 2
    assert both["cost"]["products"] == one["cost"]["products"]
    assert "ranks" not in one["environment"]
    for quantity, metric in one["metrics"].items():
        assert both["metrics"][quantity]["value"] == pytest.approx(metric["value"], rel=1e-12)


@more
def test_a_doctor_looks_once(tmp_path):
    found = launched(tmp_path, "doctor", PROBLEM, *SAMPLES, world=3)
    assert found.codes == [0, 0, 0]
    assert found.out[0].count("fit to be measured") == 1
    assert found.out[1] == found.out[2] == ""


CONFIG = """
schema = 1
problem = "{problem}"
[run]
samples = 100
batch_size = 9
[check.budgets]
lambda_max = {{ max = {most} }}
"""


@pytest.mark.parametrize(("most", "code"), [(1e-3, 1), pytest.param(1e3, 0, marks=more)])
def test_the_verdict_of_a_check_is_in_its_file(most, code, tmp_path):
    (tmp_path / "hessdiag.toml").write_text(CONFIG.format(problem=PROBLEM, most=most))
    found = launched(tmp_path, "check", "-o", "json=verdict.json")
    assert found.codes == [code, code]
    assert json.loads((tmp_path / "verdict.json").read_text())["exit_code"] == code
    assert found.out[1] == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ("gap", PROBLEM, "-c", "x.pt"),
        ("analyze", PROBLEM, "--track", "-c", "x.pt"),
        *(
            pytest.param(arguments, marks=more)
            for arguments in (
                ("shift", PROBLEM),
                ("track", "runs"),
                ("init", PROBLEM),
                ("analyze", PROBLEM, "--samples", "0"),
                ("compare", "missing", "missing"),
            )
        ),
    ],
    ids=lambda arguments: " ".join(arguments[::2]),
)
def test_what_is_refused_is_refused_once(arguments, tmp_path):
    found = launched(tmp_path, *arguments)
    assert len(found.lines) == 1, found.lines
    assert found.codes == [found.codes[0]] * 2
    assert found.codes[0] in (2, 4)
    if arguments[0] not in ranks.DIVIDED:
        assert f"{arguments[0]} does its work in one process: start it without torchrun" in found.lines[0]


def _as_it_is(_: Group, error: BaseException) -> BaseException:
    return error


def _said_by_each(_: Any, say: Callable[[], int]) -> int:
    stdout.speak()
    return say()


def _nothing() -> None:
    pass


BREAKAGES: dict[str, tuple[tuple[str, Any], str, str, list[int]]] = {
    "a failure stays on its rank": (
        ("hessdiag.engine.products.group.Group.common", _as_it_is),
        "load",
        FAILURES["cannot load"][1],
        [2, 2],
    ),
    "every rank speaks": (
        ("hessdiag.cli.ranks._only_one", _said_by_each),
        "kill",
        "another rank has ended",
        [4, -9],
    ),
    "other ranks are not silent": (
        ("hessdiag.cli.stdout.silence", _nothing),
        "raise",
        "unexpected ValueError",
        [4, 4],
    ),
}


@pytest.mark.parametrize("name", BREAKAGES)
def test_breakages_are_noticed(name, tmp_path):
    damage, kind, text, codes = BREAKAGES[name]
    world = 3 if name == "every rank speaks" else 2
    found = analyzed(tmp_path, "-P", f"kind={kind}", "-P", f"at={IN_PRODUCT}", damage=damage, world=world)
    with pytest.raises(AssertionError):
        ends_together(found, text, codes if world == 2 else [4, -9, 4], tmp_path)


@more
@pytest.mark.parametrize("kind", ["", "kill"])
def test_torchrun_itself(kind, tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    given = ["analyze", PROBLEM, *SAMPLES, *QUICK, "-o", "out", "-P", f"kind={kind}", "-P", f"at={IN_PRODUCT}"]
    begun = time.monotonic()
    where = {"PYTHONPATH": str(Path(cli.__file__).parents[2])}
    ended = subprocess.run(
        [*command, "-m", "hessdiag", *given], cwd=tmp_path, env=os.environ | where, capture_output=True, text=True
    )
    lines = [line for line in ended.stderr.splitlines() if line.startswith("hessdiag:")]
    assert len(lines) == bool(kind)
    assert ended.returncode == bool(kind)
    assert (tmp_path / "out/run.json").exists() == (not kind)
    assert time.monotonic() - begun < 2 * SOON
