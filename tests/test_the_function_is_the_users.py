"""Promise: before every measurement the user's own model is asked for loss and gradient; another one is refused.

The second opinion uses the untouched module and torch's own losses. Each breakage below measures another function
in a way that the self-test cannot see: products and differences of the wrong function agree.
"""

from __future__ import annotations

import functools
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import hessdiag
from hessdiag.analysis import operator_of
from hessdiag.engine.checks import kept_weights, second_opinion
from hessdiag.engine.checks import preflight as room
from hessdiag.engine.checks.preflight import preflight, require_sound
from hessdiag.engine.products import functional
from hessdiag.errors import MeasurementError, ProblemError
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


def by_input_gradient(model, batch):
    x = batch[0].detach().clone().requires_grad_()
    slope = torch.autograd.grad(model(x).sum(), x, create_graph=True)[0]
    return (slope.square().sum(1) - 1).square().mean()


def test_a_loss_may_differentiate_by_its_inputs():
    """Physics-informed losses, forces, gradient penalties; the inputs are no parameters of the criterion."""
    problem = regression()
    model = problem.model.double()
    x = problem.data["train"][0].double()
    done = checked(Problem(model, {"train": (x, x)}, loss=by_input_gradient))
    require_sound(done)
    assert not done.texts("warning")
    parameters = list(model.parameters())
    gradient = torch.autograd.grad(
        by_input_gradient(model, (x,)), parameters, create_graph=True, allow_unused=True
    )
    flat = torch.cat([g.reshape(-1) for g in gradient if g is not None])
    size = len(flat)
    named = parameters[:3]  # the last bias moves no slope
    rows = [torch.cat([t.reshape(-1) for t in torch.autograd.grad(e, named, retain_graph=True)]) for e in flat]
    H = done.operator @ torch.eye(done.operator.size, dtype=torch.float64)
    torch.testing.assert_close(H[:size, :size], torch.stack(rows), rtol=1e-9, atol=1e-10)


def test_a_detached_branch_is_named():
    def towards_itself(model, batch):
        return (model(batch[0]) - model(batch[0] + 1).detach()).square().mean()

    problem = regression()
    with pytest.raises(MeasurementError, match=r"detach.*straight-through.*frozen copy"):
        require_sound(checked(Problem(problem.model, problem.data, loss=towards_itself)))


def test_the_trace_survives_a_criterion_with_parameters():
    problem = regression()
    centres = nn.Parameter(torch.ones(2))
    subject = Problem(
        problem.model, problem.data, criterion=lambda z, b: (z - centres.to(z) * b[1]).square().mean()
    )
    assert hessdiag.analyze(subject, ["trace"]).metrics["trace"].value > 0


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


class Reader(LanguageModel):
    """Reads its labels as one of `readings.reading_of`."""

    def __init__(self, reading):
        super().__init__("shifted" in reading)
        self.reading = reading

    def forward(self, input_ids, attention_mask=None, labels=None):
        if labels is not None and "masked" in self.reading:
            labels = labels.masked_fill(attention_mask == 0, -100)
        returned = super().forward(input_ids, labels)
        if labels is not None and self.reading == "other":
            returned.loss = returned.loss * 1.1
        return returned


def padded(problem):
    """Labels of padding left out, by the line that the refusal gives."""
    for batch in problem.data["train"]:
        batch["labels"] = batch["labels"].masked_fill(batch["attention_mask"] == 0, -100)
    return problem


READINGS = {  # reading of the model: the criterion taken by mistake, what is said, what then goes through
    "shifted": ("cross_entropy", r'label t \+ 1: give criterion="causal_lm"', {"criterion": "causal_lm"}),
    "as is": ("causal_lm", r'label t: give criterion="cross_entropy"', {"criterion": "cross_entropy"}),
    "masked by attention_mask": (
        "cross_entropy",
        r'padding.*masked_fill\(batch\["attention_mask"\] == 0, -100\), and criterion="cross_entropy"',
        {"criterion": "cross_entropy"},
    ),
    "shifted, masked by attention_mask": (
        "causal_lm",
        r'padding.*masked_fill\(batch\["attention_mask"\] == 0, -100\), and criterion="causal_lm"',
        {"criterion": "causal_lm"},
    ),
    "other": (
        "cross_entropy",
        r"give loss=lambda model, batch: model\(\*\*batch\)\.loss",
        {"loss": lambda model, batch: model(**batch).loss},
    ),
}


@pytest.mark.parametrize("reading", READINGS)
def test_how_the_model_reads_its_labels_is_said_and_goes_through(reading):
    wrong, said, right = READINGS[reading]
    data = texts()
    for batch in data:
        mask = torch.ones_like(batch["input_ids"])
        mask[::2, -2:] = 0
        batch["attention_mask"] = mask
    torch.manual_seed(4)
    model = Reader(reading)
    with pytest.raises(MeasurementError, match=said) as caught:
        require_sound(checked(Problem(model, {"train": data}, criterion=wrong), batch_size=None))
    assert "\n" not in str(caught.value)
    problem = Problem(model, {"train": data}, **right)
    require_sound(checked(padded(problem) if "masked" in reading else problem, batch_size=None))


def test_a_model_that_needs_its_labels_is_given_them_by_the_line_that_is_said():
    """As encoder-decoders do: they shift the labels to what the decoder reads."""

    class Needy(LanguageModel):
        def forward(self, input_ids, labels=None):
            if labels is None:
                raise ValueError("specify decoder_input_ids")
            return super().forward(input_ids, labels)

    model, data = Needy(False), {"train": texts()}
    line = "forward=lambda model, batch: model(**batch).logits"
    with pytest.raises(ProblemError) as caught:
        checked(Problem(model, data, criterion="cross_entropy"), batch_size=None)
    assert str(caught.value).endswith(line)
    forward = eval(line.removeprefix("forward="))
    require_sound(checked(Problem(model, data, criterion="cross_entropy", forward=forward), batch_size=None))


class InCriterion:
    """A criterion that reads a weight of the model from where no swap of modules finds it."""

    __slots__ = ("hidden",)

    def __init__(self, weight):
        self.hidden = weight

    def __call__(self, outputs, batch):
        out = outputs if isinstance(outputs, torch.Tensor) else outputs["out"]
        return F.mse_loss(out, batch[1]) + self.hidden.square().sum()


class Named(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return {"out": self.inner(x)}


@pytest.mark.parametrize("first", ["outputs", "returned", "total"])
@pytest.mark.parametrize("named", [False, True])
def test_a_weight_that_only_the_criterion_reaches_moves_too(first, named):
    """Whatever was computed first: outputs that reach no such weight say nothing about the loss."""
    inner = regression().model.double()
    model = Named(inner) if named else inner
    data = tuple(tensor.double() for tensor in regression().data["train"])
    problem = Problem(model, {"train": data}, criterion=InCriterion(inner[2].weight))
    function = functional.Functional(problem)
    batch = data
    if first == "total" or (named and first == "outputs"):
        function.total(function.theta, batch)
    else:
        getattr(function, first)(function.theta, batch)
    (slope,) = torch.autograd.grad(function.total(function.theta, batch), function.theta[2])
    loss = F.mse_loss(inner(data[0]), data[1]) + inner[2].weight.square().sum()
    (true,) = torch.autograd.grad(loss * 40, inner[2].weight)
    assert torch.allclose(slope, true, rtol=1e-12)


def test_a_model_that_writes_into_its_batch_is_named():
    class Writing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 2)

        def forward(self, x):
            return self.a(x.mul_(0.5))

    with pytest.raises(MeasurementError, match="writes into the batch"):
        checked(Problem(Writing(), regression().data, criterion="mse"))


class Factored(nn.Module):
    """Its first weight is the product of two; how it comes by that is its own affair."""

    def __init__(self, weight=None):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(4, 2) / 2), nn.Parameter(torch.randn(2, 5) / 2)
        self.head = nn.Linear(5, 2)
        self.product = weight or (lambda model: model.a @ model.b)

    def forward(self, x):
        return self.head(torch.tanh(x @ self.product(self).to(x)))


class OfItsClass(Factored):
    @functools.lru_cache  # noqa: B019
    def kept(self):
        return self.a @ self.b

    def forward(self, x):
        return self.head(torch.tanh(x @ self.kept().to(x)))


def keeping(key=lambda model: 0, make=lambda model: model.a @ model.b, given=lambda made: made, kept=None):
    """A model that keeps its product in a dict of nobody's, by a key, and gives ``given`` the first time."""
    cache = {} if kept is None else kept

    def product(model):
        place = key(model)
        if place in cache:
            return cache[place]
        made = make(model)
        cache[place] = made if given(made) is made else made.detach()
        return given(made)

    return Factored(product)


class Shelf:
    kept = None


def on_an_object():
    shelf = Shelf()

    def product(model):
        shelf.kept = model.a @ model.b if shelf.kept is None else shelf.kept
        return shelf.kept

    return Factored(product)


class OfExamples(Factored):
    """Keeps what it makes of its inputs: every batch is computed once."""

    def forward(self, x):
        key = (len(x), round(float(x.sum()), 3))
        if key not in self.seen[0]:
            self.seen[0][key] = torch.tanh(x @ (self.a @ self.b))
        return self.head(self.seen[0][key].to(x))


def of_examples():
    model = OfExamples()
    model.seen = ({},)
    return model


def beside_itself(detached=False):
    """A weight that is used as it is, and twice itself from a cache: two thirds of its slope are lost."""
    cache = []

    def product(model):
        twice = cache[0].to(model.a) if cache else 2 * model.a
        if not cache:
            cache.append(twice.detach() if detached else twice)
        return (model.a + twice) @ model.b

    return Factored(product)


PAST = "reaches [ab] past the model.*a cache"
KEPT = {  # name: (model, dtype of the measurement, what the refusal says)
    "lru_cache on a method": (OfItsClass, None, PAST),
    "lru_cache on a method, another precision": (OfItsClass, "float64", PAST),
    "a dict in a closure": (keeping, None, PAST),
    "nothing saved for the backward pass": (lambda: keeping(make=lambda m: m.a[:, :1] + m.b[:1]), None, PAST),
    "an attribute of an object": (on_an_object, None, PAST),
    "a part of a weight's use": (beside_itself, None, PAST),
    "a part, detached after the first time": (lambda: beside_itself(True), None, "^a had another part"),
    "by the examples": (of_examples, None, PAST),
    "by the weights' versions": (lambda: keeping(lambda m: m.a._version), None, PAST),
    "by the weights' ids": (lambda: keeping(lambda m: id(m.a)), "float64", "keeps a tensor with its graph"),
    "by the weights' precision": (
        lambda: keeping(lambda m: m.a.dtype),
        "float64",
        "keeps a tensor with its graph",
    ),
    "detached after the first time": (
        lambda: keeping(given=lambda made: made.view_as(made)),
        None,
        "a had another part in the loss in the first pass.*lru_cache.*anew in every forward",
    ),
}


def factored(model):
    return Problem(model, regression().data, criterion="mse")


def of_kept(name, **options) -> str:
    """The refusal of a model that keeps a weight; empty where it is measured."""
    make, dtype, _ = KEPT[name]
    torch.manual_seed(0)
    try:
        hessdiag.analyze(factored(make()), ["lambda_max"], batch_size=20, dtype=dtype, **options)
    except MeasurementError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", KEPT)
def test_a_weight_computed_once_and_kept_is_refused(name):
    text = of_kept(name)
    assert re.search(KEPT[name][2], text), text
    assert "\n" not in text


@pytest.mark.parametrize("name", KEPT)
def test_it_is_refused_without_a_second_opinion_too(name):
    assert of_kept(name, second_opinion=False)


def test_the_operator_alone_refuses_it_too():
    with pytest.raises(MeasurementError, match=PAST):
        hessdiag.hessian(factored(keeping()), batch_size=20)


def test_what_the_model_keeps_is_made_of_its_own_weights():
    """Not of the measurement's copies: the cache outlives it, and the next step of training reads it."""
    cache = {}
    model = keeping(kept=cache)
    with pytest.raises(MeasurementError):
        checked(factored(model))
    model.zero_grad()
    assert {id(node.variable) for node in functional.graph_nodes(cache[0]) if hasattr(node, "variable")} == {
        id(model.a),
        id(model.b),
    }


def attribute():
    def product(model):
        model.folded = model.a @ model.b if model.folded is None else model.folded
        return model.folded

    model = Factored(product)
    model.folded = None
    return model


ALREADY = {
    "lru_cache on a method": OfItsClass,
    "a dict in a closure": keeping,
    "an attribute of an object": on_an_object,
    "an attribute": attribute,
}


@pytest.mark.parametrize("name", ALREADY)
def test_a_cache_filled_without_gradients_before_is_warned_of(name):
    model = ALREADY[name]()
    x = regression().data["train"][0]
    with torch.no_grad():
        model.eval()(x)
    asked = hessdiag.analyze(factored(model), ["lambda_max"], batch_size=20)
    (warning,) = asked.warnings
    assert re.search(r"^a and 1 more: not read.*constant \(4, 5\).*no_grad.*empty that cache", warning), warning


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cache_that_holds_no_weights_is_nobodys_business(dtype):
    table = functools.lru_cache(lambda n: torch.linspace(0, 1, n))
    done = checked(factored(Factored(lambda m: m.a @ m.b * table(5).to(m.a))), dtype=dtype)
    require_sound(done)
    assert not done.texts("warning")


def test_an_attribute_that_every_pass_fills_anew_is_measured():
    """The model is put back as it was before every pass, so that it folds its weights each time."""
    require_sound(checked(factored(attribute())))


def test_a_parameter_without_a_part_is_noted():
    model = Factored()
    model.extra = nn.Parameter(torch.ones(4))
    done = checked(factored(model))
    require_sound(done)
    assert any(text.startswith("4 numbers take no part in the loss (extra)") for text in done.texts("note"))
    assert not done.texts("warning")


def test_a_loss_may_ask_for_the_gradient_of_its_batch():
    """What is asked of the tensors that a loss is given does not stay with the samples."""

    def loss(model, batch):
        return F.mse_loss(model(batch[0].requires_grad_()), batch[1])

    problem = regression()
    done = checked(Problem(problem.model, problem.data, loss=loss))
    require_sound(done)
    assert not done.texts("warning")
    assert not any(tensor.requires_grad for batch in done.operator.samples.batches for tensor in batch)


@pytest.mark.parametrize("outside", [False, True])
def test_a_reentrant_checkpoint_is_no_obstacle(outside):
    """It refuses torch.autograd.grad, and hides the parameters of a function that is no module."""

    def forward(model, batch):
        inner = model[:2] if outside else model
        h = checkpoint(inner, batch[0].clone().requires_grad_(), use_reentrant=True)
        return model[2](h) if outside else h

    problem = regression()
    done = checked(Problem(problem.model, problem.data, criterion="mse", forward=forward))
    require_sound(done)
    assert done.second_opinion is not None
    assert not done.texts("warning")


LOST = {  # what is left out: (how, a case that is then measured as if nothing were wrong)
    "the first pass is the measurement's": (
        lambda patch: [patch.setattr(where, "first_pass", lambda _: None) for where in (room, operator_of)],
        "lru_cache on a method",
    ),
    "the first pass is not made again": (
        lambda patch: patch.setattr(room, "require_kept_nothing", lambda *_: None),
        "detached after the first time",
    ),
    "only a parameter that is lost altogether counts": (
        lambda patch: patch.setattr(kept_weights, "CHANGE", 1.0),
        "a part, detached after the first time",
    ),
}


@pytest.mark.parametrize(("breakage", "name"), LOST.values(), ids=LOST)
def test_the_first_pass_is_what_finds_it(breakage, name, monkeypatch):
    breakage(monkeypatch)
    assert of_kept(name) == ""


def test_a_constant_in_the_place_of_weights_would_not_be_noticed_otherwise(monkeypatch):
    monkeypatch.setattr(room, "without_part", lambda *_: [])
    with pytest.raises(ValueError, match="not enough values"):
        test_a_cache_filled_without_gradients_before_is_warned_of("a dict in a closure")


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


def decided_once(monkeypatch):
    """What the first result says is taken to hold for every other."""

    class Once(set):
        def __contains__(self, name):
            return len(self) > 0

    true = functional.Functional.__init__

    def init(self, *args, **kwargs):
        true(self, *args, **kwargs)
        self._looked_at = Once()

    monkeypatch.setattr(functional.Functional, "__init__", init)


def test_what_the_first_result_says_would_not_do(monkeypatch):
    decided_once(monkeypatch)
    with pytest.raises(AssertionError):
        test_a_weight_that_only_the_criterion_reaches_moves_too("outputs", False)


def test_one_answer_to_every_reading_would_not_do(monkeypatch):
    monkeypatch.setattr(
        second_opinion, "ANSWERS", dict.fromkeys(second_opinion.ANSWERS, second_opinion.ANSWERS["other"])
    )
    with pytest.raises(AssertionError):
        test_how_the_model_reads_its_labels_is_said_and_goes_through("shifted")


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
