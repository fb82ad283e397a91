"""The frozen sample set: drawn once by seed, hashed, and never reshuffled.

Batches are opaque: tensors, and tuples, lists and mappings of them, to any depth.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset, default_collate

from hessdiag.errors import ProblemError, UsageError, one_line

DEFAULT_SAMPLES = 1024  # λ_max varies by 16 % between subsets of 256 and 12 % at 512 (digits MLP)
DATA_BLOCKS = 8  # batches wanted by default, so that error bars over data exist
LARGEST_BATCH = 128


@dataclass(frozen=True)
class SampleSet:
    """Batches in a fixed order, and the hash that names their content.

    Attributes:
        batches: the data, on the CPU.
        examples: number of examples in all of them.
        split: name of the split they came from.
        seed: of the draw.
        digest: sha256 of the content; the same for any division into batches.
        available: size of the split, if known.
    """

    batches: tuple[Any, ...]
    examples: int
    split: str
    seed: int
    digest: str
    available: int | None = None


def draw(
    source: Any, *, split: str = "train", samples: int | None = None, seed: int = 0, batch_size: int | None = None
) -> SampleSet:
    """Draw the sample set of a split.

    Args:
        source: map-style dataset, ``DataLoader``, tuple of tensors with a common first dimension, or an
            iterable of batches (taken from the beginning, in its own order).
        split: its name, for the record.
        samples: how many examples; by default 1024, or all if there are fewer. A smaller draw of the same
            seed is part of a larger one.
        seed: of the draw.
        batch_size: examples per batch; by default an eighth of the samples, at most 128.

    Raises:
        UsageError: samples or batch_size below 1.
        ProblemError: the data set is empty, or its examples cannot be put into batches.
    """
    for name, value in (("samples", samples), ("batch-size", batch_size)):
        if value is not None and value < 1:
            msg = f"--{name} {value}: at least 1 is needed"
            raise UsageError(msg)
    if isinstance(source, tuple) and source and all(isinstance(item, Tensor) for item in source):
        source = _tensor_dataset(source, split)
    collate: Callable[[list[Any]], Any] = default_collate
    if isinstance(source, DataLoader) and not isinstance(source.dataset, IterableDataset):
        collate, source = source.collate_fn or default_collate, source.dataset
    if _is_map_style(source):
        return _from_dataset(source, collate, split, samples, seed, batch_size)
    return _from_batches(source, split, samples or DEFAULT_SAMPLES, seed, batch_size)


def row_count(batch: Any) -> int | None:
    """The common first dimension of a batch's tensors, or None if they have none in common."""
    sizes = {leaf.shape[0] if leaf.dim() else -1 for leaf in leaves(batch)}
    return sizes.pop() if len(sizes) == 1 and -1 not in sizes else None


def map_tensors(batch: Any, function: Callable[[Tensor], Any]) -> Any:
    """The batch with ``function`` applied to every tensor in it."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        items = {key: map_tensors(value, function) for key, value in batch.items()}
        return items if isinstance(batch, dict) and type(batch) is dict else type(batch)(items)  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(value, function) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(map_tensors(value, function) for value in batch)
    return batch


def leaves(batch: Any) -> list[Tensor]:
    """Every tensor of a batch, in a fixed order."""
    found: list[Tensor] = []
    map_tensors(batch, found.append)
    return found


def divide(batch: Any, rows: int) -> Iterator[Any]:
    """The batch in pieces of at most ``rows`` examples; whole where its tensors share no first dimension."""
    total = row_count(batch)
    if total is None or total <= rows:
        yield batch
        return
    for start in range(0, total, rows):
        yield map_tensors(batch, lambda leaf, start=start: leaf[start : start + rows])  # type: ignore[misc]


def _tensor_dataset(tensors: tuple[Tensor, ...], split: str) -> TensorDataset:
    sizes = {tensor.shape[0] if tensor.dim() else 0 for tensor in tensors}
    if len(sizes) != 1:
        msg = f"data[{split!r}]: tensors of lengths {sorted(sizes)}: inputs and targets must be as many"
        raise ProblemError(msg)
    return TensorDataset(*tensors)


def _is_map_style(source: Any) -> bool:
    if isinstance(source, IterableDataset | DataLoader | list | tuple | Iterator):
        return False
    has = hasattr(source, "__getitem__") and hasattr(source, "__len__")
    return isinstance(source, Dataset) or (has and not isinstance(source, Mapping | str | Tensor))


def _from_dataset(
    dataset: Any,
    collate: Callable[[list[Any]], Any],
    split: str,
    samples: int | None,
    seed: int,
    batch_size: int | None,
) -> SampleSet:
    available = len(dataset)
    _refuse_empty(available, split)
    number = min(samples or DEFAULT_SAMPLES, available)
    generator = torch.Generator().manual_seed(_integer(seed, "samples"))
    chosen = torch.randperm(available, generator=generator)[:number].sort().values.tolist()
    size = batch_size or default_batch_size(number)
    digest = Digest()
    batches = []
    for start in range(0, number, size):
        examples = [_example(dataset, index, split) for index in chosen[start : start + size]]
        for example in examples:
            digest.example(example)
        try:
            batches.append(collate(examples))
        except (TypeError, RuntimeError, ValueError, KeyError) as error:
            msg = f"data[{split!r}]: examples do not make a batch ({one_line(error, 120)}): give a DataLoader"
            raise ProblemError(msg) from error
    return SampleSet(tuple(batches), number, split, seed, digest.hexdigest(), available)


def _example(dataset: Any, index: int, split: str) -> Any:
    try:
        return dataset[index]
    except Exception as error:  # the user's code can raise anything
        msg = (
            f"data[{split!r}][{index}] raised {type(error).__name__}: {one_line(error, 160)} (traceback: --debug)"
        )
        raise ProblemError(msg) from error


def _from_batches(source: Any, split: str, samples: int, seed: int, batch_size: int | None) -> SampleSet:
    if not isinstance(source, Iterable):
        msg = f"data[{split!r}] is {type(source).__name__}: give a Dataset, a DataLoader or a list of batches"
        raise ProblemError(msg)
    digest, batches, examples = Digest(), [], 0
    for batch in source:
        rows = row_count(batch)
        kept = next(divide(batch, samples - examples)) if rows else batch
        examples += row_count(kept) or 1
        digest.batch(kept)
        batches += list(divide(kept, batch_size)) if batch_size else [kept]
        if examples >= samples:
            break
    _refuse_empty(examples, split)
    return SampleSet(tuple(batches), examples, split, seed, digest.hexdigest())


def default_batch_size(samples: int) -> int:
    """An eighth of the samples, so that error bars over data exist; at most 128."""
    return max(1, min(LARGEST_BATCH, samples // DATA_BLOCKS))


def _refuse_empty(number: int, split: str) -> None:
    if number == 0:
        msg = f"data[{split!r}] is empty: nothing to measure on"
        raise ProblemError(msg)


def _integer(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:7], "big")


class Digest:
    """sha256 of examples, the same however they are divided into batches: one running hash per leaf."""

    def __init__(self) -> None:
        self._leaves: list[Any] = []
        self._headers: list[str] = []

    def example(self, example: Any) -> None:
        """Add one example, before it is put into a batch."""
        flat = [torch.as_tensor(x) if hasattr(x, "__array__") else x for x in _flatten(example)]
        for index, leaf in enumerate(flat):
            if isinstance(leaf, Tensor):
                self._add(index, f"{leaf.dtype} {tuple(leaf.shape)}", leaf)
            else:
                self._add(index, type(leaf).__name__, repr(leaf).encode())

    def batch(self, batch: Any) -> None:
        """Add a batch whose tensors hold one example per row."""
        for index, leaf in enumerate(leaves(batch)):
            self._add(index, f"{leaf.dtype} {tuple(leaf.shape[1:])}", leaf)

    def hexdigest(self) -> str:
        """The hash of all leaves."""
        whole = hashlib.sha256()
        for leaf in self._leaves:
            whole.update(leaf.digest())
        return whole.hexdigest()

    def _add(self, index: int, header: str, content: Tensor | bytes) -> None:
        while len(self._leaves) <= index:
            self._leaves.append(hashlib.sha256())
            self._headers.append("")
        if self._headers[index] != header:
            self._headers[index] = header
            self._leaves[index].update(header.encode())
        if isinstance(content, Tensor):
            content = content.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        self._leaves[index].update(content)


def _flatten(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _flatten(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _flatten(item)
    else:
        yield value
