"""Zhang, Li and Ju: matrix sensing, and the variance of one- and two-point estimates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, vmap
from torch.optim import SGD

import hessdiag
from hessdiag.problem import Problem
from hessdiag.regularizers import NSO
from hessdiag.sources import datasets

Row = tuple[str, int, str, float, str, float]  # part, seed, arm, at (step, sigma or strength), measure, value
NOISE = 0.08  # the authors' sigma
TOO_LARGE = 0.02  # sigma beyond which no claim is made: terms of higher order
AGREE = 5  # steps taken twice, to prove that the shared pass is NSO
CHUNK = 256  # noise vectors evaluated together


@dataclass(frozen=True)
class Sensing:
    """Sizes of the matrix sensing problem; the defaults are the paper's."""

    size: int = 100
    rank: int = 5
    steps: int = 5000
    rate: float = 0.0025
    seeds: int = 5
    fresh: int = 500  # validation measurements
    every: int = 50  # steps between two looks

    @property
    def measurements(self) -> int:
        """m = 5 d r."""
        return 5 * self.size * self.rank


class Instance:
    """The A_i and every seed's X*, start and noise, in float32; the A_i are the same for all seeds.

    <A, X> of symmetric matrices is the dot product of their upper triangles with √2 on the off-diagonal, and for
    A = (G + Gᵀ)/2 that triangle is plain N(0, 1): half the memory of the full matrices.
    """

    def __init__(self, sizes: Sensing) -> None:
        d = sizes.size
        self.sizes = sizes
        self._upper = torch.triu_indices(d, d)
        self._weight = torch.where(self._upper[0] == self._upper[1], 1.0, math.sqrt(2))
        generator = Generator().manual_seed(1000)
        self.seen = torch.randn(sizes.measurements, len(self._weight), generator=generator)
        self.fresh = torch.randn(sizes.fresh, len(self._weight), generator=generator)
        starts, truths = [], []
        for seed in range(sizes.seeds):
            own = Generator().manual_seed(seed)
            factor = torch.randn(d, sizes.rank, generator=own)
            truths.append(self._pack(factor @ factor.T))
            starts.append(torch.randn(d, d, generator=own))
        self.start, self.truth = torch.stack(starts), torch.stack(truths)

    def _pack(self, matrix: Tensor) -> Tensor:
        return matrix[..., self._upper[0], self._upper[1]] * self._weight

    def _unpack(self, rows: Tensor) -> Tensor:
        """The symmetric matrix whose inner products with symmetric matrices are the packed ones."""
        d = self.sizes.size
        matrix = rows.new_zeros(len(rows), d, d)
        matrix[:, self._upper[0], self._upper[1]] = rows / self._weight
        return matrix + matrix.mT - torch.diag_embed(matrix.diagonal(dim1=1, dim2=2))

    def loss(self, factors: Tensor) -> Tensor:
        """Sum over seeds of 1/(4m) sum (<A_i, UUᵀ> − y_i)², for autograd."""
        off = self._pack(factors @ factors.mT) - self.truth
        return (off @ self.seen.T).square().sum() / (4 * self.sizes.measurements)

    def gradient(self, factors: Tensor) -> Tensor:
        """(1/m) sum (<A_i, UUᵀ> − y_i) A_i U at many U (points, seeds, d, d), in one pass over the A_i."""
        off = (self._pack(factors @ factors.mT) - self.truth).flatten(0, 1)
        # Laid out so that both products read the A_i in the order of memory: up to ten times faster.
        residuals = (self.seen @ off.T.contiguous()).T.contiguous()
        weighted = self._unpack(residuals @ self.seen / self.sizes.measurements)
        return weighted.view_as(factors) @ factors

    def look(self, arm: str, step: int, factors: Tensor) -> Iterator[Row]:
        """Relative errors of every seed: training, validation, distance²."""
        off = self._pack(factors @ factors.mT) - self.truth
        values = {"distance2": off.square().sum(1) / self.truth.square().sum(1)}
        for measure, matrix in (("train", self.seen), ("validation", self.fresh)):
            values[measure] = (off @ matrix.T).square().mean(1) / (self.truth @ matrix.T).square().mean(1)
        for measure, column in values.items():
            for seed, value in enumerate(column.tolist()):
                yield "sensing", seed, arm, step, measure, value


def sensing(sizes: Sensing) -> list[Row]:
    """Gradient descent, one-point and NSO side by side: 4 gradients, one pass over the A_i a step.

    The noise is NSO's own; ``agreement`` is how far this stays from ``NSO.step`` over the first steps.
    """
    instance = Instance(sizes)
    rows: list[Row] = []
    gd, one, nso = (instance.start.clone() for _ in range(3))
    stepped = {flag: nn.Parameter(instance.start.clone()) for flag in (False, True)}
    wrapped = {flag: NSO(SGD([p], lr=sizes.rate), NOISE, two_point=flag) for flag, p in stepped.items()}
    source = NSO(SGD([nn.Parameter(instance.start.clone())], lr=sizes.rate), NOISE)
    for step in range(sizes.steps + 1):
        if step % sizes.every == 0:
            for arm, factors in (("gd", gd), ("one-point", one), ("nso", nso)):
                rows += instance.look(arm, step, factors)
        noise = source.perturbation((nso,), (NOISE,), 0)[0]
        source.steps += 1
        if noise is None or step == sizes.steps:
            break
        at_gd, at_one, plus, minus = instance.gradient(torch.stack([gd, one + noise, nso + noise, nso - noise]))
        gd, one, nso = gd - sizes.rate * at_gd, one - sizes.rate * at_one, nso - sizes.rate * (plus + minus) / 2
        if step < AGREE:
            for flag, ours in ((False, one), (True, nso)):
                wrapped[flag].step(lambda flag=flag: instance.loss(stepped[flag]))
                gap = float((stepped[flag].detach() - ours).norm() / ours.norm())
                rows.append(("sensing", -1, "nso" if flag else "one-point", step, "agreement", gap))
    return rows


@dataclass(frozen=True)
class Noise:
    """Sizes of the variance study."""

    seeds: int = 5
    hidden: int = 4
    samples: int = 200
    sigmas: tuple[float, ...] = (0.001, 0.005, 0.02, 0.05, 0.1)
    losses: int = 3000  # noise vectors for the loss
    gradients: int = 2500  # steps of NSO for the gradient


def small_network(sizes: Noise, seed: int) -> tuple[nn.Sequential, tuple[Tensor, Tensor]]:
    """Digits at 4 x 4 through one tanh layer, float64, half trained: neither g nor H is zero."""
    torch.manual_seed(seed)
    train, _ = datasets.digits()
    chosen = torch.randperm(len(train))[: sizes.samples]
    x = F.avg_pool2d(train.pixels[chosen].double() / 16, 2).flatten(1)
    y = train.targets[chosen]
    model = nn.Sequential(nn.Linear(16, sizes.hidden), nn.Tanh(), nn.Linear(sizes.hidden, 10)).double()
    optimizer = SGD(model.parameters(), lr=0.5)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return model, (x, y)


def variances(sizes: Noise, seed: int) -> list[Row]:
    """Of loss and gradient at every sigma, measured and by the law; the law's |H|² is hessdiag's dense Hessian.

    With T the third derivative, the gradient's law by the same Taylor series is
    one-point σ²‖H‖² + (σ⁴/2)‖T‖², two-point (σ⁴/2)‖T‖² alone.
    """
    model, (x, y) = small_network(sizes, seed)
    params = list(model.parameters())
    flat = torch.cat([p.detach().flatten() for p in params])
    names, shapes = [n for n, _ in model.named_parameters()], [p.shape for p in params]

    def loss(w: Tensor) -> Tensor:
        pieces = torch.split(w, [s.numel() for s in shapes])
        named = {n: p.view(s) for n, p, s in zip(names, pieces, shapes, strict=True)}
        return F.cross_entropy(functional_call(model, named, (x,)), y)

    g2 = float(grad(loss)(flat).square().sum())
    dense = hessdiag.hessian(Problem(model, {"train": (x, y)}, criterion="cross_entropy"), samples=len(x)).dense()
    h2 = float(dense.square().sum())
    t2 = float(jacfwd(hessian(loss))(flat).square().sum())
    batched = vmap(loss)
    generator = Generator().manual_seed(seed)
    rows: list[Row] = [
        ("variance", seed, "both", 0.0, name, v) for name, v in (("g2", g2), ("h2", h2), ("t2", t2))
    ]
    for sigma in sizes.sigmas:
        noise = torch.randn(sizes.losses, len(flat), dtype=flat.dtype, generator=generator) * sigma
        plus, minus = (torch.cat([batched(flat + s * u) for u in torch.split(noise, CHUNK)]) for s in (1.0, -1.0))
        here = loss(flat)
        for arm, found, law, slope_law in (
            ("one-point", plus - here, sigma**2 * g2 + sigma**4 / 2 * h2, sigma**2 * h2 + sigma**4 / 2 * t2),
            ("two-point", (plus + minus) / 2 - here, sigma**4 / 2 * h2, sigma**4 / 2 * t2),
        ):
            slopes = nso_gradients(sizes, model, (x, y), sigma, arm == "two-point", seed)
            measured = {
                "loss": float(found.var()),
                "loss law": law,
                "gradient": float(slopes.var(0).sum()),
                "gradient law": slope_law,
            }
            rows += [("variance", seed, arm, sigma, name, value) for name, value in measured.items()]
    return rows


def nso_gradients(
    sizes: Noise, model: nn.Module, data: tuple[Tensor, Tensor], sigma: float, two_point: bool, seed: int
) -> Tensor:
    """The gradients (draws, P) with which NSO would step, at weights that never move."""
    params = list(model.parameters())
    nso = NSO(SGD(params, lr=0.0), sigma, two_point=two_point, seed=seed)
    found = []
    for _ in range(sizes.gradients):
        nso.step(lambda: F.cross_entropy(model(data[0]), data[1]))
        found.append(torch.cat([p.grad.flatten() for p in params if p.grad is not None]))
    return torch.stack(found)
