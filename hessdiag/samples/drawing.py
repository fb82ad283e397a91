"""Which examples are measured: among those the user's loader would visit, by seed, in a fixed order."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch.utils.data import DataLoader, IterableDataset

from hessdiag.errors import UsageError, one_line
from hessdiag.samples.examples import from_examples, from_lists, from_whole_batches
from hessdiag.samples.randomness import Generators
from hessdiag.samples.reading import as_columns, is_map_style
from hessdiag.samples.sample_set import Asked, SampleSet
from hessdiag.samples.streams import from_elements
from hessdiag.samples.visited import visited


def draw(
    source: Any, *, split: str = "train", samples: int | None = None, seed: int = 0, batch_size: int | None = None
) -> SampleSet:
    """Draw the sample set of a split.

    Random numbers that reading draws are seeded, and every generator is put back afterwards.

    Args:
        source: map-style dataset; ``DataLoader``, whose sampler says which examples there are; tensors with a
            common first dimension in a tuple or dict; list of examples; or list or other iterable of batches
            (taken from the beginning, in its own order).
        split: its name, for the record.
        samples: how many examples; by default 1024, or all if there are fewer. A smaller draw of the same
            seed is part of a larger one.
        seed: of the draw.
        batch_size: examples per batch; by default an eighth of the samples, at most 128.

    Raises:
        UsageError: samples or batch_size below 1.
        ProblemError: the data set is empty, its examples cannot be put into batches, or which examples are meant
            cannot be told.

    >>> import hessdiag, torch
    >>> hessdiag.draw((torch.randn(100, 5), torch.randn(100, 1)), samples=32)
    <SampleSet train: 32 of 100 examples in 8 batches>
    """
    for name, value in (("samples", samples), ("batch-size", batch_size)):
        if value is not None and value < 1:
            msg = f"--{name} {value}: at least 1 is needed"
            raise UsageError(msg)
    generators = Generators(source)
    asked = Asked(split, samples, seed, batch_size, generators)
    with generators.kept():
        if isinstance(source, DataLoader):
            return _from_loader(source, asked)
        columns = as_columns(source, split)
        data = source if columns is None else columns
        if is_map_style(data):
            return from_examples(data, None, asked, range(_length(data, asked)))
        return from_elements(data, asked)


def _from_loader(loader: DataLoader[Any], asked: Asked) -> SampleSet:
    if isinstance(loader.dataset, IterableDataset) or type(loader).__iter__ is not DataLoader.__iter__:
        return from_elements(loader, asked, loader=True)
    found = visited(loader, asked.split, asked.generators, asked.seed)
    if loader.batch_sampler is not None:
        return from_examples(loader.dataset, loader.collate_fn, asked, found.indices, found.notes)
    make = from_lists if found.listed else from_whole_batches
    drawn = make(loader.dataset, loader.collate_fn, asked, found.indices)
    return replace(drawn, notes=found.notes + drawn.notes)


def _length(dataset: Any, asked: Asked) -> int:
    try:
        return len(dataset)
    except Exception as error:  # the user's code can raise anything
        text = f"({type(dataset).__name__}) has no length ({one_line(error, 100)}): define __len__, or give a "
        asked.refuse(f"{text}DataLoader with sampler=", error)
