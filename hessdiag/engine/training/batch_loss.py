"""One step's passes over one batch: weights moved and put back, statistics updated once, equal dropout masks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from hessdiag.engine.products.ranks import Pieces, mean_over_ranks, ranks
from hessdiag.engine.products.real_pairs import real
from hessdiag.engine.products.restoring import Randomness, Statistics, Weights
from hessdiag.engine.training.closures import Closures, closures
from hessdiag.engine.training.training import Curved, dot, loss_and_gradient, norm
from hessdiag.errors import NonFiniteError, UsageError

Method = Literal["auto", "exact", "difference"]
STEP = {torch.float64: 1e-5, torch.float32: 3e-3}  # |h v| / |θ| for differences of products
SECOND_STEP = {torch.float64: 1e-4, torch.float32: 1e-2}  # for second differences of gradients, about eps^(1/4)


class BatchLoss:
    """The loss of one batch as a function of the weights, for the passes of ONE step; a context manager.

    Leaving it puts the weights back bit for bit. BatchNorm statistics are those after the first pass, or after an
    exception those before it; later passes leave them alone.
    With ``same_randomness`` every pass draws the same random numbers (dropout masks agree), and torch's random
    state afterwards is as after one pass. Results are means over ranks, checked to be finite before anyone sees
    them, and unscaled.

    Attributes:
        params: what is differentiated by, complex ones as real pairs.
        weights: moves them; `moved` is the way.
        gradients: passes with a gradient so far.
        losses: of the passes so far, detached, means over ranks.
        form: v·Hv of the last `third`, free of cost; NaN before.
    """

    def __init__(
        self,
        closure: Closures,
        params: Sequence[Tensor],
        *,
        scale: float = 1.0,
        same_randomness: bool = True,
        model: nn.Module | None = None,
        backward_inside: bool = False,
    ) -> None:
        self._inside, self._alone = backward_inside, False
        self._leaves, self.params = tuple(params), tuple(real(param) for param in params)
        self._closure, self._scale = closure, scale
        self._randomness = Randomness(params) if same_randomness else None
        self.weights = Weights(self.params)
        self._model, self._statistics = model, Statistics(model)
        self.gradients, self.form = 0, math.nan
        self.losses: list[Tensor] = []

    @property
    def loss(self) -> Tensor | None:
        """Of the first pass, detached, the mean over ranks; None before."""
        return self.losses[0] if self.losses else None

    def __enter__(self) -> BatchLoss:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.weights.restore()
        if kind is None:
            self._statistics.commit()

    def moved(self, moves: Pieces, scale: float = 1.0) -> AbstractContextManager[None]:
        """A context in which the weights are θ₀ + scale · moves."""
        return self.weights.moved(moves, scale)

    def gradient(self) -> Pieces:
        """The gradient at the present weights, None for parameters that take no part; one gradient.

        Raises:
            NonFiniteError: NaN or infinity in loss or gradient.
            UsageError: the closure returns no fresh scalar loss, or no parameter takes part in it.
        """
        with self._pass():
            loss, pieces = loss_and_gradient(
                self._closure, self._leaves, scale=self._scale, backward_inside=self._inside
            )
        if self._alone:
            if ranks() == 1:
                self.checked(loss, pieces)
            self.losses.append(loss)
            return pieces
        loss, pieces = mean_over_ranks(loss, pieces, self.params)
        self.checked(loss, pieces)
        self.losses.append(loss)
        return pieces

    def parts(self) -> Iterator[BatchLoss]:
        """Each micro-batch of this rank as a batch of its own, with its own random numbers; statistics are shared.

        Their gradients are not averaged over ranks, and with several ranks not checked, which is left to
        `mean_of_parts`: what one rank alone refuses would leave the others waiting.
        """
        for closure in closures(self._closure):
            part = BatchLoss(
                closure,
                self._leaves,
                scale=self._scale,
                same_randomness=self._randomness is not None,
                model=self._model,
                backward_inside=self._inside,
            )
            part.weights, part._statistics, part._alone = self.weights, self._statistics, True
            yield part

    def mean_of_parts(self, parts: Sequence[BatchLoss], pieces: Pieces) -> Pieces:
        """A mean over this rank's micro-batches as the mean over ranks, checked as `gradient` is."""
        passes = zip(*(part.losses for part in parts), strict=True)
        means = [torch.stack(losses).mean() for losses in passes]
        self.gradients += len(means)
        first, averaged = mean_over_ranks(means[0], pieces, self.params)
        self.checked(first, averaged)
        self.losses += [first, *(mean_over_ranks(loss, (), ())[0] for loss in means[1:])]
        return averaged

    def curved(self) -> Curved:
        """The loss at the present weights with its graph kept, for products; 1.2 gradients. Raises alike."""
        if self._inside:
            msg = "products need the loss's graph, which backward_inside=True frees: return the loss only"
            raise UsageError(msg)
        with self._pass():
            curved = Curved(self._closure, self._leaves, scale=self._scale)
        self.checked(curved.loss, curved.gradient)
        self.losses.append(curved.loss)
        return curved

    def third(
        self, curved: Curved, v: Pieces, y: Pieces | None = None, *, method: Method = "auto"
    ) -> tuple[Tensor, ...]:
        """The gradient of v·H y, v and y constant (y = v by default), at the step's own weights.

        Args:
            curved: taken at the step's own weights; used by the exact method.
            v: shaped like the parameters.
            y: the same.
            method: "exact" triple backward; "difference": [∇L(θ+hv) − 2∇L(θ) + ∇L(θ−hv)] / h² when y is None
                (2 gradients), else [H(θ+hy)v − H(θ−hy)v] / 2h (2 products with their graphs); "auto" is exact
                unless a layer is present whose third derivatives torch gets wrong. In float32, on a perceptron:
                exact to 3e-7, differences of gradients to 1.5e-3, of products to 3e-5.
        """
        if method == "exact" or (method == "auto" and curved.third_order_is_exact):
            third = curved.third(v, y)
            self.form = curved.form
            return third
        if y is None:
            return self.second_difference(curved.gradient, v)
        h = _step(self.params, y, STEP)
        with self.moved(y, h):
            above = self.curved().product(v)
        with self.moved(y, -h):
            below = self.curved().product(v)
        return tuple((a - b) / (2 * h) for a, b in zip(above, below, strict=True))

    def second_difference(
        self, here: Pieces, v: Pieces, fractions: dict[torch.dtype, float] = SECOND_STEP
    ) -> tuple[Tensor, ...]:
        """[∇L(θ+hv) − 2∇L(θ) + ∇L(θ−hv)] / h², the gradient of v·Hv, from gradients alone: 2 more of them.

        Needs no second derivatives from torch.

        Args:
            here: ∇L(θ), at the step's own weights.
            v: shaped like the parameters.
            fractions: |hv| relative to |θ|, for each dtype.
        """
        h = _step(self.params, v, fractions)
        with self.moved(v, h):
            up = self.gradient()
        with self.moved(v, -h):
            down = self.gradient()
        self.form = (dot(up, v) - dot(down, v)) / (2 * h)
        sides = zip(self.params, up, here, down, strict=True)
        return tuple((_filled(p, a) - 2 * _filled(p, b) + _filled(p, c)) / h**2 for p, a, b, c in sides)

    @contextmanager
    def _pass(self) -> Iterator[None]:
        if self.gradients and self._randomness is not None:
            self._randomness.replay()
        with (Statistics(self._model) if self.gradients else self._statistics).held():
            self.gradients += 1
            yield

    def checked(self, loss: Tensor, pieces: Pieces) -> None:
        """Loss and gradient are finite, and there is a gradient, or it raises.

        Raises:
            UsageError: no parameter takes part in the loss.
            NonFiniteError: the loss or the gradient's norm is NaN or infinite.
        """
        if all(piece is None for piece in pieces):
            msg = "no parameter of the optimizer takes part in the loss: check which model the closure calls"
            raise UsageError(msg)
        for what, value in (("loss", float(loss)), ("gradient's norm", norm(pieces))):
            if not math.isfinite(value):
                msg = f"the {what} is {value} in pass {self.gradients} of the step; the weights were not changed"
                raise NonFiniteError(msg)


def _step(params: Sequence[Tensor], direction: Pieces, fractions: dict[torch.dtype, float]) -> float:
    """The factor that makes a direction a fixed fraction of |θ| long."""
    fraction = max(fractions.get(param.dtype, fractions[torch.float32]) for param in params)
    length = norm(direction)
    return fraction * (norm(tuple(param.detach() for param in params)) or 1.0) / length if length else 1.0


def _filled(param: Tensor, piece: Tensor | None) -> Tensor:
    return torch.zeros_like(param) if piece is None else piece
