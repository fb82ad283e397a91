"""Names of earlier versions: they are taken, and one DeprecationWarning says the name of today."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from hessdiag.errors import UsageError
from hessdiag.option import options_of

F = TypeVar("F", bound=Callable[..., Any])


def names_of_today(cls: type[Any]) -> dict[str, str]:
    """The former names of a class's options, each with the name of today."""
    known = options_of(cls).values()  # type: ignore[arg-type]  # a class can be hashed
    return {one.formerly: one.name for one in known if one.formerly}


def renamed(cls: type[Any], given: Mapping[str, Any], stacklevel: int = 3) -> dict[str, Any]:
    """Options under the names of today; each former name is told of by one DeprecationWarning.

    Args:
        cls: the class of the options.
        given: values by name.
        stacklevel: as `warnings.warn` takes it; 3 is the caller of the caller.
    """
    former = names_of_today(cls)
    for name in former.keys() & given.keys():
        warnings.warn(f"{name} is {former[name]} now", DeprecationWarning, stacklevel=stacklevel)
    return {former.get(name, name): value for name, value in given.items()}


def formerly(**names: str) -> Callable[[F], F]:
    """Let a function take keyword arguments under names of earlier versions.

    Args:
        **names: the names of today, each with its former one.
    """

    def wrap(function: F) -> F:
        @functools.wraps(function)
        def taking(*args: Any, **given: Any) -> Any:
            for new, old in names.items():
                if old not in given:
                    continue
                if new in given:
                    msg = f"{function.__name__}: {old} and {new} are one argument; give {new}"
                    raise UsageError(msg)
                warnings.warn(f"{old} is {new} now", DeprecationWarning, stacklevel=2)
                given[new] = given.pop(old)
            return function(*args, **given)

        return taking  # type: ignore[return-value]

    return wrap
