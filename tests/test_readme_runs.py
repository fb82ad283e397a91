"""Promise: the README's Python runs, its commands and recipes exist, the table of promises names real tests."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from hessdiag.check.config import ConfigError, load_config
from hessdiag.cli import VERBS, cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
ACTION = ROOT / ".github" / "actions" / "check"
RECIPES = (ACTION / "README.md").read_text()
DOCS = ROOT / "hessdiag" / "docs"
PROMISES, BUDGETS = (DOCS / "promises.md").read_text(), (DOCS / "check.md").read_text()


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def promised_tests(text):
    return set(re.findall(r"`(test_\w+)`", text))


def existing_tests():
    return {path.stem for path in (ROOT / "tests").glob("test_*.py")}


def commands(text):
    """The words of each hessdiag command: of shell blocks, and of the scripts in YAML ones."""
    lines = "\n".join(blocks(text, "bash")).splitlines()
    lines += [line for table in recipes(text) if isinstance(table, dict) for line in scripts(table)]
    lines += [
        f"hessdiag check {step['with']['args']}" for step in action_steps(text) if "args" in step.get("with", {})
    ]
    found = [shlex.split(line, comments=True) for line in lines]
    return [words for words in found if words[:1] == ["hessdiag"] and words[1] in VERBS]


def recipes(text):
    return [yaml.safe_load(block) for block in blocks(text, "yaml")]


def scripts(table):
    """Lines of GitLab's jobs."""
    return [line for job in table.values() if isinstance(job, dict) for line in job.get("script", [])]


def action_steps(text):
    """Steps that use this project's action."""
    found = []
    for recipe in recipes(text):
        jobs = (
            [recipe] if isinstance(recipe, list) else [j.get("steps", []) for j in recipe.get("jobs", {}).values()]
        )
        found += [step for steps in jobs for step in steps if "hessdiag" in step.get("uses", "")]
    return found


def misused_actions(text):
    """Steps whose action is not there, or that give inputs it does not take."""
    known = set(yaml.safe_load((ACTION / "action.yml").read_text())["inputs"])
    place = f"hessdiag/hessdiag/{ACTION.relative_to(ROOT)}@v1"
    return [step for step in action_steps(text) if step["uses"] != place or set(step.get("with", {})) - known]


def load_budgets(text, tmp_path):
    """Read the budgets of a page as the configuration they are part of."""
    (block,) = blocks(text, "toml")
    file = tmp_path / "pyproject.toml"
    file.write_text(f'[tool.hessdiag]\nschema = 1\nproblem = "problem.py:mnist"\n{block}')
    return load_config(file).budgets


def unknown_options(text):
    """Options of hessdiag commands in the README that the commands do not have."""
    found = []
    for words in commands(text):
        command = cli.get_command(None, words[1])
        if isinstance(command, click.Group):
            command = command.commands[words[2]]
        known = {name for parameter in command.params for name in parameter.opts}
        found += [word for word in words[2:] if word.startswith("-") and word not in known]
    return found


def run(text):
    snippets = [b for b in blocks(text, "python") if not b.startswith("# problem.py")]
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {"__name__": "readme"})


def test_python_blocks_run():
    run(README)


def test_the_factory_is_ten_lines_and_a_problem(tmp_path):
    """The MNIST factory, on files of its format."""
    import gzip
    import struct

    from hessdiag.sources.factory import build_problem

    (factory,) = [b for b in blocks(README, "python") if b.startswith("# problem.py")]
    body = [line for line in factory.splitlines()[1:] if line.strip()]
    assert len(body) <= 10
    (tmp_path / "problem.py").write_text(factory)
    images = struct.pack(">4i", 0x803, 3, 28, 28) + bytes(3 * 784)
    labels = struct.pack(">2i", 0x801, 3) + bytes([0, 1, 2])
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(images))
    (tmp_path / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(labels))
    built = build_problem(f"{tmp_path}/problem.py:mnist", options={"data": str(tmp_path)})
    assert len(built.problem.data["train"]) == 3


def test_every_command_and_option_exists():
    assert unknown_options(README) == []
    assert unknown_options(RECIPES) == []
    for page in (README, RECIPES):
        assert set(re.findall(r"^hessdiag (\w+)", "\n".join(blocks(page, "bash")), re.MULTILINE)) <= set(VERBS)


def test_recipes_use_the_action_as_it_is():
    assert action_steps(README) and len(action_steps(RECIPES)) == 3
    assert misused_actions(README) == misused_actions(RECIPES) == []


def test_the_budgets_shown_are_budgets(tmp_path):
    assert len(load_budgets(BUDGETS, tmp_path)) == 4


def test_the_inputs_described_are_the_actions():
    described = set(re.findall(r"^\| `([\w-]+)` \|", RECIPES, re.MULTILINE))
    action = yaml.safe_load((ACTION / "action.yml").read_text())
    assert described == {*action["inputs"], *action["outputs"]}


def test_every_promise_has_its_test_and_every_test_its_promise():
    promised = promised_tests(PROMISES)
    assert promised <= existing_tests()
    assert {name for name in existing_tests() if name not in promised} <= PLUMBING


def test_linked_files_exist():
    for page, folder in ((README, ROOT), (RECIPES, ACTION)):
        for target in re.findall(r"\]\((?!http)([^)]+)\)", page):
            assert (folder / target).exists(), target


PLUMBING = {"test_house", "test_cli", "test_ready_problems", "test_benchmarks_run"}
BROKEN = {
    "an option that does not exist": lambda: unknown_options("```bash\nhessdiag analyze x.py:f --sample 3\n```"),
    "an option of a verb's verb that does not exist": lambda: unknown_options(
        "```bash\nhessdiag baseline update --why x\n```"
    ),
    "an option in a recipe that does not exist": lambda: unknown_options(
        "```yaml\njob:\n  script: [hessdiag check --junit x]\n```"
    ),
    "an input that the action does not take": lambda: misused_actions(
        "```yaml\n- uses: hessdiag/hessdiag/.github/actions/check@v1\n  with: {arguments: x}\n```"
    ),
    "an action that is elsewhere": lambda: misused_actions("```yaml\n- uses: hessdiag/hessdiag@v1\n```"),
    "a promise without a test": lambda: promised_tests("`test_nothing_at_all`") - existing_tests(),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage):
    assert breakage()


def test_this_promise_would_notice_a_snippet_that_fails():
    with pytest.raises(ZeroDivisionError):
        run("```python\n1 / 0\n```")


def test_this_promise_would_notice_a_budget_that_is_none(tmp_path):
    with pytest.raises(ConfigError):
        load_budgets("```toml\n[tool.hessdiag.check.budgets]\nlambda = { max = 1 }\n```", tmp_path)
