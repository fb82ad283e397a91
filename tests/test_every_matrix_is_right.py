"""Promise: H, G, both Fishers and their diagonals are right on a table of models, losses and data types. (90 s)

Oracle: dense matrices by torch on the whole data at once, in float64; and curvlinops, where it is installed.
"""

from __future__ import annotations

import importlib.util
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hessdiag
from hessdiag.engine.products import fisher
from hessdiag.problem import Problem
from tests import models

EXAMPLES, SIGMAS, SEEDS = 10, 5.0, 40
TOLERANCE = {torch.float64: 1e-11, torch.float32: 3e-5}


class Transformer(nn.Module):
    """Tokens to one row of outputs: embedding, LayerNorm, attention, GELU, mean over positions."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(5, 4), nn.LayerNorm(4)
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(4, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens):
        x = self.embed(tokens)
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 2, 2).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.head(F.gelu(x + self.out(mixed)).mean(1))


def mlp():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3)), models.randn(EXAMPLES, 5)


def cnn():
    layers = [nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 2, 2), nn.Softplus(), nn.Flatten(), nn.Linear(18, 3)]
    return nn.Sequential(*layers), models.randn(EXAMPLES, 1, 6, 6)


def transformer():
    return Transformer(), torch.randint(0, 5, (EXAMPLES, 4), generator=models.generator(2))


MODELS = {"MLP": mlp, "CNN": cnn, "transformer": transformer}
LOSSES = {  # criterion, torch's loss, targets, and S = d²loss/df² of the summed loss's terms
    "cross-entropy": ("cross_entropy", nn.CrossEntropyLoss(), models.labels(EXAMPLES, 3)),
    "MSE": ("mse", nn.MSELoss(), models.randn(EXAMPLES, 3, seed=3)),
    "BCE": (nn.BCEWithLogitsLoss(), nn.BCEWithLogitsLoss(), (models.randn(EXAMPLES, 3, seed=4) > 0).double()),
}
KINDS = ("hessian", "ggn", "empirical_fisher", "mc_fisher")
TABLE = list(itertools.product(MODELS, LOSSES, KINDS, TOLERANCE))


def made(model, loss, dtype):
    torch.manual_seed(1)
    net, inputs = MODELS[model]()
    criterion, torchs, targets = LOSSES[loss]
    return Problem(net.to(dtype), {"train": (inputs, targets)}, criterion=criterion), torchs


def dense(problem, torchs, kind):
    """By torch.func, in float64: H, G, or the empirical Fisher."""
    net, (inputs, targets) = problem.bare_model().double(), problem.data["train"]
    named = {name: p.detach() for name, p in net.named_parameters()}
    flat = torch.cat([p.flatten() for p in named.values()])
    sizes = [p.numel() for p in named.values()]

    def outputs(theta):
        pieces = zip(named.items(), torch.split(theta, sizes), strict=True)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.functional_call(net, {n: x.view_as(p) for (n, p), x in pieces}, (inputs,))

    if kind == "hessian":
        # row by row: torch.func.hessian is off by percents through LayerNorm (torch 2.13), as differences show
        theta = flat.requires_grad_()
        (slope,) = torch.autograd.grad(torchs(outputs(theta), targets), theta, create_graph=True)
        return torch.stack([torch.autograd.grad(entry, theta, retain_graph=True)[0] for entry in slope])
    f, jacobian = outputs(flat), torch.func.jacrev(outputs)(flat)
    if kind == "ggn":
        S = torch.func.hessian(torchs)(f, targets)
        return torch.einsum("ncp,ncmd,mdq->pq", jacobian, S, jacobian)
    # what the mean divides by: examples for classes, numbers for the others
    terms = EXAMPLES if isinstance(torchs, nn.CrossEntropyLoss) else f.numel()
    a = torch.func.grad(torchs)(f, targets) * terms
    g = torch.einsum("nc,ncp->np", a, jacobian)
    return g.T @ g / terms


def off(found, truth):
    return float((found.double() - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize(("model", "loss", "kind", "dtype"), TABLE)
def test_matrix_and_diagonal(model, loss, kind, dtype):
    problem, torchs = made(model, loss, dtype)
    H = hessdiag.hessian(problem, operator=kind, samples=EXAMPLES, batch_size=4)
    assert H.dtype == dtype
    matrix, found = H.dense(), hessdiag.diagonal(H, probes=40)
    if kind == "mc_fisher":
        truth = matrix.double()
        expect_mean_gauss_newton(H, dense(problem, torchs, "ggn"))
    else:
        truth = dense(problem, torchs, kind)
        assert off(matrix, truth) < TOLERANCE[dtype]
    assert found.kind == "exact" or kind == "hessian"
    rounding = TOLERANCE[dtype] * float(truth.abs().max()) * len(truth) ** 0.5
    assert float((found.value - truth.diagonal()).norm()) <= 1.5 * found.error + rounding


def expect_mean_gauss_newton(H, G):
    """Forms of three vectors over seeds, within five standard errors."""
    V, seen = models.randn(H.size, 3, seed=9), []
    for seed in range(SEEDS):
        H.noise = list(fisher._uniform(H.problem, H.batches, 1, seed))
        seen.append((V * (H @ V)).sum(0))
    seen = torch.stack(seen)
    away = (seen.mean(0) - (V * (G @ V)).sum(0)).abs()
    assert bool((away <= SIGMAS * seen.std(0) / SEEDS**0.5).all())


def test_the_table_has_48_rows_and_more():
    assert len(TABLE) == 72


if importlib.util.find_spec("curvlinops") is not None:  # an extra of the benchmarks

    @pytest.mark.parametrize(("model", "loss", "kind", "dtype"), TABLE)
    def test_curvlinops_agrees(model, loss, kind, dtype):
        import curvlinops

        problem, torchs = made(model, loss, dtype)
        inputs, targets = problem.data["train"]
        inputs, targets = (x.to(dtype) if x.is_floating_point() else x for x in (inputs, targets))
        names = {"hessian": "Hessian", "ggn": "GGN", "empirical_fisher": "EF", "mc_fisher": "FisherMC"}
        make = getattr(curvlinops, f"{names[kind]}LinearOperator")
        data = [(inputs[:6], targets[:6]), (inputs[6:], targets[6:])]
        options = {"mc_samples": 400} if kind == "mc_fisher" else {}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            other = make(problem.model, torchs, list(problem.model.parameters()), data, **options)
            theirs = other @ torch.eye(other.shape[1], dtype=dtype)
        more = {"draws": 400} if kind == "mc_fisher" else {}
        ours = hessdiag.hessian(problem, operator=kind, samples=EXAMPLES, **more).dense()
        if (model, kind) == (
            "transformer",
            "hessian",
        ):  # it is made by torch.func, which is wrong through LayerNorm
            truth = dense(problem, torchs, kind)
            assert off(ours, truth) < 10 * TOLERANCE[dtype]
            return
        # of drawn matrices in expectation alone: entries of 400 draws spread by a few percents
        assert off(ours, theirs.double()) < (0.3 if kind == "mc_fisher" else 10 * TOLERANCE[dtype])
