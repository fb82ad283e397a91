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
        """What the gradients are multiplied by: a (n, groups, in, T); or the normalised input."""
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

    def left(self, grads: Tensor) -> Tensor:
        """Gradients (n, columns, ...) as δ (n, columns, groups, out, T)."""
        if isinstance(self.module, nn.Linear):
            flat = grads.flatten(2, -2) if grads.dim() > 3 else grads[:, :, None]
            return flat.transpose(2, 3)[:, :, None]
        return grads.reshape(*grads.shape[:2], self.module.groups, -1, grads[0, 0, 0].numel())


Gradients = Sequence[tuple[Use, Tensor]]  # each with the gradient by its output, (examples, columns, ...)


def squares(uses: Gradients) -> Tensor:
    """‖J_nᵀ c‖² of a tensor, (examples, columns) float64, from all of its uses."""
    kinds = {use.kind for use, _ in uses}
    if len(uses) == 1 and kinds == {"rows"}:
        use, grads = uses[0]
        return _placed(use, grads, use.first)
    if len(uses) == 1 and kinds == {"product"}:
        use, grads = uses[0]
        left = use.left(grads)
        out, length, entries = *left.shape[3:], use.right.shape[2]
        if length > 1 and length * (entries / COLUMNS + out) < out * entries:
            return _by_places(left, use.places)
        return _product_squares(left, use.right)
    if kinds == {"product"}:
        left = torch.cat([use.left(grads) for use, grads in uses], dim=-1)
        return _product_squares(left, torch.cat([use.right for use, _ in uses], dim=-1))
    if kinds == {"vector"}:
        return _norm(sum((_vector(use, grads) for use, grads in uses[1:]), _vector(*uses[0])))
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
    # a column at a time: one matrix product for all needs a copy of their gradients. And in this order, five
    # times as fast on one thread as δ aᵀ where there are few channels and many places
    return torch.cat([_each(d, lambda one, a=a: _norm((a @ one).flatten(1))) for d, a in parts])  # type: ignore[misc]


def _by_places(left: Tensor, places: Tensor) -> Tensor:
    """The same as Σ_ts (δ_t·δ_s)(a_t·a_s)."""
    step = max(1, CHUNK_BYTES // (places[0].numel() * left.element_size()))
    parts = zip(torch.split(left, step), torch.split(places, step), strict=True)
    return torch.cat([_each(d, lambda one, a=a: _weighted(one, a)) for d, a in parts])  # type: ignore[misc]


def _each(left: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([function(left[:, column]) for column in range(left.shape[1])], dim=1)


def _weighted(grads: Tensor, places: Tensor) -> Tensor:
    return (grads.transpose(2, 3) @ grads).mul_(places).flatten(1).sum(1).double()


def _placed(use: Use, grads: Tensor, first: Tensor) -> Tensor:
    """Squares of an embedding's gradient: those of one id add up, at the first place where it stands."""
    grads = _without_padding(use, grads)
    where = first[:, None, :, None].expand(grads.shape)
    return _norm(torch.zeros_like(grads).scatter_add_(2, where, grads).flatten(2))


def _without_padding(use: Use, grads: Tensor, some: slice = slice(None)) -> Tensor:
    """Gradients (n, columns, T, d), zero where the id is the padding's."""
    grads = grads.reshape(*grads.shape[:2], -1, grads.shape[-1])
    padding = use.module.padding_idx
    if padding is None:
        return grads
    counts: Tensor = use.input[some].flatten(1).ne(padding)
    return grads * counts[:, None, :, None]


def _of_tables(uses: Gradients) -> Tensor:
    """Of a table that is an embedding and the head, too: its gradient itself, some examples at a time."""
    table = next(use.module for use, _ in uses if use.kind == "rows")
    grads = uses[0][1]
    size = table.num_embeddings * table.embedding_dim * grads.element_size()
    step = max(1, CHUNK_BYTES // size)
    found = torch.empty(grads.shape[:2], dtype=torch.float64, device=grads.device)
    for begin in range(0, len(grads), step):
        some = slice(begin, begin + step)
        for column in range(grads.shape[1]):
            parts = [_table(use, one[some, column : column + 1], some) for use, one in uses]
            found[some, column] = _norm(sum(parts[1:], parts[0]).flatten(1))
    return found


def _table(use: Use, grads: Tensor, some: slice) -> Tensor:
    """The gradient of one column, (n, entries, size of an entry)."""
    if use.kind == "product":
        return use.left(grads)[:, 0, 0] @ use.right[some, 0].transpose(1, 2)
    grads = _without_padding(use, grads, some)[:, 0]
    table = grads.new_zeros(len(grads), use.module.num_embeddings, use.module.embedding_dim)
    return table.scatter_add_(1, use.input[some].flatten(1)[:, :, None].expand(grads.shape), grads)


def _vector(use: Use, grads: Tensor) -> Tensor:
    """The gradient of a bias, or of a normalisation's weight, (n, columns, size)."""
    return _over_positions(use.module, grads * use.right[:, None] if use.attribute == "weight" else grads)


def _over_positions(module: Any, grads: Tensor) -> Tensor:
    """Gradients (n, columns, ...) summed over all that is neither feature nor channel, (n, columns, features)."""
    if isinstance(module, (nn.GroupNorm, *BATCH_NORMS, *CONVOLUTIONS)):
        return grads.flatten(3).sum(3) if grads.dim() > 3 else grads
    features = len(module.normalized_shape) if isinstance(module, nn.LayerNorm | nn.RMSNorm) else 1
    grads = grads.flatten(-features)
    return grads.flatten(2, -2).sum(2) if grads.dim() > 3 else grads


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
