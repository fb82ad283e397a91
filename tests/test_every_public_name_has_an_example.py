"""Promise: every public name of the package has an example in its documentation, and the example runs."""

from __future__ import annotations

import doctest

import pytest

import hessdiag

LACKING = {"__version__", "SymmetricOperator", "as_operator"}
NAMES = [name for name in hessdiag.__all__ if name not in LACKING]


def examples(name):
    """The doctests of one public name, methods included; none is skipped."""
    finder, value = doctest.DocTestFinder(exclude_empty=True), getattr(hessdiag, name)
    return [test for test in finder.find(value, name, globs={}) if test.examples]


def faults(tests):
    out = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)
    for test in tests:
        runner.run(test, out=out.append)
    return "".join(out)


@pytest.mark.parametrize("name", NAMES)
def test_the_example_runs(name):
    found = examples(name)
    assert found, f"{name} has no example"
    assert not any(doctest.SKIP in example.options for test in found for example in test.examples)
    assert faults(found) == ""


def test_the_package_itself_has_one():
    (found,) = doctest.DocTestFinder(recurse=False).find(hessdiag, "hessdiag", globs={})
    assert found.examples
    assert faults([found]) == ""


def test_a_wrong_example_is_noticed():
    test = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, 0)
    assert "Expected" in faults([test])
