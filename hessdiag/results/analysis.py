"""Everything one measurement gives, and how it is written down."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hessdiag.errors import UsageError
from hessdiag.folders import write_together
from hessdiag.option import hint
from hessdiag.presenter import presenter
from hessdiag.results.fingerprint import Fingerprint
from hessdiag.results.metrics import MEASURABLE, Bound, Kind, Metric, RitzValue
from hessdiag.results.plain import as_json, json_text
from hessdiag.results.spectrum import Spectrum
from hessdiag.shown import csv_text, visible

if TYPE_CHECKING:
    import pandas as pd


SCHEMA = 1
SAVED = ("run.json", "metrics.csv", "spectrum.csv", "layers.csv")


class UnknownQuantityError(UsageError, KeyError):
    """An analysis was asked for a number that it does not have."""

    def __str__(self) -> str:
        """The text, which a KeyError would put in quotes."""
        return visible(str(self.args[0]))


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """One parameter tensor's share of the trace."""

    name: str
    size: int
    trace: float
    lo: float
    hi: float
    kind: Kind


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Convergence:
    """How the numbers settled: for the reader to judge whether enough was spent."""

    steps: tuple[int, ...] = ()
    ritz_max: tuple[float, ...] = ()  # largest Ritz value after each step
    ritz_min: tuple[float, ...] = ()
    certificate_max: tuple[float, ...] = ()  # upper certificate at the same steps; inf while there is none
    certificate_min: tuple[float, ...] = ()
    trace_mean: tuple[float, ...] = ()  # running mean of the trace forms, from the second probe on
    trace_half_width: tuple[float, ...] = ()  # half the confidence interval at the same probes

    def __repr__(self) -> str:
        """How far it reaches."""
        return f"<Convergence over {self.steps[-1] if self.steps else 0} steps and {len(self.trace_mean)} probes>"


@dataclass(frozen=True, slots=True, kw_only=True)
class SelfTest:
    """The four numbers that say whether the products can be believed, all relative, and the worst tensor."""

    repeatability: float  # same product twice
    symmetry: float  # |u·Hv − v·Hu| / scale
    finite_difference: float  # product against differences of the gradient, worst tensor
    gradient_error: float  # gradient against differences of the loss
    worst_tensor: str
    precision: str  # dtype the differences were taken in
    methods_agree: float | None = None  # relative difference between the products of two methods
    kink: str | None = None  # tensor whose gradient jumps at the checkpoint; differences are of weights beside it


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondOpinion:
    """The user's own loss and gradient, by their model and torch alone, against the measured ones."""

    loss: float  # mean over the sample set, of the untouched model in evaluation mode
    loss_off: float  # relative difference from the measured loss
    gradient_off: float  # relative, worst tensor, between the plain gradient and the measured one
    worst_tensor: str
    model_loss: float | None = None  # what model(**batch).loss is on the first batch, where there is such a thing


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """What the measurement cost."""

    products: int
    gradients: float  # a ratio of times, no count: the engine's over that of one gradient of the same samples
    seconds: float


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Analysis:
    """Every number asked for, with what is needed to trust and repeat it.

    >>> import hessdiag, torch
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> x, y = torch.randn(64, 5), torch.randint(3, (64,))
    >>> asked = {"quantities": ["lambda_max", "trace"]}
    >>> found = hessdiag.analyze(nn.Linear(5, 3), nn.CrossEntropyLoss(), (x, y), **asked)
    >>> found["trace"] is found.trace is found.metrics["trace"]
    True
    >>> "lambda_min" in found
    False
    """

    metrics: Mapping[str, Metric]
    spectrum: Spectrum | None = None
    top: tuple[RitzValue, ...] = ()
    other_bounds: tuple[Bound, ...] = ()
    layers: tuple[Layer, ...] = ()
    convergence: Convergence = field(default_factory=Convergence)
    self_test: SelfTest | None = None
    second_opinion: SecondOpinion | None = None
    fingerprint: Fingerprint = field(default_factory=Fingerprint)
    cost: Cost = field(default_factory=lambda: Cost(products=0, gradients=0.0, seconds=0.0))
    environment: Mapping[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()  # facts that change how the numbers read, not faults
    title: str = ""

    def __getitem__(self, quantity: str) -> Metric | Spectrum:
        """A number by its name, bounds that came beside it included; "density" is the spectrum.

        Raises:
            UnknownQuantityError: a KeyError too; its text says what was measured.
        """
        found = self._found().get(quantity)
        if found is None:
            raise UnknownQuantityError(self._lacking(quantity))
        return found

    def __getattr__(self, quantity: str) -> Metric | Spectrum:
        """As ``analysis[quantity]``; only names that are no fields arrive here."""
        if quantity.startswith("_"):
            raise AttributeError(quantity)
        found = self._found().get(quantity)
        if found is None:
            raise AttributeError(self._lacking(quantity))
        return found

    def __contains__(self, quantity: object) -> bool:
        return quantity in self._found()

    def __iter__(self) -> Iterator[str]:
        return iter(self._found())

    def __dir__(self) -> list[str]:
        return [*object.__dir__(self), *self._found()]

    def _found(self) -> dict[str, Metric | Spectrum]:
        density = {} if self.spectrum is None else {"density": self.spectrum}
        bounds = {bound.quantity: bound for bound in self.other_bounds if bound.quantity not in self.metrics}
        return {**self.metrics, **density, **bounds}

    def _lacking(self, name: str) -> str:
        had = ", ".join(self._found()) or "nothing"
        if name in MEASURABLE:
            return f"{name} was not measured, only {had}: analyze(..., quantities=[{name!r}])"
        return f"an analysis has no {name!r}; {hint(name, [*self._found()])}"

    def about(self, title: str, notes: Sequence[str] = (), weights_file: str | None = None) -> Analysis:
        """This analysis with a title, facts about where its weights came from, and their file's sha256."""
        fingerprint = self.fingerprint
        if weights_file:
            fingerprint = dataclasses.replace(fingerprint, checkpoint_sha256=weights_file)
        return dataclasses.replace(self, title=title, notes=(*notes, *self.notes), fingerprint=fingerprint)

    def to_dict(self) -> dict[str, Any]:
        """The content of ``run.json``: plain types only, with the schema number."""
        return {"schema": SCHEMA, **as_json(self)}

    def to_json(self) -> str:
        """``run.json`` as text: sorted keys, stable under re-writing."""
        return json_text(self.to_dict())

    def to_frame(self) -> pd.DataFrame:
        """Tidy table, one row per metric: quantity, value, lo, hi, kind, confidence, stderr, products."""
        import pandas as pd

        rows = [
            {
                "quantity": name,
                "value": metric.value,
                "lo": metric.lo,
                "hi": metric.hi,
                "kind": metric.kind,
                "confidence": metric.confidence,
                "stderr": getattr(metric, "stderr", math.nan),
                "data_stderr": metric.data.stderr if metric.data else math.nan,
                "products": metric.provenance.products,
                "method": metric.provenance.method,
            }
            for name, metric in self.metrics.items()
        ]
        return pd.DataFrame(rows)

    def files(self) -> dict[str, str]:
        """What `save` writes, by name: run.json, metrics.csv and, where measured, spectrum.csv and layers.csv."""
        found = {"run.json": self.to_json(), "metrics.csv": csv_text(self.to_frame())}
        if self.spectrum is not None:
            found["spectrum.csv"] = csv_text(self.spectrum.to_frame())
        if self.layers:
            import pandas as pd

            layers = pd.DataFrame([dataclasses.asdict(layer) for layer in self.layers])
            found["layers.csv"] = csv_text(layers)
        return found

    def save(self, folder: str | Path) -> Path:
        """Write the files of `files` into ``folder``; none of an earlier run stays beside them.

        Returns:
            The path of run.json.

        Raises:
            OutputError: the folder cannot be written.
        """
        return write_together(folder, self.files(), SAVED) / "run.json"

    @property
    def plot(self) -> Any:
        """``analysis.plot.density(ax=None)`` and others; see `hessdiag.present.Plots`."""
        return presenter().Plots(self)

    def __repr__(self) -> str:
        """A line per quantity: value and interval."""
        return str(presenter().brief(self))

    def _repr_html_(self) -> str:
        return str(presenter().notebook(self))
