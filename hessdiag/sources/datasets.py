"""Ready map-style data sets for files one already has, and the embedded digits.

Images stay in the integers of their file and are converted one example at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from hessdiag.errors import LoadError, UsageError, one_line
from hessdiag.sources.array_files import array_of_idx, arrays_of_npz, content_of

IDX_IMAGES, IDX_LABELS = 2051, 2049  # magic numbers of the MNIST files (LeCun, Cortes & Burges)
CHANNELS = (1, 3, 4)
DIGITS_TRAIN = 1437  # of 1797: four fifths
Scale = float | Sequence[float]


class Images(Dataset[tuple[Tensor, Tensor]]):
    """Pictures and targets; an item is (float32 (channels, height, width), target).

    Attributes:
        pixels: (n, channels, height, width), uint8 or float32, as in the file.
        targets: (n,) int64, or float32 of any shape (n, ...).
        scale: what one unit of ``pixels`` is worth before normalisation (1/255 for bytes).
    """

    def __init__(self, pixels: Tensor, targets: Tensor, scale: float, mean: Tensor, std: Tensor) -> None:
        self.pixels, self.targets, self.scale = pixels, targets, scale
        self.mean, self.std = mean, std

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return (self.pixels[index].float() * self.scale - self.mean) / self.std, self.targets[index]


class Characters(Dataset[tuple[Tensor, Tensor]]):
    """Windows of a text, each with the same window one character later: int64 (block,), int64 (block,).

    Attributes:
        vocabulary: the distinct characters, sorted; a character's id is its place here.
    """

    def __init__(self, ids: Tensor, block: int, vocabulary: str) -> None:
        self.ids, self.block, self.vocabulary = ids, block, vocabulary

    def __len__(self) -> int:
        return (len(self.ids) - 1) // self.block

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not -len(self) <= index < len(self):
            msg = f"window {index}: there are {len(self)}"
            raise IndexError(msg)
        start = index % len(self) * self.block
        window = self.ids[start : start + self.block + 1]
        return window[:-1], window[1:]


def images(
    file: str | Path, *, x: str = "x", y: str = "y", mean: Scale | None = None, std: Scale | None = None
) -> Images:
    """Pictures and targets from an ``.npz`` file.

    Args:
        file: written by ``np.savez``; object arrays are refused.
        x: name of the pictures, (n, height, width), (n, height, width, channels) or (n, channels, height,
            width); bytes are divided by 255, floats taken as they are.
        y: name of the targets, integers (classes) or floats.
        mean: subtracted after that, one number or one per channel; default 0.
        std: divided by after that; default 1.

    Raises:
        LoadError: missing, damaged, without these arrays, or their shapes are not pictures and targets.
        UsageError: mean or std do not fit the channels.

    >>> import hessdiag, numpy, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     numpy.savez(f"{folder}/some.npz", x=numpy.zeros((2, 8, 8), "uint8"), y=numpy.arange(2))
    ...     x, y = hessdiag.images(f"{folder}/some.npz")[1]
    >>> tuple(x.shape), int(y)
    ((1, 8, 8), 1)
    """
    path = Path(file)
    arrays = arrays_of_npz(path, (x, y))
    raw, labels = arrays[x], arrays[y]
    if raw.ndim not in (3, 4) or raw.dtype.kind not in "uf" or (raw.dtype.kind == "u" and raw.dtype != np.uint8):
        msg = f"{path}: {x} is {raw.dtype} {raw.shape}; allowed: uint8 or float pictures (n, height, width[, 3])"
        raise LoadError(msg)
    if labels.shape[:1] != raw.shape[:1]:
        msg = f"{path}: {len(raw)} pictures in {x}, but {y} has shape {labels.shape}: one target each is needed"
        raise LoadError(msg)
    if not all(np.isfinite(array).all() for array in (raw, labels) if array.dtype.kind == "f"):
        msg = f"{path}: NaN or infinity in {x} or {y}: clean the file"
        raise LoadError(msg)
    return _images(_channels_first(raw), _targets(labels, path, y), mean, std)


def mnist(images_idx: str | Path, labels_idx: str | Path, mean: float = 0.1307, std: float = 0.3081) -> Images:
    """Pictures and classes from a pair of idx files, as MNIST and its relatives come; ``.gz`` or unpacked.

    Args:
        images_idx: ``train-images-idx3-ubyte`` or the like.
        labels_idx: ``train-labels-idx1-ubyte`` or the like.
        mean: of the pixels in [0, 1]; the default is MNIST's training set, as in PyTorch's MNIST example.
        std: likewise.

    Raises:
        LoadError: missing, foreign, cut short, or not a pair.

    >>> import hessdiag, pathlib, struct, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     pixels, labels = pathlib.Path(folder, "x-idx3"), pathlib.Path(folder, "y-idx1")
    ...     _ = pixels.write_bytes(struct.pack(">IIII", 2051, 1, 28, 28) + bytes(28 * 28))
    ...     _ = labels.write_bytes(struct.pack(">II", 2049, 1) + bytes([7]))
    ...     x, y = hessdiag.mnist(pixels, labels)[0]
    >>> tuple(x.shape), int(y)
    ((1, 28, 28), 7)
    """
    pixels = array_of_idx(Path(images_idx), IDX_IMAGES, 3)
    labels = array_of_idx(Path(labels_idx), IDX_LABELS, 1)
    if len(pixels) != len(labels):
        msg = f"{images_idx} holds {len(pixels)} pictures, {labels_idx} {len(labels)} labels: not a pair"
        raise LoadError(msg)
    return _images(_channels_first(pixels), torch.from_numpy(labels.astype(np.int64)), mean, std)


def characters(text_file: str | Path, block: int = 64, *, vocabulary: str | None = None) -> Characters:
    """Non-overlapping windows of a text, for models of the next character.

    Args:
        text_file: UTF-8.
        block: characters per window.
        vocabulary: of another text, so that ids agree; by default this text's own.

    Raises:
        LoadError: missing, not UTF-8, shorter than one window, or a character the vocabulary lacks.
        UsageError: block below 1.

    >>> import hessdiag, pathlib, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = pathlib.Path(folder, "text").write_text("to be or not to be")
    ...     windows = hessdiag.characters(f"{folder}/text", block=4)
    >>> len(windows), windows[0][0].tolist()
    (4, [6, 4, 0, 1])
    """
    if block < 1:
        msg = f"block {block}: at least 1 character is needed"
        raise UsageError(msg)
    path = Path(text_file)
    try:
        text = content_of(path).decode("utf-8")
    except UnicodeDecodeError as error:
        msg = f"{path} is not UTF-8 text ({one_line(error, 80)}): convert it"
        raise LoadError(msg) from error
    if len(text) <= block:
        msg = f"{path} has {len(text)} characters; a window needs {block + 1}: choose a smaller block"
        raise LoadError(msg)
    known = "".join(sorted(set(text))) if vocabulary is None else vocabulary
    strangers = sorted(set(text) - set(known))
    if strangers:
        msg = f"{path} has characters the vocabulary lacks, first {strangers[0]!r}: build it from both texts"
        raise LoadError(msg)
    place = {character: index for index, character in enumerate(known)}
    return Characters(torch.tensor([place[character] for character in text]), block, known)


def digits() -> tuple[Images, Images]:
    """The embedded handwritten digits, 1437 to train and 360 to test, pictures 1 x 8 x 8 in [0, 1].

    The test part of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak, UCI Machine
    Learning Repository, 1998, doi:10.24432/C50P49, CC BY 4.0), 1797 pictures of grey levels 0 to 16 as
    scikit-learn's ``load_digits`` gives them, put in the order ``numpy.random.default_rng(0).permutation(1797)``;
    the first 1437 are for training.
    """
    with as_file(files("hessdiag.sources") / "digits.npz") as path:
        arrays = arrays_of_npz(path, ("x", "y"))
    pixels, labels = _channels_first(arrays["x"]), torch.from_numpy(arrays["y"].astype(np.int64))
    halves = (slice(None, DIGITS_TRAIN), slice(DIGITS_TRAIN, None))
    train, test = (Images(pixels[h], labels[h], 1 / 16, torch.zeros(1), torch.ones(1)) for h in halves)
    return train, test


def _images(pixels: Tensor, targets: Tensor, mean: Scale | None, std: Scale | None) -> Images:
    channels = pixels.shape[1]
    centre = _per_channel("mean", 0.0 if mean is None else mean, channels)
    spread = _per_channel("std", 1.0 if std is None else std, channels)
    if not (spread > 0).all():
        msg = f"std {std}: must be above 0"
        raise UsageError(msg)
    return Images(pixels, targets, 1 / 255 if pixels.dtype == torch.uint8 else 1.0, centre, spread)


def _per_channel(name: str, value: Scale, channels: int) -> Tensor:
    tensor = torch.as_tensor(value, dtype=torch.float32).reshape(-1)
    if len(tensor) not in (1, channels) or not tensor.isfinite().all():
        msg = f"{name} {value}: give one finite number, or one for each of {channels} channels"
        raise UsageError(msg)
    return tensor.reshape(-1, 1, 1)


def _channels_first(raw: NDArray[np.generic]) -> Tensor:
    if raw.ndim == 3:
        raw = raw[:, None]
    elif raw.shape[3] in CHANNELS or raw.shape[1] not in CHANNELS:
        raw = raw.transpose(0, 3, 1, 2)
    array = raw if raw.dtype == np.uint8 else raw.astype(np.float32)
    return torch.from_numpy(np.ascontiguousarray(array))


def _targets(labels: NDArray[np.generic], path: Path, name: str) -> Tensor:
    if labels.dtype.kind not in "iuf":
        msg = f"{path}: {name} is {labels.dtype}; allowed: integers (classes) and floats"
        raise LoadError(msg)
    return torch.from_numpy(labels.astype(np.float32 if labels.dtype.kind == "f" else np.int64))
