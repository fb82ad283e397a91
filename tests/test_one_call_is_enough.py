"""Promise: who has a model, a loss and a loader gets an analysis in one call; what is no such call is refused."""

from __future__ import annotations

import inspect
import pickle
import warnings
from functools import partial
from html.parser import HTMLParser
from typing import get_type_hints

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hessdiag
from hessdiag import HessdiagError, Problem, Settings
from hessdiag.option import options_of
from hessdiag.settings import Options
from tests import models
from tests.test_torch_losses_are_exact import dense

N = 24
X, LABELS, REAL = models.randn(N, 3), models.labels(N, 4), models.randn(N, 4, seed=5)
BITS = (REAL > 0).double()
ASKED = {"quantities": ["lambda_max", "trace"], "batch_size": 5}


def network(*last):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4), *last).double()


def loader(*tensors):
    return DataLoader(TensorDataset(*tensors), batch_size=7, shuffle=True)


def agrees(found, truth):
    values = torch.linalg.eigvalsh(truth)
    for metric, value in ((found.lambda_max, values[-1]), (found.trace, values.sum())):
        assert metric.lo - 1e-9 <= float(value) <= metric.hi + 1e-9


# journeys: a loader, and the loss as a training loop has it

JOURNEYS = {
    "classes": (network, nn.CrossEntropyLoss(), LABELS),
    "classes by a function": (network, F.cross_entropy, LABELS),
    "log-probabilities": (lambda: network(nn.LogSoftmax(1)), nn.NLLLoss(), LABELS),
    "numbers": (network, nn.MSELoss(), REAL),
    "numbers with outliers": (network, nn.HuberLoss(), REAL),
    "bits": (network, nn.BCEWithLogitsLoss(), BITS),
    "a loss of one's own": (network, lambda outputs, targets: (outputs - targets).abs().pow(3).mean(), REAL),
    "a loss of one's own, by trial": (network, lambda p, q: (p - q).pow(4).mean(), REAL),
    "a partial of one's own": (
        network,
        partial(lambda out, target, power: (out - target).pow(power).mean(), power=4),
        REAL,
    ),
}


@pytest.mark.parametrize("name", JOURNEYS)
def test_a_model_a_loss_and_a_loader(name):
    make, loss_fn, targets = JOURNEYS[name]
    model = make()
    found = hessdiag.analyze(model, loss_fn, loader(X, targets), **ASKED)
    agrees(found, dense(model, X, lambda out: loss_fn(out, targets)))


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.classes, self.size = nn.Linear(3, 4), nn.Linear(4, 3), nn.Linear(4, 1)

    def forward(self, x):
        hidden = self.trunk(x).tanh()
        return self.classes(hidden), self.size(hidden)


def both(outputs, targets):
    return F.cross_entropy(outputs[0], targets[0]) + F.mse_loss(outputs[1], targets[1])


@pytest.mark.parametrize("nested", [False, True])
def test_two_heads(nested):
    torch.manual_seed(1)
    model, classes, sizes = TwoHeads().double(), models.labels(N, 3), models.randn(N, 1, seed=3)
    rows = [(x, (c, s)) if nested else (x, c, s) for x, c, s in zip(X, classes, sizes, strict=True)]
    found = hessdiag.analyze(model, both, DataLoader(rows, batch_size=4), **ASKED)
    agrees(found, dense(model, X, lambda outputs: both(outputs, (classes, sizes))))


class ByName(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, inputs):
        return self.body(inputs)


@pytest.mark.parametrize(
    "loss_fn", [nn.CrossEntropyLoss(), lambda outputs, batch: F.cross_entropy(outputs, batch["labels"])]
)
def test_batches_that_are_dicts(loss_fn):
    rows = [{"inputs": x, "labels": y} for x, y in zip(X, LABELS, strict=True)]
    model = ByName()
    truth = dense(model, X, lambda out: F.cross_entropy(out, LABELS))
    agrees(hessdiag.analyze(model, loss_fn, DataLoader(rows, batch_size=4), **ASKED), truth)
    agrees(hessdiag.analyze(model, loss_fn, {"inputs": X, "labels": LABELS}, **ASKED), truth)


def test_pictures_with_a_class_per_pixel():
    torch.manual_seed(2)
    model = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 1)).double()
    x, y = models.randn(N, 1, 4, 4), models.labels(16 * N, 4).view(N, 4, 4)
    y[:, 0, 0] = 255
    loss_fn = nn.CrossEntropyLoss(ignore_index=255, weight=torch.tensor([1.0, 2.0, 0.5, 1.0], dtype=torch.float64))
    found = hessdiag.analyze(model, loss_fn, loader(x, y), **ASKED)
    agrees(found, dense(model, x, lambda out: loss_fn(out, y)))


def test_the_whole_loss_by_the_model():
    model = network()
    found = hessdiag.analyze(
        model, lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), (X, LABELS), **ASKED
    )
    agrees(found, dense(model, X, lambda out: F.cross_entropy(out, LABELS)))


def test_several_splits_and_products():
    H = hessdiag.hessian(
        network(), nn.MSELoss(), {"train": loader(X, REAL), "test": (X[:6], REAL[:6])}, split="test"
    )
    assert repr(H) == "<Curvature hessian, 44 x 44, of mse/mean over 6 examples of test, torch.float64 on cpu>"


# how a loss of one's own is called


def test_how_a_loss_is_called_is_said():
    by_name = Problem.of(network(), lambda outputs, labels: F.cross_entropy(outputs, labels), (X, LABELS))
    assert "called as f(outputs, targets) on train>" in repr(by_name)
    by_trial = Problem.of(network(), lambda p, q: F.cross_entropy(p, q), (X, LABELS))
    assert "called as f(outputs, batch) or f(outputs, targets) on" in repr(by_trial)
    hessdiag.hessian(by_trial)
    assert "called as f(outputs, targets) on train>" in repr(by_trial)
    assert "called as f(model, batch)" in repr(Problem.of(network(), lambda model, batch: 0, (X, LABELS)))


def test_the_batch_comes_first_where_both_would_work():
    seen = []

    def loss(p, q):
        seen.append(type(q))
        return p.square().mean()

    hessdiag.hessian(Problem.of(network(), loss, (X, REAL)))
    assert set(seen) <= {tuple, list}


def test_a_loss_that_fails_says_its_own_fault():
    def loss(outputs, targets):
        return F.cross_entropy(outputs, targets) + targets.nothing_of_the_kind

    with pytest.raises(HessdiagError, match="nothing_of_the_kind"):
        hessdiag.analyze(network(), loss, (X, LABELS), **ASKED)


# refusals

CE, DATA = nn.CrossEntropyLoss(), (X, LABELS)
REFUSED = {
    "a model alone": (
        lambda: hessdiag.analyze(network()),
        r"analyze\(model, loss_fn, data\): loss and data are missing",
    ),
    "no loss": (
        lambda: hessdiag.analyze(network(), DATA),
        "loss is missing; give for example nn.Cross",
    ),
    "no data": (lambda: hessdiag.analyze(network(), CE), "data is missing"),
    "another order": (lambda: hessdiag.analyze(network(), DATA, CE), r"tuple \(data\), CrossEntropyLoss \(loss\)"),
    "data first": (
        lambda: hessdiag.hessian(DATA, network(), CE),
        r"hessian\(model, loss_fn, data\): given were tuple",
    ),
    "a problem without a loss": (lambda: Problem(network(), loader(*DATA)), "give one of criterion"),
    "the loss for the data": (lambda: Problem(network(), CE, DATA), r"Problem.of\(model, loss, data\)"),
    "both": (lambda: hessdiag.analyze(Problem.of(network(), CE, DATA), CE, DATA), "has its own loss and data"),
    "class labels for numbers": (
        lambda: hessdiag.analyze(network(), nn.MSELoss(), DATA),
        r"give nn.CrossEntropyLoss\(\)",
    ),
    "one argument": (lambda: Problem.of(network(), lambda out: out, DATA), "two arguments"),
    "a name that is none": (
        lambda: Problem.of(network(), "hinge", DATA),
        "'hinge': allowed: cross_entropy, mse",
    ),
    "a field of the problem": (
        lambda: hessdiag.analyze(network(), CE, DATA, forward=len),
        "Problem.of.*forward=...",
    ),
    "an old name": (lambda: hessdiag.analyze(network(), CE, DATA, num_probes=4), "did you mean probes?"),
    "a slip": (lambda: hessdiag.hessian(network(), CE, DATA, batchsize=4), "did you mean batch_size?"),
    "no product has probes": (
        lambda: hessdiag.hessian(network(), CE, DATA, probes=4),
        "allowed: operator, samples",
    ),
    "no such split": (lambda: hessdiag.hessian(network(), CE, DATA, split="test"), "the problem has train"),
    "no such matrix": (lambda: hessdiag.hessian(network(), CE, DATA, operator="fisher"), "hessian, ggn, residual"),
    "no such precision": (lambda: hessdiag.hessian(network(), CE, DATA, dtype="float16"), "float32, float64"),
    "quantities twice": (
        lambda: hessdiag.analyze(Problem.of(network(), CE, DATA), "trace", quantities=["trace"]),
        "twice",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_such_call_is_refused_in_one_line(name):
    call, text = REFUSED[name]
    with pytest.raises(HessdiagError, match=text) as found:
        call()
    assert "\n" not in str(found.value)


# signatures


def test_the_signature_is_that_of_the_settings():
    shown = inspect.signature(hessdiag.analyze).parameters
    for name, one in options_of(Settings).items():
        assert shown[name].default == one.default
        assert shown[name].annotation == get_type_hints(Settings)[name]
    assert list(shown)[:5] == ["problem", "loss_fn", "data", "optimizer", "progress"]
    beside = {"resume", "group", "shard_vectors"}
    assert set(shown) - beside == {"problem", "loss_fn", "data", "optimizer", "progress", *options_of(Settings)}
    assert all(f"        {name}: " in hessdiag.analyze.__doc__ for name in options_of(Settings))


def test_type_checkers_see_the_same_options():
    hints, theirs = get_type_hints(Options), get_type_hints(Settings)
    assert list(hints) == list(options_of(Settings))
    assert {name: hint for name, hint in hints.items() if name != "quantities"} == {
        name: theirs[name] for name in hints if name != "quantities"
    }


def test_hessian_takes_what_analyze_takes():
    shown = inspect.signature(hessdiag.hessian).parameters
    assert set(shown) - {"problem", "loss_fn", "data", "draws"} <= set(options_of(Settings))  # draws: of mc_fisher
    H = hessdiag.hessian(
        Problem.of(network(), CE, DATA), params=["2.*"], dtype=torch.float32, device="cpu", samples=9
    )
    assert (H.size, H.dtype, H.samples.examples) == (24, torch.float32, 9)
    assert hessdiag.hessian(Problem.of(network(), CE, DATA), operator="residual").kind == "residual"


@pytest.mark.parametrize(
    "function",
    [
        hessdiag.trace,
        hessdiag.frobenius_squared,
        hessdiag.effective_rank,
        hessdiag.wolkowicz_styan_of,
        hessdiag.spectrum,
    ],
)
def test_the_old_name_works_with_one_warning_that_names_the_new_one(function):
    A = torch.diag(torch.arange(1.0, 20.0))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        old = function(A, num_probes=4)
    assert [str(one.message) for one in said] == ["num_probes is probes now"]
    assert (said[0].category, said[0].filename) == (DeprecationWarning, __file__)
    assert repr(old) == repr(function(A, probes=4))
    with pytest.raises(HessdiagError, match="are one argument; give probes"):
        function(A, num_probes=4, probes=4)


# results at a prompt


@pytest.fixture(scope="module")
def whole():
    return hessdiag.analyze(network(), CE, DATA, batch_size=5)


def test_results_are_short_at_a_prompt(whole):
    lines = repr(whole).splitlines()
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 80
    assert all(name in repr(whole) for name in whole.metrics)
    short = [*whole.metrics.values(), *whole.other_bounds, whole.spectrum, whole.spectrum.known, whole.convergence]
    H = hessdiag.hessian(network(), CE, DATA)
    short += [H, H.samples, H.problem, hessdiag.lanczos(H, steps=4)]
    for one in short:
        assert len(repr(one)) <= 130, repr(one)
        assert "\n" not in repr(one)


def test_a_long_title_and_name_stay_within_the_line(whole):
    assert max(map(len, repr(whole.about("x " * 200)).splitlines())) <= 80


def test_numbers_are_had_by_name(whole):
    assert whole["trace"] is whole.trace is whole.metrics["trace"]
    assert whole["density"] is whole.density is whole.spectrum
    assert whole["ws_spread"] is next(one for one in whole.other_bounds if one.quantity == "ws_spread")
    assert "trace" in whole
    assert "tracee" not in whole
    assert {"lambda_max", "density"} <= set(dir(whole)) & set(whole)


def test_a_number_that_is_not_there_is_named_with_those_that_are(whole):
    with pytest.raises(KeyError, match=r"did you mean trace\?") as found:
        whole["trcae"]
    assert isinstance(found.value, HessdiagError)
    with pytest.raises(AttributeError, match="an analysis has no 'nothing'"):
        _ = whole.nothing
    few = hessdiag.analyze(network(), CE, DATA, **ASKED)
    with pytest.raises(AttributeError, match=r"lambda_min was not measured.*quantities=\['lambda_min'\]"):
        _ = few.lambda_min


def test_an_analysis_can_be_copied(whole):
    assert repr(pickle.loads(pickle.dumps(whole))) == repr(whole)


class Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        self.found.append(tag)


def test_a_notebook_shows_table_and_picture_and_nothing_of_a_title_as_markup(whole):
    page = Tags()
    page.feed(whole.about("<script>alert(1)</script>")._repr_html_())
    assert page.found.count("tr") == 1 + len(whole.metrics)
    assert "svg" in page.found
    assert "script" not in page.found
