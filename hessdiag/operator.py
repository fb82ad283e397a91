"""A symmetric operator: all that the estimators ever see of a model.

``H @ v`` on a vector (d,) or a block (d, k). Any matrix, SciPy ``LinearOperator``, curvlinops
operator or ``matvec`` closure becomes one through `as_operator`, and any operator goes back
to SciPy through `SymmetricOperator.to_scipy`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hessdiag.errors import NonFiniteError, UsageError

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


class SymmetricOperator(ABC):
    """A real symmetric d x d matrix known by its products.

    Attributes:
        size: d.
        dtype: of the vectors, float32 or float64.
        device: of the vectors.
        layout: (name, size) of consecutive pieces of a vector, so that random vectors can be drawn per
            parameter name; one nameless piece where there is no structure.
        products: matrix-vector products formed so far, counted per vector.
        floor: relative rounding of a product, ‖error‖ / ‖Hv‖; measured by the engine, a guess elsewhere.
        block: most vectors that should travel together; the callers honour it.
        watch: called with ``products`` after every block, for progress displays.
    """

    def __init__(
        self,
        size: int,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        layout: tuple[tuple[str, int], ...] = (),
    ) -> None:
        self.size = size
        self.dtype = dtype
        self.device = torch.device(device)
        self.layout = layout or (("", size),)
        self.products = 0
        self.floor = 16 * torch.finfo(dtype).eps
        self.block = 16
        self.watch: Callable[[int], None] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)."""
        return (self.size, self.size)

    @abstractmethod
    def _apply(self, rows: Tensor) -> Tensor:
        """Products with each row of ``rows`` (k, d), as rows (k, d) of the operator's dtype."""

    def rows(self, rows: Tensor) -> Tensor:
        """Products of a block of row vectors, (k, d) to (k, d): the layout the estimators work in.

        The result is the caller's own, contiguous.

        Raises:
            UsageError: wrong shape.
            NonFiniteError: a product is NaN or infinite.
        """
        if rows.dim() != 2 or rows.shape[1] != self.size:
            msg = f"a vector of shape {tuple(rows.shape)} was given to an operator of size {self.size}"
            raise UsageError(msg)
        if not len(rows):
            return rows.to(device=self.device, dtype=self.dtype)
        given = rows.to(device=self.device, dtype=self.dtype)
        result = self._apply(given).contiguous()
        if result.untyped_storage().data_ptr() == given.untyped_storage().data_ptr():
            result = result.clone()  # the caller may write into it
        self.products += rows.shape[0]
        if self.watch is not None:
            self.watch(self.products)
        # what is not finite shows in the sum, which takes a tenth of the time; a finite sum may still overflow
        if not bool(torch.isfinite(result.sum())) and not bool(torch.isfinite(result).all()):
            msg = f"a product is not finite in {self.dtype}: the loss overflows here; try --dtype float64"
            raise NonFiniteError(msg)
        return result

    def __matmul__(self, other: Tensor) -> Tensor:
        """``H @ v`` for v of shape (d,) or (d, k); the result has v's shape and the operator's dtype."""
        if other.dim() == 1:
            return self.rows(other[None])[0]
        return self.rows(other.T).T

    def to_scipy(self) -> LinearOperator:
        """This operator as a SciPy ``LinearOperator`` in float64, for eigsh and the like."""
        import numpy as np
        from scipy.sparse.linalg import LinearOperator

        def multiply(array: Any) -> Any:
            block = torch.as_tensor(np.asarray(array), dtype=self.dtype, device=self.device)
            flat = block.reshape(self.size, -1)
            return (self @ flat).to("cpu", torch.float64).numpy().reshape(np.shape(array))

        return LinearOperator(self.shape, matvec=multiply, matmat=multiply, dtype=np.float64)

    def dense(self) -> Tensor:
        """The whole matrix (d, d), for small d: costs d products."""
        eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
        parts = [self.rows(chunk) for chunk in torch.split(eye, self.block)]
        return torch.cat(parts)


class ClosureOperator(SymmetricOperator):
    """An operator from a function of a (d, k) block to a (d, k) block."""

    def __init__(self, matmat: Callable[[Tensor], Tensor], size: int, **options: Any) -> None:
        super().__init__(size, **options)
        self._matmat = matmat

    def _apply(self, rows: Tensor) -> Tensor:
        product = self._matmat(rows.T).T.to(device=self.device, dtype=self.dtype)
        return product.clone(memory_format=torch.contiguous_format)  # it may be the other's own


def as_operator(operator: Any) -> SymmetricOperator:
    """Make a `SymmetricOperator` of what the caller has.

    Args:
        operator: one already; a square matrix (tensor or array); a SciPy ``LinearOperator``; or any object
            with ``shape`` and ``@`` on tensors (a curvlinops operator).

    Raises:
        UsageError: nothing of these, not square, or a matrix that is not symmetric.
    """
    if isinstance(operator, SymmetricOperator):
        return operator
    shape = tuple(getattr(operator, "shape", ()))
    if len(shape) != 2 or shape[0] != shape[1]:
        msg = f"{type(operator).__name__} of shape {shape}: a square matrix or linear operator is needed"
        raise UsageError(msg)
    size = int(shape[0])
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
        return torch.from_numpy(np.asarray(operator @ block.cpu().double().numpy(), dtype=np.float64))

    return ClosureOperator(matmat, size)


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products as float32, whatever the program around has allowed (TF32 leaves three digits)."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)
