"""Promise: a test that uses ``hessdiag`` fails when its checkpoint got sharper, never by chance. (30 s)"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from safetensors.torch import save_file

from hessdiag.analysis import analyze
from hessdiag.check.baseline import Baseline, read, updated, write
from hessdiag.check.gate import Gate
from hessdiag.check.pytest import pytest_checks, pytest_plugin
from hessdiag.check.subject import entry_of
from hessdiag.sources.digits import digits_mlp, problem

COMMAND = "pytest --hessdiag-update"
HEAVY = ("torch", "numpy", "scipy", "matplotlib", "pandas", "pydantic")
QUICK = ("-p", "no:hypothesispytest")  # imports all of hypothesis anew for each of pytester's runs
WIDTH = 8  # 682 parameters: a test measures in a few tenths of a second
ROUNDING = 1e-5  # 2 √682 eps of float32: blocks of another width go through other kernels
RUN = f"""hessdiag.run(
    "hessdiag.sources.digits:problem", checkpoint="w.safetensors", options={{"width": {WIDTH}}},
    samples=64, batch_size=64, %s)"""
SHARP = RUN % 'quantities="trace"'
ONE = f"""
def test_sharpness(hessdiag):
    run = {SHARP}
    hessdiag.check(run, "trace", max=1000, max_increase="15%")
    assert run.trace.lo > 0
    assert run.metrics["trace"].lo > 0
"""
TWO = f"""
import pytest

@pytest.mark.parametrize("name", %s)
def test_each(hessdiag, name):
    run = {SHARP}
    hessdiag.check(run, "trace", max_increase="15%%")
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """All that a measurement imports: pytester forgets what is first imported under it, torch loads once."""
    updated(
        tmp_path_factory.mktemp("once") / "b.json",
        {"train": entry_of(analyze(problem(WIDTH), samples=64, batch_size=64, steps=4))},
    )


@pytest.fixture
def project(pytester, monkeypatch, imported):
    """A project with a checkpoint and no tests."""
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    pytester.makeini("[pytest]\naddopts = --strict-markers --strict-config -p no:cacheprovider\n")
    weights(pytester.path)
    return pytester


def weights(folder: Path, factor: float = 1.0) -> None:
    """Untrained, the same each time; a larger last layer is sharper."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = digits_mlp(WIDTH).state_dict()
    save_file({name: tensor * factor for name, tensor in state.items()}, folder / "w.safetensors")


def call(project, *arguments, **expected):
    """Run the project's tests in this process; the expected outcomes if given."""
    result = project.runpytest_inprocess("-W", "error", *QUICK, *arguments)
    if expected:
        result.assert_outcomes(**expected)
    return result


def recorded(project, name="tests/hessdiag-baseline.json"):
    file = project.path / name
    return dict(read(file).entries) if file.exists() else {}


def words(result) -> str:
    """What was said, line breaks aside: pytest wraps nothing, but prefixes lines of a failure with E."""
    return " ".join(result.stdout.str().split())


def test_first_fails_then_update_then_passes(project):
    project.makepyfile(test_a=ONE)
    before = call(project)
    assert before.parseoutcomes() == {"failed": 1}
    assert f"{COMMAND} test_a.py::test_sharpness" in before.stdout.str()
    assert recorded(project) == {}
    update = call(project, "--hessdiag-update", "--hessdiag-reason", "first ü")
    entries = recorded(project)
    assert list(entries) == ["test_a.py::test_sharpness::train"]
    assert entries["test_a.py::test_sharpness::train"].reason == "first ü"
    assert "test_a.py::test_sharpness::train trace: none →" in update.stdout.str()
    after = call(project)
    assert after.parseoutcomes() == {"passed": 1}
    assert "hessdiag baselines" not in after.stdout.str()


def test_a_sharper_checkpoint_fails(project):
    project.makepyfile(test_a=ONE)
    call(project, "--hessdiag-update", passed=1)
    weights(project.path, 1.5)
    result = call(project)
    text = words(result)
    assert result.parseoutcomes() == {"failed": 1}
    for part in (
        "trace ≤ +15%: +",
        "beyond ≤ +15%",
        "measured ",
        "in tests/hessdiag-baseline.json",
        f"if the change is meant, accept it with {COMMAND} test_a.py::test_sharpness",
        'hessdiag.check(run, "trace", max=1000',  # the line of the test
    ):
        assert part in text


def test_a_failed_test_records_nothing(project):
    project.makepyfile(
        test_a=ONE.replace("max=1000", "max=1e-3"),
        test_b=ONE.replace("max=1000, ", "").replace("assert run.trace.lo > 0", "assert run.trace.lo < 0"),
        test_c=ONE.replace("max=1000, ", "").replace(
            "    assert run.trace.lo", "    hessdiag.check(run, 'trace', max=0)\n#"
        ),
    )
    result = call(project, "--hessdiag-update")
    assert result.parseoutcomes() == {"failed": 3}
    assert "recorded beyond a" in result.stdout.str()
    assert "nothing was recorded" in result.stdout.str()
    assert recorded(project) == {}


def ci_is_refused(project):
    project.makepyfile(test_a=ONE)
    result = call(project, "--hessdiag-update")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert recorded(project) == {}


def test_every_test_has_its_own(project):
    project.makepyfile(test_a=TWO % '["one", "two"]')
    call(project, "--hessdiag-update", "-k", "one")
    call(project, "--hessdiag-update", "-k", "two")
    assert sorted(recorded(project)) == [f"test_a.py::test_each[{name}]::train" for name in ("one", "two")]


def test_strangers_stay(project):
    """The file may serve the command line too: its entries are not ours."""
    project.makepyfile(test_a=ONE)
    call(project, "--hessdiag-update", passed=1)
    own = recorded(project)["test_a.py::test_sharpness::train"]
    write(project.path / "tests/hessdiag-baseline.json", Baseline(entries={"train": own, "train@0.*": own}))
    call(project, "--hessdiag-update", passed=1)
    assert sorted(recorded(project)) == ["test_a.py::test_sharpness::train", "train", "train@0.*"]


def test_nothing_heavy_is_loaded(project, *arguments: str):
    """In a process of its own: this one has torch."""
    project.makepyfile(test_a="def test_nothing():\n    pass\n")
    project.makeconftest(
        "import json, sys\ndef pytest_unconfigure(config):\n"
        "    assert config.pluginmanager.hasplugin('hessdiag')\n"
        "    with open('modules.json', 'w') as file:\n        json.dump(sorted(sys.modules), file)\n"
    )
    command = [sys.executable, "-m", "pytest", "-W", "error", *arguments]
    done = subprocess.run(command, cwd=project.path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [line for line in done.stdout.splitlines() if "hessdiag" in line and "plugins:" not in line] == []
    loaded = json.loads((project.path / "modules.json").read_text())
    assert sorted(set(HEAVY) & set(loaded)) == []


def test_a_closer_look_is_taken(project):
    """At a limit that is the value itself nobody can tell: all probes are spent, and it is said."""
    options = 'quantities="frobenius_squared", probes=4, max_probes=12'
    project.makepyfile(
        test_a=f"""
import pytest

def test_limit(hessdiag):
    run = {RUN % options}
    first = run.frobenius_squared
    assert len(first.per_probe) == 4
    hessdiag.check(run, "frobenius_squared", max=first.value)
    assert len(run.frobenius_squared.per_probe) > 4
    assert run.frobenius_squared.per_probe[:4] == pytest.approx(first.per_probe, rel={ROUNDING})
    hessdiag.check(run, "frobenius_squared", max=run.frobenius_squared.value)
    assert len(run.frobenius_squared.per_probe) == 12
"""
    )
    result = project.runpytest_inprocess("-W", "always", *QUICK)
    assert result.parseoutcomes().get("passed") == 1
    assert "HessdiagWarning: test_a.py::test_limit, frobenius_squared ≤" in result.stdout.str()
    assert "cannot tell" in result.stdout.str()


@pytest.mark.parametrize("value", ["true", "1", "True", "woodpecker"])
def test_ci_is_refused(project, monkeypatch, value):
    monkeypatch.setenv("CI", value)
    ci_is_refused(project)


def test_ci_may_be_overruled(project, monkeypatch):
    monkeypatch.setenv("CI", "true")
    project.makepyfile(test_a=ONE)
    call(project, "--hessdiag-update", "--hessdiag-ci", passed=1)
    call(project, passed=1)


def test_undecided_is_an_error_where_warnings_are(project):
    options = 'quantities="frobenius_squared", probes=4, max_probes=4'
    project.makepyfile(
        test_a=f"""
def test_limit(hessdiag):
    run = {RUN % options}
    hessdiag.check(run, "frobenius_squared", max=run.frobenius_squared.value)
"""
    )
    strict = "error::hessdiag.check.pytest.pytest_plugin.HessdiagWarning"
    project.runpytest_inprocess("-W", strict, *QUICK).assert_outcomes(failed=1)
    project.runpytest_inprocess("-W", "ignore", *QUICK).assert_outcomes(passed=1)


def test_a_budget_of_level_warn_warns(project):
    checks = (
        'hessdiag.check(run, "trace", max=1e-3, level="warn"); hessdiag.check(run, "trace", max=0, level="off")'
    )
    project.makepyfile(test_a=f"def test_it(hessdiag):\n    run = {SHARP}\n    {checks}\n")
    result = project.runpytest_inprocess("-W", "always", *QUICK)
    result.assert_outcomes(passed=1, warnings=1)
    assert "HessdiagWarning: test_a.py::test_it, trace ≤ 0.001: fail" in result.stdout.str()


def test_skipping_spares_the_other_fixtures(project):
    project.makepyfile(
        test_a=ONE.replace("(hessdiag)", "(costly, hessdiag)")
        + "import pytest\n@pytest.fixture\ndef costly():\n    raise RuntimeError\n"
        + "def test_other():\n    pass\n"
        + "def test_late(request):\n    request.getfixturevalue('hessdiag')\n"
    )
    call(project, "--hessdiag-skip", passed=1, skipped=2)


def test_the_marker_gives_defaults_and_the_nearest_wins(project):
    project.makepyfile(
        test_a=f"""
import pytest
pytestmark = pytest.mark.hessdiag(samples=48, seed=3)

@pytest.mark.hessdiag(samples=40, quantities="frobenius_squared", probes=4)
class TestIt:
    def test_it(self, hessdiag):
        run = {RUN.replace("samples=64, batch_size=64, ", "") % "probes=5"}
        assert (run.fingerprint["samples"], run.fingerprint["seed"], run.fingerprint["probes"]) == (40, 3, 5)
        assert list(run.metrics) == ["frobenius_squared"]

@pytest.mark.hessdiag(8)
def test_wrong(hessdiag):
    hessdiag.run("hessdiag.sources.digits:problem")
"""
    )
    result = call(project, passed=1, failed=1)
    assert "takes options by name" in result.stdout.str()
    assert "hessdiag(**options)" in call(project, "--markers").stdout.str()


def test_junit_holds_values_and_verdicts(project):
    project.makepyfile(test_a=ONE + TWO % '["x"]')
    call(project, "--hessdiag-update", passed=2)
    call(project, "--junitxml=out.xml", passed=2)
    case = ElementTree.parse(project.path / "out.xml").find(".//testcase[@name='test_sharpness']")
    found = {item.get("name"): item.get("value") for item in case.iter("property")}
    lo, value, hi = (float(found[f"hessdiag.trace.{end}"]) for end in ("lo", "value", "hi"))
    assert lo <= value <= hi
    assert found["hessdiag.trace.max.limit"] == "≤ 1000"
    assert found["hessdiag.trace.max.verdict"] == "pass"
    assert found["hessdiag.trace.max_increase.limit"] == "≤ +15%"
    assert found["hessdiag.trace.max_increase.verdict"] == "pass"
    assert float(found["hessdiag.trace.baseline"]) == pytest.approx(value, rel=1e-6)


HOSTILE = [
    "../../x",
    "a::b",
    "a::train",
    "ä ö",
    'q"uote',
    "]",
    "%3A%3A",
    "new\nline",
    "\x00",
    "$(touch pwned)",
    "'; x",
]


def test_hostile_names_keep_apart(project):
    project.makepyfile(test_a=TWO % ascii(HOSTILE))
    call(project, "--hessdiag-update", passed=len(HOSTILE))
    assert len(recorded(project)) == len(HOSTILE)
    call(project, passed=len(HOSTILE))
    assert {path.name for path in project.path.iterdir()} >= {"tests"}
    assert [path.name for path in (project.path / "tests").iterdir()] == ["hessdiag-baseline.json"]


def test_names_that_are_no_text(project):
    """A folder of an older encoding: its name is no UTF-8, and the baseline is."""
    folder = project.path / "caf\udce9"
    folder.mkdir()
    (folder / "test_a.py").write_text(ONE)
    call(project, "--hessdiag-update", passed=1)
    call(project, passed=1)
    assert list(recorded(project)) == ["caf\\udce9/test_a.py::test_sharpness::train"]


def test_runs_and_scopes_of_one_test_have_names(project):
    body = """
    hessdiag.check(a, "trace", max_increase="15%")
    hessdiag.check(b, "trace", max_increase="15%")
    hessdiag.check(a, "trace@1.*", max_increase="15%")
    hessdiag.check(a, "trace[test]", max_increase="15%")
    hessdiag.check(a, "lambda_max", max_increase="15%")
    assert "lambda_max" in a.metrics
"""
    runs = f"    a = {SHARP}\n    b = {SHARP}"
    named = runs.replace("64, ", "64, name='plain', ", 1)
    project.makepyfile(test_a=f"def test_named(hessdiag):\n{named}{body}\ndef test_not(hessdiag):\n{runs}{body}")
    result = call(project, "--hessdiag-update", passed=1, failed=1)
    assert "two runs of this test are without a name" in result.stdout.str()
    test = "test_a.py::test_named"
    labels = [f"{test}::plain::test", f"{test}::plain::train", f"{test}::plain::train@1.*", f"{test}::train"]
    entries = recorded(project)
    assert sorted(entries) == labels
    assert sorted(entries[f"{test}::plain::train"].metrics) == ["lambda_max", "trace"]
    call(project, "-k", "test_named", passed=1)


def test_a_problem_object_and_everything_of_an_analysis(project):
    project.makepyfile(
        test_a="""
import copy
from hessdiag.sources.digits import problem

def test_it(hessdiag):
    wanted = ["lambda_max", "density"]
    one = hessdiag.run(problem(width=4), samples=32, quantities=wanted, steps=8, density_probes=2)
    two = hessdiag.run(problem=problem(width=4), samples=32, quantities="trace")
    assert list(two.metrics) == ["trace"]
    hessdiag.check(one, "trace", min=-1e9)
    assert set(one.metrics) == {"lambda_max", "negative_mass", "trace"}
    assert set(one.to_frame()["quantity"]) == set(one.metrics)
    assert one.plot.density() is not None
    assert copy.copy(one).trace.value == one.trace.value
    try:
        two.lambda_min
    except AttributeError as error:
        assert "quantities=[...]" in str(error)
    assert not hasattr(two, "nonsense")
"""
    )
    call(project, passed=1)


def test_the_place_of_the_baseline(project, monkeypatch):
    project.makepyfile(test_a=ONE)
    project.makeini("[pytest]\nhessdiag_baseline = ini/b.json\n")
    call(project, "--hessdiag-update", passed=1)
    assert recorded(project, "ini/b.json")
    folder = project.mkdir("below")
    monkeypatch.chdir(folder)
    call(project, "--hessdiag-update", "--hessdiag-baseline", "own.json", "..", passed=1)
    assert list(recorded(project, "below/own.json")) == ["test_a.py::test_sharpness::train"]
    call(project, "..", passed=1)


def test_what_cannot_be_compared_says_why(project):
    project.makepyfile(test_a=ONE)
    call(project, "--hessdiag-update", passed=1)
    project.makepyfile(test_a=ONE.replace("samples=64", "samples=63"))
    text = words(call(project, failed=1))
    assert "samples was 64 in the baseline and is 63" in text
    assert f"or {COMMAND} test_a.py::test_sharpness" in text
    assert "hessdiag baseline" not in text
    assert "[tool.hessdiag" not in text
    (project.path / "tests/hessdiag-baseline.json").write_text("{")
    text = words(call(project, failed=1))
    assert "is damaged" in text
    assert "hessdiag baseline" not in text


WRONG = {
    "no limit": ("check(run, 'trace')", "trace: has no limit"),
    "unknown metric": ("check(run, 'tracee', max=1)", "did you mean trace?"),
    "a share as a maximum": ("check(run, 'trace', max='15%')", "it must be a number"),
    "not finite": ("check(run, 'trace', max=float('nan'))", "a finite number is needed"),
    "level": ("check(run, 'trace', max=1, level='warning')", "did you mean warn?"),
    "claim": ("check(run, 'negative_mass', max=1, claim='population')", "has no error over data"),
    "no such split": ("check(run, 'trace[valid]', max=1)", "the problem has train, test"),
    "no such tensor": ("check(run, 'trace@nothing.*', max=1)", "nothing.*"),
    "no run": ("check(None, 'trace', max=1)", "NoneType is no run"),
    "option": ("run('a:b', sample=3)", "no option 'sample'; did you mean samples?"),
    "too few": ("run('a:b', probes=8, max_probes=4)", "at least the 8"),
    "no such module": ("run('nowhere:problem')", "no module 'nowhere'"),
    "no such checkpoint": ("run('hessdiag.sources.digits:problem', checkpoint='no.pt')", "no.pt"),
    "no problem": ("run(3)", "int is no problem"),
    "weights twice": ("run(problem(), checkpoint='w.safetensors')", "has its weights already"),
    "the user's bug": ("run('own:broken')", "ZeroDivisionError: division by zero (its traceback is above)"),
}


def test_faults_are_one_line(project):
    project.makepyfile(own="def broken():\n    return 1 / 0  # a bug of the user\n")
    project.makepyfile(
        test_a="import pytest\nfrom hessdiag.sources.digits import problem\n"
        "@pytest.fixture\ndef run(hessdiag):\n"
        f"    return hessdiag.run(problem(width={WIDTH}), samples=64, quantities='trace')\n"
        + "".join(
            f"def test_{number}(hessdiag, run):\n    hessdiag.{code}\n"
            for number, (code, _) in enumerate(WRONG.values())
        )
    )
    result = call(project, "--tb=short", failed=len(WRONG))
    lines = [line for line in result.stdout.lines if line.startswith(("E   Failed", "E   "))]
    for name, (_, said) in WRONG.items():
        assert any(said in line for line in lines), name
    assert "a bug of the user" in result.stdout.str()
    assert "pytest_checks.py" not in result.stdout.str()


def keeps_only_its_own(path, entries, **_):
    return None, write(path, Baseline(entries=entries))


@pytest.hookimpl(hookwrapper=True)
def all_pass(self, item):
    yield
    item.stash[pytest_plugin.PASSED] = True


BROKEN = {
    "a missing baseline passes": (
        test_first_fails_then_update_then_passes,
        (pytest_checks, "outcome", lambda *_: ([], [])),
    ),
    "the light option is heavy": (test_nothing_heavy_is_loaded, ("-p", "numpy")),
    "nothing fails": (test_a_sharper_checkpoint_fails, (pytest_checks, "outcome", lambda *_: ([], []))),
    "compares nothing": (
        test_a_sharper_checkpoint_fails,
        (pytest_checks.Checks, "_baseline", lambda self, *_: pytest_checks.Recordings({}, "nothing")),
    ),
    "failed tests count": (
        test_a_failed_test_records_nothing,
        (pytest_plugin.Recording, "pytest_runtest_call", all_pass),
    ),
    "CI unseen": (ci_is_refused, (pytest_plugin, "NOT_CI", ("1",))),
    "one baseline for all": (test_every_test_has_its_own, (pytest_checks.Checks, "_label", lambda *_: "train")),
    "parameters left out": (
        test_every_test_has_its_own,
        (pytest_checks, "_text", lambda text: text.partition("[")[0]),
    ),
    "others thrown away": (test_strangers_stay, (pytest_checks, "updated", keeps_only_its_own)),
    "one look": (test_a_closer_look_is_taken, (Gate, "_closer", lambda self, rows: rows)),
}


@pytest.mark.parametrize("breakage", BROKEN)
def test_this_promise_would_notice(project, monkeypatch, breakage):
    promise, broken = BROKEN[breakage]
    if promise is test_nothing_heavy_is_loaded:
        with pytest.raises(AssertionError, match="numpy"):
            promise(project, *broken)
        return
    if promise is ci_is_refused:
        monkeypatch.setenv("CI", "1")
    where, name, instead = broken
    monkeypatch.setattr(where, name, instead)
    with pytest.raises(AssertionError):
        promise(project)
