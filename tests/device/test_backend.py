"""Promise: the pretend device refuses what CUDA refuses, counts its waits, and computes what the CPU does."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.device import pretend
from tests.models import generator

HERE, THERE = torch.arange(20.0).view(4, 5), "pretend"

REFUSED = {
    "a sum of two devices": lambda x: x + HERE,
    "the other way round": lambda x: HERE + x,
    "a product": lambda x: x @ HERE.T,
    "dot": lambda x: torch.dot(x[0], HERE[0]),
    "cat": lambda x: torch.cat([x, HERE]),
    "stack": lambda x: torch.stack([x[0, 0], torch.tensor(1.0)]),
    "a write to the host": lambda x: HERE.clone().add_(x[0, 0]),
    "gather": lambda x: x.gather(1, torch.zeros(4, 1, dtype=torch.long)),
    "a scatter": lambda x: x.index_add(0, torch.tensor([0]), x[:1]),
    "numpy": lambda x: x.numpy(),
    "the CPU's generator": lambda x: torch.randn(3, device=THERE, generator=generator()),
    "a loss of targets on the host": lambda x: F.cross_entropy(x, torch.zeros(4, dtype=torch.long)),
}
COUNTED = {
    "item": (lambda x: float(x.sum()), {"item": 1}),
    "a copy to the host": (lambda x: x.cpu(), {"d2h": 1}),
    "a copy from the host": (lambda x: HERE.to(THERE), {"h2d": 1}),
    "a list as index": (lambda x: x[[0, 2]], {"h2d": 1}),
    "a slice": (lambda x: x[0:3:2], {}),
    "a mask": (lambda x: x[x > 3], {"implicit": 1}),
    "eigh": (lambda x: torch.linalg.eigh(x.T @ x), {"implicit": 1}),
    "a number of the host": (lambda x: x * torch.tensor(2.0), {}),
    "a view": (lambda x: x.t()[1:], {}),
}


@pytest.mark.parametrize("call", REFUSED)
def test_what_cuda_refuses_is_refused(call):
    with pytest.raises((RuntimeError, TypeError), match=r"same device|can't convert|generator"):
        REFUSED[call](HERE.to(THERE))


@pytest.mark.parametrize("call", COUNTED)
def test_what_cuda_waits_for_is_counted(call):
    form, expected = COUNTED[call]
    x = HERE.to(THERE)
    with pretend.counting() as seen:
        form(x)
    assert {kind: seen.times(kind) for kind in pretend.WAITS if seen.times(kind)} == expected


def test_launches_and_float64_are_counted():
    x = HERE.to(THERE)
    with pretend.counting() as seen:
        y = (x + 1).double() * 2
    assert seen.times("launch") == 3
    assert (seen.times("float64"), seen.amount("float64")) == (1, 20)
    assert y.dtype == torch.float64


def test_memory_runs_out():
    x = torch.zeros(1000, device=THERE)
    before = torch.pretend.memory_allocated()
    with pretend.memory(100_000):
        with pytest.raises(torch.OutOfMemoryError, match="pretend out of memory"):
            torch.outer(x, x)
        assert torch.pretend.memory_allocated() == before
        assert torch.pretend.mem_get_info()[0] == 100_000
        assert float((x + 1).sum()) == 1000


def test_it_computes_what_the_cpu_does():
    """A convolution, BatchNorm, pooling and their second derivatives, bit for bit."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    model.append(nn.Linear(27, 4))
    x, y = torch.randn(6, 1, 8, 8), torch.randint(4, (6,))
    found = []
    for device in ("cpu", THERE):
        model.to(device)
        parameters = list(model.parameters())
        loss = F.cross_entropy(model(x.to(device)), y.to(device))
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        found.append(torch.autograd.grad(gradients, parameters, [g.detach() for g in gradients]))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(*found, strict=True))


def test_a_compiler_that_fails_is_told_from_none(monkeypatch, tmp_path):
    monkeypatch.setattr(pretend.tempfile, "tempdir", str(tmp_path))  # nothing is built there yet
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(pretend.Failed, match="did not compile"):
        pretend._built()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(pretend.Unavailable, match="none found") as none:
        pretend._built()
    assert not isinstance(none.value, pretend.Failed)


def test_its_random_numbers_are_its_own():
    torch.manual_seed(1)
    first, here = torch.rand(3, device=THERE), torch.get_rng_state()
    torch.rand(3, device=THERE)
    assert torch.equal(torch.get_rng_state(), here)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(3, device=THERE), first)
