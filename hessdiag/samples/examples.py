"""Examples read by index, each under a seed of its own, and put into batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import TensorDataset, default_collate

from hessdiag.errors import HessdiagError, ProblemError, RaisedError, one_line
from hessdiag.samples.batches import divide, row_count
from hessdiag.samples.digest import Digest, of_example
from hessdiag.samples.reading import Columns, holds_lists, tensors_of, texts_in, with_lists_as_tensors
from hessdiag.samples.sample_set import Asked, SampleSet

WATCHED = 64  # examples after which it is looked whether random numbers were drawn: 50 µs each
READ_AGAIN = 8  # examples read twice more in every case
DRAWING_READ_AGAIN = 32  # likewise where reading draws random numbers: a change of 10% of them is seen by 97%

Collate = Callable[[list[Any]], Any]


class Reader:
    """Reads by key, each under a seed of its own: a larger draw reads the smaller one's examples alike.

    Args:
        read: gives what belongs to a key.
        asked: the draw.
        fixed: whether it is known to draw no random numbers.
    """

    def __init__(self, read: Callable[[Any], Any], asked: Asked, *, fixed: bool = False) -> None:
        self._read, self._asked, self._fixed = read, asked, fixed
        self._count = 0
        self._hashes: dict[int, tuple[Any, str]] = {}
        self._drawing: list[int] = []

    def __call__(self, key: Any) -> Any:
        """What belongs to the key.

        Raises:
            ProblemError: the user's code fails.
        """
        if self._fixed:
            return self._once(key)
        place, generators = self._count, self._asked.generators
        self._count += 1
        self._seed(key)
        before = generators.states() if place < WATCHED else None
        value = self._once(key)
        drawing = before is not None and generators.moved(before)
        if drawing and len(self._drawing) < DRAWING_READ_AGAIN:
            self._drawing.append(place)
        if place < READ_AGAIN or place in self._drawing[-1:]:
            self._hashes[place] = (key, of_example(value))
        return value

    def findings(self, what: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Notes and warnings about random content; a few are read again, under other seeds and the same."""
        asked = self._asked
        for key, before in self._hashes.values():
            self._seed(key, "another")
            changes = self._again(key) != before
            self._seed(key)
            if self._again(key) != before:
                return (), (not_repeatable(asked.where, what),)
            if changes:
                text = (
                    f"{asked.where} draws random numbers when it is read (augmentation?): measured on one draw of "
                )
                return (f"{text}its {what}, the same for `seed={asked.seed}` and another for other seeds",), ()
        if self._drawing:
            text = f"{asked.where} draws random numbers when it is read, but {what} read twice were the same"
            return (text,), ()
        return (), ()

    def _seed(self, key: Any, *names: str) -> None:
        self._asked.generators.seed(self._asked.seed, "read", key, *names)

    def _once(self, key: Any) -> Any:
        try:
            return self._read(key)
        except HessdiagError:
            raise
        except Exception as error:  # the user's code can raise anything
            msg = f"data[{self._asked.split!r}][{key}] raised {type(error).__name__}: {one_line(error, 160)}"
            raise RaisedError(msg) from error

    def _again(self, key: Any) -> str:
        return of_example(self._once(key))


def not_repeatable(where: str, what: str) -> str:
    """The warning that the same seed does not give the same numbers."""
    return (
        f"{where} gives other {what} at every reading, although torch, NumPy and random are seeded: the same seed "
        "will not give the same numbers; measure without augmentation, or seed its own generator"
    )


def from_examples(
    dataset: Any, collate: Collate | None, asked: Asked, indices: Sequence[Any], notes: tuple[str, ...] = ()
) -> SampleSet:
    """A seeded choice among the indices, in batches of ``asked.batch_size``.

    Args:
        dataset: gives an example for an index.
        collate: puts examples into a batch; None where no DataLoader says how.
        asked: the draw.
        indices: those to choose among.
        notes: to be kept with the set.

    Raises:
        ProblemError: there are none, reading one fails, or they do not make a batch.
    """
    chosen, size = asked.chosen(indices)
    number = len(chosen)
    reader = Reader(lambda index: dataset[index], asked, fixed=type(dataset) in (list, TensorDataset, Columns))
    ordinary = collate in (None, default_collate)
    digest, batches, drawing = Digest(), [], None
    for start in range(0, number, size):
        part = chosen[start : start + size]
        examples = [reader(index) for index in part]
        for example in examples:
            digest.example(example)
        if start == 0:
            notes += _about(examples[0], collate, asked)
        if ordinary:
            batches.append(tensors_of(_together(examples, collate, asked)))
            continue
        asked.generators.seed(asked.seed, "collate", start)
        before = asked.generators.states()
        batches.append(tensors_of(_together(examples, collate, asked)))
        if drawing is None and asked.generators.moved(before):
            drawing = (part, batches[-1], start)
    more, warnings = reader.findings("examples")
    if drawing is not None and not warnings:
        part, batch, start = drawing
        examples = [reader(index) for index in part]
        asked.generators.seed(asked.seed, "collate", start, "another")
        if of_example(_together(examples, collate, asked)) != of_example(batch):
            text = (
                f"{asked.where}: its collate_fn draws random numbers (mixup, cropping?): measured on one draw of "
            )
            more += (text + "its batches, which changes with `seed` and `batch_size`",)
            for each in batches:
                digest.batch(each)
    return SampleSet(
        tuple(batches), number, asked.split, asked.seed, digest.hexdigest(), len(indices), notes + more, warnings
    )


def from_lists(dataset: Any, collate: Callable[[Any], Any], asked: Asked, indices: Sequence[Any]) -> SampleSet:
    """The same of a data set that is asked for lists of indices (``DataLoader(batch_size=None)``)."""
    chosen, size = asked.chosen(indices)
    number = len(chosen)
    reader = Reader(lambda part: tensors_of(collate(dataset[list(part)])), asked)
    batches = [reader(tuple(chosen[start : start + size])) for start in range(0, number, size)]
    digest = Digest()
    for batch in batches:
        digest.batch(batch)
    return SampleSet(
        tuple(batches),
        number,
        asked.split,
        asked.seed,
        digest.hexdigest(),
        len(indices),
        *reader.findings("batches"),
    )


def from_whole_batches(
    dataset: Any, collate: Callable[[Any], Any], asked: Asked, indices: Sequence[Any]
) -> SampleSet:
    """Elements that are batches (``DataLoader(batch_size=None)``): taken by seed until there are enough rows."""
    asked.require_some(len(indices))
    reader = Reader(lambda index: tensors_of(collate(dataset[index])), asked)
    found: dict[int, Any] = {}
    examples = 0
    for place in asked.order(len(indices)):
        batch = reader(indices[place])
        if row_count(batch):
            batch = next(divide(batch, asked.most - examples))
        found[place] = batch
        examples += row_count(batch) or 1
        if examples >= asked.most:
            break
    notes: tuple[str, ...] = ()
    if any(row_count(batch) is None for batch in found.values()):
        text = (
            f"{asked.where} has batch_size=None: each element is one batch, and counts as one example where its "
        )
        notes = (text + "tensors share no first dimension",)
    digest, batches = Digest(), []
    for place in sorted(found):
        digest.batch(found[place])
        batches += list(divide(found[place], asked.batch_size)) if asked.batch_size else [found[place]]
    more, warnings = reader.findings("batches")
    return SampleSet(
        tuple(batches), examples, asked.split, asked.seed, digest.hexdigest(), None, notes + more, warnings
    )


def _together(examples: list[Any], collate: Collate | None, asked: Asked) -> Any:
    try:
        return collate(examples) if collate else default_collate([with_lists_as_tensors(one) for one in examples])
    except Exception as error:  # the user's code can raise anything
        msg = f"{asked.where}: examples do not make a batch ({one_line(error, 120)}): give a DataLoader"
        if collate in (None, default_collate):
            msg += " with a collate_fn that pads, or leaves out what is no number"
        raise ProblemError(msg) from error


def _about(example: Any, collate: Collate | None, asked: Asked) -> tuple[str, ...]:
    """What a reader must know when the model does not take the batches."""
    if collate not in (None, default_collate):
        return ()
    notes: tuple[str, ...] = ()
    if texts := texts_in(example):
        text = f"{asked.where} holds text in {', '.join(texts[:4])}, which the model gets as lists of str; if it "
        notes += (text + "takes none: dataset.remove_columns([...]), or forward=",)
    if collate is default_collate and holds_lists(example):
        text = f"{asked.where} holds lists of numbers, which default_collate makes lists of columns: "
        notes += (text + 'dataset.with_format("torch") makes tensors',)
    return notes
