"""Chooses how products are formed, by what works on a few examples; never by a clock, so that a run repeats."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hessdiag.engine.checks.kinks import kinks
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.devices import wait
from hessdiag.engine.products.failures import is_out_of_memory
from hessdiag.engine.products.gradients import depends, gradient
from hessdiag.engine.products.graphs import GradientGraph, StackGraph
from hessdiag.engine.products.losses import TRIAL_EXAMPLES
from hessdiag.engine.products.methods import METHODS
from hessdiag.engine.products.stacking import batching_rules_only, stacks
from hessdiag.engine.products.windows import distance_in_double, norm, windows
from hessdiag.errors import MeasurementError, one_line
from hessdiag.samples import divide, row_count

TRIAL_VECTORS = 1
LONG_TRIAL = 0.02  # seconds: a call that takes as long is not repeated
TRIALS = 4
WORTH_STACKING = (
    100  # products: vmap of a user's own cross-entropy makes torch import sympy, a quarter of a CPU second
)
PAIR = 8  # examples of each of two batches that are tried together
AGREEMENT = {torch.float32: 1e-3, torch.float64: 1e-5}
"""Rounding leaves 1e-6 and 1e-14, or 1e-7 where a float64 model casts to float32 inside; faults start at 1e-2."""


@dataclass(frozen=True)
class Plan:
    """The method chosen and why.

    Attributes:
        method: its name.
        reason: one line.
        agreement: largest relative difference between products formed by two methods; None if only one ran.
        seconds: trial time per product of each method, from a kept graph where a sweep will keep it.
        gradient_seconds: trial time of a gradient of the same examples.
    """

    method: str
    reason: str
    agreement: float | None
    seconds: dict[str, float]
    gradient_seconds: float = 0.0


def choose(operator: Curvature, *, fixed: bool, products: int | None = None) -> Plan:
    """Try the exact methods on a vector; costs about 3 products and 3 gradients of 16 examples.

    Double backward comes first. Forward mode, which is slower on every network tried and makes torch load its
    compiler (1.5 CPU seconds of a process), is tried where double backward fails; and for G and R, which no
    difference of gradients can check. A method that fails is left out and noted; methods that disagree mean that a
    derivative formula is wrong, and the self-test will say which tensor it concerns.

    Small batches go together where `Curvature.stackable` says that it pays and two of them agree with each alone;
    with a loss of the user's own not for fewer ``products`` (how many will be formed) than pay for it, and not
    through convolutions, which vmap turns into convolutions in groups: 2 to 4 times slower.

    Raises:
        MeasurementError: no method works, or the loss does not depend on the parameters.
    """
    piece = operator.function.place(operator.trial)
    rows = trial_vectors(operator, TRIAL_VECTORS)
    results: dict[str, Tensor] = {}
    seconds: dict[str, float] = {}
    failures: dict[str, str] = {}
    candidates = (operator.method,) if fixed else ("retained_graph", "forward_over_reverse")
    with operator.function.measuring():
        _require_dependence(operator)
        for name in candidates:
            if results and operator.kind == "hessian":
                break
            try:
                if name == "retained_graph" and operator.kind != "ggn":
                    results["anew"], results[name], seconds[name] = _replayed(operator, piece, rows)
                else:
                    call = partial(_try, operator, name, piece, rows)
                    results[name], seconds[name] = _timed(call, least=2)
            except RuntimeError as error:
                if is_out_of_memory(error):
                    raise
                failures[name] = one_line(error, 120)
        tried, agreements = bool(results), [_agreement(list(results.values()))]
        results.clear()  # before the gradient takes its memory
        gradient_seconds = _timed(lambda: gradient(operator.function, piece)[None])[1]
    if not tried:
        why = "; ".join(f"{name}: {text}" for name, text in failures.items())
        if fixed:
            msg = f"`method={operator.method!r}` does not work here ({why}): `method='auto'` takes one that does"
        else:
            found = kinks(operator.function, piece)
            also = (
                f"; differences fail at the kinks of {found[0]}" if found else ", or `method='finite_difference'`"
            )
            msg = f"no exact product works here ({why}): replace the operation{also}"
        raise MeasurementError(msg)
    method = next(iter(seconds))
    built_in = operator.problem.built_in is not None
    many = built_in or products is None or products >= WORTH_STACKING
    if many and method == "retained_graph" and not fixed and _together_pays(operator, piece):
        agreements.append(_stacked(operator, rows, seconds, failures))
        method = "stacked_graph" if "stacked_graph" in seconds else method
    known = [off for off in agreements if off is not None]
    reason = _reason(method, seconds, failures, fixed=fixed)
    return Plan(method, reason, max(known, default=None), seconds, gradient_seconds)


def _reason(method: str, seconds: dict[str, float], failures: dict[str, str], *, fixed: bool) -> str:
    taken = ", ".join(f"{name} {_time(s)}" for name, s in seconds.items())
    said = f"`method={method!r}`" if fixed else f"{taken} a trial product"
    return said + "".join(f"; {name} does not work here" for name in failures)


def _replayed(operator: Curvature, piece: Any, rows: Tensor) -> tuple[Tensor, Tensor, float]:
    """Products from a new graph and again from the same, and seconds: of the latter, where graphs will be kept."""
    begun = time.perf_counter()
    graph = GradientGraph(operator.function, operator.kind, piece)
    building = time.perf_counter() - begun
    anew = graph.products(rows)
    again, seconds = _timed(lambda: graph.products(rows))
    kept = graph.held * trials_in(operator) <= operator.graphs.room
    return anew, again, seconds if kept else seconds + building


def trials_in(operator: Curvature) -> float:
    """How many times the trial's examples the sample set has."""
    examples = operator.samples.examples
    return examples / (row_count(operator.trial) or examples)


def _together_pays(operator: Curvature, piece: Any) -> bool:
    if operator.kind == "ggn" or not operator.stackable:
        return False
    return not any(name.startswith("Convolution") for name in operator.function.operations(piece))


def _stacked(
    operator: Curvature, rows: Tensor, seconds: dict[str, float], failures: dict[str, str]
) -> float | None:
    """Try a few examples of two batches together; adds the seconds, on the scale of the trial's, where it works.

    Returns:
        The relative difference from the two one by one; None if it does not work here.
    """
    pieces = [next(divide(batch, PAIR)) for batch in operator.batches]
    pair = next((stack for stack in stacks(pieces, 2) if len(stack.indices) > 1), None)
    if pair is None:
        return None
    function, kind = operator.function, operator.kind
    try:
        with function.measuring(), batching_rules_only():
            stack = StackGraph(function, kind, pair)
            together, taken = _timed(lambda: stack.products(rows), least=2)
    except (RuntimeError, ValueError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        failures["stacked_graph"] = one_line(error, 120)
        return None
    with function.measuring():
        graphs = [GradientGraph(function, kind, pieces[index]) for index in pair.indices]
        apart, alone = zip(*(_timed(partial(one.products, rows), least=2) for one in graphs), strict=True)
    seconds["stacked_graph"] = seconds["retained_graph"] * taken / sum(alone)
    return _agreement([torch.stack(apart, dim=1), together])


def _require_dependence(operator: Curvature) -> None:
    pieces = (next(divide(batch, TRIAL_EXAMPLES)) for batch in operator.batches)
    if not any(depends(operator.function, piece) for piece in pieces):
        msg = "the loss does not depend on the parameters: use the model given to forward(model, batch), "
        raise MeasurementError(msg + "without no_grad or detach")


def trial_vectors(operator: Curvature, number: int) -> Tensor:
    """Random signs times sizes in [½, 1½), (number, P): every weight of every tensor takes part about alike.

    Signs alone can be a null vector of H: of logistic regression with two classes, one in four is.
    """
    generator = torch.Generator().manual_seed(20_261_121)
    shape = (number, operator.size)
    signs = torch.randint(0, 2, shape, generator=generator, dtype=torch.int8).mul_(2).sub_(1)
    sizes = torch.rand(shape, generator=generator, dtype=operator.dtype).add_(0.5)
    for row, sign in zip(sizes, signs, strict=True):
        for size, positive in windows(row, sign):
            size.mul_(positive)
    return sizes.to(operator.device, operator.dtype)


def _try(operator: Curvature, name: str, piece: Any, rows: Tensor) -> Tensor:
    return METHODS[name](operator.function, operator.kind, piece, rows)


def _timed(call: Callable[[], Tensor], least: int = 1) -> tuple[Tensor, float]:
    """The result and its seconds per row, the best of a few calls; of ``least``, if they take long."""
    trials: list[float] = []
    while len(trials) < least or (len(trials) < TRIALS and sum(trials) < LONG_TRIAL):
        result = torch.empty(0)  # the one before goes first
        begun = time.perf_counter()
        result = call()
        wait(result.device)
        trials.append(time.perf_counter() - begun)
    return result, min(trials) / len(result)


def _agreement(results: list[Tensor]) -> float | None:
    if len(results) < 2:
        return None
    scale = max(norm(results[0]), 1e-300)
    return max(distance_in_double(other, results[0]) / scale for other in results[1:])


def _time(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"
