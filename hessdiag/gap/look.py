"""One file of many: its record from the cache, or its examination, in whatever process."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from hessdiag.analysis.measurement import Progress
from hessdiag.errors import one_line
from hessdiag.files import record_file
from hessdiag.gap import claims, kept
from hessdiag.gap.examine import About, examine
from hessdiag.gap.failed import refused
from hessdiag.gap.sweep import Finding, Shared, Survey
from hessdiag.schemes.assemble import build
from hessdiag.sources.factory import Built
from hessdiag.sources.facts import from_path, sidecar
from hessdiag.sources.spec import split_key
from hessdiag.sources.weights import Weights, read_weights

Say = Callable[[str], None]
IN_ALL = 6  # times its curvature that a file takes with measures and guard: often more than 5


def look(
    name: str,
    path: str,
    how: Survey,
    report: Progress | None = None,
    say: Say | None = None,
    shared: Shared | None = None,
) -> Finding:
    """Examine one file, or take its record from the cache; the record is written by `settled`.

    To be called in any process of any executor: it raises nothing but Ctrl-C. Cost: an examination
    (`hessdiag.gap.examine.examine`), or reading data and checkpoint.

    Args:
        name: of the checkpoint, in tables.
        path: of its file, ``path::entry`` included.
        how: it is done.
        report: of progress.
        say: takes the forecast of the cost.
        shared: of other files that were looked at just before; None reads the data anew.

    >>> from hessdiag.survey import Recipe, Survey, look
    >>> found = look("last", "none.pt", Survey(recipe=Recipe(factory="hessdiag.sources.digits:problem")))
    >>> found.record is None, found.code
    (True, 'unreadable')
    """
    if how.threads is not None:
        torch.set_num_threads(how.threads)
    try:
        if how.only_kept and shared is not None and shared.content is not None and not how.recipe.trust_pickle:
            return _read_only(name, path, how, shared)
        return _look(name, path, how, report, say, shared if shared is not None else Shared())
    except (Exception, SystemExit) as error:  # the user's model and data can raise anything
        why = refused(error)
        return Finding(name, None, why.reason, traceback=traceback.format_exc(), code=why.code)


def _look(name: str, path: str, how: Survey, report: Progress | None, say: Say | None, shared: Shared) -> Finding:
    built = build(how.recipe, path)
    start = weights_before(how.start, how.recipe.trust_pickle) if how.start else None
    sha256 = built.weights.sha256 if built.weights else kept.digest(path)
    facts = _facts(path, how, built.weights)
    content, note = _content(built, how, shared)
    file = None if content is None else _file(path, how, start, sha256, content, facts, built.problem.meta)
    if file is not None and not how.fresh:
        known = kept.trusted(file, how.asked) if how.only_kept else kept.read(file, built.problem, how.asked)
        if known is not None:
            now = replace(known, name=name, file=path, meta={**facts, **built.problem.meta})
            return Finding(name, now, kept=True)
    if how.only_kept:
        return _not_kept(name, note)
    claim = claims.take(file) if file is not None and not how.fresh else ""
    if claim is None:
        who = claims.holder(file) if file is not None else ""
        reason = f"{who or 'another process'} measures it now"
        return Finding(name, None, reason, cache=file, code="claimed", waits=True)

    def expect(seconds: float) -> None:
        if file is not None and claim:
            claims.expect(file, claim, IN_ALL * seconds)

    try:
        record = examine(
            built.problem,
            how.asked,
            About(name=name, file=path, sha256=sha256, facts=facts, notes=built.notes),
            start=start.state if start else None,
            report=report,
            say=say,
            expect=expect if claim else None,
        )
    except BaseException:
        if file is not None:
            claims.release(file, claim)
        raise
    return Finding(name, record, note, cache=file, claim=claim)


def _read_only(name: str, path: str, how: Survey, shared: Shared) -> Finding:
    """A record by the key alone: of the problem only the checkpoint is read."""
    weights = read_weights(path, trust_pickle=how.recipe.trust_pickle)
    start = weights_before(how.start, how.recipe.trust_pickle) if how.start else None
    facts = _facts(path, how, weights)
    file = _file(path, how, start, weights.sha256, str(shared.content), facts, shared.meta)
    known = kept.trusted(file, how.asked) if file is not None else None
    if known is None:
        return _not_kept(name)
    meta = {**facts, **shared.meta}
    return Finding(name, replace(known, name=name, file=path, meta=meta), kept=True)


def _not_kept(name: str, reason: str = "") -> Finding:
    return Finding(name, None, reason or "no record is kept: measure it, without `only_kept`", code="not_kept")


def _facts(path: str, how: Survey, weights: Weights | None) -> dict[str, object]:
    return {**(weights.facts if weights else {}), **sidecar(path), **from_path(path, how.from_name)}


def _content(built: Built, how: Survey, shared: Shared) -> tuple[str | None, str]:
    """What the problem is, as a record's name has it; None, with the reason, where that cannot be told."""
    if how.cache is None:
        return None, ""
    by_hessdiag = how.recipe.factory is not None and built.weights is not None
    content = shared.content if by_hessdiag else None
    if content is None:
        try:
            content = kept.content(built.problem, how.asked, tensors=built.weights is None)
        except Exception as error:  # the measurement will say it better
            return None, f"nothing is kept for a next time: {one_line(error, 120)}"
    if by_hessdiag:  # the factory does not know the checkpoint: it makes the same problem for each
        shared.content, shared.meta = content, dict(built.problem.meta)
    return content, ""


def _file(
    path: str,
    how: Survey,
    start: Weights | None,
    sha256: str,
    content: str,
    facts: Mapping[str, object],
    meta: Mapping[str, object],
) -> Path | None:
    """Where the record lies; None where none is kept."""
    if how.cache is None:
        return None
    before = (start.sha256 + start.key) if start else ""
    run = kept.of_the_run(facts, meta, how.asked)
    parts = (sha256, split_key(path)[1], how.recipe.identity(), content, before, run)
    return record_file(how.cache, kept.key(*parts, asked=how.asked))


@lru_cache(maxsize=1)
def weights_before(path: str, trust_pickle: bool) -> Weights:
    """The weights before training: the same for every checkpoint of a survey, and as large as each."""
    return read_weights(path, trust_pickle=trust_pickle)


def forget() -> None:
    """Let go of the weights before training."""
    weights_before.cache_clear()
