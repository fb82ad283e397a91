"""What a checkpoint file says about its run: epoch, learning rate, hyper-parameters."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from hessdiag.errors import UsageError, one_line
from hessdiag.sources.spec import literal, split_key

Fact = int | float | str | bool

NESTED = ("hyper_parameters", "hparams", "args", "config", "meta", "metadata")
"""Where training scripts put hyper-parameters; Lightning's name first."""
OPTIMIZERS = ("optimizer_states", "optimizer", "optimizer_state_dict", "optim", "opt_state")
OF_OPTIMIZER = ("lr", "momentum", "nesterov", "weight_decay")
ADAPTIVE = ("betas", "alpha", "rho", "lr_decay")
"""What the groups of Adam, RMSprop, Adadelta and Adagrad hold: their rate says nothing of stability by itself."""
LONGEST = 200  # characters; longer texts are no hyper-parameters


def facts(content: Any, file: Path) -> dict[str, Fact]:
    """Scalars beside the weights, by name.

    Taken are entries of the file itself, of the mappings in it called as in `NESTED`, the first parameter group's
    learning rate, momentum and weight decay (with ``adaptive`` where it scales each direction by itself), and the
    header of a .safetensors file, whose texts are read as JSON literals. The outer entry counts where a name
    occurs twice.

    Args:
        content: what the file was read as.
        file: for the header.
    """
    found: dict[str, Fact] = {}
    sources = [content] if isinstance(content, Mapping) else []
    sources += [content[name] for name in NESTED if sources and isinstance(content.get(name), Mapping)]
    sources += [_first_group(content), _header(file)]
    for source in sources:
        for name, value in source.items():
            if isinstance(name, str) and name.isprintable() and (fact := _scalar(value)) is not None:
                found.setdefault(name, fact)
    return found


def sidecar(path: str) -> dict[str, Fact]:
    """Hyper-parameters beside a checkpoint: ``last.json`` for last.pt, else ``meta.json`` of its folder.

    Raises:
        UsageError: the file is no JSON object.
    """
    plain = Path(split_key(path)[0])
    for file in (plain.with_suffix(".json"), plain.parent / "meta.json"):
        if not file.is_file():
            continue
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            msg = f"{file}: no JSON ({one_line(error, 80)}); it should hold the run's hyper-parameters"
            raise UsageError(msg) from error
        if not isinstance(found, dict):
            msg = f"{file} holds a {type(found).__name__}; an object of hyper-parameters is needed"
            raise UsageError(msg)
        return {name: fact for name, value in found.items() if (fact := _scalar(value)) is not None}
    return {}


def from_path(path: str, pattern: str | None) -> dict[str, Fact]:
    """Hyper-parameters out of a path, numbers where they are.

    Raises:
        UsageError: the pattern is not found in it.
    """
    if pattern is None:
        return {}
    found = re.search(pattern, path)
    if found is None:
        msg = f"{path}: `meta_from={pattern!r}` is not found in it"
        raise UsageError(msg)
    return {name: _number(text) for name, text in found.groupdict().items() if text is not None}


def _number(text: str) -> int | float | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _scalar(value: Any) -> Fact | None:
    if isinstance(value, Tensor) and value.numel() == 1 and value.dim() == 0:
        value = value.item()
    if isinstance(value, int):
        return value if value.bit_length() < 64 else None  # Python prints and JSON reads no longer ones
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, str) and len(value) <= LONGEST and value.isprintable():
        return value
    return None


def _first_group(content: Any) -> Mapping[str, Any]:
    return next(
        (
            {name: group[name] for name in OF_OPTIMIZER if name in group}
            | ({"adaptive": True} if any(name in group for name in ADAPTIVE) else {})
            for group in _groups(content)
        ),
        {},
    )


def _groups(content: Any) -> Iterator[Mapping[str, Any]]:
    if not isinstance(content, Mapping):
        return
    for name in OPTIMIZERS:
        state = content.get(name)
        state = state[0] if isinstance(state, list) and state else state
        groups = state.get("param_groups") if isinstance(state, Mapping) else None
        if isinstance(groups, list) and groups and isinstance(groups[0], Mapping):
            yield groups[0]


def _header(file: Path) -> dict[str, Any]:
    if file.suffix != ".safetensors":
        return {}
    try:
        with safe_open(file, framework="pt") as opened:
            return {name: literal(text) for name, text in (opened.metadata() or {}).items()}
    except (SafetensorError, OSError):  # reading the tensors says what is wrong with it
        return {}
