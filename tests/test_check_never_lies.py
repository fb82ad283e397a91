"""Promise: a check passes only what it measured and compared; all else has an exit code and a line of its own.

One small repository is set up as a stranger would: a factory in a file, then checks of checkpoints that are the
same, sharper, of another shape, broken, or not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hessdiag import files as files_module
from hessdiag.analysis import Measurement
from hessdiag.check import baseline, gate, verdict
from hessdiag.errors import OutputError
from tests.command import call

PROBLEM = """
import torch, hessdiag
from torch import nn

def small(scale=1.0, flip=0, hidden=16, classes=8, loss="cross_entropy", double=False):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(10, hidden), nn.Tanh(), nn.Linear(hidden, classes))
    inputs, targets = torch.randn(96, 10), torch.randint(classes, (96,))
    targets[0] = (targets[0] + flip) % classes
    target = torch.nn.functional.one_hot(targets, classes).float() if loss == "mse" else targets
    if double:
        model, inputs = model.double(), inputs.double()
    forward = lambda model, batch: scale * model(batch[0])
    data = {"train": (inputs, target), "test": (inputs[:48].flip(1), target[:48])}
    return hessdiag.Problem(model, data, criterion=loss, forward=forward)

def broken(): raise ValueError("no data here")
"""
CONFIG = """# budgets of a small repository
[tool.hessdiag]
problem = "problem.py:small"
checkpoint = "best.safetensors"
run = { probes = 16 }
[tool.hessdiag.check]
baseline = "baseline.json"
max_probes = 64
[tool.hessdiag.check.budgets]
"""
BUDGETS = """trace = { max_increase = "10%" }
lambda_max = { max_increase = "10%" }
"""


def sharper(factor: float, file: str = "best.safetensors", source: str = "first.safetensors") -> None:
    state = load_file(source)
    state["0.weight"] = state["0.weight"] / factor
    save_file({**state, "2.weight": state["2.weight"] * factor}, file)


def configure(budgets: str = BUDGETS) -> None:
    Path("pyproject.toml").write_text(CONFIG + budgets)


def files() -> dict[str, str]:
    kept = [
        p
        for p in sorted(Path().rglob("*"))
        if p.is_file() and ".hessdiag" not in p.parts and ".git" not in p.parts
    ]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept if "__pycache__" not in p.parts}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with a baseline."""
    folder = tmp_path_factory.mktemp("repository")
    before = Path.cwd()
    os.chdir(folder)
    try:
        Path("problem.py").write_text(PROBLEM)
        space: dict[str, Callable[[], object]] = {}
        exec(PROBLEM, space)
        save_file(space["small"]().model.state_dict(), "first.safetensors")  # type: ignore[attr-defined]
        shutil.copy("first.safetensors", "best.safetensors")
        configure()
        code, _, err = call("baseline", "update", "--reason", "first")
        assert code == 0, err
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def repository(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "repository"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    for name in ("CI", "GITHUB_ACTIONS", "GITHUB_STEP_SUMMARY"):
        monkeypatch.delenv(name, raising=False)
    return folder


def document() -> dict:
    return json.loads(Path(".hessdiag/check.json").read_text())


def test_the_same_checkpoint_passes_whatever_the_batches_and_threads(repository: Path) -> None:
    torch.set_num_threads(2)
    try:
        code, out, _ = call("check", "--batch-size", "7", "--fresh")
    finally:
        torch.set_num_threads(1)
    assert code == 0
    assert out.startswith("passed: 2 of 2 limits kept")
    for row in document()["rows"]:
        assert abs(row["tested"]["value"]) < 1e-4
        assert row["tested"]["lo"] < 0 < row["tested"]["hi"]


def test_a_sharper_checkpoint_fails_and_every_output_says_so(repository: Path, monkeypatch) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", "summary.md")
    sharper(2.0)
    written = (
        "junit=out/hd.xml",
        "json=out/hd.json",
        "md=out/hd.md",
        "openmetrics=out/hd.txt",
        "github=out/hd.gh",
    )
    code, out, _ = call("check", *(part for name in ("text", *written) for part in ("-o", name)))
    assert code == 1
    assert out.startswith("failed: ")
    assert "::error file=pyproject.toml,line=10" in out
    assert "failed" in Path("summary.md").read_text()
    assert "<failure" in Path("out/hd.xml").read_text()
    assert json.loads(Path("out/hd.json").read_text())["exit_code"] == 1
    assert Path("out/hd.txt").read_text().endswith("# EOF\n")
    assert "::error" in Path("out/hd.gh").read_text()
    assert set(json.loads(Path(".hessdiag/metrics.json").read_text())) == {"train/trace", "train/lambda_max"}
    code, _, err = call("check", "--exit-zero")
    assert code == 0
    assert "exceeded" in err


def test_a_meant_change_is_recorded_with_its_reason(repository: Path) -> None:
    sharper(2.0)
    code, out, _ = call("baseline", "diff", "-q")
    before = Path("baseline.json").read_bytes()
    assert code == 0
    assert "train trace" in out
    code, updated, _ = call("baseline", "update", "-q", "--reason", "sharper on purpose")
    assert code == 0
    assert set(out.splitlines()) < set(updated.splitlines())
    assert Path("baseline.json").read_bytes() != before
    assert json.loads(Path("baseline.json").read_text())["entries"]["train"]["reason"] == "sharper on purpose"
    assert call("check", "-q")[0] == 0
    code, out, _ = call("baseline", "diff", "baseline.json", "baseline.json")
    assert code == 0


def test_results_of_analyze_serve_as_well(repository: Path) -> None:
    run = ("--probes", "16", "--density-probes", "2", "--steps", "4", "-q")
    assert call("analyze", "problem.py:small", "-c", "best.safetensors", *run, "-o", "same")[0] == 0
    assert call("check", "--result", "same")[0] == 0
    sharper(2.0, "other.safetensors")
    assert call("analyze", "problem.py:small", "-c", "other.safetensors", *run, "-o", "other")[0] == 0
    assert call("check", "--result", "other/run.json")[0] == 1
    code, out, _ = call("compare", "same", "other", "--html", "both.html")
    assert code == 0
    assert "higher" in out
    assert "<html" in Path("both.html").read_text()
    measured = call(
        "compare", "best.safetensors", "other.safetensors", "--problem", "problem.py:small", *run, "--json"
    )
    rows = {row["metric"]: row for row in json.loads(measured[1])["metrics"]}
    assert rows["trace"]["verdict"] == "higher"
    assert call("compare", "best.safetensors", "other.safetensors")[0] == 2


def test_another_commit_is_measured_beside_this_one(repository: Path) -> None:
    git = ("git", "-c", "user.email=a@b.c", "-c", "user.name=n")
    for command in (("init", "-q"), ("add", "."), ("commit", "-qm", "x")):
        subprocess.run([*git, *command], check=True)
    assert call("check", "--against-git", "HEAD")[0] == 0
    sharper(2.0)
    assert call("check", "--against-git", "HEAD")[0] == 1
    code, _, err = call("check", "--against-git", "no-such-branch")
    assert code == 2
    assert "fetch" in err
    code, _, err = call("check", "--against-git", "HEAD", "-c", "new.safetensors")
    assert code == 4


def test_a_limit_next_to_the_truth_gets_a_closer_look(repository: Path, monkeypatch) -> None:
    """tr(R) of tanh layers needs probes without a closed form: the first look says how many more would tell."""
    monkeypatch.setattr("hessdiag.analysis.measurement.network_of", lambda *_: None)
    sharper(1.2)
    call("check")
    change = next(row for row in document()["rows"] if row["metric"] == "trace")["tested"]["value"]
    configure(f'trace = {{ max_increase = "{100 * change + 0.01:.4f}%" }}\n')
    code, out, _ = call("check", "--fresh")
    assert "cannot tell" in out
    assert "more probes would tell" in out or "too near to tell" in out
    assert code == 0  # a warning: the checkpoint was not shown to be worse
    looked = document()["rows"][0]["tested"]["method"]
    assert looked == "64 pairs of probes"
    code, out, _ = call("check", "--strict")
    assert code == 3
    edit("max_probes", 'on_unsure = "report"\nmax_probes', "pyproject.toml")()
    call("check", "--fresh")
    assert document()["rows"][0]["tested"]["method"] == "16 pairs of probes"


def test_a_closed_form_needs_no_closer_look(repository: Path) -> None:
    """Exact against exact, recorded with ten digits: a ten-thousandth of a percent is told from the limit."""
    sharper(1.2)
    call("check")
    tested = next(row for row in document()["rows"] if row["metric"] == "trace")["tested"]
    assert tested["hi"] - tested["lo"] < 1e-7
    for room, expected in ((1e-4, "pass"), (-1e-4, "fail")):
        configure(f'trace = {{ max_increase = "{100 * tested["value"] + room:.6f}%" }}\n')
        call("check", "--fresh")
        assert document()["rows"][0]["verdict"] == expected


def test_scopes_are_matrices_of_their_own(repository: Path) -> None:
    configure('"trace[test]@2.*" = { max = 1000 }\n"lambda_max[test]" = { level = "warn", max = 0.0 }\n')
    code, _out, _ = call("check")
    assert code == 0
    rows = document()["rows"]
    assert [row["scope"] for row in rows] == ["test@2.*", "test"]
    assert [row["verdict"] for row in rows] == ["pass", "fail"]
    assert call("check", "--strict")[0] == 1


def test_a_claim_about_the_population_says_so_and_is_wider(repository: Path) -> None:
    sharper(1.05)
    call("check", "--batch-size", "8")
    narrow = next(row for row in document()["rows"] if row["metric"] == "trace")["tested"]
    configure('trace = { max_increase = "10%", claim = "population" }\n')
    assert call("baseline", "update", "--reason", "blocks", "--batch-size", "8", "-c", "first.safetensors")[0] == 0
    _, out, _ = call("check", "--batch-size", "8")
    wide = document()["rows"][0]["tested"]
    assert "population" in out
    assert wide["hi"] - wide["lo"] > 1.2 * (narrow["hi"] - narrow["lo"])
    code, out, _ = call("check", "--batch-size", "96")
    assert code == 3
    assert "batch_size" in out


def test_interrupted_it_goes_on_where_it_was(repository: Path, monkeypatch) -> None:
    configure(BUDGETS + '"trace[test]" = { max = 1000 }\n')
    measured: list[str] = []
    run = Measurement.run

    def interrupted(self, progress=None):
        measured.append(self.settings.split)
        if self.settings.split == "test" and len(measured) < 3:
            raise KeyboardInterrupt
        return run(self, progress)

    sharper(1.001)
    monkeypatch.setattr(Measurement, "run", interrupted)
    before = files()
    assert call("check")[0] == 130
    assert files() == before
    assert call("check")[0] == 0
    assert measured == ["train", "test", "test"]
    assert call("check")[0] == 0
    assert measured == ["train", "test", "test"]
    assert call("check", "--fresh")[0] == 0
    assert measured == ["train", "test", "test", "train", "test"]


def test_what_was_measured_of_other_code_is_not_taken_again(repository: Path) -> None:
    code, _, _ = call("check")
    assert code == 0
    edit("nn.Tanh()", "nn.Softplus()", "problem.py")()
    assert call("check")[0] == 4  # the same weights, another function
    edit("nn.Softplus()", "nn.Tanh()", "problem.py")()
    assert call("check")[0] == 0


def test_a_read_only_tree_can_be_checked(repository: Path, monkeypatch) -> None:
    def refuse(path, content):
        raise OutputError(f"cannot write {path}: read-only")

    monkeypatch.setattr(baseline, "write_whole", refuse)
    monkeypatch.setattr(files_module, "write_whole", refuse)
    code, _out, err = call("check")
    assert code == 0
    assert "read-only" in err
    code, _, err = call("baseline", "update", "--reason", "x")
    assert code == 4


def test_init_sets_a_repository_up(repository: Path) -> None:
    Path("pyproject.toml").unlink()
    Path("baseline.json").unlink()
    sample = ("init", "problem.py:small", "-c", "best.safetensors", "--quantities", "trace,lambda_max,lambda_min")
    code, out, _ = call(*sample, "-q")
    assert code == 0
    assert "[check.budgets]" in out
    assert "hessdiag check" in out
    assert call("check")[0] == 0
    code, _, err = call(*sample)
    assert code == 2
    assert "configures hessdiag already" in err
    former = [{"--quantities": "--metrics"}.get(word, word) for word in sample]
    assert call(*former, "-q")[2].startswith("hessdiag: --metrics is --quantities now\n")


def test_init_puts_nothing_into_the_folder_before_it_has_measured(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a kill leaves nothing there."""
    Path("pyproject.toml").unlink()
    Path("baseline.json").unlink()
    before, during = {p.name for p in Path().iterdir()}, set()

    def record(config: object, *_: object, **__: object) -> None:
        during.update(p.name for p in Path().iterdir())
        assert str(config.file) == "hessdiag.toml"
        raise KeyboardInterrupt

    monkeypatch.setattr("hessdiag.cli.baseline.record", record)
    assert call("init", "problem.py:small", "-c", "best.safetensors", "-q")[0] == 130
    assert (during, {p.name for p in Path().iterdir()}) == (before, before)


def nothing() -> None:
    pass


def edit(text: str, new: str, file: str = "baseline.json") -> Callable[[], None]:
    def change() -> None:
        content = Path(file).read_text()
        assert text in content
        Path(file).write_text(content.replace(text, new, 1))

    return change


def truncate(file: str) -> Callable[[], None]:
    return lambda: Path(file).write_bytes(Path(file).read_bytes()[:-40])


def poison() -> None:
    state = load_file("best.safetensors")
    save_file({name: tensor * float("nan") for name, tensor in state.items()}, "best.safetensors")


def reshaped() -> None:
    save_file({"0.weight": torch.zeros(3, 10)}, "best.safetensors")


CONFIGURED = "pyproject.toml"
BAD: dict[str, tuple[Callable[[], None], str, int, tuple[str, ...]]] = {
    "no baseline": (lambda: Path("baseline.json").unlink(), "check", 3, ("baseline update",)),
    "truncated baseline": (truncate("baseline.json"), "check", 2, ("baseline.json",)),
    "foreign baseline": (lambda: Path("baseline.json").write_text("[1, 2]"), "check", 2, ("baseline.json",)),
    "newer baseline": (edit('"schema": 1', '"schema": 9'), "check", 2, ("update hessdiag",)),
    "hand-edited baseline": (edit('"kind"', '"kinds"'), "check", 2, ("baseline.json",)),
    "NaN in the baseline": (edit('"value": ', '"value": NaN, "was": '), "check", 2, ("baseline.json",)),
    "another loss": (nothing, "check -P loss=mse", 3, ("loss",)),
    "another precision": (nothing, "check -P double=true", 3, ("dtype",)),
    "another parameter set": (edit("run = {", 'run = { params = ["2.*"],', CONFIGURED), "check", 3, ("n_params",)),
    "another sample set": (nothing, "check -P flip=1", 3, ("data_sha256",)),
    "fewer samples": (nothing, "check --samples 64", 3, ("samples", "data_sha256")),
    "a split not recorded": (
        lambda: configure('"trace[test]" = { max_increase = 1 }\n'),
        "check",
        3,
        ("test: ", "baseline update"),
    ),
    "a split that is not there": (lambda: configure('"trace[dev]" = { max = 1 }\n'), "check", 2, ("dev", "train")),
    "a metric not recorded": (
        lambda: configure('ws_upper = { max_increase = "5%" }\n'),
        "check",
        3,
        ("ws_upper",),
    ),
    "no tensor matched": (lambda: configure('"trace@9.*" = { max = 1 }\n'), "check", 3, ("9.*", "0.weight")),
    "no budgets": (lambda: configure(""), "check", 3, ("nothing was checked",)),
    "all budgets off": (lambda: configure('trace = { level = "off" }\n'), "check", 3, ("nothing was checked",)),
    "none selected": (nothing, "check --only lambda_min", 3, ("nothing was checked",)),
    "unknown metric": (lambda: configure("tracee = { max = 1 }\n"), "check", 2, ("toml:10", "did you mean trace")),
    "negative limit": (
        lambda: configure('trace = { max_increase = "-5%" }\n'),
        "check",
        2,
        ("toml:10", "max_increase"),
    ),
    "duplicate budget": (
        lambda: configure('trace = { max = 1 }\n"trace[train]" = { max = 2 }\n'),
        "check",
        2,
        ("toml:11",),
    ),
    "no configuration": (
        lambda: (Path(CONFIGURED).unlink(), Path(".git").mkdir()),
        "check",
        2,
        ("hessdiag init",),
    ),
    "no such configuration": (nothing, "check --config none.toml", 2, ("none.toml", "hessdiag init")),
    "no such checkpoint": (lambda: Path("best.safetensors").unlink(), "check", 4, ("best.safetensors",)),
    "a checkpoint that does not load": (truncate("best.safetensors"), "check", 4, ("best.safetensors",)),
    "a checkpoint of another shape": (reshaped, "check", 4, ("0.weight",)),
    "NaN weights": (poison, "check", 4, ("NaN or infinity",)),
    "the same weights, another function": (nothing, "check -P scale=1.5", 4, ("same weights",)),
    "a factory that raises": (edit(":small", ":broken", CONFIGURED), "check", 2, ("no data here",)),
    "result and checkpoint": (nothing, "check --result x -c best.safetensors", 2, ("--result", "one of them")),
    "git and baseline": (
        nothing,
        "check --against-git HEAD --baseline b.json",
        2,
        ("--against-git", "--baseline"),
    ),
    "no such result": (nothing, "check --result nowhere", 2, ("run.json",)),
    "unknown format": (nothing, "check -o junitt=x.xml", 2, ("did you mean junit",)),
    "output is a folder": (lambda: Path("o").mkdir(), "check -o junit=o", 2, ("folder",)),
    "unwritable output": (nothing, "check -o junit=problem.py/x.xml", 4, ("cannot write",)),
    "CI without --ci": (lambda: os.environ.update(CI="true"), "baseline update --reason x", 2, ("--ci",)),
    "no reason": (nothing, "baseline update", 2, ("--reason",)),
    "an empty reason": (nothing, "baseline update --reason ''", 2, ("--reason",)),
    "beyond a hard limit": (
        lambda: configure("trace = { max = 1e-9 }\n"),
        "baseline update --reason x",
        2,
        ("1e-09", "change the limit"),
    ),
    "one file to diff": (nothing, "baseline diff baseline.json", 2, ("OLD NEW",)),
    "runs that are no folders": (nothing, "compare a.pt b.pt", 2, ("--problem",)),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_told_apart(name: str, repository: Path, monkeypatch) -> None:
    prepare, command, expected, words = BAD[name]
    monkeypatch.setenv("CI", "")
    prepare()
    before = files()
    code, out, err = call(*shlex.split(command))
    assert code == expected, (out, err)
    said = out + err
    assert all(word in said for word in words), said
    assert "Traceback" not in said
    assert files() == before


def test_a_baseline_that_may_be_zero_needs_a_floor(repository: Path) -> None:
    content = json.loads(Path("baseline.json").read_text())
    recorded = content["entries"]["train"]["metrics"]["lambda_max"]
    recorded.update(lo=-abs(recorded["value"]))
    Path("baseline.json").write_text(json.dumps(content))
    sharper(1.01)
    code, _, err = call("check")
    assert code == 2
    assert "pyproject.toml:11" in err
    assert "abs_floor" in err
    configure('lambda_max = { max_increase = "10%", abs_floor = 1000 }\n')
    assert call("check")[0] == 0


BROKEN = {
    "incomparable is compared": (gate, "differences", lambda *_: (), "check --samples 64 --fresh", 3),
    "the same weights may differ": (gate, "reproduced", lambda *_: (), "check -P scale=1.5", 4),
    "no baseline passes": (verdict.Report, "undecided", lambda *_: False, "check --baseline none.json", 3),
    "a failure passes": (verdict.Report, "fails", lambda *_: False, "check -c sharp.safetensors", 1),
    "hard limits are recorded over": (gate, "refuse_worse", lambda *_: None, "baseline update --reason x", 2),
}


@pytest.mark.parametrize("name", BROKEN)
def test_this_promise_would_notice(name: str, repository: Path, monkeypatch) -> None:
    owner, attribute, wrong, command, expected = BROKEN[name]
    sharper(2.0, "sharp.safetensors")
    if "update" in command:
        configure("trace = { max = 1e-9 }\n")
    if "baseline" in name:
        failing = property(lambda self: int(any(map(self.fails, self.rows))))
        monkeypatch.setattr(verdict.Report, "exit_code", failing)
    monkeypatch.setattr(owner, attribute, wrong)
    assert call(*shlex.split(command))[0] != expected
