"""Promise: a gap report says what the checkpoints show and no more, and nothing is measured twice. (40 s)

Oracles: records made with a known order, checkpoints trained here, the standard library's parsers.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from hessdiag.gap import kept, look
from hessdiag.gap import page as pages
from hessdiag.gap import plots as gap_plots
from hessdiag.gap import rows as gap_rows
from hessdiag.gap.page import gap_page
from hessdiag.gap.record import CheckpointRecord
from hessdiag.gap.report import GapReport
from hessdiag.gap.rows import rank_rows, refusals, summary
from hessdiag.gap.statistics.means import Score
from hessdiag.present import pictures
from tests import example_gap as example
from tests import test_page_is_self_contained as checker
from tests.command import call

PROBLEM = """
import hessdiag
from torch import nn
from hessdiag.sources import datasets


def zoo(width=4, middle="ReLU", test=True):
    train, held = datasets.digits()
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, width), getattr(nn, middle)(), nn.Linear(width, 10))
    data = {"train": train, "test": held} if test else {"train": train}
    return hessdiag.Problem(model, data, criterion="cross_entropy")
"""
FAST = ("--samples", "64", "--probes", "2", "--evaluate", "100", "--rtol", "0.1")
SECTIONS = ("summary", "performance", "ranks", "scatter", "readings", "measures", "meanings", "reproduce")
FEW = ("--measures", "weight_norm", "--measures", "inverse_margin", "--measures", "trace", "--no-guard")


def network(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three checkpoints, untrained, with hyper-parameters in the file, beside it, and in its path."""
    monkeypatch.chdir(tmp_path)
    Path("problem.py").write_text(PROBLEM)
    for seed in range(3):
        torch.manual_seed(seed)
        folder = Path(f"runs/lr0.{seed + 1}")
        folder.mkdir(parents=True)
        torch.save({"state_dict": network().state_dict(), "batch_size": 32, "epoch": 7}, folder / "last.pt")
    Path("runs/lr0.1/meta.json").write_text('{"weight_decay": 0.5}')
    return tmp_path


def gap(*more: str, fast: tuple[str, ...] = (*FAST, *FEW)) -> tuple[int, str, str]:
    return call("gap", "problem.py:zoo", "-c", "runs/*/last.pt", *fast, *more)


def test_a_stranger_gets_table_page_and_files(zoo):
    code, out, err = gap("-o", "out", "--meta-from", r"lr(?P<lr>[0-9.]+)/")
    assert code == 0, err
    assert "cannot tell: 3 checkpoints, needs 5 more" in out
    rows = list(csv.DictReader(io.StringIO(Path("out/gap.csv").read_text())))
    assert {row["checkpoint"] for row in rows} == {"lr0.1", "lr0.2", "lr0.3"}
    assert {row["name"] for row in rows if row["kind"] == "measure"} == {"weight_norm", "inverse_margin", "trace"}
    plain = json.loads(Path("out/gap.json").read_text())
    metas = [one["meta"] for one in plain["records"]]
    assert [meta["lr"] for meta in metas] == [0.1, 0.2, 0.3]
    assert metas[0]["weight_decay"] == 0.5
    assert all(meta["batch_size"] == 32 for meta in metas)
    norm = math.sqrt(sum(float(p.square().sum()) for p in _loaded("runs/lr0.1/last.pt").values()))
    assert float(next(r for r in rows if r["name"] == "weight_norm")["value"]) == pytest.approx(norm, rel=1e-6)
    assert page_faults(Path("out/gap.html").read_text()) == []


def test_what_was_measured_is_kept_and_one_more_costs_one(zoo, monkeypatch):
    assert gap("--csv", "a.csv")[0] == 0
    torch.manual_seed(9)
    Path("runs/lr0.9").mkdir()
    torch.save(network().state_dict(), "runs/lr0.9/last.pt")
    measured = []
    original = look.examine
    monkeypatch.setattr(look, "examine", lambda *a, **k: measured.append(a[2].name) or original(*a, **k))
    code, _, err = gap("--csv", "b.csv")
    assert (code, measured) == (0, ["lr0.9"])
    assert err.count("kept from before") == 3
    first, second = (Path(name).read_text().splitlines() for name in ("a.csv", "b.csv"))
    assert set(first) <= set(second)
    measured.clear()
    assert gap("--fresh")[0] == 0
    assert len(measured) == 4


def test_the_same_weights_in_other_code_are_measured_again(zoo, monkeypatch):
    """The factory's file is part of a record's name; what it imports shows in the loss of the first batch."""
    Path("inner.py").write_text(PROBLEM)
    Path("problem.py").write_text("from inner import zoo\n")
    assert gap()[0] == 0
    Path("inner.py").write_text(PROBLEM.replace('middle="ReLU"', 'middle="Tanh"'))
    monkeypatch.delitem(__import__("sys").modules, "inner")
    code, _, err = gap()
    assert code == 0
    assert "kept from before" not in err


def test_a_broken_file_is_said_and_the_rest_goes_on(zoo):
    Path("runs/lr0.2/last.pt").write_bytes(b"no checkpoint")
    code, out, err = gap("--html", "gap.html")
    assert code == 4
    assert "1 of 3 checkpoints could not be measured: lr0.2" in err
    assert "1 more could not be measured: lr0.2" in out
    assert "lr0.2" in Path("gap.html").read_text()


def test_other_architectures_missing_splits_and_nonsense_are_one_line(zoo):
    torch.save(network(5).state_dict(), "runs/lr0.2/last.pt")
    code, _, err = gap()
    assert (code, "lr0.2" in err) == (4, True)
    code, out, _ = gap("-P", "test=false", "--gap", "loss")
    assert "no split 'test'; there are train" in out
    for arguments, words in {
        ("--measures", "sharpnes*"): "no such measure",
        ("--jobs", "0"): "--jobs 0: at least 1",
        ("--evaluate", "0"): "--evaluate 0: at least 1",
        ("--meta-from", "lr(["): "no regular expression",
        ("--meta-from", "lr"): "names nothing",
        ("--group-by", "depth"): "no checkpoint has it",
        ("--init", "none.pt"): "none.pt",
        ("-o", "problem.py"): "cannot write",
    }.items():
        code, out, err = gap(*arguments)
        assert code in (2, 4), arguments
        assert words in err, (arguments, err)
        assert "Traceback" not in err
    code, _, err = call("gap", "problem.py:zoo", "-c", "nothing/*.pt")
    assert code in (2, 4)
    assert "no checkpoint matches" in err


def test_jobs_give_the_same_numbers(zoo):
    assert gap("--json", "--fresh")[0] == 0
    one, two = (json.loads(gap("--json", "--fresh", "--jobs", jobs)[1]) for jobs in ("1", "2"))
    for plain in (one, two):
        for record in plain["records"]:
            for name in ("seconds", "model_seconds"):
                del record[name]
    assert apart(one, two) == []


def kept_apart() -> list[str]:
    """Where a report of records kept from before differs from that of the same records just measured."""
    fresh = json.loads(gap("--json", "--fresh", "--csv", "a.csv")[1])
    kept = json.loads(gap("--json", "--csv", "b.csv")[1])
    for plain in (fresh, kept):
        for record in plain["records"]:
            del record["seconds"], record["model_seconds"]
    same = Path("a.csv").read_text() == Path("b.csv").read_text()
    return apart(fresh, kept) + ["the tables differ"] * (not same)


def test_kept_records_are_reported_as_they_were_measured(zoo):
    assert kept_apart() == []


def test_kept_records_in_the_order_of_their_file_would_be_noticed(zoo, monkeypatch):
    monkeypatch.setattr(kept, "_in_order", lambda record, asked: record)
    assert "the tables differ" in kept_apart()


def apart(one: object, two: object, place: str = "") -> list[str]:
    """Where they differ, numbers by more than rounding: other threads add in another order."""
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return [text for name in one for text in apart(one[name], two[name], f"{place}.{name}")]
    if isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        pairs = enumerate(zip(one, two, strict=True))
        return [text for index, pair in pairs for text in apart(*pair, f"{place}[{index}]")]
    if isinstance(one, float) and isinstance(two, float):
        near = one == pytest.approx(two, rel=1e-4, abs=1e-6, nan_ok=True)
        return [] if near else [f"{place}: {one} and {two}"]
    return [] if one == two else [f"{place}: {one} and {two}"]


def test_records_survive_their_file():
    for record in example.records(3):
        assert CheckpointRecord.of(json.loads(record.to_json())) == record


def honest(report: GapReport) -> list[str]:
    """Everything in which the report of ten checkpoints in known order is wrong."""
    ranked = {row.measure: row for row in rank_rows(report)}
    said, wrong = " ".join(summary(report)), []
    wrong += [] if set(ranked) == {"up", "down"} else [f"ranked {sorted(ranked)}"]
    if "up" in ranked and not (ranked["up"].tau == "+1.00" and ranked["up"].moved == "10 of 10"):
        wrong.append(f"up is {ranked['up']}")
    if "down" in ranked and ranked["down"].tau != "−1.00" and ranked["down"].tau != "-1.00":
        wrong.append(f"down is {ranked['down']}")
    wrong += [] if "larger where these are larger: up" in said else ["the sign of up is not said"]
    wrong += [] if "smaller where these are larger: down" in said else ["the sign of down is not said"]
    reasons = " ".join(reason for reason, _ in refusals(report))
    wrong += (
        []
        if "the same at all 10" in reasons and "at no checkpoint: no such layer" in reasons
        else [f"reasons: {reasons}"]
    )
    page = gap_page(report, "hessdiag gap 'a & b'")
    wrong += page_faults(page)
    wrong += [] if "&lt;b&gt;&amp;" in page else ["an odd name is not escaped"]
    wrong += [] if "Flatter is not better" in page else ["the caveat is missing"]
    return wrong


def page_faults(html: str) -> list[str]:
    return checker.faults(html, SECTIONS)


@pytest.fixture
def ten() -> GapReport:
    return GapReport(tuple(example.records(10)), {"run99": "damaged: <b>"})


def test_ten_checkpoints_in_known_order(ten):
    assert honest(ten) == []


def flipped(score_gap: Callable[..., Score]) -> Callable[..., Score]:
    return lambda self, kind: self.performance.score_gap


RANKS = "hessdiag.gap.statistics.ranks"
PAGES = pictures.environment  # before a breakage takes its place
BROKEN = {
    "the error gap has the sign of the accuracy's": lambda patch: patch.setattr(
        CheckpointRecord, "gap", flipped(CheckpointRecord.gap)
    ),
    "no caveats": lambda patch: patch.setattr(GapReport, "caveats", ()),
    "names not escaped": lambda patch: patch.setattr("hessdiag.present.pictures.environment", unescaped),
    "the guard is not shown": lambda patch: patch.setattr(example, "Moved", lambda **k: gap_rows.NONE),
    "refusals not said": lambda patch: patch.setattr(GapReport, "measures", ("up", "down")),
    "two checkpoints are enough": lambda patch: patch.setattr("hessdiag.gap.statistics.ranks.FEWEST", 0),
}


def unescaped(*_):
    made = PAGES("hessdiag.gap")
    made.autoescape = False
    return made


@pytest.mark.parametrize("name", BROKEN)
def test_this_promise_would_notice(name, monkeypatch):
    BROKEN[name](monkeypatch)
    try:
        report = GapReport(tuple(example.records(10)), {"run99": "damaged: <b>"})
        assert honest(report) != []
    except (AttributeError, ValueError, IndexError):
        pass  # it does not even get that far


def verdict_comes_first(report: GapReport) -> list[str]:
    """What a reader sees first is what the statistics say, then pictures of what was ranked."""
    html = gap_page(report)
    first = html[html.index("<li>", html.index('id="summary-title"')) :].split("</li>")[0]
    found = [] if "gap is larger" in first or "No measure" in first else [f"first: {first}"]
    found += [] if html.index('id="ranks"') < html.index('id="performance"') else ["the verdict comes later"]
    frame = gap_plots.performances_frame(report)
    for record in report.records:
        for split in record.performance.splits:
            row = frame[(frame["checkpoint"] == record.name) & (frame["split"] == split.split)].iloc[0]
            score = split.score
            if tuple(row[[report.gap_kind, "lo", "hi"]]) != (1 - score.value, 1 - score.hi, 1 - score.lo):
                found.append(f"{record.name}: another error")
    return found


def test_verdict_comes_first():
    for n in (7, 10):
        report = GapReport(tuple(example.records(n)))
        assert report.gap_kind == "error" and verdict_comes_first(report) == []


def test_a_late_verdict_would_be_noticed(monkeypatch):
    report = GapReport(tuple(example.records(10)))
    lines = summary(report)
    monkeypatch.setattr(pages, "summary", lambda _: lines[::-1])
    assert verdict_comes_first(report) != []


def test_a_hundred_checkpoints_stay_below_two_megabytes():
    report = GapReport(tuple(example.records(100, measures=60)))
    html = gap_page(report)
    assert len(html.encode()) < checker.LIMIT
    assert page_faults(html) == []


def test_seven_checkpoints_are_too_few_for_a_tau():
    report = GapReport(tuple(example.records(7)))
    assert rank_rows(report) == []
    assert any("7 checkpoints, needs 1 more" in line for line in summary(report))
    assert page_faults(gap_page(report)) == []


def _loaded(path: str) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]
