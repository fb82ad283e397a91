"""One forward pass with every known layer's input kept, and where the gradient by its output is found.

Nothing of the model is trusted but what the autograd graph says: a parameter counts as captured only if the graph
behind the outputs leads to it exactly as often as layers that hold it were seen at work. A weight that a forward
also uses by hand, a parametrised one, one inside of a module unknown here: none of them passes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge

from hessdiag.engine.products.functional import Functional
from hessdiag.engine.products.nodes import graph_nodes
from hessdiag.samples import row_count

Role = Literal["example", "shared"]
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, *BATCH_NORMS)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
LAYERS: frozenset[type[nn.Module]] = frozenset((nn.Linear, nn.Embedding, *CONVOLUTIONS, *NORMS))


@dataclass(frozen=True, eq=False)
class Call:
    """One call of one layer.

    Attributes:
        name: of the module.
        module: the layer; its own tensors are swapped during a call only, so that none may be read from it.
        tensors: attribute ("weight", "bias") to the index in θ, of those that count.
        input: what it was called on, one example per row unless ``role`` is "shared".
        version: of the input at the time of the call.
        edge: where the gradient by the output is found, one example per row.
        shape: of the output as the module gave it.
        role: "shared" where the output had no dimension for examples and was repeated for each.
        statistics: BatchNorm's mean and variance at the time of the call.
    """

    name: str
    module: nn.Module
    tensors: Mapping[str, int]
    input: Tensor
    version: int
    edge: GradientEdge
    shape: torch.Size
    role: Role
    statistics: tuple[Tensor, ...]

    @property
    def rewritten(self) -> bool:
        """Whether the input was changed in place since."""
        return self.input._version != self.version


@dataclass(frozen=True)
class Captured:
    """A forward pass.

    Attributes:
        outputs: of the model, with their graph.
        uses: index of a tensor to its (attribute, call) pairs, for tensors whose every use was captured.
    """

    outputs: Tensor
    uses: Mapping[int, tuple[tuple[str, Call], ...]]

    @property
    def calls(self) -> tuple[Call, ...]:
        """Every call that counts, once."""
        return tuple({id(call): call for uses in self.uses.values() for _, call in uses}.values())


def capture(function: Functional, piece: Any, roles: Mapping[str, Role] | None = None) -> Captured:
    """One forward pass of the examples with the known layers' inputs kept.

    Args:
        function: gives the outputs; within its ``measuring``.
        piece: some examples of one batch.
        roles: what is known of the layers by name; layers that are missing are not captured. None takes them
            all as they come, for `roles_of`.
    """
    indices = {id(tensor): index for index, tensor in enumerate(function.theta)}
    rows = row_count(piece)
    calls: list[Call] = []

    def hook(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Tensor | None:
        held = {n: indices[id(p)] for n, p in module._parameters.items() if p is not None and id(p) in indices}
        known = bool(held) and len(inputs) == 1 and isinstance(output, Tensor) and output.requires_grad
        if not known or not _usual(module):
            return None
        role: Role = roles[name] if roles is not None else "example"
        shape = output.shape
        if role == "shared":
            output = (output if inputs[0].dim() > 1 else output[None]).expand(rows or 1, *output.shape[-2:])
        elif roles is not None and (shape[0] != rows or inputs[0].shape[0] != rows):
            return None
        statistics = (module.running_mean, module.running_var) if isinstance(module, BATCH_NORMS) else ()
        edge = get_gradient_edge(output)
        entry = inputs[0].detach()
        calls.append(Call(name, module, held, entry, entry._version, edge, shape, role, statistics))  # type: ignore[arg-type]
        # what follows may write into it (an in-place ReLU): the edge is of the original
        handed: Tensor = output.clone()
        return handed

    handles = [
        module.register_forward_hook(partial(hook, name), prepend=True)
        for name, module in function.modules()
        if type(module) in LAYERS and "forward" not in vars(module) and (roles is None or name in roles)
    ]
    try:
        outputs = function.outputs(function.theta, piece)
    finally:
        for handle in handles:
            handle.remove()
    return Captured(outputs, _complete(function, outputs, calls))


def roles_of(many: Captured, few: Captured) -> dict[str, Role]:
    """What the layers' first dimension is, from two captures of different numbers of examples.

    By the numbers alone a table of 64 positions and a batch of 64 examples look the same.
    """
    rows = (len(many.outputs), len(few.outputs))
    found: dict[str, set[Role | None]] = {}
    seen = [[(call.name, call) for call in one.calls] for one in (many, few)]
    if [name for name, _ in seen[0]] != [name for name, _ in seen[1]]:
        return {}
    for (name, a), (_, b) in zip(*seen, strict=True):
        role: Role | None = None
        if (a.shape[0], b.shape[0]) == rows and a.shape[1:] == b.shape[1:]:
            role = "example"
        elif a.shape == b.shape and type(a.module) is nn.Embedding and _positions(a.input):
            role = "shared"
        found.setdefault(name, set()).add(role)
    roles = {name: next(iter(kinds)) for name, kinds in found.items() if len(kinds) == 1}
    return {name: role for name, role in roles.items() if role is not None}


def _positions(ids: Tensor) -> bool:
    return ids.dim() == 1 or (ids.dim() == 2 and ids.shape[0] == 1)


def _usual(module: nn.Module) -> bool:
    """Whether the layer's gradient is the one its type says."""
    if isinstance(module, nn.Embedding):
        return module.max_norm is None and not module.scale_grad_by_freq
    if isinstance(module, BATCH_NORMS):
        return not module.training and module.running_mean is not None
    return True


def _complete(function: Functional, outputs: Tensor, calls: list[Call]) -> dict[int, tuple[tuple[str, Call], ...]]:
    """The uses of the tensors that the graph leads to by captured calls only."""
    edges: Counter[int] = Counter()
    reached: set[Node] = set()
    for node in graph_nodes(outputs):
        reached.add(node)
        edges.update(
            id(parent.variable)
            for parent, _ in node.next_functions
            if parent is not None and hasattr(parent, "variable")
        )
    uses: dict[int, list[tuple[str, Call]]] = {}
    for call in calls:
        if call.edge.node in reached:
            for attribute, index in call.tensors.items():
                uses.setdefault(index, []).append((attribute, call))
    return {
        index: tuple(some)
        for index, some in uses.items()
        if len(some) == edges[id(function.theta[index])] and not any(call.rewritten for _, call in some)
    }
