"""What the action's two scripts do; inputs come as environment variables, and no shell ever reads them.

Only the standard library, as this installs the rest.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

OWN_CHECKOUT = Path(__file__).resolve().parents[3]
REPORTS = {"junit": "junit.xml", "json": "check.json", "md": "summary.md"}
VERDICTS = {0: "passed", 1: "failed", 2: "misconfigured", 3: "no verdict", 130: "interrupted"}
NOT_MEASURED = "not measured"  # 4, and whatever else a process may end with: killed, out of memory
OLDEST = (3, 11)


def words(name: str) -> list[str]:
    """An input as arguments, quotes honoured, nothing expanded.

    Raises:
        SystemExit: a quote is not closed; 2, as for every fault of usage.
    """
    try:
        return shlex.split(os.environ.get(name, ""))
    except ValueError as error:
        print(f"::error title=hessdiag::{name}: {error}; write it as for a shell", flush=True)
        raise SystemExit(2) from error


def install() -> int:
    """Install torch, hessdiag and what the problem needs in one go, so that pip sees all requirements at once."""
    hessdiag = os.environ.get("HESSDIAG_REQUIREMENT", "").strip() or str(OWN_CHECKOUT)
    torch = os.environ.get("HESSDIAG_TORCH", "").strip()
    wanted = [*([torch] if torch else []), hessdiag, *words("HESSDIAG_EXTRAS")]
    command = [sys.executable, "-P", "-m", "pip", "install", "--disable-pip-version-check", "-q", *wanted]
    return subprocess.run(command, check=False).returncode


def check() -> int:
    """Run the check, and say how it ended in the step's outputs."""
    reports = Path(tempfile.mkdtemp(prefix="hessdiag-", dir=os.environ.get("RUNNER_TEMP")))
    outputs = {"verdict": VERDICTS[2], "exit-code": "2", "reports": str(reports)}
    try:
        files = [f"-o{name}={reports / file}" for name, file in REPORTS.items()]
        command = [sys.executable, "-P", "-m", "hessdiag", "check", *words("HESSDIAG_ARGS"), *files]
        code = subprocess.run(command, check=False).returncode
        report = reports / REPORTS["json"]
        if code == 0 and not report.is_file():  # args = "--help" measured nothing, and must not look passed
            code = 3
        code = code if code >= 0 else 128 - code
        outputs |= {"verdict": verdict(code, report), "exit-code": str(code)}
    finally:
        target = os.environ.get("GITHUB_OUTPUT")
        if target:
            with Path(target).open("a", encoding="utf-8") as stream:
                stream.writelines(f"{key}={value}\n" for key, value in outputs.items())
    return code


def verdict(code: int, report: Path) -> str:
    """The word for how it ended: after --exit-zero the report's, as its 0 is only the process's."""
    if code == 0:
        code = int(json.loads(report.read_text(encoding="utf-8"))["exit_code"])
    return VERDICTS.get(code, NOT_MEASURED)


if __name__ == "__main__":
    if sys.version_info < OLDEST:
        version = ".".join(map(str, sys.version_info[:2]))
        print(f"::error title=hessdiag::Python 3.11 or newer is needed, this is {version}: set python-version")
        raise SystemExit(2)
    raise SystemExit({"install": install, "check": check}[sys.argv[1]]())
