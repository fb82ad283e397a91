"""What a measurement may be asked: every option with its default, checked before torch is ever imported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

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
UNPAIRED = ("trace_rtol",)
"""Options that no check and no comparison has: pairs need probes of one number."""


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
        rtol: relative width to which the extremes are certified (λ_min: relative to the spectral radius).
        trace_rtol: relative standard error of the trace at which its own probes stop; None: all of ``probes``.
        probes: random quadratic forms, for trace, ‖H‖_F² and what follows from them. 32: with deflation 1 % of
            the trace on a trained network, and enough for t intervals to cover.
        density_probes: random starts of the density, beside ``probes``.
        steps: Lanczos steps of each of these. 8 x 40: bands of a few percent of the bulk's mass.
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
    rtol: float = 1e-3
    trace_rtol: float | None = None
    probes: int = 32
    density_probes: int = 8
    steps: int = 40
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
        for option, tolerance in (("--rtol", self.rtol), ("--trace-rtol", self.trace_rtol)):
            if tolerance is not None and not 0 < tolerance < 1:
                msg = f"{option} {tolerance}: allowed is more than 0 and less than 1"
                raise UsageError(msg)
        if not 0.5 <= self.confidence < 1:
            msg = f"--confidence {self.confidence}: allowed is 0.5 to less than 1"
            raise UsageError(msg)
        at_least(self.probes, 2, "--probes", "a standard error")
        at_least(self.density_probes, 2, "--density-probes", "a band over probes")
        at_least(self.steps, 2, "--steps", "a density")
        if self.operator == "ggn" and self.way == "finite_difference":
            msg = "--operator ggn with --way finite_difference: differences give the Hessian only; drop one"
            raise UsageError(msg)

    def wants(self, *names: str) -> bool:
        """Whether any of these quantities was asked for."""
        return any(name in self.quantities for name in names)

    @staticmethod
    def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
        if value not in allowed:
            msg = f"--{option} {value}: allowed are {', '.join(allowed)}"
            raise UsageError(msg)
