"""Spectral radius regularization: the loss plus mu times what the Hessian's spectral radius has above K."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

from hessdiag.engine.products.ranks import Pieces
from hessdiag.engine.training.batch_loss import BatchLoss, Method
from hessdiag.engine.training.training import Curved
from hessdiag.errors import UsageError
from hessdiag.regularizers.curvature_penalty import BatchHessian, CurvaturePenalty
from hessdiag.regularizers.schedules import Schedule
from hessdiag.regularizers.wrapped import whole
from hessdiag.spectral.lanczos import Lanczos
from hessdiag.spectral.probes import stream

FRESH = 0.05  # share of a new random direction in a warm start
# a tenth of what random directions want: v is the sharpest one (float32, digits: error 0.3%, at 1e-2 7%)
SHARP_STEP = {torch.float64: 2e-5, torch.float32: 2e-3}
FEWEST = 3  # products per step: with fewer a stale eigenvector would be confirmed by itself for ever


class SpectralRadius(CurvaturePenalty):
    """min over w of L + mu · max(0, rho − K), rho = max |λᵢ(∇²L)| (Sandler, Klabjan and Luo, arXiv 2102.11210).

    With λ the eigenvalue of largest modulus and v its unit eigenvector, ∇rho = sign(λ) ∇³L[v, v] by first-order
    perturbation theory (v counts as constant). Without the sign, a negative λ would be pushed further out. λ and v
    come from Lanczos (full reorthogonalization) on the batch's Hessian, started at the last step's v with a little
    of a new random direction, so that an eigenvalue that overtakes is found.

    Mini-batches: what is minimised is E_B of the penalty of the batch, and E_B rho_B ≥ rho of the full Hessian.
    Where |λ| is tied, rho has no gradient; any vector of the tied space gives a generalized one. H = 0 (a linear
    loss) and rho ≤ K: no penalty. H constant (a quadratic loss): the penalty's gradient is 0.

    Not converged after ``iterations`` products (|Hv − θv| > tolerance · |θ|): the Ritz vector serves all the same
    ("use": |v·Hv| ≤ rho, so what is pushed down is a lower bound of rho, whose gradient is off by about
    residual / gap) or the step is taken without a penalty ("skip", the paper's code); either way the next step
    goes on from v. Warm starts took 6 products (median), at most 14, in 200 Adam steps on digits, batches of 100.

    Cost: 1 pass with its graph kept (1.3 to 2 gradients), 3 to ``iterations`` products (1.5 to 2.6 each), and
    where rho > K one third derivative (about 5 exact; 2 by differences): 13 in all on ResNet-20 with 3 products.
    mu = 0: 1 gradient. ``every=4``: 4. Memory: iterations + 1 vectors.

    >>> import torch
    >>> w = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    >>> own = SpectralRadius(torch.optim.SGD([w], lr=0.01), mu=0.1)
    >>> loss = own.step(lambda: (w**4).sum() / 4)
    >>> round(own.report["lambda"], 3)
    12.0

    Args:
        optimizer: any torch optimizer but LBFGS.
        mu: strength; the paper's runs use 0.001 to 0.1.
        K: what rho may be for free, from 0 (always penalised); a number or a function of the steps taken.
        iterations: most products per step.
        tolerance: relative residual at which v has converged.
        unconverged: "use" or "skip".
        third: "auto", "exact" or "difference", of `CurvaturePenalty`.
        seed: of start vectors.
        options: of `Regularizer`.

    Attributes:
        eigenvalue: λ of the last step's batch, with its sign; NaN before the first.
        residual: |Hv − λv| / |λ| of the last step.
        converged: whether that was within the tolerance.
        vector: v of the last step, (P,); None before the first.
    """

    second_step = SHARP_STEP
    kept = ("seed", "vector")

    def __init__(
        self,
        optimizer: Optimizer,
        mu: Schedule = 0.01,
        K: Schedule = 0.0,
        *,
        iterations: int = 20,
        tolerance: float = 1e-2,
        unconverged: Literal["use", "skip"] = "use",
        third: Method = "auto",
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(optimizer, mu, third=third, seed=seed, **options)
        self.K, self.iterations = K, whole("iterations", iterations)
        if isinstance(tolerance, bool) or not 0 < tolerance < 1:
            msg = f"tolerance={tolerance!r}: allowed: numbers between 0 and 1"
            raise UsageError(msg)
        if unconverged not in ("use", "skip"):
            msg = f"unconverged={unconverged!r}: allowed: use, skip"
            raise UsageError(msg)
        self.tolerance, self.unconverged = tolerance, unconverged
        self.eigenvalue, self.residual, self.converged = float("nan"), float("nan"), False
        self.vector: Tensor | None = None
        self.scheduled("K", K)

    def regularized(self, batch: BatchLoss) -> Pieces:
        """∇L + mu sign(λ) ∇³L[v, v] where |λ| > K."""
        if not any(self.scheduled("mu", self.mu)):
            return batch.gradient()
        curved = batch.curved()
        v, eigenvalue, residual = self.dominant(curved)
        converged = residual <= self.tolerance
        gradient = curved.gradient
        free = self.scheduled("K", self.K)[0]
        if abs(eigenvalue) > free and (converged or self.unconverged == "use"):
            grad = self.form_gradient(batch, curved, BatchHessian(curved).split(v))
            gradient = self.penalised(gradient, grad, 1.0 if eigenvalue > 0 else -1.0)
        self.vector, self.eigenvalue, self.residual, self.converged = v, eigenvalue, residual, converged
        penalty = max(self.scheduled("mu", self.mu)) * max(0.0, abs(eigenvalue) - free)
        self._measured = {"penalty": penalty, "lambda": eigenvalue, "residual": residual}
        return gradient

    def dominant(self, curved: Curved) -> tuple[Tensor, float, float]:
        """Unit v (P,), its λ of largest modulus with sign, and |Hv − λv| / |λ|."""
        op = BatchHessian(curved)
        generator = stream(self.seed, "SpectralRadius", self.steps)
        start = torch.randn(op.size, generator=generator, dtype=op.dtype)
        start = start.to(op.device) / start.norm()
        if self.vector is not None and len(self.vector) == op.size:
            start = self.vector.to(start) + FRESH * start
        run = Lanczos(op, start, self.iterations)
        while True:
            run.step()
            values, vectors = run.krylov().ritz
            best = int(abs(values).argmax())
            miss, size = run.beta * abs(float(vectors[-1, best])), abs(float(values[best]))
            done = run.size >= FEWEST and miss <= self.tolerance * size
            if run.exhausted or done or run.size >= self.iterations:
                residual = miss / size if size else 0.0
                return run.krylov().ritz_vectors([best])[0].clone(), float(values[best]), residual
