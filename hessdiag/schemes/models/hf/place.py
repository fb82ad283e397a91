"""Where a model of Hugging Face lies: its folder, its weights, its adapter."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hessdiag.errors import LoadError, UsageError, one_line
from hessdiag.schemes.address import Address
from hessdiag.schemes.known import require
from hessdiag.schemes.recipe import Recipe
from hessdiag.sources.spec import exists, split_key

CONFIG, ADAPTER = "config.json", "adapter_config.json"
ON_HUB = re.compile(r"[\w.-]+(/[\w.-]+)?")
FETCHED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.py")
"""What is fetched of a model: its configuration, weights that run nothing, its tokenizer."""


@dataclass(frozen=True)
class Place:
    """What a name and a checkpoint stand for.

    Attributes:
        folder: with config.json, and the tokenizer or image processor.
        weights: of the model, as ``-c`` takes them.
        adapter: folder of an adapter on top; None where there is none.
        run: the folder whose training is looked at: of the adapter, of the checkpoint, or ``folder``.
        notes: one-line facts for the user.
    """

    folder: Path
    weights: str
    adapter: Path | None
    run: Path
    notes: tuple[str, ...] = ()


def find(address: Address, recipe: Recipe, checkpoint: str | None) -> Place:
    """The place of a model.

    Args:
        address: ``hf:DIR``; ``hf:`` where the checkpoint is the folder.
        recipe: says whether there is an adapter, and whether something may be fetched.
        checkpoint: a folder, a file, or ``file::entry``; of an adapter its folder.

    Raises:
        UsageError: neither names a folder, or both name an adapter.
        LoadError: there is no such folder, or it holds no configuration.
    """
    adapter = Path(recipe.found(recipe.adapter)) if recipe.adapter else None
    at = Path(split_key(checkpoint)[0]) if checkpoint else None
    here = at if at is None or at.is_dir() else at.parent
    if here is not None and (here / ADAPTER).is_file() and not (here / CONFIG).is_file():
        if adapter is not None:
            msg = f"`adapter={recipe.adapter!r}`, and {checkpoint} is one too: give the base's folder with -c"
            raise UsageError(msg)
        adapter, at, here, checkpoint = here, None, None, None
    if address.place:
        folder, notes = _folder(address.place, recipe)
    elif here is not None:
        folder, notes = here, ()
    elif adapter is not None:
        folder, notes = _base(adapter, recipe)
    else:
        msg = "`model='hf:'` names no folder: give `model='hf:DIR'`, or the folder with -c"
        raise UsageError(msg)
    if not (folder / CONFIG).is_file():
        alone = (folder / ADAPTER).is_file()
        cure = "give the base model, `model='hf:BASE'`, and this folder with `adapter`" if alone else ""
        where = "the folder that has one, and weights elsewhere with -c"
        msg = f"{folder} has no {CONFIG}: {cure or 'give `model=' + repr('hf:DIR') + '`, ' + where}"
        raise LoadError(msg)
    if adapter is not None and not (adapter / ADAPTER).is_file():
        raise LoadError(_no_adapter(adapter))
    weights = checkpoint or str(folder)
    return Place(folder, weights, adapter, adapter or here or folder, notes)


def read_json(file: Path) -> dict[str, Any]:
    """An object of JSON.

    Raises:
        LoadError: the file is none.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        msg = f"{file} is no JSON ({one_line(error, 80)}): fetch it again"
        raise LoadError(msg) from error
    if not isinstance(found, dict):
        msg = f"{file} holds a {type(found).__name__}; an object is needed: fetch it again"
        raise LoadError(msg)
    return found


def run_facts(folder: Path) -> Mapping[str, Any]:
    """What Trainer left beside a checkpoint: step, epoch, and the rate of the last step it logged.

    Its optimizers are of Adam's kind unless told otherwise, which it does not record here; so no limit for plain
    gradient descent is drawn from the rate.
    """
    file = folder / "trainer_state.json"
    if not file.is_file():
        return {}
    state = read_json(file)
    logged = state.get("log_history")
    rates = [one["learning_rate"] for one in logged or () if isinstance(one, dict) and "learning_rate" in one]
    found = {
        "lr": rates[-1] if rates else None,
        "adaptive": True if rates else None,
        "epoch": state.get("epoch"),
        "step": state.get("global_step"),
        "batch_size": state.get("train_batch_size"),
    }
    return {name: value for name, value in found.items() if isinstance(value, int | float)}


def _folder(place: str, recipe: Recipe) -> tuple[Path, tuple[str, ...]]:
    if exists(place):
        path = Path(place)
        if path.is_dir():
            return path, ()
        msg = f"{path} is a file: give its folder, `model='hf:{path.parent}'`, and the file with -c"
        raise LoadError(msg)
    if not ON_HUB.fullmatch(place):
        msg = f"no such folder {place}: give `model='hf:DIR'`, a folder with {CONFIG}"
        raise LoadError(msg)
    return _of_hub(place, recipe)


def _of_hub(name: str, recipe: Recipe) -> tuple[Path, tuple[str, ...]]:
    """The folder of a name on the hub, out of the local cache, or fetched if that is allowed."""
    hub: Any = require("huggingface_hub", "hf", f"hf:{name}")
    fetched = recipe.allow_download
    try:
        found = hub.snapshot_download(name, allow_patterns=list(FETCHED), local_files_only=not fetched)
    except Exception as error:  # what a cache or a network can do is many classes
        if fetched:
            msg = f"hf:{name} could not be fetched: {type(error).__name__}: {one_line(error, 120)}"
        else:
            msg = f"no folder {name} here, nor in the cache: `allow_download=True` fetches it from huggingface.co"
        raise LoadError(msg) from error
    how = "fetched from huggingface.co" if fetched else "taken from the cache"
    return Path(found), (f"{name} was {how}: {found}",)


def _base(adapter: Path, recipe: Recipe) -> tuple[Path, tuple[str, ...]]:
    """The base model that an adapter names."""
    name = read_json(adapter / ADAPTER).get("base_model_name_or_path") if (adapter / ADAPTER).is_file() else None
    if not isinstance(name, str) or not name:
        msg = f"{adapter} does not name its base model: give `model='hf:BASE'`"
        raise LoadError(msg)
    try:
        folder, notes = _folder(name, recipe)
    except LoadError as error:
        msg = f"{adapter} is an adapter of {name}, which is not here: give `model='hf:BASE'` ({error})"
        raise LoadError(msg) from error
    return folder, (*notes, f"the base model {name} is named by {adapter / ADAPTER}")


def _no_adapter(folder: Path) -> str:
    below = sorted(file.parent.name for file in folder.glob(f"*/{ADAPTER}"))
    if below:
        names = ", ".join(f"`adapter='{folder / name}'`" for name in below)
        return f"`adapter='{folder}'`: it holds several adapters, choose one: {names}"
    return f"`adapter='{folder}'` has no {ADAPTER}: give the folder that PEFT's save_pretrained wrote"
