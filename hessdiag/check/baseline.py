"""The baseline file: read, written whole, updated by one process at a time, and compared with another.

It lies under version control; its form is in `hessdiag.check.baseline_text`.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hessdiag.check.baseline_text import SCHEMA, Baseline, NewerSchemaError, agreed, parsed, rounded, sides, text
from hessdiag.check.comparable import shortened
from hessdiag.check.recorded import Entry, Recorded
from hessdiag.errors import NoVerdictError, OutputError, UsageError, one_line
from hessdiag.files import write_whole
from hessdiag.installed import version
from hessdiag.results import MEASURABLE
from hessdiag.results.fingerprint import MISSING

__all__ = ["SCHEMA", "Baseline", "Field", "Line", "diff", "lock", "read", "text", "updated", "write"]
NAMELESS = 2.0  # seconds after which a lock without a name will get none: it is written at once
UPDATE = 'hessdiag baseline update --reason "..."'


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One metric in two baselines.

    Attributes:
        scope: label of the entry.
        metric: its name.
        old: as it was; None if it is new.
        new: as it is; None if it is gone.
    """

    scope: str
    metric: str
    old: Recorded | None
    new: Recorded | None

    @property
    def changed(self) -> bool:
        """Whether its value or interval differs in the digits a baseline keeps."""
        return _shown(self.old) != _shown(self.new)

    def __str__(self) -> str:
        """``train lambda_max: 80 [79.9, 80.1] → 92 [91.9, 92.1] (+15%)``."""
        share = ""
        if self.old and self.new and self.old.value and self.changed:
            share = f" ({100 * (self.new.value - self.old.value) / abs(self.old.value):+.3g}%)"
        return f"{self.scope} {self.metric}: {_words(self.old)} → {_words(self.new)}{share}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """One field of the fingerprint that differs between two baselines.

    Attributes:
        scope: label of the entry.
        field: its name.
        old: as it was; `MISSING` if it was not recorded.
        new: as it is.
    """

    scope: str
    field: str
    old: Any
    new: Any

    def __str__(self) -> str:
        """``train fingerprint.samples: 512 → 1024``."""
        old, new = shortened(self.field, self.old, self.new)
        return f"{self.scope} fingerprint.{self.field}: {old} → {new}"


def read(path: str | Path) -> Baseline:
    """Read a baseline, in this schema or an older one.

    Raises:
        NoVerdictError: there is no such file: nothing was recorded yet.
        UsageError: truncated, edited into nonsense, of another tool, or of a newer schema.
    """
    file = Path(path)
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        msg = f"no baseline {file}: after hessdiag init, record one with {UPDATE}"
        raise NoVerdictError(msg) from error
    except OSError as error:
        msg = f"cannot read the baseline {file}: {one_line(error)}; name another under [tool.hessdiag.check]"
        raise UsageError(msg) from error
    try:
        return parsed(content.decode())
    except NewerSchemaError as error:
        msg = f"the baseline {file} has {error}, this hessdiag {version()} reads {SCHEMA}: update hessdiag"
        raise UsageError(msg) from error
    except (ValueError, RecursionError) as error:
        way_out = f"restore it (git checkout -- {file}), or delete it and run {UPDATE}"
        if sides(content.decode(errors="replace")):  # git restores no file that it has not merged
            way_out = f"run {UPDATE}, or take one side (git checkout --ours -- {file}, or --theirs)"
        msg = f"the baseline {file} is damaged: {one_line(error, 160)}; {way_out}"
        raise UsageError(msg) from error


def write(path: str | Path, baseline: Baseline) -> Baseline:
    """Write a baseline, whole or not at all.

    Returns:
        It as it will be read back, with `DIGITS` digits.

    Raises:
        NonFiniteError: NaN or infinity in it.
        UsageError: it would not be read back.
        OutputError: the folder cannot be written; an old file is as it was.
    """
    content = text(baseline)
    try:
        recorded = parsed(content)
    except ValueError as error:
        msg = f"cannot record in {path}: {one_line(error)}; measure again"
        raise UsageError(msg) from error
    try:
        write_whole(Path(path).resolve(), content)
    except OutputError as error:
        raise _not_writable(path, error.__cause__ or error) from error
    return recorded


def updated(
    path: str | Path, entries: Mapping[str, Entry], wait: float = 10.0
) -> tuple[Baseline | None, Baseline]:
    """Record entries beside those there, safe against other processes that do the same.

    Args:
        path: of the baseline; made if missing.
        entries: by label; they replace those of the same label.
        wait: seconds for which another process may hold the lock.

    Returns:
        What the file held (None if there was none), and what it holds now.

    Raises:
        UsageError: the file there is damaged; it is left as it is.
        NonFiniteError: NaN or infinity in an entry.
        OutputError: the folder cannot be written, or the lock is not given back in time.
    """
    with lock(path, wait):
        old = before(path)
        return old, write(path, Baseline(entries={**(old.entries if old else {}), **entries}))


def before(path: str | Path) -> Baseline | None:
    """What an update finds: the baseline, what both sides of a merge conflict in it agree on, or None.

    Raises:
        UsageError: the file is damaged.
    """
    try:
        return read(path)
    except NoVerdictError:
        return None
    except UsageError:
        with suppress(OSError, ValueError):
            if (both := agreed(Path(path).read_text(encoding="utf-8"))) is not None:
                return both
        raise


@contextmanager
def lock(path: str | Path, wait: float = 10.0) -> Iterator[None]:
    """Keep other processes from updating a baseline: ``.NAME.lock`` beside it, made exclusively.

    It names its process and host; one whose process is gone from this host is broken, and one that names none: its
    process was killed before it could.

    Args:
        path: of the baseline.
        wait: seconds until giving up. 10: an update holds it for milliseconds.

    Raises:
        OutputError: the folder cannot be written, or the lock is not given back in time.
    """
    from filelock import SoftFileLock, Timeout

    target = Path(path).resolve()
    file = target.parent / f".{target.name}.lock"
    held = SoftFileLock(file, timeout=wait)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.exists() and time.time() - file.stat().st_mtime > NAMELESS and len(file.read_text().split()) < 2:
            file.unlink(missing_ok=True)
        held.acquire()
    except Timeout as error:
        owner = "another process"
        with suppress(OSError, ValueError):
            pid, host = file.read_text().split()[:2]
            owner = f"process {pid} on {host}"
        msg = f"{file} is held by {owner} for more than {wait:g} s: wait for it, or delete the file if it is gone"
        raise OutputError(msg) from error
    except OSError as error:
        raise _not_writable(path, error) from error
    try:
        yield
    finally:
        held.release()


def diff(old: Baseline | None, new: Baseline) -> list[Line | Field]:
    """What changed from one baseline to another, every metric of either in the order of scopes and metrics.

    Args:
        old: None if there was none: everything is new.
        new: the later one.
    """
    found: list[Line | Field] = []
    before = old.entries if old else {}
    for scope in sorted({*before, *new.entries}):
        first, second = before.get(scope), new.entries.get(scope)
        if first and second:
            fields = sorted({*first.fingerprint, *second.fingerprint})
            pairs = [
                (name, first.fingerprint.get(name, MISSING), second.fingerprint.get(name, MISSING))
                for name in fields
            ]
            found += [Field(scope=scope, field=name, old=a, new=b) for name, a, b in pairs if a != b]
        one, other = (entry.metrics if entry else {} for entry in (first, second))
        names = sorted({*one, *other}, key=_order)
        found += [Line(scope=scope, metric=name, old=one.get(name), new=other.get(name)) for name in names]
    return found


def _not_writable(path: str | Path, error: BaseException) -> OutputError:
    cause = one_line(error)
    return OutputError(f"cannot write {path}: {cause}; set another baseline under [tool.hessdiag.check]")


def _order(metric: str) -> tuple[int, str]:
    return (MEASURABLE.index(metric) if metric in MEASURABLE else len(MEASURABLE), metric)


def _shown(recorded: Recorded | None) -> tuple[float, ...]:
    return tuple(map(rounded, (recorded.value, recorded.lo, recorded.hi))) if recorded else ()


def _words(recorded: Recorded | None) -> str:
    return f"{recorded.value:.6g} [{recorded.lo:.6g}, {recorded.hi:.6g}]" if recorded else "none"
