"""``lightning:package.module:Class``: a LightningModule, made of the checkpoint's own hyper-parameters."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hessdiag.errors import LoadError, ProblemError, UsageError
from hessdiag.schemes.address import Address
from hessdiag.schemes.contract import NamedModel, Resolved
from hessdiag.schemes.models.stand_in_trainer import StandInTrainer, silent
from hessdiag.schemes.recipe import Recipe
from hessdiag.sources.factory import find_function
from hessdiag.sources.hyperparameters import hyperparameters

LOSS = "hessdiag_loss"
WAY_OUT = f"give the class a method {LOSS}(self, batch) that returns the mean loss, or `loss='cross_entropy'`"
HYPER, OF_DATA = "hyper_parameters", "datamodule_hyper_parameters"
INTERNAL = ("_instantiator", "_class_path")
LOADERS = {"train": "train_dataloader", "val": "val_dataloader", "test": "test_dataloader"}


def build(address: Address, recipe: Recipe, checkpoint: str | None) -> NamedModel:
    """The module, its loss and its own data.

    Raises:
        UsageError: the class is no LightningModule, or lacks arguments.
        LoadError: the checkpoint cannot be read.
        ProblemError: its training step needs more than a batch.
    """
    options = {**address.options, **recipe.options}
    datamodule = options.pop("datamodule", None)
    kind = find_function(address.place, recipe.app_dir)
    if not (isinstance(kind, type) and issubclass(kind, nn.Module) and hasattr(kind, "training_step")):
        msg = f"{address.place} is no LightningModule: name the class, lightning:package.module:Class"
        raise UsageError(msg)
    kept = _kept(checkpoint, HYPER, recipe)
    model, used = _made(kind, kept, options, address.place)
    trainer = StandInTrainer()
    model._trainer = trainer  # what `self.trainer` gives, and `self.current_epoch` and `self.logger` ask
    model.log = model.log_dict = silent
    resolved = [Resolved("model", kind.__name__, address.text)]
    resolved += [
        Resolved(name, str(value), "as asked" if name in options else "hyper-parameters of the checkpoint")
        for name, value in used.items()
    ]
    data = _data(model)
    if datamodule is not None:
        module_of_data = find_function(str(datamodule), recipe.app_dir)
        made, _ = _made(module_of_data, _kept(checkpoint, OF_DATA, recipe), {}, str(datamodule))
        data = _set_up(made, recipe)
        trainer.datamodule = made
    return NamedModel(
        model=model,
        loss=_own_loss if hasattr(kind, LOSS) else _step_of(model, kind, recipe),
        data=data or None,
        notes=_notes(kind, recipe),
        resolved=(
            *resolved,
            *(Resolved(f"data[{split}]", _shown(loader), "its own loader") for split, loader in data.items()),
        ),
    )


def _kept(checkpoint: str | None, name: str, recipe: Recipe) -> dict[str, Any]:
    if checkpoint is None:
        return {}
    found = hyperparameters(checkpoint, (name,), trust_pickle=recipe.trust_pickle)
    return {key: value for key, value in found.items() if key not in INTERNAL}


def _made(
    kind: Any, kept: Mapping[str, Any], options: Mapping[str, Any], place: str
) -> tuple[Any, dict[str, Any]]:
    """An object of a class, by what is kept of its arguments and what is asked; what it does not take is left out."""
    parameters = {n: p for n, p in inspect.signature(kind.__init__).parameters.items() if n != "self"}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [name for name in options if name not in parameters and not takes_any]
    if unknown:
        msg = f"{place} takes no argument {unknown[0]!r}; allowed: {', '.join(parameters) or 'none'}"
        raise UsageError(msg)
    given = {name: value for name, value in kept.items() if takes_any or name in parameters} | dict(options)
    if "hparams" in parameters and "hparams" not in given:
        given["hparams"] = dict(kept)
    lacking = [
        name
        for name, p in parameters.items()
        if p.default is p.empty and name not in given and p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    if lacking:
        msg = (
            f"{place} needs {lacking[0]!r}, which the checkpoint's hyper-parameters lack: give -P {lacking[0]}=..."
        )
        raise UsageError(f"{msg} (save_hyperparameters() keeps it)")
    return kind(**given), given


def _own_loss(model: nn.Module, batch: Any) -> Tensor:
    return _scalar(getattr(model, LOSS)(batch), LOSS)


def _step_of(model: Any, kind: type, recipe: Recipe) -> Any:
    """The training step as a loss of model and batch; refused where it moves the weights by itself."""
    if not getattr(model, "automatic_optimization", True) and recipe.loss is None:
        msg = f"{kind.__name__} optimizes by itself (automatic_optimization=False): its step is no loss; {WAY_OUT}"
        raise ProblemError(msg)
    names = [n for n in inspect.signature(kind.training_step).parameters if n != "self"]  # type: ignore[attr-defined]
    rest = [0] * (len(names) - 1)  # batch_idx, dataloader_idx

    def step(model: nn.Module, batch: Any) -> Tensor:
        result = model.training_step(batch, *rest)  # type: ignore[operator]
        loss = result.get("loss") if isinstance(result, Mapping) else result
        return _scalar(loss, "training_step")

    step.__qualname__ = f"{kind.__name__}.training_step"  # how results name the loss
    return step


def _scalar(loss: Any, what: str) -> Tensor:
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss
    kind = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
    msg = f"{what} returned {kind}, no loss of the batch: {WAY_OUT}"
    raise ProblemError(msg)


def _data(model: Any) -> dict[str, Any]:
    """The loaders that the class itself defines."""
    found = {}
    for split, name in LOADERS.items():
        function = getattr(type(model), name, None)
        if function is None or (function.__module__ or "").split(".")[0] in ("pytorch_lightning", "lightning"):
            continue
        found[split] = _one(getattr(model, name)(), f"{type(model).__name__}.{name}")
    return found


def _set_up(module: Any, recipe: Recipe) -> dict[str, Any]:
    """The loaders of a data module, set up as for training and testing; it fetches nothing unless told to."""
    if recipe.allow_download:
        module.prepare_data()
    for stage in ("fit", "test"):
        module.setup(stage)
    return _data(module)


def _one(loader: Any, what: str) -> Any:
    if isinstance(loader, list | tuple) and len(loader) == 1:
        return loader[0]
    if isinstance(loader, list | tuple | Mapping) or loader is None:
        msg = f"{what} gives {type(loader).__name__}, not one loader: name the data with `data`"
        raise LoadError(msg)
    return loader


def _shown(loader: Any) -> str:
    kind = type(getattr(loader, "dataset", loader)).__name__
    return (
        f"{kind} of {len(loader.dataset):,}"
        if hasattr(loader, "dataset") and hasattr(loader.dataset, "__len__")
        else kind
    )


def _notes(kind: type, recipe: Recipe) -> tuple[str, ...]:
    if recipe.loss is not None or hasattr(kind, LOSS):
        return ()
    return (
        "the loss is training_step in evaluation mode: no dropout, running statistics, nothing logged",
        f"G and exact traces need a known loss of the outputs: {WAY_OUT}",
    )
