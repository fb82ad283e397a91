"""What a baseline keeps of a measurement: values, intervals, and the samples that make pairing possible."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from hessdiag.results import Analysis, Estimate, Fingerprint, Kind, Metric

DIGITS = 10  # significant; single-precision products have 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """One metric as compared.

    Attributes:
        value: as `hessdiag.results.Metric`, like the four after it.
        per_probe: values of the probes in the order of their index, whose mean is ``value``; empty if none.
        per_draw: values of tr(G) per draw of signs at the outputs: a second source of error, see `Estimate`.
        block_values: per batch, for claims about the population; empty if none.
        block_weights: what each batch's mean stands for.
        block_examples: examples per batch: where the batches' limits lie.
    """

    value: float
    lo: float
    hi: float
    kind: Kind
    confidence: float
    dtype: str = "float32"
    per_probe: tuple[float, ...] = ()
    per_draw: tuple[float, ...] = ()
    block_values: tuple[float, ...] = ()
    block_weights: tuple[float, ...] = ()
    block_examples: tuple[int, ...] = ()

    @classmethod
    def of(cls, metric: Metric) -> Recorded:
        """What of a metric is needed to compare it."""
        data = metric.data
        return cls(
            value=metric.value,
            lo=metric.lo,
            hi=metric.hi,
            kind=metric.kind,
            confidence=metric.confidence,
            dtype=metric.provenance.dtype or "float32",
            per_probe=getattr(metric, "per_probe", ()),
            per_draw=metric.per_draw if isinstance(metric, Estimate) else (),
            block_values=data.block_values if data else (),
            block_weights=data.block_weights if data else (),
            block_examples=data.block_examples if data else (),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """The recorded measurement of one scope.

    Attributes:
        fingerprint: what must agree before anything is compared, and what is said if it does not.
        metrics: by name.
        env: where and when it was measured: torch, device, commit, date, weights; informs only.
        reason: why it was recorded, in the words of whoever did.
    """

    fingerprint: Fingerprint
    metrics: Mapping[str, Recorded]
    env: Mapping[str, Any] = field(default_factory=dict)
    reason: str = ""

    @classmethod
    def of(cls, analysis: Analysis, reason: str = "", env: Mapping[str, Any] | None = None) -> Entry:
        """A measurement as it is compared or recorded."""
        return cls(
            fingerprint=analysis.fingerprint,
            metrics={name: Recorded.of(metric) for name, metric in analysis.metrics.items()},
            env=dict(env or {}),
            reason=reason,
        )
