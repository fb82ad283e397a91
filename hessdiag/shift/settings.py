"""What a shift verb may be asked; read before torch is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from hessdiag.option import Fault, documented, faults_of, option, refuse
from hessdiag.settings import DEFAULT

TESTS = ("covariate", "augmented", "distance", "other")
SAMPLES = 2000  # of each split: the error of an accuracy of 90% is then 0.7 points
FEATURES = 100  # beyond so many features a shift takes principal components: those of pictures are correlated
COMPONENTS = 50


@documented
@dataclass(frozen=True, kw_only=True)
class ShiftSettings:
    """What is tested, and on what."""

    tests: Sequence[str] = option(
        TESTS[:3],
        help=f"Of {', '.join(TESTS)}.",
        metavar="A,B",
        instead="all that can be",
        choices=TESTS,
        many=True,
    )
    train: str = option("train", help="Split that shifts are measured from.")
    test: str = option("test", help="Split that is shifted.")
    other: str | None = option(
        None, help="Split of another source, tested against the test split.", metavar="SPLIT"
    )
    samples: int = option(SAMPLES, help="Maximum examples of each split.", at_least=1)
    components: int | None = option(
        None,
        help="Number of principal components to shift.",
        instead=f"{COMPONENTS} beyond {FEATURES} features",
        more="Else the features themselves.",
    )
    seed: int = option(0, help="Seed of every random stream.")
    confidence: float = option(DEFAULT.confidence, help="Confidence of the intervals.", above=0, below=1)

    def __post_init__(self) -> None:
        """Refuse what does not exist.

        Raises:
            OptionError: an unknown test, a number out of range, or "other" without a split.
        """
        found = faults_of(type(self), {one.name: getattr(self, one.name) for one in fields(self)})
        if "other" in self.tests and self.other is None:
            found.append(Fault("tests", "other", "this test needs a split of another source; name it as other"))
        refuse(*found)
