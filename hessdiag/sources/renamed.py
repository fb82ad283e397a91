"""Names that libraries gave the same tensors at other times: today's for old files, and the other way round."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress

from torch import Tensor, nn

PAIRS = (
    (re.compile(r"(^|\.)LayerNorm\.gamma$"), r"\1LayerNorm.weight"),
    (re.compile(r"(^|\.)LayerNorm\.beta$"), r"\1LayerNorm.bias"),
    (re.compile(r"(^|\.)(\w+)_g$"), r"\1parametrizations.\2.original0"),
    (re.compile(r"(^|\.)(\w+)_v$"), r"\1parametrizations.\2.original1"),
    (re.compile(r"(^|\.)parametrizations\.(\w+)\.original0$"), r"\1\2_g"),
    (re.compile(r"(^|\.)parametrizations\.(\w+)\.original1$"), r"\1\2_v"),
)
"""BERT's layer norms in files converted from TensorFlow; the two weight norms of torch, in both directions."""


def renamed(
    model: nn.Module, target: Mapping[str, Tensor], state: Mapping[str, Tensor]
) -> Iterator[tuple[dict[str, Tensor], str]]:
    """Other ways of writing a checkpoint's names, each with a line for the user.

    Args:
        model: only looked at.
        target: its tensors.
        state: the checkpoint's.
    """
    ours = [f".{name}" for name in target]
    new = {name: _of_pairs(name, ours) for name in state}
    yield from _changed(state, new, "as other versions of its library write them")
    yield from _changed(state, _of_hooks(model, state), "as the model's own loading does")


def _of_pairs(name: str, ours: list[str]) -> str:
    """The name under which the model has the end of it; the name itself where it has that end already."""
    for pattern, replacement in PAIRS:
        found = pattern.search(name)
        if found is None:
            continue
        theirs = f".{found[0].lstrip('.')}"
        other = f".{pattern.sub(replacement, found[0]).lstrip('.')}"
        if any(o.endswith(other) for o in ours) and not any(o.endswith(theirs) for o in ours):
            return pattern.sub(replacement, name)
    return name


def _of_hooks(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, str]:
    """What the hooks that run before ``load_state_dict`` make of the names."""
    names: dict[str, Tensor] = dict(state)
    known = {id(tensor): name for name, tensor in state.items()}
    if any(module._load_state_dict_pre_hooks for module in model.modules()):
        with suppress(Exception):  # a hook can raise anything
            for where, module in copy.deepcopy(model).named_modules():  # a hook can change the module
                for hook in module._load_state_dict_pre_hooks.values():
                    hook(names, f"{where}." if where else "", {}, False, [], [], [])
    old = {known[id(tensor)]: name for name, tensor in names.items() if id(tensor) in known}
    return {name: old.get(name, name) for name in state}


def _changed(
    state: Mapping[str, Tensor], new: Mapping[str, str], how: str
) -> Iterator[tuple[dict[str, Tensor], str]]:
    moved = [name for name in state if new[name] != name]
    if moved and len(set(new.values())) == len(state):
        first = moved[0]
        note = f"renamed {len(moved)} names {how}, {first} to {new[first]}"
        yield {new[name]: tensor for name, tensor in state.items()}, note
