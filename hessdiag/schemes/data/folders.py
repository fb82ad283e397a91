"""``imagefolder:DIR``: images in a folder per class, as torchvision's ImageFolder reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hessdiag.errors import LoadError, UsageError, one_line
from hessdiag.schemes.address import Address
from hessdiag.schemes.contract import Rows
from hessdiag.schemes.known import require
from hessdiag.schemes.pictures import MODES, OPTIONS
from hessdiag.schemes.recipe import Recipe
from hessdiag.shown import listed

SPLITS = ("train", "val", "valid", "validation", "test")
ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")


class ImageFiles(Sequence[tuple[Any, int]]):
    """(PIL image, class) of each file, opened when it is asked for.

    Attributes:
        files: with the index of their class.
        mode: of Pillow, that every image is converted to.
    """

    def __init__(self, files: Sequence[tuple[Path, int]], mode: str) -> None:
        self.files, self.mode = files, mode

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        from PIL import Image

        path, label = self.files[index]
        try:
            with Image.open(path) as opened:
                return opened.convert(self.mode), label
        except Exception as error:  # Pillow's plugins raise what they like
            msg = f"{path} is not read as an image ({type(error).__name__}: {one_line(error, 80)}): fetch it again"
            raise LoadError(msg) from error


def read(address: Address, recipe: Recipe) -> Mapping[str | None, Rows]:  # noqa: ARG001  (as every scheme)
    """The images of a folder, by split where its subfolders are called so.

    Raises:
        LoadError: no such folder, no images, or splits with other classes.
        UsageError: an option that the scheme does not take.
    """
    options = address.take({**OPTIONS, "channels": 3})
    mode = MODES.get(options.pop("channels"))
    if mode is None:
        msg = f"{address.text}: channels must be 1 (grey) or 3 (colours)"
        raise UsageError(msg)
    require("PIL", "vision", "imagefolder:DIR")
    folder = Path(address.place)
    if not folder.is_dir():
        msg = f"{address.text}: no such folder"
        raise LoadError(msg)
    splits: dict[str | None, Path] = {name: folder / name for name in SPLITS if _has_classes(folder / name)}
    splits = splits or {None: folder}
    classes = _classes(next(iter(splits.values())), address.text)
    found = {name: ImageFiles(_files(place, classes, address.text), mode) for name, place in splits.items()}
    return {name: Rows("images", files, address.text, options, classes) for name, files in found.items()}


def _has_classes(folder: Path) -> bool:
    return folder.is_dir() and any(one.is_dir() for one in folder.iterdir())


def _classes(folder: Path, said: str) -> tuple[str, ...]:
    found = tuple(sorted(one.name for one in folder.iterdir() if one.is_dir() and not one.name.startswith(".")))
    if not found:
        msg = f"{said}: {folder} has no subfolders: one for each class is needed, DIR/cat/1.png"
        raise LoadError(msg)
    return found


def _files(folder: Path, classes: tuple[str, ...], said: str) -> list[tuple[Path, int]]:
    other = [name for name in _classes(folder, said) if name not in classes]
    if other:
        msg = f"{said}: {folder} has the class {other[0]!r}, the first split has {listed(list(classes))}"
        raise LoadError(msg)
    found = []
    for label, name in enumerate(classes):
        below = sorted((folder / name).rglob("*")) if (folder / name).is_dir() else []
        files = [one for one in below if one.suffix.lower() in ENDINGS and one.is_file()]
        found += [(one, label) for one in files]
    if not found:
        msg = f"{said}: {folder} has no images in the folders of its classes; allowed: {', '.join(ENDINGS)}"
        raise LoadError(msg)
    return found
