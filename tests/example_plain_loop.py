"""A plain training loop with a regularizer, checkpoints, a schedule and its sharpness: copy and change.

python tests/example_plain_loop.py
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, default_collate

import hessdiag
from hessdiag.regularizers import SAM
from hessdiag.sources.datasets import digits


def train(
    epochs: int, file: Path | None = None, total: int | None = None
) -> tuple[nn.Module, list[float], hessdiag.Tracker]:
    """The network, the mean loss of each epoch, its sharpness; goes on from ``file`` if that is there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10))
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.05)
    schedule = CosineAnnealingLR(optimizer, T_max=total or epochs)
    tracker = hessdiag.Tracker(model, F.cross_entropy, digits()[0], every=20, optimizer=optimizer)
    parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "tracker": tracker}
    done = 0
    if file is not None and file.exists():
        saved = torch.load(file, weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        done = saved["epoch"]
    losses = []
    for epoch in range(done, epochs):
        losses.append(one_epoch(model, optimizer, tracker, epoch))
        schedule.step()
        if file is not None:
            torch.save({name: part.state_dict() for name, part in parts.items()} | {"epoch": epoch + 1}, file)
    return model, losses, tracker


def one_epoch(model: nn.Module, optimizer: SAM, tracker: hessdiag.Tracker, epoch: int) -> float:
    """The mean loss before each step of an epoch."""
    batches = DataLoader(digits()[0], batch_size=128, shuffle=True, generator=torch.Generator().manual_seed(epoch))
    losses = []
    for x, y in batches:

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            return F.cross_entropy(model(x), y)  # no zero_grad, no backward: step() does both

        losses.append(float(optimizer.step(closure)))
        tracker.step(optimizer.steps)
    return sum(losses) / len(losses)


def accuracy(model: nn.Module) -> float:
    """Share of the 360 test digits that are right."""
    x, y = default_collate(list(digits()[1]))
    model.eval()
    with torch.no_grad():
        return float((model(x).argmax(1) == y).float().mean())


if __name__ == "__main__":
    trained, losses, sharpness = train(epochs=5)
    print("losses", [round(loss, 3) for loss in losses], "test accuracy", accuracy(trained))
    print(sharpness.history)
