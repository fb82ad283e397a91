"""``timm:NAME``, or ``timm:`` where the checkpoint's own arguments name the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from types import ModuleType
from typing import Any

from torch import nn

from hessdiag.errors import LoadError, UsageError
from hessdiag.schemes.address import Address
from hessdiag.schemes.contract import NamedModel, Resolved, Rows, plainly
from hessdiag.schemes.known import require
from hessdiag.schemes.models.classes import check_classes, classes_of
from hessdiag.schemes.models.library import created, name_in, near
from hessdiag.schemes.models.timm_training import loss_of_args
from hessdiag.schemes.models.transformed import Transformed, on_one_line
from hessdiag.schemes.pictures import MODES
from hessdiag.schemes.recipe import Recipe
from hessdiag.sources.weights import Weights, load_into, read_weights

ARGS = "args of the checkpoint"
OF_DATA = ("input_size", "img_size", "in_chans", "mean", "std", "interpolation", "crop_pct", "crop_mode")
"""What timm's training script takes its transforms from, beside the model's own configuration."""
OF_MODEL = {"num_classes": "num_classes", "in_chans": "in_chans", "gp": "global_pool", "bn_eps": "bn_eps"}
"""Arguments of timm's training script that change the function, and what `timm.create_model` calls them."""
ELSEWHERE = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
"""Arguments of `timm.create_model` that would load weights by themselves."""
CLASSES = "num_classes"


def build(address: Address, recipe: Recipe, checkpoint: str | None) -> NamedModel:
    """The model of a name, with timm's own transforms for tests.

    Args:
        address: ``timm:resnet18``, or ``timm:`` where the checkpoint's ``args`` say it.
        recipe: options are keyword arguments of ``timm.create_model``.
        checkpoint: as timm's training script saves it, or weights alone.

    Raises:
        UsageError: no such model, or options that it does not take.
        LoadError: the checkpoint cannot be read.
    """
    weights = None if checkpoint is None else read_weights(checkpoint, trust_pickle=recipe.trust_pickle)
    args = {} if weights is None else dict(weights.kept.get("args", {}))
    name = name_in(address, args, checkpoint)
    _require_known(name)
    asked = {**address.options, **recipe.options}
    pretrained = _pretrained(asked, recipe, checkpoint)
    model, options, source = _model(name, args, asked, weights, pretrained=pretrained)
    loss, loss_source, notes = loss_of_args(args)
    notes += [f"timm's own weights of {_tagged(name, model)}"] if pretrained else []
    notes += [] if weights is None else _loaded(model, weights, name)
    named = NamedModel(
        model=model,
        loaded=pretrained or weights is not None,
        weights=weights,
        criterion=loss,
        notes=tuple(notes),
        resolved=(
            Resolved("model", f"timm {name}", address.text if address.place else ARGS),
            *(Resolved(key, str(value), source[key]) for key, value in options.items()),
            Resolved("training loss", loss_source, ARGS if args else "default"),
        ),
    )
    return _prepared(named, name, {key: args[key] for key in OF_DATA if args.get(key) is not None})


def _timm() -> ModuleType:
    return require("timm", "timm", "timm:NAME")


def _require_known(name: str) -> None:
    known = _timm()
    if known.is_model(_base(name)):
        return
    msg = f"timm has no model {name!r}; {near(name, known.list_models(), 'timm.list_models() lists them')}"
    raise UsageError(msg)


def _pretrained(asked: dict[str, Any], recipe: Recipe, checkpoint: str | None) -> bool:
    wanted = asked.pop("pretrained", False)
    if wanted is True and checkpoint is not None:
        msg = f"pretrained=true and {checkpoint}: the weights are those of one of the two, drop the other"
        raise UsageError(msg)
    if wanted is True and not recipe.allow_download:
        msg = "pretrained=true may fetch weights: give `allow_download=True` as well, or a file with -c"
        raise UsageError(msg)
    if own := [key for key in asked if key in ELSEWHERE]:
        msg = f"{own[0]} is not taken here: weights are given with -c FILE"
        raise UsageError(msg)
    return bool(wanted)


def _model(
    name: str, args: Mapping[str, Any], asked: Mapping[str, Any], weights: Weights | None, *, pretrained: bool
) -> tuple[nn.Module, dict[str, Any], dict[str, str]]:
    """The model, its options, and where each is from."""
    own = {to: args[of] for of, to in OF_MODEL.items() if args.get(of) is not None}
    if _base(args.get("model") or name) != _base(name):  # what another model takes besides is not for this one
        args = {}
    inner = args.get("model_kwargs")
    own |= (
        {k: v for k, v in inner.items() if k not in (*ELSEWHERE, "pretrained")} if isinstance(inner, dict) else {}
    )
    size = _size(args)
    if size is not None and "img_size" not in own and getattr(_cfg(name), "fixed_input_size", False):
        own["img_size"] = size
    options = own | dict(asked)
    source = dict.fromkeys(own, ARGS) | dict.fromkeys(asked, "as asked")
    model = _created(name, options, pretrained=pretrained)
    if weights is not None and CLASSES not in asked:
        found = classes_of(weights.state, model)
        if found is not None:
            options[CLASSES], source[CLASSES] = found, "last layer of the checkpoint"
            model = _created(name, options, pretrained=pretrained)
    return model, options, source


def _size(args: Mapping[str, Any]) -> Any:
    whole = args.get("input_size")
    return whole[-1] if isinstance(whole, list | tuple) and len(whole) == 3 else args.get("img_size")


def _cfg(name: str) -> Any:
    try:
        return _timm().get_pretrained_cfg(name)
    except Exception:  # a tag that is none; building the model says so
        return None


def _base(name: Any) -> str:
    """A model's name without the tag of its weights: "resnet50" of "resnet50.a1_in1k"."""
    return str(name).partition(".")[0]


def _tagged(name: str, model: nn.Module) -> str:
    return f"{_base(name)}.{getattr(model, 'pretrained_cfg', {}).get('tag') or 'default'}"


def _created(name: str, options: Mapping[str, Any], *, pretrained: bool) -> nn.Module:
    make = partial(_timm().create_model, name, pretrained=pretrained, **options)
    return created(f"timm {name}", options, make)


def _loaded(model: nn.Module, weights: Weights, name: str) -> list[str]:
    """Put the weights in; a misfit says which model the checkpoint's own arguments name."""
    said = str(weights.kept.get("args", {}).get("model") or name)
    other = _base(said) != _base(name)
    try:
        return [*load_into(model, weights), *([f"the checkpoint's args say it is a {said}"] if other else [])]
    except LoadError as error:
        if not other:
            raise
        msg = f"{weights.file} is of a {said}, by its args, not of a {name}: give `model='timm:'`; {error}"
        raise LoadError(msg) from error


def _prepared(named: NamedModel, name: str, own: Mapping[str, Any]) -> NamedModel:
    """The model with timm's transforms for its images."""
    model, said = named.model, dict[str, None]()

    def prepare(rows: Rows) -> Any:
        classes: Any = getattr(model, CLASSES, 0)
        if classes and (note := check_classes(rows, classes, f"timm {name}")):
            said[note] = None
        if rows.kind != "images":
            said[f"{rows.text}: taken as it is, without timm's transforms"] = None
            return plainly(rows)
        config = _config(model, own, rows)
        return Transformed(rows.rows, _transform(config), MODES.get(config["input_size"][0], "RGB"))

    def settle(data: Mapping[str, Any]) -> NamedModel:
        used = [one.transform for one in data.values() if isinstance(one, Transformed)]
        resolved = [Resolved("transforms", on_one_line(one), "timm's data config") for one in used[:1]]
        return replace(named, notes=(*named.notes, *said), resolved=(*named.resolved, *resolved))

    return replace(named, prepare=prepare, settle=settle)


def _config(model: nn.Module, own: Mapping[str, Any], rows: Rows) -> dict[str, Any]:
    """Timm's data configuration; an address's size, mean and std come before the checkpoint's."""
    said = {key: rows.options[key] for key in ("mean", "std") if rows.options.get(key) is not None}
    given: dict[str, Any] = {**own, **said}
    given.setdefault("in_chans", _channels(model))
    for key in ("mean", "std"):
        if key in given and not isinstance(given[key], list | tuple):
            given[key] = [given[key]]
    if rows.options.get("size") is not None:
        given.pop("input_size", None)
        given["img_size"] = rows.options["size"]
    try:
        found: dict[str, Any] = _timm().data.resolve_data_config(given, model=model)
    except AssertionError as error:
        shown = ", ".join(f"{key}={value}" for key, value in given.items())
        msg = f"{rows.text}: {shown} are no data of this model: one mean and std for each channel, size=224"
        raise UsageError(msg) from error
    channels = found["input_size"][0]
    for key in ("mean", "std"):
        found[key] = tuple(found[key]) if len(found[key]) == channels else tuple(found[key][:1]) * channels
    return found


def _channels(model: nn.Module) -> int:
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    return 3 if first is None else first.in_channels


def _transform(config: Mapping[str, Any]) -> Any:
    return _timm().data.create_transform(**config, is_training=False)
