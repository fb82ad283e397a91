"""Promise: the host waits for a device once a Lanczos step, never per example; vectors stay where they are.

A wait is a number read, a copy in either direction or an operation that asks for a size; what CUDA would wait for
inside of its kernels is not seen. A budget that is exceeded names the lines.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hessdiag
from hessdiag import Problem
from hessdiag.analysis.measurement import Measurement
from hessdiag.engine.landscape.landscape import Landscape
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.squares.gauss_newton import gauss_newton_trace
from hessdiag.settings import Settings
from hessdiag.spectral.deflation import forms
from hessdiag.spectral.lanczos import Lanczos
from hessdiag.spectral.lockstep import lanczos_block
from hessdiag.spectral.probes import rademacher, sphere
from tests import models
from tests.device import pretend
from tests.device.cases import THERE, examined
from tests.device.test_numbers import blocks

STEPS, PROBES = 6, 8
MODELS = {"stacked_graph": models.mlp, "retained_graph": models.attention}


def waits(seen: pretend.Seen) -> int:
    return seen.times(*pretend.WAITS)


def said(seen: pretend.Seen) -> str:
    return "\n".join(f"{times} {' '.join(place)}" for place, times in seen.places(depth=3).most_common(12))


def operator(method: str) -> Curvature:
    return Measurement(MODELS[method](), Settings(device=THERE, method=method, batch_size=4, block=4)).operator


@pytest.fixture(scope="module", params=MODELS)
def op(request) -> Curvature:
    return operator(request.param)


def test_a_product_waits_for_nothing(op):
    rows = torch.stack([sphere(op, 0, "test", i) for i in range(3)])
    op.multiplied(rows)
    with op.recorded() as record:
        with pretend.counting() as seen:
            op.multiplied(rows)
        assert waits(seen) == 0, said(seen)
        assert len(record.batches) == 3


@pytest.mark.parametrize(
    ("method", "make", "kind", "most"),
    [
        ("double_backward", models.mlp, "hessian", 0),
        ("forward_over_reverse", models.mlp, "hessian", 0),
        ("forward_over_reverse", models.attention, "ggn", 0),
        ("layer_streamed", blocks, "hessian", 1),  # a batch: whether the blocks repeat; it is for large ones
    ],
)
def test_a_product_of_any_exact_method_waits_for_nothing(method, make, kind, most):
    asked = Settings(device=THERE, method=method, batch_size=7, operator=kind, second_opinion=False)
    op = Measurement(make(), asked).operator
    rows = torch.stack([sphere(op, 0, "test", i) for i in range(2)])
    op.multiplied(rows)
    with op.recorded(), pretend.counting() as seen:
        op.multiplied(rows)
    assert waits(seen) <= most * len(op.batches), said(seen)


def test_a_lanczos_step_waits_once(op):
    run = Lanczos(op, sphere(op, 0, "test", 0), 20)
    with op.recorded(), pretend.counting() as seen:
        for _ in range(STEPS):
            run.step()
    assert waits(seen) <= STEPS, said(seen)


def whole_basis(op: Curvature, *, reorthogonalize: bool = True) -> None:
    starts = torch.stack([sphere(op, 0, "density", i) for i in range(3)])
    with pretend.counting() as seen:
        lanczos_block(op, starts, STEPS, reorthogonalize=reorthogonalize)
    assert waits(seen) <= STEPS, said(seen)


def three_terms(op: Curvature) -> None:
    whole_basis(op, reorthogonalize=False)


@pytest.mark.parametrize("steps", [whole_basis, three_terms], ids=["whole basis", "three terms"])
def test_a_step_of_the_density_waits_once(op, steps):
    steps(op)


def test_probes_wait_for_their_own_copies(op):
    run = Lanczos(op, sphere(op, 0, "test", 0), 4)
    for _ in range(4):
        run.step()
    krylov = run.krylov()
    with op.recorded() as record, pretend.counting() as seen:
        forms(op, krylov, PROBES, 0)
        assert len(record.tensors) == PROBES
    assert waits(seen) <= PROBES + PROBES // op.block + 1, said(seen)  # a copy each; a read a block; the record
    assert seen.amount("h2d") == PROBES * op.size  # a byte an entry


def test_the_trace_waits_for_no_example():
    """By way of the outputs: twice as many examples in as many batches take as many waits."""
    found = []
    for rows in (24, 48):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        data = {"train": (models.randn(rows, 5), models.labels(rows, 3))}
        asked = Settings(device=THERE, method="retained_graph", batch_size=rows // 3, second_opinion=False)
        op = Measurement(Problem(model, data, criterion="cross_entropy"), asked).operator
        with pretend.counting() as seen:
            gauss_newton_trace(op)
        found.append(waits(seen))
    assert found[0] == found[1]


def test_losses_and_gradients_of_a_search_stay_on_the_device():
    landscape = Landscape(operator("stacked_graph"))
    landscape._passes.parts = tuple(landscape.batches)  # not all rows as one
    points = torch.zeros(len(landscape.batches), landscape.operator.size, dtype=torch.float64, device=THERE)
    for form, most in (
        (lambda: landscape.losses_and_gradients(points), 0),
        (lambda: landscape.loss_and_gradient(points[0]), 1),
        (lambda: landscape.draws(points), 1),
    ):
        form()
        with pretend.counting() as seen:
            form()
        assert waits(seen) <= most, said(seen)


GAP = "worst_sharpness_box,average_sharpness,noise_stability,pac_bayes*,keskar_sharpness,gradient_noise*,relative*"
ON_THE_HOST = ("largest_in_box", "descend", "content", "_worst_tensor", "_last_layer")
"""SciPy's L-BFGS-B, the digest of the weights, a comparison before the measurement, a layer's inputs."""


def wide() -> Problem:
    """More parameters than examples and than numbers that describe the data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 50), nn.ReLU(), nn.Linear(50, 5)).double()
    return Problem(model, {"train": (models.randn(30, 20), models.labels(30, 5))}, criterion="cross_entropy")


def test_no_vector_travels_to_the_host_and_back_in_a_gap_report():
    problem = wide()
    size = sum(p.numel() for p in problem.bare_model().parameters())
    with pretend.counting() as seen:
        examined(problem, THERE, GAP)
    large = seen.places(("d2h",), depth=1, least=8 * size)
    assert not [place for place in large if not place[2].endswith(ON_THE_HOST)], large


def test_launches_go_with_the_number_of_batches():
    """Kept graphs launch per batch: one batch where memory allows takes the fewest."""
    found = []
    for rows in (4, 13):
        asked = Settings(device=THERE, method="retained_graph", batch_size=rows, second_opinion=False)
        op = Measurement(models.attention(), asked).operator
        start = sphere(op, 0, "test", 0)[None]
        op.multiplied(start)
        with pretend.counting(stacks=False) as seen:
            op.multiplied(start)
        found.append(seen.times("launch") / len(op.batches))
    assert found[0] == pytest.approx(found[1], rel=0.25)


def test_signs_are_those_of_the_cpu():
    here, there = (hessdiag.hessian(models.mlp(), device=device) for device in ("cpu", THERE))
    for draw in (rademacher, sphere):
        assert torch.equal(draw(there, 1, "test", 3).cpu(), draw(here, 1, "test", 3))
