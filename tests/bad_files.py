"""Files that are not what they should be, as they turn up in practice; every one refuses to be a checkpoint."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn


class Hostile:
    """Makes a file called marker when it is unpickled in the folder of the tests."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return os.link, ("p.py", "marker")


def write_bad_files(folder: Path) -> None:
    write_checkpoints(folder)
    (folder / "folder").mkdir()
    picture = b"\x89PNG\r\n\x1a\n" + bytes(64)
    (folder / "picture.pt").write_bytes(picture)
    (folder / "picture.safetensors").write_bytes(picture)
    (folder / "page.bin").write_text("<!doctype html><title>404</title>")
    (folder / "pointer.ckpt").write_text("version https://git-lfs.github.com/spec/v1\nsize 12\n")
    (folder / "empty.pt").touch()
    (folder / "syntax.py").write_text("def problem(:\n    pass\n")
    (folder / "imports.py").write_text("import not_installed\n")
    (folder / "binary.py").write_bytes(b"\x00\xff\n")


def write_checkpoints(folder: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    state = model.state_dict()
    save_file(state, folder / "good.safetensors")
    contents: dict[str, Any] = {
        "good.pt": state,
        "module.pt": model,
        "stranger.pt": {f"layer{i}.weight": torch.ones(1) for i in range(30)},
        "classes.pt": state | {"2.weight": torch.ones(7, 5), "2.bias": torch.ones(7)},
        "lacking.pt": {name: tensor for name, tensor in state.items() if name != "2.bias"},
        "more.pt": state | {"3.bias": torch.ones(1)},
        "prefix.pt": {f"backbone.{name}": t for name, t in (state | {"3.bias": torch.ones(1)}).items()},
        "integers.pt": {name: tensor.to(torch.int8) for name, tensor in state.items()},
        "nan.pt": state | {"0.bias": torch.full((5,), torch.nan)},
        "inf.pt": state | {"0.bias": torch.full((5,), torch.inf)},
        "nothing.pt": {"epoch": 3, "lr": 0.1},
        "hostile.pt": state | {"extra": Hostile()},
        "hostile.ckpt": {"state_dict": state, "callbacks": [Hostile()]},
        "hostile.safetensors": Hostile(),
    }
    for name, content in contents.items():
        torch.save(content, folder / name)
    for name in ("hostile.bin", "hostile.pkl"):
        (folder / name).write_bytes(pickle.dumps(Hostile()))
    for suffix in ("pt", "safetensors"):
        whole = (folder / f"good.{suffix}").read_bytes()
        (folder / f"cut.{suffix}").write_bytes(whole[: len(whole) // 2])
