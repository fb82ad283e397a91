"""The preconditioner P of each of torch's optimizers, as its own code computes the step, and its threshold.

With P held still, a step is x <- x - lr P^-1 (A g + B m), m <- beta m + C g. On a quadratic it is stable while the
largest eigenvalue of P^-1/2 H P^-1/2 is below 2 (1 + beta) / (lr (A (1 + beta) + B C)); the page
preconditioned_lambda_max derives it. `Rule.factor` is that without the lr, for late steps; what bias corrections
change of it at an early step is in P.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Group = Mapping[str, Any]
State = Mapping[str, Any]


@dataclass(frozen=True)
class Rule:
    """One optimizer.

    Attributes:
        name: its class in torch.optim.
        factor: of a parameter group, the threshold times the learning rate.
        diagonal: of a group and a parameter's state, that of P, float64 in the parameter's shape.
        tensors: of a parameter's state, which has them after a step; in the parameter's shape.
        beside: of its state, what else there may be, "step" aside.
        options: of a group, by which it is known where only the state is there.
        steps: whether P needs a state; without, it is the identity.
    """

    name: str
    factor: Callable[[Group], float]
    diagonal: Callable[[Group, State], Tensor]
    tensors: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    steps: bool = True


def number(value: Any) -> float:
    """A number of a group or a state, which may be a tensor of one element."""
    return float(value)


def steps(state: State) -> float:
    """How many steps were made."""
    return number(state["step"])


def _wide(state: State, name: str) -> Tensor:
    found: Tensor = state[name].detach().double()
    return found


def _betas(group: Group) -> tuple[float, float]:
    first, second = group["betas"]
    return number(first), number(second)


def _averaged(group: Group) -> float:
    """Of a gradient that is averaged: 2 (1 + beta1) / (1 - beta1), 38 for beta1 = 0.9."""
    beta = _betas(group)[0]
    return 2 * (1 + beta) / (1 - beta)


def _corrections(group: Group, state: State) -> tuple[float, float]:
    first, second = _betas(group)
    return 1 - first ** steps(state), 1 - second ** steps(state)


def _adam(group: Group, state: State) -> Tensor:
    first, second = _corrections(group, state)
    largest = "max_exp_avg_sq" if group.get("amsgrad") else "exp_avg_sq"
    return ((_wide(state, largest) / second).sqrt() + number(group["eps"])) * first


def _adamax(group: Group, state: State) -> Tensor:
    return _wide(state, "exp_inf") * _corrections(group, state)[0]


def _radam(group: Group, state: State) -> Tensor:
    second, (first, correction) = _betas(group)[1], _corrections(group, state)
    longest = 2 / (1 - second) - 1
    length = longest - 2 * steps(state) * second ** steps(state) / correction
    if length <= 5:  # torch's own limit: the first steps are those of momentum alone
        return torch.full_like(_wide(state, "exp_avg_sq"), first)
    share = (length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length)
    return (_wide(state, "exp_avg_sq").sqrt() + number(group["eps"])) * (first / math.sqrt(correction * share))


def _looked_ahead(group: Group) -> float:
    """Of NAdam at late steps, Nesterov's form of an average: 2 (1 + beta1) / ((1 - beta1) (1 + 2 beta1))."""
    return _averaged(group) / (1 + 2 * _betas(group)[0])


def _nadam(group: Group, state: State) -> Tensor:
    beta, second = _betas(group)[0], _corrections(group, state)[1]
    decay, step, product = number(group["momentum_decay"]), steps(state), number(state["mu_product"])
    now, after = (beta * (1 - 0.5 * 0.96 ** (at * decay)) for at in (step, step + 1))
    straight, averaged = (1 - now) / (1 - product), after / (1 - product * after)
    together = straight * (1 + beta) + averaged * (1 - beta)
    denominator = (_wide(state, "exp_avg_sq") / second).sqrt() + number(group["eps"])
    return denominator.mul_(2 * (1 + beta) / (_looked_ahead(group) * together))


def _heavy_ball(group: Group) -> float:
    return 2 * (1 + number(group["momentum"]))


def _rmsprop(group: Group, state: State) -> Tensor:
    square = _wide(state, "square_avg")
    if group["centered"]:
        square = square - _wide(state, "grad_avg") ** 2
    return square.sqrt() + number(group["eps"])


def _plain(_: Group) -> float:
    return 2.0


def _adagrad(group: Group, state: State) -> Tensor:
    slower = 1 + (steps(state) - 1) * number(group["lr_decay"])
    return (_wide(state, "sum").sqrt() + number(group["eps"])) * slower


def _adadelta(group: Group, state: State) -> Tensor:
    eps = number(group["eps"])
    return ((_wide(state, "square_avg") + eps) / (_wide(state, "acc_delta") + eps)).sqrt()


def _momentum(group: Group) -> float:
    """Of SGD: 2 (1 + mu) / (1 - dampening), and over 1 + 2 mu with Nesterov's, which has no dampening."""
    mu, dampening = number(group["momentum"]), number(group["dampening"])
    if mu == 0 or dampening == 1:  # of a gradient that never enters there is no threshold
        return math.inf if mu else 2.0
    return 2 * (1 + mu) / (1 + 2 * mu if group["nesterov"] else 1 - dampening)


def _identity(_: Group, __: State) -> Tensor:
    return torch.ones((), dtype=torch.float64)


ADAM = ("exp_avg", "exp_avg_sq")
MOMENTUM = ("momentum", "dampening", "nesterov")
RMSPROP = ("alpha", "eps", "centered", "momentum")
RULES = (
    Rule("Adam", _averaged, _adam, ADAM, ("max_exp_avg_sq",), ("betas", "eps", "amsgrad")),
    Rule("Adamax", _averaged, _adamax, ("exp_avg", "exp_inf"), (), ("betas", "eps")),
    Rule("NAdam", _looked_ahead, _nadam, ADAM, ("mu_product",), ("betas", "eps", "momentum_decay")),
    Rule("RAdam", _averaged, _radam, ADAM, (), ("betas", "eps", "decoupled_weight_decay", "differentiable")),
    Rule("RMSprop", _heavy_ball, _rmsprop, ("square_avg",), ("grad_avg", "momentum_buffer"), RMSPROP),
    Rule("Adagrad", _plain, _adagrad, ("sum",), (), ("eps", "lr_decay", "initial_accumulator_value")),
    Rule("Adadelta", _plain, _adadelta, ("square_avg", "acc_delta"), (), ("rho", "eps")),
    Rule("SGD", _momentum, _identity, (), ("momentum_buffer",), MOMENTUM, steps=False),
)
KNOWN = ("Adam", "AdamW", *(rule.name for rule in RULES[1:]))
"""Classes of torch.optim; of AdamW a file holds what it holds of Adam, and P is the same."""
