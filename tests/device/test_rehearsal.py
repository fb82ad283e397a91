"""Promise: the tests for a real accelerator run, on the pretend one, where a mistake in their lines shows."""

from __future__ import annotations

import inspect

import pytest

from tests import test_cuda

TESTS = {
    name: test
    for name, test in vars(test_cuda).items()
    if name.startswith("test_") and not [mark for mark in getattr(test, "pytestmark", ()) if mark.name == "skipif"]
}


@pytest.mark.thorough
@pytest.mark.parametrize("name", TESTS)
def test_of_cuda(name, monkeypatch):
    monkeypatch.setattr(test_cuda, "DEVICE", "pretend")
    assert not inspect.signature(TESTS[name]).parameters
    TESTS[name]()
