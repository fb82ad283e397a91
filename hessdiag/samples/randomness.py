"""Random numbers that the user's data draw while they are read: seeded, and put back afterwards."""

from __future__ import annotations

import functools
import random
import types
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessdiag.hashing import sha256

MOST_OBJECTS = 20_000  # looked through for generators of their own: 20 ms
LONGEST = 1000  # entries of a list: a generator does not hide behind a thousand file names
FOREIGN = ("torch", "numpy", "builtins", "random", "collections")  # their classes keep no generators of the user


class Generators:
    """The generators of torch, NumPy and Python, and those that the data hold themselves.

    Args:
        *roots: data sets, loaders: whatever holds generators in its attributes, closures or globals.
    """

    def __init__(self, *roots: Any) -> None:
        self._all: list[Any] = [torch.default_generator, *_of_accelerators(), np.random, random]
        known = {id(one) for one in self._all}
        self._all += [one for one in _held(roots) if id(one) not in known]

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Whatever is drawn inside, every generator is afterwards as it was."""
        states = self.states()
        try:
            yield
        finally:
            for one, state in zip(self._all, states, strict=True):
                _set(one, state)

    def seed(self, *names: object) -> None:
        """Every generator begins anew, each in its own way, at what the names say."""
        for place, one in enumerate(self._all):
            _seed(one, integer("/".join(map(str, names)), str(place)) % 2**32)

    def states(self) -> list[Any]:
        """Where every generator stands."""
        return [_get(one) for one in self._all]

    def moved(self, since: list[Any]) -> bool:
        """Whether any was drawn from since `states` were taken."""
        return not _equal(self.states(), since)


class _Stream:
    """The random stream of one accelerator, with the methods of a generator."""

    def __init__(self, module: Any, device: torch.device) -> None:
        self._module, self._device = module, device

    def get_state(self) -> Tensor:
        state: Tensor = self._module.get_rng_state(self._device)
        return state

    def set_state(self, state: Tensor) -> None:
        self._module.set_rng_state(state, self._device)

    def manual_seed(self, number: int) -> None:
        self.set_state(torch.Generator(self._device).manual_seed(number).get_state())


def _of_accelerators() -> list[_Stream]:
    """The streams of CUDA devices, XPUs and so on, if the program has started them; nothing starts them here."""
    kind = torch.accelerator.current_accelerator()
    module = None if kind is None else torch.get_device_module(kind)
    if kind is None or not hasattr(module, "get_rng_state"):
        return []
    if not getattr(module, "is_initialized", torch.accelerator.is_available)():
        return []
    return [_Stream(module, torch.device(kind.type, n)) for n in range(torch.accelerator.device_count())]


def integer(seed: object, name: str) -> int:
    """A number below 2⁵⁶ that belongs to a seed and a name."""
    return int.from_bytes(sha256(f"{seed}/{name}".encode()).digest()[:7], "big")


def _get(one: Any) -> Any:
    if isinstance(one, torch.Generator | _Stream):
        return one.get_state()
    if isinstance(one, np.random.Generator):
        return one.bit_generator.state
    if one is random or isinstance(one, random.Random):
        return one.getstate()
    return one.get_state(legacy=False) if isinstance(one, np.random.RandomState) else np.random.get_state()


def _set(one: Any, state: Any) -> None:
    if isinstance(one, np.random.Generator):
        one.bit_generator.state = state
    elif one is random or isinstance(one, random.Random):
        one.setstate(state)
    else:
        one.set_state(state)


def _seed(one: Any, number: int) -> None:
    if isinstance(one, torch.Generator | _Stream):
        one.manual_seed(number)
    elif isinstance(one, np.random.Generator):
        one.bit_generator.state = type(one.bit_generator)(number).state
    else:
        one.seed(number)


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, np.ndarray):
        return bool(np.array_equal(a, b))
    if isinstance(a, dict):
        return all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple) and len(a) < 100:
        return all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return bool(a == b)


def _held(roots: tuple[Any, ...]) -> list[Any]:
    """Generators reachable from the objects, in the order they are met."""
    found: list[Any] = []
    seen: set[int] = set()
    queue = deque(roots)
    while queue and len(seen) < MOST_OBJECTS:
        one = queue.popleft()
        if id(one) in seen or one is None or isinstance(one, str | bytes | int | float | Tensor | np.ndarray):
            continue
        seen.add(id(one))
        if isinstance(one, torch.Generator | np.random.Generator | np.random.RandomState | random.Random):
            if not isinstance(one, random.SystemRandom):
                found.append(one)
        elif not isinstance(one, types.ModuleType):
            queue.extend(_inside(one))
    return found


def _inside(one: Any) -> list[Any]:
    if isinstance(one, dict):
        return list(islice(one.values(), LONGEST))
    if isinstance(one, list | tuple | set | frozenset):
        return list(islice(one, LONGEST))
    if isinstance(one, functools.partial):
        return [one.func, *one.args, *one.keywords.values()]
    if isinstance(one, types.MethodType):
        return [one.__self__, one.__func__]
    if isinstance(one, types.FunctionType):
        return _of_function(one)
    kind = one if isinstance(one, type) else type(one)
    classes = [c for c in kind.__mro__ if c.__module__.split(".")[0] not in FOREIGN]
    inside: list[Any] = [] if isinstance(one, type) else list(getattr(one, "__dict__", {}).values())
    for each in classes:
        if not isinstance(one, type):
            slots = each.__dict__.get("__slots__", ())
            inside += [getattr(one, name, None) for name in ([slots] if isinstance(slots, str) else slots)]
        inside += [getattr(value, "__func__", value) for value in vars(each).values() if _may_hold(value)]
    return inside


def _of_function(one: types.FunctionType) -> list[Any]:
    cells: list[Any] = []
    for cell in one.__closure__ or ():
        try:
            cells.append(cell.cell_contents)
        except ValueError:  # named later than the function
            continue
    named = [one.__globals__.get(name) for name in one.__code__.co_names]
    # of another module's functions only the generator itself: the walk stays with the user's code
    near = [v for v in named if _is_generator(v) or getattr(v, "__module__", "") == one.__module__]
    return [*cells, *(one.__defaults__ or ()), *(one.__kwdefaults__ or {}).values(), *near]


def _is_generator(value: Any) -> bool:
    return isinstance(value, torch.Generator | np.random.Generator | np.random.RandomState | random.Random)


def _may_hold(value: Any) -> bool:
    return _is_generator(value) or isinstance(value, types.FunctionType | staticmethod | classmethod)
