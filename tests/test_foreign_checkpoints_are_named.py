"""Promise: what other tools and other times wrote is loaded rightly, or the refusal names it and a way out. (5 s)

Oracles: the model that was saved, called on the same input; torch's own conversions.
"""

from __future__ import annotations

import gzip
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from hessdiag.errors import LoadError
from hessdiag.sources import archive, entries, extra, fit, renamed, spelling, weights
from hessdiag.sources.many import checkpoints
from hessdiag.sources.weights import load_into, read_weights, split_key
from tests.command import call

INPUT = torch.linspace(-1, 1, 12).reshape(3, 4)


class Old(nn.Module):
    """A layer norm under BERT's name, and a head tied to the embedding."""

    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4, bias=False)
        self.LayerNorm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 4, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        for parameter in self.parameters():
            nn.init.normal_(parameter)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.LayerNorm(self.embed(inputs)))


class Renamed(nn.Linear):
    """Reads the names of its past, as torch's own modules do."""

    def __init__(self) -> None:
        super().__init__(4, 2)
        self._register_load_state_dict_pre_hook(self._from_past)

    def _from_past(self, state: dict[str, Tensor], prefix: str, *_: object) -> None:
        self.touched = True
        if f"{prefix}kernel" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}kernel")


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(()))

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs * self.scale


class Keeping(Scaled):
    """Keeps a number, or whatever it is given, beside its tensors."""

    def __init__(self, value: object = 1.0) -> None:
        super().__init__()
        self.kept = value

    def get_extra_state(self) -> object:
        return self.kept

    def set_extra_state(self, value: object) -> None:
        if isinstance(value, dict) and "broken" in value:
            raise KeyError(value["broken"])
        self.kept = value

    def forward(self, inputs: Tensor) -> Tensor:
        return super().forward(inputs) * (1.0 if self.kept is None else float(self.kept["by"]))


def keeping(value: object = None) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), Keeping({"by": 1.0} if value is None else value))


def kept_twice() -> nn.Module:
    return keeping({"by": 2.0, "names": ["a", None], "history": torch.ones(3)})


def normed(new: bool) -> nn.Module:
    norm = nn.utils.parametrizations.weight_norm if new else nn.utils.weight_norm  # type: ignore[attr-defined]
    return nn.Sequential(norm(nn.Linear(4, 3)), nn.Linear(3, 2))


def past(model: nn.Module, **names: str) -> dict[str, Tensor]:
    found = {}
    for name, tensor in model.state_dict().items():
        for new, old in names.items():
            name = name.replace(new.replace("_", "."), old)
        found[name] = tensor.clone()
    return found


GAMMA = {"LayerNorm_weight": "LayerNorm.gamma", "LayerNorm_bias": "LayerNorm.beta"}


def without(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state.items() if key != name}


Case = tuple[Callable[[], nn.Module], Callable[[], nn.Module], Callable[[nn.Module], object]]
TIMES: dict[str, Case] = {
    "gamma and beta": (Old, Old, lambda m: past(m, **GAMMA)),
    "gamma and beta under a prefix, tied": (
        Old,
        Old,
        lambda m: {f"bert.{n}": t for n, t in without(past(m, **GAMMA), "head.weight").items()},
    ),
    "the old weight norm": (lambda: normed(False), lambda: normed(True), lambda m: m.state_dict()),
    "the new weight norm": (lambda: normed(True), lambda: normed(False), lambda m: m.state_dict()),
    "what a hook of the model reads": (Renamed, Renamed, lambda m: past(m, weight="kernel")),
    "a number in a list": (Scaled, Scaled, lambda m: {"scale": m.scale.detach().reshape(1)}),
    "extra state": (kept_twice, keeping, lambda m: m.state_dict()),
    "extra state in a wrapper": (
        kept_twice,
        keeping,
        lambda m: {"state_dict": {f"module.{n}": t for n, t in m.state_dict().items()}},
    ),
    "extra state under a prefix": (
        kept_twice,
        keeping,
        lambda m: {f"net.{n}": t for n, t in m.state_dict().items()} | {"loss.weight": torch.ones(3)},
    ),
    "in a list": (Old, Old, lambda m: [m.state_dict(), {"lr": 0.1}]),
    "under a number": (Old, Old, lambda m: {"models": {0: m.state_dict()}}),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize("what", TIMES)
def test_names_of_other_times_load(tmp_path: Path, what: str) -> None:
    check_times(tmp_path, what)


def check_times(folder: Path, what: str) -> None:
    saved, built, content = TIMES[what]
    torch.manual_seed(0)
    source, model = saved(), built()
    torch.save(content(source), folder / "a.pt")
    key = "::models::0" if what == "under a number" else ""
    load_into(model, read_weights(f"{folder / 'a.pt'}{key}"))
    assert torch.allclose(model(INPUT), source(INPUT), rtol=1e-6, atol=1e-7)


def test_hooks_do_not_touch_a_model_that_is_refused(tmp_path: Path) -> None:
    model = Renamed()
    torch.save({"kernel": torch.ones(9, 9), "bias": torch.ones(2)}, tmp_path / "a.pt")
    with pytest.raises(LoadError):
        load_into(model, read_weights(tmp_path / "a.pt"))
    assert not hasattr(model, "touched")


class Nothing(Keeping):
    """Has nothing to keep today."""

    def __init__(self) -> None:
        super().__init__(None)


@pytest.mark.parametrize("nothing", [None, {}, torch.empty(0), torch.empty(0, dtype=torch.uint8), b""], ids=str)
def test_no_extra_state_fits_any_model(tmp_path: Path, nothing: object) -> None:
    """A file may have it where the model has none, and the other way round."""
    for saved, built in ((Keeping(nothing), Scaled()), (Scaled(), Keeping(nothing)), (Scaled(), Nothing())):
        torch.save(saved.state_dict(), tmp_path / "a.pt")
        load_into(built, read_weights(tmp_path / "a.pt"))
        assert torch.equal(built.scale, saved.scale)


MISFITS: dict[str, tuple[Callable[[], nn.Module], object, str]] = {
    "missing": (keeping, None, r"get_extra_state.*torch.save.*def problem\(checkpoint\).*missing: 1._extra_state"),
    "unexpected": (lambda: nn.Sequential(nn.Linear(4, 3), Scaled()), {"by": 2.0}, "unexpected: 1._extra_state"),
    "not taken": (keeping, {"broken": 1}, "does not take its extra state.*KeyError.*class that saved it"),
    "an object": (keeping, np.ones(2), "an object.*trust_pickle=True"),
}


@pytest.mark.parametrize("what", MISFITS)
def test_extra_state_that_does_not_fit_is_refused(tmp_path: Path, what: str) -> None:
    check_misfit(tmp_path, what)


def check_misfit(folder: Path, what: str) -> None:
    """And the model is as it was."""
    built, value, text = MISFITS[what]
    model, source = built(), keeping(value)
    before = model.state_dict()
    torch.save(
        {n: t for n, t in source.state_dict().items() if what != "missing" or not n.endswith("_extra_state")},
        folder / "a.pt",
    )
    before = {name: t.clone() if isinstance(t, Tensor) else t for name, t in before.items()}
    with pytest.raises(LoadError, match=text):
        load_into(model, read_weights(folder / "a.pt"))
    for name, now in model.state_dict().items():
        assert torch.equal(now, before[name]) if isinstance(now, Tensor) else now == before[name]


def test_two_values_for_one_tensor_are_refused(tmp_path: Path) -> None:
    check_untied(tmp_path)


def check_untied(folder: Path) -> None:
    """The last of them would stay, and another function than that of the file be measured."""
    torch.save(Old(tied=False).state_dict(), folder / "a.pt")
    model = Old()
    before = model.embed.weight.clone()
    with pytest.raises(LoadError, match=r"embed\.weight and head\.weight are one tensor in the model"):
        load_into(model, read_weights(folder / "a.pt"))
    assert torch.equal(model.embed.weight, before)
    torch.save(Old().state_dict(), folder / "b.pt")
    load_into(model, read_weights(folder / "b.pt"))


def test_arrays_of_numpy_load_where_the_file_is_trusted(tmp_path: Path) -> None:
    source, model = Old(), Old()
    arrays = {"model": {name: tensor.numpy() for name, tensor in source.state_dict().items()}, "author": "x"}
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(arrays))
    with pytest.raises(LoadError, match="trust_pickle=True"):
        read_weights(tmp_path / "a.pkl")
    load_into(model, read_weights(tmp_path / "a.pkl", trust_pickle=True))
    assert torch.equal(model(INPUT), source(INPUT))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_old_files_of_every_protocol_are_known(tmp_path: Path, protocol: int) -> None:
    source, path = Old().state_dict(), tmp_path / "a.pt"
    torch.save(source, path, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    assert set(read_weights(path).state) == set(source)


def archive_of(path: Path, **files: bytes) -> None:
    with zipfile.ZipFile(path, "w") as made:
        for name, content in files.items():
            made.writestr(name, content)


def of_numpy(path: Path) -> None:
    with path.open("wb") as stream:
        np.savez(stream, a=np.ones(3))


FORMATS: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "gzip": ("a.pt.gz", lambda p: p.write_bytes(gzip.compress(b"x" * 99)), "compressed: unpack"),
    "zstd": ("a.pt", lambda p: p.write_bytes(b"\x28\xb5\x2f\xfd" + b"x" * 99), "compressed: unpack"),
    "a checkpoint in a zip": ("a.zip", lambda p: archive_of(p, best=b"x"), "unpack one in it (best)"),
    "an empty zip": ("a.zip", archive_of, "a"),
    "npz": ("a.npz", of_numpy, "numpy.load"),
    "Keras": ("a.h5", lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + b"x" * 99), "HDF5"),
    "llama.cpp": ("a.gguf", lambda p: p.write_bytes(b"GGUF" + b"x" * 99), "GGUF"),
    "a web page": ("a.pt", lambda p: p.write_bytes(b"<!DOCTYPE html><html>"), "web page"),
    "a web page as safetensors": ("a.safetensors", lambda p: p.write_bytes(b"<!DOCTYPE html><html>"), "web page"),
    "a pointer of LFS": (
        "a.safetensors",
        lambda p: p.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12\n"),
        "git lfs pull",
    ),
    "a pipe": ("a.pt", lambda p: os.mkfifo(p), "no regular file"),
}


@pytest.mark.parametrize("what", FORMATS)
def test_other_formats_are_named(tmp_path: Path, what: str) -> None:
    check_format(tmp_path, what)


def check_format(folder: Path, what: str) -> None:
    name, write, words = FORMATS[what]
    write(folder / name)
    with pytest.raises(LoadError) as caught:
        read_weights(folder / name)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_folders_of_shards_load_or_say_what_joins_them(tmp_path: Path) -> None:
    names = list(Old(tied=False).state_dict())
    whole = Old(tied=False).state_dict()
    diffusers = tmp_path / "diffusers"
    diffusers.mkdir()
    for number, part in enumerate((names[:2], names[2:])):
        save_file({name: whole[name] for name in part}, diffusers / f"{number}.safetensors")
    mapping = {name: f"{int(names.index(name) > 1)}.safetensors" for name in names}
    index = diffusers / "diffusion_pytorch_model.safetensors.index.json"
    for mark in (b"", b"\xef\xbb\xbf"):
        index.write_bytes(mark + json.dumps({"weight_map": mapping}).encode())
        state = read_weights(diffusers).state
        assert all(torch.equal(state[name], whole[name]) for name in names)
    for files, words in (
        ((".metadata", "__0_0.distcp"), "dcp_to_torch"),
        (("latest", "zero_to_fp32.py"), "zero_to_fp32.py"),
        (("zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"), "zero_to_fp32.py"),
    ):
        folder = tmp_path / files[1]
        folder.mkdir()
        for name in files:
            (folder / name).write_bytes(b"x")
        with pytest.raises(LoadError, match=words):
            read_weights(folder)


@pytest.mark.parametrize(
    ("key", "words"),
    {
        "epoch": "its entry 'epoch' is no state dict: those with tensors are model",
        "optimizer": "its entry 'optimizer' is no state dict",
        "outer": "-c {file}::outer::policy",
        "model::embed.weight": "is no state dict",
        "nothing": "no entry 'nothing': those with tensors are model",
        "model::nothing": "no entry 'nothing'",
    }.items(),
)
def test_a_wrong_entry_is_answered_with_the_right_ones(tmp_path: Path, key: str, words: str) -> None:
    state, file = Old().state_dict(), tmp_path / "a.pt"
    torch.save({"model": state, "epoch": 3, "optimizer": {"state": {}}, "outer": {"policy": state}}, file)
    with pytest.raises(LoadError) as caught:
        read_weights(f"{file}::{key}")
    assert words.format(file=file) in str(caught.value)


def test_odd_paths_are_files_or_none(tmp_path: Path) -> None:
    odd = tmp_path / "a::b.pt"
    torch.save({"ema": Old().state_dict()}, odd)
    assert split_key(f"{odd}::ema") == (str(odd), "ema")
    assert read_weights(f"{odd}::ema").key == "ema"
    assert len(checkpoints([f"{odd}::ema"])) == 1
    for path in (f"/tmp/{'a' * 300}.pt", f"/tmp/{'b/' * 3000}a.pt"):
        with pytest.raises(LoadError):
            read_weights(path)
        for verb in ("analyze", "gap", "doctor"):
            code, _, err = call(verb, "hessdiag.sources.digits:problem", "-c", path)
            assert code == 4
            assert "no such checkpoint" in err
            assert "the system refused" not in err


Patch = pytest.MonkeyPatch
BROKEN: dict[str, tuple[Callable[[Patch], object], Callable[[Path], None]]] = {
    "names of other times are unknown": (
        lambda patch: patch.setattr(spelling, "renamed", lambda *_: iter(())),
        lambda d: check_times(d, "gamma and beta"),
    ),
    "hooks are not asked": (
        lambda patch: patch.setattr(renamed, "_of_hooks", lambda _, state: {name: name for name in state}),
        lambda d: check_times(d, "what a hook of the model reads"),
    ),
    "the last of two values stays": (
        lambda patch: patch.setattr(fit, "_refuse_untied", lambda *_: None),
        check_untied,
    ),
    "lists are not looked into": (
        lambda patch: patch.setattr(entries, "named", lambda value: value if isinstance(value, dict) else {}),
        lambda d: check_times(d, "in a list"),
    ),
    "extra state is no tensor": (
        lambda patch: patch.setattr(extra, "is_extra", lambda _: False),
        lambda d: check_times(d, "extra state"),
    ),
    "what a module does not take is half loaded": (
        lambda patch: patch.setattr(weights, "suppress", lambda _: suppressed()),
        lambda d: check_misfit(d, "not taken"),
    ),
    "a suffix decides": (
        lambda patch: patch.setattr(archive, "is_known", lambda _: False),
        lambda d: check_format(d, "a pointer of LFS"),
    ),
}


def suppressed() -> object:
    """Nothing of what is put back: the first line in it is not run."""
    raise LoadError("does not take its extra state (KeyError): give the class that saved it")


@pytest.mark.parametrize("breakage", BROKEN)
def test_this_promise_would_notice(breakage: str, tmp_path: Path, monkeypatch: Patch) -> None:
    do, check = BROKEN[breakage]
    do(monkeypatch)
    with pytest.raises((AssertionError, LoadError, pytest.fail.Exception)):
        check(tmp_path)
