"""What is done with each of many files, and what became of one: picklable, for any executor."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

from hessdiag.errors import UsageError
from hessdiag.gap.examine import Examination
from hessdiag.gap.record import CheckpointRecord
from hessdiag.schemes.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What is done with every file; picklable, so that processes and machines can share it.

    Attributes:
        recipe: of the problem.
        asked: the examination.
        start: file of the weights before training.
        from_name: regular expression with named groups, hyper-parameters out of the file's path.
        cache: folder of records, such as `hessdiag.survey.records` gives; None keeps none.
        fresh: measure again what the cache has, and replace it.
        only_kept: measure nothing; a file without a record has failed, with the code "not_kept".
        threads: of torch, per process; None leaves them as they are.

    >>> from hessdiag.survey import Recipe, Survey
    >>> Survey(recipe=Recipe(factory="hessdiag.sources.digits:problem")).fresh
    False
    """

    recipe: Recipe
    asked: Examination = field(default_factory=Examination)
    start: str | None = None
    from_name: str | None = None
    cache: Path | None = None
    fresh: bool = False
    only_kept: bool = False
    threads: int | None = None

    def __post_init__(self) -> None:
        """Refuse what contradicts itself.

        Raises:
            UsageError: the regular expression is wrong or names no group, there is no such measure, or what is
                kept shall be all and is not to be read.
        """
        self.asked.chosen()
        if self.cache is not None:
            object.__setattr__(self, "cache", Path(self.cache))
        if self.only_kept and (self.fresh or self.cache is None):
            wrong = "`fresh=True`: leave one of them out" if self.fresh else "no `cache`: give a folder of records"
            msg = f"`only_kept=True` with {wrong}"
            raise UsageError(msg)
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
    """What became of one file; picklable.

    Attributes:
        name: of the checkpoint.
        record: None if it failed.
        reason: why it failed, or why its record is not kept for a next time; one line.
        kept: whether the record was there already.
        cache: file that the record belongs into; None where it is not to be written.
        traceback: of what it failed by; it comes from another process as text only.
        code: of the failure, out of `hessdiag.errors.CODES`; empty where there is none.
        claim: what the claim on the record is given back by.
        waits: whether another process measures the file now; ``reason`` says which, the code is "claimed".
    """

    name: str
    record: CheckpointRecord | None
    reason: str = ""
    kept: bool = False
    cache: Path | None = None
    traceback: str = ""
    code: str = ""
    claim: str = ""
    waits: bool = False


@dataclass
class Shared:
    """What the files of one survey have in common, found at the first of them.

    Attributes:
        content: of the problem, as `hessdiag.gap.kept.content` gives it; None before it is known, and where it may
            be another for each file.
        meta: of the problem.
    """

    content: str | None = None
    meta: dict[str, object] = field(default_factory=dict)
