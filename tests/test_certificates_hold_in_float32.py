"""Promise: certificates of float32 measurements hold the float64 truth, however confident the examples are. (30 s)

The small version of ``python -m benchmarks certificates``, whose 300 cases are in benchmarks/results.
"""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from benchmarks import certificates
from benchmarks.certificate_networks import KINDS, trained
from benchmarks.certificates import Case, measured, truth
from hessdiag.engine.checks import selftest


@functools.cache
def found(kind: str) -> tuple[Case, ...]:
    torch.set_num_threads(1)
    return tuple(certificates.cases(kind, seed=100))


def holds(cases: tuple[Case, ...]) -> bool:
    return all(beyond <= 0 for case in cases for beyond in case.beyond)


@pytest.mark.parametrize("kind", KINDS)
def test_the_truth_is_inside(kind: str):
    assert len(found(kind)) >= 2
    assert holds(found(kind)), [(case.loss, case.beyond) for case in found(kind)]


def test_the_intervals_say_something():
    """Between 1e-3 asked for and what a confident float32 loss leaves: the floor may not swallow the number."""
    for kind in KINDS:
        for case in found(kind):
            low, high = case.found
            assert high.hi - high.lo <= 0.1 * abs(case.truths[1]), (kind, case.loss)
            assert low.hi - low.lo <= 0.1 * max(map(abs, case.truths)), (kind, case.loss)


def test_the_truth_is_that_of_the_dense_matrix():
    network = next(trained("CNN, BatchNorm", 100))
    model = network.model.double()
    theta = {name: p.detach() for name, p in model.named_parameters()}

    def loss(flat: torch.Tensor) -> torch.Tensor:
        pieces = torch.split(flat, [p.numel() for p in theta.values()])
        named = {n: piece.view_as(p) for (n, p), piece in zip(theta.items(), pieces, strict=True)}
        outputs = torch.func.functional_call(model, named, (network.inputs.double(),))
        return torch.nn.functional.cross_entropy(outputs, network.targets)

    H = torch.func.hessian(loss)(torch.cat([p.reshape(-1) for p in theta.values()]))
    values = np.linalg.eigvalsh(H.numpy())
    assert truth(network) == pytest.approx((values[0], values[-1]), rel=1e-9)


BROKEN = {
    "rounding is sixteen units, as of a dot product": (
        "MLP, GELU",
        lambda op, *_: 16 * torch.finfo(op.dtype).eps,
    ),
    "rounding is what repeats and is asymmetric": (
        "GRU",
        lambda op, double, unit, row, product, scale, *others: max(others),
    ),
}


@pytest.mark.parametrize(("kind", "breakage"), BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(kind, breakage, monkeypatch):
    monkeypatch.setattr(selftest, "rounding_floor", breakage)
    cases = tuple(measured(kind, network, 100) for network in trained(kind, 100))
    assert not holds(tuple(case for case in cases if case.found is not None))
