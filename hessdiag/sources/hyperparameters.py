"""What a training script keeps beside the weights: its arguments, and averages of the weights."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from hessdiag.errors import LoadError
from hessdiag.sources import archive
from hessdiag.sources.entries import ENTRIES, has_tensors
from hessdiag.sources.facts import NESTED
from hessdiag.sources.spec import readable, split_key

OF_DATA = "datamodule_hyper_parameters"
"""Where Lightning puts those of the data module."""
EMA = ("state_dict_ema", "model_ema", "ema_state_dict", "ema", "averaged_model", "swa_model")
"""Where training scripts keep averaged weights: timm's name first, then torchvision's."""
COUNT = "n_averaged"  # torch's AveragedModel holds it beside its ``module.``
SWAPPED = ("averaging_state", "current_model_state")
"""Lightning's WeightAveraging puts the averages in the place of the weights, and the weights here."""


def kept(content: Any) -> dict[str, dict[str, Any]]:
    """The mappings of hyper-parameters in a checkpoint, by their entry.

    Args:
        content: what the file was read as.
    """
    held = content if isinstance(content, Mapping) else {}
    found = {}
    for name in (*NESTED, OF_DATA):
        value = held.get(name)
        value = vars(value) if isinstance(value, Namespace | SimpleNamespace) else value  # of a trusted pickle
        if isinstance(value, Mapping):
            found[name] = {str(key): item for key, item in value.items()}
    return found


def averages(content: Any) -> tuple[str, ...]:
    """The averaged weights in a checkpoint, as what follows ``file::``.

    Args:
        content: what the file was read as.
    """
    held = content if isinstance(content, Mapping) else {}
    found = [name for name in EMA if has_tensors(held.get(name))]
    found = [f"{name}::module." if COUNT in held[name] else name for name in found]
    found += [f"{n}::module." for n in ENTRIES if isinstance(held.get(n), Mapping) and COUNT in held[n]]
    if COUNT in held:
        found.append("module.")
    if all(name in held for name in SWAPPED):
        found.append("state_dict")
    return tuple(found)


def averaged(checkpoint: str, *, trust_pickle: bool = False) -> str:
    """The averaged weights of a checkpoint, as ``file::entry``.

    Args:
        checkpoint: file.
        trust_pickle: let the file run code.

    Raises:
        LoadError: it cannot be read, has no averages, or they were never updated; or the entry is named already.
    """
    path, entry = split_key(checkpoint)
    if entry:
        msg = f"{checkpoint} names its entry, and `use_ema=True` asks for another: drop one of the two"
        raise LoadError(msg)
    file = archive.locate(Path(path))
    with readable(file):
        content = archive.read_object(file, trust_pickle=trust_pickle)
    found = averages(content)
    if not found:
        msg = f"{file} holds no averaged weights (looked for {', '.join(EMA)}, {COUNT}): drop `use_ema`"
        raise LoadError(msg)
    inner = content if found[0] in ("module.", "state_dict") else content[found[0].partition("::")[0]]
    count = inner.get(COUNT)
    if isinstance(count, Tensor) and count.numel() == 1 and float(count) == 0:
        msg = f"{file}: its averages were never updated ({COUNT} is 0), they are another model: drop `use_ema`"
        raise LoadError(msg)
    return f"{path}::{found[0]}"
