"""What a shift verb may be asked; read before torch is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from hessdiag.described import documented
from hessdiag.option import Fault, faults_of, option, refuse
from hessdiag.settings import DEFAULT

TESTS = ("covariate", "augmented", "distance", "other", "findings")
SCORES = ("accuracy", "auroc", "f1")
SHIFTS, SCALE = 1000, 0.05  # the paper's test on forest cover types, as run by its public code
STRENGTHS = (0.0, 0.5, 1.0, 1.5, 2.0)
"""1 and 2 are the two augmented test sets of Sandler et al.; those between them make a line."""
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
    scale: float = option(
        SCALE, help="Standard deviation of the shift of each feature, in standard deviations of it.", above=0
    )
    shifts: int = option(SHIFTS, help="Number of shifts to draw.", at_least=3, needed_by="a line")
    exclude: Sequence[int] = option(
        (),
        help="Features to leave as they are, counted from 0.",
        metavar="I,J",
        instead="none",
        many=True,
        at_least=0,
    )
    strengths: Sequence[float] = option(
        STRENGTHS,
        help="Strengths of the distortion: 1 is up to 15° and 1/16 of a side.",
        metavar="A,B",
        instead=",".join(f"{one:g}" for one in STRENGTHS),
        many=True,
        at_least=0,
    )
    score: str = option(
        "accuracy",
        help="Score of the tests other and findings; auroc and f1 are means over labels.",
        choices=SCORES,
        more="Those two are of problems with several labels an example, targets of 0 and 1 shaped as the outputs.",
    )
    labels: Sequence[int] = option(
        (),
        help="Labels that count, counted from 0, where examples have several.",
        metavar="I,J",
        instead="all",
        many=True,
        at_least=0,
        more="In the test findings the others are what examples are put apart by.",
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
        if "findings" in self.tests and not self.labels:
            text = "this test needs the labels that count; the others are its findings; name them as labels"
            found.append(Fault("tests", "findings", text))
        if not found and len(set(self.strengths)) < 2:
            found.append(Fault("strengths", None, "a line needs at least two different ones, for example 0,1,2"))
        refuse(*found)
