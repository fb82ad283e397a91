"""How well each quantity is to be known, and what may be spent on it; read before torch is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal

from hessdiag.option import Fault, OptionError, refuse


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """At which accuracy a measurement stops. Defaults are those of the effort "normal".

    Attributes:
        lambda_max: width of its certified interval, relative. 1e-3: papers print three digits, and float32 has no
            more to give on networks with confident examples.
        lambda_min: width relative to the spectral radius: relative to itself it would cost hundreds of products,
            since it lies at the edge of a dense bulk.
        trace: half the interval, relative to the trace, or to ‖H‖_F where that is larger: a trace that cancels is
            not worth all products. 2%: checkpoints that differ differ by more.
        frobenius_squared: half the interval, relative.
        density: its error by depth, the area between the cumulative density and the true one as a share of the
            mean |λ|, as far as more steps make it smaller. On an MLP and a GPT 35% are 25% in truth after 50 and
            85 products; 8 starts of 40 steps each, what others take, leave 60%.
        failure: probability, per side, that a certificate is wrong.
    """

    lambda_max: float = 1e-3
    lambda_min: float = 1e-3
    trace: float = 0.02
    frobenius_squared: float = 0.02
    density: float = 0.35
    failure: float = 1e-3


EFFORTS: Mapping[str, Accuracy] = {
    "quick": Accuracy(
        lambda_max=1e-2, lambda_min=2e-2, trace=0.05, frobenius_squared=0.05, density=0.7, failure=1e-2
    ),
    "normal": Accuracy(),
    "thorough": Accuracy(
        lambda_max=1e-4, lambda_min=1e-4, trace=0.01, frobenius_squared=0.01, density=0.15, failure=1e-6
    ),
}
"""Three named sets of accuracies."""
WRITTEN = "write name=share, for example trace=0.5%,lambda_max=1e-4"


def accuracy(effort: str, changes: str | Mapping[str, float] | None = None) -> Accuracy:
    """The accuracies of an effort, some of them replaced.

    Args:
        effort: a name in `EFFORTS`.
        changes: "trace=0.5%,lambda_max=1e-4", or the same as a mapping of shares.

    Raises:
        OptionError: a name or a share that does not exist.
    """
    if effort not in EFFORTS:
        refuse(Fault("effort", effort, f"allowed: {', '.join(EFFORTS)}"))
    found = EFFORTS[effort]
    if not changes:
        return found
    if not isinstance(changes, str | Mapping):
        refuse(Fault("accuracy", changes, WRITTEN))
    pairs = _pairs(changes) if isinstance(changes, str) else dict(changes)
    names = tuple(field.name for field in fields(Accuracy))
    for name, share in pairs.items():
        if name not in names:
            refuse(Fault("accuracy", name, f"allowed: {', '.join(names)}"))
        if isinstance(share, bool) or not isinstance(share, int | float) or not 0 < share < 1:
            refuse(
                Fault("accuracy", f"{name}={share}", "a share between 0 and 1 is needed, for example 0.01 or 1%")
            )
    return replace(found, **{name: float(share) for name, share in pairs.items()})


def _pairs(text: str) -> dict[str, float]:
    found = {}
    for part in text.split(","):
        name, equals, number = part.strip().partition("=")
        try:
            share = float(number.rstrip("% ")) / (100 if number.rstrip().endswith("%") else 1)
        except ValueError:
            equals = ""
        if not equals:
            refuse(Fault("accuracy", part.strip(), WRITTEN))
        found[name.strip()] = share
    return found


Unit = Literal["s", "p", "g"]
SECONDS = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}
WORDS = {"s": "seconds", "p": "products", "g": "gradients"}


@dataclass(frozen=True, slots=True)
class Budget:
    """What a measurement may spend.

    Attributes:
        amount: seconds since the measurement began, products, or the time of so many gradients of the sample set.
        unit: "s", "p" or "g".
    """

    amount: float
    unit: Unit

    def __str__(self) -> str:
        """In words."""
        return f"{self.amount:g} {WORDS[self.unit]}"


def budget(text: str) -> Budget:
    """Read "60s", "5m", "2h", "200p" (products) or "500g" (gradients).

    Raises:
        OptionError: anything else, or nothing to spend.
    """
    number, unit = str(text).strip(), ""
    while number and number[-1].isalpha():
        number, unit = number[:-1], number[-1] + unit
    try:
        amount = float(number)
    except ValueError:
        amount = 0.0
    if amount > 0 and amount < float("inf"):
        if unit in SECONDS:
            return Budget(amount * SECONDS[unit], "s")
        if unit == "p":
            return Budget(amount, "p")
        if unit == "g":
            return Budget(amount, "g")
    allowed = "allowed: a time (60s, 5m, 2h), products (200p) or gradients (500g)"
    raise OptionError([Fault("budget", text, allowed)])
