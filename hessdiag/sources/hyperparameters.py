"""What a training script keeps beside the weights, read without running anything: its arguments, its averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hessdiag.errors import LoadError
from hessdiag.sources import archive
from hessdiag.sources.entries import has_tensors
from hessdiag.sources.spec import split_key

EMA = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "averaged_model", "swa_model")
"""Where training scripts keep averaged weights: timm's name first, then torchvision's."""
COUNT = "n_averaged"  # torch's AveragedModel holds it beside its ``module.``


def hyperparameters(checkpoint: str, names: Sequence[str], *, trust_pickle: bool = False) -> dict[str, Any]:
    """The first of some mappings beside the weights: ``args`` of timm, ``hyper_parameters`` of Lightning.

    Args:
        checkpoint: file, or ``file::entry``.
        names: of the mappings.
        trust_pickle: let the file run code.

    Returns:
        Plain values by name; empty where the file holds no such mapping.

    Raises:
        LoadError: the file cannot be read.
    """
    content = _content(checkpoint, trust_pickle)
    if isinstance(content, Mapping):
        for name in names:
            if isinstance(content.get(name), Mapping):
                return {str(key): value for key, value in content[name].items()}
    return {}


def averaged(checkpoint: str, *, trust_pickle: bool = False) -> str:
    """The averaged weights of a checkpoint, as ``file::entry``.

    Raises:
        LoadError: it has none, or the entry is named already.
    """
    file, entry = split_key(checkpoint)
    if entry:
        msg = f"{checkpoint} names its entry, and `use_ema` another: drop one of the two"
        raise LoadError(msg)
    content = _content(checkpoint, trust_pickle)
    held = content if isinstance(content, Mapping) else {}
    for name in EMA:
        if has_tensors(held.get(name)):
            return f"{file}::{name}" + ("::module." if COUNT in held[name] else "")
    if COUNT in held:
        return f"{file}::module."
    msg = f"{file} holds no averaged weights (looked for {', '.join(EMA)}): drop `use_ema`"
    raise LoadError(msg)


def _content(checkpoint: str, trust_pickle: bool) -> Any:
    file = Path(split_key(checkpoint)[0])
    try:
        return archive.read_object(archive.locate(file), trust_pickle=trust_pickle)
    except OSError as error:
        msg = f"{file} cannot be read: {error.strerror or error}"
        raise LoadError(msg) from error
