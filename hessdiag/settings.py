"""What a measurement may be asked: every option with its default, checked before torch is ever imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any, Literal

from hessdiag.accuracy import Accuracy, Budget, accuracy, budget
from hessdiag.errors import UsageError
from hessdiag.results import QUANTITIES, at_least

OPERATORS = ("hessian", "ggn")
DTYPES = ("float32", "float64")
WAYS = (
    "auto",
    "retained_graph",
    "stacked_graph",
    "double_backward",
    "forward_over_reverse",
    "layer_streamed",
    "finite_difference",
)
UNPAIRED = ("effort", "accuracy", "budget")
"""Options that no check and no comparison has: pairs need probes of one number."""
MOST_PROBES = 64
"""Where an accuracy decides, at most: 1% of the trace of a 2-layer GPT takes about as many."""
PAIRED: Mapping[str, Any] = {"rtol": 1e-3, "probes": 32}
"""What checks and comparisons ask for where nothing is said: pairs need probes of one number. 32 know the trace of
a trained network to 1%, and are enough for t intervals to cover."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Options of `hessdiag.analyze`, and of the command of the same name.

    Attributes:
        quantities: names out of `results.QUANTITIES`.
        samples: examples to measure on; None: 1,024, or all if there are fewer.
        batch_size: examples per batch; None: an eighth of the samples, at most 128.
        seed: names every random stream, and the draw of the samples.
        split: which of the problem's data.
        params: globs on parameter names, instead of the problem's own.
        operator: "hessian", or "ggn" for the generalized Gauss-Newton matrix.
        dtype: "float32" or "float64"; None: the model's, half precision in float32 copies.
        device: "cpu", "cuda", "cuda:1"; None: where the model is.
        way: how products are formed; "auto" tries and chooses.
        effort: "quick", "normal" or "thorough": how well everything is to be known (`hessdiag.accuracy.EFFORTS`).
        accuracy: single accuracies instead, "trace=0.5%,lambda_max=1e-4" or a mapping.
        budget: the most to spend, "60s", "200p" (products) or "500g" (gradients); None: what the accuracies take.
        rtol: relative width to which both extremes are certified (λ_min: relative to the spectral radius), instead
            of the accuracies'.
        probes: random quadratic forms, for trace, ‖H‖_F² and what follows from them; None: as many as the
            accuracies take, 8 to 64.
        density_probes: random starts of the density beside the run's own.
        steps: Lanczos steps of each of these, and of the run at least; None: what the density's accuracy takes.
        max_steps: most products for the extremes.
        top: how many of the largest eigenvalues to verify.
        confidence: of intervals over probes and data.
        block: vectors that share one graph.
        second_opinion: compare the measured loss and gradient with those of the user's own model first; costs one
            gradient.
    """

    quantities: Sequence[str] = QUANTITIES
    samples: int | None = None
    batch_size: int | None = None
    seed: int = 0
    split: str = "train"
    params: Sequence[str] | None = None
    operator: Literal["hessian", "ggn"] = "hessian"
    dtype: str | None = None
    device: str | None = None
    way: str = "auto"
    effort: str = "normal"
    accuracy: str | Mapping[str, float] | None = None
    budget: str | None = None
    rtol: float | None = None
    probes: int | None = None
    density_probes: int = 0
    steps: int | None = None
    max_steps: int = 160
    top: int = 1
    confidence: float = 0.95
    block: int = 8
    second_opinion: bool = True

    def __post_init__(self) -> None:
        """Refuse what does not exist or contradicts itself.

        Raises:
            UsageError: an unknown name or a value out of range.
            BudgetError: too few probes or steps for a spread.
        """
        if isinstance(self.quantities, str) or not self.quantities:
            msg = "no quantities asked: give at least one of " + ", ".join(QUANTITIES)
            raise UsageError(msg)
        for name in self.quantities:
            if name not in QUANTITIES:
                near = get_close_matches(name, QUANTITIES, 1)
                hint = f"did you mean {near[0]}?" if near else f"allowed are {', '.join(QUANTITIES)}"
                msg = f"--quantities {name}: no such quantity; {hint}"
                raise UsageError(msg)
        self._one_of("operator", self.operator, OPERATORS)
        self._one_of("way", self.way, WAYS)
        if self.dtype is not None:
            self._one_of("dtype", self.dtype, DTYPES)
        for option in ("samples", "batch_size", "max_steps", "top", "block"):
            value = getattr(self, option)
            if value is not None and value < 1:
                msg = f"--{option.replace('_', '-')} {value}: at least 1 is needed"
                raise UsageError(msg)
        if self.rtol is not None and not 0 < self.rtol < 1:
            msg = f"--rtol {self.rtol}: allowed is more than 0 and less than 1"
            raise UsageError(msg)
        self.known_to, self.spending  # noqa: B018  (each refuses what it cannot read)
        if not 0.5 <= self.confidence < 1:
            msg = f"--confidence {self.confidence}: allowed is 0.5 to less than 1"
            raise UsageError(msg)
        at_least(2 if self.probes is None else self.probes, 2, "--probes", "a standard error")
        at_least(self.density_probes or 2, 2, "--density-probes", "a band over probes")
        at_least(2 if self.steps is None else self.steps, 2, "--steps", "a density")
        if self.operator == "ggn" and self.way == "finite_difference":
            msg = "--operator ggn with --way finite_difference: differences give the Hessian only; drop one"
            raise UsageError(msg)

    @property
    def known_to(self) -> Accuracy:
        """The accuracy of each quantity, all options taken together.

        Raises:
            UsageError: an effort or an accuracy that does not exist.
        """
        found = accuracy(self.effort, self.accuracy)
        return found if self.rtol is None else replace(found, lambda_max=self.rtol, lambda_min=self.rtol)

    @property
    def spending(self) -> Budget | None:
        """The budget, read.

        Raises:
            UsageError: it cannot be read.
        """
        return None if self.budget is None else budget(self.budget)

    @property
    def most_probes(self) -> int:
        """Probes at most: as asked, or what an accuracy may take."""
        return MOST_PROBES if self.probes is None else self.probes

    def wants(self, *names: str) -> bool:
        """Whether any of these quantities was asked for."""
        return any(name in self.quantities for name in names)

    @staticmethod
    def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            msg = f"--{option} {value}: allowed are {', '.join(allowed)}"
            raise UsageError(msg)
