"""Weights that a model computes once and keeps, in a cache that no pass empties: they do not move with θ.

A cache filled in a pass without gradients holds a constant: the measured gradient and the user's own then miss the
same weights, and every check that compares the two agrees. So the first pass of all is the user's own module with
gradients: what it keeps leads to the user's own parameters, which `Functional` refuses, and what it returns only
once is missed when the same pass is made again at the end. A cache that was filled before leaves a constant in the
place of weights which nothing reads.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from hessdiag.engine.checks.facts import Finding
from hessdiag.engine.checks.plain_pass import PlainModel
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.failures import KEPT_GRAPH, is_kept_graph
from hessdiag.engine.products.losses import TRIAL_EXAMPLES
from hessdiag.engine.products.nodes import graph_nodes
from hessdiag.errors import MeasurementError
from hessdiag.samples import divide, leaves

CHANGE = 1e-2
"""Relative, of a tensor's gradient: the same pass over the same examples repeats to rounding."""
HALF_CHANGE = 0.3  # in half precision, where kernels that do not repeat leave some percents

Norms = tuple[float | None, ...]


@dataclass(frozen=True)
class FirstPass:
    """What the first pass of all gave.

    Attributes:
        examples: up to 16, as they come.
        gradient_norms: per parameter the norm of the gradient, None where it takes no part.
    """

    examples: Any
    gradient_norms: Norms


def first_pass(operator: Curvature) -> FirstPass | None:
    """The user's own module on its first examples, with gradients; before anything else is computed.

    Costs one gradient of up to 16 examples.

    Returns:
        None where the plain module fails: why, the second opinion says.
    """
    own = PlainModel(operator)
    try:
        with own.evaluating():
            examples = next(divide(operator.samples.batches[0], TRIAL_EXAMPLES))
            return FirstPass(examples, own.gradient_norms(examples))
    except Exception:  # the user's code can raise anything
        return None


def require_kept_nothing(operator: Curvature, first: FirstPass | None) -> None:
    """Refuse a model whose loss of the same examples has another gradient than in the first pass of all.

    Costs the same again and a forward pass of theirs; after passes of the measurement.

    Args:
        operator: of the same model.
        first: what the first pass gave.

    Raises:
        MeasurementError: a parameter has another part in the loss, or none; or the first pass's graph is met.
    """
    if first is None:
        return
    function = operator.function
    with operator.timed():
        function.total(function.theta, function.place(first.examples))  # refuses by name what it can name
    own = PlainModel(operator)
    try:
        with own.evaluating():
            again = own.gradient_norms(first.examples)
    except Exception as error:
        if is_kept_graph(error):
            raise MeasurementError(KEPT_GRAPH) from error
        return  # the second opinion says why
    name = _another(operator, first.gradient_norms, again, HALF_CHANGE if own.half else CHANGE)
    if name is not None:
        raise MeasurementError(_changed(name))


def _another(operator: Curvature, first: Norms, again: Norms, limit: float) -> str | None:
    """The first parameter whose gradient has another norm; next to none counts against the whole."""
    whole = math.hypot(*(norm or 0.0 for norm in first))
    for (name, size), a, b in zip(operator.layout, first, again, strict=True):
        share = 0.02 * whole * math.sqrt(size / operator.size)
        off = abs((a or 0.0) - (b or 0.0)) / max(a or 0.0, b or 0.0, share, 1e-300)
        if (a is None) != (b is None) or off > limit:
            return name
    return None


def _changed(name: str) -> str:
    return (
        f"{name} had another part in the loss in the first pass than in later ones over the same examples: the "
        "model keeps what it computes from its weights (lru_cache, a dict, an attribute), and what is kept does "
        "not follow them: compute it anew in every forward"
    )


def without_part(operator: Curvature, gradient: Tensor) -> list[Finding]:
    """Parameters that take no part in the loss of any batch: an unused layer, or a weight kept from before.

    Args:
        operator: what will be measured.
        gradient: its gradient (P,): only where a whole tensor of it is zero passes are made, one of up to 16
            examples a batch.
    """
    pieces = zip(operator.function.names, operator.function.split(gradient), strict=True)
    still = [name for name, piece in pieces if not bool(piece.any())]
    if not still:
        return []
    reached: set[str] = set()
    read: set[int] = set()
    strangers: dict[int, Tensor] = {}
    function = operator.function
    with operator.timed():
        for batch in operator.batches:
            piece = next(divide(batch, TRIAL_EXAMPLES))
            with _Read(function.tensors(function.theta), piece) as seen:
                total = function.total(function.theta, piece)
            behind = {id(getattr(node, "variable", None)) for node in graph_nodes(total)}
            reached |= {n for n, t in zip(function.names, function.theta, strict=True) if id(t) in behind}
            read |= seen.read
            strangers |= seen.strangers
    absent = [name for name in still if name not in reached]
    if not absent:
        return []
    unread = [n for n, t in zip(function.names, function.theta, strict=True) if n in absent and id(t) not in read]
    if unread and strangers:
        return [Finding("warning", "parameters", _a_constant(unread, next(iter(strangers.values()))))]
    numbers = sum(size for name, size in function.layout if name in absent)
    text = f"{numbers:,} numbers take no part in the loss ({_some(absent)}): their gradient and their rows of the "
    return [Finding("note", "parameters", text + f"matrix are 0; `params=['*', '!{absent[0]}']` leaves one out")]


def _some(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _a_constant(absent: list[str], stranger: Tensor) -> str:
    return (
        f"{_some(absent)}: not read by the loss, which reads a constant {tuple(stranger.shape)} instead that is "
        "neither parameter, buffer nor data; if it was computed from them, under no_grad, and kept (lru_cache, a "
        "dict, an attribute), they are measured as if they did nothing: empty that cache before, or compute it "
        "anew in every forward"
    )


class _Read(TorchFunctionMode):
    """Notes which tensors the torch functions of a pass read.

    Attributes:
        read: ids of all of them.
        strangers: by id, constants that were there before the pass, and neither the model's nor the batch's.
    """

    def __init__(self, tensors: Mapping[str, Tensor], batch: Any) -> None:
        super().__init__()
        self.read: set[int] = set()
        self.strangers: dict[int, Tensor] = {}
        self._known = {id(tensor): tensor for tensor in (*tensors.values(), *leaves(batch))}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, Tensor):
                self.read.add(id(tensor))
                self._look(tensor)
        result = func(*args, **(kwargs or {}))
        # kept: a tensor that is gone leaves its id to another
        self._known.update((id(leaf), leaf) for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        return result

    def _look(self, tensor: Tensor) -> None:
        weighty = tensor.is_floating_point() or tensor.is_complex()
        if id(tensor) not in self._known and weighty and tensor.numel() > 1 and not tensor.requires_grad:
            self.strangers[id(tensor)] = tensor
