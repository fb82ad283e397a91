"""Promise: --track follows a run: right numbers, right order, nothing missed by a warm start, nothing lost. (20 s)

Oracles: dense eigenvalues by numpy, a quadratic loss whose Hessian is known, the standard library's parsers.
"""

from __future__ import annotations

import csv
import json
import math
import re
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from hessdiag.errors import LoadError, Refused, UsageError
from hessdiag.sources.many import checkpoints, is_pattern
from hessdiag.spectral import warm as warming
from hessdiag.spectral.extremes import extremes
from hessdiag.spectral.warm import Warm, ending
from hessdiag.track.follow import Follower, rate_of
from hessdiag.track.trajectory import Rate
from tests.command import call
from tests.models import rotated
from tests.test_page_is_self_contained import LIMIT, Reader

PROBLEM = '''
import torch
from torch import nn
from hessdiag import Problem

class Bowl(nn.Module):
    """Output s·(x∘w) with mse to 0: H = 2/(n k) s² diag(Σ x²), so s makes the checkpoint as sharp as wanted."""
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(300, dtype=torch.float64))
        self.register_buffer("s", torch.ones((), dtype=torch.float64))
    def forward(self, x):
        return self.s * x * self.w

BULK, OUTLIERS = torch.linspace(0.5, 1, 290).double(), torch.linspace(6, 24, 10).double()
X = torch.diag(torch.cat([BULK, OUTLIERS]))
Y = torch.zeros(300, 300, dtype=torch.float64)

def bowl():
    return Problem(Bowl(), {"train": (X, Y)}, criterion="mse", meta={"lr": 9.0})

def shuffled():
    x = X + torch.rand(())
    return Problem(Bowl(), {"train": (x, Y)}, criterion="mse")
'''
SQUARES = float(np.sum(np.linspace(0.5, 1, 290) ** 2) + np.sum(np.linspace(6, 24, 10) ** 2))
SCALES = {2: 1.0, 10: 2.0, 30: 3.0}  # epoch: s
SMALL = (
    "--quantities",
    "lambda_max,lambda_min,trace,density",
    "--probes",
    "2",
    "--density-probes",
    "2",
    "--steps",
    "4",
)


def lambda_max(scale: float) -> float:
    return 2 / 90_000 * scale**2 * 24**2  # 2/(n k) s² max Σ x², n = k = 300


def save(file: Path, scale: float, **entries: object) -> None:
    state = {"w": torch.ones(300, dtype=torch.float64), "s": torch.tensor(scale, dtype=torch.float64)}
    torch.save({"model": state, **entries}, file)


def prepare(folder: Path) -> Path:
    (folder / "p.py").write_text(PROBLEM)
    (folder / "run").mkdir()
    for epoch, scale in SCALES.items():
        save(folder / "run" / f"epoch{epoch}.pt", scale, lr=0.25)
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return prepare(tmp_path)


def faults(document: dict, frame: list[dict[str, str]]) -> list[str]:
    """What a trajectory of the bowl gets wrong, against the closed form."""
    found = []
    points = document["checkpoints"]
    if [point["name"] for point in points] != [f"epoch{epoch}" for epoch in SCALES]:
        found.append("order")
    for point, scale in zip(points, SCALES.values(), strict=True):
        true, metric = lambda_max(scale), point["metrics"]["lambda_max"]
        # rtol is 1e-3; the float64 value may lie above the truth by rounding, which the interval allows for
        if not metric["lo"] <= true <= metric["hi"] or metric["hi"] - metric["lo"] > 1.1e-3 * true:
            found.append("lambda_max")
        if not math.isclose(point["step"]["lambda_max_over_limit"][0], true * 0.25 / 2, rel_tol=1e-3):
            found.append("limit")
        if not math.isclose(point["loss"], scale**2 * SQUARES / 90_000, rel_tol=1e-6):  # linspace in float32
            found.append("loss")
    rows = {(row["checkpoint"], row["quantity"]): row for row in frame}
    for point in points:
        row = rows.get((point["name"], "lambda_max"))
        if row is None or float(row["value"]) != point["metrics"]["lambda_max"]["value"]:
            found.append("table")
    return found


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict[str, str]]]:
    run = prepare(tmp_path_factory.mktemp("followed"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(run)
        return follow(run)


@pytest.fixture
def followed(once: tuple[str, list[dict[str, str]]]) -> tuple[dict, list[dict[str, str]]]:
    return json.loads(once[0]), once[1]


def follow(run: Path) -> tuple[str, list[dict[str, str]]]:
    code, out, err = call("analyze", "p.py:bowl", "-c", "run/epoch*.pt", "--track", *SMALL, "-o", "out", "--json")
    assert code == 0, err
    with (run / "out" / "trajectory.csv").open(newline="") as stream:
        return out, list(csv.DictReader(stream))


def swap(document: dict) -> None:
    document["checkpoints"].reverse()


def narrow(document: dict) -> None:
    metric = document["checkpoints"][1]["metrics"]["lambda_max"]
    metric["hi"] = metric["lo"]


def forget_eta(document: dict) -> None:
    document["checkpoints"][0]["step"]["lambda_max_over_limit"][0] *= 2


def other_loss(document: dict) -> None:
    document["checkpoints"][2]["loss"] /= 6


def stale_table(document: dict) -> None:
    document["checkpoints"][0]["metrics"]["lambda_max"]["value"] += 1e-3


BROKEN = {
    "natural order lost": swap,
    "an interval that misses": narrow,
    "η instead of η/2": forget_eta,
    "a loss per example": other_loss,
    "a table of another run": stale_table,
}


def test_every_checkpoint_has_its_numbers(followed):
    assert faults(*followed) == []


@pytest.mark.parametrize("breakage", BROKEN.values(), ids=BROKEN)
def test_this_promise_would_notice(breakage, followed):
    document, frame = followed
    breakage(document)
    assert faults(document, frame)


def test_the_page_is_valid_and_says_it_all(run: Path):
    (run / "run" / "epoch20.pt").write_bytes(b"PK\x03\x04 broken <b>")
    code, out, err = call("analyze", "p.py:bowl", "-c", "run/epoch*.pt", "--track", *SMALL, "-o", "out")
    assert code == 4
    assert len([line for line in err.splitlines() if line.startswith("hessdiag: epoch20: ")]) == 1
    assert out.index("epoch2 ") < out.index("epoch10") < out.index("epoch20") < out.index("epoch30")
    html = (run / "out" / "report.html").read_text()
    reader = Reader()
    reader.feed(html)
    assert reader.faults == [] and reader.open == []
    tags = [tag for tag, _, _ in reader.elements]
    assert tags.count("figure") == tags.count("figcaption") == 1
    assert {"script", "img", "iframe"}.isdisjoint(tags)
    outside = [
        value for _, attributes, _ in reader.elements for value in attributes.values() if "//" in (value or "")
    ]
    assert all(value.startswith(("data:", "http://www.w3.org/")) for value in outside)
    assert len(html.encode()) < LIMIT / 10
    for shown in ("2/η", "full-batch", "epoch20", "not measured", "λ_max·η/2", "Table of this figure"):
        assert shown in html
    assert "<b>" not in html
    drawn = ElementTree.parse(run / "out" / "evolution.svg").getroot()
    assert drawn.tag.endswith("svg") and any(child.tag.endswith("image") for child in drawn.iter())


def test_a_run_that_was_cut_short_goes_on(run: Path, monkeypatch: pytest.MonkeyPatch):
    command = ("analyze", "p.py:bowl", "-c", "run/epoch*.pt", "--track", *SMALL)
    measured: list[str] = []
    whole = Follower.point

    def interrupted(self: Follower, name: str, *rest: object) -> object:
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(name)
        return whole(self, name, *rest)

    monkeypatch.setattr(Follower, "point", interrupted)
    code, _, err = call(*command)
    assert code == 130 and "2 of 3 are kept" in err
    monkeypatch.setattr(Follower, "point", whole)
    code, out, _ = call(*command, "--json")
    reused = [point["reused"] for point in json.loads(out)["checkpoints"]]
    assert (code, reused) == (0, [True, True, False])
    save(run / "run" / "epoch2.pt", 1.5, lr=0.25)  # another content under the same name
    document = json.loads(call(*command, "--json")[1])
    assert [point["reused"] for point in document["checkpoints"]] == [False, True, True]
    assert document["checkpoints"][0]["metrics"]["lambda_max"]["value"] == pytest.approx(lambda_max(1.5), rel=1e-3)


def test_what_is_one_checkpoints_fault_stays_its_own(run: Path):
    """Another architecture, NaN among the weights, no file of this kind; and a good one with an odd name."""
    odd = "epoch1 $x$ <b>&\udcff.pt"  # pandas refuses such a byte where pyarrow is installed
    save(run / "run" / odd, 1.0)
    torch.save({"w": torch.ones(5), "s": torch.tensor(1.0)}, run / "run" / "epoch3.pt")
    save(run / "run" / "epoch4.pt", math.nan)
    (run / "run" / "epoch5.pt").write_text("no checkpoint")
    code, out, err = call(
        "analyze", "p.py:bowl", "-c", "run/epoch?[. ]*pt", "--track", *SMALL, "-o", "out", "--json"
    )
    points = json.loads(out)["checkpoints"]
    assert code == 4
    assert [point["name"] for point in points] == [odd.removesuffix(".pt"), "epoch2", "epoch3", "epoch4", "epoch5"]
    assert [bool(point["error"]) for point in points] == [False, False, True, True, True]
    for word, point in zip(("(300,)", "NaN", "not a checkpoint"), points[2:], strict=True):
        assert word in point["error"]
    assert len([line for line in err.splitlines() if line.startswith("hessdiag: epoch")]) == 3
    assert "epoch1 $x$ &lt;b&gt;&amp;" in (run / "out" / "report.html").read_text()
    with (run / "out" / "trajectory.csv").open(newline="") as stream:
        assert sum(row["status"] != "measured" for row in csv.DictReader(stream)) == 3


def test_nothing_measured_is_no_picture_and_still_said(run: Path):
    (run / "run" / "epoch99.pt").write_text("no checkpoint")
    code, _, err = call("analyze", "p.py:bowl", "-c", "run/epoch99.pt", "--track", *SMALL, "-o", "out")
    assert code == 4 and "none of 1 checkpoints could be measured" in err
    assert not (run / "out" / "evolution.svg").exists()
    assert "Nothing was measured." in (run / "out" / "report.html").read_text()


def test_samples_that_move_are_refused_not_followed(run: Path):
    code, _, err = call("analyze", "p.py:shuffled", "-c", "run/epoch*.pt", "--track", *SMALL)
    assert code == 4
    assert err.count("data_sha256 differ from the first checkpoint's") == 2


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("-c", "run/epoch2.pt", "-c", "run/epoch10.pt"), 2, ("--track", "hessdiag gap")),
        (("-c", "run/epoch*.pt"), 2, ("--track", "hessdiag gap")),
        (("--track",), 2, ("-c 'run/epoch*.pt'",)),
        (("-c", "run/none*.pt", "--track"), 4, ("no checkpoint matches run/none*.pt",)),
        (("-c", "run/none.pt", "--track"), 4, ("no such checkpoint run/none.pt",)),
        (("-c", "run/epoch2.pt", "--lr", "0.1"), 2, ("--track",)),
        (("-c", "run/epoch2.pt", "--track", "--lr", "0"), 2, ("--lr 0.0",)),
        (("-c", "run/epoch2.pt", "--track", "--cross-check", "pyhessian"), 2, ("--cross-check",)),
    ],
    ids=str,
)
def test_refusals_are_one_line(run: Path, arguments, code, words):
    got, out, err = call("analyze", "p.py:bowl", *arguments)
    assert (got, out) == (code, "")
    assert len(err.splitlines()) == 1 and all(word in err for word in words)


def test_patterns_become_files_in_natural_order(run: Path, monkeypatch: pytest.MonkeyPatch):
    assert [c.name for c in checkpoints(["run/epoch*.pt"])] == ["epoch2", "epoch10", "epoch30"]
    assert [c.path for c in checkpoints(["run/epoch30.pt", "run/*.pt"])][:2] == ["run/epoch30.pt", "run/epoch2.pt"]
    assert checkpoints(["run/*.pt::model"])[0].path == "run/epoch2.pt::model"
    both = checkpoints(["run/epoch2.pt::model", "run/epoch2.pt::ema"])
    assert [c.name for c in both] == ["epoch2::model", "epoch2::ema"]
    for place in ("a", "b"):
        (run / "runs" / place).mkdir(parents=True)
        save(run / "runs" / place / "last.pt", 1.0)
    assert [c.name for c in checkpoints(["runs/*/last.pt"])] == ["a", "b"]
    save(run / "run" / "odd[1].pt", 1.0)
    assert [c.path for c in checkpoints(["run/odd[1].pt"])] == ["run/odd[1].pt"]
    assert not is_pattern("run/odd[1].pt") and is_pattern("run/e*.pt::model")
    mixed = checkpoints(["run/epoch2.pt", "runs/a/last.pt"])
    assert len({c.name for c in mixed}) == 2
    with pytest.raises(UsageError, match="no checkpoints"):
        checkpoints([])
    with pytest.raises(LoadError, match="matches"):
        checkpoints(["nowhere/*.pt"])


def test_the_limit_is_that_of_the_optimizer():
    """Against the roots of the recurrence on λx²/2: at the limit the largest root has modulus one."""
    for beta, nesterov in ((0.0, False), (0.9, False), (0.5, True)):
        limit = Rate(lr=0.3, momentum=beta, nesterov=nesterov).limit
        for factor, stable in ((0.999, True), (1.001, False)):
            pull = 0.3 * factor * limit
            damping = beta * (1 - pull) if nesterov else beta
            roots = np.roots([1, -(1 + beta - pull - (beta * pull if nesterov else 0)), damping])
            assert (abs(roots).max() <= 1) == stable


def test_where_the_rate_comes_from():
    assert rate_of(0.5, {"lr": 0.1}, {"lr": 0.2}) == Rate(lr=0.5, origin="lr")
    assert rate_of(None, {"lr": 0.1, "momentum": 0.9}, {"lr": 0.2}) == Rate(
        lr=0.1, momentum=0.9, origin="checkpoint"
    )
    assert rate_of(None, {}, {"learning_rate": 0.2}) == Rate(lr=0.2, origin="problem.meta")
    assert rate_of(None, {}, {"lr": "fast"}) is None
    refused = rate_of(None, {"lr": 1e-3, "adaptive": True}, {"lr": 0.2})
    assert isinstance(refused, Refused) and "2/η is no limit" in refused.reason


def test_an_optimizers_own_groups_are_read(run: Path):
    weight = torch.nn.Parameter(torch.ones(2))
    for number, optimizer in enumerate([torch.optim.SGD([weight], 0.25, 0.5), torch.optim.Adam([weight], 0.25)]):
        save(run / "run" / f"opt{number}.pt", 1.0, optimizer=optimizer.state_dict())
    document = json.loads(call("analyze", "p.py:bowl", "-c", "run/opt*.pt", "--track", *SMALL, "--json")[1])
    sgd, adam = document["checkpoints"]
    assert sgd["step"]["limit"] == pytest.approx(3 / 0.25)  # (2 + 2 · 0.5)/η
    assert adam["step"] is None and any("each direction" in note for note in document["notes"])


BULK = np.r_[np.geomspace(0.5, 3, 8), 0.01 * np.random.default_rng(1).normal(size=190)]


def test_a_wrong_warm_start_hides_nothing():
    """The new largest eigenvector is orthogonal to all the earlier run knew; only the random part can see it."""
    old = rotated(np.r_[BULK, 0.0], 0)
    left = ending(extremes(old).krylov, 1)
    values, vectors = torch.linalg.eigh(old)
    flat = vectors[:, int(values.abs().argmin())]
    flat = torch.nn.functional.normalize(flat - (flat @ left.direction) * left.direction, dim=0)
    new = old + 10 * torch.outer(flat, flat)
    truth = np.linalg.eigvalsh(new.numpy())
    found = extremes(new, warm=left)
    assert found.lambda_max is not None and found.lambda_min is not None
    assert found.lambda_max.lo <= truth[-1] <= found.lambda_max.hi
    assert found.lambda_min.lo <= truth[0] <= found.lambda_min.hi
    assert found.lambda_max.hi - found.lambda_max.lo <= 1e-3 * truth[-1]


def misses(stretched: bool, trials: int = 400) -> int:
    """How often the upper end of a run of six products, at a failure of 5%, lies below the truth.

    The warm direction is orthogonal to the largest eigenvector and almost invariant: the worst there is.
    """
    d = 40
    values = torch.cat([torch.tensor([1.0, 0.999], dtype=torch.float64), torch.zeros(d - 2, dtype=torch.float64)])
    axis = torch.zeros(d, dtype=torch.float64)
    axis[1] = 1.0
    count = 0
    for seed in range(trials):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(warming, "SHARE", 30.0)
            if not stretched:
                patch.setattr(sys.modules["hessdiag.spectral.extremes"], "beginning", _unstretched)
            found = extremes(
                torch.diag(values), which=("max",), warm=Warm(axis, 1), seed=seed, max_steps=2, failure=0.05
            )
        assert found.lambda_max is not None
        count += found.lambda_max.hi < 1.0
    return count


def _unstretched(*arguments: object) -> warming.Start:
    return warming.Start(warming.beginning(*arguments).vector)  # its length forgotten


def test_the_certificate_keeps_its_confidence_with_a_warm_start():
    # binomial(400, 0.05) exceeds 34 with probability 0.002
    assert misses(stretched=True) <= 34


def test_the_bench_of_confidence_would_notice_a_certificate_that_trusts_the_start():
    assert misses(stretched=False) > 34


def test_warm_starts_are_refused_where_they_do_not_fit():
    with pytest.raises(UsageError, match="warm start"):
        extremes(rotated(BULK, 0), warm=Warm(torch.ones(3, dtype=torch.float64), 1))
    with pytest.raises(UsageError, match="turn 0"):
        extremes(rotated(BULK, 0), warm=Warm(torch.ones(len(BULK), dtype=torch.float64), 0))


def test_safetensors_headers_name_the_rate(run: Path):
    state = {"w": torch.ones(300, dtype=torch.float64), "s": torch.tensor(1.0, dtype=torch.float64)}
    save_file(state, run / "run" / "last.safetensors", metadata={"lr": "0.5"})
    document = json.loads(
        call("analyze", "p.py:bowl", "-c", "run/last.safetensors", "--track", *SMALL, "--json")[1]
    )
    step = document["checkpoints"][0]["step"]
    assert (step["lr"], step["origin"]) == (0.5, "checkpoint")
    assert re.fullmatch(r"last", document["checkpoints"][0]["name"])
