"""Problems that go wrong on rank 1 alone, from its ``at``-th pass on."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from hessdiag.problem import Problem

PASSES: list[int] = []  # outside of the model, which is left as found
RANK = int(os.environ.get("RANK", "0"))


class Net(nn.Module):
    """Two layers."""

    def __init__(self, kind: str, at: int, marks: str | None) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
        self.kind, self.at, self.marks = kind, at, marks

    def forward(self, x: Tensor) -> Tensor:
        PASSES.append(len(x))
        out = self.layers(x)
        if self.kind == "slow":
            time.sleep(0.02)
            if self.marks is not None and len(PASSES) == self.at:
                (Path(self.marks) / f"{RANK}").touch()
        elif RANK == 1 and len(PASSES) >= self.at:
            return self.fails(out)
        return out

    def fails(self, out: Tensor) -> Tensor:
        if self.kind == "raise":
            raise ValueError("this image is broken")
        if self.kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
        if self.kind == "exit":
            os._exit(9)
        if self.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return out * float("nan") if self.kind == "nan" else out


def problem(kind: str = "", at: int = 0, marks: str | None = None) -> Problem:
    """100 examples in three classes."""
    torch.manual_seed(0)
    model = Net(kind, at, marks)
    if kind == "weights" and RANK == 1:
        torch.nn.init.zeros_(model.layers[0].bias)
    if kind == "load" and RANK == 1:
        raise FileNotFoundError("not on this machine")
    x, y = torch.randn(100, 6), torch.randint(3, (100,))
    return Problem(model, {"train": (x, y)}, criterion="cross_entropy")
