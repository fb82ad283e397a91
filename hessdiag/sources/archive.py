"""A checkpoint file -> the Python object in it, without running anything the file asks for.

What a file is, is decided by its content and never by its extension. Pickles go through an interpreter of their
own (`pickled`), which builds tensors and containers and can call nothing else; there is no other one.
"""

from __future__ import annotations

import codecs
import pickle
import tarfile
import warnings
import zipfile
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from safetensors.torch import load_file

from hessdiag.errors import LoadError, one_line
from hessdiag.hashing import of_file, sha256
from hessdiag.sources import torch_files, trusted
from hessdiag.sources.entries import choose, has_tensors
from hessdiag.sources.other_formats import is_known, other_archive, other_format
from hessdiag.sources.shards import FOLDERS, in_folder, read_shards, weight_map
from hessdiag.sources.stand_ins import Foreign

Format = Literal["safetensors", "index", "zip", "legacy", "pickle"]

INDEX = FOLDERS[0]
LEGACY_MAGIC = torch_files.LEGACY_MAGIC
RESAVE = "load it where it was made, and save model.state_dict() with torch.save again"
SAVE_LINE = 'torch.save(model.state_dict(), "weights.pt")'


def locate(path: Path) -> Path:
    """The file to read: the path itself, or the weights or index of a Hugging Face folder.

    Raises:
        LoadError: it does not exist, is empty, or is a folder without either.
    """
    if path.is_dir():
        return in_folder(path)
    if not path.is_file():
        what = (
            "is no regular file, and is read twice: copy it into one"
            if path.exists()
            else "no such checkpoint file"
        )
        msg = f"{path}: {what}"
        raise LoadError(msg)
    if path.stat().st_size == 0:
        msg = f"{path} is empty (0 bytes): the run that wrote it was probably interrupted"
        raise LoadError(msg)
    return path


def digest(path: Path) -> str:
    """sha256 of a file; of an index, sha256 of it and its shards in the order of their names."""
    if sniff(path) != "index":
        return of_file(path)
    shards = sorted(set(weight_map(path).values()))
    return str(
        sha256(path.read_bytes(), *(bytes.fromhex(digest(path.parent / one)) for one in shards)).hexdigest()
    )


def sniff(path: Path) -> Format:
    """What the file is, by its first bytes.

    Raises:
        LoadError: nothing a checkpoint can be.
    """
    with path.open("rb") as stream:
        head = stream.read(32)
    if head.startswith(b"PK\x03\x04"):
        return "zip"
    if is_legacy(head):
        return "legacy"
    if head[8:9] == b"{" or (path.suffix == ".safetensors" and not is_known(head)):
        return "safetensors"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "pickle"
    if path.suffix == ".json" and head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"{":
        return "index"
    if tarfile.is_tarfile(path):
        msg = f"{path} is a tar archive, as torch 0.1 wrote: {RESAVE}"
        raise LoadError(msg)
    msg = f"{path} is {other_format(head)}"
    raise LoadError(msg)


def is_legacy(head: bytes) -> bool:
    """Whether these first bytes are those of ``torch.save`` before 1.6, in any protocol of pickles."""
    number = LEGACY_MAGIC[2:-1]
    return head[:1] == b"\x80" and (head[2:].startswith(number) or head[11:].startswith(number))


def read_object(path: Path, *, trust_pickle: bool = False, main: ModuleType | None = None) -> Any:
    """Whatever the file holds: a dict of tensors, or the nested dict a training script saved.

    Args:
        path: file given by `locate`.
        trust_pickle: allow a pickle to run code. Only for files of one's own making.
        main: where a trusted pickle finds the classes of the script that saved it.

    Raises:
        LoadError: the file is damaged, foreign, or needs code to be run.
    """
    kind = sniff(path)
    if kind == "index":
        return read_shards(path, lambda shard: read_object(shard, trust_pickle=trust_pickle, main=main))
    if kind == "safetensors":
        return _read_safetensors(path)
    if kind == "zip":
        _refuse_foreign_zip(path)
    if trust_pickle:
        return unpickle_trusted(path, kind, main)
    return unpickle_safely(path, kind)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except Exception as error:  # a damaged header can raise anything
        msg = f"{path} is damaged or not a safetensors file ({one_line(error, 120)}): copy or save it again"
        raise LoadError(msg) from error


def _refuse_foreign_zip(path: Path) -> None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception as error:  # a damaged list of records can raise anything
        raise LoadError(_damaged(path, error)) from error
    base = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in base or "model.json" in base:
        msg = (
            f"{path} is a TorchScript archive, which holds a program: save its weights alone, "
            'torch.save(torch.jit.load("model.pt").state_dict(), "weights.pt")'
        )
        raise LoadError(msg)
    if "archive_format" in base:
        msg = f"{path} is an exported program (.pt2), which holds a program: save the weights alone, {SAVE_LINE}"
        raise LoadError(msg)
    if "data.pkl" not in base:
        msg = f"{path} is {other_archive(names)}"
        raise LoadError(msg)


def unpickle_safely(path: Path, kind: Format) -> Any:
    """The content of a file of torch.save, without running code of its own.

    Raises:
        LoadError: it asks for names that could run code, is no file of torch, or is damaged.
    """
    if kind == "pickle":
        raise LoadError(_not_of_torch(path))
    try:
        return torch_files.read_zip(path) if kind == "zip" else torch_files.read_legacy(path)
    except torch_files.ForeignNamesError as error:
        raise LoadError(_refusal(path, list(error.names), error.content)) from error
    except Exception as error:  # a damaged pickle can raise anything
        raise LoadError(_damaged(path, error)) from error


def _refusal(path: Path, names: list[str], content: Any) -> str:
    some = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    return (
        f"{path} was not loaded, because it can run code: it asks for {some}; `trust_pickle=True` if you made the "
        f"file yourself, or save the weights alone where it was made, {_saved_alone(path, content)}"
    )


def _saved_alone(path: Path, content: Any) -> str:
    """The line that saves the weights of a file without what lies beside them; where unclear, those of a model."""
    try:
        chosen, key = choose(content, None, path, [])
    except LoadError:
        return SAVE_LINE
    if not isinstance(content, dict) or not has_tensors(chosen) or any(map(_is_foreign, chosen.values())):
        return SAVE_LINE
    entry = "".join(f"[{part!r}]" for part in key.split("::") if part)
    return f"torch.save(torch.load({str(path)!r}, weights_only=False){entry}, 'weights.pt')"


def _is_foreign(value: Any) -> bool:
    return isinstance(value, Foreign)


def _not_of_torch(path: Path) -> str:
    return (
        f"{path} was not loaded: a pickle that torch.save did not write can run code; `trust_pickle=True` if you "
        f"made the file yourself, or save the weights alone, {SAVE_LINE}"
    )


def _damaged(path: Path, error: Exception) -> str:
    known = isinstance(error, pickle.UnpicklingError | zipfile.BadZipFile)
    reason = one_line(error, 80) if known else "it cannot be read to its end"
    if "Bad CRC-32" in reason:
        reason = "a record does not match its checksum"
    return f"{path} is damaged or cut short ({reason}): copy or save it again"


def unpickle_trusted(path: Path, kind: Format, main: ModuleType | None = None) -> Any:
    """The content of a file whose code the user trusts.

    Raises:
        LoadError: its code is not found here, or it is damaged.
    """
    try:
        if kind == "zip":
            torch_files.check_zip(path)
        with warnings.catch_warnings(), path.open("rb") as stream:
            warnings.simplefilter("ignore")
            return trusted.load(stream, of_torch=kind != "pickle", main=main)
    except (ImportError, AttributeError) as error:
        msg = (
            f"{path} needs code to be read ({one_line(error, 120)}): install its package here, or put your own "
            "code in reach with `app_dir`"
        )
        if "__main__" in str(error):
            msg = (
                f"{path} needs a class of the script that saved it ({one_line(error, 120)}): define or import it "
                "in the factory's file"
            )
        raise LoadError(msg) from error
    except Exception as error:  # a pickle runs code, which can raise anything
        raise LoadError(_damaged(path, error)) from error
