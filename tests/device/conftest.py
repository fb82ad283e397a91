"""The device is built and registered before the first test; where it cannot be, every test here says why."""

from pathlib import Path

import pytest

from tests.conftest import UNDER_CI
from tests.device import pretend

HERE = Path(__file__).parent


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    named = [Path(argument.split("::")[0]) for argument in config.invocation_params.args if argument[:1] != "-"]
    asked = any(HERE in (path, *path.parents) for path in (Path.cwd() / name for name in named))
    return None if asked else True


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
