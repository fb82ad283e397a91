"""Promise: no page says of a paper's claim what its table does not, and verdicts of tables follow from their runs.

Verdicts on the pages are written from the tables; what stands in words elsewhere is listed here with the claims
that it rests on, so that a new run that changes a verdict names the sentence to change.
"""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.papers import PAPERS, judged, pages, zhang2023_bound
from benchmarks.papers.claims import FAILS, HOLDS, UNSURE
from benchmarks.papers.pages import tried
from benchmarks.truth import RESULTS
from hessdiag.pages import source

TOP = Path(__file__).parent.parent
DOCS = TOP / "hessdiag" / "docs"
PROSE = [*sorted(DOCS.glob("*.md")), TOP / "README.md", TOP / "CHANGELOG.md", TOP / "benchmarks" / "README.md"]
SECTIONS = ("The claim", "What was done here", "Verdicts")
PICTURE = "https://github.com/hessdiag/hessdiag/raw/main/benchmarks/results/papers-{}.png"

SAID = {
    "to a smaller λ_max, of which some generalize better, some no better, and one worse": [
        ("kaur2022", r"F3: SAM generalizes better", HOLDS),
        ("kaur2022", r"F2: .* test accuracy stays", HOLDS),
        ("kaur2022", r"F4: .* generalizes worse", HOLDS),
    ],
    "at full batch the gain in accuracy is smaller than in small batches": [
        ("kaur2022", r"F3: SAM gains less at full batch", HOLDS)
    ],
    "SAM gains less at full batch than in small batches": [("kaur2022", r"F3: SAM gains less", HOLDS)],
    "too much dropout lowered λ_max and cost accuracy": [("kaur2022", r"F4: ", HOLDS)],
    "the radius under `SpectralRadius`": [("sandler2021", r"rho is smaller at equal training loss", HOLDS)],
    "the trace and λ_max under `NSO`": [("zhang2023", r"fine-tuning: NSO lowers the \D+ against SGD", HOLDS)],
    "`NSO` had a smaller test error than SGD, weight decay, early stopping, one-point noise and SAM": [
        ("zhang2023", r"fine-tuning: NSO lowers the test error", HOLDS)
    ],
    "its λ_max was not smaller than SAM's": [
        ("zhang2023", r"fine-tuning: NSO lowers the largest eigenvalue against SAM", FAILS)
    ],
    "was ahead under reweighted and turned test pictures, of early stopping and weight decay too": [
        ("sandler2021", r"T[12]\D* is more accurate|T1, |T2 ", HOLDS)
    ],
    "the trace penalty cut the test error to less than a tenth": [
        ("gatmiry2023", r"trace penalty against GD", HOLDS)
    ],
    "What it said of depths 3 and 4 was wrong and is withdrawn": [
        ("gatmiry2023", r"Depth [34], .*main theorem", HOLDS)
    ],
    "what it said of trace, λ_max and test error was about that set-up, and is withdrawn": [
        ("zhang2023", r"fine-tuning: NSO lowers the \D+ against SGD", HOLDS)
    ],
    "T3 varies from seed to seed by more than any arm gains": [("sandler2021", r"^T3", UNSURE)],
    'Withdrawn: "depth 3 and 4: the trace of the nuclear-norm regularizer does not hold" (gatmiry2023)': [
        ("gatmiry2023", r"Depth [34], .*main theorem", HOLDS),
        ("zhang2023", r"fine-tuning: NSO lowers the (trace|largest eigenvalue) against SGD", HOLDS),
    ],
}
NAMED = re.compile(
    r"gatmiry|kaur|omae|sandler|zhang|2306\.13239|2206\.10654|2604\.10202|2606\.28662|2102\.11210|2306\.08553",
    re.I,
)
JUDGING = re.compile(r"\b(holds|not hold|cannot tell|could not tell|refuted|reproduced|withdrawn)\b", re.I)
GENERATED = re.compile(r"<!-- generated: .*? -->\n.*?<!-- end -->\n", re.DOTALL)


def outdated(written: dict[str, str]) -> list[str]:
    """Pages that are not what the tables make of them."""
    return [file for file, text in written.items() if source(file, comments=True) != text]


def unlike(name: str, runs: pd.DataFrame, folder: Path = RESULTS) -> list[str]:
    """Claims whose text or verdict is another once the committed runs are judged again."""
    again = {(claim.text.replace("|", "/"), claim.verdict) for claim in judged(name, runs)}
    said = {(claim.text, claim.verdict) for claim in tried(name, folder).claims}
    return sorted(map(str, again ^ said))


def runs(name: str) -> pd.DataFrame:
    return pd.read_csv(RESULTS / f"papers-{name}.csv", low_memory=False)


def unsupported(folder: Path = RESULTS) -> list[str]:
    """Sentences whose claims have not the verdict that they rest on, or no claim at all."""
    found = []
    for sentence, reasons in SAID.items():
        for name, claims, verdict in reasons:
            verdicts = {c.verdict for c in tried(name, folder).claims if re.search(claims, c.text)}
            found += [sentence] * (verdicts != {verdict})
    return found


def paragraphs(text: str) -> list[str]:
    """Of prose: blocks, generated parts and list items apart, each in one line."""
    plain = GENERATED.sub("\n\n", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return [" ".join(one.split()) for one in re.split(r"\n\s*\n|\n(?=[-*|] )", plain)]


def strays(texts: list[str]) -> list[str]:
    """Paragraphs that judge a paper by a word of verdict, and are not listed here."""
    return [
        one
        for text in texts
        for one in paragraphs(text)
        if NAMED.search(one) and JUDGING.search(one) and not any(sentence in one for sentence in SAID)
    ]


def incomplete(name: str, text: str) -> list[str]:
    """What a page of a paper lacks."""
    headings = re.findall(r"^## (.+)$", text, re.MULTILINE)
    found = [heading for heading in SECTIONS if heading not in headings]
    found += ["its picture"] * (PICTURE.format(name) not in text)
    found += ["how to repeat it"] * (tried(name).command not in text)
    found += ["what would decide"] * (not any(heading.startswith("What would decide") for heading in headings))
    return found


def bound_faults(runs: pd.DataFrame, folder: Path = RESULTS) -> list[str]:
    """What gap.md and the page say of NSO's bound, and the runs do not."""
    rows, text = zhang2023_bound.bounded(runs), tried("zhang2023", folder).text
    ratio = {name: part["ratio"] for name, part in rows.groupby("maxima")}
    of_training, of_all = ratio["training"], ratio["training and test"]
    told = {
        "below the gap in most runs": (of_training < 1).mean() > 0.5,
        "hundreds of times the gap with the maxima of all pictures": of_all.groupby(rows["arm"]).mean().min()
        > 100,
        "its remark": f"* {zhang2023_bound.remark(runs)}\n" in text,
        "NSO: the largest gap, the smallest error": "largest for NSO, the mean test error smallest for NSO"
        in text,
        "the order of the arms": all(sign in text for sign in ("arms of a seed -0.", "arms of a seed 0.")),
        "no certificate": "Neither is a certificate" in text,
        "its table": len(pages.table_of(tried("zhang2023", folder), pages.BOUND).splitlines()) == 2 + 12,
    }
    return [what for what, true in told.items() if not true]


def test_verdicts_on_the_pages_are_those_of_the_tables():
    assert outdated(pages.written()) == [], "python -m benchmarks.papers.pages"


@pytest.mark.parametrize("name", PAPERS)
def test_verdicts_of_the_tables_follow_from_the_runs(name):
    found = runs(name)
    assert unlike(name, found) == []


def test_sentences_rest_on_claims():
    assert unsupported() == []
    everything = [" ".join(file.read_text().split()) for file in PROSE]
    assert [sentence for sentence in SAID if not any(sentence in text for text in everything)] == []


def test_no_verdict_stands_elsewhere():
    assert strays([file.read_text() for file in PROSE]) == []


def test_the_bound_is_as_the_pages_have_it():
    assert bound_faults(runs("zhang2023")) == []


@pytest.mark.parametrize("name", PAPERS)
def test_a_page_of_a_paper_is_whole(name):
    assert (RESULTS / f"papers-{name}.png").exists()
    assert incomplete(name, (DOCS / f"{name}.md").read_text()) == []


def reversed_(folder: Path) -> Path:
    """Tables whose verdicts hold where they do not, and the other way round."""
    for name in PAPERS:
        text = (RESULTS / f"papers-{name}.md").read_text()
        turned = text.replace(f"**{HOLDS}**", "**?**").replace(f"**{FAILS}**", f"**{HOLDS}**")
        (folder / f"papers-{name}.md").write_text(turned.replace("**?**", f"**{FAILS}**"))
    return folder


def larger(raw: pd.DataFrame) -> pd.DataFrame:
    """Bounds ten times as large."""
    return raw.assign(value=raw["value"].where(raw["measure"] != "bound", 10 * raw["value"] + 2))


def page(name: str = "kaur2022") -> str:
    return (DOCS / f"{name}.md").read_text()


NOTICED = {
    "a page with a verdict of its own": lambda _: outdated(
        {"kaur2022.md": page().replace(f"**{UNSURE}**", f"**{HOLDS}**")}
    ),
    "tables that say something else": lambda folder: outdated(pages.written(reversed_(folder))),
    "sentences that no table supports": lambda folder: unsupported(reversed_(folder)),
    "verdicts that do not follow from the runs": lambda folder: unlike(
        "sandler2021", runs("sandler2021"), reversed_(folder)
    ),
    "runs that are others": lambda _: unlike(
        "sandler2021", runs("sandler2021").assign(rho=lambda raw: raw["rho"].mean())
    ),
    "a bound that is never below the gap": lambda _: bound_faults(larger(runs("zhang2023"))),
    "a verdict in passing": lambda _: strays(["So F1 of Kaur et al. does not hold here."]),
    "a verdict in a list": lambda _: strays(["- all is well\n- sandler2021: T1 holds\n"]),
    "a page without its picture": lambda _: incomplete("kaur2022", page().replace("kaur2022.png", "")),
    "a page without its command": lambda _: incomplete("kaur2022", page().replace("--only", "")),
    "a page without the claim": lambda _: incomplete("kaur2022", page().replace("## The claim", "")),
    "a page that leaves open what is open": lambda _: incomplete("kaur2022", page().replace("would decide", "")),
}


@pytest.mark.parametrize("breakage", NOTICED.values(), ids=NOTICED)
def test_this_promise_would_notice(breakage, tmp_path):
    assert breakage(tmp_path) != []


def test_other_words_are_let_through():
    assert strays(["This table holds all runs.", "Kaur et al. train to 99%."]) == []
    assert strays([f"<!-- generated: x -->\n| Kaur | **{HOLDS}** |\n<!-- end -->\n"]) == []
