"""Promise: no checkpoint, file name, full disk or Ctrl-C costs `hessdiag gap` what it has measured. (30 s)

Oracles: the standard library's parsers, sums over paths written out, scipy's tau-b, the same folder hashed twice.
"""

from __future__ import annotations

import csv
import errno
import html
import io
import json
import math
import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import active_children
from pathlib import Path

import pytest
import torch
from scipy.stats import kendalltau
from torch import nn

from hessdiag import Problem, files, folders, hashing
from hessdiag.cli import gap as verb
from hessdiag.cli import surveying
from hessdiag.cli.spelling import flagged
from hessdiag.engine.products.curvature import Curvature
from hessdiag.errors import UsageError
from hessdiag.gap import kept, look, survey
from hessdiag.gap.checkpoint import Checkpoint
from hessdiag.gap.measures import folding
from hessdiag.gap.measures.norms import path_norm
from hessdiag.gap.page import gap_page
from hessdiag.gap.registry import Reading
from hessdiag.gap.report import GapReport
from hessdiag.gap.rows import rank_rows
from hessdiag.samples import draw
from hessdiag.sources import many
from tests import example_gap as example
from tests import test_page_is_self_contained as checker
from tests.command import call
from tests.test_gap_report_is_honest import SECTIONS

PROBLEM = """
import time
import hessdiag
import torch
from pathlib import Path
from torch import nn


class Rooted(nn.Module):
    def __init__(self, width=3):
        super().__init__()
        self.linear, self.limit = nn.Linear(4, width), nn.Parameter(torch.tensor(5.0))

    def forward(self, x):  # NaN where an input is above the limit
        return self.linear(x) + (self.limit - x.max(1, keepdim=True).values).sqrt()


def small(test="same", odd=False):
    x = torch.rand(80, 4, generator=torch.Generator().manual_seed(0))
    y = torch.arange(80) % 3
    tests = {"same": (x, y), "large": (x + 10 * (torch.arange(80) % 2)[:, None], y), "labels": (x, y + 2)}
    data = {"train": (x, y)} | ({"test": tests[test]} if test else {})
    return hessdiag.Problem(Rooted(), data, criterion="cross_entropy")


def own(checkpoint):
    problem, file = small(), Path(checkpoint)
    problem.model.load_state_dict(torch.load(file / "w.pt" if file.is_dir() else file))
    return problem


def slow(checkpoint):
    if "run1" not in checkpoint:
        time.sleep(100)
    return own(checkpoint)
"""
FAST = (
    "--samples",
    "20",
    "--batch-size",
    "20",
    "--probes",
    "2",
    "--rtol",
    "0.1",
    "--measures",
    "weight_norm",
    "--no-guard",
)
ODD = ("a b'c\"d", "<script>alert(1)<", "né 数 =1+1,;|&amp;%s{}[1]", "two\nlines\udcff")


class Rooted(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.linear, self.limit = nn.Linear(4, width), nn.Parameter(torch.tensor(5.0))


def save(name: str, seed: int, width: int = 3, **values: float) -> None:
    torch.manual_seed(seed)
    model = Rooted(width)
    for parameter, value in values.items():
        getattr(model, parameter).data.fill_(value)
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    torch.save(model.state_dict(), name)


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three small checkpoints."""
    monkeypatch.chdir(tmp_path)
    Path("problem.py").write_text(PROBLEM)
    for seed in range(3):
        save(f"run{seed}.pt", seed)
    return tmp_path


def gap(*more: str, factory: str = "small", given: str = "run*.pt") -> tuple[int, str, str]:
    return call("gap", f"problem.py:{factory}", "-c", given, *FAST, *more)


def rows(file: str = "gap.csv") -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(Path(file).read_bytes().decode(), newline="")))


def failed(file: str = "gap.csv") -> dict[str, str]:
    return {row["checkpoint"]: row["note"] for row in rows(file) if row["kind"] == "failure"}


def in_cache() -> int:
    return len(list(Path(".hessdiag/cache/gap").rglob("*.json")))


def no_room(patch: pytest.MonkeyPatch, where: str, at: str = "fsync", number: int = errno.ENOSPC) -> None:
    """Writing fails in paths with this text: before the file is made, or when its content is there."""
    made = files.write_flushed

    def full(path: Path, content: str) -> None:
        if where not in str(path):
            made(path, content)
            return
        if at == "fsync":
            made(path, content)
        raise OSError(number, os.strerror(number))

    for module in (files, folders):
        patch.setattr(module, "write_flushed", full)


def no_room_for(patch: pytest.MonkeyPatch, name: str) -> None:
    """The disk is full when a file of that name is written."""
    made = folders.write_flushed

    def full(path: Path, content: str) -> None:
        if Path(path).name == name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        made(path, content)

    patch.setattr(folders, "write_flushed", full)


def hidden() -> list[Path]:
    """Temporary files left behind."""
    return [path for path in Path().rglob(".*") if path.is_file() and path.name != ".gitignore"]


def check_without_a_cache(at: str = "fsync", number: int = errno.ENOSPC) -> None:
    with pytest.MonkeyPatch.context() as patch:
        no_room(patch, ".hessdiag/", at, number)
        code, out, err = gap("--csv", "gap.csv")
    assert (code, "run1" in out) == (0, True)
    assert err.count("nothing is kept for a next time") == 3
    assert os.strerror(number) in err
    assert {row["checkpoint"] for row in rows()} == {"run0", "run1", "run2"}
    assert (in_cache(), hidden()) == (0, [])


@pytest.mark.parametrize(
    ("at", "number"), [("fsync", errno.ENOSPC), ("open", errno.EROFS), ("open", errno.EACCES)]
)
def test_a_cache_that_cannot_be_written_is_a_note(zoo, at, number):
    check_without_a_cache(at, number)


def test_a_cache_that_cannot_be_looked_into_is_a_note(zoo, monkeypatch):
    def refuse(path: Path) -> bool:
        if path.name == ".gitignore":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return path.is_file() or path.is_dir()

    monkeypatch.setattr(Path, "exists", refuse)
    code, _, err = gap()
    assert (code, err.count("nothing is kept for a next time")) == (0, 3)


def check_full_disk() -> None:
    with pytest.MonkeyPatch.context() as patch:
        no_room_for(patch, "gap.html")
        code, out, err = gap("-o", "out", "--csv", "elsewhere/gap.csv")
    assert code == 4
    assert [line for line in err.splitlines() if "hessdiag:" in line] == [err.splitlines()[-1]]
    assert "cannot write out: " in err
    assert "No space left" in err
    assert "run1" in out  # the table is not lost with the page
    assert list(Path("out").iterdir()) == []  # no table of one run beside a page of another
    assert "run1" in Path("elsewhere/gap.csv").read_text()
    assert hidden() == []
    code, _, err = gap("-o", "out")
    assert (code, err.count("kept from before")) == (0, 3)


def test_a_full_disk_costs_the_file_and_nothing_else(zoo):
    check_full_disk()


def test_an_output_folder_that_cannot_be_written_is_said_before_anything_is_measured(zoo, monkeypatch):
    monkeypatch.setattr(verb, "measure_all", None)
    for number in (errno.ENOSPC, errno.EROFS, errno.EACCES):
        with pytest.MonkeyPatch.context() as patch:
            no_room(patch, "out/", "open", number)
            code, out, err = gap("-o", "out")
        assert (code, out, len(err.splitlines())) == (4, "", 1)
        assert os.strerror(number) in err


def check_interrupted(*more: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Curvature, "multiply", interrupted(Curvature.multiply, after=3, once="run1"))
        code, out, err = gap("--csv", "gap.csv", *more)
    assert (code, out) == (130, "")
    again = "the same command without --fresh" if more else "the same command"
    assert f"1 of 3 are kept: {again} goes on from there" in err
    assert "Traceback" not in err
    assert (Path("gap.csv").exists(), hidden()) == (False, [])
    code, _, err = gap("--csv", "gap.csv")
    assert (code, err.count("kept from before")) == (0, 1)


def interrupted(apply: Callable[..., torch.Tensor], after: int, once: str) -> Callable[..., torch.Tensor]:
    """Ctrl-C in the middle of the checkpoint after the first."""
    seen: list[Curvature] = []

    def product(self: Curvature, rows: torch.Tensor) -> torch.Tensor:
        if in_cache() == 1:  # counted by that alone: an id may be that of an operator gone before
            seen.append(self)
        if len(seen) == after:
            raise KeyboardInterrupt
        return apply(self, rows)

    return product


@pytest.mark.parametrize("more", [(), ("--fresh",)])
def test_ctrl_c_says_how_many_are_kept(zoo, more):
    check_interrupted(*more)


@pytest.fixture
def in_the_foreground():
    """A shell's background jobs ignore Ctrl-C, and so do their children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_the_foreground")
def test_ctrl_c_ends_all_processes_at_once(zoo, monkeypatch, capfd):
    """As a terminal does it: the signal goes to every process of the command."""
    say, pids, begun = surveying.say, [], []

    def then_control_c(lines, *, quiet):
        say(lines, quiet=quiet)
        if lines[0].startswith("1/3"):
            begun.append(time.monotonic())
            pids.extend(process.pid for process in active_children())
            for pid in (*pids, os.getpid()):
                os.kill(pid, signal.SIGINT)

    monkeypatch.setattr(surveying, "say", then_control_c)
    code, _, err = gap("--jobs", "2", factory="slow")
    took = time.monotonic() - begun[0]
    assert (code, len(pids)) == (130, 2), err
    assert "1 of 3 are kept: the same command goes on from there" in err
    assert "Traceback" not in err + capfd.readouterr().err
    assert active_children() == []
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert in_cache() == 1
    assert took < 50  # half of what each of the others takes


def check_not_a_number() -> None:
    save("run2.pt", 2, limit=20.0)  # the only one that is finite where inputs are large
    save("run3.pt", 3, limit=-1.0)  # NaN loss everywhere
    save("run4.pt", 4, limit=math.nan)  # NaN weights
    code, out, err = gap("-P", "test=large", "--csv", "gap.csv", "--html", "gap.html")
    expected = dict.fromkeys(("run0", "run1"), "40 of 80 examples are not finite in loss on 'test'")
    expected |= {"run3": "the loss on the sample set is nan", "run4": "NaN or infinity in 1 of 3 tensors"}
    assert code == 4
    assert "4 of 5 checkpoints could not be measured: run0, run1, run3, run4" in err
    assert "run2" in out
    said, page = failed(), html.unescape(Path("gap.html").read_text())
    assert list(said) == list(expected)
    for name, words in expected.items():
        assert words in said[name]
        assert f"<code>{name}</code>: {flagged(said[name])}" in page
        assert err.count(f"{name}: {flagged(said[name])}") == 1
    assert {row["checkpoint"] for row in rows() if row["kind"] != "failure"} == {"run2"}


def test_a_loss_that_is_no_number_is_one_line_and_the_rest_goes_on(zoo):
    check_not_a_number()


def check_fresh() -> None:
    code, _, err = gap("--fresh")
    assert (code, in_cache()) == (0, 3)
    for file in Path(".hessdiag/cache/gap").rglob("*.json"):
        file.write_text(file.read_text().replace('"exact"', '"draws"'))
    assert "kept from before" not in gap("--fresh")[2]
    _, _, err = gap("--csv", "gap.csv")
    assert err.count("kept from before") == 3
    assert {row["how"] for row in rows() if row["kind"] == "measure"} == {"exact"}


def test_fresh_measures_again_and_keeps_that(zoo):
    check_fresh()


def check_folders() -> None:
    for seed in range(2):
        save(f"f{seed}/deep/w.pt", seed)
        Path(f"f{seed}/deep/w.pt").rename(f"f{seed}/w.pt")
    one = kept.digest("f0")
    assert kept.digest("f0::entry") == one != kept.digest("f1")
    Path("f0/deep/b").write_bytes(b"")
    named = kept.digest("f0")
    Path("f0/deep/b").rename("f0/deep/c")
    moved = kept.digest("f0")
    Path("f0/deep/c").write_bytes(b"x")
    assert len({one, named, moved, kept.digest("f0")}) == 4
    os.symlink("..", "f0/deep/around")  # noqa: PTH211
    os.symlink("nowhere", "f0/deep/broken")  # noqa: PTH211
    os.mkfifo("f0/deep/pipe")
    Path("f0/deep/c").unlink()
    assert kept.digest("f0") == one
    assert gap(factory="own", given="f?")[0] == 0
    code, _, err = gap(factory="own", given="f?")
    assert (code, err.count("kept from before")) == (0, 2)


def test_a_folder_is_hashed_by_what_is_in_it(zoo):
    check_folders()


def test_a_folder_that_cannot_be_read_is_one_line(zoo, monkeypatch):
    Path("f").mkdir()
    Path("f/w.pt").write_bytes(b"x")

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "f/w.pt")

    monkeypatch.setattr(hashing, "of_file", refuse)
    with pytest.raises(UsageError, match=r"^f/w\.pt cannot be read: Permission denied$"):
        kept.digest("f")


def check_start_is_read_once() -> None:
    save("start.pt", 9)
    read, original = [], look.read_weights
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(look, "read_weights", lambda *a, **k: read.append(a) or original(*a, **k))
        assert gap("--init", "start.pt")[0] == 0
        assert len(read) == 1
        save("start.pt", 10)
        code, _, err = gap("--init", "start.pt")
    assert (code, err.count("kept from before"), len(read)) == (0, 0, 2)


def test_weights_before_training_are_read_once(zoo):
    check_start_is_read_once()


def test_what_the_problem_raises_is_one_line_each_and_its_traceback_there_on_request(zoo):
    code, _, err = gap("-P", "test=labels")
    assert (code, "Traceback" in err) == (4, False)
    assert all(f"{name}: unexpected IndexError: Target " in err for name in ("run0", "run2"))
    assert "none of 3 checkpoints could be measured" in err
    assert "cross_entropy" in gap("-P", "test=labels", "--debug")[2]


def test_other_architectures_broken_files_and_missing_splits(zoo):
    save("run3.pt", 3, width=5)
    Path("run4.pt").write_bytes(b"no checkpoint")
    Path("run5.pt").write_bytes(b"")
    code, out, err = gap("--csv", "gap.csv")
    assert (code, sorted(failed())) == (4, ["run3", "run4", "run5"])
    assert "3 of 6 checkpoints could not be measured: run3, run4, run5" in err
    assert "needs 5 more" in out
    code, out, _ = gap("-P", "test=", given="run[0-2].pt")
    assert (code, "no split 'test'; there are train" in out) == (0, True)


def check_odd_names() -> None:
    for seed, name in enumerate(ODD):
        save(f"odd/{name}/last.pt", seed)
    Path("odd/broken\x1b[31m<i>").mkdir()
    Path("odd/broken\x1b[31m<i>/last.pt").write_bytes(b"no checkpoint")
    code, out, err = gap("--csv", "gap.csv", given="odd/*/last.pt")
    assert (code, "\x1b" in out + err) == (4, False)
    assert "1 of 5 checkpoints could not be measured: broken\N{REPLACEMENT CHARACTER}[31m<i>" in err
    written = {name.replace("\udcff", "?") for name in ODD} | {"broken\x1b[31m<i>"}
    assert {row["checkpoint"] for row in rows()} == written
    for name in map(visible, ODD):
        assert all(line in out for line in name.split("\n")), name
    code, _, err = gap("-o", "out", given="odd/*/last.pt")
    assert code == 4, err
    assert Path("out/gap.json").exists(), err
    assert {one["name"] for one in json.loads(Path("out/gap.json").read_text())["records"]} == set(ODD)
    page = Path("out/gap.html").read_text()
    assert checker.faults(page, SECTIONS) == []
    assert ("<script>" in page, "<i>" in page) == (False, False)
    for name in map(visible, ODD):
        assert f'<th scope="row">{name}</th>' in html.unescape(page), name


def visible(name: str) -> str:
    return name.replace("\udcff", "\N{REPLACEMENT CHARACTER}")


def test_odd_names_reach_table_csv_and_page_as_they_are(zoo):
    check_odd_names()


def test_a_constant_gap_and_ties_are_ranked_as_far_as_they_can_be():
    same = GapReport(
        tuple(replace(r, performance=example.record(0, 0.02, {}).performance) for r in example.records(9))
    )
    assert rank_rows(same) == []
    assert {one.reason.split(":")[0] for one in same.ranks.measures} == {"cannot tell"}
    assert any("the gap is the same at all 9" in one.reason for one in same.ranks.measures)
    assert checker.faults(gap_page(same), SECTIONS) == []

    gaps, values = (1, 1, 2, 2, 3, 3, 4, 4, 5, 5), (1, 2, 2, 1, 3, 5, 5, 3, 4, 4)
    made = [
        example.record(i, 0.01 * g, {"x": Reading(v, v, v, "exact")})
        for i, (g, v) in enumerate(zip(gaps, values, strict=True))
    ]
    tied = GapReport(tuple(made), gap="loss")
    overall = tied.ranks.measures[0].overall
    assert overall is not None
    assert overall.tau == pytest.approx(kendalltau(gaps, values).statistic, abs=1e-12)
    assert checker.faults(gap_page(tied), SECTIONS) == []


NAMES = (
    *("epoch2", "epoch10", "lr1e-4", "lr1e-3", "lr0.1", "lr0.25", "lr0.6", "lr0.6/b2", "lr0.6/b10"),
    *("v1.2.3", "v1.10.0", "v2024.01.02", "v2024.1.10"),
)


def check_order() -> None:
    assert tuple(sorted(set(NAMES), key=many.natural)) == NAMES
    odd = ("", ".", "..", "1.", ".5", "1.2.3e-5", "1e", "1e-", "9" * 400, "1e-999999", "\u0663", "a..1")
    assert len(sorted(odd, key=many.natural)) == len(odd)


def test_numbers_in_names_compare_as_numbers():
    check_order()


def network(*after: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(), *after)


def norm_of_paths(model: nn.Module) -> Reading | str:
    x, y = torch.rand(6, 4, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 3
    problem = Problem(model, {"train": (x, y)}, criterion="cross_entropy")
    samples = draw(problem.data["train"], split="train", samples=6, seed=0, batch_size=6)
    return path_norm(Checkpoint(problem, samples, Curvature(problem, samples)))


def check_last_softmax() -> None:
    for link in (nn.LogSoftmax(dim=1), nn.Softmax(dim=1)):
        model = network(nn.Linear(5, 3), link)
        w1, b1, w2, b2 = (parameter.detach().double().numpy() ** 2 for parameter in model.parameters())
        found = norm_of_paths(model)
        assert isinstance(found, Reading), found
        assert found.value == pytest.approx(math.sqrt((w2 @ (w1.sum(1) + b1) + b2).sum()), rel=1e-12)
    for middle in (nn.Softmax(dim=1), nn.LogSoftmax(dim=1)):
        assert "positively homogeneous" in str(norm_of_paths(network(middle, nn.Linear(5, 3))))
    for last in (nn.Sigmoid(), nn.LogSigmoid(), nn.Softmin(dim=1)):
        assert "positively homogeneous" in str(norm_of_paths(network(nn.Linear(5, 3), last)))


def test_a_last_softmax_is_the_losss_and_one_in_the_middle_is_refused():
    check_last_softmax()


def forgets_fresh(patch: pytest.MonkeyPatch) -> None:
    made = verb._survey

    def without(*given: object) -> survey.Survey:
        how = made(*given)
        return replace(how, cache=None) if how.fresh else how

    patch.setattr(verb, "_survey", without)


def raises_at_once(patch: pytest.MonkeyPatch) -> None:
    def write(result: GapReport, targets: dict[str, Path], _: Path) -> None:
        for target in targets.values():
            folders.write_together(target.parent, {target.name: gap_page(result)})

    patch.setattr(verb, "_write", write)


BROKEN: dict[str, tuple[Callable[[], None], Callable[[pytest.MonkeyPatch], None]]] = {
    "a full cache is an error": (check_without_a_cache, lambda m: m.setattr(survey, "keep", files.write_whole)),
    "a failed page takes the table along": (check_full_disk, raises_at_once),
    "records kept at the end only": (check_interrupted, lambda m: m.setattr(survey, "keep", lambda *_: "")),
    "NaN on the test split passes": (check_not_a_number, lambda m: m.setattr(survey, "NOT_FINITE", "never")),
    "--fresh keeps nothing": (check_fresh, forgets_fresh),
    "a folder's names do not count": (check_folders, lambda m: m.setattr(hashing.os, "fsencode", lambda _: b"")),
    "initial weights read for every checkpoint": (
        check_start_is_read_once,
        lambda m: m.setattr(look, "weights_before", uncached),
    ),
    "names that are no text stop the table": (
        check_odd_names,
        lambda m: m.setattr("hessdiag.shown.encodable", lambda cell: cell),
    ),
    "control characters on the terminal": (
        check_odd_names,
        lambda m: m.setattr("hessdiag.shown.plain", lambda text: text),
    ),
    "digits compared as whole numbers": (
        check_order,
        lambda m: m.setattr(
            many, "natural", lambda text: [(d.isdigit(), d.zfill(9)) for d in many.re.split(r"(\d+)", text)]
        ),
    ),
    "a last softmax is refused": (check_last_softmax, lambda m: m.setattr(folding, "LINKS", ())),
    "a softmax anywhere is left out": (check_last_softmax, lambda m: m.setattr(nn.Softmax, "forward", unchanged)),
}


def unchanged(self: nn.Module, given: torch.Tensor) -> torch.Tensor:
    return given


def uncached(path: str, trust_pickle: bool) -> object:
    return look.read_weights(path, trust_pickle=trust_pickle)


uncached.cache_clear = lambda: None


@pytest.mark.parametrize("breakage", BROKEN)
def test_this_promise_would_notice(breakage, zoo, monkeypatch):
    check, break_it = BROKEN[breakage]
    break_it(monkeypatch)
    with pytest.raises(AssertionError):
        check()
