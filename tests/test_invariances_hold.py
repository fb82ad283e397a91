"""Promise: measures survive exactly the rescalings they claim to, and the guard finds rescalings. (14 s)"""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessdiag.analysis import Measurement
from hessdiag.engine.products.curvature import Curvature
from hessdiag.errors import NonFiniteError, Refused, UsageError
from hessdiag.gap import guard as guarding
from hessdiag.gap import rescaling
from hessdiag.gap.checkpoint import Checkpoint
from hessdiag.gap.guard import guard, remade, settings_of, verdict
from hessdiag.gap.registry import INVARIANCES, Measure, Reading, registry
from hessdiag.gap.rescaling import Rescaling, rescaled
from hessdiag.problem import Problem
from hessdiag.settings import Settings
from tests import models

MODULES = ("curvature", "flatness", "norms", "noise")
MINE = {n: m for n, m in registry().items() if m.function.__module__.rsplit(".", 1)[-1] in MODULES}
SAME = 1e-8  # relative: float64, rescaled by factors that are no powers of two
MOVES = 1e-4  # relative: what is not invariant moves by far more under factors of 2 and 3
QUANTITIES = ("lambda_max", "lambda_min", "trace", "frobenius_squared", "ws_lower", "ws_upper", "effective_rank")
SETTINGS = Settings(quantities=QUANTITIES, samples=60, batch_size=30, density_probes=2, steps=15)


def trained(activation: type[nn.Module] = nn.ReLU) -> Problem:
    """Three layers with biases, fitted, so that margins are positive and the gradient is resolved."""
    torch.manual_seed(2)
    x = models.randn(60, 4)
    layers = (nn.Linear(4, 6), activation(), nn.Linear(6, 5), activation(), nn.Linear(5, 3))
    model = nn.Sequential(*layers).double()
    targets = (x @ models.randn(4, 3, seed=5)).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.03)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(model(x), targets).backward()
        optimizer.step()
    with torch.no_grad():
        for tensor in (model[4].weight, model[4].bias):
            tensor.mul_(0.4)  # underconfident throughout: the gradients agree, and their mean is resolved
    return Problem(model.eval(), {"train": (x, targets)}, criterion="cross_entropy", meta={"lr": 0.1})


def checkpoint(problem: Problem, start: dict[str, Tensor] | None = None, analyzed: bool = True) -> Checkpoint:
    if not analyzed:
        samples = models.sample(problem, 30)
        return Checkpoint(problem, samples, Curvature(problem, samples), start=start)
    run = Measurement(problem, SETTINGS)
    return Checkpoint(problem, run.samples, run.operator, analysis=run.run(), start=start)


def start_of(problem: Problem) -> dict[str, Tensor]:
    return {name: models.randn(*p.shape, seed=11) for name, p in problem.model.named_parameters()}


def by_layer(layers: list[nn.Linear]) -> None:
    for layer, factor, biases in zip(layers, (3.0, 0.5, 1 / 1.5), (3.0, 1.5, 1.0), strict=True):
        layer.weight.mul_(factor)
        layer.bias.mul_(biases)


def by_neuron(layers: list[nn.Linear]) -> None:
    for place, width in ((0, 6), (1, 5)):
        factor = torch.linspace(0.3, 3.0, width, dtype=torch.float64)
        layers[place].weight.mul_(factor[:, None])
        layers[place].bias.mul_(factor)
        layers[place + 1].weight.div_(factor)


def of_logits(layers: list[nn.Linear]) -> None:
    layers[2].weight.mul_(2.5)
    layers[2].bias.mul_(2.5)


def permuted(layers: list[nn.Linear]) -> None:
    for place, width in ((0, 6), (1, 5)):
        order = torch.randperm(width, generator=models.generator(place))
        layers[place].weight.copy_(layers[place].weight[order].clone())
        layers[place].bias.copy_(layers[place].bias[order].clone())
        layers[place + 1].weight.copy_(layers[place + 1].weight[:, order].clone())


CHANGES = {
    "layer rescaling": by_layer,
    "neuron rescaling": by_neuron,
    "logit scaling": of_logits,
    "permutation": permuted,
}


def changed(problem: Problem, word: str) -> Problem:
    model = copy.deepcopy(problem.model)
    with torch.no_grad():
        CHANGES[word]([module for module in model if isinstance(module, nn.Linear)])
    return replace(problem, model=model)


@pytest.fixture(scope="module")
def readings() -> dict[str, dict[str, Reading | Refused]]:
    """Every measure at the network and at its changed twins."""
    problem = trained()
    twins = {"": problem} | {word: changed(problem, word) for word in INVARIANCES}
    points = {word: checkpoint(twin, start_of(problem)) for word, twin in twins.items()}
    return {word: {name: one(at) for name, one in MINE.items()} for word, at in points.items()}


def holds(one: Measure, word: str, before: Reading | Refused, after: Reading | Refused) -> bool:
    """Whether what is claimed is so, and what is not claimed is not so."""
    if one.name == "negative_mass":
        return isinstance(before, Refused)  # not part of this analysis: see `test_the_sign_pattern_survives`
    assert isinstance(before, Reading), (one.name, before)
    if isinstance(after, Refused):
        return word not in one.invariances
    apart, scale = abs(before.value - after.value), max(abs(before.value), abs(after.value))
    if word in one.invariances:
        sampled = max(before.hi - before.lo, after.hi - after.lo)  # permuted weights meet other random signs
        return apart <= SAME * scale + sampled
    return apart > MOVES * scale


@pytest.mark.parametrize("word", INVARIANCES)
def test_every_claim_is_exactly_true(readings, word):
    wrong = [n for n, one in MINE.items() if not holds(one, word, readings[""][n], readings[word][n])]
    assert wrong == []


def test_the_changes_keep_the_function():
    problem = trained()
    x = problem.data["train"][0]
    for word in INVARIANCES:
        factor = 2.5 if word == "logit scaling" else 1.0
        assert torch.allclose(changed(problem, word).model(x), factor * problem.model(x), rtol=1e-10)


def test_the_sign_pattern_survives():
    """Why the guard may leave the share of negative eigenvalues out: rescaling is a congruence."""
    problem = trained()
    shares = []
    for word in ("", "layer rescaling", "neuron rescaling", "permutation"):
        H = models.dense_hessian(changed(problem, word) if word else problem)
        eigenvalues = torch.linalg.eigvalsh(H)
        shares.append(int((eigenvalues < -1e-9 * eigenvalues[-1]).sum()))
    assert len(set(shares)) == 1
    assert shares[0] > 0


# --- the guard -------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """BatchNorm after each convolution, and a sum that ties the scale of its two branches."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.second = nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.again = nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.first(x)))
        return self.head(F.relu(x + self.again(self.second(x))).mean((2, 3)))


def residual(plain: bool = False) -> Problem:
    torch.manual_seed(8)
    model: nn.Module = Residual()
    if plain:
        layers = (nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 3))
        model = nn.Sequential(*layers)
    model = model.double()
    model(2 * models.randn(30, 1, 4, 4, seed=9) + 1)  # training mode: statistics worth having
    data = (models.randn(24, 1, 4, 4), models.labels(24, 3))
    return Problem(model, {"train": data}, criterion="cross_entropy")


def places(problem: Problem, **options: float) -> tuple[str, ...] | Refused:
    found = rescaled(checkpoint(problem, analyzed=False), **options)
    if isinstance(found, Refused):
        return found
    x = problem.data["train"][0]
    before, after = copy.deepcopy(problem.model).eval()(x), found.problem.model.eval()(x)
    assert torch.allclose(before, after, rtol=1e-9, atol=1e-9), "the function did not stay"
    moved = [
        n for n, p in found.problem.model.named_parameters() if not torch.equal(p, problem.model.get_parameter(n))
    ]
    assert moved, "no weight was changed"
    return found.places


def check_places():
    assert places(trained()) == ("0 ×4, 2 ÷4",)
    assert places(trained(nn.LeakyReLU), alpha=8.0) == ("0 ×8, 2 ÷8",)
    assert places(residual(plain=True)) == ("0 ×4 before 1", "1 ×4, 4 ÷4")
    assert places(residual()) == ("first ×4 before norm", "second ×4 before again")
    assert places(models.attention()) == ("norm ×4, qkv ÷4",)  # LayerNorm's own scale, then a linear layer
    frozen = replace(trained(), params=("4.*",))
    assert places(frozen) == ("0 ×4, 2 ÷4",)  # the function stays whatever is measured


def check_refusals():
    for problem in (trained(nn.Tanh), trained(nn.GELU), models.mlp(), models.regression()):
        assert "positively homogeneous" in places(problem).reason
    assert "two in a row" in places(models.softmax_regression()[0]).reason
    x, y = models.randn(9, 4), models.labels(9, 3)
    only = Problem(nn.Linear(4, 3).double(), {"train": (x, y)}, loss=lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    assert "loss only" in places(only).reason


def test_rescalings_are_found_by_trying():
    check_places()


def test_smooth_activations_are_refused():
    check_refusals()


@pytest.mark.parametrize("alpha", [1.0, 3.0, 0.5, -4.0, math.inf, math.nan])
def test_a_factor_that_would_round_is_refused(alpha):
    with pytest.raises(UsageError, match="power of two"):
        rescaled(checkpoint(trained(), analyzed=False), alpha=alpha)


def check_clipping():
    torch.manual_seed(0)
    x = 0.1 * models.randn(70, 4)
    x[65:] *= 100  # seen by the whole sample set only
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU6(), nn.Linear(6, 3)).double()
    problem = Problem(model, {"train": (x, models.labels(70, 3))}, criterion="cross_entropy")
    assert "not positively homogeneous" in places(problem).reason


def test_clipping_on_few_examples_is_seen():
    check_clipping()


def test_tied_weights_are_left_alone():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
            self.two.weight = self.one.weight
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.relu(self.two(F.relu(self.one(x)))))

    torch.manual_seed(0)
    data = (models.randn(20, 4), models.labels(20, 3))
    # ×4 and ÷4 of one tensor cancel, but the first bias is scaled alone: only the second pair keeps the function
    found = places(Problem(Tied().double(), {"train": data}, criterion="cross_entropy"))
    assert isinstance(found, Refused)


def test_the_guard_prints_what_was_claimed_and_leaves_the_model_alone():
    problem = trained()
    problem.model.train().zero_grad()
    before = copy.deepcopy(problem.model.state_dict())
    at = checkpoint(problem, start_of(problem))
    found = guard(at, MINE)
    assert isinstance(found.rescaling, Rescaling)
    assert found.rescaling.difference == 0  # a power of two rounds nothing
    for name, one in MINE.items():
        expected = "did not move" if "layer rescaling" in one.invariances else "moved"
        compared = found.measures[name]
        assert compared.verdict == ("refused" if name == "negative_mass" else expected), compared
    assert all(torch.equal(tensor, before[name]) for name, tensor in problem.model.state_dict().items())
    assert problem.model.training
    assert not any(module._forward_hooks for module in problem.model.modules())
    assert all(p.requires_grad and p.grad is None for p in problem.model.parameters())


def test_with_batchnorm_raw_curvature_moves_and_folded_norms_do_not():
    problem = residual(plain=True)
    at = checkpoint(problem)
    names = ("lambda_max", "trace", "log_spectral_product", "path_norm", "filter_normalised_trace", "weight_norm")
    found = guard(at, {name: MINE[name] for name in names})
    verdicts = {name: one.verdict for name, one in found.measures.items()}
    assert {name for name, word in verdicts.items() if word == "moved"} == {"lambda_max", "trace", "weight_norm"}


def test_without_a_place_there_is_a_reason_and_no_comparison():
    found = guard(checkpoint(trained(nn.Tanh), analyzed=False), MINE)
    assert isinstance(found.rescaling, Refused)
    assert found.measures == {}


def test_the_twin_is_measured_as_the_checkpoint_was():
    at = checkpoint(trained())
    settings = settings_of(at)
    for name in ("probes", "density_probes", "steps", "known_to", "confidence", "seed", "operator"):
        assert getattr(settings, name) == getattr(SETTINGS, name), name
    assert set(settings.quantities) == set(QUANTITIES)
    taken = {"trace": Reading(1.0, 1.0, 1.0, "exact")}
    seen: list[Checkpoint] = []

    def again(problem: Problem, old: Checkpoint) -> Checkpoint:
        seen.append(Checkpoint(problem, old.samples, Curvature(problem, old.samples)))
        return seen[0]

    compared = guard(at, {"trace": MINE["trace"]}, taken, again=again).measures["trace"]
    assert compared.before is taken["trace"]
    assert isinstance(compared.after, Refused)
    assert compared.verdict == "cannot tell"
    assert len(seen) == 1


def test_the_twin_sees_the_same_samples():
    at = checkpoint(trained(), analyzed=False)
    twin = remade(trained(), at)
    assert twin.samples.digest == at.samples.digest
    assert [len(b[0]) for b in twin.samples.batches] == [len(b[0]) for b in at.samples.batches]
    assert torch.equal(twin.theta, at.theta)
    assert twin.loss == pytest.approx(at.loss, rel=1e-12)


def test_a_twin_that_cannot_be_measured_is_a_reason():
    def fails(problem: Problem, old: Checkpoint) -> Checkpoint:
        raise NonFiniteError("overflow")

    found = guard(checkpoint(trained(), analyzed=False), MINE, again=fails)
    assert "could not be measured: overflow" in found.rescaling.reason
    assert not found.measures


def check_verdicts():
    def draws(value: float, half: float) -> Reading:
        return Reading(value, value - half, value + half, "draws")

    found = Reading(1.0, 1.0, math.inf, "search")
    cases = [
        (draws(1, 0), draws(1.0005, 0), "did not move"),
        (draws(1, 0), draws(1.01, 0), "moved"),
        (draws(1, 0.1), draws(1.08, 0.1), "did not move"),
        (draws(1, 0.5), draws(1.8, 0.5), "cannot tell"),
        (draws(1, 0.3), draws(1.8, 0.3), "moved"),
        (found, Reading(1.05, 1.05, math.inf, "search"), "did not move"),
        (found, Reading(4.0, 4.0, math.inf, "search"), "moved"),
        (Refused("not here"), Refused("not here"), "refused"),
        (Refused("not here"), found, "cannot tell"),
        (draws(0, 0), draws(0, 0), "did not move"),
    ]
    for before, after, expected in cases:
        assert verdict(before, after) == expected
        assert verdict(after, before) == expected


def test_verdicts_go_by_the_intervals():
    check_verdicts()


BROKEN = {
    "everything accepted": (rescaling, "ROUNDING", dict.fromkeys(rescaling.ROUNDING, math.inf), check_refusals),
    "statistics left behind": (rescaling, "_before_norm", lambda *_: lambda modules, alpha: None, check_places),
    "nothing tried": (rescaling, "_candidates", lambda _: iter(()), check_places),
    "BatchNorm overlooked": (rescaling, "norm_after", lambda _: {}, check_places),
    "a tenth is the same": (guarding, "SAME", 0.1, check_verdicts),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage, monkeypatch):
    room, name, broken, check = breakage
    monkeypatch.setattr(room, name, broken)
    with pytest.raises(AssertionError):
        check()


def test_a_wrong_claim_would_be_noticed(readings):
    for name, word in (("trace", "layer rescaling"), ("simplified_flatness", "neuron rescaling")):
        lie = replace(MINE[name], invariances=MINE[name].invariances | {word})
        assert not holds(lie, word, readings[""][name], readings[word][name])
    silent = replace(MINE["path_norm"], invariances=frozenset())
    assert not holds(
        silent, "layer rescaling", readings[""]["path_norm"], readings["layer rescaling"]["path_norm"]
    )
