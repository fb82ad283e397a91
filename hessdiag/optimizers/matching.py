"""An optimizer, or what it saved -> the group and the state of each parameter by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessdiag.errors import ProblemError
from hessdiag.optimizers.order import by_order
from hessdiag.optimizers.recognized import by_class, by_content, require_minimizing
from hessdiag.optimizers.rules import Group, Rule, State
from hessdiag.shown import listed

WRAPPERS = ("AcceleratedOptimizer", "LightningOptimizer")
"""Classes that hand every step to the optimizer in them."""
PREFIXES = ("module.", "_orig_mod.")
SCALARS = ("step", "mu_product")
NO_NAMES = "the optimizer's state holds no names: it was matched to the model's parameters by order and shape"


@dataclass(frozen=True)
class Stepped:
    """What steps a parameter."""

    group: Group
    state: State


@dataclass(frozen=True)
class Matched:
    """An optimizer's rule, what steps each parameter, and one-line facts about how it was matched."""

    rule: Rule
    stepped: Mapping[str, Stepped]
    notes: tuple[str, ...] = ()


def matched(optimizer: Any, named: Mapping[str, Tensor]) -> Matched:
    """Each of the model's parameters with its group and state.

    Args:
        optimizer: of torch, wrapped by Accelerate or Lightning, its state dict, or what has a ``state_dict()``.
        named: the model's parameters by name, frozen ones included.

    Raises:
        ProblemError: an unknown optimizer, or one of another model.
    """
    while any(kind.__name__ in WRAPPERS for kind in type(optimizer).__mro__):
        optimizer = getattr(optimizer, "_optimizer", None) or optimizer.optimizer
    if isinstance(optimizer, torch.optim.Optimizer):
        return _live(optimizer, named)
    saved = optimizer if isinstance(optimizer, Mapping) else optimizer.state_dict()
    return _saved(saved, named)


def _live(optimizer: torch.optim.Optimizer, named: Mapping[str, Tensor]) -> Matched:
    rule = by_class(optimizer)
    require_minimizing(optimizer.param_groups)
    names = {id(tensor): name for name, tensor in named.items()}
    stepped = {
        names[id(one)]: Stepped(group, optimizer.state.get(one, {}))
        for group in optimizer.param_groups
        for one in group["params"]
        if id(one) in names
    }
    if not stepped:
        msg = "the optimizer holds none of the model's parameters, perhaps those of a copy: give "
        raise ProblemError(msg + "`optimizer=optimizer.state_dict()`")
    return Matched(rule, stepped)


def _saved(saved: Mapping[str, Any], named: Mapping[str, Tensor]) -> Matched:
    groups, states = saved.get("param_groups"), saved.get("state")
    if not (isinstance(groups, list) and groups and isinstance(states, Mapping) and all(map(_is_group, groups))):
        held = listed(sorted(map(str, saved)), 4) or "nothing"
        msg = f"the optimizer's state dict holds {held}: optimizer.state_dict() has state and param_groups"
        raise ProblemError(msg)
    kept = [dict(state) for state in states.values() if isinstance(state, Mapping) and state]
    rule = by_content(groups, kept)
    require_minimizing(groups)
    places = [list(group["params"]) for group in groups]
    names, notes = _names(groups, places, named), tuple[str, ...]()
    if names is None:
        shapes = [[_shape(states.get(place)) for place in group] for group in places]
        names, notes = by_order(shapes, named), (NO_NAMES,)
    stepped = {
        name: Stepped(group, states.get(place) or {})
        for group, own, inside in zip(groups, names, places, strict=True)
        for name, place in zip(own, inside, strict=True)
    }
    return Matched(rule, stepped, notes)


def _is_group(group: Any) -> bool:
    return isinstance(group, Mapping) and isinstance(group.get("params"), list)


def _shape(state: Any) -> tuple[int, ...] | None:
    """Of a parameter, as its state shows it."""
    if not isinstance(state, Mapping):
        return None
    shapes = [value.shape for name, value in state.items() if isinstance(value, Tensor) and name not in SCALARS]
    return tuple(shapes[0]) if shapes else None


def _names(
    groups: Sequence[Group], places: Sequence[Sequence[Any]], named: Mapping[str, Tensor]
) -> list[list[str]] | None:
    """The names that were saved, as the model spells them; None where there are none."""
    if all(isinstance(place, str) for group in places for place in group):
        own = [list(group) for group in places]
    else:
        own = [list(group.get("param_names") or ()) for group in groups]
    if not any(own):
        return None
    if [len(group) for group in own] != [len(group) for group in places]:
        msg = f"the optimizer's state names {sum(map(len, own))} of {sum(map(len, places))} parameters: it "
        raise ProblemError(msg + "was changed after torch wrote it")
    prefix = _prefix([str(name) for group in own for name in group], named)
    return [[_bare(str(name)).removeprefix(prefix) for name in group] for group in own]


def _bare(name: str) -> str:
    while prefix := next((one for one in PREFIXES if name.startswith(one)), ""):
        name = name.removeprefix(prefix)
    return name


def _prefix(saved: Sequence[str], named: Mapping[str, Tensor]) -> str:
    """What stands before the model's names: that of a LightningModule, whose child the model is."""
    bare = {_bare(name) for name in saved}
    wanted = [name for name, tensor in named.items() if tensor.requires_grad]
    if not wanted or any(name in bare for name in wanted):
        return ""
    found = {name.removesuffix(wanted[0]) for name in bare if name.endswith("." + wanted[0])}
    fitting = [prefix for prefix in found if all(prefix + name in bare for name in wanted)]
    if len(fitting) != 1:
        msg = f"the optimizer's parameters are called {listed(sorted(bare), 3)}, the model's {listed(wanted, 3)}: "
        raise ProblemError(msg + "the state belongs to another model")
    return fitting[0]
