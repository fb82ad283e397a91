"""What the documentation says of the papers, written anew from the tables of ``benchmarks/results``.

``python -m benchmarks.papers.pages`` writes the parts between "<!-- generated: ... -->" and "<!-- end -->" on the
pages of the papers; the words around them stay. A test says whether they are current.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.papers import PAPERS
from benchmarks.papers.claims import FAILS, HOLDS, UNSURE, Claim
from benchmarks.papers.zhang2023_bound import TITLE as BOUND
from benchmarks.truth import RESULTS
from hessdiag.cli.reference import DOCS
from hessdiag.pages import source

ROW = re.compile(r"^\| (?P<text>.+) \| \*\*(?P<verdict>[^*]+)\*\* \| (?P<evidence>.+) \|$", re.MULTILINE)
RUN = re.compile(
    r"^`(?P<command>python -m benchmarks .+?)`, (?P<date>[\d-]+), (?P<torch>torch [\w.+]+)", re.MULTILINE
)
TOOK = re.compile(r"^The whole run took (?P<time>.+)\.$", re.MULTILINE)
SUMMARY = "regularizers.md"
VERDICTS = (HOLDS, FAILS, UNSURE)


@dataclass(frozen=True)
class Tried:
    """A paper's committed table.

    Attributes:
        name: of its file here.
        text: all of it.
        claims: with verdict and evidence, in the order of the paper.
        command: that repeats the run.
        circumstances: date and version of torch.
        time: of all its CPUs; empty where it was not taken down.
    """

    name: str
    text: str
    claims: list[Claim]
    command: str
    circumstances: str
    time: str

    def count(self, verdict: str) -> int:
        """How many claims came to a verdict."""
        return sum(claim.verdict == verdict for claim in self.claims)


def tried(name: str, folder: Path = RESULTS) -> Tried:
    """The table of a paper as it stands in ``folder``.

    Raises:
        ValueError: it has no claims, or does not say how it was made.
    """
    text = (folder / f"papers-{name}.md").read_text(encoding="utf-8")
    claims = [Claim(row["text"], row["verdict"], row["evidence"]) for row in ROW.finditer(text)]
    made, took = RUN.search(text), TOOK.search(text)
    if not claims or made is None:
        msg = f"papers-{name}.md has no claims, or not the command that made it"
        raise ValueError(msg)
    return Tried(
        name, text, claims, made["command"], f"{made['date']}, {made['torch']}", took["time"] if took else ""
    )


def written(folder: Path = RESULTS, docs: Mapping[str, str] | None = None) -> dict[str, str]:
    """Every page with a generated part, by its file, as it should be; ``docs`` in place of the committed."""
    known = {name: tried(name, folder) for name in PAPERS}
    parts = {f"{name}.md": {f"verdicts of {name}": verdicts(one)} for name, one in known.items()}
    parts["zhang2023.md"]["bound of zhang2023"] = table_of(known["zhang2023"], BOUND)
    parts[SUMMARY] = {"papers": summary(list(known.values()))}
    pages = docs or {file: source(file, comments=True) for file in parts}
    return {file: _filled(pages[file], each) for file, each in parts.items()}


def verdicts(one: Tried) -> str:
    """The claims of a paper, and how the run is repeated."""
    counts = ", ".join(f'{one.count(verdict)} "{verdict}"' for verdict in VERDICTS if one.count(verdict))
    took = one.time or "CPU time not taken down"
    lines = [
        f"{len(one.claims)} claims: {counts}. Run of {one.circumstances}, one thread: {took}. To repeat it, in a",
        f"clone of the repository: `{one.command}`.",
        "",
        "| claim | verdict | measured: mean and 95% interval |",
        "|---|---|---|",
        *(f"| {_cell(claim.text)} | **{claim.verdict}** | {_cell(claim.evidence)} |" for claim in one.claims),
    ]
    return "\n".join(lines)


def _cell(text: str) -> str:
    """The sign of the nuclear norm would be taken for emphasis."""
    return text.replace("_*", r"\_\*")


def table_of(one: Tried, title: str) -> str:
    """Another table of a paper's file, by its heading there."""
    _, _, rest = one.text.partition(f"## {title}\n\n")
    return rest.partition("\n\n")[0]


def summary(known: list[Tried]) -> str:
    """A line per paper."""
    rows = [
        f"| [{one.name}]({one.name}.md) | " + " | ".join(str(one.count(verdict)) for verdict in VERDICTS) + " |"
        for one in sorted(known, key=lambda each: each.name)
    ]
    return "\n".join(["| paper | " + " | ".join(VERDICTS) + " |", "|---|---|---|---|", *rows])


def _filled(page: str, parts: Mapping[str, str]) -> str:
    for name, text in parts.items():
        before, mark, rest = page.partition(f"<!-- generated: {name} -->\n")
        page = before + mark + f"\n{text}\n\n" + rest[rest.index("<!-- end -->") :]
    return page


def main() -> None:
    """Write the pages."""
    for file, text in written().items():
        (DOCS / file).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
