"""``digits:``, ``mnist:DIR`` and ``npz:FILE``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from hessdiag.errors import LoadError
from hessdiag.schemes.address import Address
from hessdiag.schemes.contract import Rows
from hessdiag.schemes.pictures import OPTIONS
from hessdiag.schemes.recipe import Recipe
from hessdiag.sources.array_files import arrays_of_npz
from hessdiag.sources.datasets import digits, images, mnist

IDX = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}


class ArrayImages:
    """Pictures of an array as PIL images, made one at a time.

    Attributes:
        pixels: uint8 (n, height, width) or (n, height, width, channels).
        targets: (n,).
    """

    def __init__(self, pixels: NDArray[Any], targets: NDArray[Any]) -> None:
        self.pixels, self.targets = pixels, targets

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        from PIL import Image

        target = self.targets[index]
        plain = int(target) if self.targets.dtype.kind in "iu" else float(target)
        return Image.fromarray(self.pixels[index].squeeze()), plain


def read(address: Address, recipe: Recipe) -> Mapping[str | None, Rows]:  # noqa: ARG001  (as every scheme)
    """The rows of an address.

    Raises:
        LoadError: the files are missing, damaged, or hold something else.
        UsageError: an option that the scheme does not take.
    """
    if address.scheme == "digits":
        address.take({})
        train, test = digits()
        return {"train": Rows("tensors", train, address.text), "test": Rows("tensors", test, address.text)}
    return _mnist(address) if address.scheme == "mnist" else {None: _npz(address)}


def _mnist(address: Address) -> dict[str | None, Rows]:
    options = address.take({"mean": 0.1307, "std": 0.3081})
    folder, found = Path(address.place), dict[str | None, Rows]()
    for split, names in IDX.items():
        files = [next((p for p in (folder / n, folder / f"{n}.gz") if p.exists()), None) for n in names]
        if files[0] is not None and files[1] is not None:
            rows = mnist(files[0], files[1], mean=options["mean"], std=options["std"])
            found[split] = Rows("tensors", rows, address.text)
    if not found:
        msg = f"{address.text}: no {' and '.join(IDX['train'])} there, with or without .gz: name their folder"
        raise LoadError(msg)
    return found


def _npz(address: Address) -> Rows:
    options = address.take({"x": "x", "y": "y", **OPTIONS})
    file, x, y = Path(address.place), str(options.pop("x")), str(options.pop("y"))
    arrays = arrays_of_npz(file, (x, y))
    inputs, targets = arrays[x], arrays[y]
    if inputs.shape[:1] != targets.shape[:1] or inputs.ndim < 2:
        msg = f"{address.text}: {x} has shape {inputs.shape}, {y} {targets.shape}: one row and one target each"
        raise LoadError(msg)
    if inputs.dtype == np.uint8 and inputs.ndim in (3, 4) and targets.ndim == 1:
        last = inputs.ndim == 3 or inputs.shape[3] in (1, 3)
        return Rows(
            "images",
            ArrayImages(inputs if last else inputs.transpose(0, 2, 3, 1), targets),
            address.text,
            options,
        )
    if inputs.ndim in (3, 4) and options["size"] is None:
        rows: Any = images(file, x=x, y=y, mean=options["mean"], std=options["std"])
        return Rows("tensors", rows, address.text)
    unused = [name for name in OPTIONS if options[name] is not None]
    if unused:
        msg = f"{address.text}: {unused[0]} is for pictures; {x} is {inputs.dtype} {inputs.shape}"
        raise LoadError(msg)
    return Rows("tensors", TensorDataset(_tensor(inputs, address), _tensor(targets, address)), address.text)


def _tensor(array: NDArray[Any], address: Address) -> torch.Tensor:
    """Floats as float32, whole numbers as int64."""
    if array.dtype.kind not in "fiub":
        msg = f"{address.text}: arrays of {array.dtype} are no inputs; allowed: numbers"
        raise LoadError(msg)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        msg = f"{address.text}: NaN or infinity: clean the file"
        raise LoadError(msg)
    return torch.from_numpy(array.astype(np.float32 if array.dtype.kind == "f" else np.int64))
