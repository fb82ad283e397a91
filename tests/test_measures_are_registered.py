"""Promise: every measure says what it is, whose and at what cost; others join, or are refused in a line. (3 s)"""

from __future__ import annotations

import math
from importlib.metadata import EntryPoint

import pytest

from hessdiag.errors import NonFiniteError, Refused, UsageError
from hessdiag.gap import registry
from hessdiag.gap.registry import FAMILIES, INVARIANCES, Measure, Reading, exact, found, measure

TEXTS = {"title": "Ours", "family": "norms", "formula": "1", "source": "us", "cost": "nothing"}


@measure("ours", **TEXTS)
def ours(checkpoint) -> Reading:
    """A measure of another package."""
    return exact(1.0)


@measure("trace", **TEXTS)
def taken(checkpoint) -> Reading:
    """A measure whose name the built-in ones have."""
    return exact(1.0)


def entry(target: str, name: str = "ours") -> EntryPoint:
    return EntryPoint(name, f"tests.test_measures_are_registered:{target}", registry.GROUP)


def with_plugins(monkeypatch, *entries: EntryPoint):
    monkeypatch.setattr(registry, "entry_points", lambda group: list(entries) if group == registry.GROUP else [])
    return registry.registry()


def check_descriptions(measures=None) -> None:
    for name, one in (measures or registry.registry()).items():
        assert one.name == name == name.lower() and name.isidentifier()
        assert one.family in FAMILIES and one.invariances <= set(INVARIANCES)
        for text in (one.title, one.formula, one.source, one.cost):
            assert text.strip() and "\n" not in text
        doc = vars(one).get("__doc__", "")
        assert len(doc.split()) >= 3, f"{name} has no docstring"


def test_every_measure_describes_itself():
    check_descriptions()


def test_the_built_in_measures_are_there():
    every = registry.registry()
    assert {one.family for one in every.values()} == set(FAMILIES)
    assert {"average_sharpness", "worst_sharpness_adaptive", "pac_bayes_magnitude_sharpness"} <= set(every)
    titles = [one.title for one in every.values()]
    assert len(set(titles)) == len(titles)


def check_order() -> None:
    """Whatever was imported first: a process of its own imports in another order, and reports are compared."""
    plain, kept = list(registry.registry()), dict(registry._BUILT_IN)
    try:
        registry._BUILT_IN.clear()
        # as after an import of the last module alone: its measures come first
        registry._BUILT_IN.update(sorted(kept.items(), key=lambda item: -_place(item[1])))
        assert list(registry.registry()) == plain
    finally:
        registry._BUILT_IN.clear()
        registry._BUILT_IN.update(kept)


def _place(one: Measure) -> int:
    return registry.MODULES.index(one.function.__module__.rpartition(".")[2])


def test_measures_come_in_one_order_whatever_was_imported_first():
    check_order()
    modules = [_place(one) for one in registry.registry().values()]
    assert modules == sorted(modules)


def test_an_order_of_imports_would_be_noticed(monkeypatch):
    monkeypatch.setattr(registry, "built_in", lambda: dict(registry._BUILT_IN))
    with pytest.raises(AssertionError):
        check_order()


def test_another_packages_measure_joins(monkeypatch):
    every = with_plugins(monkeypatch, entry("ours"))
    assert every["ours"] is ours and ours(None).value == 1.0
    assert "ours" not in registry._BUILT_IN


def test_a_broken_plugin_is_one_warning(monkeypatch):
    check_broken(monkeypatch)


def check_broken(monkeypatch) -> None:
    with pytest.warns(UserWarning) as caught:
        every = with_plugins(monkeypatch, entry("no_such_name", "broken"), entry("entry", "plain"), entry("ours"))
    texts = [str(one.message) for one in caught]
    assert len(texts) == 2 and all("\n" not in text for text in texts)
    assert "broken" in texts[0] and "does not load" in texts[0]
    assert "plain" in texts[1] and "@measure" in texts[1]
    assert "ours" in every


def test_a_name_taken_twice_is_refused(monkeypatch):
    for entries in ((entry("taken"),), (entry("ours"), entry("ours", "again"))):
        with pytest.raises(UsageError, match="exists already: give it another name"):
            with_plugins(monkeypatch, *entries)


def test_a_reason_as_text_is_still_a_refusal_and_one_warning():
    old = measure("old_style", **TEXTS)(lambda checkpoint: "not here")
    with pytest.warns(DeprecationWarning, match=r"old_style returns its reason as text: return Refused") as caught:
        said = [old(None), old(None)]
    assert said == [Refused("not here")] * 2 and len(caught) == 1
    assert f"{said[0]}" == said[0].reason


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"family": "magic"}, "allowed: curvature"),
        ({"invariant": ("rotation",)}, "allowed: layer rescaling"),
        ({"formula": " "}, "formula must be one line"),
        ({"cost": "a\nb"}, "cost must be one line"),
    ],
)
def test_a_description_with_gaps_is_refused(change, says):
    with pytest.raises(UsageError, match=says):
        measure("gap", **{**TEXTS, **change})(lambda checkpoint: exact(1.0))


def check_readings() -> None:
    for bad in (
        (math.nan, 0, 1, "exact"),
        (1, 0, math.inf, "draws"),
        (2, 0, 1, "exact"),
        (1, -math.inf, 1, "search"),
    ):
        with pytest.raises(NonFiniteError):
            Reading(*bad)
    with pytest.raises(UsageError, match="allowed: exact"):
        Reading(1, 1, 1, "guess")  # type: ignore[arg-type]
    assert (found(2.0).lo, found(2.0).hi, found(2.0).kind) == (2.0, math.inf, "search")
    assert exact(2.0, "why", a=1.0).more == {"a": 1.0}


def test_readings_are_numbers_in_their_intervals():
    check_readings()


def unchecked_readings(monkeypatch):
    monkeypatch.setattr(Reading, "__post_init__", lambda self: None)


def silent(monkeypatch):
    monkeypatch.setattr(registry.warnings, "warn", lambda *_, **__: None)


def undescribed(monkeypatch):
    blank = Measure("blank", **TEXTS, invariances=frozenset(), function=lambda checkpoint: exact(1.0))
    monkeypatch.setitem(registry._BUILT_IN, "blank", blank)


BROKEN = {
    "readings that are not looked at": (unchecked_readings, lambda monkeypatch: check_readings()),
    "plugins that fail in silence": (silent, check_broken),
    "a measure without a docstring": (undescribed, lambda monkeypatch: check_descriptions()),
}


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage, monkeypatch):
    damage, check = breakage
    damage(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(monkeypatch)
