"""Reports of a check: one with every kind of row, and one whose every name is as hostile as a file allows."""

from __future__ import annotations

from dataclasses import replace

from hessdiag.check.verdict import Interval, Report, Row, Verdict

HOSTILE = (
    "two\nlines",
    'a,b:c=d{e="f"} # EOF\n# EOF',
    "a\r\n::error::injected",
    "]]>",
    "%0A%25",
    "::set-output name=x::y",
    "a | b \\| c",
    "<script>alert(1)</script><!-- -->",
    "[bold red]markup[/bold red] [/]",
    "\N{PILE OF POO}\N{ZERO WIDTH JOINER}\N{COMBINING ACUTE ACCENT}",
    "nul\0 bell\a escape\x1b[31m",
    "half \ud800 pair, none \ufffe",
    "*_`~[x](http://y)`_*",
    "@octocat #12 GH-12 &#64; &amp;",
    "quote \" apostrophe ' backslash \\",
    "- 1. # heading",
    "\N{RIGHT-TO-LEFT OVERRIDE}desrever\N{LINE SEPARATOR}x",
    "##[error]x ##vso[task.complete]",
    "x" * 10_000,
)


def row(verdict: Verdict = Verdict.PASS, **changes) -> Row:
    """A limit of 15% on λ_max's increase."""
    given = Row(
        budget="lambda_max",
        metric="lambda_max",
        scope="train",
        level="error",
        limit="≤ +15%",
        limit_kind="max_increase",
        threshold=0.15,
        relative=True,
        verdict=verdict,
        measured=Interval(0.8471, 0.847, 0.8472, "certificate"),
        baseline=0.7702,
        tested=Interval(0.0998, 0.0995, 0.1001, "both intervals"),
        file="pyproject.toml",
        line=12,
    )
    return replace(given, **changes)


def absolute(verdict: Verdict, kind: str, threshold: float, measured: Interval, **changes) -> Row:
    """A limit on the value itself."""
    limit = {"min": "≥ ", "max": "≤ "}[kind] + f"{threshold:g}"
    given = row(verdict, limit=limit, limit_kind=kind, threshold=threshold, relative=False, **changes)
    return replace(given, baseline=None, measured=measured, tested=measured)


def mixed(**changes) -> Report:
    """Every verdict, both levels, with and without a reason."""
    trace, mass = Interval(5.85, 5.21, 6.49, "paired"), Interval(0.4012, 0.3921, 0.4104, "bracket")
    rows = (
        absolute(Verdict.PASS, "max", 80.0, Interval(0.8471, 0.847, 0.8472)),
        row(Verdict.PASS),
        row(
            Verdict.FAIL,
            budget="trace@layer4.*",
            metric="trace",
            scope="train@layer4.*",
            limit="≤ +10%",
            threshold=0.1,
            measured=trace,
            baseline=4.91,
            tested=Interval(0.1914, 0.1522, 0.2306, "paired"),
            reason="+19.1% in [+15.2%, +23.1%], beyond ≤ +10%",
            line=13,
        ),
        absolute(
            Verdict.FAIL,
            "max",
            0.35,
            mass,
            budget="negative_mass",
            metric="negative_mass",
            level="warn",
            reason="0.4012 in [0.3921, 0.4104], beyond ≤ 0.35",
            line=14,
        ),
        row(
            Verdict.UNSURE,
            budget="trace[test]",
            metric="trace",
            scope="test",
            measured=trace,
            baseline=5.21,
            tested=Interval(0.123, 0.089, 0.157, "paired"),
            reason="+12.3% in [+8.9%, +15.7%] holds the limit ≤ +15%: about 24 more probes would tell",
            line=15,
        ),
        absolute(
            Verdict.NONE,
            "min",
            -1.0,
            Interval(-1.2345e-5, -1.3e-5, -1.2e-5),
            budget="lambda_min",
            metric="lambda_min",
            reason="not measured: the baseline is of other samples",
            line=16,
        ),
    )
    given = Report(
        rows=rows,
        warnings=("the baseline was measured with torch 2.12.0, this is 2.13.0",),
        notes=("probes raised from 16 to 32 where nobody could tell",),
        checkpoint="ckpt/best.safetensors",
        baseline="tests/hessdiag-baseline.json",
        environment={"torch": "2.13.0", "device": "cpu", "threads": 2, "commit": None},
        cost=1234,
    )
    return replace(given, **changes)


def passing() -> Report:
    """Nothing to complain of."""
    return mixed(rows=mixed().rows[:2])


def failing(count: int, **changes) -> Report:
    """``count`` failed limits, each further beyond its limit than the one before."""
    rows = tuple(
        row(Verdict.FAIL, budget=f"trace@layer{index}.*", tested=Interval(1.0 + index, 0.5 + index, 1.5 + index))
        for index in range(count)
    )
    return mixed(rows=tuple(replace(each, **changes) for each in rows))


def hostile(verdict: Verdict = Verdict.FAIL, **changes) -> Report:
    """Every text a user can write is hostile."""
    rows = tuple(
        row(
            verdict,
            budget=f"trace@{name}",
            scope=f"train@{name}",
            metric="trace",
            limit=f"≤ +{15 + position}%",
            reason=f"{name} is beyond",
            file=f"{name}.toml",
        )
        for position, name in enumerate(HOSTILE)
    )
    given = Report(
        rows=rows,
        problems=HOSTILE,
        warnings=HOSTILE,
        notes=HOSTILE,
        checkpoint=HOSTILE[0],
        baseline=HOSTILE[1],
        environment={name: name for name in HOSTILE},
    )
    return replace(given, **changes)
