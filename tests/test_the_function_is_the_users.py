"""Promise: before every measurement the user's own model is asked for loss and gradient; another one is refused.

The second opinion uses the untouched module and torch's own losses. Each breakage below measures another function
in a way that the self-test cannot see: products and differences of the wrong function agree.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hessdiag
from hessdiag.engine import functional, second_opinion
from hessdiag.engine.preflight import preflight, require_sound
from hessdiag.errors import MeasurementError
from hessdiag.problem import Problem
from hessdiag.samples import draw
from tests import models


def checked(problem, batch_size=8, **options):
    data = problem.data["train"]
    return preflight(problem, draw(data, samples=40, batch_size=batch_size), **options)


def regression():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))
    return Problem(model, {"train": (torch.randn(40, 4), torch.randn(40, 2))}, criterion="mse")


def by_loss():
    problem = regression()
    return Problem(problem.model, problem.data, loss=lambda model, batch: F.l1_loss(model(batch[0]), batch[1]))


HEALTHY = {
    "mlp": models.mlp,
    "cnn with BatchNorm": models.cnn,
    "mse": regression,
    "a loss of its own": by_loss,
}


@pytest.mark.parametrize("make", HEALTHY.values(), ids=HEALTHY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_healthy_model_agrees_with_itself(make, dtype):
    problem = make()
    problem.model.to(dtype)
    done = checked(problem)
    require_sound(done)
    rounding = 200 * torch.finfo(dtype).eps
    assert done.second_opinion.loss_off < rounding
    assert done.second_opinion.gradient_off < 10 * rounding
    assert any(f.check == "second opinion" and f.level == "ok" for f in done.findings)


def test_loss_and_gradient_are_those_of_plain_torch():
    problem = regression()
    x, y = problem.data["train"]
    loss = F.mse_loss(problem.model(x), y)
    assert checked(problem).second_opinion.loss == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_held_to_its_own_rounding(dtype):
    problem = models.mlp()
    problem.model.to(dtype)
    require_sound(checked(problem))


def test_it_is_in_the_run_and_can_be_left_out():
    asked = hessdiag.analyze(regression(), ["lambda_max"])
    assert asked.to_dict()["second_opinion"]["gradient_off"] < 1e-4
    assert hessdiag.analyze(regression(), ["lambda_max"], second_opinion=False).second_opinion is None


def test_parameters_of_a_criterion_are_said_to_stay_fixed():
    problem = regression()
    scale = nn.Parameter(torch.tensor([1.0, 2.0]))
    problem = Problem(
        problem.model,
        problem.data,
        criterion=lambda outputs, batch: (scale.to(outputs) * (outputs - batch[1])).square().mean(),
    )
    done = checked(problem)
    require_sound(done)
    (warning,) = done.texts("warning")
    assert "2 trainable numbers" in warning
    assert "Problem(model=...)" in warning


def test_a_cached_weight_is_refused_by_its_name():
    """Folded weights kept from before: their graph leads to the user's own parameters, which do not move."""

    class Folded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 2)
            self.folded = self.a.weight * 2

        def forward(self, x):
            return F.linear(x, self.folded.to(x), self.a.bias)

    problem = Problem(Folded(), regression().data, criterion="mse")
    with pytest.raises(MeasurementError, match=r"a\.weight past the model"):
        checked(problem)


def test_a_model_that_fails_alone_is_said():
    """It runs with copies, but not as its user has it: nobody can tell what was meant."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 2)

        def forward(self, x):
            if isinstance(self.a.weight, nn.Parameter):
                raise ValueError("not like this")
            return self.a(x)

    done = checked(Problem(Counting(), regression().data, criterion="mse"))
    (warning,) = done.texts("warning")
    assert "ValueError: not like this" in warning


class LanguageModel(nn.Module):
    """Returns logits, and with labels a loss, as the models of transformers do."""

    def __init__(self, shifted):
        super().__init__()
        self.embed, self.head, self.shifted = nn.Embedding(7, 4), nn.Linear(4, 7), shifted

    def forward(self, input_ids, labels=None):
        logits = self.head(torch.tanh(self.embed(input_ids)))
        if labels is None:
            return SimpleNamespace(logits=logits)
        if self.shifted:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        else:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return SimpleNamespace(logits=logits, loss=loss)


def texts(number=4):
    torch.manual_seed(2)
    return [{"input_ids": (ids := torch.randint(7, (5, 6))), "labels": ids} for _ in range(number)]


def test_the_models_own_loss_is_asked():
    problem = Problem(LanguageModel(False), {"train": texts()}, criterion="cross_entropy")
    done = checked(problem, batch_size=None)
    require_sound(done)
    batch = texts()[0]
    assert done.second_opinion.model_loss == pytest.approx(problem.model(**batch).loss.item(), rel=1e-6)


def test_labels_that_are_not_shifted_are_refused():
    problem = Problem(LanguageModel(True), {"train": texts()}, criterion="cross_entropy")
    with pytest.raises(MeasurementError, match=r"model\(\*\*batch\)\.loss"):
        require_sound(checked(problem, batch_size=None))


def test_a_model_that_writes_into_its_batch_is_named():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 2)

        def forward(self, x):
            return self.a(x.mul_(0.5))

    with pytest.raises(MeasurementError, match="writes into the batch"):
        checked(Problem(Writing(), regression().data, criterion="mse"))


def constant(monkeypatch):
    """The last tensor keeps its value: half of the model moves."""
    true = functional.Functional.tensors

    def tensors(self, theta):
        return true(self, (*theta[:-1], self.theta[-1].detach()))

    monkeypatch.setattr(functional.Functional, "tensors", tensors)


def of_another_loss(monkeypatch):
    true = Problem.total
    monkeypatch.setattr(Problem, "total", lambda self, model, batch: true(self, model, batch) * 1.001)


def of_doubled_weights(monkeypatch):
    true = functional.Functional.tensors
    monkeypatch.setattr(
        functional.Functional, "tensors", lambda self, theta: true(self, (theta[0] * 1.01, *theta[1:]))
    )


BROKEN = {
    "a parameter stays constant": constant,
    "a loss off by a thousandth": of_another_loss,
    "weights off by a hundredth": of_doubled_weights,
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage, monkeypatch):
    breakage(monkeypatch)
    with pytest.raises(MeasurementError, match=r"the model's own loss|model\.parameters"):
        require_sound(checked(regression()))


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_nothing_else_would_notice(breakage, monkeypatch):
    """So the second opinion is needed: without it each of these passes."""
    breakage(monkeypatch)
    require_sound(checked(regression(), opinion=False))


def test_the_limits_are_above_rounding_and_below_faults():
    assert 1e-6 < second_opinion.LOSS_LIMIT < 1e-4
    assert 1e-4 < second_opinion.GRADIENT_LIMIT < 0.1
