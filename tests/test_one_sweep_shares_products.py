"""Promise: asking for everything costs what the dearest number costs, and every number holds the truth. (30 s)"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hessdiag.analysis import Measurement, analyze, sweep
from hessdiag.engine.products.curvature import Curvature
from hessdiag.errors import BudgetError, UsageError
from hessdiag.problem import Problem
from hessdiag.results import QUANTITIES, Analysis, json_schema, load_run
from hessdiag.settings import Settings
from hessdiag.spectral import lanczos
from tests import models

SMALL = {"batch_size": 10, "steps": 28, "probes": 10, "density_probes": 4, "method": "retained_graph"}
NUMBERS = tuple(name for name in QUANTITIES if name != "density")
PRICE = 1.3  # of the dearest single quantity: what is not shared is a handful of fresh products


def own(outputs: torch.Tensor, batch) -> torch.Tensor:
    return F.cross_entropy(outputs, batch[1])


def digits_like(activation=nn.ReLU, criterion=own) -> Problem:
    """Clusters that an MLP of 183 weights has learned in part: outliers above a bulk around zero.

    With a loss of one's own, to which the closed form of three-layer networks does not apply.
    """
    torch.manual_seed(0)
    y = models.labels(80, 3)
    x = models.randn(80, 8, seed=2) + 2 * models.randn(3, 8, seed=3)[y]
    model = nn.Sequential(nn.Linear(8, 15), activation(), nn.Linear(15, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    model.zero_grad()
    return Problem(model, {"train": (x, y)}, criterion=criterion)


def three_layer(activation=nn.Tanh) -> Problem:
    """The same under the cross-entropy that is known by its name: the closed form applies."""
    return digits_like(activation, "cross_entropy")


@functools.cache
def truth(activation=nn.ReLU) -> dict[str, float]:
    eigenvalues = torch.linalg.eigvalsh(models.dense_hessian(digits_like(activation))).numpy()
    d, t1, t2 = len(eigenvalues), eigenvalues.sum(), np.square(eigenvalues).sum()
    m, s = t1 / d, math.sqrt(t2 / d - (t1 / d) ** 2)
    return {
        "lambda_max": float(eigenvalues[-1]),
        "lambda_min": float(eigenvalues[0]),
        "trace": float(t1),
        "frobenius_squared": float(t2),
        "effective_rank": float(t1**2 / t2),
        "ws_upper": m + s * math.sqrt(d - 1),
        "ws_lower": m - s * math.sqrt(d - 1),
        "negative_mass": float((eigenvalues < -1e-9 * eigenvalues[-1]).mean()),
    }


@functools.cache
def everything(seed: int = 0) -> Analysis:
    return analyze(digits_like(), seed=seed, confidence=0.999, **SMALL)


def products(quantities=QUANTITIES, make=digits_like) -> int:
    """Products counted at the engine, of all kinds of curvature, preflight left out."""
    subject = Measurement(make(), Settings(quantities=quantities, **SMALL))
    return subject.run().cost.products


def test_everything_costs_what_the_dearest_costs():
    alone = {name: products((name,)) for name in QUANTITIES}
    assert products() <= PRICE * max(alone.values()), alone
    assert alone["trace"] == 0
    assert alone["lambda_max"] <= alone["lambda_min"] < alone["density"]


def test_the_count_is_that_of_the_engine(monkeypatch):
    calls = []
    original = Curvature.multiply
    monkeypatch.setattr(Curvature, "multiply", lambda op, rows: calls.append(len(rows)) or original(op, rows))
    found = analyze(digits_like(nn.Tanh), **SMALL)
    assert sum(calls) == found.cost.products  # of H, and of R for the trace; the preflight works on a piece
    assert found.metrics["trace"].kind == "probes"


def test_the_closed_form_takes_the_place_of_the_probes():
    subject = Measurement(three_layer(), Settings(**SMALL))
    assert ", and the closed form of a three-layer network for the traces" in subject.forecast()
    found = subject.run()
    exact = ("trace", "frobenius_squared", "effective_rank")
    assert {found.metrics[name].kind for name in exact} == {"exact"}
    assert found.metrics["ws_upper"].exact_inputs and all(bound.exact_inputs for bound in found.other_bounds)
    true = truth(nn.Tanh)
    assert {name: found.metrics[name].value for name in (*exact, "ws_upper", "ws_lower")} == pytest.approx(
        {name: true[name] for name in (*exact, "ws_upper", "ws_lower")}, rel=1e-9
    )
    assert all(m.lo <= true[name] <= m.hi for name, m in found.metrics.items())
    # the density's probes are there for the density alone
    assert found.cost.products == products(("lambda_max", "lambda_min", "density"), three_layer)
    assert products((*exact, "ws_upper", "ws_lower"), three_layer) == 0


def test_the_forecast_counts_what_will_be_taken():
    for make in (digits_like, three_layer):
        asked = ("lambda_max", "lambda_min", "frobenius_squared")
        subject = Measurement(make(), Settings(quantities=asked, **SMALL))
        extremes = Measurement(make(), Settings(quantities=asked[:2], **SMALL))
        probes = subject.products - extremes.products
        assert probes == (10 if make is digits_like else 0)
        taken = subject.run().cost.products - extremes.run().cost.products
        assert taken == probes
        assert f"about {subject.products} products" in subject.forecast()


def test_every_number_is_there():
    found = everything()
    assert tuple(found.metrics) == NUMBERS
    assert found.spectrum is not None
    assert found.spectrum.mass() == pytest.approx(1, abs=1e-9)
    assert len(found.top) == 1
    assert [layer.name for layer in found.layers] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert found.warnings == ()
    assert {bound.of for bound in found.other_bounds} >= {"lambda_max"}
    kinds = {name: metric.kind for name, metric in found.metrics.items()}
    assert kinds["lambda_max"] == kinds["lambda_min"] == "ritz"
    assert kinds["trace"] == "exact"
    assert kinds["ws_upper"] == kinds["ws_lower"] == "bound"
    assert kinds["negative_mass"] == "bracket"


@pytest.mark.parametrize("name", QUANTITIES)
def test_one_alone_is_what_was_asked(name):
    found = analyze(digits_like(), name, **SMALL)
    assert tuple(found.metrics) == ((name,) if name != "density" else ())
    assert (found.spectrum is not None) == (name in ("density", "negative_mass"))
    if name != "density":
        metric = found.metrics[name]
        assert metric.lo <= truth()[name] <= metric.hi


def holds(found: Analysis) -> dict[str, bool]:
    return {name: m.lo <= truth()[name] <= m.hi for name, m in found.metrics.items()}


@pytest.mark.parametrize("seed", range(6))
def test_every_interval_holds_the_truth(seed):
    """Six seeds, three numbers with 99.9 % intervals: a miss by chance once in 50 tables of seeds."""
    found = everything(seed)
    assert all(holds(found).values()), holds(found)
    assert found.metrics["lambda_max"].value == pytest.approx(truth()["lambda_max"], rel=1e-3)
    assert found.metrics["trace"].value == pytest.approx(truth()["trace"], rel=1e-10)


def test_the_error_over_data_of_an_extreme_is_its_spread_over_batches():
    problem = digits_like()
    x, y = problem.data["train"]
    value, vector = (part[..., -1] for part in torch.linalg.eigh(models.dense_hessian(problem)))
    forms = []
    for rows in torch.arange(80).split(10):  # nothing is left out of the draw, so its order is the data's
        problem.data = {"train": (x[rows], y[rows])}
        forms.append(float(vector @ models.dense_hessian(problem) @ vector))
    data = analyze(digits_like(), "lambda_max", rtol=1e-8, **SMALL).metrics["lambda_max"].data
    assert np.mean(forms) == pytest.approx(float(value), rel=1e-8)
    assert data.stderr == pytest.approx(np.std(forms, ddof=1) / math.sqrt(8), rel=1e-4)
    assert (data.blocks, data.method) == (8, "spread over 8 batches")


def test_a_probed_trace_has_both_errors_too():
    problem = digits_like()
    asked = Problem(problem.model, problem.data, loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    found = analyze(asked, confidence=0.999, **SMALL)
    trace = found.metrics["trace"]
    assert trace.kind == "probes"
    assert trace.lo <= truth()["trace"] <= trace.hi
    assert trace.data is not None
    assert trace.data.stderr == pytest.approx(everything().metrics["trace"].data.stderr, rel=0.5)
    assert sum(layer.trace for layer in found.layers) == pytest.approx(trace.value, rel=0.2)
    assert any("Hessian only" in note for note in found.notes)
    assert any("comes from probes: the problem gives no outputs" in note for note in found.notes)


def test_saving_and_loading_changes_nothing(tmp_path):
    found = everything()
    path = found.save(tmp_path)
    again = load_run(tmp_path)
    assert again == found
    assert again.to_json() == found.to_json() == path.read_text()
    assert {p.name for p in tmp_path.iterdir()} == {"run.json", "metrics.csv", "spectrum.csv", "layers.csv"}


def test_run_json_keeps_its_schema():
    content = json.loads(everything().to_json())
    schema = json_schema()
    assert set(content) == set(schema["properties"])
    assert content["schema"] == schema["properties"]["schema"]["const"]
    definitions = schema["$defs"]
    kinds = {"ritz": "RitzValue", "bound": "Bound"}
    for name, metric in content["metrics"].items():
        assert set(metric) >= {"value", "lo", "hi", "kind"}, name
        assert set(metric) == set(definitions[kinds.get(metric["kind"], "Estimate")]["properties"]), name
    for part, name in (("spectrum", "Spectrum"), ("cost", "Cost"), ("self_test", "SelfTest")):
        assert set(content[part]) == set(definitions[name]["properties"])


def test_the_table_has_a_row_per_number():
    frame = everything().to_frame()
    assert list(frame["quantity"]) == list(NUMBERS)
    assert list(frame["value"]) == [m.value for m in everything().metrics.values()]
    assert (frame["lo"] <= frame["value"]).all()
    assert (frame["value"] <= frame["hi"]).all()


def numbers(found: Analysis) -> dict[str, object]:
    """Everything but the clock."""
    content = found.to_dict()
    return {key: content[key] for key in ("metrics", "spectrum", "top", "other_bounds", "layers", "fingerprint")}


def test_the_same_seed_gives_the_same_numbers():
    again = analyze(digits_like(), seed=0, confidence=0.999, **SMALL)
    first = analyze(digits_like(), seed=0, confidence=0.999, **SMALL)
    assert numbers(again) == numbers(first)
    assert numbers(everything(1))["metrics"] != numbers(everything(0))["metrics"]


@pytest.mark.parametrize("options", [{}, {"steps": 25}, {"quantities": ("lambda_max", "frobenius_squared")}])
def test_who_watches_changes_no_number(options):
    subject = Measurement(digits_like(), Settings(**{**SMALL, **options}))
    seen: list[object] = []
    watched = subject.run(look=seen.append)
    assert seen and numbers(watched) == numbers(subject.run())


def test_other_batches_give_the_same_numbers():
    a, b = (analyze(digits_like(), "lambda_max", **{**SMALL, "batch_size": size}) for size in (7, 80))
    assert a.metrics["lambda_max"].value == pytest.approx(b.metrics["lambda_max"].value, rel=1e-10)
    assert a.fingerprint == b.fingerprint


def test_the_gauss_newton_matrix_can_be_asked_for():
    found = analyze(digits_like(nn.Tanh), operator="ggn", confidence=0.999, **SMALL)
    assert found.metrics["lambda_min"].hi > -1e-12
    assert found.metrics["trace"].kind == "exact"
    assert found.metrics["negative_mass"].lo == 0
    assert found.fingerprint["operator"] == "ggn"


def test_a_part_of_the_parameters_can_be_asked_for():
    found = analyze(digits_like(), params=("2.*",), confidence=0.999, **SMALL)
    H = models.dense_hessian(digits_like())[-48:, -48:]
    assert found.fingerprint["n_params"] == 48
    assert found.metrics["lambda_max"].value == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-3)
    assert found.metrics["trace"].value == pytest.approx(float(H.trace()), rel=1e-10)
    assert len(found.layers) == 2


def test_several_of_the_largest_can_be_asked_for():
    found = analyze(digits_like(), ("lambda_max", "lambda_min"), top=3, **SMALL)
    largest = torch.linalg.eigvalsh(models.dense_hessian(digits_like())).flip(0)[:3].tolist()
    assert [ritz.value for ritz in found.top] == pytest.approx(largest, rel=1e-3)
    assert all(ritz.lo <= true <= ritz.hi for ritz, true in zip(found.top, largest, strict=True))
    assert found.metrics["lambda_min"].data is not None


def test_a_single_batch_has_no_error_over_data_and_says_so():
    found = analyze(digits_like(), ("lambda_max", "trace"), **{**SMALL, "batch_size": 80})
    assert found.metrics["lambda_max"].data is None
    assert found.metrics["trace"].data.blocks == 80  # examples, not batches
    assert any("too few for error bars over data" in note and "`batch_size`" in note for note in found.notes)


def test_a_sample_of_the_data_is_frozen_by_its_seed():
    a, b = (analyze(digits_like(), "trace", samples=30, seed=seed) for seed in (0, 1))
    assert a.fingerprint["samples"] == 30
    assert a.fingerprint["available"] == 80
    assert a.fingerprint["data_sha256"] != b.fingerprint["data_sha256"]


def test_progress_is_told_and_ends_at_its_total():
    seen = []
    subject = Measurement(digits_like(), Settings(**SMALL))
    found = subject.run(progress=lambda stage, done, total: seen.append((stage, done, total)))
    assert len({total for _, _, total in seen}) == 1
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert found.cost.products >= seen[-1][1]
    assert subject.operator.watch is None
    assert subject.forecast().startswith("183 parameters, 80 samples in 8 batches: about ")
    assert numbers(subject.run()) == numbers(found)  # a measurement can be run again


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"quantities": "lambda_mx"}, UsageError, "did you mean lambda_max"),
        ({"probess": 3}, UsageError, "probess.*did you mean probes"),
        ({"split": "test"}, UsageError, "`split='test'`: the problem has train"),
        ({"probes": 1}, BudgetError, "a standard error needs at least 2"),
        ({"device": "cuda:99"}, UsageError, "`device='cuda:99'` is not available"),
    ],
)
def test_what_cannot_be_asked_is_refused(options, error, text):
    with pytest.raises(error, match=text):
        analyze(digits_like(), **options)


def small(activation=nn.Tanh) -> Problem:
    """87 parameters: fewer than the products of everything together."""
    problem = digits_like(activation)
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 7), activation(), nn.Linear(7, 3)).double()
    return Problem(model, problem.data, criterion=own)


@functools.cache
def small_spectrum(activation=nn.Tanh) -> np.ndarray:
    return torch.linalg.eigvalsh(models.dense_hessian(small(activation))).numpy()


def whole(quantities=QUANTITIES, activation=nn.Tanh, **options) -> Analysis:
    return analyze(small(activation), quantities, **{**SMALL, **options})


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU])
def test_few_parameters_are_all_multiplied_and_every_number_is_exact(activation):
    found, values = whole(activation=activation), small_spectrum(activation)
    d, t1, t2 = len(values), values.sum(), np.square(values).sum()
    assert Measurement(small(activation), Settings(**SMALL)).products == d
    assert found.cost.products == d + 2  # and a fresh product of either end
    true = {"lambda_max": values[-1], "lambda_min": values[0], "trace": t1, "frobenius_squared": t2}
    true |= {"effective_rank": t1**2 / t2, "negative_mass": (values < -1e-9 * values[-1]).mean()}
    for name, expected in true.items():
        metric = found.metrics[name]
        assert metric.lo <= expected <= metric.hi, name
        assert metric.value == pytest.approx(expected, rel=1e-10), name
        if name != "negative_mass":  # next to zero rounding decides, and a bracket says so
            assert metric.hi - metric.lo <= 1e-11 * t2**0.5 * d, name
        assert metric.confidence == 1.0
    assert {found.metrics[n].kind for n in ("trace", "frobenius_squared", "effective_rank")} == {"exact"}
    assert found.metrics["ws_upper"].exact_inputs
    assert sum(layer.trace for layer in found.layers) == pytest.approx(t1, rel=1e-10)
    assert {layer.kind for layer in found.layers} == {"exact"}
    assert all(found.metrics[name].data is not None for name in ("lambda_max", "lambda_min", "trace"))
    nodes, weights = np.array(found.spectrum.merged()).T
    np.testing.assert_allclose(np.sort(nodes), values, atol=1e-12)
    assert weights == pytest.approx(1 / d)
    assert not found.warnings and not [note for note in found.notes if "probes" in note]


def test_what_is_multiplied_whole_does_not_depend_on_the_seed():
    first, second = (whole(seed=seed).metrics for seed in (0, 1))
    assert [m.value for m in first.values()] == [m.value for m in second.values()]


def test_the_data_error_of_a_whole_matrix_is_that_of_its_batches():
    trace = whole().metrics["trace"]
    by_batch = [float(models.dense_hessian(part).trace()) for part in _batches(small())]
    assert trace.data.stderr == pytest.approx(np.std(by_batch, ddof=1) / math.sqrt(8), rel=1e-9)


def _batches(problem: Problem):
    x, y = problem.data["train"]
    for rows in torch.arange(80).split(10):
        yield Problem(problem.model, {"train": (x[rows], y[rows])}, criterion=own)


@pytest.mark.parametrize(("quantities", "dense"), [("lambda_max", False), (("lambda_max", "density"), True)])
def test_more_parameters_than_products_are_not_all_multiplied(quantities, dense):
    assert (whole(quantities).metrics["lambda_max"].confidence == 1.0) == dense


def test_a_whole_matrix_is_compared_with_an_iterated_one():
    """A baseline of before, or of other settings, is no other subject: intervals decide."""
    from hessdiag.check.change import change
    from hessdiag.check.recorded import Entry

    before = Entry.of(whole(("lambda_max", "frobenius_squared"), probes=20)).metrics
    after = Entry.of(whole()).metrics
    assert before["frobenius_squared"].kind == "probes" and after["frobenius_squared"].kind == "exact"
    for name in ("lambda_max", "frobenius_squared"):
        moved = change(before[name], after[name], relative=True, confidence=0.999)
        assert moved.lo <= 0 <= moved.hi


def test_a_residual_of_few_coordinates_is_exact_too():
    problem = small()
    trace = analyze(problem, "trace", probes=80, batch_size=10, method="retained_graph").metrics["trace"]
    assert trace.kind == "exact" and trace.data is not None
    assert trace.value == pytest.approx(small_spectrum().sum(), rel=1e-10)


BROKEN = {
    "every moment draws probes of its own": (
        "_forms",
        lambda self, found: [forms_of_the_sweep(self, found) for _ in range(4)],
    ),
    "the extremes' run is not reused": (
        "_run",
        lambda self, *a: (lanczos(self.operator, steps=40), run_of_the_sweep(self, *a)),
    ),
}
run_of_the_sweep, forms_of_the_sweep = sweep.Sweep._run, sweep.Sweep._forms


@pytest.mark.parametrize(("name", "method"), BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(name, method, monkeypatch):
    dearest = max(products((one,)) for one in ("density", "frobenius_squared"))
    monkeypatch.setattr(sweep.Sweep, name, method)
    assert products() > PRICE * dearest


BROKEN_NUMBERS = {
    "every interval ends at its value": lambda metric: replace(metric, lo=metric.value, hi=metric.value),
    "everything is two percent larger": lambda metric: replace(
        metric, value=1.02 * metric.value, lo=min(1.02 * metric.lo, 1.02 * metric.value), hi=1.02 * metric.hi
    ),
}


@pytest.mark.parametrize("breakage", BROKEN_NUMBERS.values(), ids=BROKEN_NUMBERS)
def test_these_intervals_would_notice(breakage):
    found = everything()
    changed = replace(found, metrics={name: breakage(metric) for name, metric in found.metrics.items()})
    assert not all(holds(changed).values())
