"""Promise: the GitHub action runs no input as code, uses all it takes, and ends as the check did. (10 s)

The scripts are run as a runner would: the step's own ``run`` text in bash, with the step's own ``env``. pip and
hessdiag are stand-ins that write down what they were given, except where the real one is named.
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / ".github" / "actions" / "check"
ACTION = yaml.safe_load((FOLDER / "action.yml").read_text())
EXPRESSION = re.compile(r"\$\{\{.*?\}\}", re.DOTALL)
INPUT = re.compile(r"\binputs\.([\w-]+)")
RULE = re.compile(r"steps\.([\w-]+)\.outputs\.([\w-]+)")
STAND_IN = """
import json, os, sys
from pathlib import Path
Path(os.environ["SEEN"]).write_text(json.dumps(sys.argv[1:]))
report = [a.partition("=")[2] for a in sys.argv if a.startswith("-ojson=")]
if report and "REPORTED" in os.environ:
    Path(report[0]).write_text(json.dumps({"exit_code": int(os.environ["REPORTED"])}))
end = int(os.environ.get("END", "0"))
os.kill(os.getpid(), -end) if end < 0 else sys.exit(end)
"""
INJECTIONS = ("$(touch pwned)", "`touch pwned`", "; touch pwned", "a\ntouch pwned", "&& touch pwned", "> pwned")


def faults(action):
    """What of an action lets an input run as code, or does nothing."""
    steps, text = action["runs"]["steps"], json.dumps(action["runs"])
    found = [f"expression in a script: {step['run']}" for step in steps if EXPRESSION.search(step.get("run", ""))]
    found += [f"script without a shell: {step['run']}" for step in steps if "run" in step and "shell" not in step]
    found += [f"no version: {u}" for s in steps if (u := s.get("uses")) and not re.search(r"@v\d+$", u)]
    found += [f"unused: {name}" for name in action["inputs"] if not re.search(rf"inputs\.{name}\b(?!-)", text)]
    found += [f"not declared: {name}" for name in set(INPUT.findall(text)) - set(action["inputs"])]
    found += [f"without a default or description: {n}" for n, i in action["inputs"].items() if len(i) < 2]
    ids = {step.get("id") for step in steps}
    for name, output in action["outputs"].items():
        origin = RULE.search(output["value"])
        if origin is None or origin[1] not in ids or origin[2] != name:
            found.append(f"output from nowhere: {name}")
    uploads = [step for step in steps if step.get("uses", "").startswith("actions/upload-artifact")]
    found += [f"reports are lost on failure: {s.get('if')}" for s in uploads if "always()" not in s.get("if", "")]
    return found


def script(action, name):
    """The step whose script is ``name``."""
    (step,) = [s for s in action["runs"]["steps"] if s.get("run", "").endswith(name)]
    return step


class Ended:
    """How a step ended.

    Attributes:
        code: exit code.
        outputs: of the step.
        seen: arguments of the stand-in.
        said: stdout and stderr.
        injected: whether an input was executed.
    """

    def __init__(self, place, done):
        self.code, self.said = done.returncode, done.stdout + done.stderr
        lines = (place / "outputs").read_text().splitlines() if (place / "outputs").exists() else []
        self.outputs = dict(line.split("=", 1) for line in lines)
        self.seen = json.loads((place / "seen").read_text()) if (place / "seen").exists() else None
        self.injected = any((folder / "pwned").exists() for folder in (place, place / "work"))


def run(place, name, inputs=None, *, end=0, reported=None, real=False, action=ACTION, folder=FOLDER):
    """Run one step of the action in a folder of its own."""
    given = {key: value.get("default", "") for key, value in action["inputs"].items()} | (inputs or {})
    step = script(action, name)
    environment = {
        key: re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda found: given[found[1]], value)
        for key, value in step["env"].items()
    }
    for part in ("work", "temp", "bin", "stand-ins/hessdiag", "stand-ins/pip"):
        (place / part).mkdir(parents=True, exist_ok=True)
    for module in ("hessdiag", "pip"):
        (place / "stand-ins" / module / "__init__.py").touch()
        (place / "stand-ins" / module / "__main__.py").write_text(STAND_IN)
    if not (place / "bin" / "python").exists():
        (place / "bin" / "python").symlink_to(sys.executable)
    interpreter = Path(sys.executable).parent
    environment |= {
        "PATH": f"{interpreter}{os.pathsep}{place / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "GITHUB_ACTION_PATH": str(folder),
        "GITHUB_OUTPUT": str(place / "outputs"),
        "GITHUB_ACTIONS": "true",
        "RUNNER_TEMP": str(place / "temp"),
        "SEEN": str(place / "seen"),
        "END": str(end),
        **({"REPORTED": str(reported)} if reported is not None else {}),
        **({} if real else {"PYTHONPATH": str(place / "stand-ins")}),
    }
    text = re.sub(r"\$\{\{ inputs\.([\w-]+) \}\}", lambda found: given[found[1]], step["run"])
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", text]
    done = subprocess.run(
        command, cwd=place / "work", env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    return Ended(place, done)


def test_no_input_reaches_a_script_and_none_is_for_nothing():
    assert faults(ACTION) == []


@pytest.mark.parametrize(
    ("end", "code", "verdict"),
    [
        (0, 0, "passed"),
        (1, 1, "failed"),
        (2, 2, "misconfigured"),
        (3, 3, "no verdict"),
        (4, 4, "not measured"),
        (130, 130, "interrupted"),
        (-9, 137, "not measured"),
        (77, 77, "not measured"),
    ],
)
def test_it_ends_as_the_check_did(tmp_path, end, code, verdict):
    ended = run(tmp_path, "check", end=end, reported=0)
    assert (ended.code, ended.outputs["exit-code"], ended.outputs["verdict"]) == (code, str(code), verdict)
    assert Path(ended.outputs["reports"]).parent == tmp_path / "temp"


def test_exit_zero_does_not_say_passed(tmp_path):
    ended = run(tmp_path, "check", {"args": "--exit-zero"}, end=0, reported=1)
    assert (ended.code, ended.outputs["verdict"]) == (0, "failed")


def test_nothing_measured_is_not_passed(tmp_path):
    ended = run(tmp_path, "check", {"args": "--help"}, end=0, reported=None)
    assert (ended.code, ended.outputs["verdict"]) == (3, "no verdict")


def test_the_real_check_ends_as_it_should(tmp_path):
    """A configuration without a problem is a fault of usage, 2; nothing is measured."""
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "hessdiag.toml").write_text("schema = 1\n")
    ended = run(tmp_path, "check", real=True)
    assert (ended.code, ended.outputs["verdict"]) == (2, "misconfigured")
    assert "problem: is missing" in ended.said


def test_arguments_arrive_as_they_were_written(tmp_path):
    given = "--strict --only 'trace@layer4.* [x]' -P name=\"two words\" -o text=*.txt"
    ended = run(tmp_path, "check", {"args": given}, reported=0)
    mine = ["check", "--strict", "--only", "trace@layer4.* [x]", "-P", "name=two words", "-o", "text=*.txt"]
    assert ended.seen[: len(mine)] == mine
    reports = Path(ended.outputs["reports"])
    added = [f"-ojunit={reports}/junit.xml", f"-ojson={reports}/check.json", f"-omd={reports}/summary.md"]
    assert ended.seen[len(mine) :] == added


@pytest.mark.parametrize("text", INJECTIONS)
def test_inputs_are_arguments_never_code(tmp_path, text):
    for name, inputs in (("check", ("args",)), ("install", ("torch", "extras", "hessdiag"))):
        ended = run(tmp_path, name, dict.fromkeys(inputs, text), reported=0)
        assert ended.code == 0
        assert not ended.injected


def test_an_open_quote_is_a_fault_not_an_empty_argument(tmp_path):
    """Arguments dropped without a word would run without --strict."""
    ended = run(tmp_path, "check", {"args": "--strict --only 'trace"}, reported=0)
    assert (ended.code, ended.outputs["verdict"], ended.seen) == (2, "misconfigured", None)
    assert "::error" in ended.said and "HESSDIAG_ARGS" in ended.said


def test_everything_is_installed_in_one_go(tmp_path):
    inputs = {"torch": "torch==2.13.0", "extras": "-e . \"timm>=1; python_version > '3'\""}
    ended = run(tmp_path, "install", inputs)
    rest = ["torch==2.13.0", str(ROOT), "-e", ".", "timm>=1; python_version > '3'"]
    assert ended.seen[0] == "install" and ended.seen[-len(rest) :] == rest
    assert (ROOT / "pyproject.toml").is_file()
    ended = run(tmp_path, "install", {"hessdiag": "hessdiag==0.1.0"})
    assert ended.seen[-1] == "hessdiag==0.1.0"
    assert str(ROOT) not in ended.seen


def test_a_failed_installation_fails_the_step(tmp_path):
    assert run(tmp_path, "install", end=1).code == 1


def test_modules_of_the_repository_do_not_replace_the_tool(tmp_path):
    """A repository may have a random.py, or a folder called hessdiag."""
    (tmp_path / "work" / "hessdiag").mkdir(parents=True)
    (tmp_path / "work" / "hessdiag" / "__main__.py").write_text("raise SystemExit(0)")
    (tmp_path / "work" / "json.py").write_text("raise SystemExit(0)")
    ended = run(tmp_path, "check", end=1)
    assert (ended.code, ended.outputs["verdict"]) == (1, "failed")


def changed(change):
    action = copy.deepcopy(ACTION)
    change(action)
    return action


def interpolate(action):
    script(action, "check")["run"] = "hessdiag check ${{ inputs.args }} && : check"


def broken_script(tmp_path, old, new):
    """A copy of the action whose script is changed."""
    folder = tmp_path / "root" / ".github" / "actions" / "check"
    shutil.copytree(FOLDER, folder)
    text = (folder / "run.py").read_text()
    assert old in text
    (folder / "run.py").write_text(text.replace(old, new))
    return folder


BROKEN = {
    "an input inside a script": interpolate,
    "a script without a shell": lambda a: script(a, "check").pop("shell"),
    "an input that nothing uses": lambda a: a["inputs"].update(speed={"description": "", "default": ""}),
    "an input whose name only begins like a used one": lambda a: a["inputs"].update(
        python={"description": "", "default": ""}
    ),
    "an input that is not declared": lambda a: a["inputs"].pop("torch"),
    "an output from nowhere": lambda a: a["outputs"]["verdict"].update(value="${{ steps.gate.outputs.verdict }}"),
    "a step of no version": lambda a: a["runs"]["steps"][0].update(uses="actions/setup-python@main"),
    "reports uploaded only on success": lambda a: a["runs"]["steps"][-1].pop("if"),
}
BROKEN_SCRIPTS = {
    "an exit code swallowed": ("    return code\n", "    return 0\n", {}, 1, None, lambda e: e.code == 0),
    "--exit-zero believed": ("if code == 0:", "if False:", {}, 0, 1, lambda e: e.outputs["verdict"] == "passed"),
    "words read by a shell": (
        "subprocess.run(command, check=False).returncode\n        report",
        'subprocess.run(": " + os.environ["HESSDIAG_ARGS"], shell=True).returncode\n        report',
        {"args": "; touch pwned"},
        0,
        0,
        lambda e: e.injected,
    ),
    "an open quote ignored": (
        "raise SystemExit(2) from error",
        "return []",
        {"args": "--only 'a"},
        0,
        0,
        lambda e: e.code == 0,
    ),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage):
    assert faults(changed(breakage)) != []


@pytest.mark.parametrize("breakage", BROKEN_SCRIPTS.values(), ids=BROKEN_SCRIPTS)
def test_this_promise_would_notice_in_the_script(breakage, tmp_path):
    old, new, inputs, end, reported, seen = breakage
    assert seen(
        run(tmp_path, "check", inputs, end=end, reported=reported, folder=broken_script(tmp_path, old, new))
    )


def test_this_promise_would_notice_an_injection(tmp_path):
    """The harness itself executes what an unsafe action would."""
    ended = run(tmp_path, "check", {"args": "$(touch pwned)"}, action=changed(interpolate))
    assert ended.injected
