"""The frozen sample set, and what is asked of a draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch

from hessdiag.errors import ProblemError, RaisedError
from hessdiag.samples.randomness import Generators, integer

DEFAULT_SAMPLES = 1024  # λ_max varies by 16 % between subsets of 256 and 12 % at 512 (digits MLP)
DATA_BLOCKS = 8  # batches wanted by default, so that error bars over data exist
LARGEST_BATCH = 128


@dataclass(frozen=True, repr=False)
class SampleSet:
    """Batches in a fixed order, and the hash that names their content.

    Attributes:
        batches: the data, on the CPU.
        examples: number of examples in all of them.
        split: name of the split they came from.
        seed: of the draw.
        digest: sha256 of the content; the same for any division into batches.
        available: size of the split, if known: what its sampler visits.
        notes: facts about the draw that change how the numbers read.
        warnings: why the same draw may not be had again.
    """

    batches: tuple[Any, ...]
    examples: int
    split: str
    seed: int
    digest: str
    available: int | None = None
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def __repr__(self) -> str:
        """How many, of what."""
        whole = "" if self.available is None else f" of {self.available:,}"
        return f"<SampleSet {self.split}: {self.examples:,}{whole} examples in {len(self.batches)} batches>"


@dataclass(frozen=True)
class Asked:
    """One draw: of which split, how many examples, by which seed, in batches of which size."""

    split: str
    samples: int | None
    seed: int
    batch_size: int | None
    generators: Generators

    @property
    def most(self) -> int:
        """How many examples at most."""
        return self.samples or DEFAULT_SAMPLES

    @property
    def where(self) -> str:
        """The source's name in messages."""
        return f"data[{self.split!r}]"

    def order(self, available: int) -> list[int]:
        """A permutation; its beginning of any length is the draw."""
        generator = torch.Generator().manual_seed(integer(self.seed, "samples"))
        order: list[int] = torch.randperm(available, generator=generator).tolist()
        return order

    def chosen(self, indices: Sequence[Any]) -> tuple[list[Any], int]:
        """A seeded choice among the indices, in their order, and the size of its batches.

        Raises:
            ProblemError: there are none.
        """
        self.require_some(len(indices))
        places = sorted(self.order(len(indices))[: self.most])
        return [indices[place] for place in places], self.batch_size or default_batch_size(len(places))

    def require_some(self, number: int) -> None:
        """Refuse a source without examples.

        Raises:
            ProblemError: there are none.
        """
        if number == 0:
            self.refuse("is empty: nothing to measure on")

    def refuse(self, text: str, error: Exception | None = None) -> NoReturn:
        """Refuse the source.

        Raises:
            ProblemError: always; a RaisedError where the source's own code raised.
        """
        msg = f"{self.where} {text}"
        raise (RaisedError if error is not None else ProblemError)(msg) from error


def default_batch_size(samples: int) -> int:
    """An eighth of the samples, so that error bars over data exist; at most 128."""
    return max(1, min(LARGEST_BATCH, samples // DATA_BLOCKS))
