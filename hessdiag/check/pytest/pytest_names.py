"""What the plugin and its fixture both name; light, as pytest loads it in every project."""

from __future__ import annotations

RECORDED = "hessdiag.recorded"
"""Property of a test's report: a line about a baseline that was recorded."""


class HessdiagWarning(UserWarning):
    """What a test should say, but need not fail for: nobody can tell, or a limit of level "warn" is exceeded.

    ``-W error::hessdiag.check.pytest.pytest_plugin.HessdiagWarning`` is the strict mode.
    """
