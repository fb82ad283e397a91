"""Promise: no file, broken or hostile, runs code, hangs, fills the memory or raises but hessdiag's own error.

More than 2,000 seeded mutants of five formats and 250 hostile pickles are read in a child process with an alarm
and a limit on its memory. Oracles: what is raised, the clock, the peak of memory, and Python's own audit events.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from hessdiag.errors import LoadError
from hessdiag.sources import names, storages, torch_files
from hessdiag.sources.weights import read_weights
from tests import hostile_pickles

HERE = Path(__file__).parent
EACH = 85  # of every format and mutation: 5 * 5 * 85 = 2,125
WORKER = """
import collections, json, pathlib, resource, signal, sys, time
import torch
torch.set_num_threads(1)
from hessdiag.errors import HessdiagError
from hessdiag.sources.weights import load_into, read_weights
from tests import hostile_pickles
from tests.test_mutants_are_refused import network, state

folder, each = pathlib.Path(sys.argv[1]), int(sys.argv[2])
path, marker = folder / "file.pt", folder / "marker"
watching, events = False, []
EVENTS = ("os.system", "subprocess.Popen", "os.posix_spawn", "os.exec", "os.fork", "os.mkdir", "ctypes.dlopen",
          "pickle.find_class", "exec", "compile")


def watch(event, args):
    if not watching or event not in (*EVENTS, "open", "import"):
        return
    importing = "importlib" in sys._getframe(1).f_code.co_filename  # Python loads its own modules late
    if (event in EVENTS and not importing) or (event == "open" and "w" in str(args[1])):
        events.append(event)
    if event == "import" and args[0] == "antigravity":
        events.append(event)


class Hang(BaseException):
    pass


def hang(*_):
    raise Hang


def read(content):
    global watching
    path.write_bytes(content)
    net = network()  # not watched: torch's CUDA builds open a library to count devices
    signal.alarm(5)
    watching = True
    try:
        load_into(net, read_weights(path))
        return "loaded"
    except HessdiagError as error:
        return "refused" if "\\n" not in str(error) else "two lines"
    except Hang:
        return "hang"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:200]
    finally:
        watching = False
        signal.alarm(0)


signal.signal(signal.SIGALRM, hang)
read(hostile_pickles.good_files(state())["zip"])
read(hostile_pickles.good_files(state())["legacy"])
sys.addaudithook(watch)
used = int(pathlib.Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, used + 2**30))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
faults, counts, loaded = [], collections.Counter(), []
for title, content in hostile_pickles.mutants(state(), each):
    said = read(content)
    counts[said] += 1
    if said == "loaded":
        loaded.append(title)
    elif said != "refused":
        faults.append(f"{title}: {said}")
hostile = 0
for title, pickled in hostile_pickles.hostile(str(marker)):
    for content in (hostile_pickles.in_zip(pickled), hostile_pickles.in_legacy(pickled), pickled):
        said = read(content)
        if said != "refused":
            faults.append(f"{title}: {said}")
    hostile += 1
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"faults": faults, "events": events, "marker": marker.exists(), "mutants": sum(counts.values()),
                  "hostile": hostile, "megabytes": grown / 1024, "loaded": loaded, "cpu": time.process_time()}))
"""


def network() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


def state() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    drawn = {name: torch.randn(t.shape, generator=generator) for name, t in network().state_dict().items()}
    return drawn | {"1.num_batches_tracked": torch.tensor(7)}


def test_mutants_and_hostile_pickles_are_refused(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WORKER, str(tmp_path), str(EACH)],
        capture_output=True,
        text=True,
        cwd=HERE.parent,
        env={**os.environ, "PYTHONPATH": str(HERE.parent)},
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["faults"] == []
    assert found["events"] == []
    assert not found["marker"]
    assert found["mutants"] >= 2000
    assert found["hostile"] >= 200
    assert found["megabytes"] < 1024
    # a zip has checksums: what loads of it differs in bytes that hold nothing
    assert 0 < len(found["loaded"]) < found["mutants"] / 3


@pytest.mark.parametrize("name", hostile_pickles.RUNS)
def test_these_pickles_are_hostile(name: str, tmp_path: Path) -> None:
    # without this the test above would say nothing
    marker = tmp_path / "marker"
    done = pickle.loads(hostile_pickles.around(hostile_pickles.call(name, str(marker))))
    if hasattr(done, "close"):
        done.close()
    assert marker.exists()


def tensors(folder: Path) -> Path:
    torch.save(state(), folder / "file.pt")
    return folder / "file.pt"


def check_refused(path: Path, words: str = "") -> None:
    with pytest.raises(LoadError, match=words):
        read_weights(path)


def rewritten(folder: Path, change: Callable[[str, bytes], bytes]) -> Path:
    """A zip checkpoint whose records are changed, with checksums that are right again."""
    path, held = tensors(folder), io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(held, "w") as new:
        for record in old.infolist():
            new.writestr(record.filename, change(record.filename, old.read(record)))
    path.write_bytes(held.getvalue())
    return path


def check_checksums(folder: Path) -> None:
    path = tensors(folder)
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        records = [archive.read(record) for record in archive.infolist() if "/data/" in record.filename]
    for content in records:
        at = whole.index(content)
        for byte in range(at, at + len(content), 3):
            path.write_bytes(whole[:byte] + bytes([whole[byte] ^ 1]) + whole[byte + 1 :])
            check_refused(path, "checksum")


def check_short_storages(folder: Path) -> None:
    """A storage that its record does not hold: reading it would reach into other memory."""
    check_refused(
        rewritten(folder, lambda name, old: old[:-4] if name.endswith("data/0") else old), "another size"
    )


def check_large_tensors(folder: Path) -> None:
    overlapping = torch.ones(4).as_strided((2, 3), (1, 1))
    torch.save({"a": overlapping}, folder / "file.pt")
    check_refused(folder / "file.pt", "larger than what is stored")


def check_expanded(folder: Path) -> None:
    torch.save({"a": torch.ones(1).expand(1 << 20, 1 << 20)}, folder / "file.pt")  # 4 terabytes if written out
    assert read_weights(folder / "file.pt").state["a"].shape == (1 << 20, 1 << 20)


def check_attributes(folder: Path) -> None:
    where = folder / "file.pt"
    name = str(folder / "marker")
    pickled = hostile_pickles.around(hostile_pickles.call("os.system", name, "build"))
    where.write_bytes(hostile_pickles.in_zip(pickled))
    check_refused(where, "run code: it asks for os.system")


CHECKS: dict[str, Callable[[Path], None]] = {
    "a flipped bit in a record": check_checksums,
    "a storage of another size": check_short_storages,
    "a tensor larger than its storage": check_large_tensors,
    "an expanded tensor is small": check_expanded,
    "a method set as an attribute": check_attributes,
}


@pytest.mark.parametrize("what", CHECKS)
def test_what_a_file_says_of_itself_is_checked(what: str, tmp_path: Path) -> None:
    CHECKS[what](tmp_path)


Patch = pytest.MonkeyPatch


def no_checksums(patch: Patch) -> None:
    real = torch_files._records

    def records(archive: zipfile.ZipFile, size: int) -> object:
        found = real(archive, size)
        for record in found.values():
            record.CRC = None  # type: ignore[assignment]
        return found

    patch.setattr(torch_files, "_records", records)


def unbounded(patch: Patch) -> None:
    def rebuild(storage: storages.Storage, offset: int, size: object, stride: object) -> Tensor:
        return storage.content.view(storage.dtype).as_strided(size, stride, offset)  # type: ignore[arg-type]

    patch.setattr(names, "rebuild", rebuild)


def real_names(patch: Patch) -> None:
    patch.setitem(names.BUILDERS, "os.system", names.Name("os.system", os.system))


BROKEN: dict[str, tuple[Callable[[Patch], None], Callable[[Path], None]]] = {
    "checksums are not compared": (no_checksums, check_checksums),
    "tensors reach beyond their storage": (unbounded, check_large_tensors),
    "a dangerous name is in the table": (real_names, check_attributes),
}


@pytest.mark.parametrize("breakage", BROKEN)
def test_this_promise_would_notice(breakage: str, tmp_path: Path, monkeypatch: Patch) -> None:
    do, check = BROKEN[breakage]
    do(monkeypatch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        check(tmp_path)
