"""A user's function -> `Problem`: imported, called with its options, and given its checkpoint."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from hessdiag.criteria import CRITERIA, how_called, recognized
from hessdiag.errors import HessdiagError, LoadError, ProblemError, RaisedError, UsageError, one_line
from hessdiag.hashing import sha256
from hessdiag.problem import Problem
from hessdiag.sources.spec import exists, split_key, split_spec
from hessdiag.sources.weights import Weights, load_into, read_weights

FIELDS = tuple(field.name for field in dataclasses.fields(Problem))
CHECKPOINT = "checkpoint"


@dataclass(frozen=True)
class Built:
    """A problem, the weights put into it, and what the user should know about that.

    Attributes:
        problem: ready to measure.
        weights: None if no checkpoint was given, or the factory loaded it by itself.
        notes: one-line facts.
        resolved: (what, value, source) of whatever was found out to build it.
    """

    problem: Problem
    weights: Weights | None
    notes: tuple[str, ...]
    resolved: tuple[tuple[str, str, str], ...] = ()


def build_problem(
    spec: str,
    *,
    checkpoint: str | None = None,
    options: Mapping[str, Any] | None = None,
    app_dir: str | None = None,
    trust_pickle: bool = False,
) -> Built:
    """Call a factory and load its checkpoint.

    The factory is ``def name(checkpoint=None, **options)``, and returns a `Problem`, a dict of its fields, or
    ``(model, loss, data)`` where loss is what `Problem.criterion` takes, or ``f(model, batch)``. If it has a
    parameter called ``checkpoint`` it gets the file and loads it by itself; otherwise the weights are loaded here,
    strictly.

    Args:
        spec: ``pkg.module:function`` or ``path/file.py:function``.
        checkpoint: file, or ``file::entry``.
        options: keyword arguments of the factory.
        app_dir: folder to import from, by default the current one.
        trust_pickle: let the checkpoint run code. Only for files of one's own making.

    Raises:
        UsageError: no such module, file, function or option.
        ProblemError: the user's code raised, or did not return a problem.
        LoadError: the checkpoint cannot be read or does not fit.
    """
    where, name = split_spec(spec)
    given = dict(options or {})
    if CHECKPOINT in given:
        msg = "-P checkpoint=...: a checkpoint is given with -c FILE"
        raise UsageError(msg)
    with importable(where, app_dir):
        module = _import(where, spec)
        factory = _find(module, name, spec)
        loads_itself = _check_options(factory, given, spec, has_checkpoint=checkpoint is not None)
        weights = None
        if checkpoint is not None and loads_itself:
            path, _ = split_key(checkpoint)
            if not exists(path):
                msg = f"{path}: no such checkpoint file"
                raise LoadError(msg)
            given[CHECKPOINT] = checkpoint
        elif checkpoint is not None:
            weights = read_weights(checkpoint, trust_pickle=trust_pickle, main=module)
        with _users_code(f"factory {spec}"):
            made = factory(**given)
        problem = _as_problem(made, spec)
    if checkpoint is None:
        return Built(problem, None, ("no checkpoint given: the model as the factory made it",))
    if weights is None:
        return Built(problem, None, (f"{checkpoint} was loaded by the factory",))
    return Built(problem, weights, weights.notes + load_into(problem.bare_model(), weights))


def find_function(spec: str, app_dir: str | None = None) -> Callable[..., Any]:
    """A function or class of the user's, ``pkg.module:name`` or ``path/file.py:name``.

    Raises:
        UsageError: no such module, file or name.
        ProblemError: importing it raised.
    """
    where, name = split_spec(spec)
    with importable(where, app_dir):
        return _find(_import(where, spec), name, spec)


@contextmanager
def importable(where: str, app_dir: str | None) -> Iterator[None]:
    """The user's folders in front of ``sys.path`` while their code is imported and called."""
    folders = [str(Path(app_dir or ".").resolve())]
    if where.endswith(".py"):
        folders.insert(0, str(Path(where).resolve().parent))
    before = list(sys.path)
    sys.path[:0] = folders
    importlib.invalidate_caches()
    try:
        yield
    finally:
        for folder in folders:
            if sys.path.count(folder) > before.count(folder):
                sys.path.remove(folder)


@contextmanager
def _users_code(doing: str) -> Iterator[None]:
    """Around code that can raise anything: it becomes one line."""
    try:
        yield
    except (HessdiagError, KeyboardInterrupt):
        raise
    except BaseException as error:
        msg = f"{doing} raised {type(error).__name__}: {one_line(error, 200)}"
        raise RaisedError(msg) from error


def _import(where: str, spec: str) -> ModuleType:
    with _users_code(f"importing {where}"):
        try:
            return _import_file(Path(where)) if where.endswith(".py") else importlib.import_module(where)
        except ModuleNotFoundError as error:
            if not error.name or not f"{where}.".startswith(f"{error.name}."):
                raise
            msg = f"{spec}: no module {error.name!r} here or installed: give its folder with `app_dir`"
            raise UsageError(msg) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        msg = f"{path}: no such Python file"
        raise UsageError(msg)
    # a name of its own: problem.py of two projects are two modules, and random.py must not hide random
    unique = f"{path.stem}_{sha256(os.fsencode(path.resolve())).hexdigest()[:8]}"
    found = importlib.util.spec_from_file_location(unique, path.resolve())
    if found is None or found.loader is None:
        msg = f"{path} cannot be imported as Python"
        raise UsageError(msg)
    module = importlib.util.module_from_spec(found)
    sys.modules[unique] = module
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[unique]
        raise
    return module


def _find(module: ModuleType, name: str, spec: str) -> Callable[..., Any]:
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            kind, of = ("classes", inspect.isclass) if part[0].isupper() else ("functions", inspect.isfunction)
            own = [key for key, value in vars(found).items() if of(value) and value.__module__ == module.__name__]
            available = [key for key in own if not key.startswith("_")]
            near = get_close_matches(part, available, 1)
            listed = ", ".join(available[:10]) + (" ..." if len(available) > 10 else "")
            hint = f"; did you mean {near[0]}?" if near else ""
            msg = f"{spec}: no {part!r} there; {kind} are {listed or 'none'}{hint}"
            raise UsageError(msg)
        found = getattr(found, part)
    if not callable(found):
        msg = f"{spec} is a {type(found).__name__}, not a function: write def {name}(): return Problem(...)"
        raise UsageError(msg)
    return found  # type: ignore[no-any-return]


def _check_options(
    factory: Callable[..., Any], given: Mapping[str, Any], spec: str, *, has_checkpoint: bool
) -> bool:
    """Refuse options the factory does not take, and say whether it takes a checkpoint."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):  # compiled callables show none
        return False
    loads_itself = CHECKPOINT in parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    by_name = {n: p for n, p in parameters.items() if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)}
    accepted = [name for name in by_name if name != CHECKPOINT]
    unknown = [name for name in given if name not in accepted]
    if unknown and not takes_any:
        msg = f"{spec} takes no option {unknown[0]!r}; accepted are {', '.join(accepted) or 'none'}"
        raise UsageError(msg)
    needed = [name for name, p in by_name.items() if p.default is p.empty and name not in given]
    if CHECKPOINT in needed and not has_checkpoint:
        msg = f"{spec} needs a checkpoint: give -c FILE"
        raise UsageError(msg)
    lacking = [name for name in needed if name != CHECKPOINT]
    if lacking:
        msg = f"{spec} needs the option {lacking[0]!r}: give -P {lacking[0]}=..."
        raise UsageError(msg)
    return loads_itself


def _as_problem(result: Any, spec: str) -> Problem:
    if isinstance(result, Problem):
        return result
    if isinstance(result, Mapping):
        unknown = [str(key) for key in result if key not in FIELDS]
        lacking = [key for key in ("model", "data") if key not in result]
        if unknown or lacking:
            wrong = f"an unknown field {unknown[0]!r}" if unknown else f"no {lacking[0]!r}"
            msg = f"{spec} returned a dict with {wrong}; the fields of a problem are {', '.join(FIELDS)}"
            raise ProblemError(msg)
        return Problem(**result)
    if isinstance(result, tuple) and len(result) == 3:
        model, loss, data = result
        known = isinstance(loss, str | nn.Module) or recognized(loss) is not None
        if known or (callable(loss) and how_called(loss) == "f(outputs, targets)"):
            return Problem(model, data, criterion=loss)
        if callable(loss):
            return Problem(model, data, loss=loss)
        msg = f"{spec}: the loss of (model, loss, data) must be {', '.join(CRITERIA)}, one of torch's losses, "
        raise ProblemError(msg + "f(outputs, targets) or f(model, batch)")
    msg = (
        f"{spec} returned {type(result).__name__}: return a Problem, a dict of its fields, or (model, loss, data)"
    )
    raise ProblemError(msg)
