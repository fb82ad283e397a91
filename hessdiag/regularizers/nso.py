"""Noise stability optimization: the gradient of the loss averaged over noise in the weights, by pairs w ± u."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.optim import Optimizer

from hessdiag.engine.products.ranks import Pieces
from hessdiag.engine.training.batch_loss import BatchLoss
from hessdiag.errors import UsageError
from hessdiag.regularizers.wrapper import Regularizer, Schedule
from hessdiag.spectral.probes import stream

Noise = Literal["normal", "uniform", "laplace"]


class NSO(Regularizer):
    """NSO (Zhang, Li and Ju, arXiv 2306.08553 v4, algorithm 1): min over w of F(w) = E L(w + u), u of variance σ².

    F = L + (σ²/2) tr ∇²L + O(σ⁴), so F penalises the trace of the Hessian. The step takes
    (1/2k) sum over j of [∇L(w + u_j) + ∇L(w − u_j)] on the same batch, an unbiased gradient of F: in each pair the
    noise of odd order cancels, which leaves the variance (σ⁴/2)|H|² of the loss without the one-point σ²|g|².

    The noise is the same on all ranks without communication, and after a resumption: it comes from streams named
    by (seed, step, draw), drawn on the parameters' device.

    Cost: 2k gradients (k with ``two_point=False``), and one more if 0 < mix < 1; with mix = 1, one.

    Args:
        optimizer: any torch optimizer but LBFGS; its weight decay and momentum act at w, not at w ± u.
        sigma: standard deviation of the noise in every weight, from 0; 0.01 is the paper's for CIFAR. A number or
            a function of the steps taken (`linear`, `exponential`); "sigma" in a parameter group overrides it.
        draws: k, the pairs per step.
        noise: "normal", "uniform" or "laplace", each of variance 1 times σ².
        two_point: False takes w + u only: the one-point method, the paper's baseline.
        mix: λ in [0, 1]: the step is λ ∇L(w) + (1 − λ) times the average. Where ∇L(w) is taken it comes first, so
            BatchNorm statistics are of w; otherwise they are of w + u_1.
        seed: of the noise.
        options: ``scaler``, ``clip_norm``, ``same_randomness``, ``model``, of `Regularizer`.
    """

    kept = ("seed",)  # with the number of steps it gives all further noise

    def __init__(
        self,
        optimizer: Optimizer,
        sigma: Schedule = 0.01,
        *,
        draws: int = 1,
        noise: Noise = "normal",
        two_point: bool = True,
        mix: float = 0.0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(optimizer, **options)
        if isinstance(draws, bool) or not isinstance(draws, int) or draws < 1:
            msg = f"draws={draws!r}: allowed: whole numbers from 1 up"
            raise UsageError(msg)
        if noise not in _LAWS:
            msg = f"noise={noise!r}: allowed: {', '.join(_LAWS)}"
            raise UsageError(msg)
        if not 0 <= mix <= 1:
            msg = f"mix={mix!r}: allowed: numbers from 0 (noise only) to 1 (the plain gradient)"
            raise UsageError(msg)
        self.sigma, self.draws, self.noise, self.two_point = sigma, draws, noise, two_point
        self.mix, self.seed = mix, seed
        self.scheduled("sigma", sigma)

    def regularized(self, batch: BatchLoss) -> Pieces:
        """λ ∇L(w) + (1 − λ) times the average over the noise."""
        sigmas = self.scheduled("sigma", self.sigma)
        signs = (1.0, -1.0) if self.two_point else (1.0,)
        share = (1 - self.mix) / (self.draws * len(signs))
        plain = self.mix == 1 or not any(sigmas)
        total = _added(None, batch.gradient(), 1.0 if plain else self.mix) if plain or self.mix else None
        for draw in range(0 if plain else self.draws):
            moves = self.perturbation(batch.params, sigmas, draw)
            for sign in signs:
                with batch.moved(moves, sign):
                    total = _added(total, batch.gradient(), share)
        return total or ()

    def perturbation(self, params: tuple[Tensor, ...], sigmas: tuple[float, ...], draw: int) -> Pieces:
        """The noise u of this step's draw, one tensor per parameter; the same whenever and wherever asked."""
        seed = stream(self.seed, "nso", self.steps, draw).initial_seed()
        generators = {device: Generator(device).manual_seed(seed) for device in {p.device for p in params}}
        law = _LAWS[self.noise]
        return tuple(
            law(torch.empty_like(p, requires_grad=False), generators[p.device]).mul_(sigma)
            for p, sigma in zip(params, sigmas, strict=True)
        )


def linear(sigma: float, steps: int) -> Callable[[int], float]:
    """A schedule for `NSO`: from 0 to sigma over so many steps, then constant."""
    return partial(_linear, sigma, steps)


def exponential(sigma: float, steps: int, start: float = 1e-5) -> Callable[[int], float]:
    """A schedule for `NSO`: from ``start`` to sigma geometrically over so many steps, then constant."""
    return partial(_exponential, sigma, steps, start)


def _linear(sigma: float, steps: int, step: int) -> float:
    return sigma * min(step / steps, 1.0)


def _exponential(sigma: float, steps: int, start: float, step: int) -> float:
    return float(start * (sigma / start) ** min(step / steps, 1.0))


def _added(total: Pieces | None, gradient: Pieces, share: float) -> Pieces:
    """Total + share · gradient; a parameter without a gradient in every pass stays None."""
    held = total or (None,) * len(gradient)
    return tuple(
        a if g is None else g * share if a is None else a.add_(g, alpha=share)
        for a, g in zip(held, gradient, strict=True)
    )


def _normal(out: Tensor, generator: Generator) -> Tensor:
    return out.normal_(generator=generator)


def _uniform(out: Tensor, generator: Generator) -> Tensor:
    return out.uniform_(-math.sqrt(3), math.sqrt(3), generator=generator)


def _laplace(out: Tensor, generator: Generator) -> Tensor:
    # An exponential of mean 1/√2 with a random sign has variance 1.
    signs = torch.empty_like(out).uniform_(-1, 1, generator=generator).sign_()
    return out.exponential_(math.sqrt(2), generator=generator).mul_(signs)


_LAWS = {"normal": _normal, "uniform": _uniform, "laplace": _laplace}
