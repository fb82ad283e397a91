"""The autograd graph behind a tensor: its nodes, and which of them a user wrote."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def graph_nodes(loss: Tensor) -> Iterator[torch.autograd.graph.Node]:
    """The autograd nodes behind a tensor, each once."""
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack += [parent for parent, _ in node.next_functions]


def written_by_hand(node: torch.autograd.graph.Node) -> str | None:
    """The name of a user's own autograd function; None for torch's."""
    custom = isinstance(node, torch.autograd.function.BackwardCFunction)
    return node.name().removesuffix("Backward") if custom else None
