"""What a report over many checkpoints may be asked beside its curvature; read before torch is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hessdiag.described import documented
from hessdiag.option import faults_of, option, options_of, refuse

EVALUATED = 5000  # examples of a split: an accuracy of 95% is then known to ± 0.6 points


@documented
@dataclass(frozen=True, kw_only=True)
class GapSettings:
    """What is asked of every checkpoint, but for its curvature."""

    measures: Sequence[str] = option(
        ("*",),
        help="Measures to compute, with commas or one by one. !GLOB leaves measures out.",
        metavar="GLOB,GLOB",
        instead="all",
        many=True,
    )
    guard: bool = option(True, help="Measure again after rescaling the layers.")
    test: str = option("test", help="Split that generalization is judged on.")
    evaluate: int = option(EVALUATED, help="Maximum examples of a split.", at_least=1)

    def __post_init__(self) -> None:
        """Refuse what cannot be met.

        Raises:
            OptionError: evaluate below 1.
        """
        refuse(*faults_of(GapSettings, {name: getattr(self, name) for name in options_of(GapSettings)}))
