"""Complex parameters as pairs of real numbers, so that every formula of a step is of a real function of them."""

from __future__ import annotations

import torch
from torch import Tensor


def real(tensor: Tensor) -> Tensor:
    """A complex tensor (...) as real numbers (..., 2): real and imaginary parts; a real one as it is.

    A leaf gives a detached view on the same memory: what is written there, the leaf holds. Torch's gradient by a
    complex parameter is ∂L/∂Re + i ∂L/∂Im, so the pairs of the gradient are the gradient by the pairs.
    """
    if not tensor.is_complex():
        return tensor
    return torch.view_as_real((tensor.detach() if tensor.is_leaf else tensor).resolve_conj())


def like(piece: Tensor, param: Tensor) -> Tensor:
    """The inverse of `real` for a tensor that belongs to a parameter, in the parameter's dtype."""
    return (
        torch.view_as_complex(piece.contiguous()).to(param.dtype) if param.is_complex() else piece.to(param.dtype)
    )
