"""A basis that does not fit as it is: rows in half precision, in the memory of the host, or both.

What is computed stays in the operator's precision: rows are widened a window of columns at a time. A vector is
held as 16-bit floating-point numbers of about unit size with a scale of its own, so that each row has unit length:
off by 1.7e-4 of it (2⁻¹² per entry at most; bfloat16, whose range is of no use here, by eight times that).

What that rounding does to a run is measured, not guessed. A vector q is multiplied as it is held, so a step leaves
H q = Q (T eⱼ + c) + β (q' + δ) with q' what is held of the vector that follows: ‖βδ‖ is known when it is stored,
and c, what the product has along earlier rows beside T, when it is taken out. So the run is an exact one of H + E
with ‖E‖² ≤ Σ (‖βδ‖² + ‖c‖²) (Kahan 1967), and `Rows.error` is what a certificate of H has to be widened by. The
rows that a restart keeps are rounded anew, each by δ: there ‖(H − θ)δ‖ ≤ (‖H‖ + |θ|) ‖δ‖ has to do. A value comes
from a fresh product of a widened vector: its residual is as true as ever.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

COLUMNS = 1 << 17  # numbers widened at once where rows lie in the operator's memory: they stay in the cache
TRAVELLING = 1 << 23  # and where they come from another: a copy of 16 MiB or more runs at full speed
FEWEST_COLUMNS = 4096
HALF_ERROR = 2**-12
"""Of a row's length, at most, by rounding to 16 bits."""


@dataclass(frozen=True)
class Storage:
    """How a run holds its basis.

    Attributes:
        vectors: most of them, the residual aside; beyond, the run is restarted. None holds all.
        half: whether rows are held in half precision.
        on_host: whether they lie in the host's memory where the operator's is another.
        reason: why not the default, for the result; empty where it is.
    """

    vectors: int | None = None
    half: bool = False
    on_host: bool = False
    reason: str = ""

    def at_most(self, steps: int) -> int:
        """So many steps, or as many as take no restart."""
        return steps if self.vectors is None else min(steps, self.vectors)

    def rows(self, count: int, size: int, dtype: torch.dtype, device: torch.device) -> Tensor | Rows:
        """Memory for so many rows; rows not reached stay untouched, so on a CPU they take none."""
        if not self.half and not self.on_host:
            return torch.empty((count, size), dtype=dtype, device=device)
        home = torch.device("cpu") if self.on_host else device
        held = torch.float16 if self.half else dtype
        pinned = home.type == "cpu" and device.type != "cpu"
        data = torch.empty((count, size), dtype=held, device=home, pin_memory=pinned)
        return Rows(data, torch.ones(count, dtype=torch.float64), Account(), dtype, device)


class Account:
    """The squares of what storing has changed in a recurrence, summed."""

    def __init__(self) -> None:
        self.total = torch.zeros(1, dtype=torch.float64)

    @property
    def squares(self) -> float:
        """Their sum so far."""
        return float(self.total)

    @squares.setter
    def squares(self, value: float) -> None:
        self.total.fill_(value)


class Rows:
    """Rows of a basis as they are held; slices are views.

    Attributes:
        dtype: of the numbers that are computed with.
        device: where that is done.
        shape: (rows, d).
    """

    def __init__(
        self, data: Tensor, scales: Tensor, account: Account, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.dtype, self.device = dtype, device
        self._data, self._scales, self._account = data, scales, account
        self._unit = 1.0 / math.sqrt(data.shape[1]) if data.dtype == torch.float16 else 1.0

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, d)."""
        return len(self._data), self._data.shape[1]

    @property
    def error(self) -> float:
        """‖F‖ where H Q = Q T + β q eₖᵀ + F because of how rows are held."""
        return math.sqrt(self._account.squares)

    def held(self) -> dict[str, Tensor]:
        """All that they are, by name: what is written into these tensors takes their place."""
        return {"rows": self._data, "scales": self._scales, "squares": self._account.total}

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, key: Any) -> Any:
        """Rows by a slice; one row (d,) widened, by a number."""
        if isinstance(key, slice):
            return Rows(self._data[key], self._scales[key], self._account, self.dtype, self.device)
        return self._wide(self._data[key], float(self._scales[key]))

    def double(self) -> Tensor:
        """All of them in float64, for small d."""
        return torch.stack([self[index] for index in range(len(self))]).double()

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Windows of columns, each with all rows widened."""
        count, size = self.shape
        scales = self._scales.to(self.device, self.dtype)[:, None]
        most = COLUMNS if self._data.device == self.device else TRAVELLING
        width = max(FEWEST_COLUMNS, most // max(count, 1))
        for begin in range(0, size, width):
            part = slice(begin, min(begin + width, size))
            wide = self._data[:, part].to(self.device, non_blocking=True).to(self.dtype)
            yield part, wide.mul_(scales) if self._data.dtype == torch.float16 else wide

    def put(self, index: int, vector: Tensor, length: float, *, counts: bool = True) -> None:
        """Hold ``vector`` (d,), divided by its length; overwritten.

        Args:
            index: of the row.
            vector: of the operator.
            length: its norm.
            counts: whether the recurrence depends on it with that length.
        """
        vector.div_(length)
        off = self._hold(index, vector)
        self._account.squares += counts * (length * off) ** 2

    def account(self, off: Any) -> None:
        """Note what a product had along earlier rows that T does not have (numbers, as an array)."""
        self._account.squares += float((off**2).sum())

    def moved(self, source: int, target: int) -> None:
        """Copy a row as it is."""
        self._data[target].copy_(self._data[source])
        self._scales[target] = self._scales[source]

    def rotate(self, weights: Tensor, sizes: list[float]) -> None:
        """Turn all rows into ``weights`` (n, m) times them, in the first n.

        Args:
            weights: float64, orthonormal rows.
            sizes: of what each new row's rounding is multiplied with in the recurrence, at most.
        """
        count = len(weights)
        offs, squares = torch.zeros(2, count, dtype=torch.float64, device=self.device)
        weights = weights.to(self.device)
        for part, wide in self.parts():
            new = weights @ wide.double()
            held = (new / self._unit).to(self._data.dtype)
            back = held.double() * self._unit
            offs += (back - new).square().sum(1)
            squares += back.square().sum(1)
            self._data[:count, part] = held.to(self._data.device)
        if self._data.dtype == torch.float16:
            self._scales[:count] = (self._unit / squares.sqrt()).cpu()
        for size, off, square in zip(sizes, offs.tolist(), squares.tolist(), strict=True):
            self._account.squares += (size * (math.sqrt(off) + abs(1 - math.sqrt(square)))) ** 2

    def _hold(self, index: int, vector: Tensor) -> float:
        """Store a unit vector; how far what is held is from it."""
        row = self._data[index]
        if row.dtype != torch.float16:
            row.copy_(vector)
            return 0.0
        off, square = torch.zeros(2, dtype=torch.float64, device=vector.device)
        for begin in range(0, len(row), COLUMNS):
            part = slice(begin, begin + COLUMNS)
            exact = vector[part].double()
            held = (vector[part] / self._unit).to(row.dtype)
            row[part].copy_(held)
            back = held.double() * self._unit
            square += back.square().sum()
            off += (back - exact).square().sum()
        lost, length = torch.stack([off, square]).sqrt().tolist()
        self._scales[index] = self._unit / length
        return float(lost + abs(1 - length))

    def _wide(self, row: Tensor, scale: float) -> Tensor:
        wide = row.to(self.device).to(self.dtype)
        return wide.mul_(scale) if row.dtype == torch.float16 else wide.clone() if wide is row else wide


def hold(rows: Tensor | Rows, index: int, vector: Tensor, length: float) -> None:
    """Write ``vector`` / ``length`` into a row of a basis."""
    if isinstance(rows, Rows):
        rows.put(index, vector, length)
    else:
        torch.div(vector, length, out=rows[index])


def begin(rows: Tensor | Rows, start: Tensor, length: float) -> None:
    """Write the first vector of a run, which no recurrence depends on: any vector is as good a start."""
    first = (start.double() / length).to(rows.dtype)
    if isinstance(rows, Rows):
        rows.put(0, first, 1.0, counts=False)
    else:
        rows[0] = first


def row(rows: Tensor | Rows, index: int) -> Tensor | Rows:
    """One row as it is held, a view: of a tensor (d,)."""
    return rows[index : index + 1] if isinstance(rows, Rows) else rows[index]
