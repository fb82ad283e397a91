"""Fine-tune with NSO, train from scratch with SAM, at equal cost, and compare in gap: copy and change.

    python tests/example_flat_training.py
    hessdiag gap tests/example_flat_training.py:few -c 'flat_runs/*/last.safetensors' ... (printed at the end)

Every arm spends the same number of gradients, so SAM and NSO take half the steps of SGD. Plain SGD that stops
after as many steps stands beside them ("early"): without it, a gain could be early stopping alone.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import Subset, default_collate

import hessdiag
from hessdiag.regularizers import NSO, SAM
from hessdiag.regularizers.wrapper import Regularizer
from hessdiag.sources.datasets import digits
from hessdiag.sources.digits import accuracy, digits_mlp

EXAMPLES, BATCH, GRADIENTS = 200, 50, 800
ARMS = {  # what wraps SGD, and the gradients of a step
    "sgd": (None, 1),
    "early": (None, 2),  # half the steps, one gradient each
    "nso": (lambda sgd: NSO(sgd, sigma=0.05), 2),
    "sam": (lambda sgd: SAM(sgd, rho=0.1), 2),
}
TASKS = {"tuned": ("sgd", "early", "nso"), "scratch": ("sgd", "early", "sam")}
MEASURES = ("lambda_max", "trace", "sam_sharpness", "path_norm")


def few() -> hessdiag.Problem:
    """Two hundred upright digits to train, all test digits; for gap."""
    train, test = digits()
    splits = {"train": Subset(train, range(EXAMPLES)), "test": test}
    return hessdiag.Problem(digits_mlp(), splits, criterion="cross_entropy", metric=accuracy)


def pretrained() -> nn.Module:
    """A network that knows the digits lying on their side; its head is to be learned anew."""
    torch.manual_seed(0)
    model, (x, y) = digits_mlp(), default_collate(list(digits()[0]))
    trained(model, x.rot90(1, (2, 3)), y, "sgd", seed=0)
    model[-1].reset_parameters()
    return model


def trained(model: nn.Module, x: Tensor, y: Tensor, arm: str, seed: int) -> list[dict[str, float]]:
    """Trains for `GRADIENTS` gradients; what the regularizer reports at each step, to plot."""
    wrap, cost = ARMS[arm]
    steps, generator = GRADIENTS // cost, torch.Generator().manual_seed(seed)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = sgd if wrap is None else wrap(sgd)
    schedule, logged = CosineAnnealingLR(optimizer, T_max=steps), []
    for _ in range(steps):
        rows = torch.randint(len(x), (BATCH,), generator=generator)

        def closure(rows: Tensor = rows) -> Tensor:
            return F.cross_entropy(model(x[rows]), y[rows])

        if isinstance(optimizer, Regularizer):
            optimizer.step(closure)
            logged.append(optimizer.report)
        else:
            optimizer.zero_grad()
            closure().backward()
            optimizer.step()
        schedule.step()
    return logged


def run(folder: Path, seeds: int = 4) -> None:
    """One checkpoint for each task, arm and seed."""
    x, y = default_collate(list(few().data["train"]))
    start = pretrained()
    for task, arms in TASKS.items():
        for arm in arms:
            for seed in range(seeds):
                torch.manual_seed(seed)
                model = copy.deepcopy(start) if task == "tuned" else digits_mlp()
                logged = trained(model, x, y, arm, seed)
                place = folder / f"{task}-{arm}-seed{seed}"
                place.mkdir(parents=True, exist_ok=True)
                save_file(model.state_dict(), place / "last.safetensors")
                share = f", share of the penalty at the end {logged[-1]['share']:.2f}" if logged else ""
                print(f"{place.name}: trained{share}")


def command(folder: Path, measures: Sequence[str] = MEASURES) -> list[str]:
    """The comparison: losses and accuracies with intervals, and curvature beside them."""
    names = "(?P<task>tuned|scratch)-(?P<arm>[a-z]+)-seed(?P<seed>[0-9]+)"
    chosen = [word for name in measures for word in ("--measures", name)]
    checkpoints = str(folder / "*" / "last.safetensors")
    return ["gap", f"{__file__}:few", "-c", checkpoints, *chosen, "--meta-from", names]


if __name__ == "__main__":
    run(Path("flat_runs"))
    print("hessdiag", *(f"'{word}'" if set(word) & set("*?|") else word for word in command(Path("flat_runs"))))
