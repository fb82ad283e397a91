"""Promise: the loss that is measured is what torch's functions give on the user's outputs and targets. (20 s)

Targets that torch refuses or only broadcasts are refused with the line to type; batches count by what the mean
stands for, at every batch size, or a word says that this could not be tried.
"""

from __future__ import annotations

import functools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hessdiag
from hessdiag.analysis.traces import model_trace
from hessdiag.criteria import layout
from hessdiag.engine.checks import candidates, weighting
from hessdiag.engine.checks.preflight import preflight, require_sound
from hessdiag.engine.checks.readings import reading_of
from hessdiag.engine.landscape import passes
from hessdiag.engine.landscape.landscape import Landscape
from hessdiag.engine.products import composition
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.squares.curved import curved_tensors
from hessdiag.engine.squares.gauss_newton import gauss_newton_trace
from hessdiag.engine.squares.loss_roots import root
from hessdiag.errors import HessdiagError, MeasurementError, Refused, UsageError
from hessdiag.problem import Problem
from hessdiag.settings import Settings
from tests import models

N, WORDS, LENGTH = 12, 7, 5


def dense(model, loss, names=None):
    """The Hessian of loss(model) by double backward, row by row, without hessdiag."""
    model.eval()
    parameters = [p for name, p in model.named_parameters() if names is None or name in names]

    def flat(tensors):
        filled = (torch.zeros_like(p) if t is None else t for t, p in zip(tensors, parameters, strict=True))
        return torch.cat([t.reshape(-1) for t in filled])

    slope = flat(torch.autograd.grad(loss(model), parameters, create_graph=True, allow_unused=True))
    rows = [torch.autograd.grad(one, parameters, retain_graph=True, allow_unused=True) for one in slope]
    return torch.stack([flat(row) for row in rows]).detach()


def matrix(problem, size=None, kind="hessian"):
    op = Curvature(problem, models.sample(problem, size), kind=kind)
    return torch.stack([op @ row for row in torch.eye(op.size, dtype=torch.float64)])


def error(a, b) -> float:
    return float((a - b).abs().max() / b.abs().max())


def net(*layers, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(*layers).double()


def tokens(rows=N):
    return torch.randint(WORDS, (rows, LENGTH), generator=models.generator(3))


def padded():
    labels = tokens()
    for row in range(N):
        labels[row, LENGTH - row % 4 :] = -100
    return labels


def shifted(logits, labels):
    """The loss of Hugging Face's causal language models, written out."""
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


class Tokens(nn.Module):
    """Per-token logits from a token and the mean of those before it."""

    def __init__(self, width=3):
        super().__init__()
        self.embed = nn.Embedding(WORDS, width)
        self.head = nn.Linear(width, WORDS)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return self.head(torch.tanh(x + x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]))


def language(labels=None, **options):
    torch.manual_seed(1)
    labels = padded() if labels is None else labels
    inputs = labels.clamp(min=0)
    rows = [{"input_ids": inputs[i : i + 3], "labels": labels[i : i + 3]} for i in range(0, len(labels), 3)]
    if not options:
        options = {"criterion": "causal_lm"}
    return Problem(Tokens().double(), {"train": rows}, **options)


X, Y = models.randn(N, 4), models.labels(N, 3)
SOFT = models.randn(N, 3, 2, 5, seed=5).softmax(1)
IMAGES = models.randn(N, 2, 2, 5, seed=6)
CE = "cross_entropy"

SAME = {  # name: (model, inputs, targets, criterion, the same loss by torch)
    "class indices": (lambda: net(nn.Linear(4, 3)), X, Y, CE, F.cross_entropy),
    "class indices of few bytes": (lambda: net(nn.Linear(4, 3)), X, Y.to(torch.uint8), CE, None),
    "ignored classes of int16": (
        lambda: net(nn.Linear(4, 3)),
        X,
        torch.where(Y == 1, -100, Y).to(torch.int16),
        CE,
        lambda o, t: F.cross_entropy(o, t.long()),
    ),
    "soft targets": (lambda: net(nn.Linear(4, 3)), X, models.randn(N, 3).softmax(1), CE, F.cross_entropy),
    "soft targets that do not sum to one": (
        lambda: net(nn.Linear(4, 3)),
        X,
        models.randn(N, 3).abs(),
        CE,
        F.cross_entropy,
    ),
    "one-hot floats": (lambda: net(nn.Linear(4, 3)), X, F.one_hot(Y, 3).double(), CE, F.cross_entropy),
    "soft targets of images": (lambda: net(nn.Conv2d(2, 3, 1)), IMAGES, SOFT, CE, F.cross_entropy),
    "soft targets of sequences": (
        lambda: net(nn.Conv1d(2, 3, 1)),
        IMAGES[:, :, 0],
        SOFT[:, :, 0],
        CE,
        F.cross_entropy,
    ),
    "as many classes as places": (
        lambda: net(nn.Conv1d(2, 3, 1)),
        IMAGES[:, :, 0, :3],
        SOFT[:, :, 0, :3],
        CE,
        F.cross_entropy,
    ),
    "numbers": (lambda: net(nn.Linear(4, 2)), X, models.randn(N, 2, seed=8), "mse", F.mse_loss),
    "whole numbers": (lambda: net(nn.Linear(4, 1)), X, Y[:, None], "mse", F.mse_loss),
    "truth values": (lambda: net(nn.Linear(4, 1)), X, (Y > 0)[:, None], "mse", None),
    "numbers without their dimension": (
        lambda: net(nn.Linear(4, 1)),
        X,
        models.randn(N, seed=8),
        "mse",
        lambda o, t: F.mse_loss(o[:, 0], t),
    ),
}


def torch_says(function, targets):
    if function is not None:
        return function
    if targets.dtype == torch.bool:
        return lambda o, t: F.mse_loss(o, t.to(o))
    return lambda o, t: F.cross_entropy(o, t.long())


@pytest.mark.parametrize("size", [1, 5, None])
@pytest.mark.parametrize("name", SAME)
def test_a_criterion_means_what_torchs_function_means(name, size):
    make, x, y, criterion, function = SAME[name]
    model = make()
    problem = Problem(model, {"train": (x, y)}, criterion=criterion)
    say = torch_says(function, y)
    H = dense(model, lambda m: say(m(x), y))
    assert error(matrix(problem, size), H) < 1e-11
    op = Curvature(problem, models.sample(problem, size))
    assert op.loss() == pytest.approx(say(model(x), y).item(), rel=1e-12)
    # what is linear in each tensor has H = G, so both ways to the trace must meet
    assert gauss_newton_trace(op).draws.item() == pytest.approx(float(H.trace()), rel=1e-10)


def given(model, x, y, criterion=CE):
    return lambda: Problem(model(), {"train": (x, y)}, criterion=criterion)


def linear(outputs=3):
    return lambda: net(nn.Linear(4, outputs))


class Returns(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.linear, self.wrap = nn.Linear(4, 3).double(), wrap

    def forward(self, x):
        return self.wrap(self.linear(x))


class Named:
    def __init__(self, logits):
        self.scores = logits


REFUSED = {  # name: (problem, what is said)
    "class indices as floats": (given(linear(), X, Y.float()), r"float\d+ \(\d+,\), give targets.long\(\)"),
    "class indices as floats, of images": (
        given(lambda: net(nn.Conv2d(2, 3, 1)), IMAGES, SOFT[:, 0]),
        r"give targets.long\(\)",
    ),
    "class indices as truth values": (given(linear(2), X, Y > 0), r"bool.*targets.long\(\)"),
    "class indices in a column": (given(linear(), X, Y[:, None]), r"do not fit.*targets.flatten\(\)"),
    "class indices in a column, as floats": (given(linear(), X, Y[:, None].float()), "shaped as the logits"),
    "one-hot whole numbers": (given(linear(), X, F.one_hot(Y, 3)), r"targets.float\(\)"),
    "one-hot truth values": (given(linear(), X, F.one_hot(Y, 3).bool()), "truth|bool"),
    "one logit": (given(linear(1), X, (Y > 0)[:, None].double()), "one logit.*binary_cross_entropy_with_logits"),
    "one logit, whole numbers": (given(linear(1), X, (Y > 0).long()), "one logit.*binary_cross_entropy"),
    "soft targets with classes last": (
        given(lambda: net(nn.Linear(4, 5)), models.randn(N, 3, 4), models.randn(N, 3, 5).softmax(-1)),
        r"torch's classes are second.*movedim\(-1, 1\)",
    ),
    "a class that does not exist": (given(linear(), X, Y + 1), "Target 3 is out of bounds"),
    "a negative class": (given(linear(), X, Y - 1), "Target -1 is out of bounds"),
    "nothing that counts": (given(linear(), X, torch.full_like(Y, -100)), "every target is ignored"),
    "targets that are no numbers": (
        given(linear(), X, torch.where(F.one_hot(Y, 3).bool(), math.nan, 0.0).double()),
        "4 of 12 targets are NaN",
    ),
    "numbers in another layout": (
        given(lambda: net(nn.Conv2d(2, 3, 1)), IMAGES, SOFT.permute(0, 2, 3, 1), "mse"),
        "differ in shape.*permute",
    ),
    "numbers that torch would broadcast": (given(linear(), X, models.randn(N, 1), "mse"), "differ in shape"),
    "a class index for an error": (given(linear(), X, Y, "mse"), "differ in shape"),
    "NaN numbers": (given(linear(), X, X[:, :3] / 0 * 0, "mse"), "12 of 12 targets are NaN"),
    "a tuple": (given(lambda: Returns(lambda z: (z, z)), X, Y), r"\(batch\[0\]\)\[0\], or a criterion=f\(outputs"),
    "a mapping": (given(lambda: Returns(lambda z: {"aux": z, "out": z}), X, Y), r"dict \(aux, out\).*\['out'\]"),
    "an object": (given(lambda: Returns(Named), X, Y), "returns Named.*give forward="),
    "two kinds of labels": (
        lambda: Problem(
            Tokens().double(),
            {"train": [{"input_ids": tokens(), "labels": tokens(), "label": Y}]},
            criterion=CE,
        ),
        "several targets in a batch .labels, label.: keep one",
    ),
    "next tokens of a classifier": (given(linear(), X, Y, "causal_lm"), "it needs token indices"),
    "next tokens of one logit vector a text": (
        given(lambda: net(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(20, 3)), tokens(), tokens(), "causal_lm"),
        r"it needs \(batch, tokens, words\)",
    ),
}


def refusal(make) -> str:
    try:
        problem = make()
        require_sound(preflight(problem, models.sample(problem, 4)))
    except HessdiagError as error:
        return str(error)
    return ""


def refused(name) -> bool:
    make, text = REFUSED[name]
    said = refusal(make)
    return bool(re.search(text, said)) and "\n" not in said


@pytest.mark.parametrize("name", REFUSED)
def test_what_torch_does_not_take_is_refused(name):
    assert refused(name), refusal(REFUSED[name][0])


def test_a_target_read_in_another_shape_is_told():
    problem = given(linear(1), X, models.randn(N, seed=8), "mse")()
    notes = preflight(problem, models.sample(problem, 4)).texts("note")
    assert any(re.search(r"targets \(4,\) were read as outputs \(4, 1\)", note) for note in notes)


def test_a_weight_says_what_a_built_in_mean_counts_for():
    problem = Problem(linear()(), {"train": (X, Y)}, criterion=CE, weight=lambda batch: 2.0 * len(batch[1]))
    H = dense(problem.model, lambda m: F.cross_entropy(m(X), Y))
    assert error(matrix(problem, 5), H) < 1e-11


# ------------------------------------------------------------------------------------------- next tokens


@pytest.mark.parametrize("size", [1, 2, None])
def test_the_next_token_is_what_a_language_model_is_asked_for(size):
    problem = language()
    labels = padded()
    H = dense(problem.model, lambda m: shifted(m(labels.clamp(min=0)), labels))
    assert error(matrix(problem, size), H) < 1e-11
    op = Curvature(problem, models.sample(problem, size))
    assert op.total_weight == int((labels[:, 1:] != -100).sum())
    G, R = (matrix(problem, size, kind) for kind in ("ggn", "residual"))
    assert error(G + R, H) < 1e-11
    trace = gauss_newton_trace(op, draws=400)
    assert not trace.exact
    spread = float(trace.draws.std()) / math.sqrt(400)
    assert abs(float(trace.draws.mean()) - float(G.trace())) < 5 * spread


def test_few_next_tokens_have_an_exact_trace():
    labels = padded()[:, :4]
    problem = language(labels, criterion="causal_lm", forward=lambda m, b: m(b["input_ids"])[..., :3])
    rows = problem.data["train"]
    rows[:] = [batch | {"labels": batch["labels"].where(batch["labels"] < 3, -100)} for batch in rows]
    op = Curvature(problem, models.sample(problem))
    G = matrix(problem, kind="ggn")
    trace = gauss_newton_trace(op)
    assert trace.exact
    assert trace.draws.item() == pytest.approx(float(G.trace()), rel=1e-10)
    outputs = op.function.outputs(op.function.theta, op.batches[0])
    assert root(problem, outputs.detach(), op.batches[0]).shape[1] == 4 * 2  # two columns a place


def test_scores_and_losses_are_of_next_tokens():
    problem = language()
    landscape = Landscape(Curvature(problem, models.sample(problem)))
    scores = landscape.examples()
    labels = padded()
    logits = problem.model(labels.clamp(min=0))[:, :-1].flatten(0, 1).detach()
    kept = labels[:, 1:].flatten() != -100
    true = F.cross_entropy(logits[kept], labels[:, 1:].flatten()[kept], reduction="none")
    assert torch.allclose(scores.loss, true)
    assert torch.equal(scores.correct, logits[kept].argmax(-1) == labels[:, 1:].flatten()[kept])
    assert landscape.loss_and_gradient().accuracy == pytest.approx(float(scores.correct.double().mean()))
    gradients = torch.cat(list(landscape.example_gradients()))
    assert torch.allclose(gradients.mean(0), landscape.gradient())


def test_the_reading_that_gives_a_models_own_loss_is_named():
    problem, labels = language(), tokens()
    mask = (padded() != -100).long()
    logits = problem.model(labels).detach()
    hidden = labels.masked_fill(mask == 0, -100)
    plain = lambda z, y: F.cross_entropy(z.flatten(0, 1), y.flatten()).item()  # noqa: E731
    losses = {
        "as is": plain(logits, labels),
        "shifted": shifted(logits, labels).item(),
        "masked by attention_mask": plain(logits, hidden),
        "shifted, masked by attention_mask": shifted(logits, hidden).item(),
        "other": 0.5 * plain(logits, labels),
    }
    assert {reading_of(logits, labels, loss, mask) for loss in losses.values()} == set(losses)
    assert all(reading_of(logits, labels, loss, mask) == name for name, loss in losses.items())
    assert reading_of(logits, labels, losses["masked by attention_mask"]) == "other"
    assert reading_of(logits[:, 0], labels[:, 0], losses["as is"]) == "other"
    assert reading_of(logits, hidden, shifted(logits, hidden).item(), mask) == "shifted"


# ------------------------------------------------------------------- what the loss takes beside the outputs


def penalised():
    model = net(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    penalty = lambda: 0.1 * sum(p.square().sum() for p in model.parameters())  # noqa: E731
    loss = lambda m: F.cross_entropy(m(X), Y) + penalty()  # noqa: E731
    problem = Problem(model, {"train": (X, Y)}, criterion=lambda o, b: F.cross_entropy(o, b[1]) + penalty())
    return problem, loss


class Spread(nn.Module):
    """A variance that only the criterion reads."""

    def __init__(self):
        super().__init__()
        self.mean, self.log_variance = nn.Linear(4, 1), nn.Parameter(torch.tensor(0.3))

    def forward(self, x):
        return self.mean(x)[:, 0]


def variance():
    torch.manual_seed(2)
    model, target = Spread().double(), models.randn(N, seed=9)

    def likelihood(outputs, targets):
        return ((outputs - targets).square() * (-model.log_variance).exp() + model.log_variance).mean() / 2

    problem = Problem(model, {"train": (X, target)}, criterion=lambda o, b: likelihood(o, b[1]))
    return problem, lambda m: likelihood(m(X), target)


class Heads(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.body, self.one, self.two, self.wrap = nn.Linear(4, 3), nn.Linear(3, 3), nn.Linear(3, 1), wrap

    def forward(self, x):
        h = torch.tanh(self.body(x))
        return self.wrap(self.one(h), self.two(h))


def heads(wrap, first, second):
    def make():
        torch.manual_seed(3)
        z = models.randn(N, seed=4)
        both = lambda o, y, z: F.cross_entropy(o[first], y) + F.mse_loss(o[second][:, 0], z)  # noqa: E731
        model = Heads(wrap).double()
        problem = Problem(model, {"train": (X, Y, z)}, criterion=lambda o, b: both(o, b[1], b[2]))
        return problem, lambda m: both(m(X), Y, z)

    return make


BESIDE = {
    "an L2 penalty": (penalised, "criterion takes 0.weight, 0.bias, 2.weight and 1 more from the parameters"),
    "a learned variance": (variance, "criterion takes log_variance from the parameters"),
    "a tuple": (heads(lambda a, b: (a, b), 0, 1), "returns tuple"),
    "a mapping": (heads(lambda a, b: {"out": a, "aux": b}, "out", "aux"), "returns dict"),
}


@pytest.mark.parametrize("size", [1, 5, None])
@pytest.mark.parametrize("name", BESIDE)
def test_what_the_criterion_takes_beside_the_outputs_is_in_every_number(name, size):
    make, why = BESIDE[name]
    problem, loss = make()
    H = dense(problem.model, loss)
    assert error(matrix(problem, size), H) < 1e-11
    report = hessdiag.analyze(
        problem, quantities=["lambda_max", "trace"], samples=N, batch_size=size, steps=40, probes=16, seed=1
    )
    trace = report.metrics["trace"]
    assert trace.lo - 1e-9 <= float(H.trace()) <= trace.hi + 1e-9
    assert report.metrics["lambda_max"].value == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-5)
    assert re.search(why, model_trace(Curvature(problem, models.sample(problem, 5)), Settings()).reason)


@pytest.mark.parametrize("name", BESIDE)
def test_there_is_no_gauss_newton_matrix_then(name):
    make, why = BESIDE[name]
    problem, _ = make()
    for kind in ("ggn", "residual"):
        with pytest.raises(UsageError, match=f"{why}.*G and R need one tensor.*or take hessian"):
            preflight(problem, models.sample(problem, 4), kind=kind)
        with pytest.raises(UsageError, match=why):
            Curvature(problem, models.sample(problem, 4)).with_kind(kind)


@pytest.mark.parametrize("name", BESIDE)
def test_the_landscape_moves_what_the_criterion_takes_too(name):
    problem, loss = BESIDE[name][0]()
    op = Curvature(problem, models.sample(problem, 5))
    landscape = Landscape(op)
    shift = 0.1 * models.randn(op.size, seed=5)
    slope = landscape.loss_and_gradient(shift)
    apart = landscape.loss(shift)
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(
            torch.nn.utils.parameters_to_vector(problem.model.parameters()) + shift, problem.model.parameters()
        )
    true = loss(problem.model)
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(true, list(problem.model.parameters()))])
    assert apart == pytest.approx(true.item(), rel=1e-10)
    assert torch.allclose(slope.gradient, gradient, rtol=1e-9, atol=1e-12)
    assert (landscape.loss_and_gradient(shift).accuracy is None) == (name != "an L2 penalty")


def test_curved_tensors_are_not_asked_for_then():
    """`curved_tensors` needs one tensor of outputs; `model_trace` must have turned back before."""
    problem, _ = BESIDE["a tuple"][0]()
    with pytest.raises(UsageError):
        curved_tensors(Curvature(problem, models.sample(problem, 4)))


# ------------------------------------------------------------------------------------------ weights of batches

CLASSES = torch.tensor([1.0, 5.0, 0.2], dtype=torch.float64)


def many(n=64, order=False):
    x, y = models.randn(n, 4, seed=7), models.labels(n, 3, seed=7)
    return (x, y.sort().values) if order else (x, y)


def class_weighted(data, **options):
    criterion = lambda o, b: F.cross_entropy(o, b[1], weight=CLASSES.to(o))  # noqa: E731
    return Problem(net(nn.Linear(4, 3)), {"train": data}, criterion=criterion, **options)


def own_loss(model, batch):
    return shifted(model(batch["input_ids"]), batch["labels"])


def masked_loss(model, batch):
    logits = model(batch["input_ids"])
    losses = F.cross_entropy(logits.flatten(0, 1), batch["input_ids"].flatten(), reduction="none")
    mask = batch["attention_mask"].flatten()
    return (losses * mask).sum() / mask.sum()


def masked():
    rows = [
        {"input_ids": tokens()[i : i + 3], "attention_mask": (padded() != -100).long()[i : i + 3]}
        for i in range(0, N, 3)
    ]
    return Problem(Tokens().double(), {"train": rows}, loss=masked_loss)


def module_loss():
    criterion = nn.CrossEntropyLoss(weight=CLASSES)
    return Problem(net(nn.Linear(4, 3)), {"train": many()}, criterion=lambda o, b: criterion(o, b[1]))


def partial_loss():
    function = functools.partial(weighted_loss, weights=CLASSES)
    return Problem(net(nn.Linear(4, 3)), {"train": many()}, criterion=function)


def weighted_loss(outputs, batch, weights):
    return F.cross_entropy(outputs, batch[1], weight=weights.to(outputs))


def ignoring():
    labels = padded().masked_fill(padded() == -100, 6)
    rows = [{"tokens": tokens()[i : i + 3], "labels": labels[i : i + 3]} for i in range(0, N, 3)]
    criterion = nn.CrossEntropyLoss(ignore_index=6)
    loss = lambda m, b: criterion(m(b["tokens"]).flatten(0, 1), b["labels"].flatten())  # noqa: E731
    return Problem(Tokens().double(), {"train": rows}, loss=loss)


def ignoring_some(index, some=8, weights=None):
    """Constant in the code: no module holds the number that is ignored. The first batch has none."""
    x, y = many()
    y = y.clone()
    y[-some:] = index
    criterion = lambda o, b: F.cross_entropy(o, b[1], ignore_index=index, weight=weights)  # noqa: E731
    return Problem(net(nn.Linear(4, 3)), {"train": (x, y)}, criterion=criterion)


LABELS = r"weight=lambda batch: float\(\(batch\['labels'\]"
UNLIKE = {  # name: (problem, batch sizes, the weight that is named)
    "class weights": (lambda: class_weighted(many()), (1, 8, None), r"float\(CLASSES.cpu\(\)\[batch\[1\]"),
    "class weights of few examples": (lambda: class_weighted(many(12)), (1, 4, None), "CLASSES"),
    "class weights, sorted by class": (lambda: class_weighted(many(order=True)), (1, 8, None), "CLASSES"),
    "class weights in a module": (module_loss, (1, 8, None), r"criterion.weight.cpu\(\)\[batch\[1\]"),
    "class weights in a partial": (partial_loss, (1, None), "weights"),
    "next tokens": (lambda: language(loss=own_loss), (1, None), LABELS + r"\[:, 1:\] != -100\)"),
    "an attention mask": (masked, (1, None), r"float\(batch\['attention_mask'\].sum\(\)\)"),
    "-1 ignored": (lambda: ignoring_some(-1), (3, 16, None), r"float\(\(batch\[1\] != -1\)"),
    "255 ignored": (lambda: ignoring_some(255), (3, 16, None), r"float\(\(batch\[1\] != 255\)"),
    "the first class ignored": (lambda: ignoring_some(0), (3, 16, None), r"float\(\(batch\[1\] != 0\)"),
    "the last class ignored": (lambda: ignoring_some(2), (3, 16, None), r"float\(\(batch\[1\] != 2\)"),
    "-1 ignored, and class weights": (
        lambda: ignoring_some(-1, weights=CLASSES),
        (3, 16, None),
        r"weights.cpu\(\)\[batch\[1\]\[batch\[1\] != -1\]",
    ),
    "another ignored index": (ignoring, (1, None), LABELS + r" != 6\)"),
}


def found(problem, size, level="fault"):
    return [f for f in weighting.weighting(Curvature(problem, models.sample(problem, size))) if f.level == level]


def caught(make, sizes) -> bool:
    return all(
        any("not the sum over its parts" in f.text and "weight=f" in f.text for f in found(make(), size))
        for size in sizes
    )


@pytest.mark.parametrize("name", UNLIKE)
def test_a_mean_of_another_weight_is_caught_at_every_batch_size(name):
    make, sizes, line = UNLIKE[name]
    assert caught(make, sizes)
    for size in sizes:
        (finding,) = found(make(), size)
        assert re.search(line, finding.text), finding.text
        assert "\n" not in finding.text


def test_the_line_that_is_named_is_the_cure():
    problem = language(loss=own_loss)
    text = found(problem, 1)[0].text.split("tried and fits: weight=")[1]
    labels = padded()
    H = dense(problem.model, lambda m: shifted(m(labels.clamp(min=0)), labels))
    problem.weight = eval(text)
    for size in (1, 2, None):
        require_sound(preflight(problem, models.sample(problem, size)))
        assert error(matrix(problem, size), H) < 1e-11
    bare = language(loss=own_loss)
    assert error(matrix(bare, 1), H) > 1e-3
    with pytest.raises(MeasurementError, match="weight=f"):
        require_sound(preflight(bare, models.sample(bare, 1)))


def test_of_two_weights_the_one_that_fits_better_is_named():
    """Labels and their shift are nearly in proportion: in single precision both are within the limit."""
    problem = language(loss=own_loss)
    with torch.no_grad():
        problem.model.head.weight.mul_(0.003)
        problem.model.head.bias.mul_(0.003)
    problem.model.float()
    (finding,) = found(problem, 1)
    assert re.search(LABELS + r"\[:, 1:\] != -100\)", finding.text), finding.text


def test_a_sum_is_called_a_sum():
    problem = Problem(
        net(nn.Linear(4, 3)), {"train": many()}, criterion=lambda o, b: F.cross_entropy(o, b[1], reduction="sum")
    )
    assert re.search("it is a sum: return the mean", found(problem, 8)[0].text)


def test_a_wrong_weight_is_told_with_the_right_one():
    problem = class_weighted(many(), weight=lambda batch: 3.0)
    (finding,) = found(problem, 1, "warning")
    assert re.search(r"batches of 1 examples only.*Problem\(weight=.*CLASSES", finding.text)


def ragged(**options):
    rows = [{"input_ids": tokens(1)[:, :n], "labels": tokens(1)[:, :n]} for n in range(2, LENGTH + 1)]
    return Problem(Tokens().double(), {"train": rows}, **options)


def test_what_cannot_be_tried_is_said():
    (finding,) = found(ragged(loss=own_loss), None, "warning")
    assert re.search(r"could not be tried.*mean over tokens.*Problem\(weight=f\(batch\)\)", finding.text)
    (finding,) = found(ragged(criterion="causal_lm"), None, "note")
    assert re.search("could not be tried.*'causal_lm' counts its terms itself", finding.text)
    problem = Problem(net(nn.Linear(4, 3)), {"train": [(X, Y, torch.ones(2, 2))]}, criterion=CE)
    (finding,) = found(problem, None, "note")
    assert re.search("one batch, which cannot be cut", finding.text)
    # they may be cut one by one all the same
    problem = ragged(loss=own_loss)
    report = weighting.weighting(Curvature(problem, models.sample(problem)))
    assert not [one for one in report if one.check == "weighting" and one.level != "ok"]


def penalised_many():
    model = net(nn.Linear(4, 3))
    penalty = lambda: 0.1 * model[0].weight.square().sum()  # noqa: E731
    return Problem(model, {"train": many()}, criterion=lambda o, b: F.cross_entropy(o, b[1]) + penalty())


def confident():
    model = net(nn.Linear(4, 3))
    with torch.no_grad():
        model[0].weight.mul_(0).add_(40 * torch.eye(3, 4))
    y = models.labels(64, 3)
    x = F.one_hot(y, 4).double() + 0.1 * models.randn(64, 4)
    return Problem(model.float(), {"train": (x, y)}, criterion=lambda o, b: F.cross_entropy(o, b[1]))


HEALTHY = {
    "cross-entropy": lambda: Problem(net(nn.Linear(4, 3)), {"train": many()}, criterion=CE),
    "sorted by class": lambda: Problem(net(nn.Linear(4, 3)), {"train": many(order=True)}, criterion=CE),
    "a criterion of one's own": lambda: Problem(
        net(nn.Linear(4, 3)), {"train": many()}, criterion=lambda o, b: F.cross_entropy(o, b[1])
    ),
    "a penalty": penalised_many,
    "its weight given": lambda: class_weighted(many(), weight=lambda b: float(CLASSES[b[1]].sum())),
    "next tokens": language,
    "confident": confident,
    "convolution": models.cnn,
    "attention": models.attention,
}


@pytest.mark.parametrize("size", [1, 3, None])
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_loss_is_not_suspected(name, size):
    problem = HEALTHY[name]()
    report = weighting.weighting(Curvature(problem, models.sample(problem, size)))
    assert [f.level for f in report] == ["ok"], report


def no_shift(patch):
    patch.setattr("hessdiag.criteria.criterion._next_tokens", lambda targets: targets)


def first_batch_only(patch):
    patch.setattr(weighting, "_alike", lambda examples: [])


def fits(name):
    make, sizes, _ = UNLIKE[name]
    return lambda: caught(make, sizes)


def passes_test(test, *names) -> bool:
    try:
        test(*names)
    except AssertionError:
        return False
    return True


def landscape_holds() -> bool:
    return passes_test(test_the_landscape_moves_what_the_criterion_takes_too, "an L2 penalty")


def next_tokens_hold() -> bool:
    problem, labels = language(), padded()
    H = dense(problem.model, lambda m: shifted(m(labels.clamp(min=0)), labels))
    return error(matrix(problem), H) < 1e-11


def trace_refused() -> bool:
    problem, _ = penalised()
    return isinstance(gauss_newton_trace(Curvature(problem, models.sample(problem))), Refused)


def healthy() -> bool:
    """Losses of examples so confident that they are rounding."""
    trial = weighting.Trial([0, 0], ([0], [0]), (1.01e-7, 0.99e-7, 1.02e-7), torch.float32)
    return trial.off(len, 1e-4) <= 1e-4


BROKEN = {
    "labels are not shifted": (no_shift, next_tokens_hold),
    "targets are reshaped": (
        lambda patch: patch.setattr(layout, "same_numbers", lambda o, t: o.numel() == t.numel()),
        lambda: refused("numbers in another layout"),
    ),
    "floats are taken for classes": (
        lambda patch: patch.setattr(layout, "is_index", lambda targets: targets.dim() < 2),
        lambda: refused("class indices as floats"),
    ),
    "values are not looked at": (
        lambda patch: patch.setattr("hessdiag.criteria.criterion.check_values", lambda criterion, targets: None),
        lambda: refused("soft targets with classes last"),
    ),
    "batches are not put together": (first_batch_only, fits("class weights of few examples")),
    "batches are not put together, sorted": (first_batch_only, fits("class weights, sorted by class")),
    "penalties are not looked for": (
        lambda patch: patch.setattr(composition, "_reached", lambda function, piece: []),
        trace_refused,
    ),
    "penalties stay where they are": (
        lambda patch: patch.setattr(passes, "beside_outputs", lambda operator: ""),
        landscape_holds,
    ),
    "any weight within the limit is named": (
        lambda patch: patch.setattr(weighting, "EQUAL", 1.0),
        lambda: passes_test(test_of_two_weights_the_one_that_fits_better_is_named),
    ),
    "labels are not looked at": (
        lambda patch: patch.setattr(candidates, "_labels", lambda batches, place: ([], ())),
        lambda: passes_test(test_a_mean_of_another_weight_is_caught_at_every_batch_size, "-1 ignored"),
    ),
    "rounding is a difference": (lambda patch: patch.setattr(weighting, "ROUNDING", 0), healthy),
}


@pytest.mark.parametrize("name", BROKEN)
def test_this_promise_would_notice(name, monkeypatch):
    damage, holds = BROKEN[name]
    assert holds()
    damage(monkeypatch)
    assert not holds()
