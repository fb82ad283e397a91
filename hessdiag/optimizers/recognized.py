"""Which optimizer it is: by its class where it is at hand, by what its groups and states hold where it is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hessdiag.errors import ProblemError
from hessdiag.optimizers.rules import KNOWN, RULES, Group, Rule, State
from hessdiag.shown import listed

COMMON = frozenset(
    {
        *("lr", "weight_decay", "maximize", "foreach", "capturable", "differentiable", "fused"),
        *("decoupled_weight_decay", "params", "param_names", "name"),
        *("initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "lr_scale"),
    }
)
"""Options of a group that say nothing of the kind of optimizer; schedules of the learning rate write the last."""
UNDERSTOOD = f"understood are torch's {listed(KNOWN, len(KNOWN))}"
SHOWN = 5


def by_class(optimizer: Any) -> Rule:
    """The rule of an optimizer of torch, or of a class that leaves its ``step`` as it is.

    Raises:
        ProblemError: another one, whose steps are not known here.
    """
    kind = type(optimizer)
    module, _, name = f"{kind.step.__module__}.{kind.step.__qualname__.split('.')[0]}".rpartition(".")
    found = next((rule for rule in RULES if rule.name == name.replace("AdamW", "Adam")), None)
    if found is None or not module.startswith("torch.optim."):
        msg = f"the optimizer is {kind.__name__}, whose steps are not known here: {UNDERSTOOD}"
        raise ProblemError(msg)
    return found


def by_content(groups: Sequence[Group], states: Sequence[State]) -> Rule:
    """The rule whose optimizer writes such groups and states.

    Raises:
        ProblemError: none; the text says what is not torch's.
    """
    options = {name for group in groups for name in group}
    held = {name for state in states for name in state} - {"step"}
    for rule in RULES:
        if {*rule.options} <= options <= {*rule.options, *COMMON} and (
            {*rule.tensors} <= held <= {*rule.tensors, *rule.beside} or not states
        ):
            return rule
    own = listed(sorted(map(str, options - COMMON)), SHOWN) or "no options of its own"
    kept = f"and keeps {listed(sorted(map(str, held)), SHOWN)}" if held else "and keeps nothing"
    msg = (
        f"the optimizer's state has {own} {kept}, which none of torch's has so: {UNDERSTOOD}; where it is one of "
        "these, give the optimizer itself, `optimizer=optimizer`"
    )
    raise ProblemError(msg)


def require_minimizing(groups: Sequence[Mapping[str, Any]]) -> None:
    """Refuse an optimizer that ascends.

    Raises:
        ProblemError: a group has maximize=True.
    """
    if any(bool(group.get("maximize")) for group in groups):
        msg = "the optimizer has maximize=True: a threshold of stability is that of a descent"
        raise ProblemError(msg)
