"""Many checkpoints measured with their progress shown: for a report, or as one part of a sweep."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, Any

from hessdiag.cli.output import say, tell
from hessdiag.cli.progress import display
from hessdiag.cli.stdout import message, reserve
from hessdiag.errors import MeasurementError, NoVerdictError, OutputError, Refused
from hessdiag.formatting import format_seconds
from hessdiag.shown import counted, plain

if TYPE_CHECKING:
    from hessdiag.gap.record import CheckpointRecord
    from hessdiag.gap.shard import Shard
    from hessdiag.gap.sweep import Finding, Survey

Files = list[tuple[str, str]]
NOT_KEPT = "not_kept"
PAGE = "sweeps"


def measure_all(
    files: Files, how: Survey, jobs: int, *, quiet: bool, debug: bool
) -> tuple[tuple[CheckpointRecord, ...], dict[str, Refused]]:
    """Records in the order of the files, and why the others have none.

    Raises:
        MeasurementError: none could be measured.
        NoVerdictError: none is kept, and no more was asked for.
    """
    found = _found(files, how, jobs, quiet=quiet, debug=debug, line=lambda text: say([text], quiet=quiet))
    records = {one.name: one.record for one in found if one.record is not None}
    failures = {one.name: Refused(one.reason, one.code) for one in found if one.record is None}
    if not records:
        _refuse_missing(files, failures)
        first = next(iter(failures.values()))
        msg = f"none of {len(files)} checkpoints could be measured; the first: {first}"
        raise MeasurementError(msg)
    ordered = tuple(records[name] for name, _ in files if name in records)
    return ordered, {name: failures[name] for name, _ in files if name in failures}


def measure_part(files: Files, how: Survey, shard: Shard, jobs: int, *, quiet: bool, debug: bool) -> None:
    """Measure the files of one part, and print a line of each; records are all that is written.

    Raises:
        MeasurementError: a checkpoint could not be measured.
        OutputError: a record could not be kept.
    """
    mine = [(name, path) for name, path in files if shard.takes(path)]
    say([f"part {shard}: {len(mine)} of {counted(len(files), 'checkpoint')}"], quiet=quiet)
    if not mine:
        return
    found = _found(mine, how, jobs, quiet=quiet, debug=debug, line=tell)
    lost = [one for one in found if one.record is not None and one.reason]
    require(mine, {one.name: Refused(one.reason, one.code) for one in found if one.record is None})
    if lost:
        msg = f"{len(lost)} of {len(mine)} checkpoints were measured in vain: {lost[0].reason}"
        raise OutputError(msg)


def require(files: Files, failures: dict[str, Refused]) -> None:
    """Refuse a survey with failures, once all else is done.

    Raises:
        MeasurementError: a checkpoint could not be measured.
        NoVerdictError: nothing was to be measured, and a record is missing.
    """
    _refuse_missing(files, failures)
    if failures:
        names = plain(", ".join(failures))
        msg = f"{len(failures)} of {len(files)} checkpoints could not be measured: {names}"
        raise MeasurementError(msg)


def _refuse_missing(files: Files, failures: dict[str, Refused]) -> None:
    """List the records that are missing where nothing was to be measured."""
    missing = [name for name, _ in files if name in failures and failures[name].code == NOT_KEPT]
    if missing:
        msg = f"{len(missing)} of {len(files)} checkpoints have no record: {plain(', '.join(missing))}"
        error = NoVerdictError(f"{msg}; without `only_kept` the same command measures them")
        error.page = PAGE
        raise error


def _found(
    files: Files, how: Survey, jobs: int, *, quiet: bool, debug: bool, line: Callable[[str], None]
) -> list[Finding]:
    """What became of each, in the order in which they are done; a line of each as soon as it is."""
    from hessdiag.gap.survey import survey

    done: list[Finding] = []
    left = [name for name, _ in files]
    reserve()
    with display(quiet=quiet) as report:
        report(f"checkpoints: {files[0][0]}", 0, len(files))
        found = survey(files, how, jobs=jobs, report=report, say=_once(quiet=quiet))
        try:
            with closing(found):
                for number, one in enumerate(found, start=1):
                    done.append(one)
                    if debug and one.traceback:
                        message(one.traceback.rstrip(), lines=True)
                    line(_progress(one, number, len(files)))
                    say(_left(one, number, len(files), jobs), quiet=quiet)
                    left.remove(one.name)
                    report(f"checkpoints: {left[0] if left and jobs == 1 else ''}", number, len(files))
        except KeyboardInterrupt:
            again = "the same command" + " without --fresh" * how.fresh
            kept = sum(1 for one in done if one.record is not None and not one.reason)
            say([f"{kept} of {len(files)} are kept: {again} goes on from there"], quiet=quiet)
            raise
    return done


def _once(*, quiet: bool) -> Any:
    """Says the first line it is given: the forecast of the first checkpoint stands for all; None for nobody."""
    if quiet:
        return None
    said: list[str] = []

    def talk(line: str) -> None:
        if not said:
            said.append(line)
            say([line], quiet=False)

    return talk


def _left(one: Finding, number: int, total: int, jobs: int) -> list[str]:
    """After the first: what the others will take, judged by it."""
    if number != 1 or total == 1 or one.record is None or one.kept:
        return []
    seconds = one.record.seconds * (total - 1) / min(jobs, total - 1)
    return [f"by this one the other {total - 1} take about {format_seconds(seconds)}"]


def _progress(one: Finding, number: int, total: int) -> str:
    if one.record is None:
        return plain(f"{number}/{total} {one.name}: {one.reason}") + f" [{one.code}]"
    how = "kept from before" if one.kept else f"{one.record.seconds:.1f} s"
    return plain(f"{number}/{total} {one.name}: {how}" + (f"; {one.reason}" if one.reason else ""))
