"""Promise: curvature, flatness, norm and noise measures are what an independent computation gives. (14 s)"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessdiag.analysis import Measurement
from hessdiag.engine.products.coordinates import Coordinates
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.functional import Functional
from hessdiag.errors import Refused, UsageError
from hessdiag.gap.checkpoint import Checkpoint
from hessdiag.gap.measures import curvature as curvature_measures
from hessdiag.gap.measures import flatness, folding, noise, norms, weighted_trace
from hessdiag.gap.registry import Reading, registry
from hessdiag.problem import Problem
from hessdiag.results import QUANTITIES
from hessdiag.settings import Settings
from hessdiag.track.follow import rate_of
from hessdiag.track.trajectory import Rate
from tests import models

EXACT = 1e-9  # float64 sums of a few hundred terms: 1e-13 measured
MEASURES = registry()


class Images(nn.Module):
    """Convolution with bias, BatchNorm, ReLU, a convolution without, mean, linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2)
        self.norm = nn.BatchNorm2d(3)
        self.again = nn.Conv2d(3, 4, 2, bias=False)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.again(F.relu(self.norm(self.conv(x)))))
        return self.head(x.mean((2, 3)))


def perceptron(activation: type[nn.Module] = nn.ReLU, bias: bool = True, outputs: int = 3) -> Problem:
    torch.manual_seed(5)
    layers = (
        nn.Linear(5, 7, bias),
        activation(),
        nn.Linear(7, 6, bias),
        activation(),
        nn.Linear(6, outputs, bias),
    )
    x = models.randn(40, 5)
    x[:, 4] = 0.5  # a constant input acts as a bias
    model = nn.Sequential(*layers).double()
    return Problem(model, {"train": (x, model(x).argmax(1))}, criterion="cross_entropy")


def images() -> Problem:
    torch.manual_seed(6)
    model = Images().double()
    with torch.no_grad():
        model.norm.weight.mul_(torch.tensor([0.5, -1.5, 2.0], dtype=torch.float64))
        model.norm.bias.add_(0.3)
        model(3 * models.randn(30, 2, 4, 4, seed=9) + 1)  # training mode: statistics worth folding
    data = (models.randn(24, 2, 4, 4), models.labels(24, 3))
    return Problem(model.eval(), {"train": data}, criterion="cross_entropy")


def checkpoint(problem: Problem, batch_size: int = 7, quantities: tuple[str, ...] = (), **options) -> Checkpoint:
    """In ragged batches, with a curvature analysis where quantities are asked for."""
    if quantities:
        # fewer Lanczos steps than by default: the matrices are small
        settings = Settings(
            quantities=quantities, samples=100, batch_size=batch_size, density_probes=2, steps=15, top=1
        )
        run = Measurement(problem, settings)
        return Checkpoint(problem, run.samples, run.operator, analysis=run.run(), **options)
    samples = models.sample(problem, batch_size)
    return Checkpoint(problem, samples, Curvature(problem, samples), **options)


def value(name: str, at: Checkpoint) -> float:
    found = MEASURES[name](at)
    assert isinstance(found, Reading), found
    return found.value


def slices(problem: Problem) -> dict[str, slice]:
    found, begin = {}, 0
    for name, parameter in problem.model.named_parameters():
        found[name] = slice(begin, begin + parameter.numel())
        begin += parameter.numel()
    return found


def layer_input(problem: Problem, layer: nn.Module) -> Tensor:
    seen = []
    handle = layer.register_forward_hook(lambda _, given, __: seen.append(given[0].detach()))
    problem.model.eval()(problem.data["train"][0])
    handle.remove()
    return seen[0]


def spread(x: Tensor) -> np.ndarray:
    """Standard deviation per column, 0 for constants."""
    found = x.numpy().std(axis=0)
    return np.where(found < 1e-9, 0.0, found)


def blocks(problem: Problem, name: str, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Normalised weight (m, d) and its layer's Hessian (m, d, m, d), from the dense Hessian of everything."""
    where = slices(problem)[name]
    weight = dict(problem.model.named_parameters())[name].detach().flatten(1).numpy()
    columns = np.repeat(spread(x), weight.shape[1] // x.shape[1])
    H = models.dense_hessian(problem).numpy()[where, where].reshape(*weight.shape, *weight.shape)
    inverse = np.array([1 / c if c else 0.0 for c in columns])  # constant inputs are left out
    return weight * columns, H * inverse[None, :, None, None] * inverse[None, None, None, :]


def kappa(problem: Problem, name: str, x: Tensor, largest: bool = False) -> float:
    """Petzka's sum, block by block."""
    W, H = blocks(problem, name, x)
    total = 0.0
    for s in range(len(W)):
        for t in range(len(W)):
            block = H[s, :, t, :]
            total += W[s] @ W[t] * (np.linalg.eigvalsh(block)[-1] if largest else np.trace(block))
    return total


def example_gradients(problem: Problem) -> np.ndarray:
    rows, (inputs, targets) = [], problem.data["train"]
    for x, y in zip(inputs, targets, strict=True):
        out = problem.model.eval()(x[None])
        loss = (
            F.cross_entropy(out, y[None]) if problem.criterion == "cross_entropy" else (out[0] - y).square().mean()
        )
        slope = torch.autograd.grad(loss, list(problem.model.parameters()))
        rows.append(torch.cat([piece.reshape(-1) for piece in slope]).numpy())
    return np.stack(rows)


# --- curvature -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("problem", [models.mlp(), perceptron(), models.regression()], ids=["tanh", "relu", "mse"])
def test_what_the_analysis_gives_is_the_dense_hessian(problem):
    at = checkpoint(replace(problem, meta={"lr": 0.3}), batch_size=20, quantities=QUANTITIES)
    eigenvalues = np.linalg.eigvalsh(models.dense_hessian(problem).numpy())
    P, n = len(eigenvalues), len(problem.data["train"][0])
    mean, deviation = eigenvalues.mean(), eigenvalues.std()
    weights = sum(float(p.detach().square().sum()) for p in problem.model.parameters())
    truth = {
        "lambda_max": eigenvalues[-1],
        "lambda_min": eigenvalues[0],
        "spectral_radius": np.abs(eigenvalues).max(),
        "trace": eigenvalues.sum(),
        "trace_per_example": eigenvalues.sum() / n,
        "frobenius": math.sqrt((eigenvalues**2).sum()),
        "effective_rank": eigenvalues.sum() ** 2 / (eigenvalues**2).sum(),
        "ws_upper": mean + deviation * math.sqrt(P - 1),
        "ws_lower": mean - deviation * math.sqrt(P - 1),
        "ws_slack": (mean + deviation * math.sqrt(P - 1)) / eigenvalues[-1],
        "edge_of_stability": eigenvalues[-1] * 0.3 / 2,
        "lambda_max_weights": eigenvalues[-1] * weights,
    }
    for name, true in truth.items():
        found = MEASURES[name](at)
        assert isinstance(found, Reading), found
        # draws: an interval of 95 %, half as wide again for twelve of them; certificates go to 1e-3
        slack = (found.hi - found.lo) / 2 + 2e-3 * abs(true)
        assert found.lo - slack <= true <= found.hi + slack, name
    share = MEASURES["negative_mass"](at)
    resolved = 1e-9 * eigenvalues[-1]
    assert share.lo - 1 / P <= (eigenvalues < -resolved).mean() <= share.hi + 1 / P


def test_the_edge_is_where_training_diverges():
    problem, H = models.linear_regression()
    top = float(np.linalg.eigvalsh(H.numpy())[-1])
    measured = checkpoint(problem, quantities=("lambda_max",))
    for beta, nesterov in ((0.0, False), (0.9, False), (0.9, True)):
        for share in (0.97, 1.03):
            limit = (2 + 2 * beta) / ((1 + 2 * beta) if nesterov else 1.0)
            rate = share * limit / top
            meta = {"lr": rate, "momentum": beta, "nesterov": nesterov}
            trained = replace(problem, meta=meta)
            at = Checkpoint(trained, measured.samples, measured.operator, analysis=measured.analysis)
            found = value("edge_of_stability", at)
            assert found == pytest.approx(share, rel=2e-3)  # λ_max is certified to 1e-3
            assert diverges(problem, rate, beta, nesterov) == (found > 1)


ADAPTIVE = [{"adaptive": True}, {"optimizer": "AdamW"}, {"optimizer": "torch.optim.RMSprop"}, {"opt": "lamb"}]


@pytest.mark.parametrize("named", ADAPTIVE)
@pytest.mark.parametrize("where", ["facts", "meta"])
def test_an_optimizer_that_scales_directions_has_no_edge(named, where):
    """The same rule as along a trajectory, whoever names the optimizer: the file or the problem."""
    problem, _ = models.linear_regression()
    measured = checkpoint(problem, quantities=("lambda_max",))
    facts, meta = ({"lr": 1e-3} | named, {}) if where == "facts" else ({"lr": 1e-3}, named)
    trained = replace(problem, meta=meta)
    at = Checkpoint(trained, measured.samples, measured.operator, analysis=measured.analysis, facts=facts)
    said = MEASURES["edge_of_stability"](at)
    assert isinstance(said, Refused) and "2/η is no limit" in said.reason
    assert said == rate_of(None, facts, meta)


def test_the_edge_is_that_of_the_trajectory():
    """The file's rate counts before the problem's: a schedule moved it."""
    problem, _ = models.linear_regression()
    measured = checkpoint(problem, quantities=("lambda_max",))
    for facts, meta in (
        ({"lr": 0.01}, {"lr": 0.1, "momentum": 0.9, "optimizer": "SGD"}),
        ({"momentum": 0.5}, {"learning_rate": 0.1, "nesterov": True}),
        ({}, {"lr": 0.2, "optimizer": "adabatch"}),
    ):
        trained = replace(problem, meta=meta)
        at = Checkpoint(trained, measured.samples, measured.operator, analysis=measured.analysis, facts=facts)
        rate = rate_of(None, facts, meta)
        assert value("edge_of_stability", at) == pytest.approx(value("lambda_max", at) / rate.limit)
    assert "it must be 0 to less than 1" in rate_of(None, {}, {"lr": 0.1, "momentum": 1.0}).reason


def diverges(problem: Problem, rate: float, beta: float, nesterov: bool) -> bool:
    model = nn.Linear(3, 2).double()
    model.load_state_dict(problem.model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=beta, nesterov=nesterov)
    inputs, targets = problem.data["train"]
    for _ in range(600):
        optimizer.zero_grad()
        loss = (model(inputs) - targets).square().mean()
        loss.backward()
        optimizer.step()
    return not float(loss.detach()) < 100


def filter_oracle(problem: Problem) -> float:
    diagonal, total = np.diag(models.dense_hessian(problem).numpy()), 0.0
    for name, where in slices(problem).items():
        weight = dict(problem.model.named_parameters())[name].detach()
        if weight.dim() > 1:
            per_filter = diagonal[where].reshape(len(weight), -1).sum(1)
            total += (weight.flatten(1).square().mean(1).numpy() * per_filter).sum()
    return float(total)


@pytest.mark.parametrize("problem", [perceptron(), images()], ids=["relu", "cnn"])
def test_filter_normalised_trace_is_exact_where_layers_are_linear(problem):
    found = MEASURES["filter_normalised_trace"](checkpoint(problem))
    assert found.kind == "exact"
    assert found.value == pytest.approx(filter_oracle(problem), rel=EXACT)


def test_filter_normalised_trace_is_the_curvature_along_random_directions():
    problem = perceptron()
    H, draw = models.dense_hessian(problem), torch.Generator().manual_seed(3)
    pieces = []
    for weight in problem.model.parameters():
        d = torch.randn(4000, *weight.shape, generator=draw, dtype=torch.float64)
        if weight.dim() > 1:
            d *= weight.detach().norm(dim=1, keepdim=True) / d.norm(dim=2, keepdim=True)
        pieces.append((d if weight.dim() > 1 else 0 * d).flatten(1))
    rows = torch.cat(pieces, 1)
    forms = ((rows @ H) * rows).sum(1).numpy()
    error = np.std(forms) / math.sqrt(len(forms))
    assert abs(value("filter_normalised_trace", checkpoint(problem)) - forms.mean()) < 4 * error


@pytest.mark.parametrize(
    "problem", [models.mlp(), models.regression(), perceptron(nn.Tanh, outputs=40)], ids=["tanh", "silu", "wide"]
)
def test_drawn_traces_are_unbiased(problem):
    truth = filter_oracle(problem)
    found = [MEASURES["filter_normalised_trace"](checkpoint(problem, 40, seed=seed)) for seed in range(8)]
    assert {one.kind for one in found} == {"draws"}
    values = np.array([one.value for one in found])
    # eight means of 32: their own spread is the error
    assert abs(values.mean() - truth) < 4 * values.std(ddof=1) / math.sqrt(8) + EXACT
    assert sum(one.lo <= truth <= one.hi for one in found) >= 6


def test_coordinates_give_the_transformed_hessian():
    problem = models.mlp()
    names = [name for name, _ in problem.model.named_parameters()]
    factor = models.randn(8, 8, seed=4)
    function = Coordinates(Functional(problem), {names[0]: lambda t: factor @ t})
    operator = Curvature(problem, models.sample(problem, 7), function=function)
    where = slices(problem)[names[0]]
    A = torch.kron(factor, torch.eye(5, dtype=torch.float64))
    expected = A.T @ models.dense_hessian(problem)[where, where] @ A
    assert torch.allclose(operator.dense(), expected, rtol=EXACT, atol=1e-11)
    with pytest.raises(UsageError, match="there are 0"):
        Coordinates(Functional(problem), {"nobody": lambda t: t})


# --- flatness --------------------------------------------------------------------------------------------------


def check_flatness():
    problem = perceptron()
    at = checkpoint(problem)
    for name, place, largest in (
        ("relative_flatness", 2, False),
        ("relative_flatness_last", 4, False),
        ("relative_flatness_max", 4, True),
    ):
        truth = kappa(problem, f"{place}.weight", layer_input(problem, problem.model[place]), largest)
        assert value(name, at) == pytest.approx(truth, rel=EXACT), name


def test_relative_flatness_is_the_sum_over_blocks():
    check_flatness()


def test_relative_flatness_of_a_convolution():
    problem = images()
    x = layer_input(problem, problem.model.again).movedim(1, -1).reshape(-1, 3)
    truth = kappa(problem, "again.weight", x)
    assert value("relative_flatness", checkpoint(problem)) == pytest.approx(truth, rel=EXACT)


def test_constant_inputs_are_left_out_of_relative_flatness():
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    problem = Problem(model, perceptron().data, criterion="cross_entropy")
    x = problem.data["train"][0]
    truth = kappa(problem, "0.weight", x)
    assert value("relative_flatness", checkpoint(problem)) == pytest.approx(truth, rel=EXACT)
    W, H = blocks(problem, "0.weight", x)
    assert not W[:, 4].any()
    assert not H[:, 4].any()


def test_relative_flatness_of_a_regression_and_of_the_input_layer():
    problem = models.regression()  # two layers: the penultimate is the first
    at = checkpoint(problem)
    last = kappa(problem, "2.weight", layer_input(problem, problem.model[2]))
    assert value("relative_flatness_last", at) == pytest.approx(last, rel=EXACT)
    truth = kappa(problem, "0.weight", problem.data["train"][0])
    draws = [MEASURES["relative_flatness"](checkpoint(problem, 40, seed=seed)) for seed in range(8)]
    values = np.array([one.value for one in draws])
    assert abs(values.mean() - truth) < 4 * values.std(ddof=1) / math.sqrt(8)


def test_a_log_softmax_behind_the_last_layer_changes_nothing():
    problem = perceptron()
    names = ("relative_flatness_last", "relative_flatness_max")
    plain = [value(name, checkpoint(problem)) for name in names]
    problem.model.append(nn.LogSoftmax(-1))
    assert [value(name, checkpoint(problem)) for name in names] == pytest.approx(plain, rel=EXACT)
    problem.model[5] = nn.Tanh()
    assert "not those of its last layer" in MEASURES["relative_flatness_last"](checkpoint(problem)).reason


def test_simplified_flatness_is_norm_times_trace():
    problem = perceptron()
    at = checkpoint(problem, quantities=("trace",))
    diagonal = np.diag(models.dense_hessian(problem).numpy())
    shares = {
        place: float(problem.model[place].weight.detach().square().sum())
        * diagonal[slices(problem)[f"{place}.weight"]].sum()
        for place in (0, 2, 4)
    }
    assert value("simplified_flatness", at) == pytest.approx(shares[2], rel=EXACT)
    assert value("layerwise_flatness", at) == pytest.approx(sum(shares.values()), rel=EXACT)


# --- norms -----------------------------------------------------------------------------------------------------


def folded_images(problem: Problem) -> list[np.ndarray]:
    model = problem.model
    scale = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
    conv = model.conv.weight * scale[:, None, None, None]
    return [w.detach().flatten(1).numpy() for w in (conv, model.again.weight, model.head.weight)]


def check_norms():
    for problem, matrices in (
        (perceptron(), [perceptron().model[i].weight.detach().numpy() for i in (0, 2, 4)]),
        (images(), folded_images(images())),
    ):
        at = checkpoint(problem)
        log_product = sum(math.log(np.linalg.svd(W, compute_uv=False)[0]) for W in matrices)
        assert value("frobenius_sum", at) == pytest.approx(sum((W**2).sum() for W in matrices), rel=EXACT)
        assert value("log_spectral_product", at) == pytest.approx(log_product, rel=EXACT)


def test_layer_norms_are_numpys_with_batchnorm_folded():
    check_norms()


def test_distances_are_numpys():
    problem = perceptron()
    start = {name: p.detach() + 0.1 for name, p in problem.model.named_parameters()}
    at = checkpoint(problem, start=start)
    assert value("distance_from_start", at) == pytest.approx(0.1 * math.sqrt(at.size), rel=EXACT)
    norm = math.sqrt(sum(float(p.detach().square().sum()) for p in problem.model.parameters()))
    assert value("weight_norm", at) == pytest.approx(norm, rel=EXACT)
    assert "initial weights" in MEASURES["distance_from_start"](checkpoint(problem)).reason


def test_path_norm_sums_over_every_path():
    problem = perceptron()
    layers = [problem.model[i] for i in (0, 2, 4)]
    W = [layer.weight.detach().numpy() for layer in layers]
    b = [layer.bias.detach().numpy() for layer in layers]
    total = sum(
        (W[0][h, i] * W[1][k, h] * W[2][c, k]) ** 2
        for i in range(5)
        for h in range(7)
        for k in range(6)
        for c in range(3)
    )
    total += sum((b[0][h] * W[1][k, h] * W[2][c, k]) ** 2 for h in range(7) for k in range(6) for c in range(3))
    total += sum((b[1][k] * W[2][c, k]) ** 2 for k in range(6) for c in range(3)) + (b[2] ** 2).sum()
    assert value("path_norm", checkpoint(problem)) == pytest.approx(math.sqrt(total), rel=EXACT)


def check_path_norm_of_images():
    problem = images()
    model = problem.model
    scale = model.norm.weight / (model.norm.running_var + model.norm.eps).sqrt()
    kernel = (model.conv.weight * scale[:, None, None, None]).square()
    shift = ((model.conv.bias - model.norm.running_mean) * scale + model.norm.bias).square()
    x = F.conv2d(torch.ones(1, 2, 4, 4, dtype=torch.float64), kernel, shift)
    x = F.conv2d(x, model.again.weight.square()).mean((2, 3))
    total = float(F.linear(x, model.head.weight.square(), model.head.bias.square()).sum().detach())
    assert value("path_norm", checkpoint(problem)) == pytest.approx(math.sqrt(total), rel=EXACT)


def test_path_norm_folds_batchnorm():
    check_path_norm_of_images()


def test_path_norm_is_refused_where_paths_have_no_length():
    assert "positively homogeneous" in MEASURES["path_norm"](checkpoint(models.mlp())).reason
    assert "positively homogeneous" in MEASURES["path_norm"](checkpoint(perceptron(nn.GELU))).reason
    assert "tokens" in MEASURES["path_norm"](checkpoint(models.attention())).reason


def check_margin():
    problem = perceptron()
    x, y = problem.data["train"]
    logits = problem.model(x).detach().numpy()
    margins = [row[c] - max(np.delete(row, c)) for row, c in zip(logits, y.tolist(), strict=True)]
    gamma = np.percentile(margins, 10)
    assert value("inverse_margin", checkpoint(problem)) == pytest.approx(gamma**-2, rel=EXACT)
    both = value("log_spectral_over_margin", checkpoint(problem))
    product = value("log_spectral_product", checkpoint(problem))
    assert both == pytest.approx(2 * product - 2 * math.log(gamma), rel=EXACT)


def test_the_margin_is_numpys_percentile():
    check_margin()
    wrong = replace(perceptron(), data={"train": (models.randn(40, 5), models.labels(40, 3))})
    assert "misclassified" in MEASURES["inverse_margin"](checkpoint(wrong)).reason
    assert "classes" in MEASURES["inverse_margin"](checkpoint(models.regression())).reason


def check_fisher_rao():
    for problem in (perceptron(), models.mlp(), models.regression(), images()):
        theta = torch.cat([p.detach().reshape(-1) for p in problem.model.parameters()]).numpy()
        truth = math.sqrt(np.mean((example_gradients(problem) @ theta) ** 2))
        assert value("fisher_rao", checkpoint(problem)) == pytest.approx(truth, rel=EXACT)


def test_fisher_rao_is_the_mean_over_examples():
    check_fisher_rao()


def test_fisher_raos_two_sides_agree_for_a_homogeneous_network():
    found = MEASURES["fisher_rao"](checkpoint(perceptron(bias=False)))
    assert found.more["degree"] == 3
    assert found.more["closed_form"] == pytest.approx(found.value, rel=EXACT)
    for other in (perceptron(), perceptron(nn.Tanh, bias=False)):
        assert not MEASURES["fisher_rao"](checkpoint(other)).more


# --- noise -----------------------------------------------------------------------------------------------------


def check_noise():
    for problem in (perceptron(nn.Tanh), models.regression()):
        problem = replace(problem, meta={"lr": 0.1, "batch_size": 20})
        rows, at = example_gradients(problem), checkpoint(problem)
        covariance = np.cov(rows.T)
        H, n = models.dense_hessian(problem).numpy(), len(rows)
        square = (rows.mean(0) ** 2).sum() - np.trace(covariance) / n
        assert value("gradient_noise", at) == pytest.approx(np.trace(covariance), rel=EXACT)
        assert value("gradient_noise_max", at) == pytest.approx(np.linalg.eigvalsh(covariance)[-1], rel=EXACT)
        assert value("noise_alignment", at) == pytest.approx(np.trace(H @ covariance), rel=EXACT)
        scale = MEASURES["noise_scale"](at)
        if square > 0:
            assert scale.value == pytest.approx(np.trace(covariance) / square, rel=1e-8)  # a difference
            assert scale.more["temperature"] == 0.1 / 20
        else:
            assert "not resolved" in scale


def test_gradient_noise_is_numpys_covariance():
    check_noise()


def test_alignment_from_probes_is_unbiased(monkeypatch):
    monkeypatch.setattr(noise, "KNOWN", 3)
    problem = perceptron(nn.Tanh)
    rows = example_gradients(problem)
    truth = np.trace(models.dense_hessian(problem).numpy() @ np.cov(rows.T))
    found = [MEASURES["noise_alignment"](checkpoint(problem, 40, seed=seed)) for seed in range(10)]
    values = np.array([one.value for one in found])
    assert abs(values.mean() - truth) < 4 * values.std(ddof=1) / math.sqrt(10)
    assert sum(one.lo <= truth <= one.hi for one in found) >= 7


def test_a_part_of_the_examples_stands_for_all(monkeypatch):
    problem = perceptron(nn.Tanh)
    monkeypatch.setattr(noise, "KEPT_EXAMPLES", 20)
    at = checkpoint(problem)
    rows = example_gradients(problem)
    statistics = noise.example_statistics(at)
    assert np.allclose(statistics.kept.numpy(), (rows - rows.mean(0))[::2], atol=1e-12)
    assert value("gradient_noise", at) == pytest.approx(np.trace(np.cov(rows.T)), rel=EXACT)
    assert "20 of 40" in MEASURES["gradient_noise_max"](at).note


# --- what cannot be had ----------------------------------------------------------------------------------------


def test_what_is_missing_is_said_in_one_line():
    at = checkpoint(models.attention())
    for name in ("lambda_max", "edge_of_stability", "simplified_flatness", "inverse_margin", "path_norm"):
        found = MEASURES[name](at)
        assert isinstance(found, Refused), name
        assert "\n" not in found.reason
    assert "learning rate" in MEASURES["edge_of_stability"](at).reason


def test_the_model_keeps_no_hooks():
    problem = images()
    at = checkpoint(problem)
    for name, one in MEASURES.items():
        if one.function.__module__.rsplit(".", 1)[-1] in ("flatness", "norms", "noise", "curvature"):
            assert isinstance(one(at), Reading | Refused), name
    assert not any(module._forward_hooks for module in problem.model.modules())


def no_bend(monkeypatch):
    monkeypatch.setattr(weighted_trace, "curved_tensors", lambda _: ())


BROKEN = {
    "inputs not normalised": (
        lambda m: m.setattr(flatness, "input_spread", lambda _, layer: torch.ones(layer.module.in_features)),
        check_flatness,
    ),
    "curved layers taken for linear": (no_bend, lambda: test_drawn_traces_are_unbiased(models.mlp())),
    "BatchNorm not folded": (lambda m: m.setattr(norms, "folded_matrices", unfolded), check_norms),
    "epsilon forgotten": (lambda m: m.setattr(folding, "norm_scale", without_epsilon), check_path_norm_of_images),
    "the median margin": (lambda m: m.setattr(norms, "QUANTILE", 0.5), check_margin),
    "noise about zero": (lambda m: m.setattr(noise, "_pass", uncentred(noise._pass)), check_noise),
    "momentum ignored": (
        lambda m: m.setattr(curvature_measures, "rate_of", lambda _lr, _facts, meta: Rate(lr=meta["lr"])),
        test_the_edge_is_where_training_diverges,
    ),
}


def unfolded(at: Checkpoint) -> list[Tensor]:
    return [layer.weight.double().flatten(1) for layer in at.layers if layer.kind != "norm"]


def without_epsilon(norm: nn.Module) -> Tensor:
    return (norm.weight / norm.running_var.sqrt()).detach()


def uncentred(original):
    def broken(at: Checkpoint):
        found = original(at)
        return replace(found, kept=found.kept + found.mean, mean=torch.zeros_like(found.mean))

    return broken


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage, monkeypatch):
    broken, check = breakage
    broken(monkeypatch)
    with pytest.raises(AssertionError):
        check()
