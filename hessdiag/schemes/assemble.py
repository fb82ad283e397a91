"""A factory, or a model, data and a loss by name -> `Problem`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from hessdiag.errors import HessdiagError, RaisedError, UsageError, one_line
from hessdiag.problem import Problem
from hessdiag.schemes.address import Address
from hessdiag.schemes.contract import NamedModel, Resolved, Rows
from hessdiag.schemes.known import examples, plugin, schemes
from hessdiag.schemes.losses import loss_of
from hessdiag.schemes.recipe import Recipe
from hessdiag.sources.factory import Built, build_problem
from hessdiag.sources.hyperparameters import SWAPPED, averaged
from hessdiag.sources.saved_optimizer import SavedOptimizer
from hessdiag.sources.weights import Weights, load_into, read_weights

TRAIN = "train"


def build(recipe: Recipe, checkpoint: str | None = None) -> Built:
    """The problem of a recipe, with a checkpoint in it.

    Args:
        recipe: a factory, or a model, data and a loss by name.
        checkpoint: file, folder or ``file::entry``; None where the model's name says it, or for a new model.

    Raises:
        HessdiagError: a name leads nowhere, or what is there does not fit together; one line.
    """
    recipe.check(checkpoint)
    if recipe.use_ema:
        checkpoint = _averages_of(recipe, checkpoint)
    if recipe.factory is None:
        built = _assemble(recipe, checkpoint)
    else:
        built = build_problem(
            recipe.factory,
            checkpoint=checkpoint,
            options=recipe.options,
            app_dir=recipe.app_dir,
            trust_pickle=recipe.trust_pickle,
        )
    where = checkpoint or (built.weights.file if built.weights else None)
    if where is not None and built.problem.optimizer is None and not _are_averages(built.weights):
        built.problem.optimizer = SavedOptimizer(where, recipe.trust_pickle)  # read where it is asked for
    return built


def _assemble(recipe: Recipe, checkpoint: str | None) -> Built:
    rows = read_data(recipe)
    with _said(f"model={recipe.model!r}"):
        named = _model(recipe, checkpoint)
    data = dict(named.data or {})
    for split, one in rows.items():
        with _said(one.text):
            data[split] = named.prepare(one)
    if not data:
        offered = ", ".join(examples("data").values())
        msg = f"`model={recipe.model!r}`: no data; give `data`, allowed: {offered}"
        raise UsageError(msg)
    if named.settle is not None:
        with _said(f"model={recipe.model!r}"):
            named = named.settle(data)
    resolved = [
        *named.resolved,
        *(Resolved(f"data[{split}]", one.text, "as asked") for split, one in rows.items()),
    ]
    named, loss_source = _with_loss(named, recipe)
    problem = Problem(
        named.model,
        data,
        criterion=named.criterion,
        forward=named.forward,
        loss=named.loss,
        loss_chosen=recipe.loss is not None,
        params=named.params,
        metric=named.metric,
        meta=dict(named.meta),
        weight=named.weight,
    )
    resolved.append(Resolved("loss", problem.loss_name, loss_source))
    notes, weights = list(named.notes), named.weights
    if weights is None and checkpoint is not None and not named.loaded:
        weights = read_weights(checkpoint, trust_pickle=recipe.trust_pickle)
    if weights is not None:
        notes += weights.notes
        notes += _of_averages(weights)
        notes += () if named.loaded else load_into(problem.bare_model(), weights)
    elif not named.loaded:
        notes.append("no checkpoint given: the model as it is initialised")
    if weights is not None:
        resolved.append(
            Resolved("weights", weights.file + (f"::{weights.key}" if weights.key else ""), "as asked")
        )
    return Built(problem, weights, tuple(notes), tuple(resolved))


def _averages_of(recipe: Recipe, checkpoint: str | None) -> str:
    if checkpoint is None:
        msg = "`use_ema=True` takes the averaged weights of a checkpoint: give it, -c FILE"
        raise UsageError(msg)
    return averaged(checkpoint, trust_pickle=recipe.trust_pickle)


def _are_averages(weights: Weights | None) -> bool:
    """Whether they are averages: the optimizer's state beside them is that of the weights it moved, not theirs."""
    return weights is not None and weights.key in weights.averages


def _of_averages(weights: Weights) -> list[str]:
    names = ", ".join(name.removesuffix("::module.") for name in weights.averages)
    if not names:
        return []
    if not _are_averages(weights):
        return [f"{weights.file} also holds averaged weights ({names}): `use_ema=True` takes them"]
    last = SWAPPED[1] if weights.key == "state_dict" else ""
    way_out = f"; the last ones are -c {weights.file}::{last}" if last else ""
    return [f"averaged weights, with BatchNorm's statistics as the file holds them for the averages{way_out}"]


def read_data(recipe: Recipe) -> dict[str, Rows]:
    """The rows of every split that is named.

    Raises:
        HessdiagError: an address leads nowhere, or does not say which of its splits is meant.
    """
    found: dict[str, Rows] = {}
    for split, address in recipe.data_addresses.items():
        options = dict(address.options)
        wanted = options.pop("split", None)
        with _said(address.text):
            splits = _rows(replace(address, options=options), recipe)
        if split is None and wanted is None:
            found |= {name or TRAIN: rows for name, rows in splits.items() if (name or TRAIN) not in found}
            continue
        names = [str(name) for name in splits if name is not None]
        chosen = wanted or split
        if chosen in splits:
            found[split or TRAIN] = splits[chosen]
        elif len(splits) == 1 and wanted is None:
            found[str(split)] = next(iter(splits.values()))
        else:
            msg = (
                f"{address.text} has no split {chosen!r}; allowed: {', '.join(names) or 'none'}: give ?split=NAME"
            )
            raise UsageError(msg)
    return found


def _rows(address: Address, recipe: Recipe) -> Mapping[str | None, Rows]:
    scheme = schemes("data")[address.scheme]
    if scheme.entry is None:
        rows: Mapping[str | None, Rows] = scheme.load().read(address, recipe)
        return rows
    given = plugin(scheme)(address.place, **address.options)
    splits = given if isinstance(given, Mapping) else {None: given}
    return {name: Rows("ready", data, address.text) for name, data in splits.items()}


def _model(recipe: Recipe, checkpoint: str | None) -> NamedModel:
    address = recipe.model_address
    scheme = schemes("models")[address.scheme]
    if scheme.entry is None:
        named: NamedModel = scheme.load().build(address, recipe, checkpoint)
        return named
    given = plugin(scheme)(address.place, checkpoint=checkpoint, **{**address.options, **recipe.options})
    if isinstance(given, NamedModel):
        return given
    if isinstance(given, nn.Module):
        return NamedModel(model=given)
    msg = f"`model={recipe.model!r}` gave {type(given).__name__}: the entry point must return an nn.Module"
    raise UsageError(msg)


def _with_loss(named: NamedModel, recipe: Recipe) -> tuple[NamedModel, str]:
    if recipe.loss is not None:
        chosen = loss_of(recipe.loss, recipe.app_dir)
        return replace(named, criterion=chosen, loss=None, weight=None), "as asked"
    if named.criterion is None and named.loss is None:
        msg = f"`model={recipe.model!r}` has no loss of its own: give `loss='cross_entropy'`, or 'mse'"
        raise UsageError(msg)
    return named, "the model's own"


@contextmanager
def _said(what: str) -> Iterator[None]:
    """Whatever a library raises is one line that says whose it was."""
    try:
        yield
    except (HessdiagError, KeyboardInterrupt):
        raise
    except BaseException as error:  # libraries raise what they like, SystemExit too
        msg = f"{what}: {type(error).__name__}: {one_line(error, 200)}"
        raise RaisedError(msg) from error
