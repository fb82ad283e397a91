"""Promise: processes that measure together have the numbers of one; nobody waits in vain. (30 s)"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import hessdiag
from hessdiag.analysis.spending import Spending
from hessdiag.engine.checks import planner, preflight
from hessdiag.engine.products import group as groups
from hessdiag.engine.products.batched import Batched
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.group import Group
from hessdiag.engine.products.shares import dealt
from hessdiag.engine.squares import gauss_newton
from hessdiag.problem import Problem
from hessdiag.spectral import inner
from hessdiag.spectral.krylov import Krylov
from tests import models
from tests.ranks import on_ranks

CLOCKS = {"date", "method_reason", "seconds_per_gradient", "seconds", "gradients", "ranks"}
CHANCE = "/second_opinion/worst_tensor"  # of tensors that are all right to rounding
SAME, SMALL = 1e-12, 1e-13  # relative, and of numbers of size 1: sums over batches in another order


def weighted(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    each = F.cross_entropy(outputs, batch[1], reduction="none")
    return (each * batch[2]).sum() / batch[2].sum()


def with_weights() -> Problem:
    found = models.mlp()
    x, y = found.data["train"]
    data = {"train": (x, y, 0.5 + torch.rand(40, generator=models.generator(4), dtype=torch.float64))}
    return Problem(found.model, data, criterion=weighted, weight=lambda batch: float(batch[2].sum()))


def loss_only() -> Problem:
    found = models.regression()
    return Problem(found.model, found.data, loss=lambda model, batch: F.mse_loss(model(batch[0]), batch[1]))


def language_model() -> Problem:
    return models.attention(vocabulary=9)  # 45 outputs an example: more than the exact trace takes


CASES = {
    "tanh, float32, a last batch of 4": (models.mlp, {"batch_size": 9, "dtype": "float32"}),
    "tokens with targets of -100": (language_model, {"batch_size": 3, "quantities": ("trace", "lambda_max")}),
    "signs and probes": (language_model, {"batch_size": 4, "probes": 6, "max_steps": 12}),
    "ggn": (models.mlp, {"batch_size": 7, "operator": "ggn"}),
    "a weighted criterion": (with_weights, {"batch_size": 6}),
    "one batch": (models.cnn, {"batch_size": 100, "max_steps": 20}),
    "a loss alone": (loss_only, {"batch_size": 5}),
    "a budget of products": (models.cnn, {"batch_size": 5, "budget": "25p"}),
}


FIRST = ("tanh, float32, a last batch of 4", "tokens with targets of -100", "ggn", "a weighted criterion")
IN_THREE = (*FIRST[:2], "one batch")


def measured(name: str, process_group: Any = None, **options: Any) -> dict[str, Any]:
    make, asked = CASES[name]
    return json.loads(hessdiag.analyze(make(), group=process_group, **asked, **options).to_json())


def differences(a: Any, b: Any, at: str = "") -> list[str]:
    """Where two runs differ, clocks aside."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = (a.keys() | b.keys()) - CLOCKS
        return [text for key in sorted(keys) for text in differences(a.get(key), b.get(key), f"{at}/{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [text for i, pair in enumerate(zip(a, b, strict=True)) for text in differences(*pair, f"{at}/{i}")]
    if isinstance(a, float) and isinstance(b, float):
        return [] if math.isclose(a, b, rel_tol=SAME, abs_tol=SMALL) else [f"{at}: {a!r}, {b!r}"]
    return [] if a == b or at == CHANCE else [f"{at}: {a!r}, {b!r}"]


def refused(call: Any) -> str:
    """The text of its refusal; empty where there is none."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def operator_of(name: str = "tanh, float32, a last batch of 4") -> Curvature:
    make, asked = CASES[name]
    return Curvature(make(), models.sample(make(), asked["batch_size"]), group=Group(dist.group.WORLD))


def with_other_weights(rank: int) -> str:
    problem = models.mlp()
    with torch.no_grad():
        next(problem.model.parameters()).add_(1e-9 * rank)
    return refused(lambda: hessdiag.analyze(problem, group=dist.group.WORLD))


def with_another_vector(rank: int) -> str:
    op = operator_of()
    rows = torch.ones(1, op.size, dtype=op.dtype)
    rows[0, 3] += 1e-6 * rank
    return refused(lambda: op.rows(rows))


def with_a_failure(rank: int) -> str:
    op = operator_of()

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("this image is broken")

    with patch.object(Batched, "fitting", broken if rank else Batched.fitting):
        return refused(op.gradient)


def with_another_method(rank: int) -> tuple[str, float]:
    """What ranks agree on where rank 1's trial would choose otherwise and its self-test found another floor."""
    own = planner.choose

    def choose(operator: Curvature, **options: Any) -> planner.Plan:
        found = own(operator, **options)
        return replace(found, method="forward_over_reverse") if rank else found

    with patch.object(preflight, "choose", choose):
        samples = models.sample(models.mlp(), 9)
        op = preflight.preflight(models.mlp(), samples, group=Group(dist.group.WORLD)).operator
    return op.method, op.floor


def out_of_memory_once(rank: int) -> tuple[int, torch.Tensor]:
    """The block of every rank after rank 1 had no room for eight vectors, and a product."""
    op, own, left = operator_of(), Curvature._form, [rank]

    def form(self: Curvature, piece: Any, rows: torch.Tensor) -> torch.Tensor:
        if left[0] and len(rows) > 4:
            raise torch.OutOfMemoryError("none left")
        return own(self, piece, rows)

    with patch.object(Curvature, "_form", form):
        product = op.rows(torch.eye(op.size, dtype=op.dtype)[:8])
    return op.block, product


def with_less_time(rank: int) -> str:
    """What is refused under a budget of seconds, of which rank 1 believes that all is gone."""
    with patch.object(Spending, "_spent", property(lambda _: 1e9 * rank)):
        return refused(lambda: hessdiag.analyze(models.cnn(), group=dist.group.WORLD, budget="9s", max_steps=20))


def alone_in_a_group(rank: int) -> float:
    """Somebody's training: one rank measures, and the others go on."""
    found = hessdiag.analyze(models.mlp(), "trace")["trace"].value if rank == 0 else 0.0
    dist.barrier()
    return found


def shared_by(_: int) -> list[dict[str, Any]]:
    """Vectors in two or three parts, float32: of a linear map, whose Hessian is known, and of a network."""
    return [shared(linear_map(), **EXACT), shared(network())]


def shared(problem: Problem, **options: Any) -> dict[str, Any]:
    found = hessdiag.analyze(problem, group=dist.group.WORLD, shard_vectors=True, **SHARED | options)
    return json.loads(found.to_json())


def linear_map() -> Problem:
    torch.manual_seed(0)
    x, y = models.randn(60, 19), models.randn(60, 301, seed=2)
    return Problem(torch.nn.Linear(19, 301), {"train": (x.float(), y.float())}, criterion="mse")


def network() -> Problem:
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(50, 110), torch.nn.Tanh(), torch.nn.Linear(110, 4))
    data = {"train": (models.randn(60, 50, seed=3).float(), models.labels(60, 4))}
    return Problem(model, data, criterion=lambda out, batch: F.cross_entropy(out, batch[1]))


SHARED = {"batch_size": 30, "steps": 20, "max_steps": 20, "probes": 4}
EXACT = {"steps": None, "quantities": ("lambda_max", "frobenius_squared")}


def shared_well(one: dict[str, Any], found: list[dict[str, Any]]) -> None:
    """What is known of the linear map; of the network what one process has."""
    known_well(found[0]["metrics"])
    as_one_process(one, found[1])


def known_well(metrics: dict[str, Any]) -> None:
    eigenvalues, square = torch.linalg.eigvalsh(linear_hessian()), metrics["frobenius_squared"]
    assert metrics["lambda_max"]["value"] == pytest.approx(float(eigenvalues[-1]), rel=1e-5)
    assert square["lo"] <= 301 * float(eigenvalues.square().sum()) <= square["hi"]


def as_one_process(one: dict[str, Any], found: dict[str, Any]) -> None:
    """Values and ends of intervals to rounding of float32, and the moments of the density; not its nodes."""
    for name, metric in one["metrics"].items():
        for key in ("value", "lo", "hi"):
            assert found["metrics"][name][key] == pytest.approx(metric[key], rel=1e-4, abs=1e-5), (name, key)
    for power in (1, 2):
        assert moment(found, power) == pytest.approx(moment(one, power), rel=1e-5)
    assert found["cost"]["products"] == one["cost"]["products"]


def linear_hessian() -> torch.Tensor:
    """The block that it has 301 times."""
    x = torch.cat([models.randn(60, 19), torch.ones(60, 1, dtype=torch.float64)], dim=1)
    return 2 * x.T @ x / (60 * 301)


def moment(run: dict[str, Any], power: int) -> float:
    found, spectrum = 0.0, run["spectrum"]
    for part in (*spectrum["probes"], spectrum["known"]):
        share = 1 if part is spectrum["known"] else len(spectrum["probes"])
        found += sum(w * n**power for n, w in zip(part["nodes"], part["weights"], strict=True)) / share
    return found


def tracked(rank: int) -> tuple[list[float], list[int], float]:
    """Values that a tracker of a training on both ranks has, where each counts running statistics of its own."""
    problem = models.cnn()
    model = torch.nn.parallel.DistributedDataParallel(problem.bare_model().train())
    loader = [tuple(part[rank::2] for part in problem.data["train"])]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = hessdiag.Tracker(
        problem, every=2, budget="50%" if rank else None, optimizer=optimizer, group=dist.group.WORLD
    )
    for step in range(3):
        optimizer.zero_grad()
        F.cross_entropy(model(loader[0][0]), loader[0][1]).backward()
        optimizer.step()
        tracker.step(step)
    return tracker.history["value"].tolist(), tracker.history["step"].tolist(), again(rank, problem)


def again(rank: int, problem: Problem) -> float:
    """Rank 0's last model, measured by it alone."""
    if rank:
        return 0.0
    return hessdiag.analyze(problem, "trace", effort="quick")["trace"].value


MECHANICS = {
    "tracker": tracked,
    "weights": with_other_weights,
    "vector": with_another_vector,
    "failure": with_a_failure,
    "method": with_another_method,
    "block": out_of_memory_once,
    "time": with_less_time,
    "shared": shared_by,
}
PARTS = {"linear": 0, "network": 1}  # of what is shared


def local(self: Group, work: Any, vectors: Any = None) -> Any:
    return work()


def repeated(self: Group, rows: torch.Tensor, size: int) -> torch.Tensor:
    return rows.repeat(1, self.size)[:, :size].contiguous()


def all_but_forms(self: Group, work: Any, vectors: Any = None) -> Any:
    parts = work()
    own = Group.total_as_it_is(self, lambda: parts[:1], vectors)  # type: ignore[attr-defined]
    return (*own, *parts[1:])


BREAKAGES: dict[str, tuple[list[tuple[Any, str, Any]], str]] = {
    "the gradient is not summed": (
        [(Curvature, "gradient", lambda self: self._gradients()[0] / self.total_weight)],
        "ggn",
    ),
    "products are not summed": ([(Group, "total", local)], "ggn"),
    "forms are not summed": ([(Group, "total", all_but_forms)], "a weighted criterion"),
    "every rank takes every batch": ([(Group, "deal", lambda self, sizes: tuple(range(len(sizes))))], "ggn"),
    "a batch is nobody's": (
        [(Group, "deal", lambda self, sizes: tuple(range(len(sizes)))[self.rank : -1 : self.size])],
        "ggn",
    ),
    "others' signs are drawn again": (
        [(gauss_newton, "pass_over", lambda *_: None)],
        "tokens with targets of -100",
    ),
    "weights are not compared": ([(preflight, "require_alike", lambda _: None)], "weights"),
    "vectors are not compared": ([(groups, "_bits", lambda _: 0)], "vector"),
    "each rank chooses its own method": ([(Group, "first", lambda _, work: work())], "method"),
    "each rank keeps its own block": ([(Group, "smallest", lambda _, value: value)], "block"),
    "lengths are of parts": ([(inner, "_lengths", lambda own: own)], "linear"),
    "inner products are of parts": ([(inner, "_over_all", lambda total: total)], "linear"),
    "ranks draw the same part": ([(Group, "whole", repeated)], "linear"),
    "a density counts a part's dimensions": (
        [(Krylov, "dimension", property(lambda k: k.basis.shape[1]))],
        "network",
    ),
    "each rank has its own clock": ([(Group, "number", lambda _, value: value)], "time"),
}


def outcome(rank: int, what: str) -> Any:
    try:
        if what in PARTS:
            return shared(linear_map(), **EXACT) if what == "linear" else shared(network())
        return MECHANICS[what](rank) if what in MECHANICS else measured(what, dist.group.WORLD)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def in_two(rank: int, cases: tuple[str, ...]) -> dict[str, Any]:
    found = {what: outcome(rank, what) for what in (*cases, *MECHANICS)}
    found["alone"] = alone_in_a_group(rank)
    for name, (damages, what) in BREAKAGES.items():
        dist.barrier()
        Group.total_as_it_is = Group.total  # type: ignore[attr-defined]
        with patch.multiple(damages[0][0], **{attribute: new for _, attribute, new in damages}):
            found[name] = outcome(rank, what)
    return found


def in_three(rank: int, cases: tuple[str, ...]) -> dict[str, Any]:
    return {what: outcome(rank, what) for what in (*cases, "shared")}


def cases(always: tuple[str, ...], whole: Any) -> Any:
    """Those of a table, of which some are left out unless all are asked for."""
    more = pytest.mark.thorough
    return [pytest.param(name, marks=() if name in always else more, id=name) for name in whole]


@pytest.fixture(scope="module")
def asked(request) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Cases of two and of three ranks."""
    return (tuple(CASES), tuple(CASES)) if request.config.getoption("thorough") else (FIRST, IN_THREE)


@pytest.fixture(scope="module")
def one(asked) -> dict[str, Any]:
    found = {name: measured(name) for name in {*asked[0], *asked[1]}}
    return found | {"shared": json.loads(hessdiag.analyze(network(), **SHARED).to_json())}


@pytest.fixture(scope="module")
def two(asked) -> list[dict[str, Any]]:
    return on_ranks(2, in_two, asked[0])


@pytest.fixture(scope="module")
def three(asked) -> list[dict[str, Any]]:
    return on_ranks(3, in_three, asked[1])


@pytest.mark.parametrize("name", cases(FIRST, CASES))
def test_two_ranks_have_the_numbers_of_one_process(name, one, two):
    assert [differences(one[name], found[name]) for found in two] == [[], []]


@pytest.mark.parametrize("name", cases(IN_THREE, CASES))
def test_three_ranks_have_the_numbers_of_one_process(name, one, three):
    assert [differences(one[name], found[name]) for found in three] == [[], [], []]


def test_they_are_those_of_the_dense_matrix(three):
    H = models.dense_hessian(models.mlp())
    found = three[1]["tanh, float32, a last batch of 4"]["metrics"]
    assert found["trace"]["value"] == pytest.approx(float(H.trace()), rel=1e-5)
    assert found["lambda_max"]["value"] == pytest.approx(float(torch.linalg.eigvalsh(H)[-1]), rel=1e-4)


def holds(what: str, found: list[dict[str, Any]], one: dict[str, Any], name: str | None = None) -> None:
    first, second = (ranks[name or what] for ranks in found)
    if what in CASES:
        assert differences(one[what], first) == differences(one[what], second) == []
    elif what == "weights":
        assert first == second
        assert "rank 1 has other weights than rank 0" in first
    elif what == "vector":
        assert first == second
        assert "rank 1 does not compute what rank 0 does" in first
    elif what == "failure":
        assert first == second == "ZeroDivisionError: this image is broken"
    elif what == "method":
        assert first == second
        assert first[0] != "forward_over_reverse"
    elif what == "shared":
        assert isinstance(first, list)
        assert differences(first, second) == []
        shared_well(one["shared"], first)
    elif what == "linear":
        assert isinstance(first, dict)
        known_well(first["metrics"])
    elif what == "network":
        assert isinstance(first, dict)
        as_one_process(one["shared"], first)
    elif what == "tracker":
        assert first[:2] == second[:2]
        assert first[1] == [0, 0, 2, 2]
        assert first[0][3] == pytest.approx(first[2], rel=1e-10)
    elif what == "block":
        assert first[0] == second[0] == 4
        assert torch.equal(first[1], second[1])
    else:
        assert first == second == ""


@pytest.mark.parametrize("what", MECHANICS)
def test_ranks_agree_or_are_refused(what, two, one):
    holds(what, two, one)


def test_three_ranks_share_vectors(three, one):
    assert differences(three[0]["shared"], three[2]["shared"]) == []
    shared_well(one["shared"], three[0]["shared"])


SHARING_REFUSED = {
    "one process": ({}, "`shard_vectors` shares vectors between ranks"),
    "no group": ({"group": "world"}, "`group`: str: allowed: a process group"),
}


@pytest.mark.parametrize("name", SHARING_REFUSED)
def test_what_is_no_group_is_refused(name):
    options, text = SHARING_REFUSED[name]
    with pytest.raises(hessdiag.HessdiagError, match=text):
        hessdiag.analyze(models.mlp(), shard_vectors=True, **options)


def test_one_rank_may_measure_alone(two):
    assert two[0]["alone"] == hessdiag.analyze(models.mlp(), "trace")["trace"].value


@pytest.mark.parametrize("name", BREAKAGES)
def test_breakages_are_noticed(name, two, one):
    with pytest.raises(AssertionError):
        holds(BREAKAGES[name][1], two, one, name)


def test_the_longest_batches_are_dealt_first():
    assert dealt([1, 9, 1, 1, 5, 4], 3) == [(1,), (2, 4), (0, 3, 5)]
    assert dealt([1], 3) == [(0,), (), ()]
