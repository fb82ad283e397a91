"""Sums of gradients in pieces, one per parameter, None where a parameter takes no part."""

from __future__ import annotations

from torch import Tensor

from hessdiag.engine.products.ranks import Pieces


def added(total: Pieces | None, pieces: Pieces, share: float) -> Pieces:
    """Total + share · pieces, as new tensors; a None counts as zero beside a tensor."""
    held = total or (None,) * len(pieces)
    return tuple(
        a if g is None else g * share if a is None else a + g * share for a, g in zip(held, pieces, strict=True)
    )


def fitting(pieces: Pieces | None, params: tuple[Tensor, ...]) -> Pieces | None:
    """Tensors of an earlier step like the parameters, if they still fit them; else None."""
    if pieces is None or len(pieces) != len(params):
        return None
    if any(a is not None and a.shape != p.shape for a, p in zip(pieces, params, strict=True)):
        return None
    return tuple(None if a is None else a.to(p.device, p.dtype) for a, p in zip(pieces, params, strict=True))
