"""Every fault of a configuration is listed at once, at its line, with what is allowed; what is written reads back.

Oracles: comments in the bad files name each fault at its own line; tomllib reads what is rendered; hypothesis
writes documents whose lines are known as they are written.
"""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hessdiag.check import config, origin, render, rules, schema, toml_lines
from hessdiag.check.budgets import Limit, Scope
from hessdiag.check.config import ConfigError, find_config, load_config
from hessdiag.errors import UsageError
from hessdiag.settings import PAIRED, Settings
from hessdiag.shown import visible
from tests.bad_configs import BROKEN_TOML, CONFIGS, HEAD

EXAMPLE = """
checkpoint = "ckpt/best.safetensors::ema"
options.width = 4
[tool.hessdiag.run]
split = "test"
probes = 160
params = ["layer4.*"]
confidence = 0.9
quantities = ["lambda_max", "trace"]
[tool.hessdiag.check]
on_unsure = "report"
[tool.hessdiag.check.budgets]                 # level: off | warn | error
lambda_max = { level = "error", max = 80, max_increase = "15%", abs_floor = 0.05 }
"trace[train]@layer4.*" = { level = "warn", max_decrease = 2.5, claim = "population" }
negative_mass = { level = "off" }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    return tmp_path


def write(folder: Path, text: str, name: str = "pyproject.toml") -> Path:
    file = folder / name
    file.write_text(text)
    return file


def planted(text: str) -> list[tuple[int, str, list[str]]]:
    """Line, key and words of every fault that a file's own comments announce."""
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        for note in line.split("# ! ")[1:]:
            key, *words = (part.strip() for part in note.split(" | "))
            found.append((number, key, words))
    return found


def check_listed(folder: Path, name: str, ends: str = "\n") -> None:
    large = "1" + 400 * "0"
    text = HEAD + textwrap.dedent(CONFIGS[name]).replace("LARGE", large)
    file = folder / "pyproject.toml"
    file.write_bytes(text.replace("\n", ends).encode())
    with pytest.raises(ConfigError) as caught:
        load_config()
    faults = list(caught.value.faults)
    expected = planted(text)
    assert expected
    for number, key, words in expected:
        start = f"pyproject.toml:{number}: {key}: "
        mine = [fault for fault in faults if fault.startswith(start)]
        assert len(mine) == 1, (start, faults)
        assert all(word in mine[0] for word in words), (words, mine)
    assert len(faults) == len(expected), faults
    assert all(fault.isprintable() and len(fault) < 400 for fault in faults)
    assert [int(fault.split(":")[1]) for fault in faults] == sorted(number for number, _, _ in expected)
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    assert str(caught.value) == faults[0] + more
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", CONFIGS)
def test_every_fault_is_listed_at_its_line(folder: Path, name: str) -> None:
    check_listed(folder, name)


def test_windows_line_ends_count_the_same(folder: Path) -> None:
    check_listed(folder, "lines are counted through everything", "\r\n")


@pytest.mark.parametrize("text,line,words", BROKEN_TOML.values(), ids=BROKEN_TOML)
def test_what_is_no_toml_is_one_fault(folder: Path, text: str, line: int, words: str) -> None:
    write(folder, HEAD + text)
    with pytest.raises(ConfigError) as caught:
        load_config()
    (fault,) = caught.value.faults
    assert fault.startswith(f"pyproject.toml:{line}: ")
    assert words in fault


def test_a_missing_problem_is_a_fault_of_the_table(folder: Path) -> None:
    write(folder, "[project]\n\n[tool.hessdiag]\n")
    with pytest.raises(ConfigError, match=re.escape("pyproject.toml:3: problem: is missing; name the factory")):
        load_config()
    for bad in ("p.py", "", "a\\nb"):
        write(folder, f'[tool.hessdiag]\nproblem = "{bad}"')
        with pytest.raises(ConfigError, match=r"pyproject.toml:2: problem: .*allowed: pkg.module:function"):
            load_config()


@pytest.mark.parametrize("text", ["tool = 5", "[tool]\nhessdiag = 5", "", "[tool.other]"])
def test_a_file_without_the_table_says_so(folder: Path, text: str) -> None:
    with pytest.raises(UsageError, match=r"pyproject.toml:\d: \[tool.hessdiag\]: .*hessdiag init"):
        load_config(write(folder, text))


def test_the_table_does_not_belong_into_the_own_file(folder: Path) -> None:
    write(folder, HEAD.split("\n\n")[1], "hessdiag.toml")
    with pytest.raises(ConfigError) as caught:
        load_config()
    assert any("hessdiag.toml:1: tool: no such key" in f and "stand alone" in f for f in caught.value.faults)


def check_flags(folder: Path) -> None:
    write(folder, HEAD + "run.seed = true\n")
    flags = {
        "problem": "p.py",
        "app_dir": "nowhere",
        "options": {"two-words": 1},
        "run.probes": 1,
        "run.density_probes": "8",
        "check.baseline": "folder",
        "check.confidence": 1.5,
        "run.samples": None,
    }
    with pytest.raises(ConfigError) as caught:
        load_config(overrides=flags)
    starts = ("FACTORY: ", "--app-dir: ", "-P two-words: ", "--probes: ", "--density-probes: ", "--baseline: ")
    starts += ("--confidence: ", "pyproject.toml:6: run.seed: ")
    for start in starts:
        assert len([fault for fault in caught.value.faults if fault.startswith(start)]) == 1, start
    assert len(caught.value.faults) == len(starts)


def test_faults_of_flags_name_the_flag(folder: Path) -> None:
    check_flags(folder)


def test_flags_win_and_hang_at_the_current_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(folder, HEAD + EXAMPLE)
    monkeypatch.chdir(folder / "folder")
    flags = {"checkpoint": "x.pt", "check.baseline": "b.json", "options": {"depth": 2}, "run.samples": 8}
    read = load_config(overrides={**flags, "run.params": ("a", "b"), "app_dir": None})
    assert read.file == file.resolve()
    assert (read.checkpoint, read.baseline) == ("x.pt", Path.cwd() / "b.json")
    assert read.recipe.options == {"width": 4, "depth": 2}
    assert read.run == {"split": "test", "probes": 160, "params": ["a", "b"], "samples": 8}
    assert read.recipe.factory == f"{folder.resolve() / 'p.py'}:digits"
    assert read.recipe.app_dir == str(folder.resolve())
    assert load_config().checkpoint == f"{folder.resolve() / 'ckpt/best.safetensors'}::ema"
    named = load_config(overrides={"problem": "other.py:f"})
    assert (named.recipe.factory, named.recipe.app_dir) == ("other.py:f", ".")
    assert read.budgets[0].file == str(folder.resolve() / "pyproject.toml")


def test_a_good_file_is_read_whole(folder: Path) -> None:
    write(folder, HEAD + EXAMPLE)
    read = load_config()
    assert (read.recipe.factory, read.checkpoint) == ("p.py:digits", "ckpt/best.safetensors::ema")
    assert read.run == {"split": "test", "probes": 160, "params": ["layer4.*"]}
    assert read.metrics == ("lambda_max", "trace")
    assert read.baseline == Path.cwd() / "tests/hessdiag-baseline.json"
    assert (read.confidence, read.on_unsure, read.max_probes) == (0.9, "report", 160)
    first, second, third = read.budgets
    assert first.limits == (Limit(kind="max", value=80), Limit(kind="max_increase", value=0.15, relative=True))
    assert (first.scope, first.level, first.abs_floor, first.claim) == (Scope("test"), "error", 0.05, "samples")
    assert second.scope == Scope("train", "layer4.*")
    assert (second.limits, second.claim) == ((Limit(kind="max_decrease", value=2.5),), "population")
    assert (third.level, third.limits) == ("off", ())
    lines = (HEAD + EXAMPLE).split("\n")
    assert all(lines[b.line - 1].lstrip('"').startswith(b.key.partition('"')[0]) for b in read.budgets if b.line)
    assert {b.file for b in read.budgets} == {"pyproject.toml"}


def test_the_defaults_are_those_of_the_documentation(folder: Path) -> None:
    read = load_config(write(folder, '\ufeffproblem = "a.b:c"\n', "hessdiag.toml"))
    assert (read.confidence, read.on_unsure, read.max_probes, read.recipe.trust_pickle) == (
        0.95,
        "escalate",
        128,
        False,
    )
    assert (read.run, read.metrics, read.recipe.options, read.budgets, read.checkpoint) == ({}, (), {}, (), None)
    assert load_config(overrides={"run.probes": 300}).max_probes == 300


def test_the_nearest_configuration_counts(folder: Path) -> None:
    inner = folder / "folder" / "deep"
    inner.mkdir()
    with pytest.raises(UsageError, match=re.escape("hessdiag init FACTORY -c CKPT")):
        find_config(inner)
    shared = write(folder, HEAD)
    write(folder / "folder", "[tool.other]\n")
    assert find_config(inner) == shared.resolve()
    write(inner, "this is = no [toml", "pyproject.toml")
    assert find_config(inner) == shared.resolve()
    broken = write(inner, "[tool.hessdiag]\nproblem =", "pyproject.toml")
    assert find_config(inner) == broken.resolve()  # so that its fault is said
    broken.unlink()
    own = write(folder / "folder", "", "hessdiag.toml")
    assert find_config(inner) == own.resolve()


def check_both(folder: Path) -> None:
    write(folder, HEAD)
    write(folder, "", "hessdiag.toml")
    with pytest.raises(
        UsageError, match=re.escape("pyproject.toml:4 configure both: keep one; delete hessdiag.toml")
    ):
        find_config()


def test_two_configurations_in_one_folder_are_refused(folder: Path) -> None:
    check_both(folder)


@pytest.mark.parametrize("content", [None, b"problem = '\xff'"])
def test_an_unreadable_file_is_one_line(folder: Path, content: bytes | None) -> None:
    file = folder / "hessdiag.toml"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UsageError, match=r"^cannot read the configuration hessdiag.toml: .*UTF-8$"):
        load_config(file)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SCALARS = st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT
VALUES = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(TEXT, v, max_size=3), max_leaves=6
)
TABLES = st.dictionaries(TEXT | st.sampled_from(["options", "run", "check", "budgets"]), VALUES, max_size=4)
SECTIONED = st.fixed_dictionaries(
    {}, optional={"problem": TEXT, "options": TABLES, "run": TABLES, "check": TABLES}
)
PREFIXES = st.sampled_from([("tool", "hessdiag"), (), ("a b", "ü.")])


def check_parsed_back(table: dict[str, Any], comments: dict[str, str], prefix: tuple[str, ...]) -> None:
    found = tomllib.loads(render.render(table, comments, prefix=prefix))
    for name in prefix:
        found = found[name]
    assert repr(found) == repr(sections_last(table))  # repr tells 1 from 1.0 and True


def sections_last(table: dict[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """The same table in the order a file needs: headers end the table they stand in."""
    below = {k: v for k, v in table.items() if isinstance(v, dict) and (*path, k) in render.SECTIONS}
    rest = {k: v for k, v in table.items() if k not in below}
    return rest | {k: sections_last(v, (*path, k)) for k, v in below.items()}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(SECTIONED | TABLES, st.dictionaries(TEXT, st.text(max_size=9), max_size=2), PREFIXES)
def test_what_is_rendered_parses_back(table: Any, comments: Any, prefix: Any) -> None:
    check_parsed_back(table, comments, prefix)


def test_a_rendered_configuration_looks_as_documented() -> None:
    budgets = {"lambda_max": {"level": "error", "max_increase": "15%"}, "trace@layer4.*": {"max": 1.5}}
    table = {"problem": "p.py:f", "run": {"probes": 16}, "check": {"confidence": 0.95, "budgets": budgets}}
    text = render.render(table, {"lambda_max": "measured 85.2\n[84.9, 85.5]"})
    assert text == textwrap.dedent("""\
        [tool.hessdiag]
        problem = "p.py:f"

        [tool.hessdiag.run]
        probes = 16

        [tool.hessdiag.check]
        confidence = 0.95

        [tool.hessdiag.check.budgets]
        lambda_max = { level = "error", max_increase = "15%" }  # measured 85.2 [84.9, 85.5]
        "trace@layer4.*" = { max = 1.5 }
        """)


@pytest.mark.parametrize("value", [None, b"x", "\ud800", {"a": object()}])
def test_what_toml_does_not_know_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="cannot be written to TOML"):
        render.render({"options": {"x": value}})


NAMES = [*schema.KEYS[()], *schema.KEYS[("run",)], *schema.KEYS[("check",)], *schema.BudgetTable.model_fields]
TYPICAL = st.sampled_from(["train", "15%", "p.py:f", "error", "hessian", "float32", "population", 1, 0.95, -1])
NAMED = st.dictionaries(st.sampled_from(NAMES), TYPICAL | VALUES, max_size=6)
BUDGETS = st.dictionaries(
    TEXT | st.sampled_from(["trace", "trace[a]", "lambda_max@*"]), NAMED | VALUES, max_size=3
)
CHECKS = st.builds(lambda named, budgets: named | {"budgets": budgets}, NAMED, BUDGETS)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(NAMED, NAMED, CHECKS, st.dictionaries(st.sampled_from(["check.confidence", "run.seed", "options"]), VALUES))
def test_whatever_stands_there_is_a_configuration_or_faults(
    tmp_path_factory: pytest.TempPathFactory, top: Any, run: Any, check: Any, flags: Any
) -> None:
    file = tmp_path_factory.mktemp("any") / "hessdiag.toml"
    file.write_text(render.render({"problem": "p.py:f"} | top | {"run": run, "check": check}, prefix=()))
    try:
        read = load_config(file, flags)
    except ConfigError as error:
        assert error.faults
        assert all(visible(fault) == fault for fault in error.faults)
    else:
        assert Settings(**{**PAIRED, **read.run}, confidence=read.confidence).probes <= read.max_probes


KEYS = st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=4), min_size=1, max_size=3)
FILLERS = st.sampled_from(["", "# [x]", "\t", '# """', "#'''"])
VALUE_LINES = st.sampled_from(
    ["1", "[ # ]\n1,\n\n]", '"""\n[a]\nb = 1\\\n"""', "'''\n'''", "{ x = 1 }", '"[#"', "[[\n'''\n]'''\n]]"]
)
STATEMENTS = st.lists(st.tuples(FILLERS, st.booleans(), KEYS, VALUE_LINES), max_size=8)


def check_lines(statements: list[tuple[str, bool, list[str], str]]) -> None:
    """Write a document statement by statement, and ask for each key where it was written."""
    text, expected = "", {}
    table: tuple[str, ...] = ()
    for filler, is_header, names, value in statements:
        key = render.dotted(names)
        longer = text + filler + "\n" + (f" [{key}] # x\n" if is_header else f"{key} = {value} # y\n")
        try:
            tomllib.loads(longer)
        except tomllib.TOMLDecodeError:  # given twice: not a document
            continue
        table = tuple(names) if is_header else table
        expected[tuple(names) if is_header else (*table, *names)] = text.count("\n") + 2
        text = longer
    for path, line in expected.items():
        assert toml_lines.line_of(text, path) == line
        assert toml_lines.line_of(text, (*path, "absent")) == line


@settings(max_examples=60, deadline=None, derandomize=True)
@given(STATEMENTS)
def test_every_key_is_found_where_it_was_written(statements: Any) -> None:
    check_lines(statements)


def test_elements_of_arrays_of_tables_are_told_apart() -> None:
    text = "[[a]]\nx = 1\n[[a.b]]\n[[a]]\nx = 2\n[a.c]\nd.e = { f = 1 }\n[[a.b]]\ny = 1\n"
    lines = {("a",): 1, ("a", "0", "x"): 2, ("a", "1"): 4, ("a", "1", "x"): 5, ("a", "1", "c"): 6}
    lines |= {("a", "1", "c", "d", "e", "f"): 7, ("a", "1", "b", "0", "y"): 9, ("a", "0", "b", "0"): 3}
    assert {path: toml_lines.line_of(text, path) for path in lines} == lines
    assert toml_lines.line_of(text, ("z",)) is None
    assert toml_lines.line_of("a = [", ("a",)) is None


@pytest.mark.parametrize("before", ["", "[project]\nname = 'x'", "# ü\r\n[tool.ruff]\r\n", "\ufeffa = 1\n\n"])
def test_appending_keeps_every_byte(tmp_path: Path, before: str) -> None:
    file = tmp_path / "pyproject.toml"
    file.write_bytes(before.encode())
    block = render.render({"problem": "p.py:f", "check": {"budgets": {"trace": {"max": 1}}}})
    after = render.append_to(file, block)
    assert after.startswith(before)
    assert file.read_bytes() == before.encode()
    assert after.replace("\r\n", "\n").endswith(("\n\n" if before else "") + block)
    assert after.count("\r\n") in (0, after.count("\n"))
    assert tomllib.loads(after.removeprefix("\ufeff"))["tool"]["hessdiag"]["problem"] == "p.py:f"
    assert render.append_to(tmp_path / "absent.toml", block) == block


@pytest.mark.parametrize(
    "name,before,words",
    [
        ("pyproject.toml", HEAD, "holds a configuration"),
        ("pyproject.toml", "tool.hessdiag.problem = 'x'", "holds a configuration"),
        ("pyproject.toml", "tool = { ruff = 1 }", "hessdiag.toml"),
        ("pyproject.toml", "tool = 1", "hessdiag.toml"),
        ("pyproject.toml", "a = [", "not TOML"),
        ("hessdiag.toml", "[run]\n", "holds a configuration"),
    ],
)
def test_nothing_is_appended_where_it_would_not_count(tmp_path: Path, name: str, before: str, words: str) -> None:
    file = write(tmp_path, before, name)
    block = render.render({"problem": "p.py:f"}, prefix=() if name == "hessdiag.toml" else render.PREFIX)
    with pytest.raises(UsageError, match=words):
        render.append_to(file, block)


def test_what_is_rendered_is_a_configuration(folder: Path) -> None:
    budgets = {"trace@a b": {"level": "warn", "max_increase": "12.5%", "abs_floor": 1e-07}}
    table = {"problem": "p.py:f", "options": {"k": [1, {"x": "é\n"}]}, "check": {"budgets": budgets}}
    for file, prefix in ((folder / "pyproject.toml", render.PREFIX), (folder / "folder/hessdiag.toml", ())):
        file.write_text(render.append_to(file, render.render(table, {"trace@a b": "measured"}, prefix=prefix)))
        read = load_config(file)
        assert read.recipe.options == table["options"]
        assert [(b.key, b.limits[0].value, b.abs_floor) for b in read.budgets] == [("trace@a b", 0.125, 1e-07)]


def test_torch_is_not_needed() -> None:
    code = "import hessdiag.check.config, hessdiag.check.render, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


Patch = pytest.MonkeyPatch
COUNTED = "lines are counted through everything"


def only_first(patch: Patch) -> None:
    real = origin.Origin.said
    patch.setattr(origin.Origin, "said", lambda self, faults: real(self, list(faults)[:1]))


def form_hides_sense(patch: Patch) -> None:
    def stop(sheet: Any, faults: Any) -> Any:
        if faults:
            raise ConfigError(f"pyproject.toml:1: {'.'.join(f.path)}: {f.text}" for f in faults)
        return real(sheet, faults)

    real = config.Rules
    patch.setattr(config, "Rules", stop)


def unknown_ignored(patch: Patch) -> None:
    real = schema.faults_of_form
    patch.setattr(
        config,
        "faults_of_form",
        lambda table: (real(table)[0], [f for f in real(table)[1] if not f.text.startswith("no such key")]),
    )


def off_by_one(patch: Patch) -> None:
    patch.setattr(origin, "line_of", lambda text, path: (toml_lines.line_of(text, path) or 0) + 1)


def by_search(patch: Patch) -> None:
    def first(text: str, path: tuple[str, ...]) -> int | None:
        return next((n for n, line in enumerate(text.split("\n"), 1) if line.strip().startswith(path[-1])), None)

    patch.setattr(origin, "line_of", first)


def unescaped(patch: Patch) -> None:
    patch.setattr(render, "_escaped", lambda character: character)


def later_is_judged(patch: Patch) -> None:
    patch.setattr(config, "newer", lambda table: None)


def spelling_only(patch: Patch) -> None:
    real = rules.parse_key
    patch.setattr(rules, "parse_key", lambda key, split: (real(key, split)[0], Scope(key)))


def flags_blamed_on_the_file(patch: Patch) -> None:
    patch.setattr(origin.Origin, "from_flag", lambda self, path: None)


def first_found(patch: Patch) -> None:
    patch.setattr(config, "_table_line", lambda file: None)


def any_key_is_bare(patch: Patch) -> None:
    patch.setattr(render, "BARE", re.compile(r"[\w.@* -]+"))


def line_by_line(patch: Patch) -> None:
    def alone(lines: list[str], start: int) -> tuple[int, dict[str, Any]]:
        try:
            return start + 1, tomllib.loads(lines[start])
        except tomllib.TOMLDecodeError:
            return start + 1, {}

    patch.setattr(toml_lines, "_complete", alone)


def no_comparison(patch: Patch) -> None:
    patch.setattr(rules.Rules, "_max_probes", lambda self: 128)


ODD = {"options": {"k": 'a"\\\n\x7f', "a.b c": 1}}
BROKEN: dict[str, tuple[Callable[[Patch], None], Callable[[Path], None]]] = {
    "only the first fault is reported": (only_first, lambda d: check_listed(d, "wrong types")),
    "wrong types hide the rest": (form_hides_sense, lambda d: check_listed(d, "settings out of range")),
    "unknown keys are ignored": (unknown_ignored, lambda d: check_listed(d, "unknown keys, everywhere")),
    "the line after": (off_by_one, lambda d: check_listed(d, "levels and claims")),
    "the first line that looks so": (by_search, lambda d: check_listed(d, COUNTED)),
    "lines inside strings count": (line_by_line, lambda d: check_listed(d, COUNTED)),
    "a newer schema is judged": (later_is_judged, lambda d: check_listed(d, "a newer schema is the only fault")),
    "spellings are compared": (spelling_only, lambda d: check_listed(d, "one matrix under two names")),
    "max_probes is not compared": (no_comparison, lambda d: check_listed(d, "a check out of range")),
    "flags are blamed on the file": (flags_blamed_on_the_file, check_flags),
    "the first file found wins": (first_found, check_both),
    "strings are not escaped": (unescaped, lambda d: check_parsed_back(ODD, {}, ())),
    "keys are not quoted": (any_key_is_bare, lambda d: check_parsed_back(ODD, {}, ())),
}


@pytest.mark.parametrize("breakage", BROKEN)
def test_this_promise_would_notice(breakage: str, folder: Path, monkeypatch: Patch) -> None:
    do, check = BROKEN[breakage]
    do(monkeypatch)
    toml_lines._lines.cache_clear()
    with pytest.raises((AssertionError, pytest.fail.Exception, tomllib.TOMLDecodeError)):
        check(folder)
    toml_lines._lines.cache_clear()
