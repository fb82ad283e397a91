"""What a preflight says, and what it can say of a model by looking at it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from hessdiag.engine.products.curvature import Curvature

Level = Literal["ok", "note", "warning", "fault"]


@dataclass(frozen=True)
class Finding:
    """One thing looked at.

    Attributes:
        level: "ok", "note" (a fact that changes how the numbers read), "warning", or "fault" (refused).
        check: what was looked at.
        text: what was found, its cause and the way out, on one line.
    """

    level: Level
    check: str
    text: str


def model_facts(operator: Curvature) -> list[Finding]:
    """Modes, frozen, tied and half-precision weights: what changes how the numbers read."""
    model = operator.problem.bare_model()
    facts: list[Finding] = []
    modules = list(model.modules())
    norms = [m for m in modules if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if any(m.training and m.running_mean is not None for m in norms):
        facts.append(
            Finding("note", "mode", "BatchNorm was in training mode; measured with its running statistics")
        )
    if any(m.running_mean is None for m in norms):
        text = (
            "BatchNorm keeps no running statistics (track_running_stats=False) and normalises by the batch: the "
        )
        facts.append(Finding("note", "mode", text + "loss depends on how the samples are cut into batches"))
    if any(isinstance(m, nn.modules.dropout._DropoutNd) and m.training and m.p > 0 for m in modules):
        facts.append(Finding("note", "mode", "dropout was on; measured with dropout off"))
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    if frozen:
        facts.append(Finding("note", "parameters", f"{frozen:,} frozen weights do not count"))
    unique = {id(p) for p in model.parameters()}
    names = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    tied = sum(1 for count in names.values() if count > 1)
    if tied:
        facts.append(Finding("note", "parameters", f"{tied} of {len(unique)} tensors are tied: each counts once"))
    half = {str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.dtype.itemsize < 4}
    if half:
        dtype = str(operator.dtype).removeprefix("torch.")
        facts.append(
            Finding("note", "precision", f"weights are {', '.join(sorted(half))}; measured in {dtype} copies")
        )
    facts += _read_as(operator)
    known = operator.problem.built_in
    if known is not None and known.scale is not None:
        text = (
            f"{known.shown} is summed over the {operator.samples.examples:,} examples measured: the numbers grow "
        )
        facts.append(Finding("note", "loss", text + "with the samples; those of a mean do not"))
    if not operator.problem.has_outputs:
        facts.append(
            Finding("note", "loss", "a loss(model, batch) gives the Hessian only: no G, R or exact trace")
        )
    return facts


def _read_as(operator: Curvature) -> list[Finding]:
    """Targets that are read in another shape than theirs."""
    problem, batch = operator.problem, operator.batches[0]
    if problem.criterion != "mse":
        return []
    with operator.timed(), torch.no_grad():
        outputs, targets = operator.function.outputs(operator.function.theta, batch), problem.targets(batch)
    if outputs.shape == targets.shape:
        return []
    text = f"targets {tuple(targets.shape)} were read as outputs {tuple(outputs.shape)}, row by row; "
    return [Finding("note", "targets", text + "torch's mse_loss would compare every row with every other")]
