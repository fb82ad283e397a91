"""What a measurement has found so far: given back in order after a kill, written now and then for the next one."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from torch import Tensor

from hessdiag.errors import OutputError, one_line
from hessdiag.operator import SymmetricOperator
from hessdiag.resume.effects import effects, repeat, with_shown
from hessdiag.resume.entry import Entry
from hessdiag.resume.log import Log
from hessdiag.resume.pace import Pace
from hessdiag.resume.values import LARGE, plain, restored

Result = TypeVar("Result")


class Place(Protocol):
    """Rows of a basis that are held in several tensors."""

    def held(self) -> Mapping[str, Tensor]:
        """These tensors by name; written into, they are the rows."""


def once(
    op: SymmetricOperator,
    what: str,
    form: Callable[[], Result],
    *,
    into: Callable[..., Any] | None = None,
    place: Tensor | Place | None = None,
    anew: bool = False,
) -> Result:
    """What ``form`` gives; where a killed run of the same measurement had it, that, and no product is formed.

    Args:
        op: whose products ``form`` takes; its counters, records and notes are as if they had been formed.
        what: a name, for the file.
        form: gives numbers, texts, arrays and tensors, or tuples of them. Both kinds of run must ask for the same
            results in the same order.
        into: makes the result out of its fields, where it is a dataclass.
        place: rows of a basis that ``form`` fills. Large ones are kept as they are when they are written, and must
            not change but by another call with ``anew``.
        anew: whether these rows take the place of all those that the same run filled before.
    """
    kept: Kept | None = op.kept
    return form() if kept is None else kept.once(op, what, form, into=into, place=place, anew=anew)


@dataclass
class Pending:
    """An entry that is not written yet."""

    entry: Entry
    large: Mapping[str, Tensor]
    rows: Mapping[str, Tensor]

    @property
    def tensors(self) -> Mapping[str, Tensor]:
        """By name."""
        return {**self.large, **self.rows}

    @property
    def size(self) -> int:
        """Its bytes in the file."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Kept:
    """What a run is given back and keeps.

    Args:
        log: read.
        begun: the clock at which the measurement began.
        pace: of writing.
        writes: whether this process writes; of several that run together one does.

    Attributes:
        halted: asked whether the run was told to end: what comes after that is no part of the whole.
        notes: why nothing is kept any more; one line at most.
    """

    def __init__(self, log: Log, begun: float, pace: Pace | None = None, *, writes: bool = True) -> None:
        self.log, self.begun, self.pace, self.writes = log, begun, pace or Pace(), writes
        self.halted: Callable[[], bool] = lambda: False
        self.notes: list[str] = []
        self._pending: list[Pending] = []
        self._next, self._shift, self._over, self._inside = 0, 0.0, False, False
        self._taken: list[float] = []
        self._given = deque(self._coming.clock if self._coming else ())

    @property
    def _coming(self) -> Entry | None:
        """What is given back next."""
        return self.log.entries[self._next] if self._next < len(self.log.entries) else None

    @property
    def products(self) -> int:
        """Products of what is given back."""
        return sum(max(entry.products, default=0) for entry in self.log.entries)

    @property
    def written(self) -> bool:
        """Whether the next run of the same measurement would find something."""
        return bool(self.log.entries)

    def clock(self) -> float:
        """`time.perf_counter`, without what went by between runs; while all is given back, the readings of then.

        A budget therefore counts what was spent before, and is spent in the same way.
        """
        now = self._given.popleft() + self.begun if self._given else self._now()
        self._taken.append(now - self.begun)
        return now

    def _now(self) -> float:
        return time.perf_counter() + self._shift

    def once(
        self,
        op: SymmetricOperator,
        what: str,
        form: Callable[[], Result],
        *,
        into: Callable[..., Any] | None,
        place: Tensor | Place | None,
        anew: bool,
    ) -> Result:
        """As the function `once`."""
        if self._over or self._inside:
            return form()
        entry = self._coming
        if entry is not None and (entry.what, entry.fills) == (what, place is not None):
            found: Result = self._again(op, entry, into, place)
            return found
        if entry is not None:
            self._part()
        return self._form(op, what, form, place, anew)

    def _again(
        self, op: SymmetricOperator, entry: Entry, into: Callable[..., Any] | None, place: Tensor | Place | None
    ) -> Any:
        large = self.log.tensors(entry)
        for name, rows in _held(place).items():
            if name in large:  # later ones of the run have taken their place elsewhere
                rows.copy_(large[name])
        self._next += 1
        self._taken.clear()
        self._shift = self.begun + entry.at - time.perf_counter()
        self._given = deque(self._coming.clock if self._coming else ())
        repeat(op, entry)  # whoever watches sees the clock as it was then
        return restored(entry.value, large, into)

    def _form(
        self,
        op: SymmetricOperator,
        what: str,
        form: Callable[[], Result],
        place: Tensor | Place | None,
        anew: bool,
    ) -> Result:
        taken, self._taken, self._inside = self._taken, [], True
        try:
            with effects(op) as changes:
                result = form()
        finally:
            self._inside = False
        self._taken = []
        if not self.writes or self.halted():
            self._over = True
            return result
        large: dict[str, Tensor] = {}
        entry = Entry(
            number=self._next,
            what=what,
            value=plain(result, large),
            clock=taken,
            at=self._now() - self.begun,
            fills=place is not None,
            anew=anew,
            **changes,
        )
        self._next += 1
        if anew:
            self._forget_places()
        # small ones may be counters that go on
        rows = {name: rows if rows.nbytes >= LARGE else rows.clone() for name, rows in _held(place).items()}
        self._pending.append(Pending(entry, large, rows))
        self._write(self.pace.due([one.size for one in self._pending]))
        return result

    def _forget_places(self) -> None:
        """Rows of the run so far have been overwritten."""
        for one in reversed(self._pending):
            if not one.entry.fills:
                break
            one.rows = {}

    def _write(self, number: int) -> None:
        """Write the first of those that wait."""
        some, self._pending = self._pending[:number], self._pending[number:]
        if not some:
            return
        try:
            with self.pace.writing(sum(one.size for one in some)):
                self.log.append([(with_shown(one.entry), one.tensors) for one in some])
        except (OSError, OutputError) as error:
            self.give_up(error)
            self._pending.clear()

    def _part(self) -> None:
        """This run goes another way than the one before: what that found from here on is of no use."""
        self._given.clear()
        try:
            self.log.cut(self._next)
        except (OSError, OutputError) as error:
            self.give_up(error)

    def give_up(self, error: BaseException) -> None:
        """Keep nothing from here on; what was written before stays."""
        self._over = True
        self.notes.append(f"nothing is kept for a next time: {one_line(error)}")

    def pause(self) -> None:
        """Write what is not written, if it took long enough to be worth it: the run ends here, done or not."""
        self._write(len(self._pending) if self.pace.worth else 0)
        self._pending.clear()
        self._over = True
        self.log.release()

    def forget(self) -> None:
        """Take away what is kept: the result is where it was asked for."""
        self._over = True
        self._pending.clear()
        if self.writes:
            self.log.delete()


def _held(place: Tensor | Place | None) -> Mapping[str, Tensor]:
    if place is None:
        return {}
    return {"rows": place} if isinstance(place, Tensor) else place.held()
