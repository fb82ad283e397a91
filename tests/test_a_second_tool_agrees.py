"""Promise: PyHessian, on the same samples, agrees within its own error; where it does not, that is said."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hessdiag.analysis import Measurement
from hessdiag.integrations.pyhessian import SecondOpinion, _compare, cross_check, second_opinion
from hessdiag.settings import Settings
from tests import models

SETTINGS = Settings(quantities=("lambda_max", "lambda_min", "trace"), probes=16, batch_size=5)


@pytest.fixture(scope="module", params=[models.mlp, models.attention], ids=["examples", "padded tokens"])
def measured(request):
    measurement = Measurement(request.param(), SETTINGS)
    return measurement, measurement.run()


def test_it_agrees(measured):
    measurement, analysis = measured
    checked = cross_check(measurement, analysis)
    assert not checked.warnings
    notes = [note for note in checked.notes if note.startswith("PyHessian")]
    assert len(notes) == 3
    assert "torch.eig" in notes[-1]


def test_its_eigenvalue_is_the_dense_one(measured):
    measurement, _ = measured
    H = models.dense_hessian(measurement.operator.problem)
    largest = float(torch.linalg.eigvalsh(H).abs().max())
    opinion = second_opinion(measurement.operator)
    assert abs(abs(opinion.eigenvalue) - largest) < 0.02 * largest  # it stops at a change of 0.1 % per step


def test_the_model_is_not_touched(measured):
    measurement, _ = measured
    model = measurement.operator.problem.model
    before = [p.detach().clone() for p in model.parameters()]
    second_opinion(measurement.operator)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(p.grad is None for p in model.parameters())


def test_a_failure_of_the_other_tool_is_a_warning(measured, monkeypatch):
    measurement, analysis = measured

    def crash(*_, **__):
        raise RuntimeError("torch.eig was removed")

    monkeypatch.setattr("pyhessian.hessian.eigenvalues", crash)
    checked = cross_check(measurement, analysis)
    assert "no second opinion" in checked.warnings[-1]
    assert checked.metrics == analysis.metrics


def opinion_of(analysis):
    ends = (analysis.metrics["lambda_max"], analysis.metrics["lambda_min"])
    eigenvalue = max(ends, key=lambda end: abs(end.value)).value
    return SecondOpinion(eigenvalue, analysis.metrics["trace"].value, 0.1, 40)


BROKEN = {
    "an eigenvalue twice as large": lambda o: replace(o, eigenvalue=2 * o.eigenvalue),
    "an eigenvalue of the other sign": lambda o: replace(o, eigenvalue=-o.eigenvalue),
    "a trace ten standard errors away": lambda o: replace(o, trace=o.trace + 1e4 * o.trace_stderr),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(measured, breakage):
    _, analysis = measured
    right = opinion_of(analysis)
    assert _compare(right, analysis)[1] == []
    assert len(_compare(breakage(right), analysis)[1]) == 1
