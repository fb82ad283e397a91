"""A checkpoint file -> named tensors -> a model, strictly: every tensor in its place, or a refusal."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hessdiag.errors import LoadError, NonFiniteError, one_line
from hessdiag.sources import archive, extra
from hessdiag.sources.entries import choose, has_tensors, is_numbers, some
from hessdiag.sources.facts import Fact, facts
from hessdiag.sources.fit import fit
from hessdiag.sources.hyperparameters import averages, kept
from hessdiag.sources.spec import readable, split_key
from hessdiag.sources.stand_ins import Array
from hessdiag.sources.storages import Odd

__all__ = ["Weights", "load_into", "read_weights", "split_key"]

PREFIXES = ("module.", "_orig_mod.")  # DataParallel and DistributedDataParallel; torch.compile


@dataclass(frozen=True)
class Weights:
    """The tensors of one checkpoint.

    Attributes:
        state: name to tensor, on the CPU, wrappers' prefixes removed.
        file: the file read.
        sha256: of that file (of an index: of it and its shards).
        key: the entry the tensors came from, '' if they were the whole file.
        stripped: prefixes removed from every name, outermost first.
        notes: one-line facts for the user.
        facts: what the file says of its run: epoch, learning rate, hyper-parameters.
        kept: mappings of hyper-parameters in the file, by their entry, with values of every plain kind.
        averages: averaged weights that the file also holds, as what follows ``file::``.
    """

    state: dict[str, Tensor]
    file: str
    sha256: str
    key: str = ""
    stripped: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
    facts: Mapping[str, Fact] = field(default_factory=dict)
    kept: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    averages: tuple[str, ...] = ()


def read_weights(
    path: str | Path, *, key: str | None = None, trust_pickle: bool = False, main: ModuleType | None = None
) -> Weights:
    """Read the weights of a checkpoint without running anything in it.

    Args:
        path: .safetensors, what ``torch.save`` wrote (.pt .pth .th .ckpt .bin .pkl), or a Hugging Face folder
            or index of shards; ``file::entry`` names an entry of a nested checkpoint, ``file::prefix.`` the
            tensors whose names begin with that.
        key: that entry or prefix, instead of ``::``; by default the first of `entries.ENTRIES` there is.
        trust_pickle: let the file run code. Only for files of one's own making.
        main: where a trusted pickle finds the classes of the script that saved it.

    Raises:
        LoadError: missing, damaged, foreign, without tensors, or in need of running code.
        NonFiniteError: NaN or infinity among the weights.
    """
    spec, own_key = (str(path), key) if key is not None else split_key(str(path))
    file = Path(spec)
    with readable(file):
        file = archive.locate(file)
    with readable(file):
        sha256 = archive.digest(file)
        content = archive.read_object(file, trust_pickle=trust_pickle, main=main)
    notes: list[str] = []
    chosen, found_key = choose(content, own_key, file, notes)
    state = _tensors(chosen, file, notes, trusted=trust_pickle)
    _refuse_non_finite(state, file)
    state, stripped = _strip(state, notes)
    return Weights(
        state,
        str(file),
        sha256,
        found_key,
        stripped,
        tuple(notes),
        facts(content, file),
        kept(content),
        averages(content),
    )


def load_into(model: nn.Module, weights: Weights) -> tuple[str, ...]:
    """Put the weights into the model, all of them or none.

    The model keeps its dtypes, and its modules get their extra state back. ``num_batches_tracked`` counters and
    tied names may be missing, nothing else; of an adapter file, whatever is not the adapter's.

    Returns:
        One-line facts for the user: casts, prefixes, what was missing.

    Raises:
        LoadError: names, shapes or kinds differ; the model is then untouched.
        NonFiniteError: a value does not fit into the model's smaller dtype.
    """
    spec = f"{weights.file}::{weights.key}" if weights.key else weights.file
    fitted = fit(model, weights.state, weights.stripped, weights.file, spec)
    values = {name: extra.value_of(item) for name, item in fitted.state.items()}
    if not any(extra.is_extra(name) for name in values):
        model.load_state_dict(values, strict=False)
        return fitted.notes
    before = copy.deepcopy(model.state_dict())
    try:
        model.load_state_dict(values, strict=False)
    except Exception as error:  # what a module does with its extra state is code of the user's
        with suppress(Exception):
            model.load_state_dict(before, strict=False)
        why = f"{type(error).__name__}: {one_line(error, 120)}"
        msg = f"{weights.file}: a module does not take its extra state ({why}): give the class that saved it"
        raise LoadError(msg) from error
    return fitted.notes


def _tensors(chosen: Any, file: Path, notes: list[str], *, trusted: bool) -> dict[str, Tensor]:
    if not has_tensors(chosen):
        msg = f"{file} holds no tensors by name ({_instead(chosen)}): save model.state_dict(), {archive.SAVE_LINE}"
        raise LoadError(msg)
    state: dict[str, Tensor] = {}
    for name, given in chosen.items():
        if isinstance(name, str) and name.isprintable() and extra.is_extra(name):
            if not trusted:
                extra.require_plain(name, given, file)
            state[name] = extra.carried(given)
            continue
        item = torch.from_numpy(np.array(given)) if is_numbers(given) else given
        if not isinstance(name, str) or not isinstance(item, Tensor | Odd):
            continue
        if not name.isprintable():
            msg = f"{file} holds a tensor called {name!r}: damaged, or not a state dict"
            raise LoadError(msg)
        if isinstance(item, Odd) and not item.is_tensor:
            continue
        if isinstance(item, Odd) or item.layout != torch.strided or item.is_quantized or item.is_meta:
            msg = f"{file}: {name} is not a plain dense tensor (quantized, sparse or empty): save it as one"
            raise LoadError(msg)
        state[name] = Tensor.detach(item)
    left = [name for name in chosen if name not in state]
    if left:
        notes.append(f"ignored what is no tensor: {some(left)}")
    return state


def _instead(chosen: Any) -> str:
    items = list(chosen.values()) if isinstance(chosen, Mapping) else []
    if any(isinstance(item, Tensor) for item in items):
        return "its tensors lie under keys that are no names"
    if any(isinstance(item, Array) for item in items):
        return "arrays of numpy are read with `trust_pickle=True` alone, if you made the file yourself"
    return f"a {type(chosen).__name__}"


def _refuse_non_finite(state: Mapping[str, Tensor], file: Path) -> None:
    known: dict[tuple[Any, ...], int] = {}  # tied tensors are looked at once
    counts = {}
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if place not in known:
            known[place] = non_finite(tensor)
        if known[place]:
            counts[name] = known[place]
    if counts:
        first = ", ".join(f"{name} ({count})" for name, count in list(counts.items())[:3])
        msg = (
            f"{file}: NaN or infinity in {len(counts)} of {len(state)} tensors, first {first}: "
            "training diverged; give an earlier checkpoint"
        )
        raise NonFiniteError(msg)


def non_finite(tensor: Tensor) -> int:
    """How many of its stored values are NaN or infinite; an expanded dimension is stored once."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    for dim, step in enumerate(tensor.stride()):
        if step == 0 and tensor.shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # isfinite knows no 8-bit floats
    return int(wide.numel() - wide.isfinite().sum())


def _strip(state: dict[str, Tensor], notes: list[str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    stripped: list[str] = []
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        stripped.append(prefix)
        notes.append(f"stripped {prefix!r} from {len(state)} names")
    return state, tuple(stripped)
