"""What git knows of a checkpoint: the commit, and the file as it was at another one."""

from __future__ import annotations

import subprocess
from pathlib import Path

from hessdiag.errors import LoadError, UsageError, one_line

SECONDS = 300  # a large file may have to be fetched by git-lfs


def commit(folder: str | Path) -> str | None:
    """The commit checked out in ``folder``, with "+" if files differ from it; None outside of git."""
    try:
        name = _git(folder, "rev-parse", "HEAD").decode().strip()
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no").strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{name}{'+' if changed else ''}"


def file_at(ref: str, path: str | Path, target: str | Path) -> Path:
    """Write the file ``path`` as it is at ``ref`` into the folder ``target``, large-file filters applied.

    Raises:
        UsageError: no such ref, or this is no repository.
        LoadError: the file is not there at that ref.
    """
    file = Path(path).resolve()
    try:
        root = Path(_git(file.parent, "rev-parse", "--show-toplevel").decode().strip())
        _git(root, "rev-parse", "--verify", "--quiet", f"{ref}^{{commit}}")
    except (OSError, subprocess.SubprocessError) as error:
        msg = f"`against_git={ref}`: no such commit here; in CI, fetch it first (actions/checkout: fetch-depth: 0)"
        raise UsageError(msg) from error
    inside = file.relative_to(root.resolve()).as_posix()
    try:
        content = _git(root, "cat-file", "--filters", f"{ref}:{inside}")
    except (OSError, subprocess.SubprocessError) as error:
        why = getattr(error, "stderr", b"") or b""
        msg = f"`against_git={ref}`: {inside} is not available there ({one_line(Exception(why.decode()), 120)})"
        raise LoadError(msg) from error
    copy = Path(target) / file.name
    copy.write_bytes(content)
    return copy


def _git(folder: str | Path, *arguments: str) -> bytes:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, check=True, capture_output=True, timeout=SECONDS).stdout
