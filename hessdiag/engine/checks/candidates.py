"""Weights that a mean loss may need, as lines to paste: rows, tokens that count, masks, class weights."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.criteria import IGNORE_INDEX, TARGET_KEYS, is_index
from hessdiag.problem import Problem

MASKS = ("attention_mask", "mask", "loss_mask", "labels_mask", "padding_mask")

NEGATIVE = 4  # labels tried: a sample set of whole numbers that are no labels has any number of them


@dataclass(frozen=True)
class Candidate:
    """One weight.

    Attributes:
        text: ``weight=...``, to paste into a `Problem`.
        weight: the same as a function.
    """

    text: str
    weight: Callable[[Any], float]


def candidates(problem: Problem, batches: Sequence[Any]) -> Iterator[Candidate]:
    """All that the batches and the loss suggest, the likeliest first; of one make, as the first of them."""
    entries = dict(_entries(batches[0]))
    targets = {place: value for place, value in entries.items() if is_index(value) and _is_target(place)}
    weights = _class_weights(problem).items()
    for place, value in targets.items():
        negative, extreme = _labels(batches, place)
        ignored = dict.fromkeys((IGNORE_INDEX, *_ignored(problem), *negative))
        for number in ignored:
            yield from _kept(place, value, number)
        for name, classes in weights:
            yield from (_by_class(place, name, classes, number) for number in ignored)
        for number in extreme:
            yield from _kept(place, value, number)
            yield from (_by_class(place, name, classes, number) for name, classes in weights)
    for place, value in entries.items():
        if any(name in place for name in MASKS) or (value.dim() == 1 and not is_index(value)):
            yield Candidate(f"weight=lambda batch: float(batch{place}.sum())", _sum(place))
            if value.dim() > 1:
                text = f"weight=lambda batch: float(batch{place}[:, 1:].sum())"
                yield Candidate(text, _sum(place, lambda found: found[:, 1:]))
    for place, value in entries.items():
        if is_index(value) and value.dim() > 1:
            yield from _kept(place, value, 0)
    yield Candidate("weight=None", lambda one: float(len(next(_entries(one))[1])))


def _labels(batches: Sequence[Any], place: str) -> tuple[list[int], tuple[int, ...]]:
    """Numbers that a loss may ignore: negative labels, the commonest first; the ends of the others (0, 255)."""
    found = Counter(int(label) for batch in batches for label in _of(batch, place).reshape(-1).tolist())
    negative = [label for label, _ in found.most_common() if label < 0][:NEGATIVE]
    others = [label for label in found if label >= 0]
    return negative, (max(others), min(others)) if others else ()


def _kept(place: str, value: Tensor, number: int) -> Iterator[Candidate]:
    """Entries other than a number, also without each row's first."""
    text = f"weight=lambda batch: float((batch{place} != {number}).sum())"
    yield Candidate(text, _sum(place, lambda found: found.long() != number))
    if value.dim() > 1:
        text = f"weight=lambda batch: float((batch{place}[:, 1:] != {number}).sum())"
        yield Candidate(text, _sum(place, lambda found: found[:, 1:].long() != number))


def _sum(place: str, change: Callable[[Tensor], Tensor] | None = None) -> Callable[[Any], float]:
    def weight(batch: Any) -> float:
        found = _of(batch, place)
        return float((found if change is None else change(found)).sum())

    return weight


def _entries(batch: Any) -> Iterator[tuple[str, Tensor]]:
    """What is written behind ``batch`` for each of its tensors, and the tensor."""
    items: Any = ()
    if isinstance(batch, Mapping):
        items = batch.items()
    elif isinstance(batch, Sequence):
        items = enumerate(batch)
    for key, value in items:
        if isinstance(value, Tensor) and value.dim():
            yield f"[{key!r}]", value


def _is_target(place: str) -> bool:
    return any(repr(key) in place for key in TARGET_KEYS) or place in ("[1]", "[2]", "[3]")


def _of(batch: Any, place: str) -> Tensor:
    return next(value for where, value in _entries(batch) if where == place)


def _by_class(place: str, name: str, classes: Tensor, ignored: int) -> Candidate:
    def weight(batch: Any) -> float:
        targets = _of(batch, place).long()
        return float(classes.to(targets.device)[targets[targets != ignored]].sum())

    part = f"batch{place}[batch{place} != {ignored}]"
    return Candidate(f"weight=lambda batch: float({name}.cpu()[{part}.cpu()].sum())", weight)


def _reachable(function: Any, depth: int = 2) -> Iterator[tuple[str, Any]]:
    """Name and value of what a loss function holds: closure, defaults, partial arguments, globals it names."""
    if depth < 0:
        return
    if isinstance(function, functools.partial):
        yield from function.keywords.items()
        yield from _reachable(function.func, depth)
        return
    owner = getattr(function, "__self__", None)
    code = getattr(function, "__code__", None) or getattr(getattr(function, "__func__", None), "__code__", None)
    if code is None and not isinstance(function, nn.Module) and callable(function):
        yield from vars(function).items() if hasattr(function, "__dict__") else ()
        return
    if owner is not None and hasattr(owner, "__dict__"):
        yield from vars(owner).items()
    if code is None:
        return
    cells = getattr(function, "__closure__", None) or ()
    held = dict(zip(code.co_freevars, (_content(cell) for cell in cells), strict=False))
    everything = getattr(function, "__globals__", {})
    held |= {name: everything[name] for name in code.co_names if name in everything}
    defaults = getattr(function, "__defaults__", None) or ()
    held |= dict(
        zip(code.co_varnames[code.co_argcount - len(defaults) : code.co_argcount], defaults, strict=False)
    )
    held |= getattr(function, "__kwdefaults__", None) or {}
    for name, value in held.items():
        yield name, value
        if getattr(value, "__code__", None) is not None or isinstance(value, functools.partial):
            yield from _reachable(value, depth - 1)


def _content(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not yet filled
        return None


def _class_weights(problem: Problem) -> dict[str, Tensor]:
    """Tensors of one number per class that the loss holds, itself or in a module of its own."""
    found: dict[str, Tensor] = {}
    for name, value in _reachable(problem.criterion or problem.loss):
        if isinstance(value, nn.Module):
            value, name = getattr(value, "weight", None), f"{name}.weight"
        if isinstance(value, Tensor) and value.dim() == 1 and value.is_floating_point():
            found[name] = value.detach().cpu().to(torch.float64)
    return found


def _ignored(problem: Problem) -> list[int]:
    """Indices that a loss module the function holds ignores."""
    held = [getattr(value, "ignore_index", None) for _, value in _reachable(problem.criterion or problem.loss)]
    return [number for number in held if isinstance(number, int)]
