"""What was given as data: columns, examples or batches; and refusals where that cannot be told."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from hessdiag.errors import ProblemError
from hessdiag.samples.batches import entries, is_texts, leaves, map_leaves, map_tensors, row_count

Reading = Literal["examples", "batches"]

ALLOWED = "give a Dataset, a DataLoader, a tuple of tensors (inputs, targets) or a list of batches"
BOTH_WAYS = (
    "DataLoader(data, batch_size=16) if each element is one example, DataLoader(data, batch_size=None) if each "
    "is a batch"
)


class Columns(Dataset[Any]):
    """Tensors with a common first dimension, in tuples, lists and mappings; an item is one row of them all."""

    def __init__(self, columns: Any, rows: int) -> None:
        self.columns, self.rows = columns, rows

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Any:
        return map_tensors(self.columns, lambda column: column[index])


def as_columns(source: Any, split: str) -> Dataset[Any] | None:
    """The data set whose rows the source's tensors or arrays hold; None where the source is something else.

    Raises:
        ProblemError: columns of different lengths, or a tuple that could be columns or batches.
    """
    if not isinstance(source, Tensor | np.ndarray | tuple | Mapping) or isinstance(source, str):
        return None
    columns = tensors_of(dict(source) if isinstance(source, Mapping) else source)
    if not _only_arrays(columns):
        if isinstance(source, Mapping):
            msg = f"data[{split!r}] is a {type(source).__name__} whose entries are not all tensors: {ALLOWED}"
            raise ProblemError(msg)
        return None
    sizes = [column.shape[0] if column.dim() else 0 for column in leaves(columns)]
    flat = not isinstance(columns, tuple) or all(isinstance(column, Tensor) for column in columns)
    if not flat and len({_kinds(column) for column in columns}) == 1 and len(columns) > 1:
        if len(set(sizes)) == 1:
            msg = (
                f"data[{split!r}] is a tuple of {len(columns)} alike tuples of tensors: columns or batches? "
                "give a list for batches, a dict of tensors for columns (forward= tells the model which)"
            )
            raise ProblemError(msg)
        return None
    if len(set(sizes)) != 1:
        msg = f"data[{split!r}]: tensors of lengths {sorted(set(sizes))}: inputs and targets must be as many"
        raise ProblemError(msg)
    return TensorDataset(*columns) if flat and isinstance(columns, tuple) else Columns(columns, sizes[0])


def is_map_style(source: Any) -> bool:
    """Whether examples can be read by index."""
    if isinstance(source, IterableDataset | list | tuple | Iterator):
        return False
    has = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    return isinstance(source, Dataset) or (has and not isinstance(source, Mapping | str | bytes | Tensor))


def reading_of(elements: Sequence[Any], split: str) -> tuple[Reading, str]:
    """Whether the elements of a list or an iterable are examples or batches, and the note that goes with it.

    A batch's tensors share their first dimension. An example has a number, a text or a list where a batch has a
    tensor, or vectors of different lengths.

    Args:
        elements: the first two, or one if there is one.
        split: for the refusal.

    Raises:
        ProblemError: they could be either, are of different kinds, or hold nothing that can be measured.
    """
    _refuse_foreign(elements, split)
    one, *other = (plain(element) for element in elements[:2])
    arrays = [leaf for leaf in leaves(one) if leaf.dim()]
    rows, flat = row_count(arrays), all(array.dim() == 1 for array in arrays)
    numbers, texts, lists = _numbers(one), _texts(one), holds_lists(elements[0])
    examples = f"data[{split!r}]: its elements are taken as examples "
    if numbers and (rows is None or len(arrays) == 1 or flat or _target_is_number(one)):
        return "examples", examples + "(they hold single numbers)"
    if flat and rows != texts and (texts == 1 or (lists and rows is not None)):
        return "examples", examples + "(they hold texts or lists of numbers)"
    if numbers:
        _refuse_ambiguous(one, split)
    if not other or not arrays or (rows is not None and (not flat or rows == texts)):
        return "batches", ""
    alike = [leaf.shape for leaf in leaves(one)] == [leaf.shape for leaf in leaves(other[0])]
    if rows is None and flat and alike:
        return "examples", examples + "(they hold vectors of different lengths)"
    if rows is not None or alike:
        _refuse_ambiguous(one, split)
    text = (
        f"data[{split!r}]: each element is one batch, its tensors share no first dimension; if they are examples, "
    )
    return "batches", text + "give DataLoader(data, batch_size=...)"


def plain(element: Any) -> Any:
    """An element of a list with its arrays and inner lists of numbers as tensors."""
    return with_lists_as_tensors(tensors_of(element))


def tensors_of(value: Any) -> Any:
    """The same with NumPy's numeric arrays as tensors; texts and objects stay."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.kind in "biufc":
            array = np.asarray(leaf)
            native = array.astype(array.dtype.newbyteorder("="), copy=not array.flags.writeable)
            return torch.as_tensor(native if all(s >= 0 for s in native.strides) else native.copy())
        return leaf

    return map_leaves(value, one)


def with_lists_as_tensors(example: Any) -> Any:
    """An example whose inner lists of numbers (rows of Hugging Face data sets) are tensors."""

    def numbers(value: Any) -> bool:
        return isinstance(value, list) and value is not example and _rectangular(value) is not None

    return map_leaves(example, lambda leaf: torch.tensor(leaf) if isinstance(leaf, list) else leaf, whole=numbers)


def holds_lists(example: Any) -> bool:
    """Whether it has inner lists of numbers, which torch's default_collate turns on their side."""
    inner = (
        example.values() if isinstance(example, Mapping) else example if isinstance(example, list | tuple) else ()
    )
    return any(isinstance(value, list) and _rectangular(value) is not None for value in inner)


def texts_in(example: Any) -> list[str]:
    """Names of the entries of a mapping that hold text."""
    return (
        [str(key) for key, value in example.items() if isinstance(value, str)]
        if isinstance(example, Mapping)
        else []
    )


def _rectangular(value: Any) -> tuple[int, ...] | None:
    """The shape of nested lists of numbers; None where they are ragged or hold something else."""
    if isinstance(value, bool | int | float):
        return ()
    if not isinstance(value, list) or not value:
        return None
    shapes = {_rectangular(item) for item in value}
    inner = shapes.pop()
    return None if shapes or inner is None else (len(value), *inner)


def _only_arrays(value: Any) -> bool:
    found = entries(value)
    return bool(found) and all(isinstance(leaf, Tensor) for leaf in found)


def _kinds(value: Any) -> tuple[Any, ...]:
    """Structure, types and dimensions, without sizes."""
    keys = tuple(map(str, value)) if isinstance(value, Mapping) else ()
    return (isinstance(value, Tensor), keys, *map(_kind, entries(value, whole=is_texts)))


def _kind(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.dtype, leaf.dim()
    return "number" if isinstance(leaf, bool | int | float) else type(leaf).__name__


def _numbers(value: Any) -> int:
    """How many entries are a single number."""
    return sum(
        not leaf.dim() if isinstance(leaf, Tensor) else isinstance(leaf, bool | int | float)
        for leaf in entries(value)
    )


def _texts(value: Any) -> int:
    """How many texts there are where there are any: 1, or as many as a list of them has."""
    found = entries(value, whole=is_texts)
    return max((1 if isinstance(x, str) else len(x) if is_texts(x) else 0 for x in found), default=0)


def _target_is_number(one: Any) -> bool:
    target: Any = None
    if isinstance(one, Mapping):
        target = next((one[key] for key in ("labels", "label", "target", "targets", "y") if key in one), None)
    elif len(one) > 1:
        target = one[1]
    return isinstance(target, bool | int | float) or (isinstance(target, Tensor) and not target.dim())


def _refuse_foreign(elements: Sequence[Any], split: str) -> None:
    """Elements that are no data, or a list that holds columns."""
    one = elements[0]
    if isinstance(one, str | bytes | int | float | type(None)):
        msg = f"data[{split!r}] holds {type(one).__name__}: {ALLOWED}"
        raise ProblemError(msg)
    if len(elements) == 1:
        return
    first, second = (plain(element) for element in elements[:2])
    lone = [isinstance(element, Tensor) for element in (first, second)]
    if any(lone) and (not all(lone) or _are_columns(first, second)):
        msg = (
            f"data[{split!r}]: its elements are not alike ({_shapes(first)}; {_shapes(second)}): give a tuple "
            "(inputs, targets) of tensors, or a list of batches (inputs, targets)"
        )
        raise ProblemError(msg)


def _are_columns(one: Tensor, other: Tensor) -> bool:
    """Inputs and targets in a list: of different types, or as long as each other but of other rows."""
    if one.dtype != other.dtype or one.dim() != other.dim():
        return True
    return one.dim() > 0 and len(one) == len(other) > 1 and one.shape != other.shape


def _refuse_ambiguous(one: Any, split: str) -> NoReturn:
    msg = f"data[{split!r}]: its elements ({_shapes(one)}) could be examples or batches: give {BOTH_WAYS}"
    raise ProblemError(msg)


def _shapes(value: Any) -> str:
    found = [
        str(tuple(leaf.shape)) if isinstance(leaf, Tensor) else type(leaf).__name__
        for leaf in entries(value, whole=is_texts)
    ]
    kinds = f"{type(value).__name__} of " if not isinstance(value, Tensor) else "tensor "
    return kinds + ", ".join(found[:4]) + (" ..." if len(found) > 4 else "")
