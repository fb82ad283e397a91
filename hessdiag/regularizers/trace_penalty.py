"""The loss plus mu times the trace of its Hessian, by random probes."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from hessdiag.engine.products.ranks import Pieces
from hessdiag.engine.training.batch_loss import BatchLoss, Method
from hessdiag.regularizers.curvature_penalty import CurvaturePenalty
from hessdiag.regularizers.schedules import Schedule
from hessdiag.regularizers.wrapped import whole


class TracePenalty(CurvaturePenalty):
    """min over w of L + mu tr ∇²L: the deterministic twin of label noise (Gatmiry et al., arXiv 2306.13239).

    The gradient of tr H = E v·Hv (Hutchinson, random signs v) is the mean over probes of the gradient of v·Hv at
    constant v, unbiased for any number of probes; the trace is linear in the samples, so mini-batches add no bias
    either. `NSO` with sigma² = 2 mu descends the same to fourth order in sigma; `LabelNoise` does on average, with
    mu = (learning rate) sigma² / (2 · batch size). tr H may be negative, and L + mu tr H then unbounded below: it
    is meant near interpolation, with mu going to 0. H constant: the penalty's gradient is 0.

    Cost: exact: 1 pass with its graph kept (1.3 to 2 gradients) and per probe about 5 gradients; by differences:
    1 + 2 · probes gradients, without second derivatives (any layer, any attention kernel).
    mu = 0: 1 gradient.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> own = TracePenalty(torch.optim.SGD([w], lr=0.01), mu=0.1)
    >>> loss = own.step(lambda: (w**4).sum() / 4)
    >>> round(own.report["trace"], 3)
    15.0

    Args:
        optimizer: any torch optimizer but LBFGS.
        mu: strength; sigma² / 2 does what `NSO` does at sigma (0.03 to 0.1: mu 0.0005 to 0.005); 0.001
            recovers low-rank matrices in deep factorization.
        probes: random vectors per step.
        third: "auto", "exact" or "difference", of `CurvaturePenalty`.
        seed: of the probes.
        options: of `Regularizer`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        mu: Schedule = 1e-3,
        probes: int = 1,
        *,
        third: Method = "auto",
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(optimizer, mu, third=third, seed=seed, **options)
        self.probes = whole("probes", probes)

    def regularized(self, batch: BatchLoss) -> Pieces:
        """∇L + mu · mean over probes of ∇(v·Hv)."""
        if not any(self.scheduled("mu", self.mu)):
            return batch.gradient()
        curved = None if self.third == "difference" else batch.curved()
        here = batch.gradient() if curved is None else curved.gradient
        total, forms = here, list[float]()
        for draw in range(self.probes):
            v = self.signs(batch.params, draw)
            grad = (
                self.second_difference(batch, here, v) if curved is None else self.form_gradient(batch, curved, v)
            )
            total = self.penalised(total, grad, 1 / self.probes)
            forms.append(batch.form)
        trace = sum(forms) / self.probes
        self._measured = {"penalty": max(self.scheduled("mu", self.mu)) * trace, "trace": trace}
        return total
