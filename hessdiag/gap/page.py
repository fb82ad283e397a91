"""The gap report as one HTML file that needs no script, no network and no other file."""

from __future__ import annotations

from dataclasses import dataclass

from hessdiag.errors import UsageError
from hessdiag.gap.plots import (
    drawable,
    gap_scatter,
    performances,
    performances_frame,
    scatter_frame,
    tau_of,
    taus,
    taus_frame,
)
from hessdiag.gap.record import CheckpointRecord
from hessdiag.gap.registry import Measure, Reading, registry
from hessdiag.gap.report import GapReport
from hessdiag.gap.rows import performance_rows, rank_rows, reading_cells, refusals, summary, verdicts
from hessdiag.pages import find, meanings
from hessdiag.present.pictures import Picture, data_address, picture, rendered
from hessdiag.shown import csv_text, plain

MOST_DETAILED = 12  # checkpoints whose readings are tables of their own; a hundred would pass two megabytes
MOST_CSV = 700_000  # bytes of the tidy table inside the page
RESULT_CSV = "gap.csv"


@dataclass(frozen=True, slots=True)
class Detail:
    """All readings of one checkpoint, as text: (measure, value, interval, after rescaling)."""

    name: str
    facts: list[tuple[str, str]]
    rows: list[tuple[str, str, str, str]]
    notes: list[str]


@dataclass(frozen=True, slots=True)
class Definition:
    """A measure as it is defined, and in how many checkpoints it moved under rescaling."""

    name: str
    title: str
    family: str
    formula: str
    source: str
    invariant: str
    cost: str
    had: str
    moved: str


def gap_page(report: GapReport, command: str = "") -> str:
    """The whole report as HTML text, below two megabytes for a hundred checkpoints.

    Args:
        report: the checkpoints.
        command: what was typed to make this.
    """
    columns, rows = performance_rows(report)
    known = registry()
    definitions = [_definition(one, report) for name, one in known.items() if name in report.measures]
    families = dict.fromkeys(find(one.family).name for one in definitions)
    csv = csv_text(report.to_frame())
    return rendered(
        "hessdiag.gap",
        "gap.html.j2",
        title=f"{len(report.records)} checkpoints against the {report.gap_kind} gap",
        summary=summary(report),
        caveats=report.caveats,
        columns=columns,
        rows=rows,
        performance=_performance(report),
        taus=_taus(report),
        ranked=rank_rows(report),
        confidence=f"{report.confidence:.0%}",
        refusals=[(reason, ", ".join(names)) for reason, names in refusals(report)],
        information=_information(report),
        scatters=[_scatter(report, measure, known.get(measure)) for measure in drawable(report)],
        details=[_detail(record, report) for record in report.records] if _few(report) else [],
        most_detailed=MOST_DETAILED,
        definitions=definitions,
        linked={one.name for one in definitions if one.name.isidentifier()},
        meanings=meanings(["generalization_gap", "tau", "moved", *families, "flatter_is_not_better"]),
        failures=[(plain(name), plain(str(reason))) for name, reason in report.failures.items()],
        command=plain(command),
        csv=data_address(csv) if len(csv) <= MOST_CSV else "",
        csv_name=RESULT_CSV,
        gap=report.gap_kind,
    )


def _few(report: GapReport) -> bool:
    return len(report.records) <= MOST_DETAILED


def _performance(report: GapReport) -> Picture | None:
    try:
        frame = performances_frame(report)
    except UsageError:
        return None
    kind = report.gap_kind
    text = (
        f"Mean {kind} of every split with its interval over examples. What lies between the splits is the {kind} "
        "gap, which measures are ranked against."
    )
    return picture(performances(report), text, frame, "splits", RESULT_CSV)


def _taus(report: GapReport) -> Picture | None:
    if report.ranks.tested == 0:
        return None
    text = (
        f"Kendall's tau-b between each measure and the {report.gap_kind} gap: +1 where the measure orders the "
        "runs as the gap does, −1 where it orders them the other way, 0 where it says nothing. The interval is "
        "over runs one might have trained, taken as independent: one that holds 0 tells no sign. "
    )
    if any(one.worst is not None for one in report.ranks.measures):
        text += (
            "The cross is the lowest tau among groups of runs that differ in one hyper-parameter only: left of 0 "
            "it contradicts a positive tau. "
        )
    text += "* marks measures that change when layers are rescaled while the function does not."
    return picture(taus(report), text, taus_frame(report), "taus", RESULT_CSV)


def _scatter(report: GapReport, measure: str, one: Measure | None) -> Picture:
    meaning = f"{one.title}: {one.formula} ({one.source}). " if one else ""
    text = f"{measure}, {tau_of(report, measure)}. {meaning}Bars are the intervals of both numbers."
    return picture(
        gap_scatter(report, measure), text, scatter_frame(report, measure), f"scatter-{measure}", RESULT_CSV
    )


def _information(report: GapReport) -> str:
    ranks = report.ranks
    if ranks.random_information is None or ranks.oracle_information is None:
        return ""
    best = [one for one in ranks.measures if one.information is not None]
    if not best:
        return ""
    top = max(best, key=lambda one: one.information or 0.0)
    return (
        f"Conditional mutual information (Jiang et al. 2020, equation 9): {top.measure} reaches "
        f"{top.information or 0.0:.3f}, the highest; a measure drawn at random stays below "
        f"{ranks.random_information[1]:.3f} in 95 of 100 draws, the gap itself within its own intervals reaches "
        f"{ranks.oracle_information:.3f}."
    )


def _detail(record: CheckpointRecord, report: GapReport) -> Detail:
    rows = [(name, *reading_cells(record, name)) for name in report.measures]
    facts = [(str(name), str(value)) for name, value in record.meta.items()]
    facts += [("file", record.file), ("sha256", record.sha256 or "loaded by the factory")]
    facts += [("rescaled", record.rescaled), ("seconds", f"{record.seconds:.1f}")]
    made = record.fingerprint
    measured = {"samples": made.samples, "n_params": made.n_params, "dtype": made.dtype, "loss": made.loss}
    facts += [(name, str(value)) for name, value in (*measured.items(), ("seed of the measurement", made.seed))]
    return Detail(
        name=plain(record.name),
        facts=[(plain(name), plain(value)) for name, value in facts],
        rows=rows,
        notes=[plain(note) for note in record.notes],
    )


def _definition(one: Measure, report: GapReport) -> Definition:
    had = sum(isinstance(record.readings.get(one.name), Reading) for record in report.records)
    said = verdicts(report, one.name)
    return Definition(
        name=one.name,
        title=plain(one.title),
        family=one.family,
        formula=plain(one.formula),
        source=plain(one.source),
        invariant=", ".join(sorted(one.invariances)) or "nothing",
        cost=plain(one.cost),
        had=f"{had} of {len(report.records)}",
        moved=f"{said.count('moved')} of {len(said)}" if said else "—",
    )
