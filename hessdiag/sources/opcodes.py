"""Instructions of a pickle that need no machine, and what may be a key."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from pickle import UnpicklingError
from typing import Any

from hessdiag.sources.stand_ins import Foreign, Name

IGNORED = ("PROTO", "FRAME", "STOP")
LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
SCALARS = (str, bytes, int, float, complex, type(None), Name, Foreign)
"""Keys and members of sets: the hash of a nested tuple can take for ever."""
LONGEST = 64  # bits of a number that is a key: a much longer one cannot be printed


def scalar_key(key: Any) -> Hashable:
    """The key itself.

    Raises:
        UnpicklingError: it is neither a scalar nor a tuple of scalars.
    """
    flat = key if isinstance(key, tuple) else (key,)
    long = any(isinstance(part, int) and part.bit_length() > LONGEST for part in flat)
    if long or not all(isinstance(part, SCALARS) for part in flat):
        msg = f"a {type(key).__name__} as a key"
        raise UnpicklingError(msg)
    return key  # type: ignore[no-any-return]
