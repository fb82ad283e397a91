"""Promise: parts of a sweep in any folder make one process's table, measure no file twice, and lose none. (20 s)

Oracles: the bytes of a table that one process made, counted examinations, files written by hand, Slurm's variables
as `sbatch --array` sets them.
"""

from __future__ import annotations

import csv
import inspect
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

import hessdiag
from hessdiag import errors, files, pages
from hessdiag.errors import UsageError
from hessdiag.gap import claims, failed, kept, look, shard
from hessdiag.gap import survey as surveys
from hessdiag.gap.registry import built_in
from hessdiag.gap.shard import Shard
from hessdiag.schemes import recipe as recipes
from hessdiag.schemes.assemble import build
from hessdiag.survey import Examination, GapReport, Recipe, Survey, checkpoints, settled
from tests.command import call

PROBLEM = """
import os
import time

import hessdiag
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.linear, self.pause = nn.Linear(4, width), nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, x):
        if self.pause > 0 and os.environ.get("PAUSE"):
            open(os.environ["PAUSE"], "w").close()
            time.sleep(100)
        return torch.tanh(self.linear(x))


def small(data="rows.pt", scale=1.0):
    x, y = torch.load(data)
    return hessdiag.Problem(Net(), {"train": (x, y), "test": (scale * x[:40], y[:40])}, criterion="cross_entropy")
"""
NAMES = ("a", "b", "c", "d", "e", "f")
COUNT = 3
MEASURES = ("weight_norm", "trace")
FAST = ("--samples", "20", "--batch-size", "20", "--probes", "2", "--rtol", "0.1", "--no-guard")


def save(file: Path, seed: int, width: int = 3, pause: float = 0.0, bias: float | None = None) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(4, width)
    if bias is not None:
        linear.bias.data.fill_(bias)
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {f"linear.{name}": value for name, value in linear.state_dict().items()}
    torch.save(state | {"pause": torch.tensor(pause)}, file)


def write_project(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "problem.py").write_text(PROBLEM)
    x = torch.rand(80, 4, generator=torch.Generator().manual_seed(0))
    torch.save((x, torch.arange(80) % 3), folder / "rows.pt")


def command(factory: str, runs: str, data: str, *more: str) -> list[str]:
    return ["gap", factory, "-c", runs, "-P", f"data={data}", "--measures", ",".join(MEASURES), *FAST, *more]


def started(folder: Path, arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    around = {**os.environ, "PYTHONPATH": str(Path(hessdiag.__file__).parent.parent), **environment}
    words = [sys.executable, "-m", "hessdiag", *arguments]
    return subprocess.Popen(
        words, cwd=folder, env=around, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@dataclass(frozen=True)
class Sweep:
    """A project whose checkpoints were measured by three parts, one of which was killed first.

    Attributes:
        root: with the project, the folders of the parts and the cache.
        lines: what each part printed.
        codes: what each ended with.
        before: names measured when the one was killed.
        killed: that part.
    """

    root: Path
    lines: tuple[list[str], ...]
    codes: tuple[int, ...]
    before: list[str]
    killed: int

    @property
    def cache(self) -> Path:
        return self.root / "cache"

    def call(self, *more: str, cache: str = "cache", where: str = "project") -> tuple[int, str, str]:
        """The same survey in this process, by full paths from another folder."""
        project = self.root / "project"
        (self.root / where).mkdir(exist_ok=True)
        before = Path.cwd()
        os.chdir(self.root / where)
        try:
            given = command(f"{project}/problem.py:small", f"{project}/runs/*.pt", f"{project}/rows.pt", *more)
            return call(*given, "--cache", str(self.root / cache))
        finally:
            os.chdir(before)


def rows_of(file: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(file.read_text())))


def part_of(file: Path) -> int:
    return next(index for index in range(COUNT) if Shard(index, COUNT).takes(str(file)))


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not what():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.05)


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    root = tmp_path_factory.mktemp("sweep")
    project, cache = root / "project", root / "cache"
    write_project(project)
    runs = [project / "runs" / f"{name}.pt" for name in NAMES]
    for seed, file in enumerate(runs):
        save(file, seed)
    parts = [[file for file in runs if part_of(file) == index] for index in range(COUNT)]
    killed = max(range(COUNT), key=lambda index: len(parts[index]))
    last = parts[killed][-1]
    save(last, runs.index(last), pause=1.0)
    for folder in ("elsewhere", "deep/er"):
        (root / folder).mkdir(parents=True)
    ways = (
        (project, ("problem.py:small", "runs/*.pt", "rows.pt"), {"HESSDIAG_CACHE": str(cache)}, ()),
        (
            root / "elsewhere",
            (f"{project}/problem.py:small", f"{project}/runs/*.pt", f"{project}/rows.pt"),
            {},
            ("--cache", str(cache)),
        ),
        (
            root / "deep/er",
            ("../../project/problem.py:small", "../../project/runs/?.pt", "../../project/rows.pt"),
            {},
            ("--cache", "../../cache"),
        ),
    )

    def start(index: int, **more: str) -> subprocess.Popen[str]:
        folder, given, environment, cached = ways[index]
        return started(folder, command(*given, "--shard", f"{index}/{COUNT}", *cached), **environment, **more)

    first = start(killed, PAUSE=str(root / "paused"))
    wait_for((root / "paused").exists, first)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    assert len(list(cache.rglob("*.claim"))) == 1
    before = [json.loads(file.read_text())["name"] for file in cache.rglob("*.json")]
    running = [start(index) for index in range(COUNT)]
    said = [process.communicate(timeout=240) for process in running]
    assert all("Traceback" not in err for _, err in said), said
    lines = tuple(out.splitlines() for out, _ in said)
    return Sweep(root, lines, tuple(process.returncode for process in running), before, killed)


def test_three_parts_in_three_folders_make_one_processs_table(sweep: Sweep) -> None:
    assert sweep.codes == (0, 0, 0)
    assert len(list(sweep.cache.rglob("*.json"))) == len(NAMES)
    code, out, err = sweep.call("--only-kept", "--csv", "parts.csv", "--json")
    assert code == 0, err
    alone = sweep.call("--csv", "alone.csv", "--json", cache="own", where="fourth")
    assert alone[0] == 0, alone[2]
    assert "kept from before" not in alone[2]
    one, other = (sweep.root / name for name in ("project/parts.csv", "fourth/alone.csv"))
    assert one.read_bytes() == other.read_bytes()
    tables = [json.loads(text) for text in (out, alone[1])]
    assert tables[0]["ranks"] == tables[1]["ranks"]
    assert [one["meta"] for one in tables[0]["records"]] == [one["meta"] for one in tables[1]["records"]]


def test_a_killed_part_goes_on_and_each_file_is_measured_once(sweep: Sweep) -> None:
    kept_before = [line for lines in sweep.lines for line in lines if line.endswith("kept from before")]
    assert sorted(line.split()[1].rstrip(":") for line in kept_before) == sorted(sweep.before)
    assert all(line in sweep.lines[sweep.killed] for line in kept_before)
    assert sum(map(len, sweep.lines)) == len(NAMES)
    assert list(sweep.cache.rglob("*.claim")) == []  # that of the killed one too


def measured_by(calls: Callable[[], object]) -> list[str]:
    """Names of the checkpoints that are examined meanwhile."""
    names: list[str] = []
    original = look.examine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(look, "examine", lambda *a, **k: names.append(a[2].name) or original(*a, **k))
        calls()
    return names


def test_a_part_run_twice_measures_nothing(sweep: Sweep) -> None:
    out = []
    assert measured_by(lambda: out.append(sweep.call("--shard", f"{sweep.killed}/{COUNT}"))) == []
    code, printed, _ = out[0]
    assert (code, printed.count("kept from before")) == (0, len(printed.splitlines()))


def check_new_file(sweep: Sweep) -> None:
    new = sweep.root / "project/runs/new.pt"
    save(new, 77)
    try:
        for index in range(COUNT):
            names = measured_by(lambda index=index: sweep.call("--shard", f"{index}/{COUNT}"))
            assert names == ["new"] * (index == part_of(new))
        (record,) = [file for file in sweep.cache.rglob("*.json") if json.loads(file.read_text())["name"] == "new"]
        record.unlink()
        code, out, err = sweep.call("--only-kept", "--csv", "parts.csv")
        assert (code, "a" in out) == (3, True)
        assert "1 of 7 checkpoints have no record: new; without --only-kept" in err
        assert err.endswith(" (more: hessdiag explain sweeps)\n")
        rows = rows_of(sweep.root / "project/parts.csv")
        assert [(r["checkpoint"], r["code"]) for r in rows if r["kind"] == "failure"] == [("new", "not_kept")]
        assert measured_by(lambda: sweep.call()) == ["new"]
    finally:
        new.unlink()


def test_a_new_file_moves_no_other_and_a_merge_lists_what_is_missing(sweep: Sweep) -> None:
    check_new_file(sweep)


def test_only_kept_builds_one_problem_and_measures_nothing(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []
    monkeypatch.setattr(look, "build", lambda recipe, path: built.append(path) or build(recipe, path))
    monkeypatch.setattr(look, "examine", None)
    assert sweep.call("--only-kept")[0] == 0
    assert len(built) == 1
    code, out, err = sweep.call("--only-kept", cache="empty")
    assert (code, out) == (3, "")
    assert "6 of 6 checkpoints have no record: a, b, c, d, e, f" in err
    assert not (sweep.root / "empty").exists()
    for more, words in {
        ("--only-kept", "--fresh"): "--only-kept with --fresh: leave one of them out",
        ("--shard", "0/2", "--only-kept"): "--shard with --only-kept",
        ("--shard", "0/2", "--csv", "x.csv"): "--shard with --csv",
        ("--shard", "0/2", "--json"): "--shard with --json",
        ("--shard", "3"): "--shard 3: allowed: 3/16",
        ("--measures", "weigth_norm"): "no such measure; did you mean weight_norm?",
    }.items():
        code, out, err = sweep.call(*more)
        assert (code, out, len(err.splitlines())) == (2, "", 1), more
        assert words in err


# the key


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with one checkpoint, in the current folder."""
    write_project(tmp_path / "project")
    save(tmp_path / "project/a.pt", 0)
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def how_of(factory: str = "problem.py:small", asked: Examination | None = None, **options: object) -> Survey:
    given = Examination.of(measures=MEASURES, guard=False, samples=20, batch_size=20, probes=2, rtol=0.1)
    return Survey(recipe=Recipe(factory=factory, options=options), asked=asked or given, cache=Path("cache"))


def name_of(how: Survey, path: str = "a.pt") -> str:
    built = build(how.recipe, path)
    content, note = look._content(built, how, look.Shared())
    assert content is not None, note
    facts = look._facts(path, how, built.weights)
    file = look._file(path, how, None, built.weights.sha256, content, facts, built.problem.meta)
    assert file is not None
    return file.name


def check_key(project: Path) -> None:
    first = name_of(how_of())
    same = {
        "the full path of the factory": how_of(f"{project}/problem.py:small"),
        "another spelling of it": how_of("../project/problem.py:small"),
        "the full path of the data": how_of(data=f"{project}/rows.pt"),
        "measures in other words": how_of(asked=replace(how_of().asked, measures=("trace,weight_norm",))),
    }
    plain = {"the full path of the data": name_of(how_of(data="rows.pt"))}
    for what, how in same.items():
        assert name_of(how) == plain.get(what, first), what
    (project / "elsewhere").mkdir(exist_ok=True)
    os.chdir(project / "elsewhere")
    assert (
        name_of(how_of("../problem.py:small", data="../rows.pt"), "../a.pt") == plain["the full path of the data"]
    )
    os.chdir(project)

    names = {"as it is": first}
    x, y = torch.load("rows.pt")
    torch.save((x.clone().add_(1e-3 * (torch.arange(80) == 3)[:, None]), y), "rows.pt")
    names["one changed example"] = name_of(how_of())
    torch.save((x[:79], y[:79]), "rows.pt")
    names["one example less"] = name_of(how_of())
    torch.save((x, y), "rows.pt")
    names["another option"] = name_of(how_of(scale=1.0))
    names["other test data"] = name_of(how_of(scale=2.0))
    names["other measures"] = name_of(how_of(asked=Examination.of(measures=("trace",), guard=False)))
    (project / "other").mkdir(exist_ok=True)
    (project / "other/problem.py").write_text(PROBLEM.replace("torch.tanh", "torch.sin"))
    names["another factory of the same name"] = name_of(how_of("other/problem.py:small"))
    (project / "net.py").write_text(PROBLEM)
    (project / "inside.py").write_text("from net import small\n")
    names["the same from a module"] = name_of(how_of("inside.py:small"))
    (project / "net.py").write_text(PROBLEM.replace("torch.tanh", "torch.sin"))
    sys.modules.pop("net", None)
    names["a module's other code"] = name_of(how_of("inside.py:small"))
    sys.modules.pop("net", None)
    save(project / "b.pt", 5)
    names["other weights"] = name_of(how_of(), "b.pt")
    assert len(set(names.values())) == len(names), names


def check_hyperparameters(project: Path) -> None:
    """What moves no number moves no name; a learning rate moves that of the measure that reads it."""
    edge = Examination.of(measures=("edge_of_stability",), guard=False, samples=20)
    told = {lr: json.dumps({"lr": lr, "note": lr}) for lr in (0.1, 0.2)}
    names: dict[str, set[str]] = {"plain": set(), "edge": set()}
    for text in told.values():
        (project / "a.json").write_text(text)
        names["plain"].add(name_of(how_of()))
        names["edge"].add(name_of(how_of(asked=edge)))
    (project / "a.json").unlink()
    assert {what: len(found) for what, found in names.items()} == {"plain": 1, "edge": 2}
    read = {
        name
        for name, one in built_in().items()
        if re.search(r"checkpoint\.(meta|facts)|problem\.meta", inspect.getsource(one.function))
    }
    assert read == set(kept.OF_THE_RUN)


def test_a_learning_rate_counts_where_a_measure_reads_it(project: Path) -> None:
    check_hyperparameters(project)


def test_named_models_and_data_have_no_paths(tmp_path: Path) -> None:
    names = [
        Recipe(model=f"hf:{way}gpt", data=(f"train=text:{way}a.txt", f"test=text:{way}b.txt?tokens=8")).identity()
        for way in ("", "models/", f"{tmp_path}/")
    ]
    assert len(set(names)) == 1
    assert Recipe(model="hf:gpt", data=("text:b.txt",)).identity() not in names


def test_a_record_has_one_name_from_everywhere_and_another_for_anything_else(project: Path) -> None:
    check_key(project)


def test_the_build_of_torch_is_not_in_the_name_and_its_version_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Examination.of()
    names = []
    for version in ("2.13.0+cpu", "2.13.0+cu126", "2.13.0", "2.14.0"):
        monkeypatch.setattr(torch, "__version__", version)
        names.append(kept.key("x", asked=asked))
    assert len(set(names[:3])) == 1 != len(set(names))
    cuda = [replace(asked, settings=replace(asked.settings, device=f"cuda:{index}")) for index in (0, 1)]
    assert len({kept.key("x", asked=one) for one in cuda}) == 1


def test_records_lie_in_folders_of_two_digits_and_a_flat_one_is_found(project: Path) -> None:
    how = how_of()
    found = settled(look.look("a", "a.pt", how), how)
    (file,) = Path("cache").rglob("*.json")
    assert file.parent.name == file.name[:2]
    assert sorted(one.name for one in Path("cache").iterdir()) == [".gitignore", file.parent.name]
    file.rename(Path("cache") / file.name)
    again = look.look("a", "a.pt", how)
    assert again.kept and again.record == replace(found.record, name="a")


def test_one_variable_moves_what_every_verb_keeps(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert files.cache_folder(None, "check", Path("x")) == Path("x")
    monkeypatch.setenv(files.CACHE_VARIABLE, "far")
    assert kept.records() == Path("far/gap")
    assert kept.records("near") == Path("near/gap")
    name = {"problem": "problem.py:small", "checkpoint": "a.pt"}
    Path("hessdiag.toml").write_text(
        "".join(f'{k} = "{v}"\n' for k, v in name.items())
        + "schema = 1\n[run]\nsamples = 20\n[check.budgets]\ntrace = { max = 1e6 }\n"
    )
    assert call("check", "-q")[0] == 0
    assert call("check", "-q", "--cache", "near")[0] == 0
    assert [len(list(Path(f).rglob("*.json"))) for f in ("far/check", "near/check")] == [1, 1]
    quick = ("--track", "-q", "--samples", "20", "--quantities", "trace", "--cache", "near")
    assert call("analyze", "problem.py:small", "-c", "a.pt", *quick)[0] == 0
    assert len(list(Path("near/track").rglob("*.json"))) == 1
    assert not Path(".hessdiag/cache").exists()


# parts


def array(spec: str, task: int) -> dict[str, str]:
    """What ``sbatch --array=SPEC`` sets for one of its jobs."""
    ids = []
    for piece in spec.split(","):
        ends, _, step = piece.partition(":")
        low, _, high = ends.partition("-")
        ids += range(int(low), int(high or low) + 1, int(step or 1))
    assert task in ids
    step = ids[1] - ids[0] if len(ids) > 1 else 1
    values = {"ID": task, "MIN": min(ids), "MAX": max(ids), "STEP": step, "COUNT": len(ids)}
    return {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in values.items()}


@pytest.mark.parametrize(
    ("spec", "tasks"), [("0-15", range(16)), ("1-16", range(1, 17)), ("0-15:4", (0, 4, 8, 12)), ("5", (5,))]
)
def test_the_jobs_of_an_array_are_all_parts_wherever_it_begins(spec: str, tasks: range) -> None:
    found = [Shard.of("auto", array(spec, task)) for task in tasks]
    assert found == [Shard(index, len(tasks)) for index in range(len(tasks))]
    assert Shard.of("auto", {k: v for k, v in array("0-3", 2).items() if k != "SLURM_ARRAY_TASK_STEP"}) == Shard(
        2, 4
    )


def test_parts_that_do_not_exist_are_refused() -> None:
    assert Shard.of("16/16") == Shard.of("0/16") and Shard.of("3/16") == Shard(3, 16)
    for text, environment, words in (
        ("17/16", {}, "of 16 parts there are 0/16 to 15/16, or counted from 1, 1/16 to 16/16"),
        ("0/0", {}, "of 0 parts"),
        ("-1/4", {}, "allowed: 3/16"),
        ("1 /4", {}, "allowed: 3/16"),
        ("auto", {}, "no SLURM_ARRAY_TASK_ID is set"),
        ("auto", array("0-3", 1) | {"SLURM_ARRAY_TASK_MAX": "x"}, "SLURM_ARRAY_TASK_MAX is 'x'"),
        ("auto", array("3,7", 3) | {"SLURM_ARRAY_TASK_STEP": "1"}, "an array with gaps"),
        ("auto", array("1-7:2,20", 7), "an array with gaps"),
        ("auto", array("0-15:4", 4) | {"SLURM_ARRAY_TASK_ID": "5"}, "task 5 of 4 from 0 to 12 by 4"),
    ):
        with pytest.raises(UsageError, match=words):
            Shard.of(text, environment)


def check_places(project: Path) -> None:
    """Every file is of one part, whatever way it is named by."""
    (project / "link").symlink_to(project, target_is_directory=True)
    given = [
        [f"{way}{name}.pt" for name in map(str, range(40))] for way in ("", "../project/", "link/", f"{project}/")
    ]
    for count in (1, 3, 16):
        taken = [[[i for i in range(count) if Shard(i, count).takes(path)] for path in paths] for paths in given]
        assert all(len(one) == 1 for one in taken[0])
        assert all(way == taken[0] for way in taken)
    assert len({tuple(one) for one in taken[0]}) > 8  # of 16 parts
    assert Shard(0, 1).takes("a\udcff.pt")
    assert len({shard.place_of(path) for path in ("a.pt", "a.pt::ema", "a.pt::state")}) == 3


def test_a_file_is_of_one_part_whatever_way_leads_to_it(project: Path) -> None:
    check_places(project)


# claims


def claim_of(record: Path, **changed: object) -> None:
    """A claim as another process would have written it."""
    record.parent.mkdir(parents=True, exist_ok=True)
    now = time.time()
    told = {"host": "elsewhere", "pid": 1, "time": now, "until": now + 60, "token": "x"} | changed
    record.with_suffix(".claim").write_text(json.dumps(told))


def gone() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def check_claims(folder: Path) -> None:
    record, here = folder / "ab/abc.json", __import__("socket").gethostname()
    token = claims.take(record)
    assert token and claims.holder(record) == ""  # its own process is not another
    claims.release(record, "another")
    assert record.with_suffix(".claim").exists()
    claims.release(record, token)
    assert not record.with_suffix(".claim").exists()
    for told, held in (
        ({}, True),
        ({"until": time.time() - 1}, False),
        ({"host": here, "pid": os.getppid()}, True),
        ({"host": here, "pid": gone()}, False),
        ({"host": here, "pid": os.getppid(), "until": time.time() - 1}, False),
        ({"pid": "x"}, True),
    ):
        claim_of(record, **told)
        assert bool(claims.holder(record)) == held, told
        assert (claims.take(record) is None) == held, told
    record.with_suffix(".claim").write_text("")  # killed before it could write
    assert claims.take(record) is None
    os.utime(record.with_suffix(".claim"), (0, 0))
    token = claims.take(record)
    assert token
    claims.expect(record, token, 100.0)
    told = json.loads(record.with_suffix(".claim").read_text())
    assert told["until"] - told["time"] == pytest.approx(200, abs=0.01)
    assert (told["host"], told["pid"]) == (here, os.getpid())


def test_a_claim_ends_with_its_process_and_with_its_time(tmp_path: Path) -> None:
    check_claims(tmp_path)


def check_waits(project: Path) -> None:
    """A file that another process measures comes last, is waited for, and not measured."""
    how = how_of()
    done = settled(look.look("a", "a.pt", how), how)
    (record,) = Path("cache").rglob("*.json")
    text = record.read_text()
    record.unlink()
    save(project / "b.pt", 1)
    claim_of(record)
    found = look.look("a", "a.pt", how)
    assert (found.waits, found.code, found.reason) == (True, "claimed", "process 1 on elsewhere measures it now")

    def finish() -> None:
        record.write_text(text)

    timer = threading.Timer(1.0, finish)
    names: list[str] = []
    seen: list[str] = []

    def run() -> None:
        timer.start()
        told = surveys.survey([("a", "a.pt"), ("b", "b.pt")], how, report=lambda stage, *_: seen.append(stage))
        names.extend(f"{one.name} {one.kept}" for one in told)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(surveys, "POLL", 0.05)
        examined = measured_by(run)
    timer.join()
    assert names == ["b False", "a True"]
    assert examined == ["b"]
    assert "a: waiting for process 1 on elsewhere" in seen
    record.unlink()
    claim_of(record, until=time.time() - 1)  # stale
    assert measured_by(lambda: list(surveys.survey([("a", "a.pt")], how))) == ["a"]
    assert json.loads(record.read_text())["readings"] == done.record.to_dict()["readings"]
    assert not record.with_suffix(".claim").exists()


def test_what_another_process_measures_is_waited_for_and_a_stale_claim_is_not(project: Path) -> None:
    check_waits(project)


def test_a_failure_gives_its_claim_back_and_a_place_that_cannot_be_written_has_none(project: Path) -> None:
    save(project / "nan.pt", 0, bias=float("inf"))
    save(project / "big.pt", 0, bias=1e38)
    how = how_of()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(look, "examine", lambda *a, **k: 1 / 0)
        found = look.look("a", "a.pt", how)
    assert (found.code, list(Path("cache").rglob("*.claim"))) == ("unexpected", [])
    assert "ZeroDivisionError" in found.traceback
    Path("file").write_text("")
    assert claims.take(Path("file/ab/abc.json")) == ""
    unkept = replace(how, cache=Path("file"))
    found = settled(look.look("a", "a.pt", unkept), unkept)
    assert found.record is not None and "nothing is kept for a next time" in found.reason
    Path("wall").write_text("")
    code, out, err = call(*command("problem.py:small", "a.pt", "rows.pt", "--shard", "0/1", "--cache", "wall"))
    assert (code, out, "wall" in err) == (2, "", True)


# codes


def check_codes(project: Path) -> None:
    save(project / "c1.pt", 1, width=5)
    (project / "c2.pt").write_bytes(b"no checkpoint")
    save(project / "c3.pt", 3, bias=float("nan"))
    save(project / "c4.pt", 4)
    original = look.examine

    def examine(problem, asked, about, **more):
        if about.name == "c4":
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
        return original(problem, asked, about, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(look, "examine", examine)
        given = command("problem.py:small", "*.pt", "rows.pt", "--measures", "distance_from_start")
        (project / "rows.pt").rename(project / "rows.data")
        given = [word.replace("rows.pt", "rows.data") for word in given]
        code, out, err = call(*given, "--json", "--csv", "gap.csv")
    assert code == 4, err
    told = json.loads(out)
    expected = {"c1": "other_architecture", "c2": "unreadable", "c3": "not_finite", "c4": "out_of_memory"}
    assert told["codes"] == expected
    assert set(told["failures"]) == set(expected)
    rows = rows_of(Path("gap.csv"))
    assert {row["checkpoint"]: row["code"] for row in rows if row["kind"] == "failure"} == expected
    assert [row["code"] for row in rows if row["name"] == "distance_from_start"] == ["does_not_apply"]
    assert told["records"][0]["readings"]["distance_from_start"]["code"] == "does_not_apply"
    assert all(row["code"] == "" for row in rows if row["name"] == "weight_norm")


def test_every_failure_has_its_code(project: Path) -> None:
    check_codes(project)


def kinds(of: type[errors.HessdiagError] = errors.HessdiagError) -> Iterator[type[errors.HessdiagError]]:
    yield of
    for one in of.__subclasses__():
        yield from kinds(one)


def test_codes_are_one_list_and_each_is_explained() -> None:
    assert {kind.code for kind in kinds() if kind.__module__.startswith("hessdiag.")} <= set(errors.CODES)
    headings = [line[4:] for line in pages.source("codes.md").splitlines() if line.startswith("### ")]
    assert tuple(headings) == errors.CODES
    assert call("explain", "other_architecture")[0] == 0
    report = GapReport((), {"a": errors.Refused("why", "unreadable"), "b": "as text"})
    assert [row[-1] for row in report._rows()] == ["unreadable", ""]


def test_a_survey_and_what_it_finds_travel_between_processes(project: Path) -> None:
    how = how_of()
    found = look.look("a", "a.pt", pickle.loads(pickle.dumps(how)))
    back = pickle.loads(pickle.dumps(found))
    assert back == found and back.record.to_json() == found.record.to_json()
    assert [one.name for one in checkpoints(["*.pt"])] == ["a", "rows"]


# what these tests must notice


def no_release(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(claims, "release", lambda *_: None)


BREAKAGES: dict[str, tuple[Callable[[Path], None], Callable[[pytest.MonkeyPatch], None]]] = {
    "the name has the paths of options": (
        check_key,
        lambda m: m.setattr(recipes, "pathless", lambda value: value),
    ),
    "the name has no data": (check_key, lambda m: m.setattr(kept, "draw", lambda source, **_: Nothing())),
    "the name has no code": (check_key, lambda m: m.setattr(kept, "digests_of", lambda _: [])),
    "the name has the measures as they were typed": (check_key, lambda m: m.setattr(kept, "replace", as_typed)),
    "a learning rate does not count": (
        check_hyperparameters,
        lambda m: m.setattr(kept, "of_the_run", lambda *_: []),
    ),
    "every fact counts": (
        check_hyperparameters,
        lambda m: m.setattr(kept, "of_the_run", lambda facts, meta, asked: [facts, meta]),
    ),
    "parts by the path as typed": (check_places, lambda m: m.setattr(shard, "place_of", os.fsencode)),
    "parts overlap": (check_places, lambda m: m.setattr(Shard, "takes", lambda self, path: len(path) % 2 == 0)),
    "claims outlive their process": (check_claims, lambda m: m.setattr(claims, "_runs", lambda _: True)),
    "claims outlive their time": (check_claims, lambda m: m.setattr(claims.time, "time", lambda: 0.0)),
    "claims are given back by anybody": (check_claims, lambda m: m.setattr(claims, "_is", lambda *_: True)),
    "claims keep nobody away": (check_waits, lambda m: m.setattr(claims, "take", lambda _: "token")),
    "claims are never given back": (check_waits, no_release),
    "memory is any failure": (check_codes, lambda m: m.setattr(failed, "is_out_of_memory", lambda _: False)),
    "a code for all": (check_codes, lambda m: m.setattr(errors.MisfitError, "code", "unreadable")),
}


def as_typed(asked: object, **changes: object) -> object:
    changes.pop("measures", None)
    return replace(asked, **changes)


class Nothing:
    """A draw without content."""

    split, digest, examples, available = "", "", 0, 0


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_this_promise_would_notice(breakage: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check, break_it = BREAKAGES[breakage]
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        check(project)
