"""Random vectors from named streams: the same name gives the same numbers, on every device.

A stream is seeded by a hash of (seed, names), never by ``seed + i``, so seed 1 shares nothing with seed 0.
One stream per parameter name: a probe's entries for a parameter do not change when another joins the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Generator, Tensor

from hessdiag.hashing import sha256
from hessdiag.operator import SymmetricOperator


def stream(seed: int, *names: str | int) -> Generator:
    """A CPU generator of its own for (seed, names).

    Args:
        seed: the user's seed.
        names: what the numbers are for: a quantity, a probe's index, a parameter.
    """
    parts = [str(part).encode() for part in (seed, *names)]
    # Lengths go in too, or ("ab", "c") and ("a", "bc") would be one stream.
    text = b"".join(len(part).to_bytes(8, "big") + part for part in parts)
    generator = torch.Generator()
    generator.manual_seed(int.from_bytes(sha256(text).digest()[:8], "big", signed=True))
    return generator


def sphere(op: SymmetricOperator, seed: int, quantity: str, index: int) -> Tensor:
    """A vector uniform on the unit sphere: normals per piece of the layout, drawn and normalised in float64.

    Args:
        op: gives size, layout, dtype and device.
        seed: the user's seed.
        quantity: names the stream, "extremes" or "forms".
        index: of the probe.

    Returns:
        Shape (d,), unit length, in the operator's dtype and on its device.
    """
    if op.width < op.size:
        part, square = _draw_part(op, seed, quantity, index, _normal)
        return part.div_(max(math.sqrt(square), 1e-300)).to(device=op.device, dtype=op.dtype)
    unit: Tensor = torch.nn.functional.normalize(_draw(op, seed, quantity, index, _normal), dim=0)
    return unit.to(device=op.device, dtype=op.dtype)


def rademacher(op: SymmetricOperator, seed: int, quantity: str, index: int) -> Tensor:
    """A vector of random signs ±1, shape (d,); arguments as for `sphere`."""
    if op.width < op.size:
        return _draw_part(op, seed, quantity, index, _signs)[0].to(op.device).to(op.dtype)
    # a byte an entry travels
    return _draw(op, seed, quantity, index, _signs).to(op.device).to(op.dtype)


def _draw(
    op: SymmetricOperator,
    seed: int,
    quantity: str,
    index: int,
    numbers: Callable[[int, Generator], Tensor],
) -> Tensor:
    return torch.cat([numbers(size, stream(seed, quantity, index, name)) for name, size in op.layout])


def _draw_part(
    op: SymmetricOperator,
    seed: int,
    quantity: str,
    index: int,
    numbers: Callable[[int, Generator], Tensor],
) -> tuple[Tensor, float]:
    """What this rank holds of it, drawn tensor by tensor, and the square of the whole one's length."""
    begin, square, parts = 0, 0.0, []
    for name, size in op.layout:
        drawn = numbers(size, stream(seed, quantity, index, name))
        square += float(drawn.double().square().sum())
        parts.append(drawn[max(op.part.start - begin, 0) : max(op.part.stop - begin, 0)].clone())
        begin += size
    return torch.cat(parts), square


def _normal(size: int, generator: Generator) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float64)


def _signs(size: int, generator: Generator) -> Tensor:
    return torch.randint(2, (size,), generator=generator, dtype=torch.int8).mul_(2).sub_(1)
