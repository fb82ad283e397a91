"""The old place of the pytest plugin's warning, for ``-W error::...`` of before; kept for one version."""

from hessdiag.check.pytest.pytest_plugin import HessdiagWarning

__all__ = ["HessdiagWarning"]
