"""Images as an image processor of Hugging Face makes them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from hessdiag.errors import LoadError, one_line
from hessdiag.schemes.contract import Rows
from hessdiag.schemes.known import require
from hessdiag.schemes.models.hf.labels import Labels
from hessdiag.schemes.pictures import MODES, as_tensors

PROCESSOR = "preprocessor_config.json"


class Processed(Dataset[Mapping[str, Tensor]]):
    """Pictures as the model takes them; an item is {"pixel_values": (channels, height, width), "labels": target}.

    Attributes:
        rows: map-style, (PIL image, label).
        processor: of the library; None where ``rows`` give tensors.
        target: label -> tensor.
        mode: of Pillow that the images are converted to; None leaves them.
    """

    def __init__(self, rows: Any, processor: Any, target: Any, mode: str | None) -> None:
        self.rows, self.processor, self.target, self.mode = rows, processor, target, mode

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Mapping[str, Tensor]:
        image, label = self.rows[index]
        if self.processor is not None:
            image = image if self.mode is None else image.convert(self.mode)
            image = self.processor(images=image, return_tensors="pt")["pixel_values"][0]
        return {"pixel_values": image, "labels": self.target(label)}


def processed(
    rows: Rows, folder: Path, config: Any, labels: Labels, *, trust_remote_code: bool
) -> tuple[Processed, str]:
    """The images of a split, and a line on how they are made.

    Raises:
        LoadError: the folder says nothing of images and the address neither, or a label is none of the model's.
    """

    def target(label: Any) -> Tensor:
        return labels.targets([label], rows.classes, rows.text)[0]

    target(rows.rows[0][1])
    if any(rows.options.get(name) is not None for name in ("size", "mean", "std")):
        pictures = as_tensors(rows.rows, rows.options, rows.text)
        return Processed(pictures, None, target, None), f"{rows.text}: images made as its options say"
    if not (folder / PROCESSOR).is_file():
        msg = f"{folder} has no {PROCESSOR}: save the image processor there, or give ?size=224&mean=...&std=... "
        raise LoadError(msg + "with the images")
    auto = require("transformers", "hf", "hf:DIR").AutoImageProcessor
    try:
        own = auto.from_pretrained(folder, local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as error:  # the library raises what it likes
        why = f"{type(error).__name__}: {one_line(error, 120)}"
        msg = f"{folder / PROCESSOR} is not read as an image processor ({why}): save it again"
        raise LoadError(msg) from error
    mode = MODES.get(getattr(config, "num_channels", 3))
    return Processed(rows.rows, own, target, mode), f"images made by {type(own).__name__} of {folder}"
