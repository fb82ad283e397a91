"""The pytest plugin: options, a marker, and the fixture ``hessdiag``.

pytest loads this in every project of an environment, so it is light: torch and numpy wait for the first test that
uses the fixture. ``-p no:hessdiag`` leaves it out. PYTEST_DONT_REWRITE
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from hessdiag.check.pytest.pytest_names import RECORDED, HessdiagWarning

if TYPE_CHECKING:
    from hessdiag.check.pytest.pytest_checks import Checks

BASELINE = "tests/hessdiag-baseline.json"
REASON = "pytest --hessdiag-update"
NOT_CI = ("", "0", "false", "no")
MARKER = "hessdiag(**options): defaults of hessdiag.run() in these tests, for example probes=8, samples=256"
__all__ = ["HessdiagWarning"]
PASSED = pytest.StashKey[bool]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of pytest whose names begin with hessdiag, and the ini option ``hessdiag_baseline``."""
    group = parser.getgroup("hessdiag", "sharpness of trained models")
    flag = {"action": "store_true", "default": False}
    group.addoption("--hessdiag-update", **flag, help="record the baselines of the tests that run and pass")
    group.addoption("--hessdiag-reason", default=REASON, metavar="TEXT", help="why, kept with what is recorded")
    group.addoption("--hessdiag-ci", **flag, help="let --hessdiag-update work where CI is set")
    group.addoption("--hessdiag-skip", **flag, help="skip the tests that use the fixture hessdiag")
    place = f"file of the baselines (default: ini option hessdiag_baseline, or {BASELINE} under rootdir)"
    group.addoption("--hessdiag-baseline", metavar="PATH", help=place)
    parser.addini("hessdiag_baseline", "file of hessdiag's baselines, from rootdir", default=BASELINE)


def pytest_configure(config: pytest.Config) -> None:
    """Register the marker; refuse to record where nobody looks at what is recorded.

    Raises:
        pytest.UsageError: ``--hessdiag-update`` in CI.
    """
    config.addinivalue_line("markers", MARKER)
    if not config.getoption("hessdiag_update"):
        return
    if os.environ.get("CI", "").strip().lower() not in NOT_CI and not config.getoption("hessdiag_ci"):
        msg = (
            "--hessdiag-update is refused where CI is set: a job that records its own baselines checks nothing; "
            "record them on your machine and commit them, or add --hessdiag-ci"
        )
        raise pytest.UsageError(msg)
    config.pluginmanager.register(Recording(), "hessdiag-recording")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip before other fixtures train a model for nothing."""
    if config.getoption("hessdiag_skip"):
        for item in items:
            if "hessdiag" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason="--hessdiag-skip"))


class Recording:
    """What only ``--hessdiag-update`` needs: which tests passed, and what was recorded."""

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        """Remember whether the test passed: what a failed one measured must not become its standard."""
        outcome: Any = yield
        item.stash[PASSED] = outcome.excinfo is None

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """List what was recorded, old and new."""
        reports = [report for some in terminalreporter.stats.values() for report in some]
        properties = [pair for report in reports for pair in getattr(report, "user_properties", ())]
        lines = dict.fromkeys(str(value) for name, value in properties if name == RECORDED)
        terminalreporter.section("hessdiag baselines")
        for line in lines or ("nothing was recorded: no test with max_increase or max_decrease passed",):
            terminalreporter.write_line(line)


def baseline_file(config: pytest.Config) -> Path:
    """The file of the baselines: an option hangs at the folder pytest was called in, an ini value at rootdir."""
    given = config.getoption("hessdiag_baseline")
    if given:
        return Path(config.invocation_params.dir, given)
    return config.rootpath / (config.getini("hessdiag_baseline") or BASELINE)


@pytest.fixture(name="hessdiag")
def hessdiag_fixture(request: pytest.FixtureRequest) -> Iterator[Checks]:
    """Measure how sharp a checkpoint is, and hold it against limits: `run`, then `check`."""
    config = request.config
    if config.getoption("hessdiag_skip"):  # reached where the fixture is asked for by request.getfixturevalue
        pytest.skip("--hessdiag-skip")
    from hessdiag.check.pytest.pytest_checks import Checks

    reason = config.getoption("hessdiag_reason") if config.getoption("hessdiag_update") else None
    checks = Checks(request.node, baseline_file(config), config.rootpath, reason)
    yield checks
    if reason is not None and request.node.stash.get(PASSED, False):
        checks.record()
