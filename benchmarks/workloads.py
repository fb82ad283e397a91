"""The problems that are measured: real checkpoints, a small GPT and a digits MLP, as `hessdiag.Problem`.

Each function is a factory: ``hessdiag analyze benchmarks/workloads.py:resnet20 -c FILE -P data=DIR``
(run from the repository's root). ``DIR`` holds the folders ``cifar10``, ``mnist``, ``text`` and
``checkpoints``; benchmarks/README.md says where their files come from.
"""

from __future__ import annotations

import gzip
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from benchmarks import models
from hessdiag.problem import Problem
from hessdiag.samples import SampleSet, draw

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # what resnet20-12fca82f.th was trained with
CIFAR = ((0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010))  # what pyhessian_resnet20_net.pkl was trained with
MNIST = ((0.1307,), (0.3081,))
DIGITS_TRAIN = 1437  # of 1,797
CIFAR_SPLITS = {
    "train": "cifar10_train_lossless_0-1999.npz",
    "train_jpeg": "cifar10_train_jpegq75_5000.npz",
    "test": "cifar10_test_jpegq75_5000.npz",
}
CHECKPOINTS = {
    "resnet20": "resnet20-12fca82f.th",
    "pyhessian_resnet20": "pyhessian_resnet20_net.pkl",
    "lightning_mlp": "lightning_mnist_mlp_bs64_v0.ckpt",
}


class Pixels(Dataset[tuple[Tensor, Tensor]]):
    """uint8 images (n, channels, height, width), normalized when they are asked for."""

    def __init__(self, images: Tensor, labels: Tensor, statistics: tuple[tuple[float, ...], tuple[float, ...]]):
        self.images, self.labels = images, labels
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in statistics)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return (self.images[index].float() / 255 - self.mean) / self.std, self.labels[index]

    def first(self, number: int) -> Pixels:
        """The first ``number`` images."""
        kept = Pixels.__new__(Pixels)
        kept.images, kept.labels = self.images[:number], self.labels[:number]
        kept.mean, kept.std = self.mean, self.std
        return kept


def resnet20(data: str, first: int | None = None) -> Problem:
    """ResNet-20 of akamaster/pytorch_resnet_cifar10 on CIFAR-10 training images (original pixels)."""
    return _cifar_problem("resnet20", models.ResNet20(), data, first, IMAGENET)


def pyhessian_resnet20(data: str, first: int | None = None) -> Problem:
    """ResNet-20 that PyHessian ships, on the same images."""
    return _cifar_problem("pyhessian_resnet20", models.PyHessianResNet20(), data, first, CIFAR)


def lightning_mlp(data: str, first: int | None = None, file: str = CHECKPOINTS["lightning_mlp"]) -> Problem:
    """MNIST MLP from a Lightning checkpoint, on MNIST training images."""
    model = models.LightningMLP()
    load(model, Path(data) / "checkpoints" / file)
    splits = {"train": _mnist(data, "train"), "test": _mnist(data, "t10k")}
    return Problem(model=model, data=_cut(splits, first), criterion="cross_entropy")


def wide_mlp(data: str, first: int | None = None, steps: int = 300) -> Problem:
    """MLP of 1,068,810 parameters, trained here for a few hundred Adam steps on 4,096 MNIST images."""
    images = _mnist(data, "train").first(4096)
    inputs = torch.stack([image for image, _ in (images[i] for i in range(len(images)))]).flatten(1)
    model = nn.Sequential(nn.Linear(784, 1024), nn.ReLU(), nn.Linear(1024, 256), nn.ReLU(), nn.Linear(256, 10))
    _train(model, (inputs, images.labels), name="wide", steps=steps, batch=128, rate=1e-3)
    return Problem(model=model, data=_cut({"train": (inputs, images.labels)}, first), criterion="cross_entropy")


def gpt(data: str, first: int | None = None, layers: int = 2, width: int = 64, steps: int = 300) -> Problem:
    """Character GPT, trained here for a few hundred Adam steps on tinyshakespeare, kept in a temporary folder."""
    text = (Path(data) / "text" / "tinyshakespeare.txt").read_text()
    alphabet = {character: index for index, character in enumerate(sorted(set(text)))}
    tokens = torch.tensor([alphabet[character] for character in text])
    context = 64
    pieces = tokens[: (len(tokens) - 1) // context * context].view(-1, context)
    following = tokens[1 : pieces.numel() + 1].view(-1, context)
    cut = len(pieces) * 9 // 10
    model = models.GPT(len(alphabet), context, width, layers)
    splits = {"train": (pieces[:cut], following[:cut]), "test": (pieces[cut:], following[cut:])}
    _train(model, splits["train"], name=f"gpt-{layers}-{width}", steps=steps, batch=32, rate=1e-3)
    return Problem(model=model, data=_cut(splits, first), criterion="cross_entropy")


def digits_mlp(data: str | None = None, first: int | None = None, steps: int = 300) -> Problem:  # noqa: ARG001
    """MLP 64-32-10 on the digits that come with hessdiag; 2,410 parameters, so the whole Hessian is known."""
    with np.load(str(files("hessdiag.sources") / "digits.npz")) as content:
        inputs = torch.from_numpy(content["x"]).flatten(1).float() / 16
        labels = torch.from_numpy(content["y"]).long()
    model = models.DigitsMLP()
    splits = {"train": (inputs[:DIGITS_TRAIN], labels[:DIGITS_TRAIN])}
    splits["test"] = (inputs[DIGITS_TRAIN:], labels[DIGITS_TRAIN:])
    _train(model, splits["train"], name="digits", steps=steps, batch=128, rate=3e-3)
    return Problem(model=model, data=_cut(splits, first), criterion="cross_entropy")


@dataclass(frozen=True)
class Workload:
    """A problem and the sample set it is measured on."""

    name: str
    build: Callable[..., Problem]
    first: int | None  # only the first examples of the split count: the sample set of published figures
    samples: int
    batch_size: int  # the same batches for every tool
    needs_data: bool = True
    smooth: bool = False  # not piecewise linear in its weights: no exact trace without probes

    def problem(self, data: str | None, device: str = "cpu") -> Problem:
        """The problem with its model on the device, where every tool then works."""
        problem = self.build(data=data, first=self.first)
        problem.model.eval().to(device)
        return problem

    def sample_set(self, problem: Problem) -> SampleSet:
        return draw(problem.data["train"], samples=self.samples, seed=0, batch_size=self.batch_size)


WORKLOADS = {
    entry.name: entry
    for entry in (
        Workload("digits_mlp", digits_mlp, None, 512, 512, needs_data=False),
        Workload("lightning_mlp", lightning_mlp, None, 1024, 1024),
        Workload("lightning_mlp_10000", lightning_mlp, None, 10_000, 10_000),
        Workload("resnet20", resnet20, 128, 128, 128),
        Workload("gpt", gpt, None, 32, 32, smooth=True),
        Workload("gpt_14m", partial(gpt, layers=8, width=384, steps=20), None, 8, 8, smooth=True),
        Workload("resnet20_512", resnet20, None, 512, 128),
        Workload("pyhessian_resnet20_512", pyhessian_resnet20, None, 512, 128),
        Workload("pyhessian_resnet20", pyhessian_resnet20, 128, 128, 128),
        Workload("resnet20_64", resnet20, None, 64, 64),
        Workload("wide_mlp", wide_mlp, None, 512, 64),
    )
}
PEER_WORKLOADS = ("digits_mlp", "lightning_mlp_10000", "gpt", "resnet20")
MEMORY_WORKLOADS = (*PEER_WORKLOADS, "gpt_14m")  # 14 million parameters on 512 characters: vectors decide
FORECAST_WORKLOADS = ("digits_mlp", "lightning_mlp", "lightning_mlp_10000", "gpt", "resnet20_64", "wide_mlp")
CHECKPOINT_WORKLOADS = ("lightning_mlp", "resnet20_512", "pyhessian_resnet20_512")


def selected(names: Sequence[str], data: str | None, quick: bool, every: Sequence[str]) -> Sequence[str]:
    """The workloads asked for; by default ``every``, or the one that needs no data and little time."""
    return names or (("digits_mlp",) if quick or data is None else every)


def load(model: nn.Module, path: Path) -> None:
    """Load a checkpoint file as its author saved it: maybe wrapped, maybe with ``module.`` before every name."""
    content = torch.load(path, map_location="cpu", weights_only=True)
    state = content.get("state_dict", content)
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    model.eval()


def accuracy(problem: Problem, split: str, limit: int | None = None) -> tuple[float, float]:
    """Accuracy and mean cross-entropy over a split (its first ``limit`` examples)."""
    source = problem.data[split]
    source = TensorDataset(*source) if isinstance(source, tuple) else source
    number = min(limit or len(source), len(source))  # type: ignore[arg-type]
    right = loss = count = 0.0
    with torch.no_grad():
        for start in range(0, number, 250):
            chosen = [source[index] for index in range(start, min(start + 250, number))]  # type: ignore[index]
            inputs, labels = (torch.stack(column) for column in zip(*chosen, strict=True))
            outputs = problem.model(inputs)
            right += float((outputs.argmax(-1) == labels).sum())
            loss += float(F.cross_entropy(outputs.flatten(0, -2), labels.flatten(), reduction="sum"))
            count += labels.numel()
    return right / count, loss / count


def _cifar_problem(
    name: str,
    model: nn.Module,
    data: str,
    first: int | None,
    statistics: tuple[tuple[float, ...], tuple[float, ...]],
) -> Problem:
    load(model, Path(data) / "checkpoints" / CHECKPOINTS[name])
    splits = {}
    for split, file in CIFAR_SPLITS.items():
        with np.load(Path(data) / "cifar10" / file) as content:
            images = torch.from_numpy(content["x"]).permute(0, 3, 1, 2)
            splits[split] = Pixels(images, torch.from_numpy(content["y"]).long(), statistics)
    return Problem(model=model, data=_cut(splits, first), criterion="cross_entropy")


def _cut(splits: dict[str, object], first: int | None) -> dict[str, object]:
    if first is None:
        return splits
    cut = {}
    for name, split in splits.items():
        cut[name] = split.first(first) if isinstance(split, Pixels) else tuple(part[:first] for part in split)
    return cut


def _mnist(data: str, name: str) -> Pixels:
    folder = Path(data) / "mnist"
    images = gzip.decompress((folder / f"{name}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((folder / f"{name}-labels-idx1-ubyte.gz").read_bytes())
    pixels = torch.frombuffer(bytearray(images[16:]), dtype=torch.uint8).view(-1, 1, 28, 28)
    return Pixels(pixels, torch.frombuffer(bytearray(labels[8:]), dtype=torch.uint8).long(), MNIST)


def _train(
    model: nn.Module, data: tuple[Tensor, Tensor], *, name: str, steps: int, batch: int, rate: float
) -> None:
    recipe = f"{model}{steps}/{batch}/{rate}/{torch.__version__}/{len(data[0])}"
    key = hashlib.sha256(recipe.encode()).hexdigest()[:12]
    path = Path(tempfile.gettempdir()) / f"hessdiag-benchmarks-{name}-{key}.pt"
    if path.exists():
        load(model, path)
        return
    with _seeded():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02 if name.startswith("gpt") else parameter.shape[1] ** -0.5)
        optimizer = torch.optim.Adam(model.parameters(), lr=rate)
        for _ in range(steps):
            chosen = torch.randint(len(data[0]), (batch,))
            optimizer.zero_grad()
            outputs = model(data[0][chosen])
            F.cross_entropy(outputs.flatten(0, -2), data[1][chosen].flatten()).backward()
            optimizer.step()
    model.zero_grad(set_to_none=True)
    model.eval()
    torch.save(model.state_dict(), path)


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
