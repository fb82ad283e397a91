"""Promise: run.json, baselines and gap records of an earlier hessdiag are read, and mean what they meant. (10 s)

`tests/data/earlier` was written on 2026-11-27, before `Fingerprint` was a type: analyze, baseline and gap of the
demo's weights on 128 digits, seed 3.
"""

from __future__ import annotations

import functools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from hessdiag.analysis import analyze
from hessdiag.check.baseline import read, text
from hessdiag.check.comparable import differences, reproduced, same_weights
from hessdiag.check.subject import entry_of
from hessdiag.errors import OutputError
from hessdiag.gap import kept
from hessdiag.gap.examine import Examination
from hessdiag.gap.record import CheckpointRecord
from hessdiag.results import Analysis, Fingerprint, Store, load_run
from hessdiag.results import fingerprint as module
from hessdiag.results.fingerprint import DEFAULTS
from hessdiag.settings import Settings
from hessdiag.sources.factory import build_problem

EARLIER = Path(__file__).parent / "data" / "earlier"
WEIGHTS = Path(__file__).parent / "data" / "demo.safetensors"
ASKED = {"samples": 128, "seed": 3, "probes": 8, "quantities": ("lambda_max", "trace")}
SAME = 1e-3  # relative: machines round a sum over a path of ReLUs differently


@functools.cache
def today() -> Analysis:
    built = build_problem("hessdiag.sources.digits:problem", checkpoint=str(WEIGHTS))
    return analyze(built.problem, **ASKED).about("demo.safetensors", (), built.weights.sha256)


def written(name: str):
    return json.loads((EARLIER / name).read_text())


def in_todays_names(content):
    """A run.json of earlier, with the names that later versions gave to the same."""
    content["other_bounds"] = content.pop("companions")
    test, around = content["self_test"], content["environment"]
    test["methods_agree"], test["gradient_error"] = test.pop("ways_agree"), test.pop("slope")
    around["method"], around["method_reason"] = around.pop("way"), around.pop("way_reason")
    return content


def test_a_run_is_read_and_has_todays_fingerprint_and_numbers():
    earlier = load_run(EARLIER / "run.json")
    assert earlier.to_dict() == in_todays_names(written("run.json"))
    assert dict(earlier.fingerprint) == dict(today().fingerprint)
    for name, metric in earlier.metrics.items():
        assert metric.value == pytest.approx(today().metrics[name].value, rel=SAME)


def test_a_baseline_is_written_as_it_was_and_compares_with_today():
    earlier = read(EARLIER / "baseline.json")
    assert text(earlier) == (EARLIER / "baseline.json").read_text()
    entry, now = earlier.entries["train"], entry_of(today())
    assert differences(entry.fingerprint, now.fingerprint) == ()
    assert same_weights(entry.fingerprint, now.fingerprint)
    assert reproduced(entry, now) == ()


def test_a_gap_record_is_read_and_is_still_true_of_the_problem():
    file = EARLIER / "gap_record.json"
    problem = build_problem("hessdiag.sources.digits:problem", checkpoint=str(WEIGHTS)).problem
    asked = Examination(settings=Settings(samples=128, seed=3))
    assert CheckpointRecord.of(written(file.name)).to_json() == file.read_text()
    assert kept.read(file, problem, asked) is not None
    assert kept.read(file, problem, replace(asked, settings=Settings(samples=128, seed=4))) is None


def test_what_an_earlier_or_later_hessdiag_records_is_kept(tmp_path):
    """A file may lack fields that are known here, and have others: neither is lost or made up on the way."""
    content = written("run.json")
    for name in ("probe_law", "failure", "fixed_sha256", "available"):
        del content["fingerprint"][name]
    content["fingerprint"] |= {"weight_decay": 0.1, "nested": {"a": [1, None]}}
    (tmp_path / "run.json").write_text(json.dumps(content))
    found = load_run(tmp_path)
    assert found.to_dict() == in_todays_names(content)
    assert "probe_law" not in found.fingerprint
    assert same_weights(found.fingerprint, today().fingerprint)
    assert {d.field for d in differences(found.fingerprint, today().fingerprint)} == {"weight_decay", "nested"}


def test_a_fingerprint_is_the_mapping_that_files_hold():
    made = today().fingerprint
    assert made == Fingerprint.of(dict(made)) == dict(made)
    assert made["steps"] is None  # recorded, and nobody asked for a number of steps
    assert {*DEFAULTS} - {*made} == {"optimizer_sha256"}  # of a quantity that nobody asked for
    assert dict(Fingerprint()) == {}
    with pytest.raises(KeyError):
        Fingerprint()["steps"]


@pytest.mark.parametrize("results", [False, True])
def test_a_store_gives_back_what_it_kept_and_says_what_it_cannot_read(tmp_path, results):
    said: list[str] = []
    store = Store(folder=tmp_path / "kept", say=said.append, results=results)
    assert store.recall("k", "a b") is None
    store.keep("k", "a b", load_run(EARLIER / "run.json"))
    (file,) = (tmp_path / "kept").rglob("*.json")
    assert file.name == ("a-b-k.json" if results else "k.json")
    assert store.recall("k", "a b").to_dict() == in_todays_names(written("run.json"))
    assert (store.recall("another", "a b"), said) == (None, [])
    if not results:  # where earlier versions put it
        file = file.rename(tmp_path / "kept" / file.name)
        assert store.recall("k", "a b").to_dict() == in_todays_names(written("run.json"))
    file.write_text("{")
    assert store.recall("k", "a b") is None
    assert said == [f"{file} cannot be read: measured again"]


def test_only_a_result_that_was_asked_for_must_be_written(tmp_path):
    said: list[str] = []
    (tmp_path / "file").write_text("")
    run = load_run(EARLIER / "run.json")
    Store(folder=tmp_path / "file", say=said.append).keep("k", "", run)
    assert len(said) == 1 and "nothing is kept for a next time" in said[0]
    with pytest.raises(OutputError):
        Store(folder=tmp_path / "file", say=said.append, results=True).keep("k", "", run)
    Store(folder=None).keep("k", "", run)
    assert Store(folder=None).recall("k") is None


def keeps_what_is_none() -> bool:
    return dict(Fingerprint.of({"steps": None, "x": None})) == {"steps": None, "x": None}


def invents_nothing() -> bool:
    return dict(Fingerprint.of({"seed": 0})) == {"seed": 0}


BROKEN = {
    "None is nothing": ({**DEFAULTS, "steps": None}, keeps_what_is_none),
    "all fields are written": ({**DEFAULTS, "split": "no default"}, invents_nothing),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(monkeypatch, breakage):
    defaults, promise = breakage
    assert promise()
    monkeypatch.setattr(module, "DEFAULTS", defaults)
    assert not promise()
