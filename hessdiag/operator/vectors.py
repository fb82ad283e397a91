"""What ``H @ v`` takes and gives back: tensors, arrays, and tensors in parameter shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hessdiag.errors import UsageError
from hessdiag.operator.symmetric import SymmetricOperator
from hessdiag.shown import listed

SHOWN = 3  # names in a refusal


def product(op: SymmetricOperator, other: Any) -> Any:
    """``op @ other`` in the form of ``other`` (see `SymmetricOperator.__matmul__`)."""
    if isinstance(other, Mapping):
        names = [name for name, _ in op.layout]
        if set(other) != set(names):
            lacking, foreign = (
                listed(sorted(map(str, left)), SHOWN)
                for left in (set(names) - set(other), set(other) - set(names))
            )
            said = " and ".join(
                text for text in (lacking and f"lacks {lacking}", foreign and f"has {foreign}") if text
            )
            msg = f"H @ dict: the dict {said}; its keys must be this operator's {len(names)} parameter names"
            raise UsageError(msg)
        images = dict(zip(names, _pieces(op, [other[name] for name in names]), strict=True))
        return {name: images[name] for name in other}
    if isinstance(other, list | tuple) and other and all(isinstance(piece, Tensor) for piece in other):
        found = _pieces(op, other)
        return tuple(found) if isinstance(other, tuple) else found
    if not isinstance(other, Tensor):
        return (op @ tensor_of(other, op)).to("cpu", torch.float64).numpy()
    require_real(other)
    if other.dim() == 1:
        return op.rows(other[None])[0]
    return op.rows(other.T).T


def tensor_of(array: Any, op: SymmetricOperator) -> Tensor:
    """Numbers as a tensor of the operator's dtype on its device.

    Raises:
        UsageError: they are complex, or no numbers.
    """
    require_real(array)
    if isinstance(array, np.ndarray):
        array = np.array(array, order="C")  # torch takes no array that runs backwards or is read-only
    try:
        return torch.as_tensor(array, dtype=op.dtype, device=op.device)
    except (TypeError, ValueError, RuntimeError) as error:
        msg = f"H @ {type(array).__name__}: products are with tensors or arrays of numbers, (d,) or (d, k), "
        raise UsageError(msg + "or with tensors in parameter shape") from error


def require_real(array: Any) -> None:
    """Refuse complex numbers, of which only the real part would be measured."""
    dtype = getattr(array, "dtype", None)
    complex_ = dtype.is_complex if isinstance(dtype, torch.dtype) else getattr(dtype, "kind", "") == "c"
    if complex_:
        msg = (
            f"{dtype} numbers: real ones are needed; the real form [[A, -B], [B, A]] of A + iB has its eigenvalues"
        )
        raise UsageError(msg)


def _pieces(op: SymmetricOperator, pieces: Sequence[Any]) -> list[Tensor]:
    """The product with one vector in pieces, in their shapes."""
    for piece in pieces:
        require_real(piece)
    shapes = [tuple(piece.shape) for piece in pieces]
    _require_shapes(op, shapes)
    flat = torch.cat([piece.detach().reshape(-1).to(op.device, op.dtype) for piece in pieces])
    images = torch.split(op.rows(flat[None])[0], [piece.numel() for piece in pieces])
    return [image.view(shape) for image, shape in zip(images, shapes, strict=True)]


def _require_shapes(op: SymmetricOperator, shapes: list[tuple[int, ...]]) -> None:
    given = [torch.Size(shape).numel() for shape in shapes]
    if len(op.layout) == 1 and not op.shapes:
        if sum(given) != op.size:
            msg = f"H @ {len(shapes)} tensors of {sum(given)} numbers in all: this operator is of size {op.size}"
            raise UsageError(msg)
        return
    if len(shapes) != len(op.layout):
        msg = f"H @ {len(shapes)} tensors: this operator has {len(op.layout)} parameters, "
        raise UsageError(msg + listed([name for name, _ in op.layout], SHOWN))
    wanted = op.shapes or [(size,) for _, size in op.layout]
    for (name, size), number, shape, right in zip(op.layout, given, shapes, wanted, strict=True):
        if number != size or (op.shapes and shape != tuple(right)):
            msg = f"H @ tensors: the one for {name or 'the first parameter'} has shape {shape}, not {tuple(right)}"
            raise UsageError(msg)
