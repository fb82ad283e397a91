"""One thread, so that timings and sums do not depend on the machine; and a desk, unless a test says it is CI.

A file's docstring says how long its tests take, "(40 s)" or "3 minutes" on one core. Beyond `SLOW` seconds they
get the marker `slow`.
"""

import os
import re
import signal

import pytest
import torch

from tests import seeds

pytest_plugins = ["pytester"]

SLOW = 20  # seconds of a file from which its tests are marked `slow`

UNDER_CI = bool(os.environ.get("CI"))  # what cannot be built is a failure there, a skip elsewhere

# The tool reads these: under a CI service it refuses to record baselines and writes annotations and summaries.
for name in [name for name in os.environ if name in ("CI", "GITLAB_CI") or name.startswith("GITHUB_")]:
    del os.environ[name]

# Started in the background, this process and its children would not hear of Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=1, help="threads of torch, in the process of the tests")
    parser.addoption("--seeds", type=int, default=seeds.MOST, help="most seeds of a coverage study; made for 2000")
    parser.addoption("--thorough", action="store_true", help="the tests marked `thorough` too")


def pytest_configure(config: pytest.Config) -> None:
    asked = config.getoption("seeds")
    if asked < seeds.MOST:  # the bands of fewer are too wide to notice what the studies must notice
        raise pytest.UsageError(f"--seeds={asked}: must be at least {seeds.MOST}")
    seeds.MOST = asked
    torch.set_num_threads(config.getoption("threads"))


def seconds(docstring: str | None) -> int:
    """How long a file's tests take, by its docstring; 0 where it does not say."""
    said = re.search(r"\b(\d+) (s|minutes)\b", docstring or "")
    return int(said[1]) * (60 if said[2] == "minutes" else 1) if said else 0


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    mark_slow(items)
    if not config.getoption("thorough"):
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("thorough")])
        items[:] = [item for item in items if not item.get_closest_marker("thorough")]


def mark_slow(items: list[pytest.Item]) -> None:
    for item in items:
        module = getattr(item, "module", None)  # a doctest has none
        if module and seconds(module.__doc__) > SLOW:
            item.add_marker(pytest.mark.slow)


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.set_num_threads(item.config.getoption("threads"))  # a test may have changed it: the demo does
