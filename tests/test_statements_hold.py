"""Promise: pages, summaries and prompts claim no more than the numbers allow. (5 s)"""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace

import pytest
import torch
from rich.console import Console

import hessdiag
from hessdiag import hessian
from hessdiag.cli.spelling import flagged
from hessdiag.errors import UsageError
from hessdiag.formatting import format_metric, rounded_up
from hessdiag.gap import report as reporting
from hessdiag.gap import rows as gap_rows
from hessdiag.gap import runs as grouping
from hessdiag.gap.examine import About, Examination, examine
from hessdiag.gap.record import Moved
from hessdiag.gap.registry import Reading
from hessdiag.gap.report import GapReport
from hessdiag.gap.statistics.means import Score
from hessdiag.gap.survey import Survey
from hessdiag.present import page, signs, tables, terminal_table
from hessdiag.present.layers import layers_caption, layers_frame
from hessdiag.present.words import kind_in_words, reading
from hessdiag.results import Layer, json_schema
from hessdiag.schemes.recipe import Recipe
from hessdiag.settings import Settings
from hessdiag.shift import page as shift
from tests import example_analysis, example_gap, models

ANALYSIS = example_analysis.build_analysis()


def with_metric(name, **changes):
    return replace(ANALYSIS, metrics={**ANALYSIS.metrics, name: replace(ANALYSIS.metrics[name], **changes)})


# one analysis


@pytest.mark.parametrize(("count", "said"), [(1, "The only tensor,"), (40, "All 40 "), (41, "The 40 of 41 ")])
def test_the_caption_of_layers_counts_what_is_drawn(count, said):
    many = tuple(Layer(name=f"t{i}", size=2, trace=1.0, lo=1.0, hi=1.0, kind="exact") for i in range(count))
    drawn = replace(ANALYSIS, layers=many)
    assert layers_caption(drawn).startswith(said)
    assert len(layers_frame(drawn)) == min(count, 40)


def check_unresolved():
    """Negative mass of 2% in [1, 92]%: the 2 says nothing."""
    wide = with_metric("negative_mass", value=0.02, lo=0.01, hi=0.92, per_probe=())
    assert not wide.metrics["negative_mass"].resolved
    assert format_metric(wide.metrics["negative_mass"])[0] == "—"
    text = page({"one": wide})
    assert "<code>negative_mass</code><br>" not in text  # no card
    assert "2.0%" not in " ".join(reading(wide)) and any("rounding hides signs" in line for line in reading(wide))
    assert signs.negative_mass(wide, wide.spectrum).startswith("not resolved: [")
    assert "<code>negative_mass</code><br>" in page({"one": ANALYSIS})


def test_a_number_that_is_not_resolved_has_no_card_and_no_point_value():
    check_unresolved()
    # the certificate's other end is what is known of this one
    edge = with_metric("lambda_min", value=-1e-4, lo=-0.107, hi=-1e-5)
    assert format_metric(edge.metrics["lambda_min"])[0] == "—"


OWN = example_analysis.build_own()  # 8% in [6, 81]%
TYPED = re.compile(
    r"; (\d+) steps \(`steps=(\d+)`(, `max_steps=(\d+)`)?(, a larger `budget`)?\) should at least halve"
)


def said_of_signs(analysis) -> str:
    (sentence,) = (line for line in reading(analysis) if "negative" in line and "loss curves" not in line)
    return sentence


def check_zone():
    x, sentence = OWN.spectrum.unresolved, said_of_signs(OWN)
    share = rounded_up(100 * x / OWN.metrics["lambda_max"].value)
    assert sentence.startswith(f"Signs are not resolved below |λ| = {rounded_up(x)} ({share}% of λ_max): ")
    assert "lies within [6, 81]%" in sentence and "8" not in sentence.split("[")[0].split("negative")[1]
    assert TYPED.search(sentence)[2] == str(3 * OWN.spectrum.steps)
    assert not any("Still wide" in line and "negative" in line for line in reading(OWN))
    assert "probe" not in kind_in_words(OWN.metrics["negative_mass"])


def test_what_is_said_of_signs_names_the_zone():
    check_zone()
    # a zone, and yet the share is known to 10% of all eigenvalues: both are said
    near = replace(OWN.metrics["negative_mass"], value=0.4, lo=0.39, hi=0.46)
    known = said_of_signs(replace(OWN, metrics={**OWN.metrics, "negative_mass": near}))
    assert "of the eigenvalues, within [39.0, 46.0]%" in known and "Signs are not resolved below" in known
    none = replace(near, value=0.0, lo=0.0, hi=0.0)
    assert not any("negative eig" in s for s in reading(replace(OWN, metrics={"negative_mass": none})))
    alone = said_of_signs(replace(OWN, spectrum=None))
    assert alone.startswith("The share of negative eigenvalues lies within [6, 81]%")


def test_a_bracket_wider_than_a_tenth_of_the_eigenvalues_has_no_point_value():
    """Its value is the certain end: 40% in [38, 70]% reaches less far than zero, and says little."""
    wide = with_metric("negative_mass", value=0.4, lo=0.38, hi=0.7, per_probe=())
    assert not wide.metrics["negative_mass"].resolved
    assert with_metric("negative_mass", value=0.4, lo=0.38, hi=0.47).metrics["negative_mass"].resolved
    out = io.StringIO()
    Console(file=out, width=80).print(terminal_table({"": wide}, 80))
    for text in (out.getvalue(), repr(wide), " ".join(reading(wide)), str(tables.metric_rows(wide))):
        assert "[38, 70]%" in text and "40%" not in text and "40.0" not in text


def further(**asked):
    """What was said, and what typing it gives."""
    options = {"quantities": ("lambda_max", "negative_mass"), "seed": 0, **asked}
    first = hessdiag.analyze(subject(), **options)
    match = TYPED.search(said_of_signs(first))
    options |= {"steps": int(match[2])} | ({"max_steps": int(match[4])} if match[4] else {})
    if match[5]:
        options.pop("budget")
    return first, match, hessdiag.analyze(subject(), **options)


def subject() -> hessdiag.Problem:
    torch.manual_seed(0)
    data = models.randn(200, 12, seed=3), torch.arange(200) % 4
    layers = (
        torch.nn.Linear(12, 30),
        torch.nn.Tanh(),
        torch.nn.Linear(30, 20),
        torch.nn.Tanh(),
        torch.nn.Linear(20, 4),
    )
    return hessdiag.Problem(torch.nn.Sequential(*layers).double(), {"train": data}, criterion="cross_entropy")


FURTHER = {
    "by default": ({}, False),
    "most steps": ({"max_steps": 45, "steps": 40}, True),
    "no end asked for": ({"quantities": ("negative_mass",), "steps": 35}, True),
    "further starts": ({"density_probes": 3, "steps": 30}, False),
    "a budget": ({"budget": "14p"}, False),
}


@pytest.mark.parametrize(("asked", "capped"), FURTHER.values(), ids=FURTHER)
def test_what_would_tell_more_does_when_typed(asked, capped):
    first, match, second = further(**asked)
    assert bool(match[4]) == capped and bool(match[5]) == ("budget" in asked)
    assert second.spectrum.steps == int(match[2])
    assert second.spectrum.unresolved <= first.spectrum.unresolved / 2


def test_where_rounding_hides_signs_more_steps_are_not_the_way():
    hidden = replace(OWN, spectrum=replace(OWN.spectrum, unresolved=0.0))
    assert "rounding hides signs" in said_of_signs(hidden) and "`dtype='float64'`" in said_of_signs(hidden)
    share = OWN.metrics["negative_mass"]
    double = replace(share, provenance=replace(share.provenance, dtype="float64"))
    assert "dtype" not in said_of_signs(replace(hidden, metrics={**OWN.metrics, "negative_mass": double}))


def test_the_schema_says_what_is_not_resolved():
    said = json_schema()["$defs"]["Spectrum"]["description"]
    assert all(f"{name}: " in said for name in ("unresolved", "error", "resolution"))


def test_a_drawn_share_is_no_number_inside_the_zone():
    bare = replace(OWN, metrics={})
    assert signs.negative_mass(bare, bare.spectrum) == "not resolved"
    known = replace(OWN.spectrum, unresolved=0.0)
    assert "%" in signs.negative_mass(bare, known)


@pytest.mark.parametrize(
    ("size", "text"),
    [(0.0048, "0.0048"), (0.00481, "0.0049"), (9.6e-5, "9.6×10⁻⁵"), (0.0699, "0.070"), (9.96, "10.0")],
)
def test_a_size_is_rounded_upwards(size, text):
    assert rounded_up(size) == text


def test_cards_show_the_error_over_data():
    assert ANALYSIS.metrics["lambda_max"].data is not None
    card = page({"one": ANALYSIS}).split("<code>lambda_max</code><br>")[1].split("</div>")[0]
    assert "over data" in card


def test_a_prompt_shows_a_line_per_quantity():
    text = repr(ANALYSIS)
    assert len(text) < 1500
    assert all(name in text for name in ANALYSIS.metrics)
    assert len(text.splitlines()) <= len(ANALYSIS.metrics) + 4
    assert "per_probe" not in repr(ANALYSIS.metrics["trace"])
    assert repr(hessian(models.mlp())) == (
        "<Curvature hessian, 75 x 75, of cross_entropy/mean over 40 examples of train, torch.float64 on cpu>"
    )


def test_a_notebook_shows_the_axes_it_is_given_back():
    assert ANALYSIS.plot.density()._repr_svg_().lstrip().startswith("<svg")


# many checkpoints


def at(record, file, **meta):
    return replace(record, file=file, meta=meta)


def of_one_run(names, **meta):
    records = example_gap.records(len(names))
    return [at(one, f"runs/a/{name}", lr=0.1, **meta) for one, name in zip(records, names, strict=True)]


NUMBERED = {
    "epochs": ("epoch2.pt", "epoch10.pt", "epoch1.pt"),
    "Lightning": ("epoch=2-step=60.ckpt", "epoch=10-step=300.ckpt", "epoch=1-step=30.ckpt"),
    "numbers alone": ("2.pt", "10.pt", "1.pt"),
    "a model's": ("model_0002.pt", "model_0010.pt", "model_0001.pt"),
    "Hugging Face": tuple(f"checkpoint-{n}/model.safetensors" for n in (200, 1000, 100)),
    "DeepSpeed": tuple(f"global_step{n}/weights.bin" for n in (200, 1000, 100)),
    "folders": ("step-200", "step-1000", "step-100"),
    "entries of one file": ("all.pt::two", "all.pt::z10", "all.pt::one"),
}
APART = {
    "seeds": ("seed2.pt", "seed10.pt", "seed1.pt"),
    "rates": ("lr0.2.pt", "lr0.10.pt", "lr0.1.pt"),
    "other words": ("wide.pt", "deep.pt", "small.pt"),
    "folders of seeds": ("seed2/last.pt", "seed10/last.pt", "seed1/last.pt"),
    "folders of models": ("model2/last.pt", "model10/last.pt", "model1/last.pt"),
    "the last of several": ("a/checkpoint-9/x.pt", "b/checkpoint-9/x.pt", "c/checkpoint-8/x.pt"),
}


@pytest.mark.parametrize("names", NUMBERED.values(), ids=NUMBERED)
def test_checkpoints_along_a_run_are_one_draw(names):
    records = of_one_run(names)
    (run,) = GapReport(tuple(records)).runs
    assert run[-1].file.endswith(names[1])


@pytest.mark.parametrize("names", APART.values(), ids=APART)
def test_other_runs_in_one_folder_are_draws_of_their_own(names):
    assert len(GapReport(tuple(of_one_run(names))).runs) == 3


def test_facts_tell_epochs_and_hyperparameters_tell_runs():
    files = ("run_3.pt", "run_4.pt", "run_5.pt")
    records = of_one_run(files)
    told = [replace(one, meta={**one.meta, "epoch": i}) for i, one in enumerate(records)]
    assert len(GapReport(tuple(told)).runs) == 1
    other = [replace(one, meta={**one.meta, "lr": 0.1 * (i + 1), "epoch": i}) for i, one in enumerate(records)]
    assert len(GapReport(tuple(other)).runs) == 3
    assert len(GapReport(tuple(example_gap.records(9))).runs) == 9


def check_epochs():
    records = of_one_run([f"epoch{i}.pt" for i in range(12)])
    report = GapReport(tuple(records))
    assert all("needs 7 more" in one.reason for one in report.ranks.measures if one.measure != "none")
    assert "12 checkpoints are of 1 run," in " ".join(gap_rows.summary(report))


def test_epochs_are_not_ranked_as_runs():
    check_epochs()


def check_told():
    """Who knows better counts: seeds that are snapshots of one run, numbered files that are runs of their own."""
    seeds, epochs = (of_one_run([f"{word}{i}.pt" for i in range(12)]) for word in ("seed", "epoch"))
    one, many = GapReport(tuple(seeds), one_run=True), GapReport(tuple(epochs), one_run=False)
    assert (len(one.runs), len(many.runs)) == (1, 12)
    assert [record.name for record in one.independent] == ["run11/last"]
    assert "12 checkpoints are of 1 run, as you say: those of one run are not independent" in " ".join(
        gap_rows.summary(one)
    )
    assert "of 12 run" not in " ".join(gap_rows.summary(many)) and gap_rows.rank_rows(many)
    said = " ".join(gap_rows.summary(GapReport(tuple(epochs))))
    assert "not so? say --no-one-run" in flagged(said)


def test_who_knows_better_says_what_is_a_run():
    check_told()


def check_groups():
    """m is said once, in a line of its own, and only where a measure has one."""
    plain = example_gap.records(9)
    note = "m = min(128, N): 3 groups of 128 examples, each with a worst point of its own"
    worst = Reading(0.5, 0.5, math.inf, "search", note)
    other = [replace(r, readings={**r.readings, "worst_sharpness": worst}) for r in plain]
    said = [line for line in gap_rows.summary(GapReport(tuple(other))) if "Worst-case" in line]
    assert said == [f"Worst-case sharpness (worst_sharpness…): {note}, whatever the batch size."]
    assert not [line for line in gap_rows.summary(GapReport(tuple(plain))) if "Worst-case" in line]


def test_the_m_of_m_sharpness_is_said():
    check_groups()


def test_gaps_that_may_all_be_zero_rank_nothing():
    records = example_gap.records(12)
    wide = Score(value=0.01, lo=-0.1, hi=0.1, n=100, method="test")
    none = [replace(r, performance=replace(r.performance, loss_gap=wide, score_gap=wide)) for r in records]
    moved = [
        replace(r, performance=replace(r.performance, score_gap=replace(wide, value=-0.001 * i)))
        for i, r in enumerate(none)
    ]
    for one in GapReport(tuple(moved)).ranks.measures:
        assert one.overall is None and "cannot tell" in one.reason
    up = next(one for one in GapReport(tuple(moved)).ranks.measures if one.measure == "up")
    assert "the interval of every gap" in up.reason


def test_a_refused_measure_did_not_stay():
    records = [replace(r, guard={**r.guard, "none": Moved(verdict="refused")}) for r in example_gap.records(9)]
    assert gap_rows.verdicts(GapReport(tuple(records)), "none") == []
    assert len(gap_rows.verdicts(GapReport(tuple(records)), "up")) == 9


def test_names_of_measures_may_be_written_with_commas():
    assert list(Examination(measures=("weight_norm, trace", "sam*")).chosen()) == [
        name for name in Examination().chosen() if name in ("weight_norm", "trace", "sam_sharpness")
    ]
    assert "trace" not in Examination(measures=("*,!trace",)).chosen()
    with pytest.raises(UsageError, match="`measures=weigth`: no such measure"):  # once, before any checkpoint
        Survey(recipe=Recipe(factory="p.py:f"), asked=Examination(measures=("trace,weigth",)))


def test_the_callers_problem_keeps_its_meta():
    problem = models.mlp()
    problem.data = {**problem.data, "test": problem.data["train"]}
    problem.meta = meta = {"lr": 0.1}
    asked = Examination(measures=("weight_norm",), guard=False, settings=Settings(quantities=("trace",)))
    record = examine(problem, asked, About(facts={"lr": 0.5, "epoch": 3}))
    assert record.meta == {"lr": 0.1, "epoch": 3}
    assert problem.meta is meta and meta == {"lr": 0.1}


def test_shift_names_no_checkpoint_on_an_unadjusted_p(monkeypatch):
    """Of 16 without an effect one has p = 0.02 by chance more often than not."""
    from types import SimpleNamespace as Any

    def curve(p):
        over = Any(lo=-0.2, hi=-0.01, pvalue=p)
        return Any(slope=Any(value=-0.1, over_examples=over, over_levels=None), cannot_tell="")

    def said(values):
        curves = {f"c{i}": curve(p) for i, p in enumerate(values)}
        made = Any(
            of_test=lambda test: curves if test == "distance" else {},
            differences=lambda test: (),
            settings=Any(confidence=0.95),
        )
        return shift.summary(made)[0]

    assert "no change beyond chance at c0" in said([0.02] + [0.5] * 15)
    assert "accuracy falls with the shift at c0;" in said([0.002] + [0.5] * 15)
    assert "accuracy falls with the shift at c0." in said([0.02])


BROKEN = {
    "epochs are runs": (grouping, "_along", lambda group: False, check_epochs),
    "who knows better is not heard": (
        reporting,
        "runs",
        lambda records, outcomes, one_run, plain=grouping.runs: plain(records, outcomes),
        check_told,
    ),
    "m is not said": (gap_rows, "_groups", lambda report: [], check_groups),
    "all are ranked": (reporting.GapReport, "independent", property(lambda self: self.records), check_epochs),
    "every value is shown": (
        type(ANALYSIS.metrics["negative_mass"]),
        "resolved",
        property(lambda self: True),
        check_unresolved,
    ),
    "no zone is named": (signs, "zone_in_words", lambda analysis: "", check_zone),
    "as many steps as there were": (signs, "FURTHER", 1, check_zone),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage, monkeypatch):
    module, name, wrong, check = breakage
    monkeypatch.setattr(module, name, wrong)
    with pytest.raises(AssertionError):
        check()
