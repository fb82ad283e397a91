"""Promise: where G can have no negative eigenvalue hessdiag knows that, and nowhere else. (10 s)

Oracle: G = JᵀSJ written out, J by plain backward passes in float64 and S by formula, without hessdiag.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessdiag import analyze, extremes, hessian, spectral
from hessdiag.analysis import structure
from hessdiag.engine.products import curvature, fisher
from hessdiag.engine.products.curvature import Curvature
from hessdiag.present.signs import negative_mass
from hessdiag.problem import Problem
from hessdiag.results import Analysis
from tests import models

QUIET = {"second_opinion": False, "operator": "ggn"}


def digits_like(examples: int, criterion: str = "cross_entropy") -> Problem:
    """315 parameters, five outputs: G of 40 examples has rank 200 at most, that of 200 examples may be full."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 5)).double()
    inputs, classes = models.randn(examples, 10), models.labels(examples, 5)
    targets = classes if criterion == "cross_entropy" else F.one_hot(classes, 5).double()
    return Problem(model, {"train": (inputs, targets)}, criterion=criterion)


def dense(problem: Problem) -> Tensor:
    """G of the mean loss."""
    inputs, targets = problem.data["train"]
    parameters = list(problem.model.parameters())
    outputs = problem.model(inputs)
    rows = [torch.autograd.grad(one, parameters, retain_graph=True) for one in outputs.flatten()]
    J = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).view(*outputs.shape, -1)
    p = outputs.detach().softmax(-1)
    S = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    if problem.criterion == "mse":
        S = 2 * torch.eye(outputs.shape[1], dtype=J.dtype).expand_as(S) / outputs.shape[1]
    return torch.einsum("ncp,ncd,ndq->pq", J, S, J) / len(targets)


CASES = {
    f"{criterion}, {examples} examples": (criterion, examples)
    for criterion in ("cross_entropy", "mse")
    for examples in (40, 200)
}


@functools.cache
def case(name: str) -> tuple[Problem, np.ndarray, Analysis]:
    criterion, examples = CASES[name]
    problem = digits_like(examples, criterion)
    values = torch.linalg.eigvalsh(dense(problem)).numpy()
    return problem, values, analyze(problem, **QUIET)


@pytest.mark.parametrize("name", CASES)
def test_no_eigenvalue_is_negative(name):
    _, values, found = case(name)
    share, least = found.metrics["negative_mass"], found.metrics["lambda_min"]
    assert (share.lo, share.value, share.hi, share.kind, share.confidence) == (0, 0, 0, "exact", 1.0)
    assert "positive semidefinite" in share.provenance.method and share.provenance.products == 0
    slack = 1e-12 * values[-1]
    assert 0 <= least.lo <= max(values[0], 0) + slack and values[0] <= least.hi + slack
    assert least.hi - least.lo <= 1.01e-3 * values[-1]


@pytest.mark.parametrize("name", CASES)
def test_what_has_fewer_outputs_than_parameters_is_singular(name):
    _, values, found = case(name)
    least = found.metrics["lambda_min"]
    assert (least.kind == "exact") == (CASES[name][1] == 40)
    if least.kind == "exact":
        assert (least.lo, least.value, least.hi) == (0, 0, 0) and "of rank 200 at most" in least.provenance.method
        assert abs(values[0]) < 1e-12 * values[-1]


@pytest.mark.parametrize("name", CASES)
def test_the_density_has_no_node_below_zero_and_the_right_error(name):
    _, values, found = case(name)
    nodes, weights = np.array(found.spectrum.merged()).T
    assert nodes.min() >= 0 and found.spectrum.mass(hi=-1e-300) == 0
    x = np.unique(np.concatenate([nodes, values]))
    ours = np.append(0.0, np.cumsum(weights))[np.searchsorted(nodes, x, side="right")]
    true = np.searchsorted(values, x, side="right") / len(values)
    area = float((np.abs(ours - true)[:-1] * np.diff(x)).sum()) / float(np.abs(values).mean())
    assert area <= found.spectrum.error
    assert found.spectrum.semidefinite


def test_further_starts_have_no_node_below_zero_either():
    problem, asked = digits_like(40), ["density", "negative_mass"]
    found = analyze(problem, asked, density_probes=2, steps=100, dtype="float32", **QUIET)
    assert min(node for node, _ in found.spectrum.merged()) >= 0
    assert found.spectrum.semidefinite and found.metrics["negative_mass"].hi == 0


def test_every_direction_multiplied_gives_no_value_below_zero():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 3))
    problem = Problem(
        model, {"train": (models.randn(3, 3).float(), models.labels(3, 3))}, criterion="cross_entropy"
    )
    found = analyze(problem, **QUIET)
    assert found.spectrum.whole and min(found.spectrum.known.nodes) == 0
    assert found.metrics["lambda_min"].lo == found.metrics["negative_mass"].hi == 0


def test_what_is_known_by_structure_costs_no_product():
    problem, _, _ = case("cross_entropy, 40 examples")
    assert analyze(problem, ["negative_mass", "lambda_min"], **QUIET).cost.products == 0
    ends, alone = (analyze(problem, asked, **QUIET) for asked in (["lambda_max", "lambda_min"], ["lambda_max"]))
    assert ends.cost.products == alone.cost.products < 25
    assert ends.metrics["lambda_max"] == alone.metrics["lambda_max"]


def test_it_is_said_in_words_and_pictures():
    _, _, found = case("cross_entropy, 40 examples")
    assert "negative_mass            0%  [0, 0]%" in repr(found)
    drawn = found.plot.density()
    written = [text.get_text() for text in drawn.figure.findobj(lambda one: hasattr(one, "get_text"))]
    assert any("not told from zero" in text for text in written) == bool(found.spectrum.unresolved)
    assert not any("signs" in text for text in written)
    bare = replace(found, metrics={name: m for name, m in found.metrics.items() if name != "negative_mass"})
    assert negative_mass(bare, bare.spectrum) == "0% (positive semidefinite)"


def concave(outputs: Tensor, batch) -> Tensor:
    """A criterion of one's own that is not convex in the outputs."""
    return torch.cos(outputs - F.one_hot(batch[1], 5)).mean()


def weighted(batch) -> float:
    return -1.0 if batch[0][0, 0] < 0 else 3.0


UNKNOWN = {
    "the Hessian": (digits_like(40), "hessian"),
    "a criterion of one's own": (replace(digits_like(40), criterion=concave), "ggn"),
    "a batch that counts negatively": (replace(digits_like(40), weight=weighted), "ggn"),
    "soft targets that sum to less than nothing": (
        replace(digits_like(40), data={"train": (models.randn(40, 10), F.one_hot(models.labels(40, 5), 5) - 0.5)}),
        "ggn",
    ),
}


def operator(name: str) -> Curvature:
    problem, kind = UNKNOWN[name]
    return Curvature(problem, models.sample(problem, 4), kind=kind)


def has_negative(matrix: Tensor) -> bool:
    return float(torch.linalg.eigvalsh((matrix + matrix.T) / 2)[0]) < -1e-3


@pytest.mark.parametrize("name", UNKNOWN)
def test_it_is_not_claimed_where_it_is_false(name):
    op = operator(name)
    assert has_negative(op.dense()) and not op.semidefinite


def test_soft_targets_are_known():
    problem = digits_like(40)
    soft = {"train": (problem.data["train"][0], models.randn(40, 5).softmax(-1))}
    assert Curvature(replace(problem, data=soft), models.sample(problem), kind="ggn").semidefinite


def test_sums_are_known_where_all_terms_are():
    problem = digits_like(40)
    G, H = (Curvature(problem, models.sample(problem), kind=kind) for kind in ("ggn", "hessian"))
    assert (2 * G).semidefinite and (G + G).semidefinite
    assert not (-1 * G).semidefinite and not (G + H).semidefinite and not (H - G).semidefinite


PLUS = {"empirical_fisher": {}, "mc_fisher": {"draws": 2}}


@pytest.mark.parametrize("kind", PLUS)
def test_a_fisher_matrix_is_known(kind):
    """A mean of outer products has no negative eigenvalue, whatever the loss."""
    fisher_matrix = hessian(digits_like(12), operator=kind, **PLUS[kind])
    assert fisher_matrix.semidefinite and not has_negative(fisher_matrix.dense())
    ends = extremes(fisher_matrix, failure=1e-3)
    assert ends.lambda_min.lo >= 0 and float(ends.lambda_min.value) >= 0
    share = spectral.negative_mass(spectral.density(fisher_matrix, probes=4, steps=20, seed=0))
    assert (share.lo, share.value, share.hi) == (0, 0, 0)


def test_the_identity_and_even_powers_are_known():
    H = Curvature(digits_like(12), models.sample(digits_like(12)))
    assert not H.semidefinite and not (H**3).semidefinite and not (H + H.identity).semidefinite
    assert H.identity.semidefinite and (H**2).semidefinite and (H**2 + 0.1 * H.identity).semidefinite
    assert not has_negative((H**2).dense())


@pytest.mark.parametrize("kind", PLUS)
def test_a_fisher_matrix_that_is_not_known_would_be_noticed(kind, monkeypatch):
    monkeypatch.setattr(fisher.Fisher, "semidefinite", property(lambda _: False, lambda *_: None), raising=False)
    with pytest.raises(AssertionError):
        test_a_fisher_matrix_is_known(kind)


@pytest.mark.parametrize("name", [name for name in UNKNOWN if name != "the Hessian"])
def test_a_claim_for_any_criterion_would_be_noticed(name, monkeypatch):
    monkeypatch.setattr(curvature, "is_convex", lambda *_: True)
    with pytest.raises(AssertionError):
        test_it_is_not_claimed_where_it_is_false(name)


def test_a_wrong_rank_would_be_noticed(monkeypatch):
    monkeypatch.setattr(structure, "rank_at_most", lambda _: 200)
    case.cache_clear()
    with pytest.raises(AssertionError):
        test_what_has_fewer_outputs_than_parameters_is_singular("cross_entropy, 200 examples")
    case.cache_clear()
