"""Promise: kaur2022 trains networks side by side, and each comes out as if trained alone by torch's own parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.papers import kaur2022_training
from benchmarks.papers.kaur2022_measuring import batch_statistics, measured
from benchmarks.papers.kaur2022_training import Cell, Fleet, network, trained
from hessdiag.regularizers import SAM

WIDTH, BATCH, EPOCHS = 6, 8, 3
CELLS = {
    "SGD": (Cell(BATCH, 0.2), Cell(BATCH, 0.05)),
    "SAM": (Cell(BATCH, 0.2, rho=0.1), Cell(BATCH, 0.05, rho=0.3)),
    "BatchNorm": (Cell(BATCH, 0.2, norm=True), Cell(BATCH, 0.05, norm=True)),
}
TOLERANCE = 2e-5  # float32 in another order of summation, over 15 steps


def data(seed: int = 0):
    generator = torch.Generator().manual_seed(5 + seed)
    return torch.randn(36, 64, generator=generator), torch.randint(10, (36,), generator=generator)


def alone(cell: Cell, seed: int) -> nn.Module:
    x, y = data(seed)
    torch.manual_seed(seed)
    model = network(WIDTH, cell.norm).train()
    sgd = torch.optim.SGD(model.parameters(), lr=cell.lr)
    optimizer = SAM(sgd, rho=cell.rho) if cell.rho else sgd
    order = torch.Generator().manual_seed(seed)
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(y), generator=order).split(cell.batch):

            def closure(chosen=chosen):
                loss = F.cross_entropy(model(x[chosen]), y[chosen])
                if not cell.rho:
                    sgd.zero_grad()
                    loss.backward()
                return loss

            optimizer.step(closure)
    return model.eval()


def difference(cells: tuple[Cell, ...]) -> float:
    """Largest of any weight and running statistic, over cells and seeds."""
    runs = list(trained(cells, range(2), data, width=WIDTH, epochs=EPOCHS, level=2.0))
    assert len(runs) == 2 * len(cells)
    worst = 0.0
    for run in runs:
        state = alone(run.cell, run.seed).state_dict()
        for name, value in run.model.state_dict().items():
            if value.is_floating_point():
                worst = max(worst, float((value - state[name]).abs().max()))
    return worst


@pytest.mark.parametrize("cells", CELLS.values(), ids=CELLS)
def test_each_run_is_the_one_torch_gives(cells):
    assert difference(cells) < TOLERANCE


def test_a_run_stops_at_its_own_epoch_and_changes_no_other():
    """A network that has left the stack was at the level, and those that stay train on as before."""
    cells = CELLS["SGD"]
    early = {(r.cell, r.seed): r for r in trained(cells, range(3), data, width=WIDTH, epochs=40, level=0.6)}
    assert len({run.epochs for run in early.values()}) > 1
    for (cell, seed), run in early.items():
        (single,) = trained([cell], [seed], data, width=WIDTH, epochs=40, level=0.6)
        assert (single.epochs, single.reached) == (run.epochs, run.reached)
        for mine, other in zip(run.model.parameters(), single.model.parameters(), strict=True):
            assert (mine - other).abs().max() < 10 * TOLERANCE


def test_a_diverged_run_is_told_and_leaves_the_others_alone():
    """It ends at once, not at the level, without a sharpness, and the run beside it is the one torch gives."""
    calm, wild = Cell(BATCH, 0.2), Cell(BATCH, 1e6)
    runs = {r.cell: r for r in trained([calm, wild], [0], data, width=WIDTH, epochs=EPOCHS * 20, level=2.0)}
    assert not runs[wild].reached
    assert runs[wild].epochs < runs[calm].epochs == EPOCHS * 20
    row = measured(runs[wild], data(), data(), points=2, rtol=0.5)
    assert row["lambda_max"] != row["lambda_max"]
    assert all(value.isfinite().all() for value in runs[calm].model.parameters())


def test_batch_statistics_are_those_of_train_mode():
    """One chunk is a batch in train mode; several are several batches."""
    x, _ = data()
    (run, *_) = trained(CELLS["BatchNorm"], [0], data, width=WIDTH, epochs=1, level=2.0)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    whole, parts = (batch_statistics(run.model, (x,), chunk=chunk) for chunk in (36, 12))
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name])
    model = run.model.train()
    assert (whole - model(x)).abs().max() < TOLERANCE
    assert (parts - torch.cat([model(part) for part in x.split(12)])).abs().max() < TOLERANCE


def test_dropout_leaves_the_mean_and_only_training_sees_it():
    """A hidden unit is scaled by 1 / (1 - p) where it is kept: over many draws the first layer's mean stays."""
    fleet = Fleet([(Cell(BATCH, 0.1, dropout=0.5), 0)], WIDTH)
    fleet.template = nn.Sequential(*list(fleet.template)[:2])
    x = data()[0].expand(1, -1, -1)
    torch.manual_seed(0)
    drawn = torch.stack([fleet.outputs(x, training=True) for _ in range(2000)])
    calm = fleet.outputs(x, training=False)
    error = calm / 2000**0.5  # a unit is 0 or twice its value: its standard deviation is its value
    assert ((drawn.mean(0) - calm).abs() <= 5 * error + 1e-6).all()
    assert torch.equal(calm, fleet.outputs(x, training=False))


BROKEN = {
    "another momentum of running statistics": ("BatchNorm", kaur2022_training, "MOMENTUM", lambda _: 0.2),
    "one rate for all": ("SGD", kaur2022_training, "_along", lambda true: lambda f, g: true(f.mean() + 0 * f, g)),
    "SAM climbs and descends the same way": (
        "SAM",
        Fleet,
        "_add",
        lambda true: lambda s, d, f: true(s, d, abs(f)),
    ),
}


@pytest.mark.parametrize(("cells", "where", "name", "breakage"), BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(monkeypatch, cells, where, name, breakage):
    monkeypatch.setattr(where, name, breakage(getattr(where, name)))
    assert difference(CELLS[cells]) > 10 * TOLERANCE
