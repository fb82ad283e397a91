"""``torchvision:NAME``, or ``torchvision:NAME@WEIGHTS`` for weights of its own that lie in the local cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlparse

import torch
from torch import nn

from hessdiag.errors import LoadError, UsageError
from hessdiag.schemes.address import Address
from hessdiag.schemes.contract import NamedModel, Resolved, Rows, plainly
from hessdiag.schemes.known import require
from hessdiag.schemes.models.classes import check_classes, classes_of
from hessdiag.schemes.models.library import created, name_in, near
from hessdiag.schemes.models.segmentation import Masked, loss_of_segmentation
from hessdiag.schemes.models.torchvision_training import ARGS, Training, training_of
from hessdiag.schemes.models.transformed import Transformed, on_one_line
from hessdiag.schemes.recipe import Recipe
from hessdiag.sources.weights import Weights, read_weights

WAY_OUT = "write a factory that returns a Problem with loss=f(model, batch)"
OTHERS = {"detection": "detection", "video": "video", "optical_flow": "optical flow", "quantization": "integers"}
HEADS = {"googlenet": "aux1.", "inception_v3": "AuxLogits."}
"""Models with a head that takes part in training alone, and how its names begin."""
TRAINED_ONLY = ("!AuxLogits.*", "!aux1.*", "!aux2.*")
CLASSES = "num_classes"


@dataclass(frozen=True)
class Named:
    """What the address says.

    Attributes:
        name: of the model.
        enum: one of torchvision's sets of weights, None where none is named.
        segmenting: whether it segments; else it classifies.
    """

    name: str
    enum: Any
    segmenting: bool


def build(address: Address, recipe: Recipe, checkpoint: str | None) -> NamedModel:
    """The model of a name.

    Args:
        address: ``torchvision:resnet18``; ``torchvision:`` where the checkpoint's ``args`` say it, as those of
            torchvision's reference scripts do.
        recipe: options are keyword arguments of the model.
        checkpoint: weights; the number of classes is taken from their last layer.

    Raises:
        UsageError: no such model or weights, or one that does neither classify nor segment.
        LoadError: the checkpoint cannot be read, or the model's own weights are not in the cache.
    """
    weights = None if checkpoint is None else read_weights(checkpoint, trust_pickle=recipe.trust_pickle)
    args = {} if weights is None else weights.kept.get("args", {})
    place, _, enum = address.place.partition("@")
    name = name_in(address, args, checkpoint)
    segmenting = _segments(name)
    which = Named(name, _enum(name, enum) if enum else None, segmenting)
    options: dict[str, Any] = {**address.options, **recipe.options}
    resolved = [Resolved("model", f"torchvision {name}", address.text if place else ARGS)]
    notes: list[str] = []
    if weights is None and which.enum is not None:
        file = _cached(which.enum, recipe)
        model = _created(which, {**options, "weights": which.enum})
        weights = read_weights(file)
        notes.append(f"torchvision's own weights {which.enum.name}")
    else:
        model, more = _fitted(which, options, weights)
        resolved += more
    training = training_of(args, segmenting=segmenting)
    named = NamedModel(
        model=model,
        weights=weights,
        loaded=checkpoint is None and weights is not None,
        params=_measured(model, name, notes),
        notes=(*notes, *training.notes),
        resolved=tuple(resolved),
        **(loss_of_segmentation(model) if segmenting else {"criterion": training.loss}),
    )
    return _prepared(named, which, training)


def _torchvision() -> ModuleType:
    return require("torchvision", "vision", "torchvision:NAME")


def _segments(name: str) -> bool:
    """Whether it segments; a model that neither segments nor classifies is refused."""
    models = _torchvision().models
    if name in models.list_models(module=models.segmentation):
        return True
    known = models.list_models(module=models)
    if name in known:
        return False
    for room, what in OTHERS.items():
        if name in models.list_models(module=getattr(models, room)):
            msg = f"torchvision {name} is a model of {what}, whose loss has no name here: {WAY_OUT}"
            raise UsageError(msg)
    hint = near(name, models.list_models(), "torchvision.models.list_models() lists them")
    msg = f"torchvision has no model {name!r}; {hint}"
    raise UsageError(msg)


def _enum(name: str, enum: str) -> Any:
    known = _torchvision().models.get_model_weights(name)
    if enum not in known.__members__:
        msg = f"torchvision {name} has no weights {enum!r}; allowed: {', '.join(known.__members__) or 'none'}"
        raise UsageError(msg)
    return known[enum]


def _cached(enum: Any, recipe: Recipe) -> str:
    """The file of a set of weights."""
    file = Path(torch.hub.get_dir(), "checkpoints", Path(urlparse(enum.url).path).name)
    if not file.exists() and recipe.allow_download:
        torch.hub.load_state_dict_from_url(enum.url, progress=False, check_hash=True, weights_only=True)
    if not file.exists():
        msg = f"{file} is not there: the weights {enum.name} are fetched with `allow_download=True` only"
        raise LoadError(msg)
    return str(file)


def _fitted(which: Named, options: Mapping[str, Any], weights: Weights | None) -> tuple[nn.Module, list[Resolved]]:
    """The model with as many classes as the checkpoint's last layer, and its auxiliary head where it has one."""
    given, resolved = dict(options), list[Resolved]()
    head = "aux_classifier." if which.segmenting else HEADS.get(which.name)
    option = "aux_loss" if which.segmenting else "aux_logits"
    if weights is not None and head and option not in given:
        given[option] = any(f".{head}" in f".{key}" for key in weights.state)
        resolved.append(Resolved(option, str(given[option]).lower(), "names in the checkpoint"))
    model = _created(which, given)
    if weights is not None and CLASSES not in given:
        found = classes_of(weights.state, model)
        if found is not None:
            model = _created(which, {**given, CLASSES: found})
            resolved.append(Resolved(CLASSES, str(found), "last layer of the checkpoint"))
    return model, resolved


def _created(which: Named, options: Mapping[str, Any]) -> nn.Module:
    given: dict[str, Any] = {"weights": None, **options}
    if isinstance(given["weights"], str):
        msg = f"weights={given['weights']} is not taken here: name them, torchvision:{which.name}@WEIGHTS"
        raise UsageError(msg)
    if which.segmenting:
        given["weights_backbone"] = None
    if which.name in HEADS and given["weights"] is None:
        given["init_weights"] = False  # it warns that its initialisation is slow, and takes minutes
    make = partial(_torchvision().models.get_model, which.name, **given)
    return created(f"torchvision {which.name}", options, make)


def _measured(model: nn.Module, name: str, notes: list[str]) -> tuple[str, ...]:
    """Globs on the parameters that take part; a head that only training asks has no curvature."""
    if name not in HEADS:
        return ("*",)
    if not getattr(model, "transform_input", True):
        notes.append("transform_input=false; give -P transform_input=true if torchvision's weights were refined")
    names = [parameter for parameter, _ in model.named_parameters()]
    aside = [glob for glob in TRAINED_ONLY if any(one.startswith(glob[1:-1]) for one in names)]
    if aside:
        notes.append("the loss is that of the main output; the auxiliary heads take part in training alone")
    return tuple(aside) or ("*",)


def _prepared(named: NamedModel, which: Named, training: Training) -> NamedModel:
    """The model with the transforms of its weights or its training script; else pixels in [0, 1] and a note."""
    said = dict[str, None]()
    source, transform = ARGS, training.transform
    if which.enum is not None:
        source, transform = which.enum.name, which.enum.transforms()

    def prepare(rows: Rows) -> Any:
        note = (
            check_classes(rows, _classes(named.model), f"torchvision {which.name}")
            if not which.segmenting
            else None
        )
        said.update({note: None} if note else {})
        if rows.kind != "images":
            return plainly(rows)
        asked = [key for key in ("size", "mean", "std") if rows.options.get(key) is not None]
        if which.segmenting:
            return Masked(rows, transform if not asked else None, said)
        if transform is not None and not asked:
            return Transformed(rows.rows, transform)
        if not {"mean", "std"} & set(asked):
            said[UNKNOWN.format(rows.text)] = None
        return plainly(replace(rows, rows=Transformed(rows.rows)))

    def settle(data: Mapping[str, Any]) -> NamedModel:
        used = [one.transform for one in data.values() if getattr(one, "transform", None) is not None]
        resolved = [Resolved("transforms", on_one_line(one), source) for one in used[:1]]
        return replace(named, notes=(*named.notes, *said), resolved=(*named.resolved, *resolved))

    return replace(named, prepare=prepare, settle=settle)


UNKNOWN = (
    "{}: no normalisation is known, pixels are in [0, 1]; give that of training: ?mean=[0.485,0.456,0.406]&"
    "std=[0.229,0.224,0.225] is ImageNet's"
)


def _classes(model: nn.Module) -> int:
    """Outputs of the last layer; 0 where it is none of the usual."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    last = layers[-1] if layers else None
    return last.out_features if isinstance(last, nn.Linear) else last.out_channels if last is not None else 0
