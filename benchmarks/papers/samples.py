"""Pictures of the reproductions: MNIST as its files have it, and the sets that each seed draws for itself."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from hessdiag.sources import datasets

Split = tuple[Tensor, Tensor]


def mnist(data: str) -> tuple[datasets.Images, datasets.Images]:
    """The training and the test pictures under a folder of data."""
    folder = Path(data) / "mnist"
    train, test = (
        datasets.mnist(folder / f"{name}-images-idx3-ubyte.gz", folder / f"{name}-labels-idx1-ubyte.gz")
        for name in ("train", "t10k")
    )
    return train, test


def drawn(pool: Split, seed: int, *sizes: int) -> list[Split]:
    """Sets of these sizes that a seed draws from a pool without replacement, and what is left of it.

    Seeds of sets are far from those of weights and batches, which count from 0.
    """
    x, y = pool
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(1_000_003 + seed))
    parts = order.split([*sizes, len(y) - sum(sizes)])  # type: ignore[no-untyped-call]
    return [(x[part], y[part]) for part in parts]
