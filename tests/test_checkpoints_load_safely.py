"""Reading a checkpoint never runs what is in it, and a model gets all of its tensors or none.

Oracles: a marker file that hostile pickles would write; the tensors that went into the file, compared bit by bit.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import random
import re
import sys
import zipfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hessdiag.errors import HessdiagError, LoadError, NonFiniteError
from hessdiag.sources import archive, entries, extra, fit, spelling, weights
from hessdiag.sources.weights import load_into, read_weights, split_key
from tests import hostile_pickles
from tests.models import same

SUFFIXES = (".pt", ".pth", ".th", ".ckpt", ".bin", ".pkl", ".safetensors", ".json", "")


def network(classes: int = 3) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, classes))


def state(**extra: Tensor) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    tensors = {name: torch.randn(t.shape, generator=generator) for name, t in network().state_dict().items()}
    tensors["1.num_batches_tracked"] = torch.tensor(7)
    return tensors | extra


def touch(path: str) -> None:
    Path(path).touch()


class Hostile:
    """Writes ``marker`` when unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return touch, (self.marker,)


def write_zip(content: object, path: Path) -> None:
    torch.save(content, path)


def write_legacy(content: object, path: Path) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


def write_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content))


WRITERS = (write_zip, write_legacy, write_pickle)
PLACES: dict[str, Callable[[object], object]] = {
    "alone": lambda bad: bad,
    "beside the tensors": lambda bad: {**state(), "extra": bad},
    "in a nested state dict": lambda bad: {"state_dict": {**state(), "0.weight": bad}},
    "in the optimizer": lambda bad: {"state_dict": state(), "optimizer": [{"lr": bad}]},
}


def refused(path: Path, error: type[HessdiagError] = LoadError) -> str:
    with pytest.raises(error) as caught:
        read_weights(path)
    text = str(caught.value)
    assert "\n" not in text
    assert path.name in text
    return text


def check_hostile(folder: Path, write: Callable[[object, Path], None], place: str, suffix: str) -> None:
    marker, path = folder / "marker", folder / f"weights{suffix}"
    write(PLACES[place](Hostile(marker)), path)
    refused(path)
    assert not marker.exists()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("place", PLACES)
def test_nothing_in_a_file_is_run(
    tmp_path: Path, write: Callable[[object, Path], None], place: str, suffix: str
) -> None:
    check_hostile(tmp_path, write, place, suffix)


@pytest.mark.parametrize("write", WRITERS)
def test_only_trust_runs_it(tmp_path: Path, write: Callable[[object, Path], None]) -> None:
    # also shows that these files are hostile, without which the test above would say nothing
    marker, path = tmp_path / "marker", tmp_path / "weights.pt"
    write({**state(), "extra": Hostile(marker)}, path)
    assert "`trust_pickle=True`" in refused(path)
    read_weights(path, trust_pickle=True)
    assert marker.exists()


def test_a_shard_cannot_be_hostile_or_elsewhere(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    torch.save({"a": Hostile(marker)}, tmp_path / "bad.safetensors")
    index = tmp_path / archive.INDEX
    for shard, word in (("bad.safetensors", "bad"), ("../bad.safetensors", "same folder"), ("none", "no such")):
        index.write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(LoadError, match=word):
            read_weights(tmp_path)
    assert not marker.exists()


def test_a_refusal_names_what_was_asked_for_and_the_ways_out(tmp_path: Path) -> None:
    path = tmp_path / "run.ckpt"
    torch.save({"state_dict": state(), "hyper": argparse.Namespace(rate=Decimal(1))}, path)
    text = refused(path)
    assert "decimal.Decimal" in text
    assert "argparse" not in text
    assert "`trust_pickle=True`" in text
    torch.save(network(), path)
    text = refused(path)
    assert "Linear" in text
    assert "torch.save(model.state_dict(), " in text
    trusted = read_weights(path, trust_pickle=True)
    assert any("whole Sequential" in note for note in trusted.notes)
    assert same(trusted.state, network().state_dict())


@pytest.mark.parametrize("nest", ["", "state_dict", "state_dict::model"])
@pytest.mark.parametrize("write", [write_zip, write_legacy])
def test_the_line_that_saves_the_weights_alone_does(
    tmp_path: Path, write: Callable[[object, Path], None], nest: str, monkeypatch: Patch
) -> None:
    """Tied and transposed tensors are among them, which a file of safetensors does not take."""
    monkeypatch.chdir(tmp_path)
    tensors = state(**{"2.weight": torch.randn(5, 3).T})
    tensors["2.again"] = tensors["2.weight"]
    content: object = tensors
    for key in reversed(nest.split("::") if nest else ()):
        content = {key: content, "config": Decimal(1)}
    if not nest:
        content = {"model": content, "config": Decimal(1)}
    write(content, tmp_path / "run's.ckpt")
    line = refused(tmp_path / "run's.ckpt").rpartition("where it was made, ")[2]
    exec(line, {"torch": torch})
    assert same(read_weights(tmp_path / "weights.pt").state, tensors)


class Unpickles(nn.Module):
    """As the modules of Transformer Engine: its extra state is a pickle, in bytes or in a tensor of them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def get_extra_state(self) -> object:
        return torch.frombuffer(bytearray(pickle.dumps(1)), dtype=torch.uint8)

    def set_extra_state(self, value: object) -> None:
        while isinstance(value, list | dict):
            value = value[0]
        pickle.loads(value if isinstance(value, bytes) else bytes(value.view(torch.uint8).tolist()))


EXTRA: dict[str, Callable[[bytes], object]] = {
    "a tensor": lambda bad: torch.frombuffer(bytearray(bad), dtype=torch.uint8),
    "a signed tensor": lambda bad: torch.frombuffer(bytearray(bad), dtype=torch.int8),
    "bytes": lambda bad: bad,
    "bytes in a list in a dict": lambda bad: {0: [bad]},
}


@pytest.mark.parametrize("where", EXTRA)
def test_extra_state_is_not_run(tmp_path: Path, where: str) -> None:
    check_extra(tmp_path, where)


def check_extra(folder: Path, where: str, suffix: str = ".pt") -> None:
    marker, path, model = folder / "marker", folder / f"a{suffix}", Unpickles()
    value = EXTRA[where](pickle.dumps(Hostile(marker)))
    torch.save({"weight": torch.zeros(2), "_extra_state": value}, path)
    if suffix == ".safetensors":
        save_file({"weight": torch.zeros(2), "_extra_state": value}, path)
    try:
        load_into(model, read_weights(path))
    except LoadError as error:
        text = str(error)
    assert not marker.exists()
    assert re.search("_extra_state holds bytes.*run as code.*`trust_pickle=True`", text)
    load_into(model, read_weights(path, trust_pickle=True))
    assert marker.exists()
    assert not model.weight.any()


def test_extra_state_in_safetensors_is_not_run(tmp_path: Path) -> None:
    check_extra(tmp_path, "a tensor", ".safetensors")


def write_shards(content: dict[str, Tensor], folder: Path) -> None:
    names = list(content)
    files = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(files.values()):
        save_file({n: content[n] for n in names if files[n] == file}, folder / file)
    (folder / archive.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": files}))


def test_every_format_gives_the_same_tensors(tmp_path: Path) -> None:
    for suffix in SUFFIXES:
        for number, write in enumerate((write_zip, write_legacy)):
            path = tmp_path / f"{number}{suffix}"
            write(state(), path)
            assert same(read_weights(path).state, state())
    save_file(state(), tmp_path / "s.safetensors")
    save_file(state(), tmp_path / "s.bin")
    write_shards(state(), tmp_path)
    for path in (tmp_path / "s.safetensors", tmp_path / "s.bin", tmp_path, tmp_path / archive.INDEX):
        assert same(read_weights(path).state, state())
    found = read_weights(tmp_path / "s.safetensors")
    assert found.sha256 == hashlib.sha256((tmp_path / "s.safetensors").read_bytes()).hexdigest()
    assert (found.key, found.stripped, found.notes) == ("", (), ())


def test_an_index_hash_covers_its_shards(tmp_path: Path) -> None:
    write_shards(state(), tmp_path)
    before = read_weights(tmp_path).sha256
    write_shards({name: tensor + 1 for name, tensor in state().items()}, tmp_path)
    assert read_weights(tmp_path).sha256 != before


def check_entries(folder: Path) -> None:
    path = folder / "nested.pt"
    average = {name: tensor * 2 for name, tensor in state().items()}
    torch.save(
        {"epoch": 3, "state_dict_ema": average, "model_ema": average, "model": state(), "optimizer": {}}, path
    )
    plain = read_weights(path)
    assert plain.key == "model"
    assert same(plain.state, state())
    assert any("state_dict_ema, model_ema" in note and f"{path}::state_dict_ema" in note for note in plain.notes)
    for chosen in (read_weights(f"{path}::model_ema"), read_weights(path, key="model_ema")):
        assert chosen.key == "model_ema"
        assert same(chosen.state, average)
    with pytest.raises(LoadError, match=r"no entry 'ema'.*model_ema"):
        read_weights(f"{path}::ema")
    torch.save({"state_dict_ema": average}, path)
    with pytest.raises(LoadError, match="::state_dict_ema"):
        read_weights(path)


def test_averages_are_taken_only_when_named(tmp_path: Path) -> None:
    check_entries(tmp_path)


@pytest.mark.parametrize("entry", entries.ENTRIES)
def test_common_entries_are_found(tmp_path: Path, entry: str) -> None:
    torch.save({entry: {"state_dict": state()}, "step": 1}, tmp_path / "a.pt")
    found = read_weights(tmp_path / "a.pt")
    assert found.key == f"{entry}::state_dict"
    assert same(found.state, state())


def test_a_file_that_holds_itself_ends(tmp_path: Path) -> None:
    loop: dict[str, object] = {}
    loop["model"] = loop
    torch.save(loop, tmp_path / "loop.pt")
    assert "no tensors" in refused(tmp_path / "loop.pt")


@pytest.mark.parametrize(
    "prefixes", [("module.",), ("_orig_mod.",), ("module.", "_orig_mod."), ("_orig_mod.", "module.")]
)
def test_wrappers_prefixes_go_and_are_told(tmp_path: Path, prefixes: tuple[str, ...]) -> None:
    torch.save({"".join(prefixes) + name: tensor for name, tensor in state().items()}, tmp_path / "a.pt")
    found = read_weights(tmp_path / "a.pt")
    assert found.stripped == prefixes
    assert same(found.state, state())
    assert all(any(repr(p) in note for note in found.notes) for p in prefixes)
    model = nn.ModuleDict({"module": network()})  # its own names begin that way: they are put back
    if prefixes == ("module.",):
        assert "put back" in load_into(model, found)[0]
        assert same(dict(model["module"].state_dict()), state())


def test_a_prefix_some_names_lack_stays(tmp_path: Path) -> None:
    torch.save({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "a.pt")
    assert set(read_weights(tmp_path / "a.pt").state) == {"module.a", "b"}


@pytest.mark.parametrize("prefix", ["model.", "model._orig_mod."])
def test_lightning_names_fit_only_where_the_model_has_none_such(tmp_path: Path, prefix: str) -> None:
    torch.save({"state_dict": {prefix + n: t for n, t in state().items()}}, tmp_path / "a.ckpt")
    found = read_weights(tmp_path / "a.ckpt")
    bare, holder = network(), nn.ModuleDict({"model": network()})
    assert "Lightning" in load_into(bare, found)[0]
    assert same(dict(bare.state_dict()), state())
    if prefix == "model.":
        assert load_into(holder, found) == ()
        assert same(dict(holder["model"].state_dict()), state())


DAMAGED: dict[str, Callable[[Path], object]] = {
    "empty": lambda p: p.write_bytes(b""),
    "half a zip": lambda p: (write_zip(state(), p), p.write_bytes(p.read_bytes()[: p.stat().st_size // 2])),
    "zip without its end": lambda p: (write_zip(state(), p), p.write_bytes(p.read_bytes()[:-30])),
    "half a legacy file": lambda p: (
        write_legacy(state(), p),
        p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    ),
    "legacy without its end": lambda p: (write_legacy(state(), p), p.write_bytes(p.read_bytes()[:-5])),
    "half a safetensors file": lambda p: (
        save_file(state(), p),
        p.write_bytes(p.read_bytes()[: p.stat().st_size // 2]),
    ),
    "a png": lambda p: p.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(64)),
    "text": lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"),
    "html": lambda p: p.write_text("<!DOCTYPE html><html></html>"),
    "another zip": lambda p: zipfile.ZipFile(p, "w").writestr("a/readme.txt", "hello"),
    "a script": lambda p: torch.jit.save(torch.jit.trace(network().eval(), torch.zeros(1, 4)), p),
    "no tensors": lambda p: torch.save({"epoch": 3}, p),
    "a lone tensor": lambda p: torch.save(torch.ones(3), p),
    "a sparse tensor": lambda p: torch.save({"a": torch.eye(3).to_sparse()}, p),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("what", DAMAGED)
def test_what_is_no_checkpoint_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    DAMAGED[what](tmp_path / "file.pt")
    text = refused(tmp_path / "file.pt")
    assert "run code" not in text  # a damaged file is not called hostile


def save_safetensors(content: dict[str, Tensor], path: Path) -> None:
    save_file(content, path)


@pytest.mark.parametrize("write", [write_zip, write_legacy, save_safetensors])
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, write: Callable[[object, Path], None]) -> None:
    path = tmp_path / "file.pt"
    write(state(), path)
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 40):
        path.write_bytes(whole[:length])
        text = refused(path)
        assert "run code" not in text or length < len(archive.LEGACY_MAGIC), length


def test_missing_files_and_folders_are_refused(tmp_path: Path) -> None:
    assert "no such" in refused(tmp_path / "none.pt")
    assert "folder" in refused(tmp_path)


def check_non_finite(folder: Path) -> None:
    bad = state()
    bad["0.weight"][1, 2] = float("nan")
    bad["2.bias"][:2] = float("inf")
    torch.save(bad, folder / "nan.pt")
    text = refused(folder / "nan.pt", NonFiniteError)
    assert "2 of 9 tensors" in text
    assert "0.weight (1)" in text
    assert "2.bias (2)" in text


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    check_non_finite(tmp_path)


def given(tensors: dict[str, Tensor]) -> weights.Weights:
    return weights.Weights(tensors, "file.pt", "")


def without(*names: str) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state().items() if name not in names}


MISFITS: dict[str, tuple[dict[str, Tensor], str]] = {
    "a missing tensor": (without("2.bias"), "8 of 9.*missing: 2.bias"),
    "an unexpected one": (state(extra=torch.ones(1)), "unexpected: extra"),
    "another number of classes": (
        {**state(), "2.weight": torch.ones(7, 5), "2.bias": torch.ones(7)},
        r"number of classes.*7 in place of 3.*2.weight \(7, 5\) in the checkpoint, \(3, 5\) in the model",
    ),
    "another architecture": ({f"z{i}": torch.ones(1) for i in range(40)}, "0 of 9.*another architecture"),
    "inside something larger": (
        {f"net.{name}": tensor for name, tensor in state(extra=torch.ones(1)).items()},
        "begin with 'net.'.*more or other.*unexpected",
    ),
    "integers for weights": ({**state(), "2.bias": torch.ones(3, dtype=torch.int8)}, "2.bias is int8"),
    "floats for a counter": ({**state(), "1.num_batches_tracked": torch.tensor(1.0)}, "is float32"),
    "complex weights": ({**state(), "2.bias": torch.ones(3, dtype=torch.complex64)}, "complex64"),
}


def check_misfit(what: str) -> None:
    tensors, words = MISFITS[what]
    model = network()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(LoadError, match=words) as caught:
        load_into(model, given(tensors))
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("z") <= fit.SHOWN
    assert same(dict(model.state_dict()), before)


@pytest.mark.parametrize("what", MISFITS)
def test_a_model_is_loaded_whole_or_not_at_all(what: str) -> None:
    check_misfit(what)


def test_the_model_keeps_its_dtype_and_casts_are_told() -> None:
    model = network()
    halves = {n: t.half() if t.is_floating_point() else t for n, t in state().items()}
    (note,) = load_into(model, given(halves))
    assert "cast 8 tensors" in note
    assert "float16 to float32" in note
    assert same(
        dict(model.state_dict()), {n: t.float() if t.is_floating_point() else t for n, t in halves.items()}
    )
    with pytest.raises(NonFiniteError, match=r"overflows.*float16"):
        load_into(network().half(), given({**state(), "2.bias": torch.full((3,), 1e6)}))


def test_counters_and_tied_names_may_be_missing() -> None:
    model = network()
    (note,) = load_into(model, given(without("1.num_batches_tracked")))
    assert "num_batches_tracked" in note
    tied = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4, bias=False)})
    tied["head"].weight = tied["embed"].weight
    (note,) = load_into(tied, given({"embed.weight": torch.arange(12.0).reshape(4, 3)}))
    assert "head.weight" in note
    assert torch.equal(tied["head"].weight, torch.arange(12.0).reshape(4, 3))


def test_a_model_without_memory_is_refused() -> None:
    with pytest.raises(LoadError, match="meta"):
        load_into(network().to("meta"), given(state()))


def test_a_key_is_split_off_unless_the_file_is_called_so(tmp_path: Path) -> None:
    assert split_key("a/b.pt::model_ema") == ("a/b.pt", "model_ema")
    assert split_key("a/b.pt") == ("a/b.pt", "")
    odd = tmp_path / "a::b.pt"
    odd.write_bytes(b"x")
    assert split_key(str(odd)) == (str(odd), "")


DATA: dict[str, Callable[[], object]] = {
    "numpy scalars": lambda: [np.float64(0.93), np.int64(3), np.bool_(True), np.str_("a")],
    "numpy arrays": lambda: [np.arange(5.0), np.array(["a", None], dtype=object)],
    "random states": lambda: [np.random.get_state(), random.getstate(), torch.get_rng_state()],
    "arguments": lambda: argparse.Namespace(lr=0.1, out=Path("a/b"), device=torch.device("cpu"), kind=torch.half),
    "times": lambda: [datetime(2026, 1, 2), datetime(2026, 1, 2).date(), timedelta(1)],
    "containers": lambda: [
        defaultdict(list, {"a": [1]}),
        Counter("ab"),
        deque([1]),
        {1},
        frozenset([1]),
        1j,
        bytearray(b"a"),
        range(3),
    ],
    "a mapping that holds itself": lambda: (held := {}, held.update(a=held, b=[held]))[0],
}


@pytest.mark.parametrize("write", [write_zip, write_legacy])
@pytest.mark.parametrize("what", DATA)
def test_data_beside_the_weights_is_data(tmp_path: Path, what: str, write: Callable[[object, Path], None]) -> None:
    write({"model": state(), "beside": DATA[what]()}, tmp_path / "a.pt")
    assert same(read_weights(tmp_path / "a.pt").state, state())


def test_numpy_scalars_and_arguments_are_facts(tmp_path: Path) -> None:
    args = argparse.Namespace(lr=0.1, out=Path("a/b"))
    torch.save({"model": state(), "best": np.float64(0.93), "step": np.int64(3), "args": args}, tmp_path / "a.pt")
    assert read_weights(tmp_path / "a.pt").facts == {"best": 0.93, "step": 3, "lr": 0.1, "out": "a/b"}


UNNAMED: dict[str, Callable[[], object]] = {
    "integers": lambda: {0: torch.ones(3)},
    "integers in an entry": lambda: {"model": {0: torch.ones(3), 1: torch.ones(1)}},
    "nothing": dict,
    "deep lists": list,
}


@pytest.mark.parametrize("what", UNNAMED)
def test_tensors_without_names_are_refused(tmp_path: Path, what: str) -> None:
    path = tmp_path / "a.pt"
    if what == "deep lists":
        path.write_bytes(hostile_pickles.in_zip(b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b"."))
    else:
        torch.save(UNNAMED[what](), path)
    assert "no tensors" in refused(path)


def prefixed(prefix: str, **extra: Tensor) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in state().items()} | extra


PREFIXED: dict[str, tuple[dict[str, Tensor], str]] = {
    "an average": (prefixed("module.", n_averaged=torch.tensor(3)), "'module.'; left out n_averaged"),
    "a prefix of its own": (prefixed("backbone."), "begin with 'backbone.'"),
    "a criterion beside it": (prefixed("model.", **{"loss.weight": torch.ones(3)}), "left out loss.weight"),
    "a misfit beside it": (prefixed("a.") | {"b.0.weight": torch.ones(1)}, "'a.'; left out b.0.weight"),
    "wrappers within names": ({n.replace(".", "._orig_mod."): t for n, t in state().items()}, "_orig_mod"),
    "a profiler's counters": (state(total_ops=torch.zeros(1)), "left out.*total_ops"),
}


def check_prefixed(folder: Path, what: str) -> None:
    tensors, words = PREFIXED[what]
    torch.save(tensors, folder / "a.pt")
    model = network()
    notes = load_into(model, read_weights(folder / "a.pt"))
    assert re.search(words, " ".join(notes)), notes
    assert same(dict(model.state_dict()), state())


@pytest.mark.parametrize("what", PREFIXED)
def test_the_one_prefix_that_holds_every_name_is_taken_and_told(tmp_path: Path, what: str) -> None:
    check_prefixed(tmp_path, what)


def test_of_several_prefixes_one_must_be_named(tmp_path: Path) -> None:
    path, model = tmp_path / "a.pt", network()
    twice = {name: tensor * 2 for name, tensor in prefixed("ema.").items()}
    torch.save({"state_dict": prefixed("online.") | twice}, path)
    with pytest.raises(
        LoadError, match=re.escape(f"online., ema. fit: choose with -c {path}::state_dict::online.")
    ):
        load_into(model, read_weights(path))
    for spec, factor in (("::online.", 1), ("::state_dict::ema.", 2), ("::ema", 2)):
        found = read_weights(f"{path}{spec}")
        assert "left out" in " ".join(found.notes)
        load_into(model, found)
        assert torch.equal(model[0].weight, state()["0.weight"] * factor)
    with pytest.raises(LoadError, match=r"no entry 'none'.*begin with ema., online."):
        read_weights(f"{path}::none")


class Buffered(nn.Module):
    def __init__(self, length: int) -> None:
        super().__init__()
        self.net = network()
        self.register_buffer("positions", torch.arange(length), persistent=False)


def test_a_buffer_that_the_model_makes_is_left_out_if_it_is_the_same(tmp_path: Path) -> None:
    older = given(prefixed("net.", positions=torch.arange(4)))
    assert "positions" in load_into(Buffered(4), older)[0]
    with pytest.raises(LoadError, match="makes positions by itself"):
        load_into(Buffered(5), older)


class Adapted(nn.Module):
    """Named as PEFT names a model with a LoRA."""

    def __init__(self) -> None:
        super().__init__()
        self.peft_config = {"default": object()}
        self.base_layer = nn.Linear(3, 3)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(3, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, 3, bias=False)})


def test_an_adapter_goes_onto_an_adapter_alone() -> None:
    tensors = {"lora_A.weight": torch.ones(2, 3), "lora_B.weight": torch.ones(3, 2)}
    model = Adapted()
    base = model.base_layer.weight.clone()
    assert "the other 2 stay" in load_into(model, given(tensors))[0]
    assert torch.equal(model.lora_B["default"].weight, torch.ones(3, 2))
    assert torch.equal(model.base_layer.weight, base)
    for misfit in ({"lora_A.weight": torch.ones(2, 3)}, tensors | {"lora_A.weight": torch.ones(1, 3)}):
        with pytest.raises(LoadError):
            load_into(model, given(misfit))
    with pytest.raises(LoadError, match="an adapter of PEFT"):
        load_into(network(), given(tensors))


def test_shards_and_folders_of_torch_load_too(tmp_path: Path) -> None:
    names = list(state())
    for number, part in enumerate((names[:4], names[4:])):
        torch.save({name: state()[name] for name in part}, tmp_path / f"{number}.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {name: f"{names.index(name) // 4 and 1}.bin" for name in names}}))
    assert same(read_weights(index).state, state())
    assert same(read_weights(tmp_path).state, state())
    for text in (json.dumps({"weight_map": {"a": index.name}}), "[" * 100_000, '{"weight_map": {"a": "\u0000"}}'):
        index.write_text(text)
        assert "index" in refused(index)
    index.unlink()
    with pytest.raises(LoadError, match=r"it holds 0.bin, 1.bin"):
        read_weights(tmp_path)


def test_trust_finds_the_classes_of_a_script(tmp_path: Path) -> None:
    module = ModuleType("factory")
    module.Net = type("Net", (), {"__module__": "__main__"})
    main = sys.modules["__main__"]
    main.Net = module.Net
    for write in WRITERS:
        write({"model": state(), "extra": module.Net()}, tmp_path / f"{write.__name__}.pt")
    del main.Net
    for write in WRITERS:
        path = tmp_path / f"{write.__name__}.pt"
        with pytest.raises(LoadError, match="factory's file"):
            read_weights(path, trust_pickle=True)
        assert same(read_weights(path, trust_pickle=True, main=module).state, state())


Patch = pytest.MonkeyPatch


def unrestricted(patch: Patch) -> None:
    patch.setattr(archive, "unpickle_safely", lambda path, kind: archive.unpickle_trusted(path, kind))


def copy_first(patch: Patch) -> None:
    def eager(model: nn.Module, tensors: dict[str, Tensor], *rest: object) -> fit.Fit:
        model.load_state_dict({n: t for n, t in tensors.items() if n == "0.weight"}, strict=False)
        return real(model, tensors, *rest)  # type: ignore[arg-type]

    real = fit.fit
    patch.setattr(weights, "fit", eager)


BROKEN: dict[str, tuple[Callable[[Patch], None], Callable[[Path], None]]] = {
    "a prefix is not looked for": (
        lambda patch: patch.setattr(spelling.Speller, "_under_prefix", lambda *_: None),
        lambda d: check_prefixed(d, "an average"),
    ),
    "pickles are run (zip)": (unrestricted, lambda d: check_hostile(d, write_zip, "in the optimizer", ".pt")),
    "pickles are run (legacy)": (unrestricted, lambda d: check_hostile(d, write_legacy, "alone", ".pt")),
    "averages are preferred": (
        lambda patch: patch.setattr(entries, "ENTRIES", ("state_dict_ema", *entries.ENTRIES)),
        check_entries,
    ),
    "NaN passes": (lambda patch: patch.setattr(weights, "_refuse_non_finite", lambda *_: None), check_non_finite),
    "missing tensors pass": (
        lambda patch: patch.setattr(fit, "_missing", lambda *_: []),
        lambda d: check_misfit("a missing tensor"),
    ),
    "integers pass": (
        lambda patch: patch.setattr(fit, "_cast", lambda name, tensor, wanted, file: tensor.to(wanted.dtype)),
        lambda d: check_misfit("integers for weights"),
    ),
    "copied before it is checked": (copy_first, lambda d: check_misfit("a missing tensor")),
    "extra state is handed over unseen": (
        lambda patch: patch.setattr(extra, "require_plain", lambda *_: None),
        lambda d: check_extra(d, "bytes"),
    ),
    "signed bytes are numbers": (
        lambda patch: patch.setattr(extra, "BYTES", (torch.uint8,)),
        lambda d: check_extra(d, "a signed tensor"),
    ),
    "all names are shown": (
        lambda patch: patch.setattr(fit, "SHOWN", 10**6) or patch.setattr(fit, "_cause", lambda *_: ""),
        lambda d: check_misfit("another architecture"),
    ),
}


@pytest.mark.parametrize("breakage", BROKEN)
def test_this_promise_would_notice(breakage: str, tmp_path: Path, monkeypatch: Patch) -> None:
    do, check = BROKEN[breakage]
    do(monkeypatch)
    with pytest.raises((AssertionError, LoadError, pytest.fail.Exception)):
        check(tmp_path)
