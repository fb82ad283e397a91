"""Which examples of a map-style data set a DataLoader visits: what its sampler leaves in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from hessdiag.errors import HessdiagError, ProblemError, one_line
from hessdiag.samples.randomness import Generators

LONGEST_PASS = 1_000_000  # indices read of a sampler that does not end; ten times the data set if that is more


@dataclass(frozen=True)
class Visited:
    """The indices of one pass.

    Attributes:
        indices: with repetitions, sorted unless ``fixed``.
        fixed: whether every pass visits them in this order.
        notes: what the sampler does that drawing by index does not.
        listed: whether the data set is asked for lists of indices.
    """

    indices: Sequence[Any]
    fixed: bool
    notes: tuple[str, ...] = ()
    listed: bool = False


def visited(loader: DataLoader[Any], split: str, generators: Generators, seed: int) -> Visited:
    """The examples among which a loader's sample set is drawn.

    Raises:
        ProblemError: the sampler has no end, repeats by chance or weight, gives nothing, or fails.
    """
    sampler = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    where = f"data[{split!r}]"
    size = len(loader.dataset) if hasattr(loader.dataset, "__len__") else 0
    try:
        with _left_alone(sampler):
            found = _of(sampler, where, generators, seed, size)
    except HessdiagError:
        raise
    except Exception as error:  # the user's code can raise anything
        msg = (
            f"{where}: its sampler {type(sampler).__name__} raised {type(error).__name__}: {one_line(error, 120)}"
        )
        raise ProblemError(msg) from error
    if not len(found.indices):
        _refuse(where, "its sampler gives no index", "give DataLoader(dataset), which visits all examples")
    repeated = len(found.indices) - len(set(found.indices))
    notes = found.notes
    if repeated:
        text = f"{where}: {repeated} of the {len(found.indices)} indices of its sampler are repetitions: "
        notes += (text + "each counts as often as it is visited",)
    try:
        indices = found.indices if isinstance(found.indices, range) else sorted(found.indices)
    except TypeError:
        indices = sorted(found.indices, key=repr)
    return Visited(indices, found.fixed, notes, found.listed)


def _of(sampler: Any, where: str, generators: Generators, seed: int, size: int) -> Visited:
    kind = type(sampler)
    if kind is BatchSampler:
        inner = _of(sampler.sampler, where, generators, seed, size)
        return _without_last(inner, sampler.batch_size, where) if sampler.drop_last else _listed(inner)
    if kind is SequentialSampler:
        return Visited(range(len(sampler.data_source)), fixed=True)
    if kind is RandomSampler:
        return _of_random(sampler, where)
    if kind is SubsetRandomSampler:
        return Visited([_index(i) for i in sampler.indices], fixed=False)
    if kind is DistributedSampler:
        total = len(sampler.dataset)
        text = f"{where}: its DistributedSampler gives rank {sampler.rank} one share of {sampler.num_replicas}; "
        return Visited(range(total), False, (text + f"drawn among all {total} examples, as all ranks train on",))
    if isinstance(sampler, WeightedRandomSampler):
        _refuse_weights(where, kind.__name__)
    return _of_passes(sampler, where, generators, seed, size)


def _of_random(sampler: RandomSampler, where: str) -> Visited:
    total = len(sampler.data_source)
    notes: tuple[str, ...] = ()
    if sampler.replacement:
        notes = (
            f"{where}: its RandomSampler draws with replacement, every example alike: drawn here among all "
            f"{total}, each at most once",
        )
    elif sampler.num_samples != total:
        notes = (
            f"{where}: its RandomSampler takes {sampler.num_samples} of {total} examples in a pass, others every "
            f"time: drawn among all {total}",
        )
    return Visited(range(total), fixed=False, notes=notes)


def _listed(inner: Visited) -> Visited:
    return Visited(inner.indices, inner.fixed, inner.notes, listed=True)


def _without_last(inner: Visited, size: int, where: str) -> Visited:
    """What drop_last leaves."""
    total = len(inner.indices)
    left_out = total % size
    if total < size:
        _refuse(
            where, f"{total} examples, batch_size={size} and drop_last=True make no batch", "give drop_last=False"
        )
    if not left_out:
        return _listed(inner)
    if inner.fixed:
        text = f"{where}: drop_last leaves out the last {left_out} of {total} examples: never measured"
        return Visited(inner.indices[: total - left_out], True, (*inner.notes, text), listed=True)
    text = f"{where}: drop_last leaves out {left_out} of {total} examples in a pass, others every time: "
    return Visited(inner.indices, False, (*inner.notes, text + f"drawn among all {total}"), listed=True)


def _of_passes(sampler: Any, where: str, generators: Generators, seed: int, size: int) -> Visited:
    """What a sampler of the user's gives: read twice, so that chance is told from choice."""
    name = type(sampler).__name__
    if isinstance(sampler, Iterator):
        _refuse(where, f"its sampler is a {name}, which can be read only once", "give sampler=list(...)")
    generators.seed(seed, "sampler")
    first, listed = _pass(sampler, where, size)
    generators.seed(seed, "sampler", "another")
    second, _ = _pass(sampler, where, size)
    notes: tuple[str, ...] = ()
    ranks = getattr(sampler, "num_replicas", None)
    if isinstance(sampler, DistributedSampler) or (isinstance(ranks, int) and ranks > 1):
        notes += (f"{where}: its {name} gives one rank's share: drawn among these {len(first)} examples",)
    if listed:
        notes += (
            f"{where}: the batches of its {name} are not kept: examples are drawn one by one, see `batch_size`",
        )
    if sorted(map(repr, first)) == sorted(map(repr, second)):
        return Visited(first, first == second, notes, listed)
    if len(set(first)) < len(first) or len(set(second)) < len(second):
        _refuse_weights(where, name)
    text = f"{where}: its {name} takes other examples in every pass: drawn among the {len(first)} of one pass"
    return Visited(first, False, (*notes, text), listed)


def _pass(sampler: Any, where: str, size: int) -> tuple[list[Any], bool]:
    """The indices of one pass, and whether they came in lists."""
    indices: list[Any] = []
    listed = False
    most = max(LONGEST_PASS, 10 * size)
    for count, item in enumerate(sampler):
        if isinstance(item, list | tuple) or (isinstance(item, Tensor) and item.dim()):
            listed = True
            indices += [_index(one) for one in item]
        else:
            indices.append(_index(item))
        if max(count, len(indices)) > most:
            _refuse(
                where,
                f"its sampler {type(sampler).__name__} gives more than {most:,} indices and has perhaps no end",
                "give DataLoader(dataset, batch_size=..., collate_fn=...), which visits each example once",
            )
    return indices, listed


def _index(value: Any) -> Any:
    try:
        return value if isinstance(value, str) else int(value)
    except (TypeError, ValueError):
        return value


def _refuse_weights(where: str, name: str) -> NoReturn:
    _refuse(
        where,
        f"its {name} repeats and leaves out examples by weight or chance, which makes another mean loss",
        "give DataLoader(dataset) for the plain mean, or put the weights into the loss",
    )


def _refuse(where: str, what: str, way_out: str) -> NoReturn:
    msg = f"{where}: {what}; {way_out}"
    raise ProblemError(msg)


@contextmanager
def _left_alone(sampler: Any) -> Iterator[None]:
    """What a pass changes in a sampler's attributes (an epoch counter) is put back."""
    chain = [sampler]
    while len(chain) < 9 and (inner := _inner(chain[-1])) is not None:
        chain.append(inner)
    kept = [(one, dict(vars(one))) for one in chain if hasattr(one, "__dict__")]
    try:
        yield
    finally:
        for one, attributes in kept:
            vars(one).clear()
            vars(one).update(attributes)


def _inner(sampler: Any) -> Any:
    inner = getattr(sampler, "sampler", None)
    return getattr(sampler, "batch_sampler", None) if inner is None else inner
