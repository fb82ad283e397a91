"""One measurement of a tracker: its rows, what loggers are given of it, and how it goes through a state dict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hessdiag.results import RitzValue
from hessdiag.results.runfile import read_run
from hessdiag.track.trajectory import PRECONDITIONED, Point, Rate

COLUMNS = ("step", "quantity", "value", "lo", "hi", "how", "lr", "seconds", "products", "reason")
PREFIX = "hessdiag/"
"""Begins the names that loggers are given: they make a group of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What was found at a step.

    Attributes:
        step: of training.
        point: of the trajectory; its analysis is None where nothing could be measured.
        lr: learning rate; NaN where nobody said it.
        seconds: of the whole measurement, checks included.
        refused: why single quantities were left out, by name.
    """

    step: int
    point: Point
    lr: float = math.nan
    seconds: float = 0.0
    refused: Mapping[str, str] = field(default_factory=dict)

    def rows(self, quantities: Sequence[str]) -> Iterator[dict[str, Any]]:
        """A row of `COLUMNS` per quantity asked for; one that has no number has its reason."""
        analysis = self.point.analysis
        whole = {"lr": self.lr, "seconds": self.seconds, "products": analysis.cost.products if analysis else 0}
        for name in quantities:
            metric = analysis.metrics.get(name) if analysis else None
            if metric is not None:
                numbers = {"value": metric.value, "lo": metric.lo, "hi": metric.hi, "how": str(metric.kind)}
                yield {"step": self.step, "quantity": name, **numbers, **whole, "reason": ""}
            elif analysis is None or name != "density" or analysis.spectrum is None:
                numbers = {"value": math.nan, "lo": math.nan, "hi": math.nan, "how": ""}
                yield {"step": self.step, "quantity": name, **numbers, **whole, "reason": self._why(name)}

    def _why(self, name: str) -> str:
        if self.point.analysis is None:
            return self.point.error
        left = next((text for text in self.point.analysis.warnings if name in text), "")
        return self.refused.get(name) or left or "the measurement ended before it"

    def scalars(self) -> dict[str, float]:
        """What a logger is given, by name; empty where nothing was measured."""
        analysis, point = self.point.analysis, self.point
        if analysis is None:
            return {}
        found = {"loss": point.value("loss")}
        for name, metric in analysis.metrics.items():
            found |= {name: metric.value, f"{name}_lo": metric.lo, f"{name}_hi": metric.hi}
        if point.rate is not None:
            found["stability_limit"] = point.rate.limit
        if (relative := point.relative()) is not None:
            found["lambda_max_over_limit"] = relative[0]
        own = analysis.metrics.get(PRECONDITIONED)
        if isinstance(own, RitzValue) and own.over_threshold is not None:
            found[f"{PRECONDITIONED}_over_threshold"] = own.over_threshold[0]
        return {PREFIX + name: float(value) for name, value in found.items() if math.isfinite(value)}

    def state(self) -> dict[str, Any]:
        """In types that ``torch.load(weights_only=True)`` takes."""
        point = self.point
        return {
            "step": self.step,
            "lr": self.lr,
            "seconds": self.seconds,
            "refused": dict(self.refused),
            "error": point.error,
            "warm": point.warm,
            "rate": None if point.rate is None else asdict(point.rate),
            "run": None if point.analysis is None else point.analysis.to_json(),
        }

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Measured:
        """What `state` was made of.

        Raises:
            UsageError: its run is of a newer schema.
        """
        step, run, rate = state["step"], state["run"], state["rate"]
        point = Point(
            name=name_of(step),
            path="",
            analysis=None if run is None else read_run(run, f"step {step} of the state"),
            error=state["error"],
            rate=None if rate is None else Rate(**rate),
            warm=state["warm"],
            at=step,
        )
        return cls(
            step=step, point=point, lr=state["lr"], seconds=state["seconds"], refused=dict(state["refused"])
        )


def name_of(step: int) -> str:
    """What a point is called."""
    return f"step {step}"
