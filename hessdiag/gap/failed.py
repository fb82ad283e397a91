"""Why a checkpoint could not be measured: one line for people, one code for programs."""

from __future__ import annotations

from hessdiag.engine.products.failures import is_out_of_memory
from hessdiag.errors import HessdiagError, Refused, one_line


def refused(error: BaseException) -> Refused:
    """Any exception as a refusal.

    Args:
        error: raised by hessdiag, by torch, or by the user's model and data.
    """
    code = code_of(error)
    if isinstance(error, HessdiagError):
        return Refused(one_line(error), code)
    if code == "out_of_memory":
        return Refused(f"out of memory ({one_line(error, 120)}): take fewer `samples`", code)
    return Refused(f"unexpected {type(error).__name__}: {one_line(error, 200)}", code)


def code_of(error: BaseException) -> str:
    """Its code, out of `hessdiag.errors.CODES`; that memory ran out counts before what became of it."""
    cause: BaseException | None = error
    while cause is not None:
        if not isinstance(cause, HessdiagError) and is_out_of_memory(cause):
            return "out_of_memory"
        cause = cause.__cause__
    return error.code if isinstance(error, HessdiagError) else "unexpected"
