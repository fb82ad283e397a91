"""Label-noise SGD: fresh noise in the targets of every batch, a drift towards flat interpolating solutions."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

from hessdiag.engine.products.ranks import Pieces, ranks
from hessdiag.engine.training.batch_loss import BatchLoss
from hessdiag.errors import UsageError
from hessdiag.regularizers.schedules import Schedule
from hessdiag.regularizers.wrapper import Regularizer
from hessdiag.spectral.probes import stream


class LabelNoise(Regularizer):
    """Label-noise SGD (the algorithm of Gatmiry et al., arXiv 2306.13239; Blanc et al. 2020, Damian et al. 2021).

    The closure takes its targets through `targets`: y + σ ξ with fresh standard normal ξ at every step. For the
    mean squared error and SGD the drift along the solutions of zero loss is that of L + λ tr ∇²L with
    λ = (learning rate) σ² / (2 · batch size), see `penalty`; the training loss keeps a floor of σ².

        noisy = LabelNoise(optimizer, sigma=0.5)
        noisy.step(lambda: mse_loss(model(x), noisy.targets(y)))

    Cost: 1 gradient.

    >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> noisy = LabelNoise(torch.optim.SGD([w], lr=0.1), sigma=0.5)
    >>> loss = noisy.step(lambda: ((w - noisy.targets(torch.zeros(2))) ** 2).mean())
    >>> round(noisy.penalty(batch_size=2), 6)
    0.00625

    Args:
        optimizer: any torch optimizer but LBFGS; the theory is of plain SGD.
        sigma: standard deviation of the noise in a target: choose it by `penalty`, the mu it stands for; for class
            labels, the probability of a random label. A number or a schedule.
        seed: of the noise, which differs between ranks as their samples do.
        options: ``scaler``, ``clip_norm``, ``same_randomness``, ``model``, of `Regularizer`.
    """

    kept = ("seed",)  # with the number of steps it gives all further noise

    def __init__(self, optimizer: Optimizer, sigma: Schedule, *, seed: int = 0, **options: Any) -> None:
        super().__init__(optimizer, **options)
        if self.every > 1:
            msg = f"every={self.every}: LabelNoise costs one gradient a step, there is nothing to save: every=1"
            raise UsageError(msg)
        self.sigma, self.seed, self._calls = sigma, seed, 0
        self.scheduled("sigma", sigma)

    def regularized(self, batch: BatchLoss) -> Pieces:
        """The gradient of the loss on noisy targets.

        Raises:
            UsageError: the closure did not call `targets`.
        """
        self._calls = 0
        gradient = batch.gradient()
        if not self._calls:
            msg = "the closure did not call LabelNoise.targets: use loss(outputs, noisy.targets(y)) in it"
            raise UsageError(msg)
        return gradient

    def targets(self, y: Tensor, classes: int | None = None) -> Tensor:
        """Targets with this step's noise, to be called in the closure.

        Args:
            y: real targets of any shape, or class labels (integers).
            classes: how many there are, for labels only: with probability sigma a label is replaced by one drawn
                uniformly from all of them.

        Raises:
            UsageError: labels without ``classes``, or a probability above 1.
        """
        sigma = self.scheduled("sigma", self.sigma)[0]
        self._measured = {"sigma": sigma}
        rank = dist.get_rank() if ranks() > 1 else 0
        seed = stream(self.seed, "label_noise", self.steps, rank, self._calls).initial_seed()
        generator = torch.Generator(y.device).manual_seed(seed)
        self._calls += 1
        if y.is_floating_point():
            return y + sigma * torch.empty_like(y).normal_(generator=generator)
        if classes is None or classes < 2 or sigma > 1:
            msg = f"labels take targets(y, classes=10) and sigma, a probability up to 1; got {classes} and {sigma}"
            raise UsageError(msg)
        drawn = torch.randint(classes, y.shape, generator=generator, device=y.device, dtype=y.dtype)
        replaced = torch.rand(y.shape, generator=generator, device=y.device) < sigma
        return torch.where(replaced, drawn, y)

    def penalty(self, batch_size: int) -> float:
        """λ of the penalty λ tr ∇²L that this noise amounts to for the mean squared error, at the present step."""
        sigma = self.scheduled("sigma", self.sigma)[0]
        return float(self.inner.param_groups[0]["lr"]) * sigma**2 / (2 * batch_size)
