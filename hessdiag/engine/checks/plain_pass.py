"""The user's module called and differentiated as its user does it, over the sample set, and left as found."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessdiag.criteria import TARGET_KEYS, by_torch, target_of
from hessdiag.engine.checks.readings import Reading, reading_of
from hessdiag.engine.products.attributes import left_as_found, put_back
from hessdiag.engine.products.checkpointing import kept_activations
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.failures import is_out_of_memory
from hessdiag.engine.products.nodes import graph_nodes, written_by_hand
from hessdiag.engine.products.restoring import random_states
from hessdiag.engine.products.windows import norm
from hessdiag.problem import Problem
from hessdiag.samples import map_tensors


@dataclass(frozen=True)
class Passed:
    """The user's loss and gradient over the sample set.

    Attributes:
        loss: the mean.
        loss_scale: the mean of absolute values over batches.
        gradient: per parameter that counts.
        sizes: Σ over batches of each one's norm: what a sum that cancels is rounded against.
        outside: shapes of trainable tensors that the loss depends on and the model does not hold.
        custom: names of hand-written autograd functions in the graph.
    """

    loss: float
    loss_scale: float
    gradient: tuple[Tensor, ...]
    sizes: tuple[float, ...]
    outside: tuple[tuple[int, ...], ...]
    custom: tuple[str, ...]


@dataclass(frozen=True)
class Returned:
    """Two losses of one batch.

    Attributes:
        ours: the problem's.
        theirs: the one that the model returns, given the labels.
        reading: how the model reads its labels.
    """

    ours: float
    theirs: float
    reading: Reading


class _Held:
    """A tensor of the user's model, its entries and its gradient: some models rewrite both in a forward pass."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor, self.data, self.entries = tensor, tensor.data, tensor.detach().clone()
        self.grad = tensor.grad
        self.kept_grad = None if self.grad is None else self.grad.clone()

    def put_back(self) -> None:
        if self.tensor.data_ptr() != self.data.data_ptr():
            self.tensor.data = self.data
        if not torch.equal(self.data, self.entries):
            self.data.copy_(self.entries)
        if self.tensor.grad is not self.grad:
            self.tensor.grad = self.grad
        if self.grad is not None and self.kept_grad is not None and not self.grad.is_sparse:
            self.grad.detach().copy_(self.kept_grad)


class PlainModel:
    """The user's module, called as its user calls it."""

    def __init__(self, operator: Curvature) -> None:
        self.problem: Problem = operator.problem
        self.model = self.problem.bare_model()
        self.names = operator.function.names
        self.batches, self.weights = operator.samples.batches, operator.weights.tolist()
        named = dict(self.model.named_parameters())
        self.parameters = [named[name] for name in self.names]
        self.half = any(p.dtype.itemsize < 4 for p in self.model.parameters())

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Evaluation mode; modes, attributes, tensors, ``.grad`` and random states are put back afterwards."""
        held = [_Held(tensor) for tensor in (*self.model.parameters(), *self.model.buffers())]
        with ExitStack() as stack:
            stack.enter_context(left_as_found(self.model))
            stack.enter_context(random_states(*(p.device for p in self.parameters)))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(kept_activations())  # a reentrant checkpoint knows backward() only
            for module in self.model.modules():
                module.training = False
            try:
                yield
            finally:
                for one in held:
                    one.put_back()

    def gradient(self) -> Passed:
        """One pass over the sample set, batch by batch."""
        total = [torch.zeros_like(p.detach()) for p in self.parameters]
        sizes = [0.0] * len(total)
        losses: list[tuple[float, float]] = []
        held: list[dict[int, Tensor]] = []
        custom: set[str] = set()
        whole = math.fsum(self.weights)
        for batch, weight in zip(self.batches, self.weights, strict=True):
            if not weight:
                continue
            loss = self._mean(batch)
            losses.append((float(loss.detach()), weight / whole))
            outside, by_hand = self._behind(loss)
            held.append(outside)
            custom |= by_hand
            pieces = torch.autograd.grad(loss, self.parameters, allow_unused=True) if loss.requires_grad else ()
            for index, piece in enumerate(pieces):
                if piece is not None:
                    piece = piece.to_dense() if piece.is_sparse else piece
                    total[index].add_(piece, alpha=weight / whole)
                    sizes[index] += weight / whole * norm(piece)
        value = math.fsum(loss * share for loss, share in losses)
        scale = math.fsum(abs(loss) * share for loss, share in losses)
        return Passed(value, scale, tuple(total), tuple(sizes), self._met_again(held), tuple(sorted(custom)))

    def gradient_norms(self, batch: Any) -> tuple[float | None, ...]:
        """Per parameter that counts the norm of the gradient of a batch's loss; None where it takes no part."""
        loss = self._mean(batch)
        if not loss.requires_grad:
            return (None,) * len(self.parameters)
        pieces = torch.autograd.grad(loss, self.parameters, allow_unused=True)
        return tuple(None if piece is None else norm(piece.to_dense()) for piece in pieces)

    def _behind(self, loss: Tensor) -> tuple[dict[int, Tensor], set[str]]:
        """What the graph of a loss leads to, in one walk.

        Returns:
            Trainable tensors that the model does not hold, by id; names of hand-written functions.
        """
        own = {id(p) for p in self.model.parameters()}
        outside: dict[int, Tensor] = {}
        custom: set[str] = set()
        for node in graph_nodes(loss):
            leaf = getattr(node, "variable", None)
            if leaf is not None and id(leaf) not in own:
                outside[id(leaf)] = leaf
            if (name := written_by_hand(node)) is not None:
                custom.add(name)
        return outside, custom

    def _met_again(self, held: list[dict[int, Tensor]]) -> tuple[tuple[int, ...], ...]:
        """Shapes of those that a second pass meets too: inputs that a loss differentiates by are new in each."""
        first = next((number for number, leaves in enumerate(held) if leaves), None)
        if first is None:
            return ()
        counted = [batch for batch, weight in zip(self.batches, self.weights, strict=True) if weight]
        again, _ = self._behind(self._mean(counted[first]))
        kept = [leaves.keys() & again.keys() for leaves in held]
        return tuple({key: tuple(again[key].shape) for keys in kept for key in keys}.values())

    def returned_losses(self) -> list[Returned]:
        """What the model itself says to the first and the last labelled batch."""
        if self.problem.loss is not None:
            return []
        found = []
        chosen = [b for b in self.batches if isinstance(b, Mapping) and any(key in b for key in TARGET_KEYS)]
        for batch in [*chosen[:1], *chosen[1:][-1:]]:
            batch = self._place(batch, None)
            try:
                with torch.no_grad():
                    returned = self.model(**batch)
                    loss = returned["loss"] if isinstance(returned, Mapping) else returned.loss
                    ours, theirs = float(self._loss(batch)), float(loss)
            except (TypeError, KeyError, AttributeError, ValueError):  # this model takes no labels
                return []
            found.append(Returned(ours, theirs, _reading(returned, batch, theirs)))
        return found

    def _mean(self, batch: Any) -> Tensor:
        """The mean loss of a batch as it comes; in the model's own precision where it does not take that."""
        put_back(self.model)  # a weight that is folded and kept has lost its graph
        try:
            return self._loss(self._place(batch, None))
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            first = self.parameters[0].dtype
            return self._loss(self._place(batch, first.to_real() if first.is_complex else first))

    def _place(self, batch: Any, dtype: torch.dtype | None) -> Any:
        device = self.parameters[0].device

        def place(leaf: Tensor) -> Tensor:
            # a copy: some models write into what they are given, and some losses differentiate by it
            copy = leaf.detach().clone().to(device, dtype if leaf.is_floating_point() else None)
            return copy.requires_grad_(leaf.requires_grad)

        return map_tensors(batch, place)

    def _loss(self, batch: Any) -> Tensor:
        problem = self.problem
        if problem.loss is not None:
            return problem.loss(self.model, batch)
        outputs = problem.outputs(self.model, batch)
        known = problem.built_in
        if known is None:
            return problem.mean_loss(outputs, batch)
        with warnings.catch_warnings():  # of sizes that differ: they are refused in our words
            warnings.filterwarnings("ignore", "Using a target size", UserWarning)
            return by_torch(known, outputs, target_of(batch))


def _reading(returned: Any, batch: Any, loss: float) -> Reading:
    logits = returned.get("logits") if isinstance(returned, Mapping) else getattr(returned, "logits", None)
    labels, mask = target_of(batch), batch.get("attention_mask")
    if not isinstance(logits, Tensor) or not isinstance(labels, Tensor):
        return "other"
    return reading_of(logits, labels, loss, mask if isinstance(mask, Tensor) else None)
