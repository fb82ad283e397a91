"""A second opinion: PyHessian's eigenvalue and trace on the same weights, samples and weighting.

PyHessian 0.1 (MIT by its metadata) is used as published. Its ``density`` is not run: it calls ``torch.eig``, which
torch 2 removed.
"""

from __future__ import annotations

import copy
import math
import statistics
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.analysis import Measurement
from hessdiag.engine.products.curvature import Curvature
from hessdiag.errors import one_line
from hessdiag.results import Analysis, Estimate

MOST_ITERATIONS = 100  # PyHessian's own default, like its tolerance of 1e-3
DISAGREEMENT = 4.0  # standard errors; chance passes it once in 16,000


@dataclass(frozen=True)
class SecondOpinion:
    """What PyHessian says.

    Attributes:
        eigenvalue: the largest in modulus; PyHessian gives no error for it.
        trace: mean over its probes.
        trace_stderr: their standard error; it stops when the mean is quiet, not when this is small.
        products: spent on the trace.
    """

    eigenvalue: float
    trace: float
    trace_stderr: float
    products: int


def second_opinion(operator: Curvature, *, seed: int = 0) -> SecondOpinion:
    """Run PyHessian's ``eigenvalues`` and ``trace`` with its defaults, on a copy of the model."""
    from pyhessian import hessian

    model = _Losses(operator)
    # PyHessian weighs batches by inputs.size(0): as many rows as the batch's mean stands for make it exact
    loader = [
        (torch.full((int(weight),), number), torch.zeros(1))
        for number, weight in enumerate(operator.weights.tolist())
        if weight > 0
    ]
    with operator.function.measuring(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about create_graph: the copy is thrown away
        torch.manual_seed(seed)
        other = hessian(model, lambda loss, _: loss, dataloader=loader, cuda=operator.device.type == "cuda")
        values, _ = other.eigenvalues(maxIter=MOST_ITERATIONS)
        forms = [float(form) for form in other.trace(maxIter=MOST_ITERATIONS)]
    spread = statistics.stdev(forms) / math.sqrt(len(forms)) if len(forms) > 1 else math.inf
    return SecondOpinion(float(values[0]), statistics.fmean(forms), spread, len(forms))


def cross_check(measurement: Measurement, analysis: Analysis) -> Analysis:
    """The analysis with a note on how PyHessian agrees, and a warning where it does not."""
    try:
        opinion = second_opinion(measurement.operator, seed=measurement.settings.seed)
    except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
        text = f"PyHessian fails here ({type(error).__name__}: {one_line(error, 120)}): no second opinion"
        return replace(analysis, warnings=(*analysis.warnings, text))
    notes, doubts = _compare(opinion, analysis)
    notes.append("PyHessian's density was not run: version 0.1 calls torch.eig, which torch 2 removed")
    return replace(analysis, notes=(*analysis.notes, *notes), warnings=(*analysis.warnings, *doubts))


def _compare(opinion: SecondOpinion, analysis: Analysis) -> tuple[list[str], list[str]]:
    notes: list[str] = []
    doubts: list[str] = []
    ends = [analysis.metrics[name] for name in ("lambda_max", "lambda_min") if name in analysis.metrics]
    if ends:
        ours = max(ends, key=lambda end: abs(end.value))
        off = (opinion.eigenvalue - ours.value) / abs(ours.value) if ours.value else math.nan
        text = f"PyHessian: largest eigenvalue {opinion.eigenvalue:.6g}, {off:+.2%} from {ours.quantity}"
        (notes if abs(off) < 0.05 else doubts).append(
            f"{text} (it stops at a change of 0.1 %, and gives no error)"
        )
    trace = analysis.metrics.get("trace")
    if isinstance(trace, Estimate):
        error = math.hypot(opinion.trace_stderr, trace.stderr)
        off = (opinion.trace - trace.value) / error if error > 0 else math.inf
        text = (
            f"PyHessian: trace {opinion.trace:.5g} ± {opinion.trace_stderr:.2g} from {opinion.products} probes, "
        )
        text += f"{off:+.1f} standard errors from ours"
        (notes if abs(off) < DISAGREEMENT else doubts).append(text)
    return notes, doubts


class _Losses(nn.Module):
    """The mean loss of the batch whose number fills the input; parameters that do not count are frozen."""

    def __init__(self, operator: Curvature) -> None:
        super().__init__()
        self.model = copy.deepcopy(operator.problem.bare_model()).to(operator.device, operator.dtype)
        named = dict(self.model.named_parameters())
        for name, parameter in named.items():
            parameter.grad = None
            parameter.requires_grad_(name in operator.function.names)
        with torch.no_grad():
            for name, theta in zip(operator.function.names, operator.function.theta, strict=True):
                named[name].copy_(theta)
        self._problem, self._batches = operator.problem, operator.batches

    def forward(self, numbers: Tensor) -> Any:
        batch = self._batches[int(numbers[0])]
        return self._problem.total(self.model, batch) / self._problem.count(batch)
