"""Finished measurements on disk, so that what was interrupted goes on where it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hessdiag.errors import UsageError
from hessdiag.files import keep, record_file, write_whole
from hessdiag.results.analysis import Analysis
from hessdiag.results.runfile import load_run

LONGEST_NAME = 60  # characters of a readable name


@dataclass(frozen=True, kw_only=True)
class Store:
    """Measurements by the key of all their numbers depend on; see `hessdiag.analysis.record.key_of`.

    Attributes:
        folder: where they lie; None keeps nothing.
        say: takes a line for the reader, where one cannot be read or kept.
        results: whether they are a result that was asked for: files then bear readable names, and one that cannot
            be written is an error.
    """

    folder: Path | None
    say: Callable[[str], None] | None = None
    results: bool = False

    def recall(self, key: str, name: str = "") -> Analysis | None:
        """The measurement of that key; None where there is none that can be read."""
        file = self._file(key, name)
        if file is None or not file.is_file():
            return None
        try:
            return load_run(file)
        except UsageError:
            self._tell(f"{file} cannot be read: measured again")
            return None

    def keep(self, key: str, name: str, analysis: Analysis) -> None:
        """Write a measurement, whole or not at all.

        Raises:
            OutputError: a result that was asked for cannot be written.
        """
        file = self._file(key, name)
        if file is None:
            return
        if self.results:
            write_whole(file, analysis.to_json())
        elif why := keep(file, analysis.to_json(), self.folder):
            self._tell(why)

    def _file(self, key: str, name: str) -> Path | None:
        if self.folder is None:
            return None
        if not self.results:
            return record_file(self.folder, key)
        readable = re.sub(r"[^A-Za-z0-9._=-]+", "-", name).strip("-.")[-LONGEST_NAME:]
        return self.folder / f"{readable}-{key}.json"

    def _tell(self, line: str) -> None:
        if self.say is not None:
            self.say(line)
