"""A pickle -> plain data, by an interpreter of its own that can call nothing.

A pickle is a program for a small machine whose one dangerous instruction looks a name up and calls it. Here names
are looked up in a fixed table (`names.BUILDERS`) whose builders make numbers, texts, containers and tensors. Any
other name becomes an inert `Foreign`, and is reported. Attributes that a pickle sets reach no object but a
`Stateful`. Work and memory grow with the length of the pickle: its memo is a dict, keys of dicts are scalars, and
what builders copy is counted.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from pickle import UnpicklingError
from typing import IO, Any

from hessdiag.sources.names import find
from hessdiag.sources.opcodes import CONSTANTS, IGNORED, LITERALS, scalar_key
from hessdiag.sources.stand_ins import Foreign, Name, Stateful
from hessdiag.sources.storages import Odd

COPIES = 1 << 24  # bytes or items that builders may copy beyond those of the pickle
SIZED = (str, bytes, bytearray, list, tuple, dict, set)
MARK = object()


class Reader:
    """Interprets one pickle.

    Attributes:
        foreign: names the pickle asks for that are in no table, each once.
    """

    def __init__(self, stream: IO[bytes], storage: Callable[[Any], Any]) -> None:
        """Begin at the stream's position.

        Args:
            stream: holds the pickle; afterwards it stands behind it.
            storage: what a persistent id stands for; torch keeps the numbers of its tensors outside of the pickle.
        """
        self.foreign: dict[str, None] = {}
        self._stream = stream
        self._storage = storage
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self._copied = 0

    def load(self) -> Any:
        """The object that the pickle describes.

        Raises:
            UnpicklingError: it is no pickle, or one that neither torch nor Python writes.
            ValueError: it is cut short.
        """
        for opcode, argument, _ in pickletools.genops(self._stream):
            if opcode.name in LITERALS:
                self._stack.append(argument)
            elif opcode.name in CONSTANTS:
                self._stack.append(CONSTANTS[opcode.name]())
            elif opcode.name in ACTIONS:
                ACTIONS[opcode.name](self, argument)
            elif opcode.name not in IGNORED:
                msg = f"the instruction {opcode.name}"
                raise UnpicklingError(msg)
        return self._pop()

    def _pop(self) -> Any:
        if not self._stack or self._stack[-1] is MARK:
            msg = "an empty stack"
            raise UnpicklingError(msg)
        return self._stack.pop()

    def _top(self, *kinds: type) -> Any:
        value = self._pop()
        self._stack.append(value)
        if kinds and not isinstance(value, kinds):
            msg = f"a {type(value).__name__} in the place of a {kinds[0].__name__}"
            raise UnpicklingError(msg)
        return value

    def _from_mark(self) -> list[Any]:
        items: list[Any] = []
        while self._stack:
            item = self._stack.pop()
            if item is MARK:
                return items[::-1]
            items.append(item)
        msg = "a missing mark"
        raise UnpicklingError(msg)

    def _pop_one(self, _: Any) -> None:
        if self._stack:
            self._stack.pop()

    def _put(self, index: int) -> None:
        self._memo[index] = self._top()

    def _memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._top()

    def _get(self, index: int) -> None:
        if index not in self._memo:
            msg = "a missing memo"
            raise UnpicklingError(msg)
        self._stack.append(self._memo[index])

    def _last(self, number: int) -> list[Any]:
        """So many entries off the stack, in the order in which they came."""
        return [self._pop() for _ in range(number)][::-1]

    def _append(self, _: Any) -> None:
        self._extend(self._last(1))

    def _appends(self, _: Any) -> None:
        self._extend(self._from_mark())

    def _extend(self, values: list[Any]) -> None:
        target = self._top(list, Foreign)
        if isinstance(target, list):
            target.extend(values)

    def _dict(self, _: Any) -> None:
        items = self._from_mark()
        self._stack.append({})
        self._set(items)

    def _setitem(self, _: Any) -> None:
        self._set(self._last(2))

    def _setitems(self, _: Any) -> None:
        self._set(self._from_mark())

    def _set(self, items: list[Any]) -> None:
        target = self._top(dict, Foreign)
        if isinstance(target, Foreign):
            return
        if len(items) % 2:
            msg = "a key without a value"
            raise UnpicklingError(msg)
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[scalar_key(key)] = value

    def _additems(self, _: Any) -> None:
        items = self._from_mark()
        target = self._top(set, Foreign)
        if isinstance(target, set):
            target.update(map(scalar_key, items))

    def _frozenset(self, _: Any) -> None:
        self._stack.append(frozenset(map(scalar_key, self._from_mark())))

    def _global(self, argument: str) -> None:
        module, _, name = argument.partition(" ")
        self._stack.append(self._find(module, name))

    def _stack_global(self, _: Any) -> None:
        name, module = self._pop(), self._pop()
        self._stack.append(self._find(str(module)[:200], str(name)[:200]))

    def _find(self, module: str, name: str) -> Name | Foreign:
        found = find(module, name)
        if isinstance(found, Foreign):
            self.foreign.setdefault(found.name)
        return found

    def _reduce(self, _: Any) -> None:
        self._call(*self._last(2))

    def _new_with_keywords(self, _: Any) -> None:
        self._pop()
        self._reduce(None)

    def _call(self, what: Any, arguments: Any) -> None:
        if isinstance(what, Foreign):
            self._stack.append(what)
            return
        if not isinstance(what, Name) or not isinstance(arguments, tuple):
            msg = f"a call of a {type(what).__name__}"
            raise UnpicklingError(msg)
        # one builder call is a few bytes of the pickle, and can copy what was written once
        self._copied += sum(len(a) for a in arguments if isinstance(a, SIZED))
        if self._copied > COPIES + self._stream.tell():
            msg = "copies without end"
            raise UnpicklingError(msg)
        try:
            self._stack.append(what.build(*arguments))
        except (TypeError, ValueError, KeyError, OverflowError, RuntimeError) as error:
            msg = f"{what.name} of other things than it takes"
            raise UnpicklingError(msg) from error

    def _build(self, _: Any) -> None:
        state, target = self._pop(), self._top()
        if isinstance(target, Stateful):
            target.set_state(state)
        elif type(target) not in (dict, Foreign, Odd):  # the metadata of a state dict; parts of foreign objects
            msg = f"attributes set on a {type(target).__name__}"
            raise UnpicklingError(msg)

    def _inst(self, argument: str) -> None:
        arguments = tuple(self._from_mark())
        module, _, name = argument.partition(" ")
        self._call(self._find(module, name), arguments)

    def _obj(self, _: Any) -> None:
        what, *arguments = self._from_mark() or [None]
        self._call(what, tuple(arguments))

    def _extension(self, code: int) -> None:
        self._stack.append(self._find("copyreg", f"extension {code}"))

    def _persistent(self, _: Any) -> None:
        identity = self._pop()
        if isinstance(identity, tuple) and len(identity) > 1 and isinstance(identity[1], Foreign):
            self._stack.append(identity[1])  # torch before 1.2 wrote the source of modules beside them
            return
        self._stack.append(self._storage(identity))


ACTIONS: dict[str, Callable[[Reader, Any], object]] = {
    "MARK": lambda machine, _: machine._stack.append(MARK),
    "POP": Reader._pop_one,
    "POP_MARK": lambda machine, _: machine._from_mark(),
    "DUP": lambda machine, _: machine._stack.append(machine._top()),
    "MEMOIZE": Reader._memoize,
    **dict.fromkeys(("PUT", "BINPUT", "LONG_BINPUT"), Reader._put),
    **dict.fromkeys(("GET", "BINGET", "LONG_BINGET"), Reader._get),
    "TUPLE": lambda machine, _: machine._stack.append(tuple(machine._from_mark())),
    "TUPLE1": lambda machine, _: machine._stack.append(tuple(machine._last(1))),
    "TUPLE2": lambda machine, _: machine._stack.append(tuple(machine._last(2))),
    "TUPLE3": lambda machine, _: machine._stack.append(tuple(machine._last(3))),
    "LIST": lambda machine, _: machine._stack.append(machine._from_mark()),
    "APPEND": Reader._append,
    "APPENDS": Reader._appends,
    "DICT": Reader._dict,
    "SETITEM": Reader._setitem,
    "SETITEMS": Reader._setitems,
    "ADDITEMS": Reader._additems,
    "FROZENSET": Reader._frozenset,
    "GLOBAL": Reader._global,
    "STACK_GLOBAL": Reader._stack_global,
    "REDUCE": Reader._reduce,
    "NEWOBJ": Reader._reduce,
    "NEWOBJ_EX": Reader._new_with_keywords,
    "BUILD": Reader._build,
    "INST": Reader._inst,
    "OBJ": Reader._obj,
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), Reader._extension),
    "BINPERSID": Reader._persistent,
}
