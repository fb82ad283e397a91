"""Stdout is for results. What the user's code writes there, in any way and at any time, goes to stderr.

Not only ``print``: a subprocess, ``os.write(1)``, ``sys.__stdout__``, a C library, and a thread that goes on after
the measurement. So from `reserve` on file descriptor 1 is stderr's, and results go to a descriptor of their own.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TextIO

import click

from hessdiag.cli.spelling import flagged
from hessdiag.errors import OutputError, one_line
from hessdiag.shown import inert, visible

_RESERVED: list[tuple[TextIO, Callable[[], None]]] = []  # at most one: where results go, and the way back
_SILENT: list[bool] = []  # empty, or one or more times True


class ReaderGoneError(Exception):
    """Who read the output has closed the pipe (``| head``): no fault, but nothing is left to do."""


def silence() -> None:
    """From now on nothing is written: another process says it for this one."""
    _SILENT.append(True)


def speak() -> None:
    """Write again."""
    _SILENT.clear()


def silent() -> bool:
    """Whether nothing is written."""
    return bool(_SILENT)


def reserve() -> None:
    """From now on only `result` reaches stdout, until `release`; a second call does nothing."""
    if _RESERVED:
        return
    stream = out = sys.stdout
    with suppress(OSError, ValueError):  # a test's stream has no descriptor
        _flush()
        out = open(os.dup(stream.fileno()), "w", encoding=stream.encoding, errors=stream.errors)  # noqa: SIM115, PTH123
    saved = None
    with suppress(OSError):
        saved = os.dup(1)
        os.dup2(2, 1)
    sys.stdout = sys.stderr

    def back() -> None:
        _flush()
        sys.stdout = stream
        if saved is not None:
            os.dup2(saved, 1)
            os.close(saved)
        if out is not stream:
            with suppress(OSError):
                out.close()

    _RESERVED.append((out, back))


def release() -> None:
    """Stdout as it was before `reserve`."""
    if _RESERVED:
        _RESERVED.pop()[1]()


def results() -> TextIO:
    """Where results go."""
    return _RESERVED[0][0] if _RESERVED else sys.stdout


def result(text: str, *, nl: bool = True) -> None:
    """Write a result.

    Raises:
        ReaderGoneError: nobody reads it any more.
        OutputError: it cannot be written, as on a full disk.
    """
    if _SILENT:
        return
    try:
        click.echo(text, file=results(), nl=nl)
    except BrokenPipeError as error:
        raise ReaderGoneError from error
    except OSError as error:
        msg = f"cannot write the results to stdout: {one_line(error)}; send them elsewhere, or to /dev/null"
        raise OutputError(msg) from error


def message(text: str, *, lines: bool = False, always: bool = False) -> None:
    """Write a line, or several, on stderr, whatever users and files put into it; ``always``, also where silent.

    Where that fails nothing is raised: a note that nobody can read is no reason to lose the results.
    """
    if _SILENT and not always:
        return
    with suppress(OSError):
        click.echo(inert(visible(flagged(text), lines=lines)), file=sys.stderr)


def abandon() -> None:
    """Let what is still to be written go nowhere: Python would complain about the closed pipe at its end."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (results(), sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                os.dup2(nowhere, stream.fileno())


def _flush() -> None:
    for stream in {sys.stdout, sys.__stdout__}:
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.flush()
    with suppress(Exception):  # what C code printed waits in a buffer of its own
        ctypes.CDLL(None).fflush(None)
