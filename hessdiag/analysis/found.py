"""What a sweep has found so far: handed from stage to stage."""

from __future__ import annotations

from dataclasses import dataclass, field

from hessdiag.closed_form import ClosedForm
from hessdiag.engine.products.records import Record
from hessdiag.results import Bound, Convergence, Layer, Metric, RitzValue, Spectrum
from hessdiag.spectral import Forms, Krylov


@dataclass
class Found:
    """What a sweep has found so far."""

    metrics: dict[str, Metric] = field(default_factory=dict)
    krylov: Krylov | None = None
    run: Record = field(default_factory=Record)  # what the run's products showed
    closed: ClosedForm | None = None
    forms: Forms | None = None
    probes: Record = field(default_factory=Record)  # what the products of ``forms`` showed
    spectrum: Spectrum | None = None
    top: tuple[RitzValue, ...] = ()
    other_bounds: tuple[Bound, ...] = ()
    layers: tuple[Layer, ...] = ()
    convergence: Convergence = field(default_factory=Convergence)
    warnings: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
