"""Claims: which records are being made, so that two processes that share a cache do not measure one file twice.

A claim is a file beside the place of its record, made exclusively, with host, process and time. It only saves
work: exclusive creation and clocks are weak on network file systems. Where two processes make one record nothing
goes wrong, because each is written whole and the later rename wins.
"""

from __future__ import annotations

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from hessdiag.errors import OutputError
from hessdiag.files import write_whole

UNKNOWN = 3600.0  # seconds for loading data and testing a problem, after which the cost of a file is known
PATIENCE = 2  # forecasts after which a claim is given up
NAMELESS = 60.0  # seconds after which an empty claim is one whose process was killed before it could write


def take(record: Path) -> str | None:
    """Claim a record.

    Args:
        record: its place, which may not exist yet.

    Returns:
        What `release` and `expect` take; "" where no claim can be written: the work is done without. None: another
        process has it, and is likely to be at work.
    """
    file, token = _file(record), os.urandom(8).hex()
    for _ in range(2):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            if holder(record):
                return None
            with suppress(OSError):
                file.unlink()
            continue
        except OSError:
            return ""
        with suppress(OSError), os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(_text(token, UNKNOWN))
        return token
    return None


def expect(record: Path, token: str, seconds: float) -> None:
    """Say how long the work is going to take: others wait for it twice as long."""
    if _is(record, token):
        with suppress(OutputError, OSError):
            write_whole(_file(record), _text(token, PATIENCE * seconds))


def release(record: Path, token: str) -> None:
    """Give a claim back, unless another process has taken it over."""
    if _is(record, token):
        with suppress(OSError):
            _file(record).unlink()


def holder(record: Path) -> str:
    """Who makes a record now, in words; "" where nobody does.

    A claim counts no more when its time is over, and when its process has gone from this machine. One of this very
    process is none: whatever it was for has ended.
    """
    try:
        text = _file(record).read_text(encoding="utf-8")
        begun = _file(record).stat().st_mtime
    except (OSError, UnicodeDecodeError):
        return ""
    try:
        found = json.loads(text)
        host, pid, until = str(found["host"]), int(found["pid"]), float(found["until"])
    except (ValueError, KeyError, TypeError):
        return "" if time.time() - begun > NAMELESS else "another process"
    here = host == socket.gethostname()
    if time.time() > until or (here and (pid == os.getpid() or not _runs(pid))):
        return ""
    return f"process {pid} on {host}"


def _file(record: Path) -> Path:
    return record.with_suffix(".claim")


def _text(token: str, seconds: float) -> str:
    now = time.time()
    owner: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid(), "token": token}
    return json.dumps({**owner, "time": round(now, 3), "until": round(now + seconds, 3)}) + "\n"


def _is(record: Path, token: str) -> bool:
    if not token:
        return False
    try:
        found = json.loads(_file(record).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(found, dict) and found.get("token") == token


def _runs(pid: int) -> bool:
    """Whether a process of this machine is there; where that cannot be asked, it is taken to be."""
    if os.name != "posix":  # signal 0 is Ctrl-C there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user
        return True
    return True
