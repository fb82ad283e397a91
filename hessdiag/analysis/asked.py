"""What a call of `hessdiag.analyze` asks for: a problem, and options that exist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from hessdiag.errors import UsageError
from hessdiag.former import renamed
from hessdiag.option import Fault, refuse
from hessdiag.problem import Problem
from hessdiag.samples import SampleSet, draw
from hessdiag.settings import Settings

FIELDS = tuple(field.name for field in fields(Problem) if field.name not in ("model", "data", "params"))


def problem_of(problem: Any, loss_fn: Any, data: Any, call: str) -> Problem:
    """The problem itself, or that of a model, a loss and data.

    Raises:
        ProblemError: they are none; its text says what to type.
        UsageError: a problem with a loss or data beside it.
    """
    if not isinstance(problem, Problem):
        return Problem.of(problem, loss_fn, data, call=call)
    if loss_fn is not None or data is not None:
        msg = f"{call}(problem, ...): a Problem has its own loss and data; give {call}(problem), or "
        raise UsageError(msg + f"{call}(model, loss_fn, data)")
    return problem


def options_asked(quantities: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options as `Settings` takes them.

    Args:
        quantities: given as the second argument, beside a problem.
        options: given by name.

    Raises:
        OptionError: options that do not exist, are out of range or contradict each other: all of them.
        UsageError: quantities given twice.
    """
    given = renamed(Settings, options, stacklevel=4)
    if quantities is not None:
        if "quantities" in given:
            msg = "quantities are given twice: analyze(problem, quantities=...) takes them once"
            raise UsageError(msg)
        given["quantities"] = quantities
    if isinstance(given.get("quantities"), str):
        given["quantities"] = (given["quantities"],)
    refuse(*_of_the_problem(given), *Settings.faults({k: v for k, v in given.items() if k not in FIELDS}))
    return given


def sample_set(problem: Problem, s: Settings) -> SampleSet:
    """The frozen sample set that settings ask of a problem.

    Raises:
        UsageError: no such split, or no samples in it.
    """
    return draw(problem.split(s.split), split=s.split, samples=s.samples, seed=s.seed, batch_size=s.batch_size)


def are_quantities(value: Any) -> bool:
    """Whether it is a name, or several."""
    if isinstance(value, str):
        return True
    return isinstance(value, Sequence) and all(isinstance(name, str) for name in value)


def _of_the_problem(given: Mapping[str, Any]) -> list[Fault]:
    text = "it belongs to the problem; give analyze(Problem.of(model, loss_fn, data, {}=...))"
    return [Fault(name, None, text.format(name)) for name in given if name in FIELDS]
