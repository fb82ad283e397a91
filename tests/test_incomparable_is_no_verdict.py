"""Promise: another subject is never compared, and each field says why; the same one must repeat. (8 s)"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from hessdiag import hessian
from hessdiag.analysis import analyze, record
from hessdiag.check import comparable
from hessdiag.check.comparable import differences, explain, reproduced, same_weights, surroundings
from hessdiag.check.recorded import Entry, Recorded
from hessdiag.check.verdict import Report
from hessdiag.problem import Problem
from hessdiag.results.fingerprint import HOW, IDENTITY, SUBJECT, Fingerprint
from tests import models

FINGERPRINT = Fingerprint.of(
    {
        "samples": 1024,
        "available": 60000,
        "split": "train",
        "data_sha256": "3c1f6a0c8ce24f7e" * 4,
        "params_sha256": "9d27bb43a11e0c55" * 4,
        "weights_sha256": "0123456789abcdef" * 4,
        "fixed_sha256": "fedcba9876543210" * 4,
        "n_params": 2410,
        "tensors": 4,
        "loss": "cross_entropy/mean",
        "operator": "hessian",
        "mode": "eval",
        "dtype": "float32",
        "seed": 0,
        "probes": 128,
        "density_probes": 8,
        "steps": 40,
        "rtol": 1e-3,
        "confidence": 0.95,
    }
)
OTHER = {
    "samples": 512,
    "split": "test",
    "data_sha256": "f" * 64,
    "params_sha256": "e" * 64,
    "n_params": 2411,
    "tensors": 6,
    "loss": "mse/mean",
    "operator": "ggn",
    "mode": "train",
    "dtype": "float64",
    "seed": 1,
}
CURES = {
    "samples": "`samples`",
    "split": "metric[split]",
    "data_sha256": "`seed`",
    "params_sha256": "params",
    "n_params": "-P",
    "tensors": "frozen",
    "loss": "criterion",
    "operator": "Gauss-Newton",
    "mode": "evaluation",
    "dtype": "precision",
    "seed": "set seed",
}


def but(fields):
    return Fingerprint.of({**FINGERPRINT, **fields})


def without(name):
    return Fingerprint.of({key: value for key, value in FINGERPRINT.items() if key != name})


def test_every_field_of_the_subject_is_tried():
    assert set(OTHER) == set(CURES) == set(SUBJECT)
    assert set(FINGERPRINT) <= {*SUBJECT, *HOW, *IDENTITY}
    assert not set(SUBJECT) & (HOW | IDENTITY)
    assert not HOW & IDENTITY


@pytest.mark.parametrize("field", SUBJECT)
def test_another_subject_is_one_line_with_cause_and_cure(field):
    changed = but({field: OTHER[field]})
    (found,) = differences(FINGERPRINT, changed)
    assert (found.field, found.baseline, found.measured) == (field, FINGERPRINT[field], OTHER[field])
    (line,) = explain("train@layer4.*", [found])
    assert line.startswith(f"train@layer4.*: {field} was ")
    assert CURES[field] in line
    assert 'hessdiag baseline update --reason "..."' in line
    assert "\n" not in line
    assert len(line) < 300


@pytest.mark.parametrize("field", SUBJECT)
def test_a_field_that_one_side_lacks_differs(field):
    for base, new in (
        (without(field), FINGERPRINT),
        (FINGERPRINT, without(field)),
        (without(field), without(field)),
    ):
        (found,) = differences(base, new)
        assert found.field == field
        assert "not recorded" in str(found)


def test_a_field_nobody_knows_is_not_ignored():
    (found,) = differences(FINGERPRINT, but({"weight_decay": 0.1}))
    assert found.field == "weight_decay"
    assert "version" in str(found)
    assert differences(but({"x": 1}), but({"x": 1})) == ()


@pytest.mark.parametrize("field", sorted(HOW | IDENTITY))
def test_how_it_was_measured_and_which_weights_may_differ(field):
    assert differences(FINGERPRINT, but({field: "other"})) == ()
    assert differences(without(field), FINGERPRINT) == ()


def test_all_differences_are_told_at_once_in_one_order():
    swapped = Fingerprint.of(dict(reversed({**FINGERPRINT, **OTHER}.items())))
    assert [found.field for found in differences(FINGERPRINT, swapped)] == list(SUBJECT)
    assert len(differences(Fingerprint(), Fingerprint())) == len(SUBJECT)


def test_hashes_are_shortened_but_not_where_they_agree():
    base, new = {"data_sha256": "a" * 64}, {"data_sha256": "b" * 64}
    assert comparable.shortened("data_sha256", *base.values(), *new.values()) == ("a" * 12 + "…", "b" * 12 + "…")
    late = "a" * 30 + "b" * 34
    old, now = comparable.shortened("data_sha256", "a" * 64, late)
    assert old != now
    assert comparable.shortened("loss", "x" * 40, "y")[0] == "x" * 40
    assert comparable.shortened("data_sha256", "not recorded", late) == ("not recorded", "a" * 12 + "…")


def test_a_report_of_what_cannot_be_compared_exits_3():
    problems = explain("train", differences(FINGERPRINT, but({"seed": 1})))
    assert Report(problems=problems).exit_code == 3
    assert "seed was 0 in the baseline and is 1" in Report(problems=problems).headline


def test_surroundings_only_inform():
    env = {"hessdiag": "0.1.0", "torch": "2.13.0", "device": "cuda:0", "device_name": "H200", "date": "2026-11-20"}
    assert surroundings(env, env | {"date": "2026-11-21", "device": "cuda:1", "threads": 2}) == ()
    lines = surroundings(env, {"hessdiag": "0.2.0", "torch": "2.14.0", "device": "cpu", "device_name": "x86_64"})
    assert len(lines) == 4
    for line, words in zip(lines, ("hessdiag 0.1.0, now 0.2.0", "2.14.0", "cuda, now cpu", "x86_64"), strict=True):
        assert words in line
    assert "torch not recorded" in surroundings({}, {"torch": "2.14.0"})[0]


def test_weights_nobody_hashed_are_not_the_same():
    assert same_weights(FINGERPRINT, but({}))
    assert not same_weights(FINGERPRINT, but({"weights_sha256": "0" * 64}))
    assert not same_weights(without("weights_sha256"), without("weights_sha256"))
    assert not same_weights(but({"weights_sha256": None}), but({"weights_sha256": None}))


# Repeating a measurement


def number(value, half=0.0, kind="exact", dtype="float32", per_probe=()):
    return Recorded(
        value=value, lo=value - half, hi=value + half, kind=kind, confidence=0.95, dtype=dtype, per_probe=per_probe
    )


def entry(env=None, **metrics):
    return Entry(fingerprint=FINGERPRINT, metrics=metrics, env=env or {})


REPEATS = {
    "the same": (entry(trace=number(5.0, 0.1)), entry(trace=number(5.0, 0.1))),
    "within both half-widths": (entry(trace=number(5.0, 0.1)), entry(trace=number(5.15, 0.1))),
    "rounding in single precision": (entry(trace=number(5.0)), entry(trace=number(5.0004))),
    "rounding in double precision": (
        entry(trace=number(5.0, dtype="float64")),
        entry(trace=number(5.0 + 4e-9, dtype="float64")),
    ),
    "a small eigenvalue beside a large one": (
        entry(lambda_min=number(-1e-5), lambda_max=number(9.0)),
        entry(lambda_min=number(-5e-4), lambda_max=number(9.0)),
    ),
    "probes that cancel": (
        entry(trace=number(0.0, kind="probes", per_probe=(-50.0, 50.0))),
        entry(trace=number(0.004, kind="probes", per_probe=(-49.996, 50.004))),
    ),
    "a share near zero": (entry(negative_mass=number(1e-7)), entry(negative_mass=number(9e-5))),
    "more probes of the same beginning": (
        entry(trace=number(1.5, 0.01, "probes", per_probe=(1.0, 2.0))),
        entry(trace=number(2.5, 0.01, "probes", per_probe=(1.0, 2.0, 3.0, 4.0))),
    ),
    "exact beside probes": (entry(trace=number(5.0)), entry(trace=number(5.2, 0.1, "probes"))),
    "differences of gradients": (
        entry(env={"method": "finite_difference"}, lambda_max=number(9.0)),
        entry(env={"method": "double_backward"}, lambda_max=number(9.2)),
    ),
    "metrics of one side only": (entry(trace=number(5.0)), entry(lambda_max=number(9.0))),
    "other weights": (
        entry(trace=number(5.0)),
        replace(entry(trace=number(9.0)), fingerprint=but({"weights_sha256": "0" * 64})),
    ),
    "another seed": (
        entry(trace=number(5.0)),
        replace(entry(trace=number(9.0)), fingerprint=but({"seed": 1})),
    ),
}
DEPARTS = {
    "single precision": (entry(trace=number(5.0)), entry(trace=number(5.001))),
    "double precision": (entry(trace=number(5.0, dtype="float64")), entry(trace=number(5.00001, dtype="float64"))),
    "intervals apart": (entry(trace=number(5.0, 0.1)), entry(trace=number(5.3, 0.1))),
    "downwards": (entry(trace=number(5.3, 0.1)), entry(trace=number(5.0, 0.1))),
    "other probes": (
        entry(trace=number(1.5, 0.01, "probes", per_probe=(1.0, 2.0))),
        entry(trace=number(1.5, 0.01, "probes", per_probe=(1.2, 2.2, 1.3, 1.3))),
    ),
    "a share": (entry(negative_mass=number(0.1)), entry(negative_mass=number(0.2))),
    "differences of gradients": (
        entry(env={"method": "finite_difference"}, lambda_max=number(9.0)),
        entry(env={"method": "finite_difference"}, lambda_max=number(10.0)),
    ),
    "probes count of how": (
        entry(trace=number(5.0)),
        replace(entry(trace=number(9.0)), fingerprint=but({"probes": 8})),
    ),
}


@pytest.mark.parametrize("case", REPEATS)
def test_what_rounding_or_probes_explain_is_no_fault(case):
    base, new = REPEATS[case]
    assert reproduced(base, new) == ()
    assert reproduced(new, base) == ()


@pytest.mark.parametrize("case", DEPARTS)
def test_what_does_not_repeat_is_named(case):
    base, new = DEPARTS[case]
    (line,) = reproduced(base, new)
    (name,) = base.metrics
    assert line.startswith(f"{name} of the same weights")
    assert "dropout" in line
    assert len(reproduced(new, base)) == 1


# Real measurements

OPTIONS = {"batch_size": 8, "probes": 6, "density_probes": 2, "steps": 6, "quantities": ("lambda_max", "trace")}
SCALE = {"loss": 1.0}


def moody(outputs, batch):
    """A loss that something outside changes: what no fingerprint can see."""
    return SCALE["loss"] * F.cross_entropy(outputs, batch[1])


def problem(classes=3, x_seed=2, bias=True, width=7, criterion="cross_entropy"):
    torch.manual_seed(0)
    x, y = models.randn(40, 8, seed=x_seed), models.labels(40, classes)
    model = nn.Sequential(nn.Linear(8, width, bias=bias), nn.Tanh(), nn.Linear(width, classes))
    return Problem(model, {"train": (x, y), "test": (x[:24], y[:24])}, criterion=criterion)


@functools.cache
def measured() -> Entry:
    found = analyze(problem(), **OPTIONS)
    return Entry.of(found, env=found.environment)


def measure(problem, **options) -> Entry:
    found = analyze(problem, **(OPTIONS | options))
    return Entry.of(found, env=found.environment)


def fields(new: Entry) -> set[str]:
    return {found.field for found in differences(measured().fingerprint, new.fingerprint)}


def test_the_lists_know_every_field_of_a_real_fingerprint():
    assert set(measured().fingerprint) == {*SUBJECT, *HOW, *IDENTITY} - {"checkpoint_sha256", "optimizer_sha256"}


def test_a_real_measurement_repeats():
    again = measure(problem(), probes=4, batch_size=16)
    assert same_weights(measured().fingerprint, again.fingerprint)
    assert fields(again) == set()
    assert reproduced(measured(), again) == ()
    assert surroundings(measured().env, again.env) == ()


@pytest.mark.parametrize(
    ("new", "expected"),
    [
        ({"x_seed": 5}, {"data_sha256"}),
        ({"width": 6}, {"params_sha256", "n_params"}),
        ({"bias": False}, {"params_sha256", "n_params", "tensors"}),
        ({"criterion": moody}, {"loss"}),
        ({"samples": 16}, {"samples", "data_sha256"}),
        ({"split": "test"}, {"samples", "split", "data_sha256"}),
        ({"operator": "ggn"}, {"operator"}),
        ({"dtype": "float64"}, {"dtype"}),
    ],
)
def test_what_really_differs_is_what_is_named(new, expected):
    built = {name: new[name] for name in new if name in ("x_seed", "width", "bias", "criterion")}
    options = {name: new[name] for name in new if name not in built}
    assert fields(measure(problem(**built), **options)) == expected


def test_a_loss_that_changes_unseen_does_not_repeat(monkeypatch):
    before = measure(problem(criterion=moody))
    monkeypatch.setitem(SCALE, "loss", 1.1)
    after = measure(problem(criterion=moody))
    assert differences(before.fingerprint, after.fingerprint) == ()
    assert len(reproduced(before, after)) >= 1


def weights_of(model, params=()):
    """Digests of the weights that count, and of what else the function depends on."""
    data = {"train": (models.randn(12, 4).float(), models.labels(12, 3))}
    operator = hessian(Problem(model, data, criterion="cross_entropy", params=list(params)))
    return record.weights_digest(operator), record.fixed_digest(operator)


def of_two_parts():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


@pytest.mark.parametrize("name", [name for name, _ in of_two_parts().named_parameters()])
def test_every_tensor_that_counts_is_in_the_digest(name):
    """A fine-tuned head is another set of weights, whichever tensor moved, by one bit of one number."""
    before, after = of_two_parts(), of_two_parts()
    with torch.no_grad():
        last = dict(after.named_parameters())[name].view(-1)[-1:]
        last.copy_(torch.nextafter(last, last + 1))
    assert weights_of(before)[0] == weights_of(of_two_parts())[0]
    assert weights_of(before)[0] != weights_of(after)[0]
    assert weights_of(before)[1] == weights_of(after)[1]


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.weight", "1.bias", "1.running_mean", "1.running_var"])
def test_frozen_weights_and_buffers_are_in_a_digest_of_their_own(name):
    """The Hessian of a head moves with the layers below it: its weights are the same, its numbers are not."""
    before, after = of_two_parts(), of_two_parts()
    with torch.no_grad():
        after.state_dict()[name].view(-1)[-1] += 0.5
    one, other = (weights_of(model, ["2.*"]) for model in (before, after))
    assert one[0] == other[0]
    assert one[1] != other[1]
    fingerprints = [Fingerprint(weights_sha256=own, fixed_sha256=fixed) for own, fixed in (one, other)]
    assert not same_weights(*fingerprints)
    assert same_weights(fingerprints[0], Fingerprint(weights_sha256=one[0]))  # of an earlier hessdiag


def test_probes_of_another_law_are_no_repetition():
    """A baseline of before drew its probes otherwise: its numbers may lie apart by more than rounding."""
    old, new = (entry(trace=number(v, 0.1, "probes", per_probe=(v - 1, v + 1))) for v in (5.0, 6.0))
    assert len(reproduced(old, new)) == 1
    later = dataclasses.replace(new, fingerprint=but({"probe_law": "another"}))
    assert reproduced(old, later) == ()
    exact = [dataclasses.replace(e, metrics={"trace": number(v)}) for e, v in ((old, 5.0), (later, 6.0))]
    assert len(reproduced(*exact)) == 1


# Breakages


def keeps_subjects_apart() -> bool:
    pairs = [(FINGERPRINT, but({name: OTHER[name]})) for name in SUBJECT]
    pairs += [(without(name), FINGERPRINT) for name in SUBJECT]
    free = [(FINGERPRINT, but({name: "other"})) for name in HOW | IDENTITY]
    return all(differences(*pair) for pair in pairs) and not any(differences(*pair) for pair in free)


def repeats_where_it_should() -> bool:
    pairs = itertools.chain(REPEATS.values(), DEPARTS.values())
    return [len(reproduced(*pair)) for pair in pairs] == [0] * len(REPEATS) + [1] * len(DEPARTS)


def forgotten(name):
    rest = {field: hint for field, hint in SUBJECT.items() if field != name}
    return {"SUBJECT": rest, "HOW": HOW | {name}}


BROKEN = {
    "seed may differ": (forgotten("seed"), keeps_subjects_apart),
    "data may differ": (forgotten("data_sha256"), keeps_subjects_apart),
    "probes must agree": ({"HOW": HOW - {"probes"}}, keeps_subjects_apart),
    "weights must agree": ({"IDENTITY": frozenset()}, keeps_subjects_apart),
    "no floor": ({"NUMERIC_FLOOR": {"float32": 0.0, "float64": 0.0}}, repeats_where_it_should),
    "one floor for all": ({"NUMERIC_FLOOR": {"float32": 1e-4, "float64": 1e-4}}, repeats_where_it_should),
    "floor of the value itself": (
        {"_scale": lambda name, base, new: abs(base.metrics[name].value)},
        repeats_where_it_should,
    ),
    "all probes": ({"_on_common_probes": lambda old, new: (old.value, new.value)}, repeats_where_it_should),
    "any weights": ({"same_weights": lambda base, new: True}, repeats_where_it_should),
    "half-widths forgotten": ({"_half_width": lambda recorded: 0.0}, repeats_where_it_should),
}


@pytest.mark.parametrize("breakage", BROKEN)
def test_this_promise_would_notice(monkeypatch, breakage):
    changes, promise = BROKEN[breakage]
    assert promise()
    for name, instead in changes.items():
        monkeypatch.setattr(comparable, name, instead)
    assert not promise()
