"""Many checkpoint files, one after another or several at once, each kept when it is done."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace

from hessdiag.analysis.measurement import Progress
from hessdiag.errors import UsageError, one_line
from hessdiag.files import keep
from hessdiag.gap import claims
from hessdiag.gap.look import Say, forget, look
from hessdiag.gap.processes import side_by_side
from hessdiag.gap.sweep import Finding, Shared, Survey

NOT_FINITE = "not finite"  # in the reason of a mean over numbers that are none
POLL = 1.0  # seconds between looks at what another process measures


def survey(
    files: Sequence[tuple[str, str]],
    how: Survey,
    *,
    jobs: int = 1,
    report: Progress | None = None,
    say: Say | None = None,
) -> Generator[Finding, None, None]:
    """Examine files, and yield what became of each as it is done.

    A file that cannot be measured is a finding, not an end. Records are kept under ``how.cache`` when they are
    done, by everything they depend on, so that an interrupted survey goes on where it was, and one more file costs
    one more examination. A file that another process measures comes last, when that is done or has ended. Closing
    the iterator ends its processes.

    Args:
        files: (name, path) of each, ``path::entry`` included.
        how: it is done.
        jobs: processes; each loads torch and the data anew.
        report: of progress inside a file, with one job only.
        say: takes the forecast of each file's cost, with one job only.

    Raises:
        UsageError: jobs below 1.
    """
    if jobs < 1:
        msg = f"`jobs={jobs}`: at least 1 is needed"
        raise UsageError(msg)
    alone = jobs == 1 or len(files) == 1 or how.only_kept
    findings = _in_turn(files, how, report, say) if alone else _in_processes(files, how, jobs)
    paths, waiting = dict(files), list[Finding]()
    try:
        with closing(findings):
            for one in findings:
                if one.waits:
                    waiting.append(one)
                else:
                    yield settled(one, how)
        for one in waiting:
            yield settled(_awaited(one, paths[one.name], how, report, say), how)
    finally:
        forget()


def _in_turn(
    files: Sequence[tuple[str, str]], how: Survey, report: Progress | None, say: Say | None
) -> Generator[Finding, None, None]:
    shared = Shared()
    for name, path in files:
        yield look(name, path, how, report, say, shared)


def _in_processes(files: Sequence[tuple[str, str]], how: Survey, jobs: int) -> Generator[Finding, None, None]:
    calls = {name: (name, path, how) for name, path in files}
    for name, found in side_by_side(look, calls, jobs=jobs, threads=how.threads):
        if isinstance(found, Finding):
            yield found
        else:  # a process that died takes the others with it
            reason = f"its process ended ({one_line(found, 120)}): take `jobs=1`"
            yield Finding(name, None, reason, code="process_ended")


def _awaited(one: Finding, path: str, how: Survey, report: Progress | None, say: Say | None) -> Finding:
    """The file's record as another process makes it; measured here, where that ends without one."""
    while one.waits and one.cache is not None:
        while (who := claims.holder(one.cache)) and not one.cache.exists():
            if report is not None:
                report(f"{one.name}: waiting for {who}", 0, 1)
            time.sleep(POLL)
        one = look(one.name, path, how, report, say)
        if one.waits:  # there is a record, and it is another problem's
            time.sleep(POLL)
    return one


def settled(one: Finding, how: Survey) -> Finding:
    """The finding with its record kept; a checkpoint whose loss is no number where it is judged has failed.

    To be called once with what `look` gave, by any process: a record is written whole, and replaces one of the
    same key.

    Args:
        one: what `look` gave.
        how: it was done.

    >>> from hessdiag.survey import Finding, Recipe, Survey, settled
    >>> how = Survey(recipe=Recipe(factory="hessdiag.sources.digits:problem"))
    >>> settled(Finding("last", None, "no such file"), how).reason
    'no such file'
    """
    note = ""
    if one.record is not None and one.cache is not None:
        note = keep(one.cache, one.record.to_json(), how.cache)
        claims.release(one.cache, one.claim)
    for split in one.record.performance.splits if one.record is not None else ():
        if split.split in (how.asked.settings.split, how.asked.test) and NOT_FINITE in split.loss.reason:
            reason = f"{split.loss.reason.removeprefix('cannot tell: ')} in loss on {split.split!r}"
            way_out = "look for overflow or log(0); try `dtype='float64'`"
            return Finding(one.name, None, f"{reason}: {way_out}", code="not_finite")
    return replace(one, reason=note or one.reason)
