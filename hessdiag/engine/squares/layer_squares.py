"""‖J_nᵀ c‖² of one parameter tensor from what its layers saw and what came back, without the gradient itself.

A linear layer's gradient of one example is Σ_t δ_t a_tᵀ over its positions t (of a convolution: patches), and its
square ‖δ‖²‖a‖² with one position (Goodfellow, arXiv 1510.01799), else Σ_ts (a_t·a_s)(δ_t·δ_s) or the square of the
sum, whichever multiplies less. The norm identities make squares, never gradients; a tensor used by layers of
different kinds (an embedding that is the head, too) has its gradients added up.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessdiag.engine.squares.captured import BATCH_NORMS, CONVOLUTIONS, Call

CHUNK_BYTES = 2**24  # of gradients of one layer, for a moment: within a processor's cache
COLUMNS = 8  # that the products of positions serve, about


class Use:
    """One call of a layer that holds the tensor; what does not depend on the column is worked out once.

    Attributes:
        call: the call.
        attribute: "weight" or "bias".
        kind: "product" for Σ_t δ_t a_tᵀ, "rows" for an embedding's, "vector" for what is a sum of vectors.
        input: with one example per row.
    """

    def __init__(self, call: Call, attribute: str, examples: int) -> None:
        self.call, self.attribute = call, attribute
        self.module: Any = call.module  # a layer of one of the known types
        shared = call.role == "shared"
        self.input = call.input.expand(examples, call.input.shape[-1]) if shared else call.input
        self.kind = "vector"
        if attribute == "weight" and isinstance(self.module, nn.Embedding):
            self.kind = "rows"
        elif attribute == "weight" and isinstance(self.module, nn.Linear | nn.Conv1d | nn.Conv2d):
            self.kind = "product"

    @cached_property
    def right(self) -> Tensor:
        """What the slopes are multiplied by: a (n, groups, in, T); or the normalised input."""
        if self.kind != "product":
            return _normalized(self.call, self.input)
        if isinstance(self.module, nn.Linear):
            flat = self.input.flatten(1, -2) if self.input.dim() > 2 else self.input[:, None]
            return flat.transpose(1, 2)[:, None]
        return _patches(self.module, self.input)

    @cached_property
    def places(self) -> Tensor:
        """a_t·a_s, (n, groups, T, T)."""
        return self.right.transpose(2, 3) @ self.right

    @cached_property
    def first(self) -> Tensor:
        """Where each id stands for the first time in its example, (n, T)."""
        ids = self.input.flatten(1)
        return (ids[:, :, None] == ids[:, None, :]).to(torch.uint8).argmax(2)

    def left(self, slopes: Tensor) -> Tensor:
        """Slopes (n, columns, ...) as δ (n, columns, groups, out, T)."""
        if isinstance(self.module, nn.Linear):
            flat = slopes.flatten(2, -2) if slopes.dim() > 3 else slopes[:, :, None]
            return flat.transpose(2, 3)[:, :, None]
        return slopes.reshape(*slopes.shape[:2], self.module.groups, -1, slopes[0, 0, 0].numel())


Slopes = Sequence[tuple[Use, Tensor]]  # each with the gradient by its output, (examples, columns, ...)


def squares(uses: Slopes) -> Tensor:
    """‖J_nᵀ c‖² of a tensor, (examples, columns) float64, from all of its uses."""
    kinds = {use.kind for use, _ in uses}
    if len(uses) == 1 and kinds == {"rows"}:
        use, slopes = uses[0]
        return _placed(use, slopes, use.first)
    if len(uses) == 1 and kinds == {"product"}:
        use, slopes = uses[0]
        left = use.left(slopes)
        out, length, entries = *left.shape[3:], use.right.shape[2]
        if length > 1 and length * (entries / COLUMNS + out) < out * entries:
            return _by_places(left, use.places)
        return _product_squares(left, use.right)
    if kinds == {"product"}:
        left = torch.cat([use.left(slopes) for use, slopes in uses], dim=-1)
        return _product_squares(left, torch.cat([use.right for use, _ in uses], dim=-1))
    if kinds == {"vector"}:
        return _norm(sum((_vector(use, slopes) for use, slopes in uses[1:]), _vector(*uses[0])))
    return _of_tables(uses)


def _norm(gradients: Tensor) -> Tensor:
    return gradients.square().sum(-1).double()


def _patches(module: Any, entry: Tensor) -> Tensor:
    """What a convolution multiplies its weights by, (n, groups, in · kernel, T).

    A copy of a strided view: six times as fast as `torch.nn.functional.unfold` on one thread.
    """
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    if any(module._reversed_padding_repeated_twice):
        entry = F.pad(entry, module._reversed_padding_repeated_twice, mode=mode)
    entry = entry.contiguous()
    n, channels, *lengths = entry.shape
    steps = entry.stride()[2:]
    spans = zip(lengths, module.kernel_size, module.dilation, module.stride, strict=True)
    places = [(length - d * (k - 1) - 1) // s + 1 for length, k, d, s in spans]
    size = (n, channels, *module.kernel_size, *places)
    within = [d * step for d, step in zip(module.dilation, steps, strict=True)]
    across = [s * step for s, step in zip(module.stride, steps, strict=True)]
    view = entry.as_strided(size, (*entry.stride()[:2], *within, *across))
    return view.reshape(n, module.groups, math.prod(size[1 : -len(places)]) // module.groups, -1)


def _product_squares(left: Tensor, right: Tensor) -> Tensor:
    """‖Σ_t δ_t a_tᵀ‖², (n, columns), of δ (n, columns, groups, out, T) and a (n, groups, in, T)."""
    if left.shape[-1] == 1:
        return torch.einsum("nkg,ng->nk", _norm(left.flatten(3)), _norm(right.flatten(2)))
    step = max(1, CHUNK_BYTES // (left[0, 0, :, :, 0].numel() * right.shape[2] * left.element_size()))
    parts = zip(torch.split(left.transpose(3, 4), step), torch.split(right, step), strict=True)
    # a column at a time: one matrix product for all of them needs a copy of their slopes. And in this order, five
    # times as fast on one thread as δ aᵀ where there are few channels and many places
    return torch.cat([_each(d, lambda one, a=a: _norm((a @ one).flatten(1))) for d, a in parts])  # type: ignore[misc]


def _by_places(left: Tensor, places: Tensor) -> Tensor:
    """The same as Σ_ts (δ_t·δ_s)(a_t·a_s)."""
    step = max(1, CHUNK_BYTES // (places[0].numel() * left.element_size()))
    parts = zip(torch.split(left, step), torch.split(places, step), strict=True)
    return torch.cat([_each(d, lambda one, a=a: _weighted(one, a)) for d, a in parts])  # type: ignore[misc]


def _each(left: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([function(left[:, column]) for column in range(left.shape[1])], dim=1)


def _weighted(slopes: Tensor, places: Tensor) -> Tensor:
    return (slopes.transpose(2, 3) @ slopes).mul_(places).flatten(1).sum(1).double()


def _placed(use: Use, slopes: Tensor, first: Tensor) -> Tensor:
    """Squares of an embedding's gradient: slopes of one id add up, at the first place where it stands."""
    slopes = _without_padding(use, slopes)
    where = first[:, None, :, None].expand(slopes.shape)
    return _norm(torch.zeros_like(slopes).scatter_add_(2, where, slopes).flatten(2))


def _without_padding(use: Use, slopes: Tensor, some: slice = slice(None)) -> Tensor:
    """Slopes (n, columns, T, d), zero where the id is the padding's."""
    slopes = slopes.reshape(*slopes.shape[:2], -1, slopes.shape[-1])
    padding = use.module.padding_idx
    if padding is None:
        return slopes
    counts: Tensor = use.input[some].flatten(1).ne(padding)
    return slopes * counts[:, None, :, None]


def _of_tables(uses: Slopes) -> Tensor:
    """Of a table that is an embedding and the head, too: its gradient itself, some examples at a time."""
    table = next(use.module for use, _ in uses if use.kind == "rows")
    slopes = uses[0][1]
    size = table.num_embeddings * table.embedding_dim * slopes.element_size()
    step = max(1, CHUNK_BYTES // size)
    found = torch.empty(slopes.shape[:2], dtype=torch.float64, device=slopes.device)
    for begin in range(0, len(slopes), step):
        some = slice(begin, begin + step)
        for column in range(slopes.shape[1]):
            parts = [_table(use, one[some, column : column + 1], some) for use, one in uses]
            found[some, column] = _norm(sum(parts[1:], parts[0]).flatten(1))
    return found


def _table(use: Use, slopes: Tensor, some: slice) -> Tensor:
    """The gradient of one column, (n, entries, size of an entry)."""
    if use.kind == "product":
        return use.left(slopes)[:, 0, 0] @ use.right[some, 0].transpose(1, 2)
    slopes = _without_padding(use, slopes, some)[:, 0]
    table = slopes.new_zeros(len(slopes), use.module.num_embeddings, use.module.embedding_dim)
    return table.scatter_add_(1, use.input[some].flatten(1)[:, :, None].expand(slopes.shape), slopes)


def _vector(use: Use, slopes: Tensor) -> Tensor:
    """The gradient of a bias, or of a normalisation's weight, (n, columns, size)."""
    return _over_positions(use.module, slopes * use.right[:, None] if use.attribute == "weight" else slopes)


def _over_positions(module: Any, slopes: Tensor) -> Tensor:
    """Slopes (n, columns, ...) summed over all that is neither feature nor channel, (n, columns, features)."""
    if isinstance(module, (nn.GroupNorm, *BATCH_NORMS, *CONVOLUTIONS)):
        return slopes.flatten(3).sum(3) if slopes.dim() > 3 else slopes
    features = len(module.normalized_shape) if isinstance(module, nn.LayerNorm | nn.RMSNorm) else 1
    slopes = slopes.flatten(-features)
    return slopes.flatten(2, -2).sum(2) if slopes.dim() > 3 else slopes


def _normalized(call: Call, entry: Tensor) -> Tensor:
    """What a normalisation multiplies its weight by."""
    module: Any = call.module
    if isinstance(module, nn.LayerNorm):
        return F.layer_norm(entry, module.normalized_shape, None, None, module.eps)
    if isinstance(module, nn.RMSNorm):
        return F.rms_norm(entry, module.normalized_shape, None, module.eps)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(entry, module.num_groups, None, None, module.eps)
    mean, variance = call.statistics
    return F.batch_norm(entry, mean, variance, None, None, False, 0.0, module.eps)
