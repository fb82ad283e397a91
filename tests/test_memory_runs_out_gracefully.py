"""Promise: where memory runs out, less travels together and the numbers stay; at the end of it, one line. (15 s)

Memory is a budget of vectors and examples, exceeded with the errors torch raises.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from hessdiag.analysis import analyze
from hessdiag.engine.checks import planner
from hessdiag.engine.checks.preflight import preflight
from hessdiag.engine.products import batched, methods
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.failures import is_out_of_memory
from hessdiag.errors import MeasurementError
from hessdiag.problem import Problem
from hessdiag.samples import row_count
from tests import models

TOLERANCE = 1e-12  # float64, summed in another order
ERRORS = {
    "CUDA": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB."),
    "CPU": RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    "numpy": MemoryError("Unable to allocate 20 GiB"),
}
OF_LIBRARIES = (
    "[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to allocate 9.",
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call",
    "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    "cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
    "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate(handle)`",
    "MPS backend out of memory (MPS allocated: 9 GB)",
    "level_zero backend failed with error: 39 (UR_RESULT_ERROR_OUT_OF_DEVICE_MEMORY)",
    "std::bad_alloc",
)
ANOTHER_MATTER = (
    RuntimeError("its data is not allocated yet: call mutable_data() to actually allocate memory"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    ValueError("CUDA error: out of memory, as our own code says"),
)


def limited(error, vectors=10_000, examples=10_000):
    """retained_graph on a machine that holds so many vectors and examples; ``seen`` is what got through."""
    seen = []

    def method(function, kind, batch, rows):
        if len(rows) > vectors or row_count(batch) > examples:
            raise error
        seen.append((len(rows), row_count(batch)))
        return methods.retained_graph(function, kind, batch, rows)

    return method, seen


@pytest.fixture
def small_machine(monkeypatch):
    def build(error=ERRORS["CUDA"], problem=None, **limits):
        method, seen = limited(error, **limits)
        monkeypatch.setitem(methods.METHODS, "limited", method)
        problem = problem or models.attention()
        return Curvature(problem, models.sample(problem, 7), method="limited", block=8), seen

    return build


@pytest.mark.parametrize("text", OF_LIBRARIES)
def test_what_cublas_and_the_others_say_is_out_of_memory(text):
    assert is_out_of_memory(RuntimeError(text))


@pytest.mark.parametrize("error", ANOTHER_MATTER, ids=["words", "access", "value"])
def test_other_errors_are_not_out_of_memory(error):
    assert not is_out_of_memory(error)


def reference(problem=None):
    problem = problem or models.attention()
    return Curvature(problem, models.sample(problem, 7), block=8)


def block(op, number=8):
    return models.randn(op.size, number, seed=3)


def difference(a, b):
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_blocks_are_halved_first(small_machine, error):
    op, seen = small_machine(error, vectors=3)
    assert difference(op @ block(op), reference() @ block(op)) < TOLERANCE
    assert op.block == 2
    assert op.micro_batch is None
    assert {vectors for vectors, _ in seen} == {2}
    assert op.notes == [
        "out of memory: 4 vectors travel together from here on; the numbers do not change",
        "out of memory: 2 vectors travel together from here on; the numbers do not change",
    ]


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_then_batches_are_cut(small_machine, error):
    op, seen = small_machine(error, examples=2)
    assert difference(op @ block(op), reference() @ block(op)) < TOLERANCE
    assert op.block == op.micro_batch == 1
    assert max(examples for _, examples in seen) == 1
    assert "batches are cut into 3 examples" in op.notes[-2]
    assert "batches are cut into 1 examples" in op.notes[-1]
    again = len(op.notes)
    _ = op @ block(op)
    assert len(op.notes) == again  # what was learned is kept


def test_error_bars_over_data_keep_their_batches(small_machine):
    op, _ = small_machine(examples=2)
    whole = reference()
    with op.recorded() as cut, whole.recorded() as uncut:
        _ = op @ block(op), whole @ block(op)
    assert len(cut.batches) == len(uncut.batches) == 8
    assert difference(torch.stack(cut.batches), torch.stack(uncut.batches)) < TOLERANCE
    assert difference(torch.stack(cut.tensors), torch.stack(uncut.tensors)) < TOLERANCE


def test_siblings_start_from_what_was_learned(small_machine):
    op, _ = small_machine(examples=2)
    _ = op @ block(op)
    assert op.with_kind("ggn").micro_batch == 1
    assert op.with_kind("ggn").notes is op.notes


def test_loss_and_gradient_are_cut_too(monkeypatch):
    op = reference()
    loss, slope = op.loss(), op.gradient()
    original = op.function.total

    def total(theta, batch):
        if row_count(batch) > 3:
            raise ERRORS["CUDA"]
        return original(theta, batch)

    monkeypatch.setattr(op.function, "total", total)
    assert op.loss() == pytest.approx(loss, rel=TOLERANCE)
    assert difference(op.gradient(), slope) < TOLERANCE
    assert op.micro_batch == 3


@pytest.mark.parametrize("limits", [{"vectors": 0}, {"examples": 0}], ids=str)
def test_with_one_vector_and_one_example_it_is_refused(small_machine, limits):
    op, _ = small_machine(**limits)
    with pytest.raises(
        MeasurementError, match=r"one vector and one example .*CUDA out of memory.*`params`"
    ) as caught:
        _ = op @ block(op)
    assert "\n" not in str(caught.value)


def stack(*, uncut=False):
    """A network of alike blocks; with BatchNorm on batch statistics its batches cannot be cut."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(5, track_running_stats=False) if uncut else nn.Identity()
    blocks = [nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3)]
    model = nn.Sequential(norm, *blocks, nn.Linear(5, 3)).double()
    return Problem(model, {"train": (models.randn(40, 5), models.labels(40, 3))}, criterion="cross_entropy")


@pytest.mark.parametrize("uncut", [False, True], ids=["one example does not fit", "batches cannot be cut"])
def test_then_a_stack_of_blocks_goes_block_by_block(small_machine, uncut):
    problem = stack(uncut=uncut)
    op, seen = small_machine(problem=problem, examples=0)
    op.divisible = not uncut
    assert difference(op @ block(op), reference(problem) @ block(op)) < TOLERANCE
    assert not seen
    assert op.method == "layer_streamed"
    assert "products go block by block (layer_streamed)" in op.notes[-1]
    assert (op.micro_batch == 1) != uncut


def test_where_blocks_do_not_fit_either_it_is_refused(small_machine, monkeypatch):
    op, _ = small_machine(problem=stack(), examples=0)
    monkeypatch.setitem(methods.METHODS, "layer_streamed", methods.METHODS["limited"])
    with pytest.raises(MeasurementError, match=r"one vector and one example .*`params`"):
        _ = op @ block(op)


def test_a_loss_that_depends_on_the_division_is_not_cut(small_machine):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 3)).double()
    problem = Problem(model, {"train": (models.randn(40, 5), models.labels(40, 3))}, criterion="cross_entropy")
    op, _ = small_machine(problem=problem, examples=4)
    op.divisible = preflight(problem, models.sample(problem, 7)).operator.divisible
    with pytest.raises(MeasurementError, match=r"depends on how a batch is cut.*smaller `batch_size`"):
        _ = op @ block(op)


def test_other_errors_pass_through(small_machine):
    op, _ = small_machine(error=ValueError("something else"), vectors=0)
    with pytest.raises(ValueError, match="something else"):
        _ = op @ block(op)
    assert op.notes == []


def by_products():
    """A criterion of its own: three-layer networks with the built-in one need no products."""
    problem = models.mlp()
    return Problem(problem.model, problem.data, criterion=lambda outputs, batch: cross_entropy(outputs, batch[1]))


def test_a_whole_analysis_says_what_was_done(monkeypatch):
    options = {
        "samples": 40,
        "batch_size": 10,
        "steps": 5,
        "probes": 4,
        "density_probes": 2,
        "method": "retained_graph",
    }
    whole = analyze(by_products(), "frobenius_squared", **options)
    monkeypatch.setitem(methods.METHODS, "retained_graph", limited(ERRORS["CUDA"], vectors=2)[0])
    small = analyze(by_products(), "frobenius_squared", **options)
    value, wanted = (a.metrics["frobenius_squared"].value for a in (small, whole))
    assert value == pytest.approx(wanted, rel=1e-10)
    assert any("vectors travel together" in text for text in small.warnings)
    assert not whole.warnings


def test_a_trial_that_does_not_fit_is_refused(monkeypatch):
    def full(*_):
        raise ERRORS["CUDA"]

    monkeypatch.setattr(planner, "GradientGraph", full)
    problem = models.mlp()
    with pytest.raises(MeasurementError, match=r"out of memory.*`batch_size`"):
        preflight(problem, models.sample(problem))


def cut_wrongly(monkeypatch, change):
    divide = batched.divide
    monkeypatch.setattr(batched, "divide", lambda batch, rows: change(list(divide(batch, rows))))


def lose_a_batch(monkeypatch, _=None):
    retreat = Curvature.retreat

    def losing(op, batch, vectors, failure):
        retreat(op, batch, vectors, failure)
        op.batches[-1] = op.batches[0]

    monkeypatch.setattr(Curvature, "retreat", losing)


BROKEN = {
    "the last piece is lost": lambda patch: cut_wrongly(patch, lambda pieces: pieces[:-1] or pieces),
    "a piece counts twice": lambda patch: cut_wrongly(patch, lambda pieces: pieces + pieces[:1]),
    "another batch is taken": lose_a_batch,
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage, small_machine, monkeypatch):
    op, _ = small_machine(examples=2)
    breakage(monkeypatch)
    assert difference(op @ block(op), reference() @ block(op)) > 1e6 * TOLERANCE
