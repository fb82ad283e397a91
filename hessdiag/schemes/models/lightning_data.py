"""The data of a LightningModule: its own loaders, or those of a data module."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hessdiag.errors import HessdiagError, LoadError, RaisedError, one_line
from hessdiag.schemes.models.lightning_loss import overrides

LOADERS = {"train": "train_dataloader", "val": "val_dataloader", "test": "test_dataloader"}
STAGES = {"fit": ("train", "val"), "test": ("test",)}


def loaders(source: Any, *, allow_download: bool) -> tuple[dict[str, Any], list[str]]:
    """The loaders by split, set up as Lightning does: for training first, then for testing.

    Args:
        source: a LightningModule or a LightningDataModule.
        allow_download: call its ``prepare_data``, which is where data are fetched.

    Returns:
        The loaders, and a note for each split that could not be made beside the training data.

    Raises:
        RaisedError: the training data cannot be made.
        LoadError: a method gives no single loader.
    """
    found, notes = dict[str, Any](), list[str]()
    if not any(overrides(source, name) for name in LOADERS.values()):
        return found, notes
    kind = type(source).__name__
    if allow_download and overrides(source, "prepare_data"):
        source.prepare_data()
    for stage, splits in STAGES.items():
        names = [split for split in splits if overrides(source, LOADERS[split])]
        if not names:
            continue
        try:
            if overrides(source, "setup"):
                source.setup(stage)
            found |= {
                split: _one(getattr(source, LOADERS[split])(), f"{kind}.{LOADERS[split]}") for split in names
            }
        except (HessdiagError, KeyboardInterrupt):
            raise
        except BaseException as error:  # the user's code can raise anything
            why = f"{kind} for {stage!r} raised {type(error).__name__}: {one_line(error, 120)}"
            if found:
                notes.append(f"{', '.join(names)} left out: {why}")
                continue
            hint = "" if allow_download else "; `allow_download=True` calls its prepare_data() before"
            raise RaisedError(why + (hint if overrides(source, "prepare_data") else "")) from error
    return found, notes


def shown(loader: Any) -> str:
    """What a loader gives, for `print_config`."""
    data = getattr(loader, "dataset", loader)
    size = f" of {len(data):,}" if hasattr(data, "__len__") else ""
    return f"{type(data).__name__}{size}"


def _one(loader: Any, what: str) -> Any:
    if isinstance(loader, list | tuple) and len(loader) == 1:
        return loader[0]
    if isinstance(loader, list | tuple | Mapping) or loader is None:
        msg = f"{what} gives {type(loader).__name__}, not one loader: name the data with `data`"
        raise LoadError(msg)
    return loader
