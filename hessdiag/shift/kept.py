"""What shift tests keep: of inputs alone, between checkpoints; scores, so that tests that are killed go on."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from hessdiag import hashing
from hessdiag.errors import OutputError
from hessdiag.installed import version
from hessdiag.operator import as_operator
from hessdiag.problem import Problem
from hessdiag.resume import Kept, Log, Pace, once
from hessdiag.resume.values import restored
from hessdiag.samples import SampleSet
from hessdiag.shift.settings import ShiftSettings

Result = TypeVar("Result")
FIRST = "scores of the test examples"


class Prepared:
    """What the tests need of inputs alone: made once while inputs and settings stay the same."""

    def __init__(self) -> None:
        self._of: tuple[object, ...] = ()
        self._made: dict[str, Any] = {}

    def get(self, name: str, of: tuple[object, ...], make: Callable[[], Any]) -> Any:
        """What ``make`` gives for ``of``, or gave before."""
        if of != self._of:
            self._of, self._made = of, {}
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]


class Passes:
    """The forward passes of one checkpoint, in their order: those of a killed run are taken from it.

    Args:
        kept: None for nothing.
    """

    def __init__(self, kept: Kept | None = None) -> None:
        self._kept, self._operator = kept, as_operator(torch.zeros(1, 1))
        self._operator.kept = kept

    def once(self, what: str, form: Callable[[], Result]) -> Result:
        """What a pass gives."""
        return once(self._operator, what, form)

    def end(self) -> None:
        """Nothing follows: write what is not written."""
        if self._kept is not None:
            self._kept.pause()


class KeptScores:
    """Where the passes of many checkpoints are kept.

    Args:
        folder: made when something is written, 10 seconds after the start; None keeps nothing.
        fresh: take nothing from an earlier run.
    """

    def __init__(self, folder: Path | None = None, *, fresh: bool = False) -> None:
        self.folder, self.fresh, self.pace = folder, fresh, Pace()
        self._all: list[Kept] = []

    def of(
        self,
        problem: Problem,
        samples: Sequence[SampleSet],
        settings: ShiftSettings,
        scores: Tensor,
        say: Callable[[str], None] | None = None,
    ) -> Passes:
        """The passes of a checkpoint.

        Args:
            problem: with its weights.
            samples: drawn from its splits.
            settings: what is tested.
            scores: of the test examples, (n,). They tell other code with the same weights apart.
            say: takes a line if something is taken from an earlier run.
        """
        if self.folder is None:
            return Passes()
        log = Log(self.folder / _name(problem, samples, settings))
        writes, failed = True, None
        try:
            log.read()
            if log.entries and (self.fresh or not _same(log, scores)):
                log.cut(0)
        except (OSError, OutputError) as error:
            writes, failed = False, error
        kept = Kept(log, time.perf_counter(), self.pace, writes=writes)
        if failed is not None:
            kept.give_up(failed)
        if len(log.entries) > 1 and say is not None:
            say(f"goes on from {len(log.entries) - 1} forward passes that a run left; `fresh=True` begins anew")
        self._all.append(kept)
        passes = Passes(kept)
        passes.once(FIRST, partial(torch.clone, scores))
        return passes

    @property
    def notes(self) -> tuple[str, ...]:
        """Why nothing is kept, where that is so."""
        return tuple(dict.fromkeys(note for kept in self._all for note in kept.notes))

    def forget(self) -> None:
        """Remove what was kept: the results are where they were asked for."""
        for kept in self._all:
            kept.forget()


def _name(problem: Problem, samples: Sequence[SampleSet], settings: ShiftSettings) -> str:
    weights = problem.bare_model().state_dict()
    tensors = {name: value for name, value in sorted(weights.items()) if isinstance(value, Tensor)}
    digest = hashing.of_tensors(tensors.values())
    data = [one.digest for one in samples]
    return hashing.key(digest, list(tensors), data, dataclasses.asdict(settings), version(), torch.__version__)


def _same(log: Log, scores: Tensor) -> bool:
    first = log.entries[0]
    with suppress(OSError):
        return first.what == FIRST and torch.equal(restored(first.value, log.tensors(first)), scores)
    return False
