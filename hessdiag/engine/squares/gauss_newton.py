"""tr(G) without probes; `curved` says where tr(H) = tr(G).

G = (1/W) Σ_n J_nᵀ S_n J_n with S_n = d²loss/doutputs² of example n. With S_n = Σ_c s_c u_c u_cᵀ,
tr(J_nᵀ S_n J_n) = Σ_c s_c ‖J_nᵀ u_c‖²: exact, from one backward pass per example and class, and the sums split
per tensor and per example for free. With many outputs (a language model) S_n = A_n A_nᵀ takes random signs z
instead: E‖J_nᵀ A_n z‖² has the same mean. Labels drawn from the model's own distribution would do as well, but
spread 3.5 times as far (a one-block GPT, 46% of the trace a draw against 13%), and jump from weights to weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from hessdiag.criteria import CRITERIA
from hessdiag.engine.products.composition import beside_outputs
from hessdiag.engine.products.curvature import Curvature
from hessdiag.engine.products.functional import Functional
from hessdiag.engine.products.stacking import vmapped
from hessdiag.engine.products.tangents import load_forward_mode
from hessdiag.engine.squares.loss_roots import pass_over, root, signed_root, signs_of
from hessdiag.engine.squares.pullbacks import Pullbacks, pullbacks
from hessdiag.errors import Refused, one_line
from hessdiag.samples import divide, map_tensors, row_count

EXACT_OUTPUTS = 32  # most outputs per example for the exact sum: beyond, random signs cost less
OUTPUT_DRAWS = 16  # draws of signs at the outputs, a backward pass of the sample set each
CHUNK_BYTES = 32 * 2**20  # for the signs at the outputs
KNOWN = f"{', '.join(CRITERIA)} and torch's losses"
FAILURES = (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError)
"""What a model that was made for whole batches raises on single examples."""
SLOWER = 1.5  # the first piece is
DEPENDENT = 1e-3  # relative: rounding leaves 1e-5, batch statistics 1e-1


@dataclass(frozen=True)
class GaussNewtonTrace:
    """tr(G), per example and per tensor.

    Attributes:
        exact: whether no signs were drawn.
        per_example: (draws, examples) float64, unnormalised; one draw if exact.
        per_tensor: (draws, tensors) float64, of the mean loss.
        counts: what each example stands for in the mean, (examples,) float64.
        gradients: backward passes over the sample set it took.
    """

    exact: bool
    per_example: Tensor
    per_tensor: Tensor
    counts: Tensor
    gradients: int

    @property
    def draws(self) -> Tensor:
        """tr(G) of each draw, (draws,) float64."""
        return self.per_example.sum(1) / self.counts.sum()


class Ended(Exception):
    """The budget is spent."""


def gauss_newton_trace(
    operator: Curvature, *, seed: int = 0, draws: int = OUTPUT_DRAWS
) -> GaussNewtonTrace | Refused:
    """tr(G) on the operator's sample set.

    Cost: one forward and C backward passes of per-example gradients, C the number of outputs per example
    (at most 32); else one forward and ``draws`` backward passes. Without ``draws``, exactly or not at all.

    Returns:
        The trace; or one line saying why it cannot be computed like this.
    """
    if why := kept_together(operator):
        return why
    try:
        with operator.timed():
            outputs = outputs_per_example(operator)
            if isinstance(outputs, Refused):
                return outputs
            exact = outputs <= EXACT_OUTPUTS
            if not exact and not draws:
                return Refused(f"{outputs} outputs per example, more than {EXACT_OUTPUTS}")
            if not exact and operator.problem.built_in is None:
                return Refused(
                    f"{outputs} outputs per example, and the root of its curvature is known for {KNOWN} only"
                )
            pulled = pullbacks(operator)
            try:
                per_example, per_tensor = _accumulate(operator, pulled, exact, seed, draws)
            except Ended:
                return Refused("the budget ended before all per-example gradients were formed")
            except (RuntimeError, IndexError) as error:
                if pulled.all_slow:
                    raise
                pulled.give_up(error)
                per_example, per_tensor = _accumulate(operator, pulled, exact, seed, draws)
            operator.notes.extend(f"tr(G): {reason}" for reason in pulled.reasons)
    except FAILURES as error:
        return failed(error)
    singles = [one for batch in operator.samples.batches for one in divide(batch, 1)]  # on the host
    counts = torch.tensor([operator.problem.count(one) for one in singles], dtype=torch.float64)
    return GaussNewtonTrace(
        exact, per_example, per_tensor / operator.total_weight, counts, outputs if exact else draws
    )


def kept_together(operator: Curvature) -> Refused | None:
    """Why the loss is no sum over examples that could be taken one by one, if that can be seen without trying."""
    if why := beside_outputs(operator):
        return Refused(why)
    if operator.problem.weight is not None:
        return Refused("the loss has a weight of its own, so that examples cannot be taken apart")
    if any(row_count(batch) is None for batch in operator.batches):
        return Refused("examples cannot be taken out of their batches")
    return None


def failed(error: BaseException) -> Refused:
    """One of `FAILURES` in words."""
    return Refused(f"per-example gradients fail here ({one_line(error, 100)})")


def outputs_per_example(operator: Curvature) -> int | Refused:
    """Outputs per example; or why examples cannot be taken one by one."""
    function = operator.function
    piece = next(divide(operator.batches[0], 2))
    with torch.no_grad():
        together = function.outputs(function.theta, piece)
        if together.dim() < 2 or together.shape[0] != row_count(piece):
            return Refused(f"outputs of shape {tuple(together.shape)} do not hold one example per row")
        ones = list(divide(piece, 1))
        alone = [function.outputs(function.theta, one) for one in ones]
        whole = float(operator.problem.loss_sum(together, piece))
        parts = sum(float(operator.problem.loss_sum(out, one)) for out, one in zip(alone, ones, strict=True))
    scale = float(together.abs().max()) or 1.0
    if float((together - torch.cat(alone)).abs().max()) > DEPENDENT * scale:
        return Refused("an example's outputs depend on the others in its batch")
    if not operator.divisible or abs(whole - parts) > DEPENDENT * abs(whole):
        return Refused("the loss of a batch is not the sum over its examples")
    return together[0].numel()


def _accumulate(
    operator: Curvature, pulled: Pullbacks, exact: bool, seed: int, draws: int
) -> tuple[Tensor, Tensor]:
    """Per (draw, example) and per (draw, tensor), of the summed loss."""
    function = operator.function
    seeds = torch.randint(2**62, (draws,), generator=torch.Generator().manual_seed(seed)).tolist()
    # a stream per draw: the same signs whatever the batches, and a longer run begins with a shorter one's
    generators = [torch.Generator().manual_seed(number) for number in seeds]
    if operator.group.size > 1:
        return _over_ranks(operator, pulled, exact, generators)
    examples, tensors = [], torch.zeros(1 if exact else draws, len(function.names), dtype=torch.float64)
    room, done = operator.left, 0
    for batch in operator.batches:
        for piece in divide(batch, pulled.rows()):
            if operator.stopped or _too_slow(room - operator.left, done / operator.samples.examples, room):
                raise Ended
            done += row_count(piece) or 0
            squares = _exact(pulled, piece) if exact else _drawn(pulled, piece, generators)
            squares = squares.detach()  # a criterion's own parameters
            examples.append(squares.sum(2))
            tensors += squares.sum(1)
    return torch.cat(examples, dim=1), tensors


def _over_ranks(
    operator: Curvature, pulled: Pullbacks, exact: bool, generators: list[Generator]
) -> tuple[Tensor, Tensor]:
    """The same by every rank for its batches, with the signs that one process draws for them."""
    if operator.stopped:
        raise Ended
    function, number = operator.function, 1 if exact else len(generators)
    sizes = [row_count(batch) or 1 for batch in operator.batches]

    def work() -> tuple[Tensor, ...]:
        examples = torch.zeros(number, sum(sizes), dtype=torch.float64)
        tensors = torch.zeros(number, len(function.names), dtype=torch.float64)
        for index, columns in enumerate(torch.split(examples, sizes, dim=1)):
            done = 0
            for piece in divide(operator.batches[index], pulled.rows()):
                if index in operator.mine:
                    squares = (_exact(pulled, piece) if exact else _drawn(pulled, piece, generators)).detach()
                    columns[:, done : done + squares.shape[1]] = squares.sum(2)
                    done += squares.shape[1]
                    tensors += squares.sum(1)
                elif not exact:
                    with torch.no_grad():
                        outputs = function.outputs(function.theta, piece)
                    pass_over(function.problem, outputs, piece, generators)
        return examples, tensors

    summed = operator.group.total(work)
    return summed[0], summed[1]


def _too_slow(taken: float, share: float, room: float) -> bool:
    """Whether the rest, at the pace of what is done, would take more than there is: then it need not go on."""
    return math.isfinite(room) and share > 0 and taken / share > SLOWER * room


def _exact(pulled: Pullbacks, piece: Any) -> Tensor:
    """Σ_c s_c ‖J_nᵀ u_c‖² per example and tensor, (1, examples, tensors) float64."""
    captured = pulled.forward(piece)
    signs, columns = loss_curvature(pulled.function, captured.outputs.detach(), piece)
    return torch.einsum("nc,nct->nt", signs.cpu(), pulled.squares(captured, piece, columns))[None]


def _drawn(pulled: Pullbacks, piece: Any, generators: list[torch.Generator]) -> Tensor:
    """‖J_nᵀ A_n z‖² per draw, example and tensor, (draws, examples, tensors) float64."""
    captured = pulled.forward(piece)
    outputs = captured.outputs.detach()
    group = max(1, CHUNK_BYTES // (outputs.numel() * 8))
    parts = []
    for begin in range(0, len(generators), group):
        some = generators[begin : begin + group]
        problem = pulled.function.problem
        signs = signs_of(problem, outputs, piece, some)
        roots = [signed_root(problem, outputs, piece, one) for one in signs]
        parts.append(pulled.squares(captured, piece, torch.stack(roots, dim=1)))
    return torch.cat(parts, dim=1).transpose(0, 1)


def loss_curvature(function: Functional, outputs: Tensor, piece: Any) -> tuple[Tensor, Tensor]:
    """Signs (n, c) and √|s_c| u_c (n, c, outputs) of every S_n, without columns zero throughout."""
    known = root(function.problem, outputs, piece)
    if known is not None:
        return torch.ones(known.shape[:2], dtype=torch.float64), known
    shape = outputs.shape[1:]

    def loss(flat: Tensor, example: Any) -> Tensor:
        row = map_tensors(example, lambda leaf: leaf[None])
        return function.problem.loss_sum(flat.reshape(1, *shape), row)

    load_forward_mode()
    curvatures = vmapped(torch.func.hessian(loss), outputs.flatten(1), piece)
    values, vectors = torch.linalg.eigh(curvatures.double())
    keep = values.abs().amax(0) > 1e-12 * values.abs().max().clamp(min=1e-300)
    columns = (vectors * values.abs().sqrt()[:, None, :]).transpose(1, 2)[:, keep]
    return values.sign()[:, keep], columns.to(outputs.dtype).reshape(len(outputs), -1, *shape)
