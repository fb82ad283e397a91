"""What the caller has becomes an operator, and an operator becomes SciPy's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessdiag.errors import UsageError
from hessdiag.operator.symmetric import SymmetricOperator
from hessdiag.operator.vectors import require_real, tensor_of

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


class ClosureOperator(SymmetricOperator):
    """An operator from a function of a (d, k) block to a (d, k) block."""

    def __init__(self, matmat: Callable[[Tensor], Tensor], size: int, **options: Any) -> None:
        super().__init__(size, **options)
        self._matmat = matmat

    def multiply(self, rows: Tensor) -> Tensor:
        """Products by the function, copied: its answer may be memory of its own."""
        answer = self._matmat(rows.T)
        require_real(answer)
        product = answer.T.to(device=self.device, dtype=self.dtype)
        return product.clone(memory_format=torch.contiguous_format)


def as_operator(operator: Any) -> SymmetricOperator:
    """Make a `SymmetricOperator` of what the caller has.

    Args:
        operator: one already; a square matrix (tensor or array); a SciPy ``LinearOperator``; or any object
            with ``shape`` and ``@`` on tensors (a curvlinops operator).

    Raises:
        UsageError: nothing of these, not square, complex, or a matrix that is not symmetric.
    """
    if isinstance(operator, SymmetricOperator):
        return operator
    shape = tuple(getattr(operator, "shape", ()))
    if len(shape) != 2 or shape[0] != shape[1]:
        msg = f"{type(operator).__name__} of shape {shape}: a square matrix or linear operator is needed"
        raise UsageError(msg)
    size = int(shape[0])
    require_real(operator)
    if isinstance(operator, Tensor):
        return _from_matrix(operator)
    if type(operator).__module__.startswith(("scipy", "numpy")):
        return _from_scipy(operator, size)
    dtype = getattr(operator, "dtype", torch.float64)
    device = getattr(operator, "device", "cpu")
    return ClosureOperator(lambda block: operator @ block, size, dtype=dtype, device=device)


def _from_matrix(matrix: Tensor) -> SymmetricOperator:
    matrix = matrix.detach()
    matrix = matrix if matrix.is_floating_point() else matrix.double()
    scale = float(matrix.abs().max()) if matrix.numel() else 0.0
    asymmetry = float((matrix - matrix.T).abs().max()) if matrix.numel() else 0.0
    if asymmetry > 1e3 * torch.finfo(matrix.dtype).eps * scale:
        msg = f"the matrix is not symmetric (largest difference {asymmetry:.2g}): give (A + A.T) / 2"
        raise UsageError(msg)
    return ClosureOperator(lambda block: matrix @ block, matrix.shape[0], dtype=matrix.dtype, device=matrix.device)


def _from_scipy(operator: Any, size: int) -> SymmetricOperator:
    import numpy as np

    if isinstance(operator, np.ndarray):
        return _from_matrix(torch.from_numpy(np.array(operator, dtype=np.float64)))

    def matmat(block: Tensor) -> Tensor:
        product = np.asarray(operator @ block.cpu().double().numpy())
        require_real(product)
        return torch.from_numpy(product.astype(np.float64))

    return ClosureOperator(matmat, size)


def to_scipy(op: SymmetricOperator) -> LinearOperator:
    """The operator as a SciPy ``LinearOperator`` in float64."""
    import numpy as np
    from scipy.sparse.linalg import LinearOperator

    def multiply(array: Any) -> Any:
        block = tensor_of(np.asarray(array), op).reshape(op.size, -1)
        return (op @ block).to("cpu", torch.float64).numpy().reshape(np.shape(array))

    return LinearOperator(
        op.shape, matvec=multiply, rmatvec=multiply, matmat=multiply, rmatmat=multiply, dtype=np.float64
    )
