"""One thread, so that timings and sums do not depend on the machine; and a desk, unless a test says it is CI."""

import os
import signal

import pytest
import torch

from tests import seeds

pytest_plugins = ["pytester"]

# The tool reads these: under a CI service it refuses to record baselines and writes annotations and summaries.
for name in [name for name in os.environ if name in ("CI", "GITLAB_CI") or name.startswith("GITHUB_")]:
    del os.environ[name]

# Started in the background, this process and its children would not hear of Ctrl-C.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=1, help="threads of torch, in the process of the tests")
    parser.addoption("--seeds", type=int, default=seeds.MOST, help="most seeds of a coverage study; made for 2000")


def pytest_configure(config: pytest.Config) -> None:
    asked = config.getoption("seeds")
    if asked < seeds.MOST:  # the bands of fewer are too wide to notice what the studies must notice
        raise pytest.UsageError(f"--seeds={asked}: must be at least {seeds.MOST}")
    seeds.MOST = asked
    torch.set_num_threads(config.getoption("threads"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    torch.set_num_threads(item.config.getoption("threads"))  # a test may have changed it: the demo does
