"""Promise: the same samples give the same product and the same hash, however they are divided into batches."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from hessdiag.analysis import Measurement
from hessdiag.engine.checks.preflight import preflight, require_sound
from hessdiag.engine.products.curvature import Curvature
from hessdiag.errors import MeasurementError
from hessdiag.gap.checkpoint import Checkpoint
from hessdiag.gap.examine import CURVATURE
from hessdiag.gap.measures import groups
from hessdiag.gap.registry import Reading, built_in
from hessdiag.problem import Problem
from hessdiag.samples import draw
from hessdiag.settings import Settings
from tests import models

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def product(problem, batch_size, dtype, micro=None):
    op = Curvature(problem, models.sample(problem, batch_size), dtype=dtype)
    op.micro_batch = micro
    return op @ models.randn(op.size, seed=3)


def difference(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("size", [1, 8, 124])
@pytest.mark.parametrize("make", [models.mlp, models.attention, models.regression])
def test_any_division_gives_the_same_product(make, size, dtype):
    problem = make()
    whole = product(problem, 10_000, dtype)
    assert difference(product(problem, size, dtype), whole) < TOLERANCE[dtype]
    assert difference(product(problem, 10_000, dtype, micro=size), whole) < TOLERANCE[dtype]


@pytest.mark.parametrize("cuts", [(124, 4), (8, 2), (1, 127)])
def test_ragged_batches_of_a_loader_count_by_their_examples(cuts):
    n = sum(cuts)
    x, y = models.randn(n, 5), models.labels(n, 3)
    torch.manual_seed(0)
    model = nn.Linear(5, 3).double()
    batches = list(zip(torch.split(x, cuts), torch.split(y, cuts), strict=True))
    ragged = Problem(model, {"train": batches}, criterion="cross_entropy")
    whole = Problem(model, {"train": (x, y)}, criterion="cross_entropy")
    a, b = (Curvature(p, draw(p.data["train"], samples=n, batch_size=s)) for p, s in ((ragged, None), (whole, n)))
    v = models.randn(a.size, seed=4)
    assert difference(a @ v, b @ v) < TOLERANCE[torch.float64]
    assert a.samples.digest == b.samples.digest


def test_the_hash_names_the_content_not_the_batches():
    x, y = models.randn(50, 2), models.labels(50, 2)
    digests = {draw((x, y), samples=30, batch_size=size).digest for size in (None, 1, 7, 30)}
    assert len(digests) == 1
    assert draw((x, y), samples=30, seed=1).digest not in digests
    x[:, 0] += 1e-9
    assert draw((x, y), samples=30).digest not in digests


def test_a_loader_is_never_reshuffled_and_a_smaller_draw_is_part_of_a_larger():
    data = TensorDataset(torch.arange(100.0)[:, None], torch.zeros(100, dtype=torch.long))
    loader = DataLoader(data, batch_size=9, shuffle=True)
    first, second = (draw(loader, samples=20, seed=5) for _ in range(2))
    assert first.digest == second.digest
    small = torch.cat([batch[0] for batch in draw(loader, samples=10, seed=5).batches])
    assert set(small.flatten().tolist()) <= set(torch.cat([b[0] for b in first.batches]).flatten().tolist())


def test_a_stream_is_taken_from_its_beginning_and_cut():
    class Stream(IterableDataset):
        def __iter__(self):
            return ((torch.full((3,), float(i)), i % 2) for i in range(1000))

    drawn = draw(DataLoader(Stream(), batch_size=8), samples=20)
    assert [len(batch[1]) for batch in drawn.batches] == [8, 8, 4]


def test_a_dict_and_a_custom_loss_are_weighted_too():
    """Token-averaged custom loss: right with its weight, refused without."""
    problem = models.attention()
    tokens, targets = problem.data["train"]
    rows = [{"tokens": t, "labels": y} for t, y in zip(tokens, targets, strict=True)]

    class Rows(torch.utils.data.Dataset):
        def __len__(self):
            return len(rows)

        def __getitem__(self, index):
            return rows[index]

    def loss(model, batch):
        return F.cross_entropy(model(batch["tokens"]).flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)

    def weight(batch):
        return float((batch["labels"] != -100).sum())

    weighted = Problem(problem.model, {"train": Rows()}, loss=loss, weight=weight)
    H = models.dense_hessian(problem)
    v = models.randn(len(H), seed=4)
    assert difference(Curvature(weighted, models.sample(weighted, 4)) @ v, H @ v) < TOLERANCE[torch.float64]
    bare = Problem(problem.model, {"train": Rows()}, loss=loss)
    assert difference(Curvature(bare, models.sample(bare, 4)) @ v, H @ v) > 1e-3
    with pytest.raises(MeasurementError, match="weight=f"):
        require_sound(preflight(bare, models.sample(bare, 4)))


def measures_apart(sizes: tuple[int, ...] = (7, 16, 60)) -> list[str]:
    """The measures of `hessdiag gap` that move by more than rounding when the same samples are batched anew."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    start = {name: p.detach() / 2 for name, p in model.named_parameters()}
    data = (models.randn(60, 4), models.labels(60, 3))
    found = []
    for size in sizes:
        problem = Problem(model, {"train": data}, criterion="cross_entropy", meta={"lr": 0.1, "batch_size": 20})
        measurement = Measurement(problem, Settings(quantities=CURVATURE, batch_size=size, dtype="float64"))
        analysis, op = measurement.run(), measurement.operator
        point = Checkpoint(op.problem, measurement.samples, op, analysis=analysis, start=start)
        found.append({name: one(point) for name, one in built_in().items()})
    known = {name: one for name, one in found[0].items() if isinstance(one, Reading)}
    assert len(known) > 45
    others = [(name, other[name].value, one.value) for name, one in known.items() for other in found[1:]]
    return sorted({name for name, value, first in others if value != pytest.approx(first, rel=1e-6)})


def test_no_measure_follows_the_batch_size(monkeypatch):
    monkeypatch.setattr(groups, "GROUP", 16)
    assert measures_apart() == []


def test_m_of_the_batches_would_be_noticed(monkeypatch):
    monkeypatch.setattr(groups, "_cut", lambda batches: (list(batches), list(range(len(batches)))))
    assert "worst_sharpness" in measures_apart((7, 60))


BROKEN = {
    "every batch counts alike": lambda op: op.weights.fill_(1.0),
    "rows are counted instead of tokens": lambda op: op.weights.copy_(torch.full((len(op.weights),), 4.0)),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage):
    """Σ_b w_b H_b v / Σ_b w_b with wrong weights, rebuilt from the recorded forms, is not v·Hv."""
    problem = models.attention()
    op = Curvature(problem, models.sample(problem, 4))
    v = models.randn(op.size, seed=4)
    with op.recorded() as record:
        right = float(v @ (op @ v))

    def weighted():
        return float((record.batches[0] * op.weights).sum() / op.weights.sum())

    assert abs(weighted() - right) < 1e-12 * abs(right)
    breakage(op)
    assert abs(weighted() - right) > 1e-4 * abs(right)
