"""A checkpoint file -> the Python object in it, without running anything the file asks for.

What a file is, is decided by its content and never by its extension. Pickles go through torch's restricted
unpickler (``weights_only=True``), which builds tensors and containers and calls nothing else; there is no
fallback to the unrestricted one.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import pickle
import pickletools
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from hessdiag.errors import LoadError, one_line

Format = Literal["safetensors", "index", "zip", "legacy", "pickle"]

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ALLOWED = (argparse.Namespace,)  # plain attributes, as old Lightning and timm runs save their arguments
LEGACY_MAGIC = b"\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."  # torch.save before 1.6
LEGACY_PICKLES = 5  # magic number, protocol, system, content, storage keys
SAVE_LINE = 'safetensors.torch.save_file(model.state_dict(), "weights.safetensors")'


def locate(path: Path) -> Path:
    """The file to read: the path itself, or the safetensors file or index of a Hugging Face folder.

    Raises:
        LoadError: it does not exist, is empty, or is a folder without either.
    """
    if path.is_dir():
        for name in (INDEX, SINGLE):
            if (path / name).is_file():
                return path / name
        msg = f"{path} is a folder without {INDEX} or {SINGLE}: give a checkpoint file"
        raise LoadError(msg)
    if not path.is_file():
        msg = f"{path}: no such checkpoint file"
        raise LoadError(msg)
    if path.stat().st_size == 0:
        msg = f"{path} is empty (0 bytes): the run that wrote it was probably interrupted"
        raise LoadError(msg)
    return path


def digest(path: Path) -> str:
    """sha256 of a file; of an index, sha256 of it and its shards in the order of their names."""
    with path.open("rb") as stream:
        if sniff(path) != "index":
            return hashlib.file_digest(stream, "sha256").hexdigest()
        whole = hashlib.sha256(stream.read())
    for shard in sorted(set(weight_map(path).values())):
        whole.update(bytes.fromhex(digest(locate(path.parent / shard))))
    return whole.hexdigest()


def sniff(path: Path) -> Format:
    """What the file is, by its first bytes.

    Raises:
        LoadError: nothing a checkpoint can be.
    """
    with path.open("rb") as stream:
        head = stream.read(16)
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if head.startswith(LEGACY_MAGIC):
        return "legacy"
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    if path.suffix == ".json" and head.lstrip()[:1] == b"{":
        return "index"
    if head.startswith(b"version https://"):
        msg = f"{path} is a Git LFS pointer, not the checkpoint itself: git lfs pull"
        raise LoadError(msg)
    msg = f"{path} is not a checkpoint: allowed are .safetensors files and what torch.save writes"
    raise LoadError(msg)


def read_object(path: Path, *, trust_pickle: bool = False) -> Any:
    """Whatever the file holds: a dict of tensors, or the nested dict a training script saved.

    Args:
        path: file given by `locate`.
        trust_pickle: allow a pickle to run code. Only for files of one's own making.

    Raises:
        LoadError: the file is damaged, foreign, or needs code to be run.
    """
    kind = sniff(path)
    if kind == "index":
        return read_shards(path)
    if kind == "safetensors":
        return _read_safetensors(path)
    if kind == "zip":
        _refuse_foreign_zip(path)
    if trust_pickle:
        return _unpickle_trusted(path, kind)
    return _unpickle_safely(path, kind)


def read_shards(index: Path) -> dict[str, torch.Tensor]:
    """All tensors a ``model.safetensors.index.json`` lists, from the shards beside it."""
    mapping = weight_map(index)
    tensors: dict[str, torch.Tensor] = {}
    for shard in sorted(set(mapping.values())):
        content = _read_safetensors(locate(index.parent / shard))
        for name in (name for name, file in mapping.items() if file == shard):
            if name not in content:
                msg = f"{index.parent / shard} does not hold {name}, which {index.name} says it does"
                raise LoadError(msg)
            tensors[name] = content[name]
    return tensors


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name to shard file name, as the index says; shards must lie beside it.

    Raises:
        LoadError: not such an index.
    """
    try:
        mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        named = all(isinstance(file, str) and Path(file).name == file for file in mapping.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"{index} is not an index of safetensors shards: it needs a weight_map from names to files"
        raise LoadError(msg) from error
    if not named:
        msg = f"{index}: shards must be files in the same folder"
        raise LoadError(msg)
    return dict(mapping)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        msg = f"{path} is damaged or not a safetensors file ({one_line(error, 120)}): copy or save it again"
        raise LoadError(msg) from error


def _refuse_foreign_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        msg = f"{path} is damaged or cut short ({one_line(error, 80)}): copy or save it again"
        raise LoadError(msg) from error
    base = [name.rpartition("/")[2] for name in names]
    if "constants.pkl" in base or "archive_format" in base:
        kind = "a TorchScript archive" if "constants.pkl" in base else "an exported program (.pt2)"
        msg = f"{path} is {kind}, which holds a program: save the weights alone, {SAVE_LINE}"
        raise LoadError(msg)
    if "data.pkl" not in base:
        msg = f"{path} is a zip archive but not a checkpoint: allowed is what torch.save writes"
        raise LoadError(msg)


def _unpickle_safely(path: Path, kind: Format) -> Any:
    try:
        # as a stream: given a path, torch.load would go by its extension
        with warnings.catch_warnings(), safe_globals(list(ALLOWED)), path.open("rb") as stream:
            warnings.simplefilter("ignore")
            return torch.load(stream, map_location="cpu", weights_only=True, mmap=False)
    except Exception as error:  # a damaged pickle can raise anything
        unsafe = [] if kind == "legacy" and _cut_short(path) else _unsafe_names(path, kind, error)
        if unsafe:
            raise LoadError(_refusal(path, unsafe)) from error
        raise LoadError(_damaged(path, kind, error)) from error


def _cut_short(path: Path) -> bool:
    """Whether a legacy file ends inside its pickles: a name cut in half would look like a forbidden one."""
    with path.open("rb") as stream:
        try:
            for _ in range(LEGACY_PICKLES):
                collections.deque(pickletools.genops(stream), maxlen=0)
        except ValueError:
            return True
    return False


def _unsafe_names(path: Path, kind: Format, error: Exception) -> list[str]:
    """What the pickle asks to be called, as far as torch's restricted unpickler says."""
    names: list[str] = []
    if kind == "zip":
        try:
            names = get_unsafe_globals_in_checkpoint(path)
        except Exception:  # damaged as well; the error at hand still says which name came first
            names = []
    found = re.findall(r"GLOBAL ([\w.]+)", str(error)) if isinstance(error, pickle.UnpicklingError) else []
    allowed = {f"{cls.__module__}.{cls.__qualname__}" for cls in ALLOWED}
    return [name for name in dict.fromkeys(names + found) if name not in allowed]


def _refusal(path: Path, names: list[str]) -> str:
    some = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return (
        f"{path} was not loaded, because it can run code: it asks for {some}; --trust-pickle if you made the "
        f"file yourself, or save the weights alone, {SAVE_LINE}"
    )


def _damaged(path: Path, kind: Format, error: Exception) -> str:
    if kind == "pickle":
        return (
            f"{path} was not loaded: a pickle that torch.save did not write can run code; --trust-pickle if you "
            f"made the file yourself, or save the weights alone, {SAVE_LINE}"
        )
    # the restricted unpickler's own text goes on to recommend the unrestricted one
    reason = "its pickle cannot be read" if isinstance(error, pickle.UnpicklingError) else one_line(error, 80)
    return f"{path} is damaged or cut short ({reason}): copy or save it again"


def _unpickle_trusted(path: Path, kind: Format) -> Any:
    try:
        with warnings.catch_warnings(), path.open("rb") as stream:
            warnings.simplefilter("ignore")
            if kind == "pickle":
                return pickle.load(stream)
            return torch.load(stream, map_location="cpu", weights_only=False, mmap=False)
    except (ImportError, AttributeError) as error:
        msg = f"{path} needs your code to be read ({one_line(error, 120)}): put it in reach with --app-dir"
        raise LoadError(msg) from error
    except Exception as error:  # a pickle runs code, which can raise anything
        raise LoadError(_damaged(path, kind, error)) from error
