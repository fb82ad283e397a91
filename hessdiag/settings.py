"""What a measurement may be asked: every option with its default, checked before torch is ever imported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, TypedDict, get_args

from hessdiag.accuracy import EFFORTS, Accuracy, Budget, accuracy, budget
from hessdiag.described import documented
from hessdiag.option import Fault, faults_of, option, refuse
from hessdiag.results import MEASURABLE, QUANTITIES

Operator = Literal["hessian", "ggn"]
OPERATORS = get_args(Operator)
DTYPES = ("float32", "float64")
METHODS = (
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
PAIRED: Mapping[str, Any] = {"rtol": EFFORTS["normal"].lambda_max, "probes": 32}
"""What checks and comparisons ask for where nothing is said: pairs need probes of one number. 32 know the trace of
a trained network to 1%, and are enough for t intervals to cover."""


@documented
@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Options of `hessdiag.analyze`, and of the command of the same name.

    Each is defined here and nowhere else: flags, the tables of a configuration and this text come from it.

    >>> import hessdiag
    >>> hessdiag.Settings(probes=16).most_probes
    16
    """

    quantities: Sequence[str] = option(
        QUANTITIES,
        help=f"Quantities to measure, out of {', '.join(MEASURABLE)}.",
        metavar="A,B",
        instead="all but the last",
        choices=MEASURABLE,
        many=True,
    )
    samples: int | None = option(
        None, help="Number of examples to measure on.", metavar="N", instead="1024, or all", at_least=1
    )
    batch_size: int | None = option(
        None,
        help="Examples per batch. It does not change the numbers.",
        more="None: an eighth of the samples; at most 128 on the CPU, as many as fit on an accelerator.",
        metavar="N",
        at_least=1,
    )
    seed: int = option(0, help="Seed of every random stream.", more="The draw of the samples too.")
    split: str = option("train", help="Which split of the problem's data to measure on.")
    params: Sequence[str] | None = option(
        None,
        help="Parameters to differentiate by. !GLOB leaves parameters out.",
        more="None: the problem's own.",
        metavar="GLOB",
        many=True,
    )
    operator: Operator = option("hessian", help="The Hessian, or its Gauss-Newton part.", choices=OPERATORS)  # noqa: RUF009  (a field)
    dtype: str | None = option(
        None,
        help="Precision of the products.",
        instead="the model's",
        more="Half precision is measured in float32 copies.",
        choices=DTYPES,
    )
    device: str | None = option(None, help="Where to compute: cpu, cuda, cuda:1.", instead="where the model is")
    method: str = option(
        "auto",
        help="How Hessian-vector products are computed.",
        more='"auto" tries the exact methods and takes the fastest.',
        choices=METHODS,
        formerly="way",
    )
    effort: str = option(
        "normal",
        help="How accurate all numbers must be: three named sets of accuracies.",
        more="They are `hessdiag.accuracy.EFFORTS`.",
        choices=tuple(EFFORTS),
    )
    accuracy: str | Mapping[str, float] | None = option(
        None,
        help="Accuracies of single quantities, for example trace=0.5%,lambda_max=1e-4.",
        more="In Python a mapping too.",
        metavar="A=X,B=Y",
        read=lambda value: accuracy("normal", value),
    )
    budget: str | None = option(
        None,
        help="Stop after this time, or this many products (200p) or gradients (500g).",
        more="None: what the accuracies take.",
        metavar="N[s|m|h|p|g]",
        read=budget,
    )
    rtol: float | None = option(
        None,
        help="Relative width of the intervals of λ_max and λ_min.",
        instead=f"by accuracy, {PAIRED['rtol']:.0e}".replace("e-0", "e-"),
        more="λ_min: relative to the spectral radius.",
        above=0,
        below=1,
    )
    probes: int | None = option(
        None,
        help="Number of random probe vectors.",
        instead="as many as the accuracy takes",
        more="For trace, ‖H‖_F² and what follows from them; as many are 8 to 64.",
        at_least=2,
        needed_by="a standard error",
    )
    density_probes: int = option(
        0,
        help="Extra random starts of the density.",
        instead="none",
        at_least=2,
        or_zero=True,
        needed_by="a band over probes",
    )
    steps: int | None = option(
        None,
        help="Lanczos steps from each start.",
        instead="by accuracy, about 50",
        more="Of the run at least.",
        at_least=2,
        needed_by="a density",
    )
    max_steps: int = option(
        160, help="Maximum Hessian-vector products for λ_max, λ_min and the density.", at_least=1
    )
    top: int = option(1, help="Number of largest eigenvalues to verify.", at_least=1)
    confidence: float = option(
        0.95, help="Confidence of the intervals.", more="Over probes and data.", at_least=0.5, below=1
    )
    block: int = option(8, help="Probe vectors multiplied at once (memory).", at_least=1)
    second_opinion: bool = option(
        True,
        help="First compare loss and gradient with the model's own.",
        more="Costs one gradient.",
    )

    def __post_init__(self) -> None:
        """Refuse what does not exist or contradicts itself.

        Raises:
            OptionError: an unknown name or a value out of range; all faults at once.
            BudgetError: the first fault is too few probes or steps for a spread.
        """
        refuse(*self.faults({one.name: getattr(self, one.name) for one in fields(self)}))

    @classmethod
    def faults(cls, given: Mapping[str, Any]) -> tuple[Fault, ...]:
        """All that is wrong with some options, so that each surface may say it in its own spelling.

        Args:
            given: values by name; what is left out has its default.
        """
        found = faults_of(cls, given)
        if (given.get("operator"), given.get("method")) == ("ggn", "finite_difference"):
            text = "the method finite_difference gives the Hessian only; drop one of the two"
            found.append(Fault("operator", "ggn", text))
        return tuple(found)

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


DEFAULT = Settings()
"""What is measured where nothing is said."""


class Options(TypedDict, total=False):
    """The fields of `Settings` as keyword arguments, for editors and type checkers."""

    quantities: str | Sequence[str]
    samples: int | None
    batch_size: int | None
    seed: int
    split: str
    params: Sequence[str] | None
    operator: Operator
    dtype: str | None
    device: str | None
    method: str
    effort: str
    accuracy: str | Mapping[str, float] | None
    budget: str | None
    rtol: float | None
    probes: int | None
    density_probes: int
    steps: int | None
    max_steps: int
    top: int
    confidence: float
    block: int
    second_opinion: bool
