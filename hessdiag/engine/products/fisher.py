"""The empirical and the Monte-Carlo Fisher matrix: outer products of gradients, without forming the gradients.

The mean loss is a sum of terms ℓ_t(f_t) over W: one per example, or one per position where a cross-entropy has
several; W is what the mean divides by: examples, positions, for "mse" numbers. With J_t = df_t/dθ and
a_t = dℓ_t/df_t both matrices are

    F = (1/W) Σ_t J_tᵀ a_t a_tᵀ J_t,

the Gauss-Newton matrix with a_t a_tᵀ in the place of d²ℓ_t/df_t². The empirical Fisher takes a_t at the data's own
targets. The Monte-Carlo Fisher takes it at targets drawn from the model's own distribution: labels from the
softmax or the sigmoid, normal residuals of variance ½ for squared errors. Its mean over draws is G.
Normalised as curvlinops' EFLinearOperator and FisherMCLinearOperator.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Generator, Tensor

from hessdiag.criteria import Criterion
from hessdiag.engine.products.composition import require_outputs
from hessdiag.engine.products.curvature import Curvature, Indices
from hessdiag.engine.products.folding import Folded
from hessdiag.engine.products.functional import Functional
from hessdiag.engine.products.tangents import push
from hessdiag.errors import BudgetError, UsageError
from hessdiag.problem import Problem
from hessdiag.samples import SampleSet, row_count

FisherKind = Literal["empirical_fisher", "mc_fisher"]
FISHERS = get_args(FisherKind)
DRAWN = ("cross_entropy", "causal_lm", "nll", "mse", "binary_cross_entropy")
"""Losses that are the negative logarithm of a probability: their targets can be drawn."""


class Fisher(Curvature):
    """One of the two Fisher matrices of a problem, a fixed matrix: what is drawn is drawn once.

    Attributes:
        kind: "empirical_fisher" or "mc_fisher".
        draws: targets per term of the Monte-Carlo Fisher.
        noise: uniform numbers per batch, (rows, draws, places) float64; None for the empirical Fisher. A row's do
            not depend on how the sample set is cut into batches.
    """

    def __init__(
        self,
        problem: Problem,
        samples: SampleSet,
        *,
        kind: FisherKind,
        draws: int = 1,
        seed: int = 0,
        **options: Any,
    ) -> None:
        if kind not in FISHERS:
            msg = f"`operator={kind!r}`: must be {' or '.join(FISHERS)}"
            raise UsageError(msg)
        _require(problem, kind, draws)
        super().__init__(problem, samples, kind="ggn", method="retained_graph", **options)
        require_outputs(self, "ggn")
        self.kind, self.draws = kind, draws  # type: ignore[assignment]
        self.semidefinite = True  # a mean of outer products, whatever the loss
        sampled = kind == "mc_fisher"
        self.noise = (
            list(_uniform(self.problem, self.batches, draws, seed)) if sampled else [None] * len(self.batches)
        )

    def by_batch(self, rows: Tensor) -> Iterator[tuple[Indices, Tensor]]:
        """Products (k, 1, P) of each batch's sum of terms, with its index."""
        for index in self.mine:
            batch = (self.batches[index], self.noise[index])
            yield slice(index, index + 1), self.fitting(batch, rows, self._form)[:, None]

    def _form(self, piece: Any, rows: Tensor) -> Tensor:
        function, (batch, noise) = self.function, piece
        with Folded():
            outputs = function.outputs(function.theta, batch)
        f = in_terms(self.problem, outputs, batch)
        gradients = gradients_of_terms(function, outputs, batch, noise)
        products = []
        for pushed in push(f, function.theta, [function.split(row) for row in rows]):
            along = (gradients * pushed).sum(-1, keepdim=True)
            curved = (gradients * along).sum(0) / len(gradients)
            pulled = torch.autograd.grad(f, function.theta, curved, retain_graph=True, materialize_grads=True)
            products.append(function.flat(pulled))
        return torch.stack(products)


def in_terms(problem: Problem, outputs: Tensor, batch: Any) -> Tensor:
    """The outputs with a row for each term of the loss, (terms, outputs of a term); linear in the outputs."""
    known = problem.built_in
    if known is not None and known.of_classes:
        return known.align(outputs, problem.targets(batch))[0]
    return outputs.reshape(outputs.shape[0], -1)


def gradients_of_terms(function: Functional, outputs: Tensor, batch: Any, noise: Tensor | None) -> Tensor:
    """The gradients a of the terms by their own outputs, (draws, terms, outputs of a term), detached.

    Args:
        function: whose criterion counts.
        outputs: of the batch.
        batch: its targets.
        noise: uniform numbers, (rows, draws, places), that draw targets; None for the batch's own targets.
    """
    problem, leaf, known = function.problem, outputs.detach().requires_grad_(), function.problem.built_in
    if noise is None or known is None:
        (found,) = torch.autograd.grad(problem.loss_sum(leaf, batch), leaf)
        size = (
            1.0 if known is None or known.scale is None else known.scale
        )  # it multiplies a aᵀ once, as it does G
        return in_terms(problem, found, batch)[None] / math.sqrt(size)
    drawn, wide, targets = noise.transpose(0, 1), outputs.detach().double(), problem.targets(batch)
    if known.of_classes:
        return _of_labels(known, wide, targets, drawn).to(outputs)
    roots = known.bends(wide, targets).reshape(len(wide), -1).sqrt()
    if known.name == "mse":
        normal: Tensor = torch.special.ndtri(drawn.clamp(min=torch.finfo(drawn.dtype).tiny))
        return (roots * normal).to(outputs)
    p = torch.sigmoid(wide).reshape(len(wide), -1)
    spread = (p * (1 - p)).sqrt().clamp(min=torch.finfo(p.dtype).tiny)
    return (roots * (p - (drawn < p).double()) / spread).to(outputs)


def _of_labels(known: Criterion, outputs: Tensor, targets: Tensor, drawn: Tensor) -> Tensor:
    """√size (p − the unit vector of a label drawn from p), (draws, terms, classes) float64."""
    logits, labels = known.align(outputs, targets)
    p = logits.softmax(-1)
    steps = p.cumsum(-1)[:, :-1].contiguous()
    chosen = torch.searchsorted(steps, drawn.reshape(len(drawn), -1).T.contiguous(), right=True).T
    gradients = p - torch.nn.functional.one_hot(chosen, p.shape[-1])
    weighted: Tensor = gradients * known.sizes(labels).sqrt()[:, None]
    return weighted


def _uniform(problem: Problem, batches: list[Any], draws: int, seed: int) -> Iterator[Tensor]:
    """Numbers in [0, 1) for every place of a batch where something is drawn."""
    seeds = torch.randint(2**62, (draws,), generator=Generator().manual_seed(seed)).tolist()
    # a stream per draw: the same numbers whatever the batches, and more draws begin with fewer ones
    generators = [Generator().manual_seed(number) for number in seeds]
    for batch in batches:
        targets, rows = problem.targets(batch), row_count(batch) or 1
        known = problem.built_in
        soft = known is not None and known.of_classes and targets.is_floating_point()
        places = targets.numel() // rows // (targets.shape[1] if soft else 1)
        numbers = [torch.rand(rows, 1, places, generator=g, dtype=torch.float64) for g in generators]
        yield torch.cat(numbers, dim=1).to(targets.device)


def _require(problem: Problem, kind: str, draws: int) -> None:
    if problem.weight is not None:
        msg = (
            f"`operator={kind!r}`: the loss has a weight of its own, so that its terms cannot be taken apart: ggn"
        )
        raise UsageError(msg)
    known = problem.built_in
    if kind == "mc_fisher" and (known is None or known.name not in DRAWN):
        msg = "`operator='mc_fisher'` needs a loss whose distribution is known (cross-entropy, squares, binary); "
        raise UsageError(msg + "its mean is the Gauss-Newton matrix, `operator='ggn'`")
    if draws < 1:
        msg = f"`draws={draws}`: a Monte-Carlo Fisher needs at least 1"
        raise BudgetError(msg)
