"""The files of a run replace those of an earlier run together: at no moment do files of two runs lie side by side.

A folder cannot be swapped for another where it is a link, a mount or the current folder, nor with a user's own
files in it. So the new files are written into a hidden folder inside and flushed. A rename of that folder decides:
then the old files are moved out of the way, all of them, and only after that the new ones in. What a kill leaves
is a part of one run, and `complete` does the rest at the next start.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from hessdiag.errors import OutputError, one_line
from hessdiag.files import flush_folder, is_stream, write_flushed, write_whole

WRITING = ".hessdiag-writing-"  # begins the name of a folder whose files are not all there
DECIDED = ".hessdiag-decided"  # all new files are in it; old ones are being moved into it
MOVING = ".hessdiag-moving"  # no old file is left outside; new ones are being moved out of it
NEW, OLD, REPLACED = "new", "old", "replaced.json"


def write_together(folder: str | Path, contents: Mapping[str, str | bytes], owned: Iterable[str] = ()) -> Path:
    """Write files of one run so that none of an earlier run stays beside them, whatever happens.

    Args:
        folder: made if missing; files of other names stay as they are.
        contents: of the files, by name; text is written as UTF-8.
        owned: names that an earlier run may have written; those not in ``contents`` are removed.

    Returns:
        The folder.

    Raises:
        OutputError: the folder cannot be written or the disk is full; the files are those of the earlier run.
    """
    folder, stage = Path(folder), None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _alone(folder) as alone:
            _complete(folder)
            if alone:
                _sweep(folder)
            _refuse_folders(folder, contents)
            stage = folder / f"{WRITING}{os.urandom(6).hex()}"  # known before it is there: Ctrl-C may come between
            stage.mkdir(mode=0o700)
            _fill(stage, contents, owned)
            stage.rename(folder / DECIDED)
            try:
                _complete(folder)
            except KeyboardInterrupt:
                _complete(folder)
                raise
    except BaseException as error:
        if stage is not None:
            shutil.rmtree(stage, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        msg = f"cannot write {folder}: {one_line(error)}; choose another folder with -o"
        raise OutputError(msg) from error
    return folder


def write_files(
    contents: Mapping[Path, str | bytes], folder: Path | None = None, owned: Iterable[str] = ()
) -> OutputError | None:
    """Write files of one run wherever they are to be; those of one folder together, as `write_together` does.

    A folder that cannot be written costs its own files only.

    Args:
        contents: by path.
        folder: whose files of an earlier run are taken away.
        owned: their names.

    Returns:
        Why something could not be written, the first such thing; None if all is written.
    """
    parts: dict[Path, dict[str, str | bytes]] = {} if folder is None else {folder.resolve(): {}}
    failed: list[OutputError] = []
    for path, content in contents.items():
        if is_stream(path):
            failed += _refused(write_whole, path, content)
        else:
            parts.setdefault(path.parent.resolve(), {})[path.name] = content
    for place, files in parts.items():
        names = owned if folder is not None and place == folder.resolve() else ()
        failed += _refused(write_together, _near(place), files, names)
    return failed[0] if failed else None


def _refused(write: Callable[..., Path], *given: Any) -> list[OutputError]:
    try:
        write(*given)
    except OutputError as error:
        return [error]
    return []


def _near(folder: Path) -> Path:
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder


def complete(folder: str | Path) -> None:
    """Finish what a killed process had decided to write, if that can be done here."""
    folder = Path(folder)
    if not any((folder / name).exists() for name in (DECIDED, MOVING)):
        return
    with suppress(OSError, OutputError), _alone(folder):
        _complete(folder)


def _refuse_folders(folder: Path, names: Iterable[str]) -> None:
    for name in names:
        if (folder / name).is_dir():
            msg = f"cannot write {folder / name}: a folder of that name is there; choose another with -o"
            raise OutputError(msg)


def _fill(stage: Path, contents: Mapping[str, str | bytes], owned: Iterable[str]) -> None:
    for part in (NEW, OLD):
        (stage / part).mkdir()
    for name, content in contents.items():
        write_flushed(stage / NEW / name, content)
    write_flushed(stage / REPLACED, json.dumps(sorted({*owned, *contents})))
    flush_folder(stage / NEW)
    flush_folder(stage)


def _complete(folder: Path) -> None:
    decided, moving = folder / DECIDED, folder / MOVING
    if decided.is_dir():
        names = _replaced(decided)
        try:
            for name in names:
                _move(folder / name, decided / OLD / name)
        except OSError:
            for name in names:
                _move(decided / OLD / name, folder / name)
            shutil.rmtree(decided)
            raise
        decided.rename(moving)
    if moving.is_dir():
        if (moving / NEW).is_dir():
            for file in sorted((moving / NEW).iterdir()):
                file.rename(folder / file.name)
            flush_folder(folder)
        shutil.rmtree(moving)


def _replaced(decided: Path) -> list[str]:
    """Names to take away: in this folder only, whoever wrote the list."""
    try:
        return [name for name in json.loads((decided / REPLACED).read_text()) if name == Path(name).name]
    except (OSError, ValueError, TypeError) as error:
        msg = f"{decided} holds no files of a run: delete it"
        raise OutputError(msg) from error


def _move(file: Path, target: Path) -> None:
    if file.is_symlink() or file.is_file():
        file.rename(target)


def _sweep(folder: Path) -> None:
    """Remove what killed processes had not finished writing; no other process writes now."""
    for left in folder.glob(f"{WRITING}*"):
        shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Wait until no other process writes here; False where the system has no such lock. A kill gives it back."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield False
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # some network file systems
            alone = False
        else:
            alone = True
        yield alone
    finally:
        os.close(handle)
