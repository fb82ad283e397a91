"""``torchvision:NAME``, or ``torchvision:NAME@WEIGHTS`` for weights of its own that lie in the local cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn

from hessdiag.errors import LoadError, UsageError, one_line
from hessdiag.schemes.address import Address
from hessdiag.schemes.contract import NamedModel, Resolved, Rows, plainly
from hessdiag.schemes.models.classes import check_classes, classes_of
from hessdiag.schemes.models.segmentation import AUXILIARY, IGNORED, auxiliary_loss, masks
from hessdiag.schemes.models.transformed import Transformed
from hessdiag.schemes.recipe import Recipe
from hessdiag.sources.weights import Weights, read_weights

WAY_OUT = "write a factory that returns a Problem with loss=f(model, batch)"
OTHERS = {"detection": "detections", "video": "clips", "optical_flow": "flows", "quantization": "integers"}
TRAINED_ONLY = ("!AuxLogits*", "!aux1*", "!aux2*")  # heads of Inception and GoogLeNet that evaluation leaves out


def build(address: Address, recipe: Recipe, checkpoint: str | None) -> NamedModel:
    """The model of a name.

    Raises:
        UsageError: no such model or weights, or one that does not classify.
        LoadError: its own weights are not in the cache.
    """
    name, _, enum = address.place.partition("@")
    segmenting = _kind(name)
    own = _own_weights(name, enum, recipe) if enum else None
    options: dict[str, Any] = {**address.options, **recipe.options}
    resolved = [Resolved("model", f"torchvision {name}", address.text)]
    file = checkpoint or (own and own[1])
    weights = read_weights(file, trust_pickle=recipe.trust_pickle) if file else None
    model, more = _fitted(name, options, weights, segmenting=segmenting)
    resolved += more
    notes: list[str] = []
    transform = own[0].transforms() if own is not None else None
    if transform is None:
        notes.append("images are scaled to [0, 1] and not normalised, unless the data say mean= and std=")
    else:
        resolved.append(Resolved("transforms", " ".join(str(transform).split()), enum))
    if own is not None and checkpoint is None:
        notes.append(f"torchvision's own weights {enum}")
    loss = _segmentation(model) if segmenting else {"criterion": "cross_entropy"}
    aside = tuple(
        glob for glob in TRAINED_ONLY if any(n.startswith(glob[1:-1]) for n, _ in model.named_parameters())
    )
    if aside:
        notes.append("auxiliary heads take no part in evaluation and are left out")
    return NamedModel(
        model=model,
        prepare=_preparation(model, transform, segmenting=segmenting),
        weights=weights if checkpoint is None else None,
        params=aside or ("*",),
        notes=tuple(notes),
        resolved=tuple(resolved),
        **loss,
    )


def _kind(name: str) -> bool:
    """Whether it segments; a model that neither segments nor classifies is refused."""
    models = torchvision.models
    if name in models.list_models(module=models.segmentation):
        return True
    if name in models.list_models(module=models):
        return False
    for room, what in OTHERS.items():
        if name in models.list_models(module=getattr(models, room)):
            msg = f"torchvision {name} is of {what}: classification and segmentation have names here; {WAY_OUT}"
            raise UsageError(msg)
    near = get_close_matches(name, models.list_models(), 3)
    hint = f"did you mean {', '.join(near)}?" if near else "resnet18 is one"
    msg = f"torchvision has no model {name!r}; {hint}"
    raise UsageError(msg)


def _own_weights(name: str, enum: str, recipe: Recipe) -> tuple[Any, str]:
    """One of torchvision's sets of weights, and its file in the cache."""
    known = torchvision.models.get_model_weights(name)
    if enum not in known.__members__:
        msg = f"torchvision {name} has no weights {enum!r}; allowed: {', '.join(known.__members__) or 'none'}"
        raise UsageError(msg)
    chosen = known[enum]
    file = Path(torch.hub.get_dir(), "checkpoints", chosen.url.rpartition("/")[2])
    if not file.exists() and recipe.allow_download:
        torch.hub.load_state_dict_from_url(chosen.url, progress=False, check_hash=True, weights_only=True)
    if not file.exists():
        msg = f"{file} is not there: the weights {enum} are fetched with `allow_download=True` only"
        raise LoadError(msg)
    return chosen, str(file)


def _fitted(
    name: str, options: Mapping[str, Any], weights: Weights | None, *, segmenting: bool
) -> tuple[nn.Module, list[Resolved]]:
    """The model with as many classes as the checkpoint's last layer, and its auxiliary head where it has one."""
    given, resolved = dict(options), list[Resolved]()
    if weights is not None and segmenting and "aux_loss" not in given:
        given["aux_loss"] = any(key.startswith(AUXILIARY) for key in weights.state)
        resolved.append(Resolved("auxiliary loss", str(given["aux_loss"]).lower(), "names in the checkpoint"))
    model = _created(name, given, segmenting=segmenting)
    if weights is not None and "num_classes" not in given:
        found = classes_of(weights.state, model)
        if found is not None:
            model = _created(name, {**given, "num_classes": found}, segmenting=segmenting)
            resolved.append(Resolved("classes", str(found), "last layer of the checkpoint"))
    return model, resolved


def _created(name: str, options: Mapping[str, Any], *, segmenting: bool) -> nn.Module:
    quiet = {"weights_backbone": None} if segmenting else {}
    if name in ("googlenet", "inception_v3"):
        quiet["init_weights"] = False  # a warning otherwise
    try:
        model: nn.Module = torchvision.models.get_model(name, weights=None, **{**quiet, **options})
    except Exception as error:  # a model's constructor raises what it likes
        given = ", ".join(f"{key}={value}" for key, value in options.items()) or "no options"
        msg = f"torchvision {name} with {given}: {type(error).__name__}: {one_line(error, 160)}"
        raise UsageError(msg) from error
    return model


def _segmentation(model: nn.Module) -> dict[str, Any]:
    if getattr(model, "aux_classifier", None) is not None:
        return {"loss": auxiliary_loss, "weight": lambda batch: float((batch[1] != IGNORED).sum())}
    return {"criterion": nn.CrossEntropyLoss(ignore_index=IGNORED), "forward": _out}


def _out(model: nn.Module, batch: Any) -> Tensor:
    result: Tensor = model(batch[0])["out"]
    return result


def _preparation(
    model: nn.Module, transform: Callable[[Any], Any] | None, *, segmenting: bool
) -> Callable[[Rows], Any]:
    def prepare(rows: Rows) -> Any:
        if rows.kind != "images":
            return plainly(rows)
        if segmenting:
            return masks(rows)
        linear = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        check_classes(
            rows, getattr(linear[-1], "out_features", getattr(linear[-1], "out_channels", 0)), "the model"
        )
        said = any(rows.options.get(key) is not None for key in ("size", "mean", "std"))
        return plainly(rows) if transform is None or said else Transformed(rows.rows, transform)

    return prepare
