"""The device is built and registered before the first test; where it cannot be, every test here says why."""

from pathlib import Path

import pytest

from tests.conftest import UNDER_CI
from tests.device import pretend

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    named = [Path.cwd() / argument.split("::")[0] for argument in config.args]
    asked = [HERE in (path, *path.parents) for path in named]
    if any(asked) and not all(
        asked
    ):  # autograd makes its threads at the first backward pass, for the devices of then
        msg = "tests/device wants a process of its own: run the other tests without it"
        raise pytest.UsageError(msg)
    return None if any(asked) else True


@pytest.fixture(scope="session", autouse=True)
def device() -> str:
    try:
        pretend.start()
    except pretend.Failed as reason:
        if UNDER_CI:
            raise
        pytest.skip(str(reason))
    except pretend.Unavailable as reason:
        pytest.skip(f"no pretend accelerator: {reason}")
    return pretend.NAME
