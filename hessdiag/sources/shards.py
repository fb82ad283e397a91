"""Checkpoints of several files: a Hugging Face folder, and an index of shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from hessdiag.errors import LoadError

FOLDERS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
    "adapter_model.safetensors",
    "adapter_model.bin",
)
"""What a folder of Hugging Face is read as, the first there is."""
SUFFIXES = (".safetensors", ".pt", ".pth", ".th", ".ckpt", ".bin")
INDEX = (".safetensors.index.json", ".bin.index.json")
SHARDED = (
    (
        "",
        ".distcp",
        "holds the shards of torch.distributed.checkpoint (FSDP): python -m "
        "torch.distributed.checkpoint.format_utils dcp_to_torch FOLDER weights.pt, and give that file",
    ),
    (
        "zero_to_fp32.py",
        "",
        "is a checkpoint of DeepSpeed: python zero_to_fp32.py . weights, there, and give what it writes",
    ),
    (
        "zero_pp_rank_",
        ".pt",
        "holds the shards of DeepSpeed's ZeRO: python zero_to_fp32.py . weights, in the folder above, and give "
        "what it writes",
    ),
)
"""Folders whose files hold parts of tensors: how their names begin and end, and the way out."""
SHOWN = 5


def in_folder(folder: Path) -> Path:
    """The file a folder is read as.

    Raises:
        LoadError: none; the text says which checkpoints there are.
    """
    for name in FOLDERS:
        if (folder / name).is_file():
            return folder / name
    names = sorted(file.name for file in folder.iterdir())
    indexes = [name for name in names if name.endswith(INDEX) and (folder / name).is_file()]
    if len(indexes) == 1:
        return folder / indexes[0]
    for begins, ends, words in SHARDED:
        if any(name.startswith(begins) and name.endswith(ends) for name in names):
            msg = f"{folder} {words}"
            raise LoadError(msg)
    found = [name for name in names if name.endswith((*SUFFIXES, *INDEX))]
    some = ", ".join(found[:SHOWN]) + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
    there = f"it holds {some}; " if found else ""
    msg = f"{folder} is a folder without {FOLDERS[1]} or {FOLDERS[3]}: {there}give a checkpoint file"
    raise LoadError(msg)


def weight_map(index: Path) -> dict[str, str]:
    """Tensor name to shard file name, as the index says; shards must lie beside it, and be no index themselves.

    Raises:
        LoadError: not such an index, or a shard is missing.
    """
    try:
        mapping = json.loads(index.read_text(encoding="utf-8-sig"))["weight_map"]
        named = all(isinstance(file, str) and Path(file).name == file for file in mapping.values())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        msg = f"{index} is not an index of shards: it needs a weight_map from names to files"
        raise LoadError(msg) from error
    shards = set(mapping.values()) if named else set()
    if not named or any(shard.endswith(".json") for shard in shards):
        msg = f"{index}: shards must be files in the same folder, .safetensors or .bin"
        raise LoadError(msg)
    missing = sorted(shard for shard in shards if "\0" in shard or not (index.parent / shard).is_file())
    if missing:
        msg = (
            f"{index}: no such checkpoint file {missing[0]!r} beside it ({len(missing)} of {len(shards)} missing)"
        )
        raise LoadError(msg)
    return dict(mapping)


def read_shards(index: Path, read: Callable[[Path], Any]) -> dict[str, Tensor]:
    """All tensors that an index lists, from the shards beside it.

    Args:
        index: the .json file.
        read: reads one shard.

    Raises:
        LoadError: a shard does not hold what the index says.
    """
    mapping = weight_map(index)
    by_shard: dict[str, list[str]] = {}
    for name, shard in mapping.items():
        by_shard.setdefault(shard, []).append(name)
    tensors: dict[str, Tensor] = {}
    for shard in sorted(by_shard):
        content = read(index.parent / shard)
        for name in by_shard[shard]:
            if not isinstance(content, dict) or not isinstance(content.get(name), Tensor):
                msg = f"{index.parent / shard} does not hold {name!r}, which {index.name} says it does"
                raise LoadError(msg)
            tensors[name] = content[name]
    return tensors
