"""The curvature of a problem as an operator, for those who want products and not an analysis."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import nn

from hessdiag.analysis.asked import problem_of, sample_set
from hessdiag.described import takes
from hessdiag.engine.checks.kept_weights import first_pass
from hessdiag.engine.checks.log_probabilities import require_log_probabilities
from hessdiag.engine.checks.planner import choose
from hessdiag.engine.products.curvature import KINDS, Curvature
from hessdiag.engine.products.devices import device_of
from hessdiag.engine.products.fisher import FISHERS, Fisher, FisherKind
from hessdiag.engine.products.gradients import Kind
from hessdiag.engine.products.methods import EXACT_METHODS
from hessdiag.former import renamed
from hessdiag.option import Fault, hint, refuse
from hessdiag.problem import Problem
from hessdiag.settings import Settings

ALL = (*KINDS, *FISHERS)
OPTIONS = ("samples", "batch_size", "seed", "split", "params", "dtype", "device", "method", "block")


@takes(Settings, *OPTIONS)
def hessian(
    problem: Problem | nn.Module,
    loss_fn: Any = None,
    data: Any = None,
    *,
    operator: Kind | FisherKind = "hessian",
    draws: int = 1,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> Curvature:
    """H, G, R or a Fisher matrix of a problem as an operator: ``H @ v`` on vectors (P,) and blocks (P, k).

    No self-test is made; ``analyze`` makes one. The operator works on copies: the model may train on.

    Args:
        problem: what to measure; or the model, followed by its loss and data as for `analyze`.
        loss_fn: of a model.
        data: of a model.
        operator: "hessian"; "ggn", the Gauss-Newton matrix G; "residual", H − G; "empirical_fisher", the mean of
            g gᵀ over the loss's terms (examples, or tokens) with their gradients g; "mc_fisher", the same with
            targets drawn from the model's own distribution, whose mean over seeds is G.
        draws: targets per term of "mc_fisher", drawn once, by ``seed``; a product costs the same.
        dtype: "float32" or "float64", of the products; by default the model's.
        device: "cpu", "cuda:1" say; by default where the model is.
        **options: as for `analyze`, and checked alike.

    Raises:
        OptionError: options that do not exist or are out of range: all of them.
        ProblemError: the first three arguments are no problem.
        UsageError: a Fisher matrix that this problem does not have.
        MeasurementError: no exact method works.

    >>> import hessdiag, torch
    >>> from torch import nn
    >>> x, y = torch.randn(64, 5), torch.randint(3, (64,))
    >>> H = hessdiag.hessian(nn.Linear(5, 3), nn.CrossEntropyLoss(), (x, y))
    >>> H.shape
    (18, 18)
    """
    options = renamed(Settings, options)
    precision = str(dtype).removeprefix("torch.") if isinstance(dtype, torch.dtype) else dtype
    known = {"dtype": precision, **{name: value for name, value in options.items() if name in OPTIONS}}
    foreign = [Fault(name, options[name], _unknown(name)) for name in options if name not in OPTIONS]
    kinds = [] if operator in ALL else [Fault("operator", operator, f"allowed: {', '.join(ALL)}")]
    refuse(*foreign, *kinds, *Settings.faults({**known, "operator": "ggn" if operator == "ggn" else "hessian"}))
    subject, asked = problem_of(problem, loss_fn, data, "hessdiag.hessian"), Settings(**known)
    drawn = sample_set(subject, asked)
    if asked.params is not None:
        subject = replace(subject, params=tuple(asked.params))
    numbers: dict[str, Any] = {
        "dtype": getattr(torch, asked.dtype) if asked.dtype else None,
        "device": device_of(device),
        "block": asked.block,
    }
    first, fixed = EXACT_METHODS[0] if asked.method == "auto" else asked.method, asked.method != "auto"
    curvature: Curvature
    if operator in FISHERS:
        curvature = Fisher(
            subject, drawn, kind=cast(FisherKind, operator), draws=draws, seed=asked.seed, **numbers
        )
    else:
        curvature = Curvature(subject, drawn, kind=cast(Kind, operator), method=first, **numbers)
    first_pass(curvature)
    require_log_probabilities(curvature)
    if operator not in FISHERS:
        curvature.method = choose(curvature, fixed=fixed).method
    curvature.notes += (*drawn.warnings, *drawn.notes)
    return curvature


def _unknown(name: str) -> str:
    return f"no such option; {hint(name, ('operator', *OPTIONS))}"
