"""A symmetric operator: all that the estimators ever see of a model.

``H @ v`` on a vector, a block or tensors in parameter shape, ``2 * H``, ``H - G``, ``H + damping * H.identity``,
``H ** 2``. Any operator goes to SciPy through `SymmetricOperator.to_scipy`.
"""

from __future__ import annotations

import math
import numbers
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
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
        shapes: of the pieces in their parameters' form; empty where they are not known.
        products: matrix-vector products formed so far, counted per vector.
        floor: relative rounding of a product, ‖error‖ / ‖Hv‖; measured by the engine, a guess elsewhere.
        block: most vectors that should travel together; the callers honour it.
        watch: called with ``products`` after every block, also of the products ``beside``, for progress displays.
        room: asked between products how many more may be formed before the end with what there is: a budget's, or
            none after an interrupt. It never looks at the products' values, so what was found until then is as
            unbiased as ever.
        beside: products with other operators, formed for this one's sake.
        semidefinite: whether it is known to have no negative eigenvalue.
        kept: what a killed run of the same measurement found (`hessdiag.resume.once`); None where nothing is kept.
        part: which entries of a vector this process holds: all, unless ranks share vectors.
        width: how many these are.
        added: makes sums over these entries those over all; None where all are here.
    """

    __array_ufunc__ = None  # arrays leave ``v @ H`` and ``2.0 * H`` to this class

    def __init__(
        self,
        size: int,
        *,
        dtype: torch.dtype = torch.float64,
        device: torch.device | str = "cpu",
        layout: tuple[tuple[str, int], ...] = (),
        shapes: Sequence[tuple[int, ...]] = (),
    ) -> None:
        self.size = size
        self.dtype = dtype
        self.device = torch.device(device)
        self.layout = layout or (("", size),)
        self.shapes = tuple(tuple(shape) for shape in shapes)
        self.products = 0
        self.floor = 16 * torch.finfo(dtype).eps
        self.block = 16
        self.watch: Callable[[int], None] | None = None
        self.room: Callable[[], float] | None = None
        self.beside = 0
        self.semidefinite = False
        self.kept: Any = None
        self.part, self.width = slice(0, size), size
        self.added: Callable[[Tensor], Tensor] | None = None

    @property
    def left(self) -> float:
        """Products that may still be formed; inf where nothing limits them."""
        return math.inf if self.room is None else self.room()

    @property
    def stopped(self) -> bool:
        """Whether to end with what there is."""
        return self.left < 1

    def granted(self, wanted: int, least: int = 1) -> int:
        """How many of the products wanted next may be formed, ``least`` at least."""
        return int(max(min(wanted, self.left), least))

    @property
    def shape(self) -> tuple[int, int]:
        """(d, d)."""
        return (self.size, self.size)

    @abstractmethod
    def multiply(self, rows: Tensor) -> Tensor:
        """What a subclass defines, and `rows` checks: products of rows (k, d), as rows of the operator's dtype."""

    def rows(self, rows: Tensor) -> Tensor:
        """Products of a block of row vectors, (k, d) to (k, d): the layout the estimators work in.

        The result is the caller's own, contiguous.

        Raises:
            UsageError: wrong shape.
            NonFiniteError: a product is NaN or infinite.
        """
        result, total = self.multiplied(rows)
        self.require_finite(float(total), result)
        return result

    def multiplied(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """As `rows`, with the sum of the products: for `require_finite`, when the caller reads other numbers."""
        if rows.dim() != 2 or rows.shape[1] != self.width:
            msg = f"a vector of shape {tuple(rows.shape)} was given to an operator of size {self.width}"
            raise UsageError(msg)
        given = rows.to(device=self.device, dtype=self.dtype)
        if not len(rows):
            return given, given.sum()
        result = self.multiply(given).contiguous()
        if result.untyped_storage().data_ptr() == given.untyped_storage().data_ptr():
            result = result.clone()  # the caller may write into it
        self.products += rows.shape[0]
        if self.watch is not None:
            self.watch(self.products)
        # what is not finite shows in the sum, which takes a tenth of the time of looking at each number
        return result, result.sum()

    def require_finite(self, total: float, result: Tensor) -> None:
        """Refuse products that `multiplied` gave with this sum, if one of them is not finite."""
        # the sum of finite numbers may overflow
        if not math.isfinite(total) and not bool(torch.isfinite(result).all()):
            msg = f"a product is not finite in {self.dtype}: the loss overflows here; try `dtype='float64'`"
            raise NonFiniteError(msg)

    @property
    def T(self) -> SymmetricOperator:
        """The transpose: a symmetric operator is its own."""
        return self

    @property
    def H(self) -> SymmetricOperator:
        """The adjoint: a real symmetric operator is its own."""
        return self

    @property
    def identity(self) -> SymmetricOperator:
        """I of this size, for ``H + damping * H.identity``; its products cost nothing."""
        from hessdiag.operator.powers import Identity

        return Identity(self)

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        """A vector (d,) by parameter name, each piece in its parameter's shape (views).

        A complex parameter's piece has a last dimension of 2: real and imaginary part.
        """
        pieces = torch.split(vector, [size for _, size in self.layout])
        shapes = self.shapes or [(size,) for _, size in self.layout]
        return {
            name: piece.reshape(shape) for (name, _), piece, shape in zip(self.layout, pieces, shapes, strict=True)
        }

    def __matmul__(self, other: Any) -> Any:
        """``H @ v``; the result has v's shape and kind. Costs a product per vector.

        Args:
            other: a vector (d,) or a block (d, k), as a tensor (comes back in the operator's dtype) or an array
                (in float64); a list or tuple of tensors in parameter shape, or a dict of them by parameter name
                (comes back as such); this operator, a multiple or a power of it (gives an operator).

        Raises:
            UsageError: another shape, other names, complex numbers, or another operator: H G is not symmetric.
        """
        from hessdiag.operator.powers import composed
        from hessdiag.operator.vectors import product

        return composed(self, other) if isinstance(other, SymmetricOperator) else product(self, other)

    def __rmatmul__(self, other: Any) -> Any:
        """``v @ H`` for v of shape (d,) or (k, d)."""
        return self @ other if getattr(other, "ndim", 1) == 1 else (self @ other.T).T

    def __pow__(self, exponent: int) -> SymmetricOperator:
        """``H ** n`` for a whole n >= 0: an operator whose products cost n of this one's."""
        from hessdiag.operator.powers import power

        return power(self, exponent)

    def __mul__(self, factor: Any) -> SymmetricOperator:
        """This operator times a real number."""
        from hessdiag.operator.combination import multiple

        return multiple(self, factor)

    __rmul__ = __mul__

    def __truediv__(self, divisor: Any) -> SymmetricOperator:
        if isinstance(divisor, numbers.Real) and divisor == 0:
            msg = "H / 0: an operator is divided by a real number that is not zero"
            raise UsageError(msg)
        return self.__mul__(1.0 / divisor)

    def __neg__(self) -> SymmetricOperator:
        return self * -1.0

    def __add__(self, other: Any) -> SymmetricOperator:
        """The sum with another operator or symmetric matrix of this size.

        Raises:
            UsageError: a number (``H + c`` could mean c in every entry or c I), or another size.
        """
        from hessdiag.operator.combination import total

        return total(self, 1.0, other)

    __radd__ = __add__

    def __sub__(self, other: Any) -> SymmetricOperator:
        from hessdiag.operator.combination import total

        return total(self, -1.0, other)

    def __rsub__(self, other: Any) -> SymmetricOperator:
        return (-self).__add__(other)

    def to_scipy(self) -> LinearOperator:
        """This operator as a SciPy ``LinearOperator`` in float64, for eigsh, cg, svds, expm_multiply ...."""
        from hessdiag.operator.conversion import to_scipy

        return to_scipy(self)

    def dense(self) -> Tensor:
        """The whole matrix (d, d), for small d: costs d products."""
        eye = torch.eye(self.size, dtype=self.dtype, device=self.device)
        parts = [self.rows(chunk) for chunk in torch.split(eye, self.block)]
        return torch.cat(parts)


@contextmanager
def full_precision() -> Iterator[None]:
    """Float32 products as float32, whatever the program around has allowed (TF32 leaves three digits)."""
    allowed = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(allowed)
