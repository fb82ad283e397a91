"""Promise: what stands in the way of a measurement is named with its cause and its cure, on one line. (10 s)"""

from __future__ import annotations

import math
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hessdiag.engine.checks import failing, kinks, masked_rows, unsteady
from hessdiag.engine.checks import preflight as room
from hessdiag.engine.checks.preflight import preflight, require_sound
from hessdiag.errors import MeasurementError, NonFiniteError, NothingMatchedError, ProblemError, UsageError
from hessdiag.problem import Problem
from tests import models

ONLY_ONCE, only_once = models.differentiable_once()
X, Y = models.randn(24, 5), models.labels(24, 3)


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.linear = nn.Linear(5, 3).double()
        self.function = function

    def forward(self, x):
        return self.function(self.linear(x))


def net(*middle, classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), *(middle or (nn.Tanh(),)), nn.Linear(6, classes)).double()


def problem(model=None, data=(X, Y), criterion="cross_entropy", **options):
    if "loss" in options:
        criterion = None
    return Problem(model or net(), {"train": data}, criterion=criterion, **options)


def checked(subject, batch_size=8, **options):
    return preflight(subject, models.sample(subject, batch_size), **options)


def frozen():
    model = net()
    model[0].weight.requires_grad_(False)
    return problem(model)


def tied():
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    model[2].weight = model[0].weight
    return problem(model)


def own_loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def changed(value):
    model = net()
    with torch.no_grad():
        model[0].weight[0, :2] = value
    return problem(model)


ANOTHER = net()


def batch_norm(**options):
    return net(nn.BatchNorm1d(6, **options), nn.Tanh())


FACTS = {  # name: (problem, level, what is said)
    "BatchNorm in training mode": (lambda: problem(batch_norm()), "note", "BatchNorm.*running statistics"),
    "dropout in training mode": (lambda: problem(net(nn.Dropout(0.5))), "note", "dropout was on.*dropout off"),
    "frozen weights": (frozen, "note", "30 frozen weights do not count"),
    "tied weights": (tied, "note", "1 of 5 tensors are tied: each counts once"),
    "half precision": (lambda: problem(net().bfloat16()), "note", "bfloat16; measured in float32 copies"),
    "a loss without outputs": (lambda: problem(loss=own_loss), "note", "Hessian only: no G, R"),
    "the gradient": (problem, "note", r"‖gradient‖ = 0\.\d+: .* far from stationary"),
    "batch statistics": (
        lambda: problem(batch_norm(track_running_stats=False)),
        "warning",
        "not the sum over its parts.*hold for batches of 8 examples only.*batch statistics",
    ),
    "a custom loss weighted otherwise": (
        lambda: problem(criterion=lambda o, b: F.cross_entropy(o, b[1], weight=torch.tensor([1.0, 2, 5]).to(o))),
        "fault",
        r"not the sum over its parts.*Problem\(weight=f\(batch\)\).*`batch_size`",
    ),
}


@pytest.mark.parametrize("name", FACTS)
def test_a_fact_is_told(name):
    make, level, text = FACTS[name]
    found = checked(make()).texts(level)
    assert any(re.search(text, one) for one in found), found
    assert not any("\n" in one for one in found)


def test_a_plain_model_has_nothing_to_tell_but_its_gradient():
    report = checked(problem(net().eval()))
    assert [f.level for f in report.findings if f.level != "ok"] == ["note"]
    assert report.texts("note")[0].startswith("‖gradient‖")
    assert {f.check for f in report.findings} >= {"determinism", "loss", "weighting", "product", "self-test"}


def test_the_numbers_reported_are_those_of_the_loss():
    subject = problem()
    report = checked(subject)
    loss = F.cross_entropy(subject.model(X), Y)
    slope = torch.autograd.grad(loss, list(subject.model.parameters()))
    assert report.loss == pytest.approx(loss.item(), rel=1e-12)
    assert report.gradient_norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in slope)), rel=1e-10)


def test_half_precision_weights_are_measured_as_they_are():
    model = net().bfloat16()
    operator = checked(problem(model)).operator
    assert operator.dtype == torch.float32
    pairs = zip(operator.function.theta, model.parameters(), strict=True)
    assert all(torch.equal(copy.detach(), weight.float()) for copy, weight in pairs)


def scripted():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(net())


def whole_numbers():
    model = nn.Linear(5, 3)
    model.weight = nn.Parameter(torch.ones(3, 5, dtype=torch.int8), requires_grad=False)
    model.bias = nn.Parameter(torch.ones(3, dtype=torch.int8), requires_grad=False)
    return model


def late(bad):
    labels = Y.clone()
    labels[-1] = bad
    return labels


def passes():
    count = [0]

    def forward(model, batch):
        count[0] += 1
        return model(batch[0]) * (1 + 0.01 * count[0])

    return forward


def ignoring(index, rows):
    """A mean of torch's over what it does not ignore; ``rows`` are ignored."""
    labels = Y.clone()
    labels[rows] = index
    return problem(data=(X, labels), criterion=lambda o, b: F.cross_entropy(o, b[1], ignore_index=index))


def not_a_number(row):
    data = X.clone()
    data[row, 2] = math.nan
    return problem(data=(data, Y))


def without_criterion():
    return problem(loss=own_loss)


def no_grad(model, x):
    with torch.no_grad():
        return model(x)


REFUSED = {  # name: (problem, options of the preflight, error, cause and cure)
    "NaN weights": (
        lambda: changed(math.nan),
        {},
        NonFiniteError,
        "2 of 30 weights of 0.weight.*earlier checkpoint",
    ),
    "infinite weights": (lambda: changed(math.inf), {}, NonFiniteError, "2 of 30 weights of 0.weight"),
    "NaN loss": (
        lambda: problem(Apply(lambda y: y.abs().neg().log())),
        {},
        NonFiniteError,
        r"loss .* is nan.*log\(0\).*`dtype='float64'`",
    ),
    "a counter in forward": (
        lambda: problem(forward=passes()),
        {},
        MeasurementError,
        "same loss twice gave.*not the random numbers.*a counter in forward.*leave it alone",
    ),
    "random numbers": (
        lambda: problem(Apply(lambda y: y + 0.1 * torch.randn_like(y))),
        {},
        MeasurementError,
        "same loss twice gave.*draws random numbers in evaluation mode",
    ),
    "numpy's random numbers": (
        lambda: problem(Apply(lambda y: y * np.random.rand())),
        {},
        MeasurementError,
        "same loss twice gave.*draws random numbers in evaluation mode",
    ),
    "a batch that is ignored": (
        lambda: ignoring(-100, slice(8, 16)),
        {},
        NonFiniteError,
        r"is nan: no target of batch 1 \(from 0\) counts.*0/0: leave such examples out",
    ),
    "a batch that is ignored by another number": (
        lambda: ignoring(255, slice(0, 8)),
        {},
        NonFiniteError,
        r"is nan: no target of batch 0 \(from 0\) counts",
    ),
    "batches that are all ignored": (
        lambda: ignoring(-1, slice(0, 24)),
        {},
        NonFiniteError,
        r"is nan: no target of batch 0 \(from 0\) counts",
    ),
    "an example that is NaN": (
        lambda: not_a_number(13),
        {},
        NonFiniteError,
        r"is nan: row 5 of batch 1 \(from 0\) is NaN or infinite in the data itself: take that example out",
    ),
    "an example whose loss is infinite": (
        lambda: problem(criterion=lambda o, b: (o.square().mean(1) / b[1]).mean()),
        {},
        NonFiniteError,
        r"inf: so it is for . of 8 examples of batch 0 \(from 0\), first row .: look for overflow",
    ),
    "a label out of range": (
        lambda: problem(data=(X, torch.full_like(Y, 3))),
        {},
        ProblemError,
        "first batch.*Target 3 is out of bounds.*check shapes and labels",
    ),
    "a label out of range in the last batch": (
        lambda: problem(data=(X, late(3))),
        {},
        ProblemError,
        "a later batch.*Target 3 is out of bounds.*check shapes and labels",
    ),
    "inputs of another shape": (
        lambda: problem(data=(models.randn(24, 4), Y)),
        {},
        ProblemError,
        "first batch .RuntimeError: mat1 and mat2.*check shapes",
    ),
    "a loss per example": (
        lambda: problem(loss=lambda m, b: F.cross_entropy(m(b[0]), b[1], reduction="none")),
        {},
        ProblemError,
        r"loss returned \(8,\), not a scalar: return the mean loss",
    ),
    "no targets": (lambda: problem(data=X), {}, ProblemError, "no targets in a batch.*give .inputs, targets."),
    "all targets ignored": (
        lambda: problem(data=(X, torch.full_like(Y, -100))),
        {},
        ProblemError,
        "every target is ignored.*take other samples",
    ),
    "no data": (lambda: problem(data=(X[:0], Y[:0])), {}, ProblemError, r"data\['train'\] is empty"),
    "nothing trainable": (
        lambda: problem(net().requires_grad_(False)),
        {},
        ProblemError,
        r"no trainable floating-point parameters \(4 in all\): unfreeze",
    ),
    "whole numbers only": (
        lambda: problem(whole_numbers(), loss=lambda m, b: b[0].sum()),
        {},
        ProblemError,
        "no trainable floating-point parameters",
    ),
    "a glob that matches nothing": (
        lambda: problem(params=("encoder.*",)),
        {},
        NothingMatchedError,
        r"`params=\['encoder.*'\]` matches no trainable parameter; there are 0.weight, 0.bias",
    ),
    "offloaded weights": (
        lambda: problem(net().to("meta")),
        {},
        MeasurementError,
        "meta device .offloaded.: load them fully",
    ),
    "TorchScript": (lambda: problem(scripted()), {}, UsageError, "TorchScript.*give the nn.Module it came from"),
    "a model without graph": (
        lambda: problem(forward=lambda m, b: no_grad(m, b[0])),
        {},
        MeasurementError,
        "does not depend on the parameters.*without no_grad or detach",
    ),
    "another model's weights": (
        lambda: problem(loss=lambda m, b: own_loss(ANOTHER, b)),
        {},
        MeasurementError,
        r"does not depend on the parameters.*forward\(model, batch\)",
    ),
    "no double backward": (
        lambda: problem(Apply(only_once)),
        {},
        MeasurementError,
        f"no exact product works.*{ONLY_ONCE}.*`method='finite_difference'`",
    ),
    "no double backward, one way asked": (
        lambda: problem(Apply(only_once)),
        {"method": "double_backward"},
        MeasurementError,
        f"`method='double_backward'` does not work here.*{ONLY_ONCE}",
    ),
    "no forward mode": (
        lambda: problem(criterion=lambda o, b: F.huber_loss(o, F.one_hot(b[1], 3).to(o))),
        {"method": "forward_over_reverse"},
        MeasurementError,
        "`method='forward_over_reverse'` does not work here.*`method='auto'`",
    ),
    "finite differences with kinks": (
        lambda: problem(net(nn.ReLU())),
        {"method": "finite_difference"},
        MeasurementError,
        "kinks .ReluBackward.*take an exact method",
    ),
    "finite differences with a soft kink": (
        lambda: problem(net(nn.Hardswish())),
        {"method": "finite_difference"},
        MeasurementError,
        "kinks .Hardswish.*take an exact method",
    ),
    "G without outputs": (
        without_criterion,
        {"kind": "ggn"},
        UsageError,
        r"`operator='ggn'` needs criterion\(outputs, batch\)",
    ),
    "R without outputs": (
        without_criterion,
        {"kind": "residual"},
        UsageError,
        "`operator='residual'` needs criterion",
    ),
    "an operator that does not exist": (problem, {"kind": "fisher"}, UsageError, "allowed: hessian, ggn"),
    "a way that does not exist": (
        problem,
        {"method": "magic"},
        UsageError,
        "allowed: auto, retained_graph",
    ),
    "G of two outputs": (
        lambda: problem(forward=lambda m, b: (m(b[0]), 1), criterion=lambda o, b: F.cross_entropy(o[0], b[1])),
        {"kind": "ggn"},
        UsageError,
        "returns tuple: G and R need one tensor",
    ),
    "a custom loss weighted otherwise": (
        FACTS["a custom loss weighted otherwise"][0],
        {},
        MeasurementError,
        "say what its mean stands for",
    ),
}


def refusal(make, options) -> Exception | None:
    try:
        require_sound(checked(make(), **options))
    except Exception as error:  # whatever reaches the user: only a HessdiagError is a refusal
        return error
    return None


def named(name) -> bool:
    make, options, kind, text = REFUSED[name]
    error = refusal(make, options)
    return type(error) is kind and bool(re.search(text, str(error))) and "\n" not in str(error)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_measured_is_refused(name):
    make, options, _, _ = REFUSED[name]
    assert named(name), repr(refusal(make, options))


def test_a_weight_mends_a_custom_loss():
    weights = torch.tensor([1.0, 2, 5])
    subject = problem(
        criterion=lambda o, b: F.cross_entropy(o, b[1], weight=weights.to(o)),
        weight=lambda b: float(weights[b[1]].sum()),
    )
    require_sound(checked(subject))


def test_differences_are_allowed_where_there_is_no_kink():
    require_sound(checked(problem(), method="finite_difference"))


@pytest.mark.parametrize("wrapper", ["compile", "parallel"])
def test_wrappers_are_taken_off(wrapper):
    model = net()
    wrapped = torch.compile(model) if wrapper == "compile" else nn.DataParallel(model)
    assert checked(problem(wrapped)).loss == pytest.approx(checked(problem(model)).loss, rel=1e-12)


BROKEN = {
    "later batches are not looked at": (
        lambda patch: patch.setattr(room.Curvature, "loss", lambda op: 1.0),
        "a label out of range in the last batch",
    ),
    "batches are not divided": (
        lambda patch: patch.setattr(room, "weighting", lambda op: []),
        "a custom loss weighted otherwise",
    ),
    "kinks are not looked for": (
        lambda patch: patch.setattr(kinks, "KINKED", ("none",)),
        "finite differences with kinks",
    ),
    "NaN is let through": (
        lambda patch: patch.setattr(room.math, "isfinite", lambda value: True),
        "NaN loss",
    ),
    "whatever changes is random": (
        lambda patch: patch.setattr(unsteady, "differ", lambda a, b: False),
        "a counter in forward",
    ),
    "whatever is NaN is arithmetic": (
        lambda patch: patch.setattr(room, "why_not_finite", lambda _: "look for overflow or log(0)"),
        "a batch that is ignored",
    ),
    "batches are not put together": (
        lambda patch: patch.setattr(unsteady, "joined", lambda _: None),
        "a batch that is ignored by another number",
    ),
    "the data are not looked at": (
        lambda patch: patch.setattr(unsteady, "_not_finite_row", lambda _: None),
        "an example that is NaN",
    ),
    "what torch said is left out": (
        lambda patch: patch.setattr(failing, "one_line", lambda error, limit=0: type(error).__name__),
        "inputs of another shape",
    ),
}


@pytest.mark.parametrize(("breakage", "name"), BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage, name, monkeypatch):
    breakage(monkeypatch)
    assert not named(name)


class Padded(nn.Module):
    """Reads tokens, the first of which is the padding, through a mask or without one; its head may be tied."""

    def __init__(self, *, mask, tied=False, module=True, head=None):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(7, 4, padding_idx=0)
        self.middle, self.head = nn.Linear(4, 4), nn.Linear(4, 7)
        self.mask, self.module = mask, module
        nn.init.normal_(self.words.weight)
        if tied:
            self.head.weight = self.words.weight
        if head is not None:
            nn.init.constant_(self.head.weight, head)

    def forward(self, tokens):
        words = self.words(tokens) if self.module else F.embedding(tokens, self.words.weight, padding_idx=0)
        keep = (tokens != 0)[..., None].to(words)
        mixed = torch.tanh(self.middle(words)) * (keep if self.mask else 1)
        return self.head(mixed.sum(1) / keep.sum(1))


def padded(pads, **options):
    """Padding at the ends of the last examples alone, which the self-test does not try."""
    tokens = torch.randint(1, 7, (24, 3), generator=models.generator(2))
    tokens[24 - pads :, -1] = 0
    return Problem(Padded(**options).double(), {"train": (tokens, models.labels(24, 7))}, "cross_entropy")


PADDED = {  # problem, whether padding reaches the loss
    "no padding": (lambda: padded(0, mask=False), False),
    "masked": (lambda: padded(12, mask=True), False),
    "masked, tied": (lambda: padded(12, mask=True, tied=True), False),
    "masked, all padded": (lambda: padded(24, mask=True), False),
    "read": (lambda: padded(3, mask=False), True),
    "read, tied": (lambda: padded(3, mask=False, tied=True), True),
    "read by a function": (lambda: padded(3, mask=False, module=False), True),
    "read, a head of zeros": (lambda: padded(3, mask=False, head=0.0), True),
}


@pytest.mark.parametrize("name", PADDED)
def test_masked_gradients_are_refused_where_they_leave_something_out(name):
    check_padded(name)


def check_padded(name):
    make, reaches = PADDED[name]
    subject = make()
    checked = preflight(subject, models.sample(subject, 4))
    assert not checked.texts("warning")
    found = " ".join(checked.texts("fault"))
    cure = re.search(r"words masks its gradient.*words.padding_idx = None, or keep padding out", found)
    assert bool(found) == bool(cure) == reaches, found


def test_the_cure_for_masked_gradients_is_measured():
    subject = padded(3, mask=False)
    subject.model.words.padding_idx = None
    assert not preflight(subject, models.sample(subject, 4)).texts("fault")


@pytest.mark.parametrize(
    ("what", "spoiled", "name"),
    [
        ("masked_gradients", lambda operator: [], "read"),
        ("_gradients", lambda operator, theta, batch: ([(theta[0], 1.0)], 1.0), "masked, all padded"),
        ("moved", lambda operator: operator.function.theta, "read, a head of zeros"),
    ],
    ids=["nothing is looked at", "every mask leaves something out", "at the checkpoint alone"],
)
def test_this_promise_would_notice_masked_gradients(monkeypatch, what, spoiled, name):
    monkeypatch.setattr(room if what == "masked_gradients" else masked_rows, what, spoiled)
    with pytest.raises(AssertionError):
        check_padded(name)
