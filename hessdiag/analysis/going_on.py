"""A measurement goes on where an earlier one was killed: under which name that lies, and what is taken from it."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hessdiag import hashing
from hessdiag.analysis.record import COMPUTED_BY
from hessdiag.engine.checks.facts import Finding
from hessdiag.engine.checks.planner import Plan
from hessdiag.engine.checks.preflight import Preflight
from hessdiag.engine.products.curvature import Curvature
from hessdiag.errors import OutputError
from hessdiag.formatting import format_seconds
from hessdiag.results import Fingerprint, SecondOpinion, SelfTest
from hessdiag.resume import Kept, Log
from hessdiag.resume.entry import Entry
from hessdiag.samples import row_count
from hessdiag.settings import Settings

PREFLIGHT = "preflight"  # the first entry
SAME_LOSS, SAME_GRADIENT = 1e-5, 1e-3
"""Relative: sums of a GPU are not in one order, other code with the same weights is further off."""


def name_of(subject: Fingerprint, surroundings: Mapping[str, Any], settings: Settings, checked: Preflight) -> str:
    """A name by all that the course of a measurement depends on, but for the code of the model."""
    computed_by = {name: surroundings[name] for name in COMPUTED_BY}
    batches = [row_count(batch) for batch in checked.operator.samples.batches]
    return hashing.key(dict(subject), computed_by, checked.plan.method, batches, dataclasses.asdict(settings))


def opened(folder: Path, checked: Preflight, begun: float, *, fresh: bool, writes: bool) -> Kept:
    """What an earlier run left in a folder of this measurement alone.

    Args:
        folder: need not be there.
        checked: the preflight, without a fault.
        begun: the clock at which the measurement began.
        fresh: take nothing from it.
        writes: whether this process is the one that writes.
    """
    log = Log(folder)
    try:
        log.read()
        if log.entries and (fresh or not _same(log.entries[0], checked)):
            log.cut(0)
    except (OSError, OutputError) as error:
        kept = Kept(log, begun, writes=False)
        kept.give_up(error)
        return kept
    return Kept(log, begun, writes=writes)


def taken(kept: Kept, checked: Preflight) -> Preflight:
    """The preflight with the numbers of the run that goes on, so that the same floor holds for all of it."""
    text = kept.once(checked.operator, PREFLIGHT, lambda: _text(checked), into=None, place=None, anew=False)
    found: dict[str, Any] = json.loads(text)
    checked.operator.floor = found["floor"]
    opinion = found["second_opinion"]
    return dataclasses.replace(
        checked,
        plan=Plan(**found["plan"]),
        self_test=SelfTest(**found["self_test"]),
        second_opinion=None if opinion is None else SecondOpinion(**opinion),
        findings=tuple(Finding(*one) for one in found["findings"]),
        loss=found["loss"],
        gradient_norm=found["gradient_norm"],
        gradient_seconds=found["gradient_seconds"],
    )


@contextmanager
def keeping(kept: Kept | None, operator: Curvature, halted: Callable[[], bool]) -> Iterator[None]:
    """Keep what the products formed inside give.

    Args:
        kept: None for nothing.
        operator: whose products.
        halted: whether it was told to end: what is formed after that is no part of the whole.
    """
    if kept is None:
        yield
        return
    operator.kept, kept.halted = kept, halted
    try:
        yield
    except BaseException:
        kept.pause()
        raise
    finally:
        operator.kept = None
    if halted():
        kept.pause()


def told(kept: Kept) -> str:
    """One line on what is taken from an earlier run; empty where nothing is."""
    if not kept.products:
        return ""
    last = kept.log.entries[-1]
    before = format_seconds(max(time.time() - last.written, 0.0))
    return (
        f"goes on from {kept.products} products, {format_seconds(last.at)} of measuring, that a run left {before} "
        "ago; `fresh=True` begins anew"
    )


def _text(checked: Preflight) -> str:
    plain = {
        "floor": checked.operator.floor,
        "plan": dataclasses.asdict(checked.plan),
        "self_test": dataclasses.asdict(checked.self_test),
        "second_opinion": checked.second_opinion and dataclasses.asdict(checked.second_opinion),
        "findings": [dataclasses.astuple(finding) for finding in checked.findings],
    }
    numbers = {name: getattr(checked, name) for name in ("loss", "gradient_norm", "gradient_seconds")}
    return json.dumps(plain | numbers)


def _same(first: Entry, checked: Preflight) -> bool:
    """Whether it was the same function: the name does not see the model's code."""
    if first.what != PREFLIGHT:
        return False
    old = json.loads(first.value)
    return _near(old["loss"], checked.loss, SAME_LOSS) and _near(
        old["gradient_norm"], checked.gradient_norm, SAME_GRADIENT
    )


def _near(one: float, other: float, rtol: float) -> bool:
    return abs(one - other) <= rtol * max(abs(one), abs(other))
