"""Many checkpoint files, one after another or several at once, each kept when it is done."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from hessdiag.errors import HessdiagError, UsageError, one_line
from hessdiag.files import keep
from hessdiag.generalization import kept
from hessdiag.generalization.examine import About, Examination, Report, examine
from hessdiag.generalization.record import CheckpointRecord
from hessdiag.sources.factory import build_problem
from hessdiag.sources.facts import from_path, sidecar
from hessdiag.sources.spec import split_key, split_spec
from hessdiag.sources.weights import read_weights

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What is done with every file; picklable, so that processes can share it.

    Attributes:
        factory: ``path/file.py:function`` or ``package.module:function``.
        options: of the factory.
        app_dir: where modules are looked for.
        trust_pickle: let checkpoints run code.
        asked: the examination.
        start: file of the weights before training.
        from_name: regular expression with named groups, hyper-parameters out of the file's path.
        cache: folder of records; None keeps none.
        threads: per process.
    """

    factory: str
    options: Mapping[str, Any] = field(default_factory=dict)
    app_dir: str | None = None
    trust_pickle: bool = False
    asked: Examination = field(default_factory=Examination)
    start: str | None = None
    from_name: str | None = None
    cache: Path | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        """Refuse a pattern that is none.

        Raises:
            UsageError: the regular expression is wrong or names no group.
        """
        if self.from_name is not None:
            try:
                groups = re.compile(self.from_name).groupindex
            except re.error as error:
                msg = f"--meta-from {self.from_name!r} is no regular expression ({error}): write lr(?P<lr>[0-9.]+)"
                raise UsageError(msg) from error
            if not groups:
                msg = f"--meta-from {self.from_name!r}: names nothing; write groups as (?P<lr>[0-9.]+)"
                raise UsageError(msg)


@dataclass(frozen=True)
class Finding:
    """What became of one file.

    Attributes:
        name: of the checkpoint.
        record: None if it failed.
        reason: why it failed, one line.
        kept: whether the record was there already.
    """

    name: str
    record: CheckpointRecord | None
    reason: str = ""
    kept: bool = False


def survey(
    files: Sequence[tuple[str, str]],
    how: Survey,
    *,
    jobs: int = 1,
    report: Report | None = None,
    say: Say | None = None,
) -> Iterator[Finding]:
    """Examine files, and yield what became of each as it is done.

    A file that cannot be measured is a finding, not an end. Records are kept under ``how.cache`` when they are
    done, by everything they depend on, so that an interrupted survey goes on where it was, and one more file costs
    one more examination.

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
        msg = f"--jobs {jobs}: at least 1 is needed"
        raise UsageError(msg)
    if jobs == 1 or len(files) == 1:
        for name, path in files:
            yield look(name, path, how, report, say)
        return
    context = get_context("spawn")  # a forked torch hangs in its own threads
    with ProcessPoolExecutor(min(jobs, len(files)), mp_context=context) as pool:
        waiting: set[Future[Finding]] = {pool.submit(look, name, path, how) for name, path in files}
        names = dict(zip(waiting, [name for name, _ in files], strict=True))
        try:
            while waiting:
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    error = future.exception()
                    if error is None:
                        yield future.result()
                    else:  # a process that died takes the pool with it
                        yield Finding(names[future], None, f"its process ended ({one_line(error, 120)}): --jobs 1")
        finally:
            for future in waiting:
                future.cancel()


def look(name: str, path: str, how: Survey, report: Report | None = None, say: Say | None = None) -> Finding:
    """Examine one file, or take its record from the cache."""
    if how.threads is not None:
        torch.set_num_threads(how.threads)
    try:
        return _look(name, path, how, report, say)
    except HessdiagError as error:
        return Finding(name, None, one_line(error))
    except MemoryError as error:
        return Finding(name, None, f"out of memory ({one_line(error, 120)}): fewer --samples")


def _look(name: str, path: str, how: Survey, report: Report | None, say: Say | None) -> Finding:
    built = build_problem(
        how.factory, checkpoint=path, options=how.options, app_dir=how.app_dir, trust_pickle=how.trust_pickle
    )
    weights = built.weights
    sha256 = weights.sha256 if weights else kept.digest(path)
    of_file = weights.facts if weights else {}
    facts = {**of_file, **sidecar(path), **from_path(path, how.from_name)}
    file = how.cache / f"{_key(sha256, path, how)}.json" if how.cache else None
    if file is not None and (known := kept.read(file, built.problem, how.asked)) is not None:
        now = replace(known, name=name, file=path, meta={**facts, **built.problem.meta})
        return Finding(name, now, kept=True)
    start = read_weights(how.start, trust_pickle=how.trust_pickle).state if how.start else None
    about = About(name=name, file=path, sha256=sha256, facts=facts, notes=built.notes)
    record = examine(built.problem, how.asked, about, start=start, report=report, say=say)
    note = keep(file, record.to_json()) if file is not None else ""
    return Finding(name, record, note)


def _key(sha256: str, path: str, how: Survey) -> str:
    where, _ = split_spec(how.factory)
    code = kept.digest(where) if where.endswith(".py") else ""
    start = kept.digest(how.start) if how.start else ""
    return kept.key(sha256, split_key(path)[1], how.factory, code, dict(how.options), start, asked=how.asked)
