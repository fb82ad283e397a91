"""Noise stability optimization: the gradient of the loss averaged over noise in the weights, by pairs w ± u."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Generator, Tensor
from torch.optim import Optimizer

from hessdiag.engine.products.ranks import Pieces
from hessdiag.engine.training.batch_loss import BatchLoss
from hessdiag.engine.training.training import dot
from hessdiag.errors import UsageError
from hessdiag.regularizers.schedules import Schedule, exponential, linear
from hessdiag.regularizers.wrapped import between, whole
from hessdiag.regularizers.wrapper import Regularizer
from hessdiag.spectral.probes import stream

__all__ = ["NSO", "exponential", "linear"]  # the schedules were defined here

Noise = Literal["normal", "uniform", "laplace"]


class NSO(Regularizer):
    """NSO (Zhang, Li and Ju, arXiv 2306.08553 v4, algorithm 1): min over w of F(w) = E L(w + u), u of variance σ².

    F = L + (σ²/2) tr ∇²L + O(σ⁴), so F penalises the trace of the Hessian. The step takes
    (1/2k) sum over j of [∇L(w + u_j) + ∇L(w − u_j)] on the same batch, an unbiased gradient of F: in each pair the
    noise of odd order cancels, which leaves the variance (σ⁴/2)|H|² of the loss without the one-point σ²|g|².

    The noise is the same on all ranks without communication, and after a resumption: it comes from streams named
    by (seed, step, draw), drawn on the parameters' device.

    Cost: 2k gradients (k with ``two_point=False``), and one more if 0 < mix < 1; with mix = 1, one. So plain
    training's cost is half its epochs, and what is then gained may be early stopping: keep such an arm.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    >>> nso = NSO(torch.optim.SGD([w], lr=0.1), sigma=0.01)
    >>> loss = nso.step(lambda: w[0] ** 2 + 3 * w[1] ** 2)
    >>> [round(float(x), 3) for x in w.detach()]  # of a quadratic the pair's gradient is the plain one
    [0.8, 0.4]

    Args:
        optimizer: any torch optimizer but LBFGS; its weight decay and momentum act at w, not at w ± u.
        sigma: standard deviation of the noise in every weight, from 0: 0.008 to 0.014 for fine-tuning (the
            paper's range), 0.03 to 0.1 for small networks from scratch (tried here). A number or a schedule
            (`hessdiag.regularizers.schedules`); "sigma" in a parameter group overrides it.
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
        if noise not in _LAWS:
            msg = f"noise={noise!r}: allowed: {', '.join(_LAWS)}"
            raise UsageError(msg)
        self.sigma, self.draws, self.noise, self.two_point = sigma, whole("draws", draws), noise, two_point
        self.mix, self.seed = between("mix", mix, 0, 1), seed
        self.scheduled("sigma", sigma)

    def regularized(self, batch: BatchLoss) -> Pieces:
        """λ ∇L(w) + (1 − λ) times the average over the noise."""
        sigmas = tuple(math.sqrt(self.every) * sigma for sigma in self.scheduled("sigma", self.sigma))
        signs = (1.0, -1.0) if self.two_point else (1.0,)
        share = (1 - self.mix) / (self.draws * len(signs))
        plain = self.mix == 1 or not any(sigmas)
        total = _added(None, batch.gradient(), 1.0 if plain else self.mix) if plain or self.mix else None
        forms = []
        for draw in range(0 if plain else self.draws):
            moves = self.perturbation(batch.params, sigmas, draw)
            along = []
            for sign in signs:
                with batch.moved(moves, sign):
                    gradient = batch.gradient()
                    along.append(dot(gradient, moves))
                    total = _added(total, gradient, share)
            forms.append((along[0] - along[-1]) / 4)
        self._note(forms, sigmas)
        return total or ()

    def _note(self, forms: list[float], sigmas: tuple[float, ...]) -> None:
        """u·Hu / 2 of the pairs, whose mean is (σ²/2) tr H to fourth order; one point has no such estimate."""
        if not forms or not self.two_point:
            self._measured = {}
            return
        penalty = (1 - self.mix) * sum(forms) / len(forms)
        even = min(sigmas) == max(sigmas)
        trace = {"trace": 2 * sum(forms) / len(forms) / sigmas[0] ** 2} if even else {}
        self._measured = {"penalty": penalty / self.every} | trace

    def perturbation(self, params: tuple[Tensor, ...], sigmas: tuple[float, ...], draw: int) -> Pieces:
        """The noise u of this step's draw, one tensor per parameter; the same whenever and wherever asked."""
        seed = stream(self.seed, "nso", self.steps, draw).initial_seed()
        generators = {device: Generator(device).manual_seed(seed) for device in {p.device for p in params}}
        law = _LAWS[self.noise]
        return tuple(
            law(torch.empty_like(p, requires_grad=False), generators[p.device]).mul_(sigma)
            for p, sigma in zip(params, sigmas, strict=True)
        )


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
