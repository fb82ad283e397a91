"""Means over the processes of ``torch.distributed``, so that every rank sees the same loss, gradient and norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

Pieces = tuple[Tensor | None, ...]


def ranks() -> int:
    """How many processes train together: 1 without an initialized process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_ranks(loss: Tensor, pieces: Pieces, params: Sequence[Tensor]) -> tuple[Tensor, Pieces]:
    """Loss and tensors shaped like the parameters, averaged over all ranks; one all-reduce per dtype and device.

    ``DistributedDataParallel`` averages in hooks that fire on ``.backward()`` but not on ``autograd.grad``, which
    every pass of a regularizer uses; so this is the only averaging there is, and nothing is averaged twice. A
    parameter that is used on some ranks only counts as zero on the others; one used nowhere stays None everywhere.

    Args:
        loss: scalar.
        pieces: one per parameter, None where it takes no part on this rank.
        params: gives shapes, dtypes and devices.
    """
    world = ranks()
    if world == 1:
        return loss, pieces
    used = [float(piece is not None) for piece in pieces]
    precise = torch.promote_types(loss.dtype, torch.float32)
    flags = torch.tensor(used, device=loss.device, dtype=precise)
    head = torch.cat([loss.detach().to(precise).reshape(1), flags])
    dist.all_reduce(head)
    filled = [
        torch.zeros_like(param) if piece is None else piece.contiguous().detach()
        for piece, param in zip(pieces, params, strict=True)
    ]
    for kind in {(piece.dtype, piece.device) for piece in filled}:
        members = [index for index, piece in enumerate(filled) if (piece.dtype, piece.device) == kind]
        row = torch.cat([filled[index].reshape(-1) for index in members])
        dist.all_reduce(row)
        parts = torch.split(row.div_(world), [filled[index].numel() for index in members])
        for index, part in zip(members, parts, strict=True):
            filled[index] = part.view_as(filled[index])
    anywhere = head[1:].tolist()
    averaged = tuple(piece if count else None for piece, count in zip(filled, anywhere, strict=True))
    return (head[0] / world).to(loss.dtype), averaged
