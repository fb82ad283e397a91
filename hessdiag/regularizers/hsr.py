"""Hessian spectral range: the loss and the Wolkowicz-Styan bound on its Hessian's largest eigenvalue go down."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hessdiag.engine.products.ranks import Pieces
from hessdiag.engine.products.real_pairs import real
from hessdiag.engine.training.batch_loss import BatchLoss, Method
from hessdiag.engine.training.training import norm
from hessdiag.errors import Refused, UsageError
from hessdiag.regularizers.batch_network import BatchNetwork
from hessdiag.regularizers.bound_by_probes import BOUNDS, Bounded, bound_by_probes
from hessdiag.regularizers.curvature_penalty import CurvaturePenalty, finite
from hessdiag.regularizers.schedules import Schedule
from hessdiag.regularizers.wrapped import whole

Rule = Literal["penalty", "direction", "alternating"]
Traces = Literal["auto", "closed_form", "probes"]
PROBE = 7.5  # gradients: a product and a third derivative
WORTH = 2.0  # what "auto" pays for exact traces, in costs of estimated ones


class HSR(CurvaturePenalty):
    """Steps along the steepest descent of the Wolkowicz-Styan bound U (Omae et al., arXiv 2606.28662, abstract).

    U = m + s √(P−1) ≥ λ_max with m = T₁/P, s² = T₂/P − m², Tⱼ = tr Hʲ; "spread" takes s √(2P) ≥ λ_max − λ_min
    instead. Both have the gradient α ∇T₁ + β ∇T₂. The paper's update rule is not in its abstract; the candidates:

    * "penalty": the gradient is ∇L + mu ∇U;
    * "direction": ∇L + mu ∇U / |∇U|, free of U's scale;
    * "alternating": w ← w − mu ∇U / |∇U|, then a step of the loss alone from there.

    T₁, T₂ and their gradients are exact where ``model`` is a three-layer network and the closure's loss the mean
    cross-entropy of its outputs (both checked on values, at every step); elsewhere from products, with k random
    sign vectors v: α v·Hv + β |Hv|² has the gradient of v·H(αv + 2βHv). That gradient is biased by O(1/k).

    H is the batch's: tr H_B² exceeds tr H² (by 37% at 128 of 400 samples, measured), so full batches are the safe
    choice. U falls too where output weights shrink or the activation saturates: watch the loss. s = 0 (H = mI, or
    one parameter): s has its minimum there and counts as constant. ∇U = 0: no direction, no move.

    Cost: closed form: 1 gradient, and the closed form's own. Probes: 1 pass with its graph kept (1.3 to 2
    gradients), per probe 1 product (1.5 to 2.6) and 1 third derivative (about 5 exact; by differences 2 passes
    with a product each). "alternating": 1 gradient more. mu = 0: 1 gradient.
    On ResNet-20 with 1 probe: 12, with ``every=4``: 4.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> own = HSR(torch.optim.SGD([w], lr=0.01), mu=0.1)
    >>> loss = own.step(lambda: (w**4).sum() / 4)
    >>> round(own.report["bound"], 3)
    12.0

    Args:
        optimizer: any torch optimizer but LBFGS.
        model: what the closure calls, for the closed form; None always takes probes.
        mu: strength: of the penalty; relative to a unit vector for "direction"; a length for "alternating".
            0.003 to 0.03 in small trials here; the paper's is not in its abstract.
        rule: as above.
        bound: "upper" or "spread".
        traces: "closed_form" refuses where that does not apply; "auto" takes probes there, from then on, and also
            where the closed form's predicted cost is more than twice that of the probes, 1.5 + 7.5 k gradients (it
            grows with N²: at N = 1,000 of 64 features, 64 units and 10 classes it is about 500 gradients).
        probes: k.
        third: "auto", "exact" or "difference", of `CurvaturePenalty`.
        seed: of the probes.
        options: of `Regularizer`.

    Attributes:
        value: of the bound in the last step, exact or estimated; NaN before the first.
        reason: why the closed form does not apply or is not worth its cost, or "".
    """

    def __init__(
        self,
        optimizer: Optimizer,
        model: nn.Module | None = None,
        mu: Schedule = 0.01,
        *,
        rule: Rule = "penalty",
        bound: Bounded = "upper",
        traces: Traces = "auto",
        probes: int = 4,
        third: Method = "auto",
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(optimizer, mu, third=third, seed=seed, **options)
        allowed = {"rule": (rule, get_args(Rule)), "bound": (bound, BOUNDS), "traces": (traces, get_args(Traces))}
        for name, (value, names) in allowed.items():
            if value not in names:
                msg = f"{name}={value!r}: allowed: {', '.join(names)}"
                raise UsageError(msg)
        if model is not None and not isinstance(model, nn.Module):
            msg = f"model is {type(model).__name__}: a torch.nn.Module is needed, or None for probes"
            raise UsageError(msg)
        self.rule, self.bound, self.traces, self.probes = rule, bound, traces, whole("probes", probes)
        self.value, self.reason = math.nan, ""
        if model is None:
            self.reason = "no model was given"
        elif traces == "probes":
            self.reason = "probes were asked for"
        elif self._scaler is not None:
            self.reason = "a GradScaler is used"
        self._network = None if model is None else BatchNetwork(model)
        self._shift: Pieces | None = None

    def between(self, batch: BatchLoss) -> Pieces:
        """The plain gradient."""
        self._shift = None
        return super().between(batch)

    def regularized(self, batch: BatchLoss) -> Pieces:
        """The rule's gradient; for "alternating" also the move that comes before the step."""
        self._shift = None
        if not any(self.scheduled("mu", self.mu)):
            return batch.gradient()
        found = self._closed_form(batch) or bound_by_probes(self, batch, self.bound, self.probes)
        gradient, grad, value = found
        grad = finite("bound's gradient", grad)
        if self.rule == "penalty":
            gradient = self.penalised(gradient, grad)
        elif length := norm(grad):
            if self.rule == "direction":
                gradient = self.penalised(gradient, grad, 1 / length)
            else:
                still = tuple(None if g is None else torch.zeros_like(g) for g in gradient)
                shift = self.penalised(still, grad, -1 / length)
                with batch.moved(shift):
                    gradient = batch.gradient()
                self._shift = shift
        self.value = value
        penalty = {"penalty": max(self.scheduled("mu", self.mu)) * value} if self.rule == "penalty" else {}
        self._measured = {"bound": value} | penalty
        return gradient

    def _closed_form(self, batch: BatchLoss) -> tuple[Pieces, Pieces, float] | None:
        """∇L, ∇U and U, exactly; or None, the reason kept."""
        if self._network is not None and not self.reason:
            most = WORTH * (1.5 + PROBE * self.probes) if self.traces == "auto" else math.inf
            gradient, found = self._network.traces(batch, most)
            if not isinstance(found, Refused):
                quantity = BOUNDS[self.bound]
                return gradient, self._network.pieces(found.gradient(quantity)), found.value(quantity)
            self.reason = found.reason
        if self.traces == "closed_form":
            msg = f"traces='closed_form' does not apply: {self.reason}; traces='auto' takes probes there"
            raise UsageError(msg)
        return None

    def _move(self, params: tuple[Tensor, ...], scaler: torch.amp.GradScaler | None = None) -> None:
        if self._shift is not None:
            with torch.no_grad():
                for param, move in zip(params, self._shift, strict=True):
                    real(param).add_(0.0 if move is None else move)
            self._shift = None
        super()._move(params, scaler)
