"""The same loss in other coordinates: θ = θ₀ + Aφ, so that the curvature at φ = 0 is AᵀHA."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from hessdiag.engine.products.functional import Functional
from hessdiag.errors import UsageError

Map = Callable[[Tensor], Tensor]


class Coordinates(Functional):
    """A function seen along chosen directions of some of its parameters; the others stay where they are.

    `Curvature` on it gives AᵀHA, AᵀGA or AᵀRA as an operator, and `gauss_newton_trace` its trace.
    """

    def __init__(self, base: Functional, maps: Mapping[str, Map]) -> None:
        """Choose the directions.

        Args:
            base: the function of θ.
            maps: parameter name to a linear map from tensors shaped like the parameter to the same shape; A is
                made of them, block by block.

        Raises:
            UsageError: no such parameter, or none given.
        """
        unknown = [name for name in maps if name not in base.names]
        if unknown or not maps:
            msg = f"coordinates for {', '.join(unknown) or 'no parameter'}: there are {', '.join(base.names[:5])}"
            raise UsageError(msg)
        self._base, self._maps = base, dict(maps)
        self.problem, self.device, self.dtype = base.problem, base.device, base.dtype
        self._model = base._model
        self.names = tuple(name for name in base.names if name in maps)
        shapes = dict(zip(base.names, base.theta, strict=True))
        self.theta = tuple(torch.zeros_like(shapes[name]).detach().requires_grad_() for name in self.names)
        self.layout = tuple((name, tensor.numel()) for name, tensor in zip(self.names, self.theta, strict=True))
        self.size = sum(size for _, size in self.layout)

    def total(self, theta: tuple[Tensor, ...], batch: Any) -> Tensor:
        """The batch's loss times what its mean stands for, at θ₀ + Aφ."""
        return self._base.total(self._moved(theta), batch)

    def outputs(self, theta: tuple[Tensor, ...], batch: Any) -> Tensor:
        """The model's outputs at θ₀ + Aφ."""
        return self._base.outputs(self._moved(theta), batch)

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """As for the function of θ: it is the one that calls the model."""
        with self._base.measuring():
            yield

    def returned(self, theta: tuple[Tensor, ...], batch: Any) -> Any:
        """Whatever the model returns at θ₀ + Aφ."""
        return self._base.returned(self._moved(theta), batch)

    def with_constant_outputs(self, theta: tuple[Tensor, ...], batch: Any) -> Tensor:
        """The batch's summed loss at θ₀ + Aφ, its outputs held constant."""
        return self._base.with_constant_outputs(self._moved(theta), batch)

    def _moved(self, phi: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        moves = dict(zip(self.names, phi, strict=True))
        pairs = zip(self._base.names, self._base.theta, strict=True)
        return tuple(
            origin.detach() + self._maps[name](moves[name]) if name in moves else origin.detach()
            for name, origin in pairs
        )
