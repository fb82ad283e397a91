"""Promise: weights, gradients, modes, buffers, random states and global flags are as they were, come what may."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hessdiag.engine.checks.preflight import preflight
from hessdiag.engine.products.curvature import Curvature
from hessdiag.errors import MeasurementError
from hessdiag.problem import Problem
from tests import models
from tests.models import same


def state(model):
    return {
        "weights": {n: (p.detach().clone(), p.requires_grad, p.data_ptr()) for n, p in model.named_parameters()},
        "gradients": {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "modes": [m.training for m in model.modules()],
        "random": torch.get_rng_state(),
        "flags": (
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cudnn.enabled,
            torch.backends.cudnn.allow_tf32,
            torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(),
        ),
    }


def subject():
    """BatchNorm, dropout, a frozen layer, gradients lying about, mixed modes."""
    problem = models.cnn()
    model = nn.Sequential(problem.model, nn.Dropout(0.5), nn.Linear(3, 3).double())
    model[2].weight.requires_grad_(False)
    model.train()
    model[0].again.eval()
    x, y = problem.data["train"]
    nn.functional.cross_entropy(model(x), y).backward()
    return Problem(model, {"train": (x, y)}, criterion="cross_entropy")


def measure(problem):
    checked = preflight(problem, models.sample(problem, 7))
    _ = checked.operator @ torch.ones(checked.operator.size, dtype=torch.float64)


def interrupted(error):
    def run(problem):
        op = Curvature(problem, models.sample(problem, 7))
        op.retreat = None
        calls = iter(range(100))

        def forward(module, arguments):
            if next(calls) > 1:
                raise error

        handle = problem.model[2].register_forward_pre_hook(forward)
        try:
            with pytest.raises(type(error)):
                _ = op @ torch.ones(op.size, dtype=torch.float64)
        finally:
            handle.remove()

    return run


RUNS = {
    "after a measurement": measure,
    "after Ctrl-C": interrupted(KeyboardInterrupt()),
    "after an exception": interrupted(ValueError("in the middle")),
}


@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
def test_everything_is_as_it_was(run):
    problem = subject()
    before = state(problem.model)
    run(problem)
    assert same(state(problem.model), before)


def test_also_inside_no_grad():
    problem = subject()
    with torch.no_grad():
        before = state(problem.model)
        measure(problem)
        assert same(state(problem.model), before)


def test_the_checkpoint_measured_is_the_one_at_the_beginning():
    problem = models.mlp()
    op = Curvature(problem, models.sample(problem))
    v = models.randn(op.size)
    before = op @ v
    with torch.no_grad():
        problem.model[0].weight.zero_()
    assert torch.equal(op @ v, before)


def test_a_failing_operation_is_named_and_changes_nothing():
    name, operation = models.differentiable_once()

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(5, 3).double()

        def forward(self, x):
            return operation(self.linear(x))

    problem = Problem(Odd(), {"train": (models.randn(9, 5), models.labels(9, 3))}, criterion="cross_entropy")
    before = state(problem.model)
    with pytest.raises(MeasurementError, match=name):
        preflight(problem, models.sample(problem))
    assert same(state(problem.model), before)


BROKEN = {
    "a weight moved": lambda m: m[0].conv.weight.data.view(-1)[0].add_(1e-9),
    "a gradient was added": lambda m: m[0].conv.weight.grad.add_(1e-9),
    "a gradient appeared": lambda m: setattr(m[2].weight, "grad", torch.zeros_like(m[2].weight)),
    "the mode was left at evaluation": lambda m: m.eval(),
    "BatchNorm saw another batch": lambda m: m[0].norm.num_batches_tracked.add_(1),
    "a random number was drawn": lambda m: torch.rand(1),
    "a flag was left": lambda m: setattr(torch.backends.cudnn, "allow_tf32", False),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage):
    model = subject().model
    allow = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = True
    try:
        before = state(model)
        breakage(model)
        assert not same(state(model), before)
    finally:
        torch.backends.cudnn.allow_tf32 = allow
