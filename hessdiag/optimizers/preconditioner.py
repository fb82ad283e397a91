"""P of an optimizer as numbers: what rescales the Hessian, and the threshold for the rescaled one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hessdiag import hashing
from hessdiag.errors import ProblemError
from hessdiag.optimizers.matching import Stepped, matched
from hessdiag.optimizers.rules import Rule, number, steps
from hessdiag.shown import listed

SHOWN = 3


@dataclass(frozen=True)
class Preconditioner:
    """What an optimizer divides a gradient by, held still, and when its steps diverge.

    Attributes:
        optimizer: its class in torch.optim; "Adam" for AdamW too, whose P is the same.
        inverse: 1/P by parameter name, float64, in the parameters' shapes.
        threshold: what the largest eigenvalue of P^-1/2 H P^-1/2 must stay below; inf where every learning rate is
            0.
        formula: the threshold in words: "38/lr".
        lr: the learning rate; None where groups differ and P holds it.
        step: the most steps that a parameter has made; 0 where the state does not count them.
        notes: one-line facts that change how the number reads.
    """

    optimizer: str
    inverse: Mapping[str, Tensor]
    threshold: float
    formula: str
    lr: float | None
    step: int
    notes: tuple[str, ...] = ()

    def diagonal(self) -> Tensor:
        """That of P^-1/2, (d,), float64: the parameters one after the other."""
        first = next(iter(self.inverse.values()))
        return torch.cat([part.reshape(-1).to(first.device) for part in self.inverse.values()]).sqrt()

    @property
    def sha256(self) -> str:
        """Of P and the threshold."""
        return hashing.key(hashing.of_tensors(self.inverse.values()), self.threshold)


def preconditioner_of(optimizer: Any, named: Mapping[str, Tensor], counted: Sequence[str]) -> Preconditioner:
    """The preconditioner of an optimizer for the parameters that count; costs no product.

    Args:
        optimizer: one of torch's, its state dict, or what has a ``state_dict()``.
        named: all of the model's parameters by name, in its order.
        counted: names of those that the Hessian is about.

    Raises:
        ProblemError: an optimizer that is not known here, one of another model, one that never stepped a parameter
            that counts, or numbers that no run writes.
    """
    if not isinstance(optimizer, Mapping) and not hasattr(optimizer, "state_dict"):
        msg = f"the optimizer is {type(optimizer).__name__}: give an optimizer of torch, or its state_dict()"
        raise ProblemError(msg)
    found = matched(optimizer, named)
    rule, stepped = found.rule, {name: found.stepped[name] for name in counted if name in found.stepped}
    _require_stepped(rule, stepped, named, counted)
    try:
        factors = {name: rule.factor(one.group) for name, one in stepped.items()}
        rates = {name: number(one.group["lr"]) for name, one in stepped.items()}
        whole = {name: rule.diagonal(one.group, one.state) for name, one in stepped.items()}
        diagonals = {name: diagonal.expand(named[name].shape) for name, diagonal in whole.items()}
        last = max(int(steps(one.state)) if rule.steps else 0 for one in stepped.values())
        decays = sorted({number(one.group.get("weight_decay", 0)) for one in stepped.values()} - {0.0})
    except (TypeError, ValueError, KeyError, ArithmeticError, RuntimeError, AttributeError) as error:
        msg = f"the optimizer's state cannot be read as {rule.name}'s ({type(error).__name__}: {error})"
        raise ProblemError(msg) from error
    _require_sound(rule, stepped, factors, rates, diagonals)
    notes = (*found.notes, *_decay(decays))
    inverse, threshold, formula, lr = _folded(diagonals, factors, rates)
    return Preconditioner(rule.name, inverse, threshold, formula, lr, last, notes)


def _folded(
    diagonals: Mapping[str, Tensor], factors: Mapping[str, float], rates: Mapping[str, float]
) -> tuple[dict[str, Tensor], float, str, float | None]:
    """1/P with what differs between groups in it, and the threshold for that: value, formula and learning rate."""
    factor, rate = next(iter(factors.values())), next(iter(rates.values()))
    inverse = {name: 1 / diagonal for name, diagonal in diagonals.items()}
    if len({*factors.values()}) > 1:  # the largest eigenvalue is then the share of the threshold itself
        inverse = {name: part * (rates[name] / factors[name]) for name, part in inverse.items()}
        return inverse, 1.0, "1, with every group's lr and momentum in P", None
    if len({*rates.values()}) > 1:
        inverse = {name: part * rates[name] for name, part in inverse.items()}
        return inverse, factor, f"{factor:.4g}, with every group's lr in P", None
    return inverse, factor / rate if rate else math.inf, f"{factor:.4g}/lr", rate


def _decay(decays: Sequence[float]) -> tuple[str, ...]:
    if not decays:
        return ()
    given = ", ".join(f"{decay:g}" for decay in decays)
    return (f"the optimizer's weight decay ({given}) is not in preconditioned_lambda_max: H is that of the loss",)


def _require_stepped(
    rule: Rule, stepped: Mapping[str, Stepped], named: Mapping[str, Tensor], counted: Sequence[str]
) -> None:
    foreign = [name for name in counted if name not in stepped]
    if foreign:
        msg = f"the optimizer does not hold {listed(foreign, SHOWN)}: leave out with `params` what it never steps"
        raise ProblemError(msg)
    if not rule.steps:
        return
    never = [name for name, one in stepped.items() if not {*rule.tensors, "step"} <= {*one.state}]
    never += [name for name, one in stepped.items() if name not in never and not number(one.state["step"]) >= 1]
    if never:
        msg = (
            f"the optimizer never stepped {listed(never, SHOWN)}, so there is no preconditioner for it: save its "
        )
        raise ProblemError(msg + "state after a step, or leave such parameters out with `params`")
    for name, one in stepped.items():
        shapes = {tuple(getattr(one.state[entry], "shape", ())) for entry in rule.tensors}
        if shapes != {tuple(named[name].shape)}:
            own = tuple(named[name].shape)
            msg = f"the optimizer's state of {name} has shape {shapes.pop()}, the parameter {own}"
            raise ProblemError(msg + ": it belongs to another model, or to a part of a sharded one")
    if any(named[name].is_complex() for name in stepped):
        msg = "complex parameters: preconditioned_lambda_max is known for real ones only"
        raise ProblemError(msg)


def _require_sound(
    rule: Rule,
    stepped: Mapping[str, Stepped],
    factors: Mapping[str, float],
    rates: Mapping[str, float],
    diagonals: Mapping[str, Tensor],
) -> None:
    for name, factor in factors.items():
        momentum = number(stepped[name].group.get("momentum", 0))
        if not (0 < factor < math.inf and 0 <= momentum < 1 and 0 <= rates[name] < math.inf):
            options = ", ".join(f"{one}={stepped[name].group[one]}" for one in rule.options if one != "eps")
            msg = f"the group of {name} in {rule.name} has lr={rates[name]:g}, {options}: no threshold is known "
            raise ProblemError(msg + "for that")
    for name, diagonal in diagonals.items():
        wrong = int((~(diagonal > 0) | ~torch.isfinite(diagonal)).sum())
        if wrong:
            msg = f"{rule.name} divides {wrong} of {diagonal.numel()} numbers of {name} by zero, NaN or infinity: "
            raise ProblemError(msg + "an eps above 0 and a run that did not diverge are needed")
