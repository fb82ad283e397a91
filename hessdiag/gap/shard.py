"""Which of many files one of several jobs takes: by a hash of the path, so that a new file moves no other."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from hessdiag.errors import UsageError
from hessdiag.hashing import sha256
from hessdiag.sources.many import place_of

AUTO = "auto"
FORM = re.compile(r"(\d{1,9})/(\d{1,9})")
ARRAY = tuple(f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "STEP", "COUNT"))
"""What Slurm tells each job of an array; STEP may be missing and is then 1."""


@dataclass(frozen=True)
class Shard:
    """One of ``count`` parts of any set of files.

    Attributes:
        index: of the part, from 0.
        count: of all parts.
    """

    index: int
    count: int

    @classmethod
    def of(cls, text: str, environment: Mapping[str, str] = os.environ) -> Shard:
        """Read ``3/16`` or ``auto``.

        Parts may be counted from 0 or from 1, as an array is: 16/16 is 0/16, so that 0 to 15 and 1 to 16 both
        name all sixteen.

        Args:
            text: as given; "auto" asks Slurm.
            environment: that Slurm speaks through.

        Raises:
            UsageError: neither, a part that does not exist, no array, or one with gaps.

        >>> Shard.of("3/16"), Shard.of("16/16") == Shard.of("0/16")
        (Shard(index=3, count=16), True)
        """
        if text == AUTO:
            return _of_array(environment)
        found = FORM.fullmatch(text)
        if found is None:
            msg = (
                f"`shard={text!r}`: allowed: 3/16, the fourth of 16 parts counted from 0, or auto in a Slurm array"
            )
            raise UsageError(msg)
        index, count = int(found[1]), int(found[2])
        if not 0 <= index <= count or count == 0:
            msg = f"`shard={text!r}`: of {count} parts there are 0/{count} to {max(count - 1, 0)}/{count}, "
            raise UsageError(msg + f"or counted from 1, 1/{count} to {count}/{count}")
        return cls(index % count, count)

    def __str__(self) -> str:
        """As it is given."""
        return f"{self.index}/{self.count}"

    def takes(self, path: str) -> bool:
        """Whether a checkpoint is of this part, whatever folder it is named from; its links are followed."""
        return int(sha256(place_of(path)).hexdigest(), 16) % self.count == self.index


def _of_array(environment: Mapping[str, str]) -> Shard:
    """The job's place in its array, wherever that begins and in whatever steps it goes."""
    given = {name: environment.get(name, "1" if name.endswith("STEP") else "") for name in ARRAY}
    wrong = [name for name, value in given.items() if not value.isdecimal()]
    if wrong:
        what = f"{wrong[0]} is {given[wrong[0]]!r}" if given[wrong[0]] else f"no {wrong[0]} is set"
        msg = f"`shard='auto'`: {what}, so this is no job of a Slurm array: give 3/16"
        raise UsageError(msg)
    task, first, last, step, count = (int(given[name]) for name in ARRAY)
    index, beside = divmod(task - first, max(step, 1))
    if beside or not first <= task <= last or (last - first) // max(step, 1) + 1 != count:
        msg = (
            f"`shard='auto'`: task {task} of {count} from {first} to {last} by {step}: an array with gaps does "
            "not say how many parts there are: give `shard='3/16'`"
        )
        raise UsageError(msg)
    return Shard(index, count)
