"""Promise: the README's Python runs as printed, its commands exist, and its table of promises names real tests."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from hessdiag.cli import VERBS, cli

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(text, language):
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def promised_tests(text):
    return set(re.findall(r"`(test_\w+)`", text))


def existing_tests():
    return {path.stem for path in (ROOT / "tests").glob("test_*.py")}


def unknown_options(text):
    """Options of hessdiag commands in the README that the commands do not have."""
    found = []
    for line in "\n".join(blocks(text, "bash")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] != ["hessdiag"] or words[1] not in VERBS:
            continue
        command = cli.get_command(None, words[1])
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
    assert set(re.findall(r"^hessdiag (\w+)", "\n".join(blocks(README, "bash")), re.MULTILINE)) <= set(VERBS)


def test_every_promise_has_its_test_and_every_test_its_promise():
    promised = promised_tests(README)
    assert promised <= existing_tests()
    assert {name for name in existing_tests() if name not in promised} <= PLUMBING


def test_linked_files_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


PLUMBING = {"test_house", "test_cli", "test_ready_problems", "test_benchmarks_run"}
BROKEN = {
    "an option that does not exist": lambda: unknown_options("```bash\nhessdiag analyze x.py:f --sample 3\n```"),
    "a promise without a test": lambda: promised_tests("`test_nothing_at_all`") - existing_tests(),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage):
    assert breakage()


def test_this_promise_would_notice_a_snippet_that_fails():
    with pytest.raises(ZeroDivisionError):
        run("```python\n1 / 0\n```")
