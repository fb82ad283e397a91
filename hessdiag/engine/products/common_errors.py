"""Errors of one rank that every rank raises, of the same kind and with the same words."""

from __future__ import annotations

import builtins
import pickle
from typing import TypeVar

import torch

from hessdiag.errors import HessdiagError, MeasurementError, one_line

SENT = 400  # characters of a foreign error's text
E = TypeVar("E", bound=BaseException)


def rank_of(error: BaseException | None) -> int | None:
    """Which rank's error every rank has; -1 where each had one, None where this rank alone knows of it."""
    while error is not None:
        if (rank := getattr(error, "of_rank", None)) is not None:
            return int(rank)
        error = error.__cause__ or error.__context__
    return None


class GoneError(MeasurementError):
    """Another rank has ended, or was silent for too long (exit code 4)."""

    page = "torchrun"


def gone() -> GoneError:
    """What a rank raises that waits for another in vain."""
    text = "another rank has ended, or was silent for too long: what it said, or who killed it, tells why"
    return agreed(GoneError(text))


def agreed(error: E, rank: int = -1) -> E:
    """Mark an error as one that every rank raises."""
    error.of_rank = rank  # type: ignore[attr-defined]
    return error


def sent(error: Exception) -> tuple[Exception | None, str, str]:
    """An error of ours as it is; of any other its name and text."""
    whole: Exception | None = error if isinstance(error, HessdiagError) else None
    try:
        pickle.loads(pickle.dumps(whole))
    except Exception:
        whole = None
    return whole, type(error).__name__, one_line(error, SENT)


def received(whole: Exception | None, kind: str, text: str) -> Exception:
    """The error that another rank has sent; of a class of this name where its own is not known here."""
    if whole is not None:
        return whole
    known = getattr(builtins, kind, getattr(torch, kind, None))
    if not (isinstance(known, type) and issubclass(known, Exception)):
        known = type(kind, (RuntimeError,), {})
    try:
        error: Exception = known(text)
    except TypeError:
        return RuntimeError(text)
    return error
