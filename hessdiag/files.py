"""Files are written whole or not at all: temporary file beside the target, fsync, rename."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from hessdiag.errors import OutputError, UsageError, one_line

CACHE = Path(".hessdiag") / "cache"
"""Where finished work is kept for a next time, in the current folder or beside a configuration."""
CACHE_VARIABLE = "HESSDIAG_CACHE"
"""The environment variable that names another folder for it."""


def cache_folder(given: str | Path | None, part: str, default: Path) -> Path:
    """Where finished work is kept for a next time.

    Args:
        given: a folder that was asked for; None: the one that `CACHE_VARIABLE` names, if it does.
        part: folder in it, so that several verbs can share it, and ``.`` is not filled with records.
        default: where neither names one.
    """
    named = given or os.environ.get(CACHE_VARIABLE)
    return Path(named).expanduser() / part if named else default


def record_file(folder: Path, key: str) -> Path:
    """Where the record of a key lies, whether it is there or not.

    In one of 256 folders: 100,000 files in one are slow on network file systems. One that lies flat, where earlier
    versions put it, stays there.

    Args:
        folder: of all records.
        key: hexadecimal.
    """
    flat = folder / f"{key}.json"
    return flat if os.path.isfile(flat) else folder / key[:2] / flat.name  # noqa: PTH113  (it never raises)


def write_whole(path: str | Path, content: str | bytes) -> Path:
    """Write ``content`` to ``path`` so that a reader sees the old file or the new one, never a part.

    A pipe or a device (``/dev/stdout``) is written to: a rename would put a file in its place.

    Args:
        path: target file; its folder is made if missing.
        content: text is written as UTF-8.

    Returns:
        The path written.

    Raises:
        OutputError: the folder cannot be made or written, or the disk is full.
    """
    target = Path(path)
    temporary = (
        target.parent / f".{target.name}.{os.urandom(6).hex()}"
    )  # known before it is there: Ctrl-C may come
    try:
        if is_stream(target):
            with target.open("wb") as stream:
                stream.write(content.encode() if isinstance(content, str) else content)
            return target
        target.parent.mkdir(parents=True, exist_ok=True)
        write_flushed(temporary, content)
        temporary.replace(target)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        msg = f"cannot write {target}: {one_line(error)}; choose another folder with -o"
        raise OutputError(msg) from error
    return target


def is_stream(path: str | Path) -> bool:
    """Whether a path names something that takes bytes and keeps none: a pipe, a terminal, ``/dev/null``."""
    target = Path(path)
    return target.exists() and not target.is_file() and not target.is_dir()


def write_flushed(path: str | Path, content: str | bytes) -> None:
    """Write a file that is not there yet, down to the disk; text as UTF-8."""
    with Path(path).open("xb") as stream:
        stream.write(content.encode() if isinstance(content, str) else content)
        stream.flush()
        os.fsync(stream.fileno())
    Path(path).chmod(0o644)


def flush_folder(folder: Path) -> None:
    """Bring the names in a folder down to the disk, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def keep(path: str | Path, content: str, folder: Path | None = None) -> str:
    """Write a file for a next time, in a folder that git ignores; where that fails, why.

    A read-only checkout can be measured all the same, so this is no error.

    Args:
        path: of the file.
        content: text.
        folder: that git ignores; by default the file's own.

    Returns:
        One line, or "" if it was written.
    """
    ignored = (folder or Path(path).parent) / ".gitignore"
    try:
        if not ignored.exists():
            write_whole(ignored, "*\n")
        write_whole(path, content)
    except (OutputError, OSError) as error:  # a folder of somebody else's cannot even be looked into
        return f"nothing is kept for a next time: {one_line(error)}"
    return ""


def require_writable(folder: str | Path) -> Path:
    """Make ``folder`` and prove it can be written, before any long work begins.

    Raises:
        OutputError: it cannot.
    """
    probe = write_whole(Path(folder) / ".hessdiag-write-test", "")
    probe.unlink()
    return Path(folder)


def require_place(file: str | Path) -> None:
    """Prove that a file can be written here, before any long work begins; it is not touched.

    Raises:
        UsageError: a folder is there.
        OutputError: its folder cannot be written.
    """
    if Path(file).is_dir():
        msg = f"{file}: this is a folder; name a file in it"
        raise UsageError(msg)
    if not is_stream(file):
        require_writable(Path(file).parent)
