"""``timm:NAME``, or ``timm:`` where the checkpoint's own arguments name the model."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

import timm
from timm.data import create_transform, resolve_data_config
from torch import nn

from hessdiag.errors import UsageError, one_line
from hessdiag.schemes.address import Address
from hessdiag.schemes.contract import NamedModel, Resolved, Rows, plainly
from hessdiag.schemes.models.classes import check_classes, classes_of
from hessdiag.schemes.models.transformed import Transformed
from hessdiag.schemes.recipe import Recipe
from hessdiag.sources.hyperparameters import hyperparameters
from hessdiag.sources.weights import read_weights

ARGS = "args of the checkpoint"
OF_DATA = ("input_size", "img_size", "in_chans", "mean", "std", "interpolation", "crop_pct", "crop_mode")
"""What timm's training script takes its transforms from, beside the model's own configuration."""
OF_MODEL = {"num_classes": "num_classes", "in_chans": "in_chans", "gp": "global_pool"}
MIXED = ("mixup", "cutmix", "jsd_loss", "bce_loss")


def build(address: Address, recipe: Recipe, checkpoint: str | None) -> NamedModel:
    """The model of a name, with timm's own transforms.

    Raises:
        UsageError: no such model, or options that it does not take.
    """
    args = hyperparameters(checkpoint, ("args",), trust_pickle=recipe.trust_pickle) if checkpoint else {}
    name = address.place or str(args.get("model") or "")
    if not name:
        where = f"{checkpoint} holds no args with a model" if checkpoint else "no checkpoint is given"
        msg = f"{address.text}: {where}; name the model, timm:resnet18"
        raise UsageError(msg)
    _require_known(name)
    options = {to: args[of] for of, to in OF_MODEL.items() if args.get(of) is not None}
    options |= args.get("model_kwargs") or {}
    options |= {**address.options, **recipe.options}
    pretrained = checkpoint is None and recipe.allow_download
    model = _created(name, options, pretrained)
    resolved = [Resolved("model", f"timm {name}", address.text if address.place else ARGS)]
    if checkpoint is not None and "num_classes" not in options:
        found = classes_of(read_weights(checkpoint, trust_pickle=recipe.trust_pickle).state, model)
        if found is not None:
            options["num_classes"] = found
            model = _created(name, options, pretrained)
            resolved.append(Resolved("classes", str(found), "last layer of the checkpoint"))
    asked = {*recipe.options, *address.options}
    resolved += [Resolved(key, str(value), "as asked" if key in asked else ARGS) for key, value in options.items()]
    notes = _notes(args, name, pretrained)
    loss, source = _loss(args)
    resolved.append(Resolved("label smoothing", f"{loss.label_smoothing:g}", source))
    own = {key: args[key] for key in OF_DATA if args.get(key) is not None}

    def prepare(rows: Rows) -> Any:
        if rows.kind != "images":
            return plainly(rows)
        check_classes(rows, int(model.num_classes), f"timm {name}")  # type: ignore[arg-type]
        return Transformed(rows.rows, _transform(model, own, rows.options))

    config = resolve_data_config(own, model=model)
    resolved.append(Resolved("transforms", _one_line(_transform(model, own, {})), "timm's data config"))
    return NamedModel(
        model=model,
        loaded=pretrained,
        criterion=loss,
        prepare=prepare,
        notes=tuple(notes),
        resolved=tuple(resolved),
        meta={"input_size": str(tuple(config["input_size"]))},
    )


def _require_known(name: str) -> None:
    if timm.is_model(name.partition(".")[0]):
        return
    near = get_close_matches(name, timm.list_models(), 3)
    hint = (
        f"did you mean {', '.join(near)}?"
        if near
        else "python -c 'import timm; print(timm.list_models())' lists them"
    )
    msg = f"timm has no model {name!r}; {hint}"
    raise UsageError(msg)


def _created(name: str, options: Mapping[str, Any], pretrained: bool) -> nn.Module:
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except Exception as error:  # a model's constructor raises what it likes
        given = ", ".join(f"{key}={value}" for key, value in options.items()) or "no options"
        msg = f"timm {name} with {given}: {type(error).__name__}: {one_line(error, 160)}"
        raise UsageError(msg) from error


def _transform(model: nn.Module, args: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """The transforms of a test; an address's size, mean and std come before the checkpoint's."""
    given = {
        **args,
        **{key: value for key, value in options.items() if value is not None and key in ("mean", "std")},
    }
    for key in ("mean", "std"):
        if key in given and not isinstance(given[key], list | tuple):
            given[key] = (given[key],)
    if options.get("size") is not None:
        given = {key: value for key, value in given.items() if key != "input_size"} | {"img_size": options["size"]}
    config = resolve_data_config(given, model=model)
    return create_transform(**config, is_training=False)


def _loss(args: Mapping[str, Any]) -> tuple[nn.CrossEntropyLoss, str]:
    """The loss that was minimised, as far as it is one of outputs and classes."""
    smoothing = args.get("smoothing")
    known = isinstance(smoothing, float | int) and not any(args.get(name) for name in MIXED)
    return nn.CrossEntropyLoss(label_smoothing=float(smoothing) if known else 0.0), ARGS if known else "default"


def _notes(args: Mapping[str, Any], name: str, pretrained: bool) -> list[str]:
    notes = [f"timm's own weights of {name}"] if pretrained else []
    mixed = [f"{key}={args[key]}" for key in MIXED if args.get(key)]
    if mixed:
        notes.append(f"trained with {', '.join(mixed)}: measured is plain cross-entropy; `loss` takes another")
    elif args.get("smoothing"):
        notes.append(
            f"label smoothing {args['smoothing']:g}, as it was trained with; `loss='cross_entropy'` has none"
        )
    said = args.get("model")
    if said and said != name:
        notes.append(f"the checkpoint says it is a {said}")
    return notes


def _one_line(transform: Any) -> str:
    parts = getattr(transform, "transforms", [transform])
    return ", ".join(" ".join(str(part).split()) for part in parts)
