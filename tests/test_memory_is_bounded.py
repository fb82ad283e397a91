"""Promise: long vectors are held once, bases keep their limit, and what that rounds is in the intervals. (10 s)

Rows in half precision are checked against dense matrices: the recurrence they obey, the ends, and how often an
interval holds the truth. Windows and tensor-by-tensor sums are those of long models, made to work on short ones.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import hessdiag
from hessdiag.analysis import room
from hessdiag.analysis.room import Free, block, storage
from hessdiag.engine.checks import differences, preflight, rounding, selftest
from hessdiag.engine.products import curvature, windows
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.gradients import each_gradient, gradients
from hessdiag.errors import MeasurementError
from hessdiag.problem import Problem
from hessdiag.settings import Settings
from hessdiag.spectral import basis as held
from hessdiag.spectral import extremes, forms, frobenius_squared_from, lanczos, trace_from
from hessdiag.spectral.basis import Rows, Storage
from tests import models

GIB = 2**30
QUICK = Settings(quantities=("lambda_max", "frobenius_squared"), effort="quick")
HALF, HOST = Storage(half=True), Storage(on_host=True)


def matrix(kind: str, d: int = 400) -> torch.Tensor:
    """Symmetric, float32, with a known spectrum that is not aligned with the axes."""
    draw = torch.Generator().manual_seed(3)
    bulk = 0.05 * torch.randn(d - 8, generator=draw, dtype=torch.float64)
    ends = {"outliers": torch.linspace(1, 9, 8), "one": torch.tensor([5.0] + 7 * [0.1]), "flat": torch.zeros(8)}
    values = torch.cat([bulk, ends[kind].double()])
    q = torch.linalg.qr(torch.randn(d, d, generator=draw, dtype=torch.float64)).Q
    return ((q * values) @ q.T).float()


MATRICES = {kind: matrix(kind) for kind in ("outliers", "one", "flat")}


def missed(A: torch.Tensor, run) -> float:
    """‖H Q − Q T − β q eₖᵀ‖ in float64."""
    H, Q = A.double(), run.basis.double()
    left = H @ Q.T - Q.T @ torch.from_numpy(run.T)
    left[:, -1] -= run.beta * run.next.double()
    return float(torch.linalg.norm(left))


def recurrence_holds(kept: Storage, max_basis: int | None) -> bool:
    """By what is said of it, and no more than twice as loosely as the whole of a rounding to 16 bits."""
    good = []
    for A in MATRICES.values():
        run = lanczos(A, steps=30, max_basis=max_basis, storage=kept)
        floor = 1e-5 * run.scale
        allowed = 2 * held.HALF_ERROR * run.scale * np.sqrt(30) * (1 if max_basis is None else 4)
        good.append(missed(A, run) <= run.lost + floor and run.lost <= allowed)
    return all(good)


@pytest.mark.parametrize("max_basis", [None, 12], ids=["whole", "restarted"])
@pytest.mark.parametrize("kept", [HALF, HOST, Storage(half=True, on_host=True)], ids=["half", "host", "both"])
def test_the_recurrence_holds_as_said(kept, max_basis):
    assert recurrence_holds(kept, max_basis)


def covered(kept: Storage, max_basis: int | None, seeds: int = 12) -> float:
    """Share of the two ends' intervals that hold the truth."""
    inside = []
    for A in MATRICES.values():
        values = torch.linalg.eigvalsh(A.double())
        for seed in range(seeds):
            found = extremes(A, seed=seed, rtol=1e-2, max_basis=max_basis, storage=kept)
            inside += [found.lambda_max.lo <= values[-1] <= found.lambda_max.hi]
            inside += [found.lambda_min.lo <= values[0] <= found.lambda_min.hi]
    return sum(map(bool, inside)) / len(inside)


@pytest.mark.parametrize("max_basis", [None, 10], ids=["whole", "restarted"])
def test_intervals_hold_the_truth(max_basis):
    assert covered(HALF, max_basis) == 1.0


def test_values_come_from_fresh_products():
    for A in MATRICES.values():
        found, true = extremes(A, storage=HALF), float(torch.linalg.eigvalsh(A.double())[-1])
        assert found.lambda_max.value == pytest.approx(true, rel=1e-4)
        assert found.lambda_max.hi - found.lambda_max.lo <= 1e-2 * true


def test_probes_are_deflated_as_well():
    A = MATRICES["outliers"]
    plain, half = (
        forms(hessdiag.operator.as_operator(A), lanczos(A, steps=20, storage=s), 30, 0) for s in (None, HALF)
    )
    assert trace_from(half).value == pytest.approx(trace_from(plain).value, abs=1e-3 * 9)
    assert frobenius_squared_from(half).value == pytest.approx(frobenius_squared_from(plain).value, rel=1e-4)


def test_rows_are_held_to_half_precision():
    vector = torch.nn.functional.normalize(torch.randn(100_003, generator=torch.Generator().manual_seed(0)), dim=0)
    rows = HALF.rows(3, len(vector), torch.float32, torch.device("cpu"))
    rows.put(1, vector.clone(), 1.0)
    assert rows.error == pytest.approx(float((rows[1] - vector).norm()), rel=0.05)
    assert 1e-4 < rows.error < held.HALF_ERROR
    assert float(rows[1].double().norm()) == pytest.approx(1, abs=1e-6)


LIMITS = [
    (10**5, 20 * GIB, Settings(), Storage()),
    (10**7, 200 * GIB, Settings(), Storage()),
    (5 * 10**7, 64 * GIB, Settings(), "whole"),
    (2 * 10**7, 24 * GIB, QUICK, "half"),
    (124 * 10**6, 20 * GIB, QUICK, "restarted half"),
    (10**8, 90 * GIB, Settings(), "half"),
    (10**8, 40 * GIB, Settings(), "restarted"),
]


@pytest.mark.parametrize(("size", "free", "settings", "wanted"), LIMITS)
def test_a_basis_keeps_its_limit(size, free, settings, wanted):
    kept = storage(size, 4, settings, Free(free))
    if isinstance(wanted, Storage):
        assert kept == wanted
        return
    assert kept.half == ("half" in wanted)
    room = Free(free).basis(rough=settings is QUICK)[False]
    assert (kept.vectors + 1) * size * (2 if kept.half else 4) <= room <= free // 2
    assert f"holds {kept.vectors} vectors at a time" in kept.reason
    assert ("half precision" in kept.reason) == kept.half


def test_beside_an_accelerator_the_host_holds_it():
    kept = storage(10**9, 4, Settings(), Free(20 * GIB, host=4000 * GIB))
    assert kept.on_host and "in the host's memory" in kept.reason
    assert not storage(10**7, 4, Settings(), Free(70 * GIB, host=100 * GIB)).on_host


def test_what_does_not_fit_is_refused():
    with pytest.raises(
        MeasurementError, match=r"smallest Lanczos basis of 1,000,000,000 .* are free: choose `params`"
    ):
        storage(10**9, 4, Settings(), Free(8 * GIB))


def test_blocks_shrink_with_size():
    small, large = (block(size, 4, 8, Free(20 * GIB), kept=False) for size in (10**6, 3 * 10**7))
    assert small == 8 and 1 <= large < 8
    assert block(10**9, 4, 8, Free(20 * GIB), kept=False) == 1
    assert block(10**6, 4, 3, Free(20 * GIB), kept=True) == 3


def long_models(monkeypatch) -> None:
    for module in (windows, differences, rounding):
        monkeypatch.setattr(module, "WINDOW", 37)
    monkeypatch.setattr(curvature, "LONG", 1)


def network() -> Problem:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 5))
    data = (models.randn(24, 6).float(), models.labels(24, 5))
    return Problem(model, {"train": data}, criterion="cross_entropy")


def looked_at(problem: Problem):
    checked = preflight.preflight(problem, models.sample(problem, 8), method="retained_graph")
    op = checked.operator
    row = models.randn(op.size, 1, seed=5).T.float().contiguous()
    with op.recorded() as record:
        product = op.rows(row)
    return checked, product, op.gradient(), torch.stack(record.batches), torch.stack(record.tensors)


def same_when_long(monkeypatch) -> bool:
    problem = network()
    before = [p.detach().clone() for p in problem.model.parameters()]
    short = looked_at(problem)
    long_models(monkeypatch)
    long = looked_at(problem)
    numbers = [("repeatability", 1e-9), ("symmetry", 1e-7), ("finite_difference", 1e-6), ("gradient_error", 1e-6)]
    tests = [one[0].self_test for one in (short, long)]
    return (
        torch.equal(short[1], long[1])
        and torch.equal(short[2], long[2])
        and all(torch.allclose(a, b, rtol=1e-5, atol=1e-9) for a, b in zip(short[3:], long[3:], strict=True))
        and all(abs(getattr(tests[0], name) - getattr(tests[1], name)) <= off for name, off in numbers)
        and all(torch.equal(a, b) for a, b in zip(before, problem.model.parameters(), strict=True))
        and 0.5 < short[0].operator.floor / long[0].operator.floor < 2
    )


def test_long_vectors_give_the_same_numbers(monkeypatch):
    assert same_when_long(monkeypatch)


def test_gradients_arrive_one_by_one():
    a, b, unused = (torch.randn(3, requires_grad=True) for _ in range(3))
    expected = gradients(((a + b) * a).sum(), (a, b, unused))
    seen = {}
    each_gradient(((a + b) * a).sum(), (a, b, unused), lambda index, grad: seen.update({index: grad}))
    assert all(torch.equal(seen[index], expected[index]) for index in range(3))
    assert a.grad is b.grad is unused.grad is None
    seen.clear()
    each_gradient(((a + b) * a).sum(), (a, b, unused), lambda index, grad: seen.update({index: grad}), [1])
    assert list(seen) == [1]


def test_sums_over_batches_retreat(monkeypatch):
    problem = network()
    op = Curvature(problem, models.sample(problem, 8))
    rows = models.randn(op.size, 4).T.float().contiguous()
    expected, zeros = op.rows(rows), torch.zeros

    def small(*shape, **options):
        if shape and tuple(shape[0] if isinstance(shape[0], tuple | torch.Size) else ())[:1] > (1,):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        return zeros(*shape, **options)

    op.graphs.release()
    monkeypatch.setattr(curvature.torch, "zeros", small)
    assert torch.equal(op.rows(rows), expected)
    assert op.block == 1
    monkeypatch.setattr(curvature.torch, "zeros", lambda *a, **k: small((2,)))
    with pytest.raises(MeasurementError, match="out of memory with one vector beside"):
        op.gradient()


def test_what_is_not_free_is_refused(monkeypatch):
    monkeypatch.setattr(selftest, "LARGE", 1)
    monkeypatch.setattr(selftest, "give_back", lambda: None)
    monkeypatch.setattr(selftest, "free_bytes", lambda _: 1000)
    problem = network()
    with pytest.raises(MeasurementError, match="out of memory: the self-test of 197 parameters"):
        preflight.preflight(problem, models.sample(problem, 8))


def test_a_choice_is_in_the_result(monkeypatch):
    monkeypatch.setattr(room, "SMALL", 0)
    problem = network()
    quick = hessdiag.analyze(
        problem, ["lambda_max", "frobenius_squared"], samples=24, batch_size=8, effort="quick", top=1
    )
    assert any("in half precision" in note and "were free" in note for note in quick.notes)


def no_error(patch):
    patch.setattr(Rows, "error", property(lambda _: 0.0))


def one_scale(patch):
    put = Rows.put

    def unscaled(self, index, vector, length, **options):
        put(self, index, vector, length, **options)
        self._scales[index] = self._unit * 1.01

    patch.setattr(Rows, "put", unscaled)


def not_put_back(patch):
    def moved(function, direction, step, *, in_place):
        from contextlib import nullcontext

        if in_place:
            for tensor, move in zip(function.theta, function.split(direction), strict=True):
                tensor.detach().add_(move, alpha=step)
            return nullcontext(function.theta)
        return nullcontext(function.shifted(direction, step))

    patch.setattr(differences, "shifted", moved)


def a_window_is_lost(patch):
    def first_only(total, part):
        size = windows.WINDOW
        total.reshape(-1)[:size] += part.reshape(-1)[:size]

    patch.setattr(curvature, "add", first_only)


BROKEN = {
    "rounding of rows is left out": lambda patch: no_error(patch) or recurrence_holds(HALF, None),
    "rows are not of unit length": lambda patch: one_scale(patch) or recurrence_holds(HALF, None),
    "parameters stay moved": lambda patch: not_put_back(patch) or same_when_long(patch),
    "a window is lost": lambda patch: a_window_is_lost(patch) or same_when_long(patch),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage, monkeypatch):
    assert not breakage(monkeypatch)
