"""Promise: on a real accelerator the numbers are the CPU's to rounding, with as few waits. (2 minutes)

``pytest -m cuda tests``; HESSDIAG_TEST_DEVICE=xpu names another device than cuda. Without a device all of this is
skipped; ``tests/device`` runs it on a pretend one, where a mistake in these lines shows.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import hessdiag
from hessdiag import Problem, analyze
from hessdiag.analysis.measurement import Measurement
from hessdiag.engine.products.devices import name_of, offered
from hessdiag.engine.products.functional import Functional
from hessdiag.engine.products.memory import free_bytes
from hessdiag.regularizers import SAM
from hessdiag.settings import Settings
from hessdiag.spectral.lanczos import Lanczos
from hessdiag.spectral.probes import sphere
from tests import models
from tests.command import call
from tests.device.cases import FEW, REGULARIZERS, examined, narrowed, regularized
from tests.training_runs import X, Y, net, sgd

DEVICE = os.environ.get("HESSDIAG_TEST_DEVICE", "cuda")
THERE = torch.accelerator.current_accelerator(check_available=True)
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(THERE is None or THERE.type != DEVICE, reason=f"there is no device {DEVICE!r} here"),
]

METHODS = ("retained_graph", "stacked_graph", "double_backward", "forward_over_reverse", "finite_difference")
ROUNDING = {"float64": 1e-9, "float32": 2e-3}  # relative, of numbers that go through a few products
CASES: dict[str, tuple[Any, dict[str, Any], str]] = {
    **{f"an MLP, {method}": (models.mlp, {"method": method}, "float64") for method in METHODS},
    "a CNN with BatchNorm": (models.cnn, {"method": "retained_graph"}, "float64"),
    "a CNN in float32": (lambda: narrowed(models.cnn()), {"method": "retained_graph"}, "float32"),
    "attention": (models.attention, {"method": "retained_graph", "batch_size": 4}, "float64"),
    "its Gauss-Newton matrix": (
        models.attention,
        {"method": "forward_over_reverse", "operator": "ggn"},
        "float64",
    ),
    "attention in float32": (lambda: narrowed(models.attention()), {"method": "double_backward"}, "float32"),
}
DRAWN_THERE = ("NSO", "LabelNoise")  # noise from the device's own generator


def close(a: float, b: float, tolerance: float, scale: float) -> bool:
    return (math.isnan(a) and math.isnan(b)) or a == b or abs(a - b) <= tolerance * max(abs(a), abs(b), scale)


def test_an_analysis_is_that_of_the_cpu():
    for name, (make, options, precision) in CASES.items():
        asked = {**FEW, "batch_size": 7, **options}
        here, there = (analyze(make(), device=device, **asked) for device in ("cpu", DEVICE))
        scale = abs(here["lambda_max"].value)
        for quantity, metric in here.metrics.items():
            other = there[quantity]
            for end in ("value", "lo", "hi"):
                a, b = getattr(metric, end, math.nan), getattr(other, end, math.nan)
                assert close(a, b, ROUNDING[precision], scale), (name, quantity, end, a, b)


def test_a_gap_report_is_that_of_the_cpu():
    here, there = (examined(models.cnn(), device) for device in ("cpu", DEVICE))
    for name, reading in here.items():
        other = there[name]
        assert reading.keys() == other.keys(), name
        if "value" in reading:
            assert close(reading["value"], other["value"], 1e-5, 1e-9), (name, reading, other)


def test_regularizers_step_as_on_the_cpu():
    for name in REGULARIZERS:
        if name in DRAWN_THERE:
            continue
        pairs = zip(regularized(name, "cpu", 0.0), regularized(name, DEVICE, 0.0), strict=True)
        for a, b in pairs:
            assert torch.allclose(a, b, rtol=1e-7, atol=1e-9), name


def test_the_passes_of_a_step_share_their_masks():
    masks: list[torch.Tensor] = []
    model = net(nn.Dropout(0.5)).to(DEVICE)
    model[1].register_forward_hook(lambda _, given, out: masks.append((out != 0).cpu()))
    x, y = X.to(DEVICE), Y.to(DEVICE)
    SAM(sgd(model), rho=0.3).step(lambda: nn.functional.cross_entropy(model(x), y))
    assert len(masks) == 2
    assert torch.equal(masks[0], masks[1])


def test_random_streams_are_left_as_found():
    problem = models.mlp()
    state = offered(torch.device(DEVICE), "get_rng_state")
    before = state(DEVICE)
    function = Functional(problem, device=DEVICE)
    with function.measuring():
        torch.rand(3, device=DEVICE)
    assert torch.equal(state(DEVICE), before)


def test_products_are_in_full_precision_whatever_is_allowed():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 10))
    data = {"train": (torch.randn(256, 256), torch.randint(10, (256,)))}
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    problem = Problem(model, data, criterion="cross_entropy")
    truth = (hessdiag.hessian(problem, dtype="float64") @ v).double()
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        found = (hessdiag.hessian(problem, device=DEVICE) @ v).cpu().double()
    finally:
        torch.set_float32_matmul_precision(allowed)
    assert float((found - truth).norm() / truth.norm()) < 1e-5  # TF32 leaves 1e-3


def test_a_run_repeats():
    runs = [hessdiag.lanczos(hessdiag.hessian(models.mlp(), device=DEVICE), steps=12) for _ in range(2)]
    assert (abs(runs[0].T - runs[1].T) <= 1e-12 * abs(runs[0].T).max()).all()


def test_it_is_known_by_name_and_memory():
    device = torch.device(DEVICE)
    assert name_of(device)
    assert free_bytes(device) > 2**24
    found = analyze(models.mlp(), device=DEVICE, quantities="lambda_max").environment
    assert found["device_name"] == name_of(device)
    assert found["device"].partition(":")[0] == DEVICE


def test_the_command_line_measures_there():
    few = ("--samples", "64", "--quantities", "lambda_max,trace", "--json")
    code, out, err = call("analyze", "hessdiag.sources.digits:problem", "--device", DEVICE, *few)
    assert code == 0, err
    assert json.loads(out)["environment"]["device"].partition(":")[0] == DEVICE


def test_batches_are_as_large_as_fit():
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 32), nn.Tanh(), nn.Linear(32, 3)).double()
    data = {"train": (models.randn(4096, 5), models.labels(4096, 3))}
    problem = Problem(model, data, criterion="cross_entropy")
    asked = Settings(device=DEVICE, samples=4096, second_opinion=False, method="retained_graph")
    assert len(Measurement(problem, asked).samples.batches) == 8


@pytest.mark.skipif(DEVICE != "cuda", reason="this is CUDA's own account of waits")
def test_cuda_counts_no_wait_in_a_product_and_one_in_a_step():
    op = Measurement(models.attention(), Settings(device=DEVICE, method="retained_graph", batch_size=4)).operator
    run = Lanczos(op, sphere(op, 0, "test", 0), 20)
    row = sphere(op, 0, "test", 1)[None]
    op.multiplied(row)
    run.step()
    before = torch.cuda.get_sync_debug_mode()
    try:
        torch.cuda.set_sync_debug_mode("error")
        op.multiplied(row)
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            run.step()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    assert len([one for one in told if "synchroniz" in str(one.message)]) <= 1


@pytest.mark.skipif(DEVICE != "cuda", reason="only CUDA's allocator takes a limit")
def test_less_travels_together_where_memory_runs_out():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 2048), nn.Tanh(), nn.Linear(2048, 10))
    data = {"train": (torch.randn(4096, 64), torch.randint(10, (4096,)))}
    problem = Problem(model, data, criterion="cross_entropy")
    v = torch.randn(sum(p.numel() for p in model.parameters()))
    options = {"samples": 4096, "batch_size": 4096, "method": "retained_graph"}
    truth = hessdiag.hessian(problem, device=DEVICE, **options) @ v
    op = hessdiag.hessian(problem, device=DEVICE, **options)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    try:
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + 100 * 2**20) / total)
        found = op @ v
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert op.notes
    assert torch.allclose(found, truth, rtol=1e-4, atol=1e-6)
