"""A folder with what a measurement has found: a line of JSON for each result, rows of a basis in safetensors.

Rows are on the disk before the line that names them, each with its checksum. Whatever kills the process, a reader
takes the lines up to the first that is torn or whose rows are not there.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from hessdiag.errors import OutputError
from hessdiag.files import flush_folder, write_whole
from hessdiag.resume.entry import Entry, entry_of, line_of, replaced, usable
from hessdiag.resume.values import checksum

LINES, CLAIM, ROWS = "found.jsonl", "claim", "rows-*.safetensors"
OLD = 14 * 86_400  # seconds without a change after which what a killed run left is taken away


class Log:
    """The entries of one measurement.

    Args:
        folder: of this measurement alone; made when something is written.

    Attributes:
        entries: found by `read`, and those written since.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.entries: list[Entry] = []
        self._claim: Any = None
        self._files: dict[str, Any] = {}
        self._replaced: set[int] = set()

    def read(self) -> None:
        """Take what an earlier run left and this one can use.

        Raises:
            OutputError: another process has the folder.
            OSError: it cannot be read or written.
        """
        if not (self.folder / LINES).exists():
            return
        self.claim()
        found: list[Entry] = []
        for line in (self.folder / LINES).read_bytes().splitlines(keepends=True):
            entry = entry_of(line)
            if entry is None or entry.number != len(found):
                break
            found.append(entry)
        self.entries = found
        self.cut(usable(self.entries, self._whole))

    def claim(self) -> None:
        """Keep other processes out until `release`; a kill gives it back.

        Raises:
            OutputError: another process has the folder.
        """
        from filelock import FileLock, Timeout

        if self._claim is not None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        held = FileLock(self.folder / CLAIM, thread_local=False)
        try:
            held.acquire(timeout=0)
        except Timeout as error:
            msg = f"another run of the same measurement has {self.folder}"
            raise OutputError(msg) from error
        except NotImplementedError as error:
            msg = f"{self.folder} lies on a file system without locks"
            raise OutputError(msg) from error
        self._claim = held

    def tensors(self, entry: Entry) -> dict[str, Tensor]:
        """Its tensors by name, on the CPU; none where later ones have taken their place.

        Raises:
            OSError: they are not there, or not whole.
        """
        from safetensors import SafetensorError, safe_open

        found = {}
        for name, expected in entry.sums.items() if entry.number not in self._replaced else ():
            try:
                if entry.file not in self._files:
                    self._files[entry.file] = safe_open(self.folder / entry.file, "pt")
                found[name] = self._files[entry.file].get_tensor(f"{entry.number}.{name}")
            except SafetensorError as error:
                raise OSError(*error.args) from error
            if checksum(found[name]) != expected:
                msg = f"{entry.file} is damaged"
                raise OSError(msg)
        return found

    def _whole(self, entry: Entry) -> bool:
        if entry.fills and not entry.sums:
            return False
        try:
            self.tensors(entry)
        except OSError:
            return False
        return True

    def append(self, found: Sequence[tuple[Entry, Mapping[str, Tensor]]]) -> None:
        """Write entries with their tensors.

        They are flushed to the disk only before older ones are removed. A kill takes nothing of what is written; a
        power cut may take the last half minute, which checksums find. Flushing each time took 1.7 times as long.

        Raises:
            OutputError: another process has the folder, or it cannot be written.
            OSError: it cannot be written.
        """
        new, safe = self._claim is None, any(entry.anew for entry, _ in found)
        if new:
            self.claim()
            self.cut(0)  # what another run wrote in the meantime
            write_whole(self.folder.parent / ".gitignore", "*\n")
            _remove_old(self.folder)
        named = [(entry, {f"{entry.number}.{name}": t for name, t in some.items()}) for entry, some in found]
        file = f"rows-{found[0][0].number:06d}.safetensors"
        _save({name: tensor for _, some in named for name, tensor in some.items()}, self.folder / file, safe=safe)
        now = time.time()
        entries = [
            replace(entry, written=now, file=file if some else "", sums={n: checksum(t) for n, t in some.items()})
            for entry, some in found
        ]
        with (self.folder / LINES).open("ab") as stream:
            stream.write(b"".join(map(line_of, entries)))
            stream.flush()
            if safe:
                os.fsync(stream.fileno())
        self.entries += entries
        if safe:
            flush_folder(self.folder)
            self._tidy()

    def cut(self, number: int) -> None:
        """Drop what comes after so many entries."""
        whole = b"".join(map(line_of, self.entries[:number]))
        path = self.folder / LINES
        if path.exists() and path.read_bytes() != whole:
            write_whole(path, whole)
        self.entries = self.entries[:number]
        self._tidy()

    def _tidy(self) -> None:
        """Remove rows that no entry needs any more."""
        self._replaced = replaced(self.entries)
        needed = {entry.file for entry in self.entries if entry.number not in self._replaced}
        for file in self.folder.glob(ROWS):
            if file.name not in needed:
                self._files.pop(file.name, None)
                file.unlink(missing_ok=True)

    def delete(self) -> None:
        """Take everything away, and let others in."""
        self._files.clear()
        with suppress(OSError, OutputError):
            if self.folder.exists():
                self.claim()
                shutil.rmtree(self.folder, ignore_errors=True)
        self.entries = []
        self.release()

    def release(self) -> None:
        """Let others in."""
        if self._claim is not None:
            self._claim.release()
            self._claim = None


def _save(tensors: Mapping[str, Tensor], file: Path, *, safe: bool) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    if not tensors:
        return
    temporary = file.with_name(f".{file.name}")
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, temporary)
        if safe:
            with temporary.open("rb+") as stream:
                os.fsync(stream.fileno())
        temporary.replace(file)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, SafetensorError):
            raise OSError(*error.args) from error
        raise


def _remove_old(folder: Path) -> None:
    """Remove what killed runs left that nobody has asked to go on since."""
    for other in folder.parent.iterdir():
        lines = other / LINES
        with suppress(OSError):
            if other != folder and time.time() - lines.stat().st_mtime > OLD:
                shutil.rmtree(other, ignore_errors=True)
