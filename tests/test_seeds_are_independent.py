"""Promise: every random vector has a stream of its own, named by seed, quantity, index and parameter. (2 s)"""

from __future__ import annotations

import itertools

import pytest
import torch

from hessdiag.operator import ClosureOperator, SymmetricOperator
from hessdiag.spectral import rademacher, sphere, stream


def operator(*layout: tuple[str, int]) -> SymmetricOperator:
    return ClosureOperator(lambda block: block, sum(size for _, size in layout), layout=layout)


PLAIN = operator(("weight", 50))


def distinct(draw) -> bool:
    """No two of the vectors for near-by seeds, indices and quantities are equal (as with seed + i)."""
    names = itertools.product(range(4), ("trace", "density"), range(4))
    vectors = [draw(PLAIN, seed, quantity, index) for seed, quantity, index in names]
    return len({tuple(vector.tolist()) for vector in vectors}) == len(vectors)


@pytest.mark.parametrize("draw", [sphere, rademacher])
def test_no_two_names_share_numbers(draw):
    assert distinct(draw)


def seed_plus_index(op, seed, quantity, index):
    generator = torch.Generator().manual_seed(seed + index)
    return torch.randn(op.size, generator=generator)


BROKEN = {
    "seed + i": seed_plus_index,
    "quantity forgotten": lambda op, seed, quantity, index: sphere(op, seed, "", index),
    "index forgotten": lambda op, seed, quantity, index: sphere(op, seed, quantity, 0),
    "names run together": lambda op, seed, quantity, index: sphere(op, 0, quantity, seed + index),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage):
    assert not distinct(breakage)


def test_names_do_not_run_together():
    first, second = stream(1, "ab", "c"), stream(1, "a", "bc")
    assert first.initial_seed() != second.initial_seed()
    assert stream(11, "x").initial_seed() != stream(1, "1x").initial_seed()


@pytest.mark.parametrize("draw", [sphere, rademacher])
def test_a_parameter_keeps_its_numbers_wherever_it_stands(draw):
    first = draw(operator(("a", 30), ("b", 20)), 0, "trace", 3)
    second = draw(operator(("b", 20), ("new", 7), ("a", 30)), 0, "trace", 3)
    # the sphere divides all by one length: directions per parameter are what stays
    for one, other in ((first[:30], second[27:]), (first[30:], second[:20])):
        assert torch.allclose(one / one.norm(), other / other.norm(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("draw", [sphere, rademacher])
def test_probes_are_white(draw):
    vectors = torch.stack([draw(PLAIN, seed, "x", i) for seed in range(60) for i in range(60)])
    vectors = vectors.double() / vectors[0].norm().double()
    covariance = 50 * vectors.T @ vectors / len(vectors)
    # entries of the sample covariance have standard deviation at most sqrt(2/3600) = 0.024; 2500 of them: 5 sigma
    assert float((covariance - torch.eye(50, dtype=torch.float64)).abs().max()) < 5 * 0.024
    assert float(vectors.mean(dim=0).abs().max()) < 5 / (50 * 3600) ** 0.5
