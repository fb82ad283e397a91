"""Small trained networks whose sharpness is known in full, each with checkpoints a stated amount sharper.

The sharper checkpoints lie on the line from the trained weights through an earlier state of the same training
(or away from it), along which trace and λ_max grow. Truths come from the
whole Hessian in float64, formed by plain double backward.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from scipy.interpolate import PchipInterpolator
from scipy.linalg import eigh
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import models
from hessdiag.problem import Problem
from hessdiag.sources import datasets

LEVELS = (0.0, 0.05, 0.08, 0.09, 0.10, 0.11, 0.12, 0.15, 0.20)  # true changes, as shares of the baseline
METRICS = ("trace", "lambda_max")
STRIDE = 0.1  # between points of the line at which the truth is known before checkpoints are placed among them
FARTHEST = 40  # such points
ROWS = 64  # of the identity, differentiated together
NEAR = 0.002  # how near to its level a checkpoint is sought
TRIES = 4
REACH = 0.22  # change up to which the line is followed: a little beyond the last level
VOCABULARY, CONTEXT = 40, 8  # beyond 32 outputs an example, the trace draws signs at the outputs


@dataclass(frozen=True)
class Truths:
    """What is true of one checkpoint."""

    trace: float
    lambda_max: float
    hessian: np.ndarray = field(repr=False)

    def __getitem__(self, metric: str) -> float:
        return float(getattr(self, metric))


@dataclass
class GateSubject:
    """A baseline network and its line.

    Attributes:
        name: of the workload.
        about: the architecture in words.
        trained: the baseline.
        earlier: the state of an earlier step, for the direction.
        data: inputs and targets.
        sizes: batch sizes that machines may choose.
        opaque: given as a loss only, so that the trace takes probes of the Hessian.
    """

    name: str
    about: str
    trained: nn.Module
    earlier: dict[str, Tensor]
    data: tuple[Tensor, Tensor]
    sizes: tuple[int, ...]
    opaque: bool = False

    def problem(self, model: nn.Module) -> Problem:
        """The problem with these weights."""
        if self.opaque:
            return Problem(model, {"train": self.data}, loss=mean_loss)
        return Problem(model, {"train": self.data}, criterion="cross_entropy")

    def at(self, place: float) -> nn.Module:
        """The network at a place of the line: 0 is the baseline, 1 the earlier state."""
        model = copy.deepcopy(self.trained)
        now = model.state_dict()
        moved = {
            name: value + place * (self.earlier[name] - value) if value.is_floating_point() else value
            for name, value in now.items()
        }
        model.load_state_dict(moved)
        return model.eval()

    @cached_property
    def known(self) -> Truths:
        """The truth of the baseline."""
        return truths(self.trained, self.data)

    def sharper(self, metric: str, levels: Sequence[float]) -> list[tuple[nn.Module, Truths]]:
        """Checkpoints at which ``metric`` is truly larger by about these shares, with the truth of each.

        Raises:
            ValueError: the metric does not grow along the line.
        """
        places, changes = self._line(metric)
        found = []
        for level in levels:
            for _ in range(TRIES):
                place = float(PchipInterpolator(changes, places)(level))
                model = self.at(place)
                truth = truths(model, self.data)
                change = truth[metric] / self.known[metric] - 1
                if abs(change - level) < NEAR:
                    break
                index = int(np.searchsorted(changes, change))
                if change in changes or (np.diff(np.insert(places, index, place)) * places[-1] <= 0).any():
                    break  # a kink, beyond which the metric does not grow: this checkpoint is told as it is
                places, changes = np.insert(places, index, place), np.insert(changes, index, change)
            found.append((model, truth))
        return found

    def _line(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Places from the baseline on, and by how much the metric is larger there, until it is `REACH` larger."""
        for direction in (1.0, -1.0):
            places, changes = [0.0], [0.0]
            while len(places) < FARTHEST and (len(places) == 1 or changes[-1] > changes[-2]):
                places.append(places[-1] + STRIDE * direction)
                changes.append(truths(self.at(places[-1]), self.data)[metric] / self.known[metric] - 1)
                if changes[-1] > max(REACH, changes[-2]):
                    return np.array(places), np.array(changes)
        msg = f"{self.name}: {metric} does not grow along the line: choose another earlier step"
        raise ValueError(msg)


def mean_loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Mean cross-entropy over all targets."""
    inputs, targets = batch
    return F.cross_entropy(model(inputs).flatten(0, -2), targets.flatten())


def truths(model: nn.Module, data: tuple[Tensor, Tensor]) -> Truths:
    """Trace and λ_max out of the whole Hessian in float64."""
    double = copy.deepcopy(model).double().eval()
    inputs, targets = data
    parameters = list(double.parameters())
    with sdpa_kernel(SDPBackend.MATH):
        loss = mean_loss(double, (inputs.double() if inputs.is_floating_point() else inputs, targets))
        slopes = torch.autograd.grad(loss, parameters, create_graph=True)
        flat = torch.cat([slope.reshape(-1) for slope in slopes])
        rows = []
        for chosen in torch.eye(len(flat), dtype=torch.float64).split(ROWS):
            pieces = torch.autograd.grad(flat, parameters, chosen, retain_graph=True, is_grads_batched=True)
            rows.append(torch.cat([piece.flatten(1) for piece in pieces], dim=1))
    matrix = torch.cat(rows).numpy()
    size = len(matrix)
    matrix = (matrix + matrix.T) / 2
    top = eigh(matrix, eigvals_only=True, subset_by_index=[size - 1, size - 1])
    return Truths(float(np.trace(matrix)), float(top[0]), matrix)


def mlp(small: bool = False) -> GateSubject:
    """GELU MLP: a three-layer network, whose trace is known by formula."""
    width = 8 if small else 16
    model = nn.Sequential(nn.Linear(64, width), nn.GELU(), nn.Linear(width, 10))
    inputs, labels = _digits(96)
    about = "digits MLP with GELU, trace by formula"
    return _trained("mlp", about, model, (inputs.flatten(1), labels), (48, 64, 96))


def opaque(small: bool = False) -> GateSubject:
    """The same MLP as a loss alone: deflated probes of the Hessian."""
    about = "the same MLP as a bare loss, trace from deflated probes on H"
    return replace(mlp(small), name="opaque", about=about, opaque=True)


def cnn(small: bool = False) -> GateSubject:
    """ReLU CNN with BatchNorm in evaluation mode: an exact trace."""
    wide = (2, 3) if small else (6, 8)
    layers: list[nn.Module] = []
    for channels_in, channels_out in zip((1, wide[0]), wide, strict=True):
        layers += [nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False), nn.BatchNorm2d(channels_out)]
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(4 * wide[1], 10))
    return _trained("cnn", "digits CNN with ReLU and BatchNorm, exact trace", model, _digits(64), (24, 32, 64))


def gpt(small: bool = False) -> GateSubject:
    """Transformer on characters of a Markov chain: signs at the outputs for tr(G), probes for tr(R)."""
    context = 4 if small else CONTEXT
    model = models.GPT(VOCABULARY, context, 4 if small else 8, layers=1)
    text = characters(24, context + 1)
    about = "one-block GPT, trace from signs at the outputs and probes on R"
    return _trained("gpt", about, model, (text[:, :-1].contiguous(), text[:, 1:].contiguous()), (12, 16, 24))


SUBJECTS: dict[str, Callable[[bool], GateSubject]] = {"mlp": mlp, "opaque": opaque, "cnn": cnn, "gpt": gpt}


def characters(sequences: int, length: int) -> Tensor:
    """Sequences of a Markov chain with few likely successors per character, (sequences, length)."""
    rng = np.random.default_rng(0)
    chain = rng.dirichlet(np.full(VOCABULARY, 0.1), size=VOCABULARY)
    text = [rng.integers(VOCABULARY, size=sequences)]
    for _ in range(length - 1):
        text.append(np.array([rng.choice(VOCABULARY, p=chain[character]) for character in text[-1]]))
    return torch.from_numpy(np.stack(text, axis=1))


def _digits(number: int) -> tuple[Tensor, Tensor]:
    train, _ = datasets.digits()
    return (train.pixels.float() * train.scale)[:number], train.targets[:number]


def _trained(
    name: str, about: str, model: nn.Module, data: tuple[Tensor, Tensor], sizes: tuple[int, ...], steps: int = 150
) -> GateSubject:
    """Adam on all the data; the earlier state is that of four fifths of the steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in model.modules():
            if hasattr(module, "reset_parameters"):
                module.reset_parameters()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        earlier: dict[str, Tensor] = {}
        for step in range(steps):
            if step == 4 * steps // 5:
                earlier = copy.deepcopy(model.state_dict())
            optimizer.zero_grad()
            mean_loss(model.train(), data).backward()
            optimizer.step()
    model.zero_grad(set_to_none=True)
    return GateSubject(name, about, model.eval(), earlier, data, sizes)
