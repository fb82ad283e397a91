"""``lightning:package.module:Class``: a LightningModule, made of the checkpoint's own hyper-parameters."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hessdiag.errors import HessdiagError, RaisedError, UsageError, one_line
from hessdiag.schemes.address import Address
from hessdiag.schemes.contract import NamedModel, Resolved
from hessdiag.schemes.known import require
from hessdiag.schemes.models.lightning_data import loaders, shown
from hessdiag.schemes.models.lightning_loss import OWN, hooks_of, loss_of_module, overrides
from hessdiag.schemes.models.stand_in_trainer import FAMILIES, StandInTrainer, attach, is_lightning
from hessdiag.schemes.recipe import Recipe
from hessdiag.shown import cut
from hessdiag.sources.factory import find_function, importable
from hessdiag.sources.hyperparameters import OF_DATA
from hessdiag.sources.spec import split_spec
from hessdiag.sources.stand_ins import Foreign, Stateful
from hessdiag.sources.storages import Odd
from hessdiag.sources.weights import Weights, read_weights

HYPER = "hyper_parameters"
NAMES = {HYPER: "hparams_name", OF_DATA: "datamodule_hparams_name"}
"""Where Lightning says which argument all of them were given as; "kwargs" if they were given by name."""
INTERNAL = ("_instantiator", "_class_path")  # of LightningCLI
DATA = "datamodule"
FROM_FILE = "hyper-parameters of the checkpoint"


def build(address: Address, recipe: Recipe, checkpoint: str | None) -> NamedModel:
    """The module, its loss and its own data.

    Args:
        address: ``lightning:package.module:Class`` or ``lightning:path/file.py:Class``.
        recipe: options are arguments of the class, before those of the checkpoint; ``datamodule`` names another
            class, whose loaders are the data.
        checkpoint: as ``trainer.save_checkpoint`` writes it.

    Raises:
        UsageError: the class is no LightningModule, or lacks arguments.
        LoadError: the checkpoint cannot be read.
        ProblemError: its training step needs more than a batch.
    """
    options = {**address.options, **recipe.options}
    kind = _class(address.place, recipe, "LightningModule")
    main = sys.modules.get(kind.__module__)
    weights = None if checkpoint is None else read_weights(checkpoint, trust_pickle=recipe.trust_pickle, main=main)
    trainer = StandInTrainer({} if weights is None else weights.facts)
    named_data = options.pop(DATA, None)
    if named_data is not None and recipe.data:
        msg = (
            f"-P {DATA}={named_data} and `data={recipe.data[0]!r}`: the data are those of one of the two, drop one"
        )
        raise UsageError(msg)
    with importable(split_spec(address.place)[0], recipe.app_dir):
        model, used = _made(kind, _kept(weights, HYPER), options, address.place)
        attach(model, trainer)
        if overrides(model, "configure_model"):
            model.configure_model()
    notes, data = list[str](), dict[str, Any]()
    if not recipe.data:
        source = model
        if named_data is not None:
            source = trainer.datamodule = _data_module(recipe.found(str(named_data)), weights, recipe, trainer)
        with importable(split_spec(address.place)[0], recipe.app_dir):
            data, notes = loaders(source, allow_download=recipe.allow_download)
        if not data:
            _refuse_without_data(address, _kept(weights, HYPER)[0].get(DATA))
    own = recipe.loss is None
    prepared = hooks_of(model, trainer)
    return NamedModel(
        model=model,
        weights=weights,
        data=data or None,
        loss=loss_of_module(model, trainer) if own else None,
        forward=None if own else lambda model, batch: model(prepared(model, batch)[0]),
        notes=(*notes, *_notes(kind, recipe)),
        resolved=(
            Resolved("model", kind.__name__, address.text),
            *(Resolved(name, str(value), source) for name, (value, source) in used.items()),
            *(Resolved(f"data[{split}]", shown(loader), "its own loader") for split, loader in data.items()),
        ),
    )


def _class(place: str, recipe: Recipe, parent: str) -> Any:
    form = f"lightning:package.module:Class or lightning:path/file.py:Class, of a {parent}"
    if find_spec("pytorch_lightning") is None and find_spec("lightning") is None:
        require("pytorch_lightning", "lightning", "lightning:package.module:Class")
    where, _, name = place.rpartition(":")
    if not where or not name.isidentifier():
        msg = f"lightning:{place} names no class: give {form}"
        raise UsageError(msg)
    if where.endswith(".py") and not Path(where).is_file():
        msg = f"{where}: no such Python file; give {form}"
        raise UsageError(msg)
    kind: Any = find_function(place, recipe.app_dir)
    if not isinstance(kind, type) or not is_lightning(kind, parent):
        msg = f"{place} is no {parent}: give {form}"
        raise UsageError(msg)
    return kind


def _kept(weights: Weights | None, entry: str) -> tuple[dict[str, Any], str]:
    """Hyper-parameters by name, and the argument that takes all of them; "" where each is an argument."""
    found = {} if weights is None else weights.kept.get(entry, {})
    plain = {key: value for key, value in found.items() if key not in INTERNAL and not _is_left_out(value)}
    bag = "" if weights is None else str(weights.facts.get(NAMES[entry], ""))
    return plain, "" if bag == "kwargs" else bag


def _is_left_out(value: Any) -> bool:
    """Whether a value is a stand-in for what a safe reading does not make."""
    return isinstance(value, Foreign | Odd) or (isinstance(value, Stateful) and not isinstance(value, dict))


def _made(
    kind: Any, kept: tuple[Mapping[str, Any], str], options: Mapping[str, Any], place: str
) -> tuple[Any, dict[str, tuple[Any, str]]]:
    """An object of a class, by what is asked and what is kept of its arguments, and where each is from."""
    held, bag = kept
    parameters = {name: p for name, p in inspect.signature(kind.__init__).parameters.items() if name != "self"}
    named = {n: p for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    bag = bag if bag in named else "hparams" if "hparams" in named and "hparams" not in held else ""
    unknown = [name for name in options if name not in named and not takes_any and not bag]
    if unknown:
        msg = f"{place} takes no argument {unknown[0]!r}; allowed: {', '.join(named) or 'none'}"
        raise UsageError(msg)
    source = {name: (value, FROM_FILE) for name, value in held.items() if takes_any or bag or name in named}
    used = source | {name: (value, "as asked") for name, value in options.items()}
    given = {name: value for name, (value, _) in used.items()}
    if bag:
        inside = {name: value for name, value in given.items() if name not in named}
        given = {name: value for name, value in options.items() if name in named}
        given.setdefault(bag, _attributes(kind, inside))
    lacking = [n for n, p in named.items() if p.default is p.empty and n not in given]
    if lacking:
        has = f"the checkpoint's hyper-parameters are {', '.join(held)}" if held else "no checkpoint says it"
        msg = f"{place} needs {lacking[0]!r}, {has}: give -P {lacking[0]}=... (save_hyperparameters() keeps it)"
        raise UsageError(msg)
    try:
        return kind(**given), used
    except (HessdiagError, KeyboardInterrupt):
        raise
    except BaseException as error:  # the user's constructor can raise anything
        shown_as = ", ".join(f"{name}={value!r}" for name, value in given.items())
        msg = f"{cut(f'{place}({shown_as})', 200)} raised {type(error).__name__}: {one_line(error, 200)}"
        raise RaisedError(msg) from error


def _attributes(kind: type, values: Mapping[str, Any]) -> Any:
    """Hyper-parameters as Lightning keeps them, read by ``hparams.width`` and ``hparams["width"]`` alike."""
    family = next(name for name in FAMILIES if any(one.__module__.startswith(name) for one in kind.__mro__))
    return import_module(f"{family}.utilities.parsing").AttributeDict(values)


def _data_module(place: str, weights: Weights | None, recipe: Recipe, trainer: StandInTrainer) -> Any:
    kind = _class(place, recipe, "LightningDataModule")
    with importable(split_spec(place)[0], recipe.app_dir):
        made, _ = _made(kind, _kept(weights, OF_DATA), {}, place)
    made.trainer = trainer
    return made


def _refuse_without_data(address: Address, said: Any) -> None:
    """Code is named by the user alone: what the checkpoint calls its data module is shown, and not imported."""
    named = isinstance(said, str) and said.isprintable()
    hint = f"; its hyper-parameters name {said}: -P {DATA}={said}, if you trust that" if named else ""
    msg = f"{address.text} has no loaders of its own: give `data`, or -P {DATA}=package.module:Data{hint}"
    raise UsageError(msg)


def _notes(kind: type, recipe: Recipe) -> list[str]:
    if recipe.loss is not None:
        return []
    if hasattr(kind, OWN):
        return [f"the loss is {kind.__name__}.{OWN}, in evaluation mode"]
    return [
        "the loss is training_step in evaluation mode: no dropout, running statistics, nothing logged",
        "`loss='cross_entropy'` of what forward returns has G and exact traces too, if the step minimises that",
    ]
