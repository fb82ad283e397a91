"""The spectrum along training, as numbers: one point per checkpoint, all about the same samples."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hessdiag.results.analysis import Analysis
from hessdiag.results.fingerprint import Fingerprint
from hessdiag.results.metrics import RitzValue
from hessdiag.results.plain import as_json, json_text
from hessdiag.shown import encodable

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
PRECONDITIONED = "preconditioned_lambda_max"


@dataclass(frozen=True, slots=True, kw_only=True)
class Rate:
    """The optimizer's step at a checkpoint, as far as its stability on a quadratic goes.

    Attributes:
        lr: η.
        momentum: β of heavy ball; 0.0 for plain gradient descent.
        nesterov: whether the momentum is Nesterov's.
        origin: who says so: "lr" for the option, "checkpoint" or "problem.meta".
    """

    lr: float
    momentum: float = 0.0
    nesterov: bool = False
    origin: str = ""

    @property
    def limit(self) -> float:
        """Sharpness beyond which full-batch descent with this step diverges on a quadratic.

        2/η; with heavy ball (2 + 2β)/η, with Nesterov (2 + 2β)/((1 + 2β) η) (Cohen et al. 2021, arXiv 2103.00065,
        section 2 and appendix B).
        """
        beta = self.momentum
        return (2 + 2 * beta) / self.lr / (1 + 2 * beta if self.nesterov else 1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One checkpoint of a trajectory.

    Attributes:
        name: short.
        path: as given.
        analysis: None where it could not be measured.
        error: why not, in one line; '' otherwise.
        rate: the optimizer's step; None where it is not known.
        warm: whether the extremes started near the checkpoint before.
        reused: whether it was measured by an earlier, interrupted or shorter, run.
        at: training step at which it was measured; None where that is not known.
    """

    name: str
    path: str
    analysis: Analysis | None = None
    error: str = ""
    rate: Rate | None = None
    warm: bool = False
    reused: bool = False
    at: int | None = None

    def value(self, fact: str) -> float:
        """A number of the measurement's surroundings ("loss", "gradient_norm"); NaN without one."""
        found = None if self.analysis is None else self.analysis.environment.get(fact)
        return float(found) if isinstance(found, int | float) else math.nan

    def relative(self) -> tuple[float, float, float] | None:
        """λ_max over the step's limit with its interval: λ_max η/2 without momentum."""
        metric = None if self.analysis is None else self.analysis.metrics.get("lambda_max")
        if metric is None or self.rate is None:
            return None
        limit = self.rate.limit
        return metric.value / limit, metric.lo / limit, metric.hi / limit

    def over_threshold(self) -> tuple[float, float, float] | None:
        """The preconditioned λ_max over the optimizer's threshold with its interval, where it was measured."""
        metric = None if self.analysis is None else self.analysis.metrics.get(PRECONDITIONED)
        return metric.over_threshold if isinstance(metric, RitzValue) else None

    def to_dict(self) -> dict[str, Any]:
        """Plain types: the numbers, without density and history (those are in the checkpoint's own file)."""
        out: dict[str, Any] = {"name": self.name, "path": self.path, "error": self.error or None}
        out |= {} if self.at is None else {"training_step": self.at}
        if self.analysis is None:
            return out
        whole = self.analysis.to_dict()
        out |= {key: whole[key] for key in ("metrics", "cost", "warnings", "notes")}
        out |= {name: as_json(self.value(name)) for name in ("loss", "gradient_norm")}
        out |= {"weights_sha256": self.analysis.fingerprint.weights_sha256}
        out |= {"warm_start": self.warm, "reused": self.reused, "step": None}
        if self.rate is not None:
            limit = {"limit": self.rate.limit, "lambda_max_over_limit": self.relative()}
            names = ("lr", "momentum", "nesterov", "origin")
            out["step"] = {name: getattr(self.rate, name) for name in names} | limit
        return out


@dataclass(frozen=True, slots=True, kw_only=True)
class Trajectory:
    """Checkpoints in order, all about the same samples and parameters.

    Attributes:
        points: measured and failed ones.
        notes: one-line facts about the whole.
    """

    points: tuple[Point, ...]
    notes: tuple[str, ...] = ()

    @property
    def measured(self) -> tuple[tuple[Point, Analysis], ...]:
        """Points with their analyses, failed ones left out."""
        return tuple((point, point.analysis) for point in self.points if point.analysis is not None)

    @property
    def failed(self) -> tuple[Point, ...]:
        """Points that could not be measured."""
        return tuple(point for point in self.points if point.analysis is None)

    @property
    def products(self) -> int:
        """Products spent on all points, by this run and earlier ones."""
        return sum(analysis.cost.products for _, analysis in self.measured)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``trajectory.json``: plain types only, with the schema number."""
        first = self.measured[0][1].fingerprint if self.measured else Fingerprint()
        return {
            "schema": SCHEMA,
            "kind": "trajectory",
            "fingerprint": dict(replace(first, weights_sha256=None, checkpoint_sha256=None)),
            "products": self.products,
            "notes": list(self.notes),
            "checkpoints": [point.to_dict() for point in self.points],
        }

    def to_json(self) -> str:
        """``trajectory.json`` as text, stable under re-writing."""
        return json_text(self.to_dict())

    def to_frame(self) -> pd.DataFrame:
        """Tidy table, one row per checkpoint and quantity.

        Columns: position, checkpoint, path, status, quantity, value, lo, hi, kind. Beside the metrics there are
        loss, gradient_norm, learning_rate, stability_limit, lambda_max_over_limit and
        preconditioned_lambda_max_over_threshold. A checkpoint that failed has one row, with its reason as status
        and no quantity.
        """
        import pandas as pd

        rows = []
        for position, point in enumerate(self.points, 1):
            known = {"position": position, "checkpoint": encodable(point.name), "path": encodable(point.path)}
            for quantity, value, lo, hi, kind in _quantities(point):
                numbers = {"quantity": quantity, "value": value, "lo": lo, "hi": hi, "kind": kind}
                rows.append({**known, "status": encodable(point.error or "measured"), **numbers})
        return pd.DataFrame(rows)


def _quantities(point: Point) -> list[tuple[str, float, float, float, str]]:
    if point.analysis is None:
        return [("", math.nan, math.nan, math.nan, "")]
    rows = [(name, m.value, m.lo, m.hi, str(m.kind)) for name, m in point.analysis.metrics.items()]
    exact = {name: point.value(name) for name in ("loss", "gradient_norm")}
    relative = point.relative()
    if point.rate is not None:
        exact |= {"learning_rate": point.rate.lr, "stability_limit": point.rate.limit}
    rows += [(name, value, value, value, "exact") for name, value in exact.items()]
    if (share := point.over_threshold()) is not None:
        rows.append((f"{PRECONDITIONED}_over_threshold", *share, "ritz"))
    return rows if relative is None else [*rows, ("lambda_max_over_limit", *relative, "ritz")]
