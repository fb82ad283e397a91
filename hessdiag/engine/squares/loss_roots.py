"""S_n = A_n A_nᵀ in closed form for the built-in losses: how a loss's curvature is pulled back from the outputs.

Of squared errors S = 2 I. Of cross-entropy S = diag(p) − p pᵀ, and A = diag(√p) − p √pᵀ, times the root of what
the row's targets sum to.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Generator, Tensor

from hessdiag.criteria import IGNORE_INDEX, align_classes
from hessdiag.problem import Problem


def root(problem: Problem, outputs: Tensor, piece: Any) -> Tensor | None:
    """A_n column by column.

    Of cross-entropy one column less per position than classes: A √p = 0, so A Q, with Q the reflection that takes
    the last unit vector to −√p, has nothing in its last column.

    Args:
        problem: whose criterion counts.
        outputs: (n, ...), detached.
        piece: the examples.

    Returns:
        (n, columns, ...) of the outputs' dtype; None for a criterion of one's own, or soft targets that sum to
        less than nothing.
    """
    n, size, shape = len(outputs), outputs[0].numel(), outputs.shape[1:]
    eye = torch.eye(size, dtype=outputs.dtype, device=outputs.device).view(size, *shape)
    if problem.criterion == "mse":
        return math.sqrt(2) * eye.expand(n, *eye.shape)
    if not isinstance(problem.criterion, str):
        return None
    targets, criterion = problem.targets(piece), problem.criterion
    places = torch.arange(size, device=outputs.device).view(1, *shape).to(outputs)
    kept = align_classes(places, targets[:1], criterion)[0][:, :-1].flatten().long()
    repeated = targets.repeat_interleave(len(kept), 0)
    units = align_classes(eye[kept].repeat(n, *[1] * len(shape)), repeated, criterion)[0].double()
    logits, labels = align_classes(outputs.repeat_interleave(len(kept), 0), repeated, criterion)
    if bool((_weights(labels) < 0).any()):
        return None
    p = logits.detach().double().softmax(-1).sqrt()
    units[:, -1] = -(units * p).sum(-1) / (1 + p[:, -1])
    return _applied(criterion, outputs.repeat_interleave(len(kept), 0), repeated, units).view(n, len(kept), *shape)


def signed_root(problem: Problem, outputs: Tensor, piece: Any, generator: Generator) -> Tensor:
    """A_n z for random signs z, shaped like the outputs, for a built-in criterion."""
    if problem.criterion == "mse":
        return math.sqrt(2) * _signs(outputs.shape, generator).to(outputs)
    criterion, targets = str(problem.criterion), problem.targets(piece)
    signs = _signs(align_classes(outputs, targets, criterion)[0].shape, generator)
    return _applied(criterion, outputs, targets, signs.to(outputs.device, torch.float64))


def _applied(criterion: str, outputs: Tensor, targets: Tensor, z: Tensor) -> Tensor:
    """A z shaped like the outputs, z (positions, classes) float64: of cross-entropy."""
    leaf = outputs.detach().requires_grad_()
    with torch.enable_grad():
        logits, labels = align_classes(leaf, targets, criterion)
        p = logits.detach().double().softmax(-1)
        roots = p.sqrt() * z
        signed = roots - p * roots.sum(-1, keepdim=True)
        whole = (logits.double() * signed * _weights(labels).sqrt()[:, None]).sum()
    (cotangent,) = torch.autograd.grad(whole, leaf)
    return cotangent


def _weights(labels: Tensor) -> Tensor:
    """Soft targets weigh a row by their sum, ignored ones by nothing."""
    return labels.double().sum(-1) if labels.is_floating_point() else (labels != IGNORE_INDEX).double()


def _signs(shape: torch.Size, generator: Generator) -> Tensor:
    return torch.randint(2, tuple(shape), generator=generator).mul_(2).sub_(1)
