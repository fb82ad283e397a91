"""Many checkpoint files, one after another or several at once, each kept when it is done."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import torch

from hessdiag.analysis.measurement import Progress
from hessdiag.errors import HessdiagError, UsageError, one_line
from hessdiag.files import keep
from hessdiag.gap import kept
from hessdiag.gap.examine import About, Examination, examine
from hessdiag.gap.processes import side_by_side
from hessdiag.gap.record import CheckpointRecord
from hessdiag.schemes.assemble import build
from hessdiag.schemes.recipe import Recipe
from hessdiag.sources.facts import from_path, sidecar
from hessdiag.sources.spec import split_key
from hessdiag.sources.weights import Weights, read_weights

Say = Callable[[str], None]
NOT_FINITE = "not finite"  # in the reason of a mean over numbers that are none


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What is done with every file; picklable, so that processes can share it.

    Attributes:
        recipe: of the problem.
        asked: the examination.
        start: file of the weights before training.
        from_name: regular expression with named groups, hyper-parameters out of the file's path.
        cache: folder of records; None keeps none.
        fresh: measure again what the cache has, and replace it.
        threads: per process.
    """

    recipe: Recipe
    asked: Examination = field(default_factory=Examination)
    start: str | None = None
    from_name: str | None = None
    cache: Path | None = None
    fresh: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        """Refuse a pattern that is none.

        Raises:
            UsageError: the regular expression is wrong or names no group, or there is no such measure.
        """
        self.asked.chosen()
        if self.from_name is not None:
            try:
                groups = re.compile(self.from_name).groupindex
            except re.error as error:
                msg = f"`meta_from={self.from_name!r}` is no regular expression ({error}): write lr(?P<lr>[0-9.]+)"
                raise UsageError(msg) from error
            if not groups:
                msg = f"`meta_from={self.from_name!r}`: names nothing; write groups as (?P<lr>[0-9.]+)"
                raise UsageError(msg)


@dataclass(frozen=True)
class Finding:
    """What became of one file.

    Attributes:
        name: of the checkpoint.
        record: None if it failed.
        reason: why it failed, or why its record is not kept for a next time; one line.
        kept: whether the record was there already.
        cache: file that the record belongs into; None where it is not to be written.
        traceback: of what it failed by; it comes from another process as text only.
    """

    name: str
    record: CheckpointRecord | None
    reason: str = ""
    kept: bool = False
    cache: Path | None = None
    traceback: str = ""


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
    one more examination. Closing the iterator ends its processes.

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
    alone = jobs == 1 or len(files) == 1
    findings = _in_turn(files, how, report, say) if alone else _in_processes(files, how, jobs)
    try:
        with closing(findings):
            for one in findings:
                yield _settled(one, how)
    finally:
        _weights_before.cache_clear()


def _in_turn(
    files: Sequence[tuple[str, str]], how: Survey, report: Progress | None, say: Say | None
) -> Generator[Finding, None, None]:
    for name, path in files:
        yield look(name, path, how, report, say)


def _in_processes(files: Sequence[tuple[str, str]], how: Survey, jobs: int) -> Generator[Finding, None, None]:
    calls = {name: (name, path, how) for name, path in files}
    for name, found in side_by_side(look, calls, jobs=jobs, threads=how.threads):
        if isinstance(found, Finding):
            yield found
        else:  # a process that died takes the others with it
            yield Finding(name, None, f"its process ended ({one_line(found, 120)}): take `jobs=1`")


def look(name: str, path: str, how: Survey, report: Progress | None = None, say: Say | None = None) -> Finding:
    """Examine one file, or take its record from the cache; nothing is written."""
    if how.threads is not None:
        torch.set_num_threads(how.threads)
    try:
        return _look(name, path, how, report, say)
    except (Exception, SystemExit) as error:  # the user's model and data can raise anything
        return Finding(name, None, _why(error), traceback=traceback.format_exc())


def _why(error: BaseException) -> str:
    if isinstance(error, HessdiagError):
        return one_line(error)
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return f"out of memory ({one_line(error, 120)}): take fewer `samples`"
    return f"unexpected {type(error).__name__}: {one_line(error, 200)}"


def _look(name: str, path: str, how: Survey, report: Progress | None, say: Say | None) -> Finding:
    built = build(how.recipe, path)
    weights = built.weights
    sha256 = weights.sha256 if weights else kept.digest(path)
    of_file = weights.facts if weights else {}
    facts = {**of_file, **sidecar(path), **from_path(path, how.from_name)}
    start = _weights_before(how.start, how.recipe.trust_pickle) if how.start else None
    file = how.cache / f"{_key(sha256, path, how, start)}.json" if how.cache else None
    known = kept.read(file, built.problem, how.asked) if file is not None and not how.fresh else None
    if known is not None:
        now = replace(known, name=name, file=path, meta={**facts, **built.problem.meta})
        return Finding(name, now, kept=True)
    about = About(name=name, file=path, sha256=sha256, facts=facts, notes=built.notes)
    before = start.state if start else None
    record = examine(built.problem, how.asked, about, start=before, report=report, say=say)
    return Finding(name, record, cache=file)


@lru_cache(maxsize=1)
def _weights_before(path: str, trust_pickle: bool) -> Weights:
    """The weights before training: the same for every checkpoint of a survey, and as large as each."""
    return read_weights(path, trust_pickle=trust_pickle)


def _key(sha256: str, path: str, how: Survey, start: Weights | None) -> str:
    before = (start.sha256 + start.key) if start else ""
    return kept.key(sha256, split_key(path)[1], how.recipe.identity(), before, asked=how.asked)


def _settled(one: Finding, how: Survey) -> Finding:
    """The finding with its record kept; a checkpoint whose loss is no number where it is judged has failed."""
    note = ""
    if one.record is not None and one.cache is not None:
        note = keep(one.cache, one.record.to_json())
    for split in one.record.performance.splits if one.record is not None else ():
        if split.split in (how.asked.settings.split, how.asked.test) and NOT_FINITE in split.loss.reason:
            reason = f"{split.loss.reason.removeprefix('cannot tell: ')} in loss on {split.split!r}"
            return Finding(one.name, None, f"{reason}: look for overflow or log(0); try `dtype='float64'`")
    return replace(one, reason=note or one.reason)
