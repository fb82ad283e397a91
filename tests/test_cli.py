"""The command line does what its help says: tables for people, one JSON document for programs, files where asked.

Oracles: the library called directly, the standard library's parsers, and the dense Hessian's trace.
"""

from __future__ import annotations

import ast
import csv
import functools
import inspect
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import click
import pytest
from safetensors.torch import load_file, save_file
from torch import nn

import hessdiag
from hessdiag import Problem, __version__, analyze, cli, folders, hessian, load_run
from hessdiag.check import schema
from hessdiag.check.config import ConfigError, load_config
from hessdiag.cli.options import settings
from hessdiag.engine.products.curvature import Curvature
from hessdiag.errors import UsageError
from hessdiag.option import Option, OptionError, faults_of, options_of
from hessdiag.results import QUANTITIES, json_schema, runfile
from hessdiag.samples import draw
from hessdiag.settings import UNPAIRED, Settings
from hessdiag.sources import digits
from tests.command import call
from tests.models import dense_hessian

RENAMED = runfile.RENAMED
DIGITS = "hessdiag.sources.digits:problem"
SMALL = ("--samples", "64", "--probes", "4", "--density-probes", "2", "--steps", "5")
PLOTS = {"density.svg", "cumulative.svg", "convergence.svg", "layers.svg"}
TABLES = {"metrics.csv", "spectrum.csv", "layers.csv"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As DistributedDataParallel saves it: every name with a prefix."""
    file = tmp_path_factory.mktemp("weights") / "last.safetensors"
    state = digits.train_digits("plain", epochs=1).state_dict()
    save_file({f"module.{name}": tensor for name, tensor in state.items()}, file)
    return file


@pytest.fixture(scope="module")
def analysed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[int, str, str]]:
    folder = tmp_path_factory.mktemp("run") / "out"
    return folder, call("analyze", DIGITS, "-c", str(checkpoint), *SMALL, "-o", str(folder))


@pytest.fixture
def problems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(Path(__file__).with_name("bad_problems.py"), tmp_path / "p.py")
    return tmp_path


def test_the_table_has_every_number_with_its_interval(analysed: tuple[Path, tuple[int, str, str]]) -> None:
    folder, (code, out, _) = analysed
    assert code == 0
    metrics = load_run(folder).metrics
    assert set(metrics) == set(QUANTITIES) - {"density"}
    rows = {line.split()[0]: line for line in out.splitlines() if line.startswith(" ") and line.strip()}
    for name in metrics:
        assert name in rows
        assert "[" in rows[name]
        assert rows[name].index("]") > rows[name].index("[")


def test_notes_go_to_stderr(analysed: tuple[Path, tuple[int, str, str]]) -> None:
    folder, (_, out, err) = analysed
    assert "stripped 'module.' from 6 names" in err
    assert "3,466 parameters, 64 samples in 8 batches" in err
    assert f"written: {folder}/run.json" in err
    assert "stripped" not in out
    assert any("module." in note for note in load_run(folder).notes)


def read_table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as stream:
        return list(csv.DictReader(stream))


def test_the_folder_holds_everything(analysed: tuple[Path, tuple[int, str, str]]) -> None:
    folder, _ = analysed
    assert {path.name for path in folder.iterdir()} == {"run.json", "report.html", *TABLES, *PLOTS}
    for name in PLOTS:
        assert ElementTree.parse(folder / name).getroot().tag.endswith("svg")
    rows = read_table(folder / "metrics.csv")
    assert [row["quantity"] for row in rows] == [name for name in QUANTITIES if name != "density"]
    assert all(float(row["lo"]) <= float(row["value"]) <= float(row["hi"]) for row in rows)
    assert {row["name"] for row in read_table(folder / "layers.csv")} == set(digits.digits_mlp().state_dict())
    assert len(read_table(folder / "spectrum.csv")) > 2
    page = (folder / "report.html").read_text()
    assert page[:15].lower() == "<!doctype html>"
    assert "lambda_max" in page
    assert f"hessdiag analyze {DIGITS} -c" in page


def test_nothing_of_an_earlier_run_stays_in_its_folder(problems: Path) -> None:
    (problems / "out").mkdir()
    (problems / "out" / "mine.txt").write_text("kept")
    for name in (*TABLES, *PLOTS):
        (problems / "out" / name).write_text("of an earlier run")
    assert call("analyze", "p.py:good", "--quantities", "lambda_max", "-o", "out")[0] == 0
    left = {path.name: path.read_text() for path in (problems / "out").iterdir()}
    assert set(left) == {"mine.txt", "run.json", "metrics.csv", "convergence.svg", "report.html"}
    assert "of an earlier run" not in left.values()


def test_the_numbers_are_those_of_the_model_in_the_file(
    analysed: tuple[Path, tuple[int, str, str]], checkpoint: Path
) -> None:
    """The last layer's trace against the dense Hessian of that layer on the features before it, in float64."""
    model = digits.problem().model
    model.load_state_dict({n.removeprefix("module."): t for n, t in load_file(checkpoint).items()})
    images, targets = draw(digits.problem().data["train"], samples=64, batch_size=64).batches[0]
    features = model[:-1](images).detach().double()
    last = Problem(nn.Sequential(model[-1]), {"train": (features, targets)}, criterion="cross_entropy")
    weight, bias = load_run(analysed[0]).layers[-2:]
    assert (weight.name, bias.name) == ("5.weight", "5.bias")
    # float32 against float64
    assert weight.trace + bias.trace == pytest.approx(float(dense_hessian(last).trace()), rel=1e-4)


def test_json_is_one_document_and_nothing_else(problems: Path) -> None:
    code, out, err = call("analyze", "p.py:prints", *SMALL, "--json", "-o", "out")
    assert code == 0
    document = json.loads(out)
    assert document["schema"] == 1
    assert out == (problems / "out" / "run.json").read_text()
    assert load_run(problems / "out").metrics["trace"].value == document["metrics"]["trace"]["value"]
    assert err == "Files already downloaded and verified\n"  # the factory's own words


def test_the_schema_describes_run_json(analysed: tuple[Path, tuple[int, str, str]]) -> None:
    folder, _ = analysed
    code, out, err = call("schema")
    schema = json.loads(out)
    assert (code, err) == (0, "")
    assert schema == json.loads(json.dumps(json_schema()))
    run = json.loads((folder / "run.json").read_text())
    assert set(run) == set(schema["properties"])
    assert schema["properties"]["schema"]["const"] == run["schema"] == 1


def test_a_trace_alone_takes_no_products(problems: Path) -> None:
    code, out, _ = call("analyze", "p.py:relu", "--quantities", "trace", "--json")
    document = json.loads(out)
    assert code == 0
    assert document["cost"]["products"] == 0
    assert list(document["metrics"]) == ["trace"]
    assert document["metrics"]["trace"]["kind"] == "exact"


def test_a_single_sample_is_measured(problems: Path) -> None:
    # one example has a Hessian; only error bars over data need more
    code, out, _ = call("analyze", "p.py:good", "--samples", "1", "--quantities", "lambda_max,trace", "--json")
    metrics = json.loads(out)["metrics"]
    assert code == 0
    assert metrics["lambda_max"]["data"] is metrics["trace"]["data"] is None


def test_quiet_says_only_the_result(problems: Path) -> None:
    code, out, err = call("analyze", "p.py:good", "--quantities", "trace", "-q")
    assert (code, err) == (0, "")
    assert "trace" in out


def test_options_and_folders_reach_the_factory(problems: Path) -> None:
    (problems / "elsewhere").mkdir()
    shutil.move(problems / "p.py", problems / "elsewhere" / "mine.py")
    arguments = ("mine:good", "--app-dir", "elsewhere", "-P", "width=7", "--quantities", "trace", "--json")
    code, out, _ = call("analyze", *arguments)
    assert code == 0
    assert json.loads(out)["fingerprint"]["n_params"] == 4 * 7 + 7 + 7 * 3 + 3


def test_doctor_finds_nothing_wrong(problems: Path) -> None:
    code, out, err = call("doctor", "p.py:good")
    assert (code, err) == (0, "")
    for word in ("determinism", "self-test", "‖gradient‖", "cost", "products", "MiB", "fit to be measured"):
        assert word in out
    assert "FAIL" not in out


def test_doctor_names_the_fault(problems: Path) -> None:
    code, out, _ = call("doctor", "p.py:detached_backward")
    assert code == 4
    fault = next(line for line in out.splitlines() if line.startswith("FAIL"))
    assert "custom Detached" in fault
    assert out.splitlines()[-1] == "not measurable as it is"


def test_doctor_forecasts_with_the_options_of_analyze(checkpoint: Path) -> None:
    what = ("doctor", "hessdiag.sources.digits:problem", "-c", str(checkpoint))

    def products(*options: str) -> int:
        (line,) = [text for text in call(*what, *options)[1].splitlines() if " cost " in text]
        return int(line.split("about ")[1].split(" product")[0])

    everything = products()
    assert products("--effort", "quick") < everything < products("--effort", "thorough")
    assert products("--quantities", "lambda_max") < everything / 2
    assert products("--budget", "20p") <= 20
    code, _, err = call(*what, "--budget", "soon")
    assert code == 2 and "--budget soon: allowed: a time" in err


@pytest.mark.parametrize(("factory", "expected"), [("prints", 0), ("detached_backward", 4)])
def test_doctor_json_is_one_document(problems: Path, factory: str, expected: int) -> None:
    code, out, _ = call("doctor", f"p.py:{factory}", "--json")
    document = json.loads(out)
    assert code == expected
    assert set(document) == {"findings", "notes", "forecast"}
    assert any(finding["level"] == "fault" for finding in document["findings"]) == (expected == 4)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_names_the_command(shell: str) -> None:
    code, out, err = call("completion", shell)
    assert (code, err) == (0, "")
    assert "_HESSDIAG_COMPLETE" in out


@pytest.mark.parametrize("verb", cli.VERBS)
def test_every_verb_has_help(verb: str) -> None:
    code, out, err = call(verb, "--help")
    assert (code, err) == (0, "")
    assert out.startswith(f"Usage: hessdiag {verb}")
    assert check_help(cli.cli.get_command(click.Context(cli.cli), verb)) == []


def check_help(command: click.Command | None) -> list[str]:
    """The options that do not say what they are for."""
    assert command is not None
    assert command.help
    named = [option for option in command.params if isinstance(option, click.Option)]
    return [option.opts[0] for option in named if not option.help]


def check_former_names(folder: Path) -> None:
    """What was called way is taken as method: by the flag, in Python, in a configuration and in a run.json."""
    few = ["--quantities", "lambda_max", "--samples", "64", "-q", "--json"]
    code, out, err = call("analyze", DIGITS, *few, "--way", "double_backward")
    assert (code, err) == (0, "hessdiag: --way is --method now\n")
    document = json.loads(out)
    assert document["environment"]["method"] == "double_backward"

    problem = digits.problem()
    with pytest.warns(DeprecationWarning, match="way is method now") as told:
        analysis = analyze(problem, "lambda_max", samples=64, way="double_backward")
        operator = hessian(problem, samples=64, way="double_backward")
    assert len(told) == 2
    assert (analysis.environment["method"], operator.method) == ("double_backward",) * 2

    file = folder / "hessdiag.toml"
    file.write_text("problem = 'a:b'\n[run]\nway = 'double_backward'\n[check.budgets]\ntrace = {max = 1}\n")
    assert load_config(file).run["method"] == "double_backward"
    file.write_text("problem = 'a:b'\n[run]\nmetrics = ['trace']\n")
    assert load_config(file).metrics == ("trace",)

    for part, former, today in RENAMED:
        held = document[part] if part else document
        held[former] = held.pop(today)
    (folder / "run.json").write_text(json.dumps(document))
    old = load_run(folder)
    assert old.environment == json.loads(out)["environment"]
    assert old.self_test is not None
    assert len(old.other_bounds) == len(json.loads(out)["other_bounds"])
    assert old.self_test.methods_agree == json.loads(out)["self_test"]["methods_agree"]


def test_former_names_are_taken(tmp_path: Path) -> None:
    check_former_names(tmp_path)


def test_help_lists_every_verb() -> None:
    code, out, _ = call()
    assert code == 0
    assert out == call("--help")[1]
    for verb, summary in cli.VERBS.items():
        assert f"{verb} " in out
        assert summary in out
    assert "\\b" not in out
    assert "  hessdiag analyze problem.py:cifar -c last.pt -o out/    your own checkpoint\n" in out


def test_every_setting_has_its_option_and_default(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Settings] = []

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("hessdiag.cli.analyze.settings", lambda **v: asked.append(settings(**v)))
    monkeypatch.setattr("hessdiag.cli.analyze.load", stop)
    assert call("analyze", DIGITS)[0] == 130
    assert asked == [Settings()]
    options = cli.cli.get_command(click.Context(cli.cli), "analyze")
    assert options is not None
    assert set(Settings.__slots__) < {option.name for option in options.params}


def check_one_definition() -> None:
    """Help, flags, tables and signature agree on every option; ranges say what is refused."""
    shown = " ".join(call("analyze", "--help")[1].split())
    table = schema.Sheet.model_json_schema()["$defs"]["RunTable"]["properties"]
    signature = inspect.signature(Settings).parameters
    for name, one in options_of(Settings).items():
        assert one.help.endswith("."), name
        default = signature[name].default
        typed = f"{'' if default else 'no-'}second-opinion" if name == "second_opinion" else default
        said = f"[{one.instead}]" if one.instead else "" if default is None else f"[default: {typed}]"
        assert f"--{name.replace('_', '-')} " in shown, name
        assert f"{one.help} {said}".strip() in shown, name
        assert repr(getattr(Settings(), name)) == repr(default), name
        if name in ("quantities", *UNPAIRED):  # the quantities of a run are those beside the budgets'
            assert name not in table or name == "quantities"
            continue
        told = table[name]
        assert (repr(told["default"]), told["description"]) == (repr(default), one.help), name
        lowest, highest = told.get("minimum"), told.get("exclusiveMaximum")
        for wrong in ([] if lowest is None else [lowest - 1]) + ([] if highest is None else [highest]):
            assert [fault.field for fault in Settings.faults({name: wrong})] == [name]
        assert lowest is None or Settings.faults({name: lowest}) == ()
        assert set(told.get("enum", [])) - {None} == set(one.choices)
        bounded = isinstance(default, int | float) or one.kind in (int, float)
        assert (
            lowest is not None or "exclusiveMinimum" in told or not bounded or name in ("seed", "second_opinion")
        )


def test_every_setting_is_defined_once() -> None:
    check_one_definition()


WRONG = {"rtol": 2.0, "probes": 1, "density_probes": 1, "method": "magic", "max_steps": 0, "confidence": 1.0}


def check_spelling(folder: Path) -> None:
    """All faults are said at once, by the name that the option has where it was given."""
    with pytest.raises(UsageError) as refused:
        Settings(**WRONG)  # type: ignore[arg-type]
    assert isinstance(refused.value, OptionError)
    faults = refused.value.faults
    assert [fault.field for fault in faults] == [name for name in Settings.__slots__ if name in WRONG]
    assert str(refused.value) == f"{faults[0]} (and 5 more)"
    assert not any("--" in str(fault) for fault in faults)
    assert {str(fault).split(": ")[0] for fault in faults} == {f"{k}={v!r}" for k, v in WRONG.items()}

    rest = {name: value for name, value in WRONG.items() if name != "method"}  # click knows the methods
    flags = {f"--{name.replace('_', '-')} {value}" for name, value in rest.items()}
    code, out, err = call("analyze", DIGITS, *shlex.split(" ".join(flags)))
    assert (code, out) == (2, "")
    assert {line.removeprefix("hessdiag: ").split(": ")[0] for line in err.splitlines()} == flags

    file = folder / "hessdiag.toml"
    file.write_text("problem = 'a:b'\n[run]\n" + "".join(f"{k} = {json.dumps(v)}\n" for k, v in WRONG.items()))
    with pytest.raises(ConfigError) as listed:
        load_config(file)
    assert [fault.split(": ")[1] for fault in listed.value.faults] == [f"run.{name}" for name in WRONG]
    said = {fault.field: fault.text for fault in faults}
    assert all(fault.endswith(said[fault.split(": ")[1][4:]]) for fault in listed.value.faults)


def test_each_surface_spells_all_faults_its_own_way(tmp_path: Path) -> None:
    check_spelling(tmp_path)


def test_values_of_no_sense_are_faults_and_no_traceback() -> None:
    for name, one in options_of(Settings).items():
        for value in ("", "x", -1, 0.5, float("nan"), True, [], {}, object(), None, 10**400):
            faults = Settings.faults({name: value})
            assert all(fault.field == name and fault.text for fault in faults), (name, value)
            assert value is not None or bool(faults) == (one.default is not None), name
    assert Settings.faults({"prbes": 3})[0].text == "no such option; did you mean probes?"


def flag_says(patch: pytest.MonkeyPatch, name: str, what: str, value: object) -> None:
    command = cli.cli.get_command(click.Context(cli.cli), "analyze")
    assert command is not None
    patch.setattr(next(one for one in command.params if one.name == name), what, value)


def table_says(patch: pytest.MonkeyPatch, name: str, what: str, value: object) -> None:
    told = schema.Sheet.model_json_schema()
    told["$defs"]["RunTable"]["properties"][name][what] = value
    patch.setattr(schema.Sheet, "model_json_schema", lambda: told)


def first_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("hessdiag.settings.faults_of", lambda cls, given: faults_of(cls, given)[:1])


def names_its_flag(patch: pytest.MonkeyPatch) -> None:
    real = Option.faults
    patch.setattr(
        Option, "faults", lambda one, value: [f._replace(text=f"--{f.field}: {f.text}") for f in real(one, value)]
    )


def without_help(patch: pytest.MonkeyPatch) -> None:
    options = {**options_of(Settings), "samples": replace(options_of(Settings)["samples"], help="")}
    patch.setitem(globals(), "options_of", lambda _: options)


APART: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], bool]] = {  # and whether it is seen in the spelling
    "an option without help": (without_help, False),
    "a flag with a default of its own": (lambda m: flag_says(m, "top", "default", 2), False),
    "a flag with words of its own": (lambda m: flag_says(m, "block", "help", "Vectors."), False),
    "a table with a default of its own": (lambda m: table_says(m, "max_steps", "default", 128), False),
    "a table with words of its own": (lambda m: table_says(m, "seed", "description", "A number."), False),
    "a table with a range of its own": (lambda m: table_says(m, "probes", "minimum", 1), False),
    "a range that is not refused": (lambda m: m.setattr("hessdiag.settings.faults_of", lambda *_: []), False),
    "only the first fault": (first_alone, True),
    "a fault that names a flag": (names_its_flag, True),
    "Python's spelling on the command line": (lambda m: m.setattr("hessdiag.cli.options._typed", str), True),
}


@pytest.mark.parametrize("breakage", APART)
def test_one_definition_would_notice(breakage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it, in_spelling = APART[breakage]
    break_it(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check_spelling(tmp_path) if in_spelling else check_one_definition()


def test_the_version_is_the_package_s() -> None:
    assert call("--version")[1] == f"hessdiag, version {__version__}\n"
    written = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["version"]
    assert __version__ == written


def test_a_checkout_that_is_not_installed_still_says_something() -> None:
    checkout = str(Path(hessdiag.__file__).parents[1])
    # no site-packages: nothing is installed there, hessdiag neither
    code = f"import sys; sys.path.insert(0, {checkout!r}); import hessdiag; print(hessdiag.__version__)"
    found = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "unknown\n"


def check_reader_may_stop(arguments: list[str]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "hessdiag", *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert (process.wait(60), process.stderr.read()) == (0, b"")
    process.stderr.close()


def test_a_reader_may_stop_reading() -> None:
    check_reader_may_stop(["schema"])


def test_a_full_stdout_is_one_line() -> None:
    with Path("/dev/full").open("wb") as full:
        arguments = [sys.executable, "-m", "hessdiag", "schema"]
        done = subprocess.run(arguments, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert done.returncode == 4
    assert done.stderr.count("\n") == 1
    assert "No space left" in done.stderr


def test_a_terminal_without_greek_gets_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    with redirect_stderr(io.StringIO()), pytest.raises(SystemExit) as ended:
        cli.main(["analyze", DIGITS, "--samples", "4", "--quantities", "trace"])
    assert ended.value.code == 0
    ascii_only.seek(0)
    assert "trace" in ascii_only.read()


def test_demo_writes_two_runs_and_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digits, "train_digits", functools.partial(digits.train_digits, epochs=2))
    few = functools.partial(Settings, samples=64, probes=4, density_probes=2, steps=5)
    monkeypatch.setattr("hessdiag.settings.Settings", few)
    code, out, err = call("demo", "-o", str(tmp_path / "demo"), "--seed", "3")
    assert code == 0, err
    names = {path.name for path in (tmp_path / "demo").iterdir()}
    assert names == {"plain", "flat", "plain.safetensors", "flat.safetensors", "report.html"}
    for kind in ("plain", "flat"):
        run = load_run(tmp_path / "demo" / kind)
        assert run.fingerprint["seed"] == 3
        assert {path.name for path in (tmp_path / "demo" / kind).iterdir()} == {"run.json", *TABLES, *PLOTS}
    assert load_run(tmp_path / "demo" / "plain").metrics != load_run(tmp_path / "demo" / "flat").metrics
    assert (tmp_path / "demo" / "report.html").as_uri() in out
    command = next(line for line in out.splitlines() if line.startswith("again:"))
    assert command.split()[1:4] == ["hessdiag", "analyze", DIGITS]
    again = json.loads(call(*shlex.split(command)[2:], *SMALL, "--json")[1])
    assert again["metrics"] == json.loads((tmp_path / "demo" / "flat" / "run.json").read_text())["metrics"]


BROKEN: dict[str, tuple[Callable[[pytest.MonkeyPatch], None], str]] = {
    "output of the factory on stdout": (
        lambda m: m.setattr("hessdiag.cli.analyze.reserve", lambda: None),
        "test_json_is_one_document_and_nothing_else",
    ),
    "notes among the results": (
        lambda m: m.setattr("hessdiag.cli.analyze.say", lambda lines, quiet: print(*lines)),
        "test_json_is_one_document_and_nothing_else",
    ),
    "plots of an earlier run": (
        lambda m: m.setattr(
            "hessdiag.cli.output.write_together", lambda folder, files, _: folders.write_together(folder, files)
        ),
        "test_nothing_of_an_earlier_run_stays_in_its_folder",
    ),
    "a trace from products": (
        lambda m: [
            m.setattr("hessdiag.analysis.measurement.network_of", lambda *_: None),
            m.setattr("hessdiag.analysis.traces.gauss_newton_trace", lambda *_, **__: "not here"),
        ],
        "test_a_trace_alone_takes_no_products",
    ),
    "options that reach nobody": (
        lambda m: m.setattr("hessdiag.cli.options.parse_options", lambda pairs: {}),
        "test_options_and_folders_reach_the_factory",
    ),
    "a doctor who never finds a fault": (
        lambda m: m.setattr("hessdiag.engine.checks.preflight.self_test", healthy),
        "test_doctor_names_the_fault",
    ),
    "a file of before loses a number": (
        lambda m: m.setattr("hessdiag.results.runfile.RENAMED", RENAMED[:-1]),
        "check_former_names",
    ),
    "data error from one batch": (
        lambda m: m.setattr("hessdiag.results.interval.FEWEST_BLOCKS", 0),
        "test_a_single_sample_is_measured",
    ),
}


def healthy(operator: Curvature, plan: object) -> tuple[object, tuple[()]]:
    from hessdiag.engine.checks import selftest

    return selftest.self_test(operator, plan)[0], ()  # type: ignore[arg-type]


@pytest.mark.parametrize("breakage", BROKEN)
def test_this_promise_would_notice(breakage: str, problems: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    break_it, test = BROKEN[breakage]
    break_it(monkeypatch)
    with pytest.raises((AssertionError, ValueError, ZeroDivisionError)):
        globals()[test](problems)


WARNED = """
import sys, warnings
import torch
from hessdiag.engine.products import methods

script = torch.jit.script  # deprecated from torch 2.14 on, and used by it where forward mode begins

def deprecated(*arguments, **options):
    warnings.warn("torch.jit.script is deprecated", FutureWarning, stacklevel=2)
    return script(*arguments, **options)

torch.jit.script = deprecated
if sys.argv[1] == "broken":
    methods.load_forward_mode = lambda: None
from hessdiag.cli import run
sys.exit(run("analyze p.py:deprecated --quantities lambda_max --method forward_over_reverse".split()))
"""


def warned(problems: Path, how: str) -> str:
    with (problems / "p.py").open("a") as file:
        file.write(
            "\n\ndef deprecated():\n    import warnings\n\n"
            "    return with_step(lambda x: (warnings.warn('the users own', FutureWarning), x.tanh())[1])\n"
        )
    root = str(Path(__file__).parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", WARNED, how],
        cwd=problems,
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_torchs_warnings_about_its_own_code_stay_inside_and_the_users_come_out(problems: Path) -> None:
    said = warned(problems, "whole")
    assert "the users own" in said
    assert "torch.jit.script" not in said


def test_this_promise_would_notice_a_warning_that_comes_through(problems: Path) -> None:
    assert "torch.jit.script is deprecated" in warned(problems, "broken")


VERB = ("click.command()", "click.command(epilog=FACTORY)", "click.command(epilog=REFERENCE)", "click.group()")


def test_the_table_of_verbs_is_complete() -> None:
    sources = [file.read_text() for file in Path(cli.__file__).parent.glob("*.py")]
    functions = [n for text in sources for n in ast.parse(text).body if isinstance(n, ast.FunctionDef)]
    commands = {f.name for f in functions if any(ast.unparse(d) in VERB for d in f.decorator_list)}
    assert commands == set(cli.VERBS)
