"""A checkpoint file -> named tensors -> a model, strictly: every tensor in its place, or a refusal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hessdiag.errors import LoadError, NonFiniteError
from hessdiag.sources import archive
from hessdiag.sources.facts import Fact, facts
from hessdiag.sources.fit import fit
from hessdiag.sources.spec import split_key

__all__ = ["Weights", "load_into", "read_weights", "split_key"]

ENTRIES = ("state_dict", "model", "model_state_dict", "module", "net", "params", "weights")
"""Where training scripts put the weights, in order of preference (timm's list and common practice).

Averages (EMA) are not among them: they are another checkpoint, and must be asked for by name.
"""
DEEPEST = 3  # entries within entries; a file can also hold itself
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
    """

    state: dict[str, Tensor]
    file: str
    sha256: str
    key: str = ""
    stripped: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())
    facts: Mapping[str, Fact] = field(default_factory=dict)


def read_weights(path: str | Path, *, key: str | None = None, trust_pickle: bool = False) -> Weights:
    """Read the weights of a checkpoint without running anything in it.

    Args:
        path: .safetensors, what ``torch.save`` wrote (.pt .pth .th .ckpt .bin .pkl), or a Hugging Face folder
            or index of safetensors shards; ``file::entry`` names an entry of a nested checkpoint.
        key: that entry, instead of ``::``; by default the first of `ENTRIES` there is.
        trust_pickle: let the file run code. Only for files of one's own making.

    Raises:
        LoadError: missing, damaged, foreign, without tensors, or in need of running code.
        NonFiniteError: NaN or infinity among the weights.
    """
    spec, own_key = (str(path), key) if key is not None else split_key(str(path))
    file = archive.locate(Path(spec))
    try:
        sha256 = archive.digest(file)
        content = archive.read_object(file, trust_pickle=trust_pickle)
    except OSError as error:
        msg = f"{file} cannot be read: {error.strerror or error}"
        raise LoadError(msg) from error
    notes: list[str] = []
    chosen, found_key = _choose(content, own_key, file, notes)
    state = _tensors(chosen, file, notes)
    _refuse_non_finite(state, file)
    state, stripped = _strip(state, notes)
    return Weights(state, str(file), sha256, found_key, stripped, tuple(notes), facts(content, file))


def load_into(model: nn.Module, weights: Weights) -> tuple[str, ...]:
    """Put the weights into the model, all of them or none.

    The model keeps its dtypes. ``num_batches_tracked`` counters and tied names may be missing; nothing else.

    Returns:
        One-line facts for the user: casts, prefixes, what was missing.

    Raises:
        LoadError: names, shapes or kinds differ; the model is then untouched.
        NonFiniteError: a value does not fit into the model's smaller dtype.
    """
    fitted = fit(model, weights.state, weights.stripped, weights.file)
    model.load_state_dict(fitted.state, strict=False)
    return fitted.notes


def _choose(content: Any, key: str | None, file: Path, notes: list[str]) -> tuple[Any, str]:
    """The mapping that holds the weights, and the entries that led to it."""
    if key:
        chosen = content
        for part in key.split("::"):
            if not isinstance(chosen, Mapping) or part not in chosen:
                msg = f"{file} has no entry {key!r}: those with tensors are {_listed(content)}"
                raise LoadError(msg)
            chosen = _unwrap(chosen[part], notes)
        return chosen, key
    chosen = _unwrap(content, notes)
    path: list[str] = []
    while isinstance(chosen, Mapping) and len(path) < DEEPEST:
        entry = next((name for name in ENTRIES if _holds_weights(chosen.get(name))), None)
        if entry is None:
            break
        others = [name for name in _entries(chosen) if name != entry]
        path.append(entry)
        notes.append(f"used the entry {entry!r} of {len(chosen)}: {_some(chosen)}")
        if others:
            spec = "::".join([*path[:-1], others[0]])
            notes.append(f"other entries with weights: {', '.join(others)}; choose with -c {file}::{spec}")
        chosen = _unwrap(chosen[entry], notes)
    if path or not isinstance(chosen, Mapping) or _has_tensors(chosen) or not _entries(chosen):
        return chosen, "::".join(path)
    others = _entries(chosen)
    msg = f"{file}: which weights? it has {', '.join(others)}; choose one, for example -c {file}::{others[0]}"
    raise LoadError(msg)


def _unwrap(value: Any, notes: list[str]) -> Any:
    if not isinstance(value, nn.Module):
        return value
    notes.append(f"the file holds a whole {type(value).__name__}: took its state_dict()")
    return value.state_dict()


def _has_tensors(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(item, Tensor) for item in value.values())


def _holds_weights(value: Any, depth: int = DEEPEST) -> bool:
    if isinstance(value, nn.Module) or _has_tensors(value):
        return True
    if depth == 0 or not isinstance(value, Mapping):
        return False
    return any(_holds_weights(value.get(name), depth - 1) for name in ENTRIES)


def _entries(content: Any) -> list[str]:
    if not isinstance(content, Mapping):
        return []
    return [n for n, item in content.items() if isinstance(n, str) and n.isprintable() and _holds_weights(item)]


def _some(names: Iterable[Any]) -> str:
    words = [" ".join(str(name).split()) for name in names]
    return ", ".join(words[:8]) + (" ..." if len(words) > 8 else "")


def _listed(content: Any) -> str:
    return ", ".join(_entries(content)) or ("none: leave it off" if _has_tensors(content) else "none")


def _tensors(chosen: Any, file: Path, notes: list[str]) -> dict[str, Tensor]:
    if not isinstance(chosen, Mapping) or not _has_tensors(chosen):
        kind = type(chosen).__name__
        msg = f"{file} holds no tensors by name (a {kind}): save model.state_dict(), {archive.SAVE_LINE}"
        raise LoadError(msg)
    state = {
        name: item.detach() for name, item in chosen.items() if isinstance(item, Tensor) and isinstance(name, str)
    }
    for name, tensor in state.items():
        if not name.isprintable():
            msg = f"{file} holds a tensor called {name!r}: damaged, or not a state dict"
            raise LoadError(msg)
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            msg = f"{file}: {name} is not a plain dense tensor (quantized, sparse or empty): save it as one"
            raise LoadError(msg)
    left = [str(name) for name in chosen if name not in state]
    if left:
        notes.append(f"ignored what is no tensor: {_some(left)}")
    return state


def _refuse_non_finite(state: Mapping[str, Tensor], file: Path) -> None:
    counts = {name: count for name, tensor in state.items() if (count := non_finite(tensor))}
    if counts:
        some = ", ".join(f"{name} ({count})" for name, count in list(counts.items())[:3])
        msg = (
            f"{file}: NaN or infinity in {len(counts)} of {len(state)} tensors, first {some}: "
            "training diverged; give an earlier checkpoint"
        )
        raise NonFiniteError(msg)


def non_finite(tensor: Tensor) -> int:
    """How many values are NaN or infinite."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    wide = tensor.float() if tensor.element_size() == 1 else tensor  # isfinite knows no 8-bit floats
    return int(wide.numel() - wide.isfinite().sum())


def _strip(state: dict[str, Tensor], notes: list[str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    stripped: list[str] = []
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
        stripped.append(prefix)
        notes.append(f"stripped {prefix!r} from {len(state)} names")
    return state, tuple(stripped)
