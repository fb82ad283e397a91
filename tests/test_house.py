"""Promise: data flows one way, only engine/ calls autograd, only cli/ prints, spells flags, files are short."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

import hessdiag
from tests import conftest

ROOT = Path(hessdiag.__file__).parent
TOP = Path(__file__).parent.parent
ROOMS = [
    "installed",
    "presenter",
    "hashing",
    "shown",
    "errors",
    "option",
    "described",
    "former",
    "pages",
    "multiplicity",
    "files",
    "folders",
    "accuracy",
    "results",
    "formatting",
    "settings",
    "operator",
    "resume",
    "samples",
    "criteria",
    "problem",
    "optimizers",
    "sources",
    "schemes",
    "engine",
    "spectral",
    "closed_form",
    "analysis",
    "present",
    "track",
    "gap",
    "survey",
    "generalization",
    "shift",
    "check",
    "regularizers",
    "integrations",
    "cli",
]
VERBS = {"track", "gap", "shift", "check"}
FREE = {"__init__", "__main__"}  # the public face looks names up on first use; the command is cli's
GIT = {
    "--porcelain",
    "--untracked-files",
    "--show-toplevel",
    "--verify",
    "--quiet",
    "--filters",
    "--ours",
    "--theirs",
}
PYTEST = {f"--hessdiag-{name}" for name in ("update", "reason", "ci", "skip", "baseline")}
OTHERS = {*GIT, *PYTEST, "--reason"}  # and the command that records a baseline
CLOSED = "hessdiag.operator."  # sums and conversions of operators are operators: one type in several files
LINES, FUNCTION = 250, 70  # docstrings included


def files():
    return sorted(ROOT.rglob("*.py"))


def room(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(tree):
    """Rooms of hessdiag that a file imports, anywhere in it, import_module included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hessdiag."):
            yield node.module.split(".")[1]
        elif isinstance(node, ast.ImportFrom) and node.module == "hessdiag":
            yield from (a.name if a.name in ROOMS else "__init__" for a in node.names)
        elif isinstance(node, ast.Import):
            yield from (a.name.split(".")[1] for a in node.names if a.name.startswith("hessdiag."))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "import_module":
            text = ast.unparse(node.args[0]).strip("f'\"")
            if text.startswith("hessdiag."):
                yield text.split(".")[1].strip("'\"")


def upward(trees):
    found = []
    for name, tree in trees:
        for other in imported_rooms(tree):
            if name in FREE or other == name:
                continue
            if other in FREE or ROOMS.index(other) > ROOMS.index(name):
                found.append((name, other))
    return found


def between_verbs(trees):
    """Imports from one verb's room into another's; gap knows the positions and rates that track reads."""
    return [
        (name, other)
        for name, tree in trees
        if name in VERBS
        for other in imported_rooms(tree)
        if other in VERBS and other != name and (name, other) != ("gap", "track")
    ]


def trees():
    return [(room(path), ast.parse(path.read_text())) for path in files()]


def autograd_outside(trees):
    words = {"autograd", "create_graph", "jvp", "vjp"}
    return [
        (name, node.lineno)
        for name, tree in trees
        if name != "engine"
        for node in ast.walk(tree)
        if getattr(node, "attr", "") in words or getattr(node, "arg", "") in words
    ]


def prints_outside(trees):
    return [
        (name, node.lineno)
        for name, tree in trees
        if name != "cli"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", getattr(node.func, "attr", "")) in ("print", "echo")
    ]


def flags_outside(trees):
    """Flags of hessdiag in texts of other rooms than cli/; commands of others (git, pytest) are theirs."""
    return [
        (name, node.lineno)
        for name, tree in trees
        if name != "cli"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
        if any(flag not in OTHERS for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", node.value))
    ]


def test_every_file_has_a_room():
    assert {room(path) for path in files()} <= {*ROOMS, *FREE}


def test_imports_run_one_way():
    assert upward(trees()) == []


def circles(paths_and_trees):
    """Pairs of files that import each other, on first use included; what only types need is left out."""
    imports = {}
    for path, tree in paths_and_trees:
        name = ".".join(("hessdiag", *path.with_suffix("").parts)).removesuffix(".__init__")
        blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If)]
        typed = {id(n) for block in blocks if ast.unparse(block.test) == "TYPE_CHECKING" for n in ast.walk(block)}
        froms = [n for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module and id(n) not in typed]
        imports[name] = {(n.module, a.name) for n in froms for a in n.names}
    for name, pairs in imports.items():
        named = (f"{module}.{one}" if f"{module}.{one}" in imports else module for module, one in pairs)
        imports[name] = {other for other in named if other in imports}
    return sorted(
        (a, b) for a in imports for b in imports[a] if a < b and a in imports[b] and not a.startswith(CLOSED)
    )


def test_no_two_files_import_each_other():
    assert circles((p.relative_to(ROOT), ast.parse(p.read_text())) for p in files()) == []
    plugin = ast.parse("def f():\n    from hessdiag.check.checks import Checks")
    checks = ast.parse("from hessdiag.check.plugin import NAME")
    both = [(Path("check/plugin.py"), plugin), (Path("check/checks.py"), checks)]
    assert circles(both) == [("hessdiag.check.checks", "hessdiag.check.plugin")]


def families_apart(paths_and_trees):
    """Imports between families of the engine: all stand on products, and on nothing else."""
    found = []
    for path, tree in paths_and_trees:
        own = path.parts[1] if len(path.parts) > 2 and path.parts[0] == "engine" else None
        for node in ast.walk(tree):
            if own and isinstance(node, ast.ImportFrom) and (node.module or "").startswith("hessdiag.engine."):
                other = node.module.split(".")[2]
                found += [(own, other)] if other not in (own, "products") else []
    return found


def test_the_families_of_the_engine_stand_on_products_alone():
    assert families_apart((p.relative_to(ROOT), ast.parse(p.read_text())) for p in files()) == []
    upwards = ast.parse("from hessdiag.engine.checks.selftest import self_test")
    assert families_apart([(Path("engine/products/curvature.py"), upwards)]) == [("products", "checks")]


def test_no_verb_imports_another():
    assert between_verbs(trees()) == []


def test_only_the_engine_calls_autograd():
    assert autograd_outside(trees()) == []


def test_only_the_command_line_prints():
    assert prints_outside(trees()) == []


def test_only_the_command_line_spells_flags():
    assert flags_outside(trees()) == []


def hashlib_outside(trees):
    """Digests are compared with those in files: one definition of each."""
    return [
        name
        for name, tree in trees
        for node in ast.walk(tree)
        if name != "hashing"
        and isinstance(node, ast.Import | ast.ImportFrom)
        and "hashlib" in (getattr(node, "module", ""), *(a.name for a in node.names))
    ]


def test_only_one_module_hashes():
    assert hashlib_outside(trees()) == []


def test_files_and_functions_are_short():
    long = [f"{p.relative_to(ROOT)}: {n}" for p in files() if (n := len(p.read_text().splitlines())) > LINES]
    for path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > FUNCTION:
                long.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name}")
    assert long == []


def test_the_public_face_is_small_and_true():
    assert len(hessdiag.__all__) <= 32
    assert all(getattr(hessdiag, name) is not None for name in hessdiag.__all__)


def test_old_places_still_work_and_name_the_new_ones():
    from hessdiag.check.pytest.pytest_plugin import HessdiagWarning
    from hessdiag.gap.registry import measure
    from hessdiag.integrations import pytest_plugin

    assert pytest_plugin.HessdiagWarning is HessdiagWarning
    with pytest.warns(DeprecationWarning, match=r"is hessdiag\.gap now"):
        old = importlib.import_module("hessdiag.generalization.registry")
    assert old.measure is measure


def pins(text):
    """Versions of ruff and mypy that a file names."""
    return dict(re.findall(r"(ruff|mypy)\b[^\n0-9]*?(?:\n\s+rev: v|==| )([0-9]+\.[0-9]+\.[0-9]+)", text))


def test_the_hooks_have_the_versions_of_ci():
    of_ci = pins((TOP / "pyproject.toml").read_text())
    assert len(of_ci) == 2
    assert pins((TOP / ".pre-commit-config.yaml").read_text()) == of_ci
    assert pins("ruff==1.2.3") == {"ruff": "1.2.3"}


def test_a_file_is_slow_by_its_docstring():
    times = {"Promise: so. (40 s)": True, "In 3 minutes of one core.": True, "(20 s)": False, "Of 40 signs": False}
    for docstring, slow in (times | {None: False}).items():
        marks = []
        item = SimpleNamespace(module=SimpleNamespace(__doc__=docstring), add_marker=marks.append)
        conftest.mark_slow([item])
        assert marks == [pytest.mark.slow] * slow, docstring


def test_there_is_one_version():
    project = tomllib.loads((TOP / "pyproject.toml").read_text())["project"]
    assert project["version"] == hessdiag.__version__
    assert f"\nversion: {hessdiag.__version__}\n" in (TOP / "CITATION.cff").read_text()


BROKEN = {
    "an upward import": (upward, "spectral", "from hessdiag.analysis import analyze"),
    "an upward import inside a function": (upward, "errors", "def f():\n    from hessdiag.cli import main"),
    "an upward import by name": (upward, "spectral", "import_module('hessdiag.present')"),
    "the version of the package itself": (upward, "analysis", "from hessdiag import __version__"),
    "a verb that imports another": (between_verbs, "shift", "from hessdiag.gap.page import page"),
    "autograd in the spectral room": (autograd_outside, "spectral", "torch.autograd.grad(a, b)"),
    "a graph kept elsewhere": (autograd_outside, "sources", "loss.backward(create_graph=True)"),
    "a flag": (flags_outside, "engine", "text = 'try --dtype float64'"),
    "a hash of its own": (hashlib_outside, "samples", "from hashlib import sha256"),
    "a print": (prints_outside, "analysis", "print(1)"),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage):
    check, name, code = breakage
    assert check([(name, ast.parse(code))])
