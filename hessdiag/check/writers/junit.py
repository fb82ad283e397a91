"""The check as JUnit XML of Jenkins' xunit plugin: what GitLab, Jenkins and Azure show as test results.

That flavour has properties for a suite but none for a test case, so a limit's numbers are the suite's properties,
each named after its limit; and text in the case itself.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterator, Sequence

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite

from hessdiag.check.verdict import Report, Row, Verdict
from hessdiag.check.writers.words import change_words, measured_words
from hessdiag.shown import visible

SUITE = "hessdiag"


def junit(report: Report) -> str:
    """One suite with one case per limit, and one per problem; its counts fail a build where the check does.

    A limit nobody can tell is skipped, under strict an error; one without a verdict is an error; a failed warning
    passes and says so in its output. A check of nothing is one case with an error.
    """
    suite = TestSuite(SUITE)
    for name, value in _properties(report):
        suite.add_property(visible(name), visible(value))
    problems = report.problems or (() if report.rows else (report.headline,))
    cases = [*(_case(report, row) for row in report.rows), *(_problem(line) for line in problems)]
    _tell_apart(cases)
    suite.add_testcases(cases)
    whole = JUnitXml(SUITE)
    whole.add_testsuite(suite)
    stream = io.BytesIO()
    whole.write(stream)
    return stream.getvalue().decode() + "\n"


def _properties(report: Report) -> Iterator[tuple[str, str]]:
    yield "headline", report.headline
    yield "exit_code", str(report.exit_code)
    for name, value in (("checkpoint", report.checkpoint), ("baseline", report.baseline)):
        if value:
            yield name, value
    for row in report.rows:
        for name, value in _numbers(row):
            yield f"{row.name}: {name}", value


def _numbers(row: Row) -> Iterator[tuple[str, str]]:
    """All digits: these are read by programs."""
    if row.measured is not None:
        yield "value", repr(row.measured.value)
        yield "lo", repr(row.measured.lo)
        yield "hi", repr(row.measured.hi)
    yield "limit", repr(row.threshold)
    if row.baseline is not None:
        yield "baseline", repr(row.baseline)
        if row.tested is not None:
            yield "change", repr(row.tested.value)
            yield "change_lo", repr(row.tested.lo)
            yield "change_hi", repr(row.tested.hi)


def _case(report: Report, row: Row) -> TestCase:
    case = TestCase(visible(row.name), visible(f"{SUITE}.{row.scope}"), 0.0)
    result = _result(report, row)
    if result is not None:
        case.result = [result]
    warned = "failed, which is a warning only\n" if row.verdict is Verdict.FAIL and result is None else ""
    because = f"\n{visible(row.reason)}" if row.reason and result is None else ""
    case.system_out = (
        f"{warned}limit {visible(row.limit)}, measured {measured_words(row)}, change {change_words(row)}{because}"
    )
    return case


def _result(report: Report, row: Row) -> Failure | Error | Skipped | None:
    said = visible(row.reason or row.verdict.value)
    if report.fails(row):
        return _with_text(Failure(said, "limit exceeded"), said)
    if report.undecided(row):
        return _with_text(Error(said, row.verdict.value), said)
    return Skipped(said, row.verdict.value) if row.verdict is Verdict.UNSURE else None


def _problem(line: str) -> TestCase:
    case = TestCase(visible(line, 200), f"{SUITE}.problems", 0.0)
    case.result = [_with_text(Error(visible(line), "problem"), visible(line))]
    return case


def _tell_apart(cases: Sequence[TestCase]) -> None:
    """Number the cases of one name: readers of JUnit keep only the last of them."""
    seen: Counter[tuple[str, str]] = Counter()
    for case in cases:
        seen[case.classname, case.name] += 1
        times = seen[case.classname, case.name]
        if times > 1:
            case.name = f"{case.name} ({times})"


def _with_text(result: Failure | Error, text: str) -> Failure | Error:
    result.text = text
    return result
