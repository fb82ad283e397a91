"""The library's model of a configuration, with the weights of a checkpoint in it: all of them, or a refusal."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from hessdiag.errors import LoadError, one_line
from hessdiag.schemes.known import require
from hessdiag.schemes.models.hf.tasks import Task
from hessdiag.sources.weights import Weights, load_into, read_weights

ATTENTION = "eager"  # the formula written out, of experts too: its second derivatives are torch's own


def model_of(config: Any, task: Task, *, architecture: str, trust_remote_code: bool) -> nn.Module:
    """A model as the library initialises it, in float32: lower precision has no second derivatives worth having.

    Raises:
        LoadError: the library builds another class, or none.
    """
    auto = getattr(require("transformers", "hf", "hf:DIR"), task.auto)
    if hasattr(config, "use_cache"):
        config.use_cache = False  # of past tokens, for generation
    if hasattr(config, "_experts_implementation"):
        config._experts_implementation = ATTENTION
    options = {"dtype": _dtype(config), "attn_implementation": ATTENTION, "trust_remote_code": trust_remote_code}
    try:
        model: nn.Module = auto.from_config(config, **options)
    except Exception as error:  # a model's constructor can raise anything
        msg = f"{architecture} cannot be built from config.json ({type(error).__name__}: {one_line(error, 160)})"
        raise LoadError(msg) from error
    if type(model).__name__ != architecture:
        msg = f"config.json: its architecture is {architecture}, the library builds {type(model).__name__} from it"
        raise LoadError(msg)
    return model.eval()


def loaded(
    model: nn.Module, config: Any, path: str, *, trust_pickle: bool
) -> tuple[nn.Module, Weights, list[str]]:
    """A model with the weights of a checkpoint in it, and what the user should know of that.

    Weights that the library writes under other names or in other pieces than its modules have (experts, say) are
    put together by the library itself, from the tensors read here; then too, none may be missing or left over.

    Raises:
        LoadError: the weights do not fit.
    """
    weights = read_weights(path, trust_pickle=trust_pickle)
    try:
        return model, weights, list(load_into(model, weights))
    except LoadError:
        converted = _converted(model, config, weights)
        if converted is None:
            raise
        note = f"put together by transformers, as its {type(model).__name__} is saved"
        return converted, weights, [note]


def _converted(model: nn.Module, config: Any, weights: Weights) -> nn.Module | None:
    options = {"dtype": _dtype(config), "attn_implementation": ATTENTION, "local_files_only": True}
    options |= {"config": config, "state_dict": dict(weights.state), "output_loading_info": True}
    load: Any = type(model).from_pretrained  # type: ignore[attr-defined]
    try:
        found, said = load(None, **options)
    except Exception:  # the refusal by names says more
        return None
    wrong = any(said.get(name) for name in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    result: nn.Module = found.eval()
    return None if wrong else result


def _dtype(config: Any) -> torch.dtype:
    return torch.float64 if str(getattr(config, "dtype", "")) in ("torch.float64", "float64") else torch.float32
