"""Eight kinds of small networks, trained until their examples are confident: where single precision is hardest."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGES = (0.3, 1e-2, 1e-4, 1e-5)
"""Share of the first loss at which a network is measured: unsure, confident, more confident than float32 tells."""
MOST_STEPS = 1500


class Residual(nn.Module):
    """x + f(x)."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.body(x))


class Attention(nn.Module):
    """A transformer of one block on sequences (N, 6, 4), read at their mean."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        q, k, v = self.qkv(self.before(x)).chunk(3, dim=-1)
        x = x + self.out(torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v)
        return self.head((x + self.mlp(self.after(x))).mean(1))


class Recurrent(nn.Module):
    """A GRU cell unrolled over sequences (N, 6, 4)."""

    def __init__(self, width: int = 10) -> None:
        super().__init__()
        self.cell, self.head, self.width = nn.GRUCell(4, width), nn.Linear(width, 4), width

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), self.width)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.head(state)


def mlp(activation: type[nn.Module]) -> nn.Module:
    return nn.Sequential(nn.Linear(16, 24), activation(), nn.Linear(24, 16), activation(), nn.Linear(16, 4))


def convolutional() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)]
    return nn.Sequential(*layers)


def residual() -> nn.Module:
    def block() -> nn.Module:
        halves = [nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)) for _ in range(2)]
        return Residual(halves[0], nn.ReLU(), halves[1])

    pooled = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)]
    return nn.Sequential(nn.Conv2d(1, 6, 3, padding=1), block(), block(), *pooled)


def autoencoder() -> nn.Module:
    return nn.Sequential(
        nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 3), nn.Linear(3, 12), nn.Tanh(), nn.Linear(12, 16)
    )


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {  # name: (network, shape of an example)
    "MLP, ReLU": (lambda: mlp(nn.ReLU), (16,)),
    "MLP, tanh": (lambda: mlp(nn.Tanh), (16,)),
    "MLP, GELU": (lambda: mlp(nn.GELU), (16,)),
    "CNN, BatchNorm": (convolutional, (1, 4, 4)),
    "ResNet": (residual, (1, 4, 4)),
    "transformer": (Attention, (6, 4)),
    "GRU": (Recurrent, (6, 4)),
    "autoencoder": (autoencoder, (16,)),
}


@dataclass(frozen=True)
class Trained:
    """A network as training left it, in evaluation mode, with its examples and the name of its loss."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    criterion: str
    loss: float

    def mean_loss(self, model: nn.Module, dtype: torch.dtype) -> Tensor:
        """The loss that is measured, written down a second time."""
        outputs = model(self.inputs.to(dtype))
        if self.criterion == "mse":
            return (outputs - self.targets.to(dtype)).square().mean()
        return F.cross_entropy(outputs, self.targets)


def trained(kind: str, seed: int, examples: int = 96) -> Iterator[Trained]:
    """One network at each of the `STAGES` that it reaches, later stages more confident."""
    make, shape = KINDS[kind]
    torch.manual_seed(1000 * seed + list(KINDS).index(kind))
    centres = torch.randn(4, *shape)
    targets = torch.randint(4, (examples,))
    inputs = centres[targets] + 0.7 * torch.randn(examples, *shape)
    criterion = "mse" if kind == "autoencoder" else "cross_entropy"
    model = make()
    state = Trained(model, inputs, inputs if criterion == "mse" else targets, criterion, float("nan"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    wanted, first = list(STAGES), 0.0
    for step in range(MOST_STEPS):
        loss = state.mean_loss(model, torch.float32)
        now = loss.item()
        first = first or now
        if now <= wanted[0] * first or step == MOST_STEPS - 1:
            wanted = wanted[1:]
            yield Trained(copy.deepcopy(model).eval(), inputs, state.targets, criterion, now)
        if not wanted:
            return
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
