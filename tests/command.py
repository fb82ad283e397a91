"""The command line called inside the test's own process."""

from __future__ import annotations

import io
from contextlib import redirect_stderr, redirect_stdout

from hessdiag import cli


def call(*arguments: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr."""
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = cli.run(arguments)
    return code, out.getvalue(), err.getvalue()
