"""S_n = A_n A_nᵀ in closed form: how a loss's curvature is pulled back from the outputs.

For losses of single elements S is diagonal, 2 I for squared errors, and A its root. For cross-entropies
S = s (diag(p) − p pᵀ) and A = √s (diag(√p) − p √pᵀ), s what the row's targets, class weights and smoothing sum to.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from hessdiag.criteria import Criterion
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
    criterion = problem.built_in
    if criterion is None:
        return None
    n, size, shape = len(outputs), outputs[0].numel(), outputs.shape[1:]
    targets = problem.targets(piece)
    eye = torch.eye(size, dtype=outputs.dtype, device=outputs.device).view(size, *shape)
    if not criterion.of_classes:
        bends = criterion.bends(outputs, targets)
        if bool((bends < 0).any()):
            return None
        return eye * bends.sqrt().to(outputs.dtype)[:, None]
    places = torch.arange(size, device=outputs.device).view(1, *shape).to(outputs)
    kept = criterion.align(places, targets[:1])[0][:, :-1].flatten().long()
    repeated = targets.repeat_interleave(len(kept), 0)
    units = criterion.align(eye[kept].repeat(n, *[1] * len(shape)), repeated)[0].double()
    logits, labels = criterion.align(outputs.repeat_interleave(len(kept), 0), repeated)
    if bool((criterion.sizes(labels) < 0).any()):
        return None
    p = logits.detach().double().softmax(-1).sqrt()
    units[:, -1] = -(units * p).sum(-1) / (1 + p[:, -1])
    return _applied(criterion, outputs.repeat_interleave(len(kept), 0), repeated, units).view(n, len(kept), *shape)


def signs_of(problem: Problem, outputs: Tensor, piece: Any, generators: Sequence[Generator]) -> Tensor:
    """Random signs z for `signed_root`, of each generator its own; in one copy to the outputs' device."""
    criterion = problem.built_in
    assert criterion is not None
    of_classes = criterion.of_classes
    shape = criterion.align(outputs, problem.targets(piece))[0].shape if of_classes else outputs.shape
    return torch.stack([_signs(shape, one) for one in generators]).to(outputs.device)


def signed_root(problem: Problem, outputs: Tensor, piece: Any, signs: Tensor) -> Tensor:
    """A_n z for random signs z, shaped like the outputs, for a criterion whose formula is known."""
    criterion, targets = problem.built_in, problem.targets(piece)
    assert criterion is not None
    if not criterion.of_classes:
        return criterion.bends(outputs, targets).sqrt().to(outputs) * signs.to(outputs)
    return _applied(criterion, outputs, targets, signs.to(torch.float64))


def pass_over(problem: Problem, outputs: Tensor, piece: Any, generators: Sequence[Generator]) -> None:
    """Take the signs of examples that another rank looks at out of the generators."""
    signs_of(problem, outputs, piece, generators)


def _applied(criterion: Criterion, outputs: Tensor, targets: Tensor, z: Tensor) -> Tensor:
    """A z shaped like the outputs, z (positions, classes) float64: of cross-entropy."""
    leaf = outputs.detach().requires_grad_()
    with torch.enable_grad():
        logits, labels = criterion.align(leaf, targets)
        p = logits.detach().double().softmax(-1)
        roots = p.sqrt() * z
        signed = roots - p * roots.sum(-1, keepdim=True)
        whole = (logits.double() * signed * criterion.sizes(labels).sqrt()[:, None]).sum()
    (cotangent,) = torch.autograd.grad(whole, leaf)
    return cotangent


def _signs(shape: torch.Size, generator: Generator) -> Tensor:
    return torch.randint(2, tuple(shape), generator=generator).mul_(2).sub_(1)
