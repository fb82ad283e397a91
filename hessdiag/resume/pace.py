"""How often to write: at most a share of the time, whatever the disk takes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, takewhile

SHARE = 0.02  # of the time
FIRST = 10.0  # seconds before anything is written: what took less is measured again
RATE = 2e8  # bytes per second, until a write has shown it; of a slow network drive
EACH = 0.02  # seconds that a write takes beside its bytes, until one has shown it
SHOWING = 1 << 20  # bytes from which a write shows the rate


class Pace:
    """When to write next.

    Args:
        first: seconds before the first write.
        share: of the time, for writing.

    Attributes:
        spent: seconds of writing so far.
    """

    def __init__(self, first: float | None = None, share: float | None = None) -> None:
        self.first, self.share = FIRST if first is None else first, SHARE if share is None else share
        self.spent, self._begun, self._rate, self._each = 0.0, time.perf_counter(), RATE, EACH

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._begun

    @property
    def worth(self) -> bool:
        """Whether so much time has gone by that what was found in it is worth keeping."""
        return self.elapsed >= self.first

    def due(self, sizes: Sequence[int]) -> int:
        """How many of the results that wait, of so many bytes each, may be written now."""
        if not self.worth:
            return 0
        seconds = self.share * self.elapsed - self.spent - self._each
        within = (total / self._rate <= seconds for total in accumulate(sizes))
        return sum(1 for _ in takewhile(bool, within)) if seconds >= 0 else 0

    @contextmanager
    def writing(self, size: int) -> Iterator[None]:
        """Takes the time of a write of so many bytes."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            took = time.perf_counter() - begun
            self.spent += took
            if size >= SHOWING:
                self._rate = size / max(took, 1e-6)
            else:
                self._each = took
