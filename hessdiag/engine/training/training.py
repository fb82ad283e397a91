"""Loss, gradient, products H·v and third derivatives of the CURRENT batch, for optimizers that train on them.

A user's ``closure()`` computes and returns the loss and does no ``backward``; everything is differentiated here,
by ``torch.autograd.grad``: ``.grad`` is never touched, and no hook of ``DistributedDataParallel`` fires, in any
pass. So first-order passes and products are averaged over ranks in one and the same way (`mean_over_ranks`), at
the price of no overlap of communication and backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hessdiag.engine.products.nodes import graph_nodes
from hessdiag.engine.products.ranks import Pieces, mean_over_ranks
from hessdiag.engine.products.real_pairs import real
from hessdiag.engine.training.closures import (
    Closures,
    closures,
    evaluated,
    left_in_grad,
    refusals,
    refuse_sparse,
)


def loss_and_gradient(
    closure: Closures, params: Sequence[Tensor], *, scale: float = 1.0, backward_inside: bool = False
) -> tuple[Tensor, Pieces]:
    """The loss of the current batch and its gradient; one gradient.

    Args:
        closure: computes and returns the loss, or several micro-batches' closures: the loss is their mean, and
            each graph is freed before the next is built (gradient accumulation).
        params: leaf tensors to differentiate by; of complex ones the real pairs count.
        scale: the loss is multiplied by it for the backward pass and the gradient divided (half precision).
        backward_inside: the closure calls backward() by itself: the gradient is what it leaves in ``.grad``,
            which is put back as it was.

    Returns:
        The loss, detached, and one tensor per parameter, None where it takes no part.

    Raises:
        UsageError: no scalar loss with a graph of its own, or a sparse gradient, or the closure changed weights.
    """
    parts = closures(closure)
    total: list[Tensor | None] = [None] * len(params)
    losses = []
    for part in parts:
        if backward_inside:
            loss, pieces = left_in_grad(part, params, 1 / len(parts))
        else:
            loss = evaluated(part, params)
            with refusals():
                pieces = torch.autograd.grad(loss * (scale / len(parts)), params, allow_unused=True)
        refuse_sparse(pieces)
        for index, piece in enumerate(pieces):
            if piece is not None:
                held = total[index]
                total[index] = real(piece) if held is None else held + real(piece)
        losses.append(loss.detach())
    if scale != 1.0:
        total = [None if piece is None else piece / scale for piece in total]
    return torch.stack(losses).mean(), tuple(total)


class Curved:
    """One evaluation of the loss with its graph kept: the gradient and any number of products H·v on it.

    Everything runs under the MATH attention backend, the only one with second derivatives. Costs in gradients, on
    a perceptron and on a small convolutional network: 1.2 and 1.1 to build, 1.2 and 2.8 per product. Everything is
    the mean over ranks.

    Attributes:
        loss: scalar, detached.
        gradient: one detached tensor per parameter, None where it takes no part.
        params: what is differentiated by, complex ones as real pairs.
        products: H·v formed so far.
        form: v·Hy of the last `third`; NaN before.
        third_order_is_exact: no layer is present whose third derivatives torch 2.13 gets silently wrong
            (LayerNorm, and BatchNorm or InstanceNorm on batch statistics; pytorch#175754, #186256).
    """

    def __init__(self, closure: Closures, params: Sequence[Tensor], *, scale: float = 1.0) -> None:
        self._leaves, self.params = tuple(params), tuple(real(param) for param in params)
        self._scale, self.products, self.form = scale, 0, math.nan
        with _second_order():
            parts = closures(closure)
            loss = torch.stack([evaluated(part, params) for part in parts]).mean()
            with refusals():
                pieces = torch.autograd.grad(loss * scale, self._leaves, create_graph=True, allow_unused=True)
            refuse_sparse(pieces)
            self._pieces = tuple(None if piece is None else real(piece) for piece in pieces)
        self.third_order_is_exact = not _wrong_third_order(loss)
        detached = tuple(None if piece is None else piece.detach() / scale for piece in self._pieces)
        self.loss, self.gradient = mean_over_ranks(loss.detach(), detached, self.params)

    def product(self, v: Pieces) -> tuple[Tensor, ...]:
        """H·v, one detached tensor per parameter, for v shaped like the parameters (None counts as zero)."""
        self.products += 1
        with _second_order():
            return self._reduced(self._product(v, create_graph=False))

    def third(self, v: Pieces, y: Pieces | None = None) -> tuple[Tensor, ...]:
        """The gradient of v·H y with v and y held constant (y = v by default), exact; 3 to 10 gradients, as above.

        Wrong where ``third_order_is_exact`` is False: use `BatchLoss.third`, which then takes differences.
        """
        with _second_order():
            product = self._product(v if y is None else y, create_graph=True)
            form = self.loss.new_tensor(dot(tuple(piece.detach() for piece in product), v) / self._scale)
            self.form = float(mean_over_ranks(form, (), ())[0])
            live = [
                (piece, w) for piece, w in zip(product, v, strict=True) if piece.requires_grad and w is not None
            ]
            if not live:
                return tuple(torch.zeros_like(param) for param in self.params)
            return self._reduced(self._grad([p for p, _ in live], [w.to(p.dtype) for p, w in live]))

    def _product(self, v: Pieces, *, create_graph: bool) -> tuple[Tensor, ...]:
        pairs = zip(self._pieces, v, strict=True)
        live = [(p, w) for p, w in pairs if p is not None and p.requires_grad and w is not None]
        if not live:
            return tuple(torch.zeros_like(param) for param in self.params)
        return self._grad([p for p, _ in live], [w.to(p.dtype) for p, w in live], create_graph=create_graph)

    def _grad(self, heads: list[Tensor], v: list[Tensor], *, create_graph: bool = False) -> tuple[Tensor, ...]:
        with refusals():
            pieces = torch.autograd.grad(
                heads, self._leaves, v, retain_graph=True, create_graph=create_graph, materialize_grads=True
            )
        return tuple(real(piece) for piece in pieces)

    def _reduced(self, pieces: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        local = tuple(piece.detach() / self._scale for piece in pieces)
        _, reduced = mean_over_ranks(self.loss, local, self.params)
        return tuple(piece for piece in reduced if piece is not None)


def dot(a: Pieces, b: Pieces) -> float:
    """a·b over all parameters together; None counts as zero."""
    products = [(x * y).sum() for x, y in zip(a, b, strict=True) if x is not None and y is not None]
    return float(torch.stack(products).double().sum()) if products else 0.0


def norm(a: Pieces) -> float:
    """|a| over all parameters together; None counts as zero. The same on all ranks if a is."""
    held = [x for x in a if x is not None]
    return float(torch.nn.utils.get_total_norm(held)) if held else 0.0


@contextmanager
def _second_order() -> Iterator[None]:
    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        yield


def _wrong_third_order(loss: Tensor) -> bool:
    """Whether the graph holds a layer whose third derivatives torch 2.13 computes wrongly, without an error."""
    return any(
        "LayerNorm" in node.name() or ("BatchNorm" in node.name() and getattr(node, "_saved_training", True))
        for node in graph_nodes(loss)
    )
