"""Promise: the code is the same on an accelerator: numbers, waits and copies, on a pretend one. (60 s)

The tests are those of ``tests/device``; here they are started, because a device is registered for a whole process.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tests.conftest import UNDER_CI

TOP = Path(__file__).parent.parent


def test_the_tests_on_a_pretend_device_pass(tmp_path):
    report = tmp_path / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "tests/device", f"--junitxml={report}"]
    environment = {**os.environ, "PYTHONPATH": str(TOP), **({"CI": "1"} if UNDER_CI else {})}
    done = subprocess.run(
        command, cwd=TOP, env=environment, capture_output=True, text=True, timeout=1200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    cases = list(ElementTree.parse(report).iter("testcase"))
    skipped = [reason for case in cases if (reason := case.find("skipped")) is not None]
    assert len(cases) > 50
    if len(skipped) == len(cases):
        pytest.skip(str(skipped[0].get("message")))
    assert not skipped
