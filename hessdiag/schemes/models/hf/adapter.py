"""An adapter of PEFT on a frozen model: its parameters are the ones that count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from hessdiag.errors import LoadError, one_line
from hessdiag.schemes.known import require
from hessdiag.schemes.models.hf.place import ADAPTER, read_json
from hessdiag.sources.weights import Weights, load_into, read_weights


def with_adapter(
    model: nn.Module, folder: Path, base: Path, *, trust_pickle: bool
) -> tuple[nn.Module, Weights, list[str]]:
    """The model with an adapter on top, unmerged; only the adapter's parameters need a gradient.

    Args:
        model: with its weights.
        folder: of the adapter.
        base: the model's folder.
        trust_pickle: let the adapter's weights run code.

    Raises:
        UsageError: PEFT is not installed.
        LoadError: the adapter is damaged, of another model, or one that changes the inputs.
    """
    peft: Any = require("peft", "hf", f"`adapter='{folder}'`")
    said = read_json(folder / ADAPTER)
    try:
        config: Any = peft.PeftConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # PEFT raises what it likes
        msg = f"{folder / ADAPTER} is not read by PEFT ({type(error).__name__}: {one_line(error, 120)})"
        raise LoadError(msg) from error
    if config.is_prompt_learning:
        msg = f"{folder}: {config.peft_type.value} adds inputs, not weights; allowed: LoRA and its kin, in the "
        raise LoadError(msg + "model; write a FACTORY for it, path/file.py:function")
    config.inference_mode = False  # saved as True, which freezes the adapter too
    try:
        whole: Any = peft.get_peft_model(model, config)
    except Exception as error:  # no such modules in this model, say
        why = f"{type(error).__name__}: {one_line(error, 160)}"
        msg = f"{folder} does not fit the model of {base} ({why}): an adapter of another model?"
        raise LoadError(msg) from error
    weights = read_weights(folder, trust_pickle=trust_pickle)
    notes = list(load_into(whole, weights))
    named = said.get("base_model_name_or_path")
    if isinstance(named, str) and named and not _same(named, base):
        notes.append(f"the adapter names the base model {named}; given is {base}")
    others = sorted(file.parent.name for file in folder.glob(f"*/{ADAPTER}"))
    if others:
        notes.append(f"{folder} holds other adapters too, which are left out: {', '.join(others)}")
    return whole.eval(), weights, notes


def _same(named: str, base: Path) -> bool:
    return Path(named).resolve() == base.resolve() or base.resolve().as_posix().endswith(f"/{named}")
