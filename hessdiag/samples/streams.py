"""Lists and iterables: of batches, taken from the beginning; of examples, put into batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from hessdiag.errors import HessdiagError, one_line
from hessdiag.samples.batches import divide, row_count
from hessdiag.samples.digest import Digest, of_example
from hessdiag.samples.examples import from_examples, not_repeatable
from hessdiag.samples.reading import plain, reading_of, tensors_of
from hessdiag.samples.sample_set import Asked, SampleSet


def from_elements(source: Any, asked: Asked, *, loader: bool = False) -> SampleSet:
    """The beginning of an iterable, in its own order; of a list of examples a choice by seed.

    Args:
        source: read again from its beginning by every measurement.
        asked: the draw.
        loader: whether its elements are batches for sure.

    Raises:
        ProblemError: no iterable, one that can be read only once, empty, or of elements that could be either.
    """
    if isinstance(source, Iterator):
        text = f"is a {type(source).__name__}, which can be read only once, but is read by every measurement: "
        asked.refuse(text + "give a list, for example list(itertools.islice(batches, 32))")
    if not isinstance(source, Iterable):
        asked.refuse(f"is {type(source).__name__}: give a Dataset, a DataLoader or a list of batches")
    notes: tuple[str, ...] = ()
    asked.generators.seed(asked.seed, "stream")
    with _reading(source, asked) as iterator:
        begin = list(islice(iterator, 1 if loader else 2))
        asked.require_some(len(begin))
        if not loader:
            kind, note = reading_of(begin, asked.split)
            notes += (note,) if note else ()
            if kind == "examples":
                return _of_examples(source, [*begin, *islice(iterator, max(0, asked.most - 2))], asked, notes)
        found = _of_batches(begin, iterator, asked, loader=loader)
    if getattr(source, "num_workers", 0) > 1 and _repeats(found):
        text = f"{asked.where}: its workers give the same batches, each counted as often as it comes: "
        notes += (
            text + "num_workers=0 gives each once, or divide the stream by torch.utils.data.get_worker_info()",
        )
    more, warnings = _findings(source, begin[0], asked)
    return replace(found, notes=notes + more, warnings=warnings)


def _of_examples(source: Any, begin: list[Any], asked: Asked, notes: tuple[str, ...]) -> SampleSet:
    if isinstance(source, list | tuple):
        examples = [tensors_of(one) for one in source]
        return from_examples(examples, None, asked, range(len(examples)), notes)
    examples = [tensors_of(one) for one in begin[: asked.most]]
    found = from_examples(examples, None, asked, range(len(examples)), notes)
    more, warnings = _findings(source, begin[0], asked)
    return replace(found, available=None, notes=found.notes + more, warnings=found.warnings + warnings)


def _of_batches(begin: list[Any], rest: Iterator[Any], asked: Asked, *, loader: bool) -> SampleSet:
    digest, batches, examples = Digest(), [], 0
    for element in chain(begin, rest):
        batch = tensors_of(element) if loader else plain(element)
        kept = next(divide(batch, asked.most - examples)) if row_count(batch) else batch
        examples += row_count(kept) or 1
        digest.batch(kept)
        batches += list(divide(kept, asked.batch_size)) if asked.batch_size else [kept]
        if examples >= asked.most:
            break
    return SampleSet(tuple(batches), examples, asked.split, asked.seed, digest.hexdigest())


def _repeats(found: SampleSet) -> bool:
    hashes = [of_example(batch) for batch in found.batches]
    return len(set(hashes)) < len(hashes)


def _findings(source: Any, first: Any, asked: Asked) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Notes and warnings about an iterable whose content changes: its first element is read twice more."""
    if isinstance(source, list | tuple):
        return (), ()
    before = of_example(first)
    asked.generators.seed(asked.seed, "stream", "another")
    changes = _first(source, asked) != before
    asked.generators.seed(asked.seed, "stream")
    if _first(source, asked) != before:
        return (), (not_repeatable(asked.where, "batches"),)
    if changes:
        text = (
            f"{asked.where} gives other batches at every reading (shuffled or random): measured on the beginning "
        )
        return (f"{text}of one, the same for `seed={asked.seed}`",), ()
    return (), ()


def _first(source: Any, asked: Asked) -> str:
    with _reading(source, asked) as iterator:
        begin = list(islice(iterator, 1))
    if not begin:
        asked.refuse("gives nothing at its second reading: give a list of its batches, list(...)")
    return of_example(begin[0])


@contextmanager
def _reading(source: Any, asked: Asked) -> Iterator[Iterator[Any]]:
    """An iterator over the source; what its code raises becomes a refusal, and a generator is ended."""
    iterator: Any = None
    try:
        iterator = iter(source)
        yield iterator
    except HessdiagError:
        raise
    except Exception as error:  # the user's code can raise anything
        text = f"raised {type(error).__name__} while it was read: {one_line(error, 160)}"
        asked.refuse(text, error)
    finally:
        if hasattr(iterator, "close"):
            iterator.close()
