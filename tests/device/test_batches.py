"""Promise: on an accelerator batches are as large as memory allows, eight of them at least; the numbers stay.

The device's memory is a number of bytes here; what exceeds it fails as on CUDA.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hessdiag
from hessdiag import Problem, analyze
from hessdiag.analysis.measurement import Measurement
from hessdiag.engine.checks import batch_size
from hessdiag.samples import row_count
from hessdiag.settings import Settings
from tests import models
from tests.device import pretend
from tests.device.cases import THERE, moved
from tests.device.changed import changed

EXAMPLES, WIDTH = 4096, 32
ROWS = "hessdiag.engine.checks.batch_size:_rows"
QUICK = {"samples": EXAMPLES, "second_opinion": False, "method": "retained_graph"}


def wide(examples: int = EXAMPLES) -> Problem:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3)).double()
    data = {"train": (models.randn(examples, 5), models.labels(examples, 3))}
    return Problem(model, data, criterion="cross_entropy")


def sizes(problem: Problem, device: str | None = THERE, **options) -> list[int]:
    asked = Settings(device=device, **QUICK | options)
    return [row_count(batch) for batch in Measurement(problem, asked).samples.batches]


def test_batches_are_an_eighth_of_the_samples_where_that_fits():
    assert sizes(wide()) == [512] * 8
    assert sizes(moved(wide(), THERE), None) == [512] * 8


def test_the_cpu_and_what_is_asked_for_stay():
    assert sizes(wide(), "cpu") == [128] * 32
    assert sizes(wide(), batch_size=1024) == [1024] * 4


def test_batches_are_as_large_as_memory_allows():
    """An example takes 1.9 kB here, so that half of what is free holds about 130."""
    with pretend.memory(2**19):
        found = sizes(wide())
    assert len({*found[:-1]}) == 1
    assert 100 <= found[0] <= 160


def test_a_batch_that_does_not_fit_after_all_is_halved():
    with pytest.MonkeyPatch.context() as patch, pretend.memory(2**19):
        patch.setattr(batch_size, "SHARE", 100)
        assert sizes(wide()) == [256] * 16


def test_the_numbers_are_those_of_small_batches():
    found = [analyze(wide(), device=device, quantities="trace", **QUICK)["trace"] for device in ("cpu", THERE)]
    assert found[1].value == pytest.approx(found[0].value, rel=1e-10)
    assert found[1].data is not None


def test_batches_whose_loss_is_no_sum_are_left_alone():
    def contrast(model: nn.Module, batch: tuple) -> torch.Tensor:
        outputs = model(batch[0])
        return (outputs - outputs.mean(0)).square().mean()

    problem = Problem(wide().bare_model(), wide().data, loss=contrast)
    samples = Measurement(wide(), Settings(device="cpu", **QUICK)).samples
    assert batch_size.for_device(problem, samples, device=torch.device(THERE)) is samples


def test_texts_and_few_examples_are_left_alone():
    few = Measurement(wide(30), Settings(device="cpu", **QUICK)).samples
    assert batch_size.for_device(wide(30), few, device=torch.device(THERE)) is few


BROKEN = {
    "what an example takes": ("(more - few)", "(0.1 * (more - few))", test_batches_are_as_large_as_memory_allows),
    "one batch": ("// DATA_BLOCKS", "// 1", test_batches_are_an_eighth_of_the_samples_where_that_fits),
    "no look at the sum": (
        "not _is_sum(function",
        "False and (function",
        test_batches_whose_loss_is_no_sum_are_left_alone,
    ),
    "nothing is tried": (
        "while rows > 1 and",
        "while False and",
        test_a_batch_that_does_not_fit_after_all_is_halved,
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_this_promise_would_notice(name):
    old, new, test = BROKEN[name]
    with changed(ROWS, old, new), pytest.raises((AssertionError, RuntimeError, hessdiag.HessdiagError)):
        test()
