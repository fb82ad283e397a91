"""Small models and data whose Hessians are known: in closed form, or by the dense autograd Hessian."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessdiag.engine.products.curvature import Curvature
from hessdiag.problem import Problem
from hessdiag.samples import draw


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def labels(n: int, classes: int, seed: int = 1) -> Tensor:
    return torch.randint(0, classes, (n,), generator=generator(seed))


def draws(seed: int = 0) -> Callable[..., Tensor]:
    """Normal tensors of the shapes asked for, one stream for all of them."""
    stream = generator(seed)
    return lambda *shape: torch.randn(*shape, generator=stream, dtype=torch.float64)


def rotated(
    eigenvalues: np.ndarray, seed: int | np.random.Generator = 0, dtype: torch.dtype = torch.float64
) -> Tensor:
    """A dense symmetric matrix of these eigenvalues, in a random basis."""
    size = len(eigenvalues)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))
    matrix = torch.from_numpy(basis * np.asarray(eigenvalues, dtype=float) @ basis.T)
    return ((matrix + matrix.T) / 2).to(dtype)


def same(a: Any, b: Any) -> bool:
    """Whether two states are equal bit for bit, tensors within dicts and lists too."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return torch.equal(a, b)
    return not isinstance(a, torch.Tensor) and not isinstance(b, torch.Tensor) and a == b


class Attention(nn.Module):
    """One block: embedding, LayerNorm, causal attention through SDPA, GELU MLP, a head over the vocabulary."""

    def __init__(self, vocabulary: int = 7, width: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(vocabulary, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, width))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        n, length, width = x.shape
        q, k, v = (
            p.view(n, length, self.heads, -1).transpose(1, 2) for p in self.qkv(self.norm(x)).split(width, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(n, length, width))
        return self.head(x + self.mlp(x))


def mlp(activation: type[nn.Module] = nn.Tanh) -> Problem:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(5, 8), activation(), nn.Linear(8, 3)).double()
    return Problem(model, {"train": (randn(40, 5), labels(40, 3))}, criterion="cross_entropy")


def cnn() -> Problem:
    """Convolution, BatchNorm with statistics of its own, ReLU, a residual connection, max-pool."""
    torch.manual_seed(4)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(3)
            self.again = nn.Conv2d(3, 3, 3, padding=1, bias=False)
            self.head = nn.Linear(12, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.norm(self.conv(x)))
            return self.head(F.max_pool2d(F.relu(x + self.again(x)), 2).flatten(1))

    model = Net().double()
    model(randn(30, 1, 4, 4, seed=9))  # training mode: gives BatchNorm statistics worth having
    return Problem(model, {"train": (randn(24, 1, 4, 4), labels(24, 3))}, criterion="cross_entropy")


def attention(vocabulary: int = 7) -> Problem:
    """Next-token loss with padded targets, so that tokens and not examples are averaged."""
    torch.manual_seed(5)
    tokens = torch.randint(0, vocabulary, (13, 5), generator=generator(6))
    targets = tokens.roll(-1, 1)
    for row in range(13):
        targets[row, 5 - row % 4 :] = -100
    return Problem(Attention(vocabulary).double(), {"train": (tokens, targets)}, criterion="cross_entropy")


def regression() -> Problem:
    torch.manual_seed(7)
    model = nn.Sequential(nn.Linear(4, 6), nn.SiLU(), nn.Linear(6, 2)).double()
    return Problem(model, {"train": (randn(22, 4), randn(22, 2, seed=2))}, criterion="mse")


def linear_regression() -> tuple[Problem, Tensor]:
    """Mean squared error of a linear map: H = 2/(n k) I_k ⊗ [X 1]ᵀ[X 1], whatever the weights."""
    torch.manual_seed(1)
    x, y = randn(20, 3), randn(20, 2, seed=1)
    problem = Problem(nn.Linear(3, 2).double(), {"train": (x, y)}, criterion="mse")
    scale = 2 / (20 * 2)
    weight = scale * torch.kron(torch.eye(2, dtype=torch.float64), x.T @ x)
    cross = scale * torch.kron(torch.eye(2, dtype=torch.float64), x.sum(0)[:, None])
    bias = scale * 20 * torch.eye(2, dtype=torch.float64)
    return problem, torch.cat([torch.cat([weight, cross], 1), torch.cat([cross.T, bias], 1)])


def softmax_regression(classes: int = 3) -> tuple[Problem, Tensor]:
    """Cross-entropy of a linear map without bias: H = 1/n Σ (diag p − p pᵀ) ⊗ x xᵀ. Two classes: logistic."""
    torch.manual_seed(2)
    x, y = randn(20, 4), labels(20, classes)
    model = nn.Linear(4, classes, bias=False).double()
    p = torch.softmax(x @ model.weight.detach().T, -1)
    s = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    H = torch.einsum("ncd,ni,nj->cidj", s, x, x).reshape(4 * classes, -1) / 20
    return Problem(model, {"train": (x, y)}, criterion="cross_entropy"), H


def dense_hessian(problem: Problem, split: str = "train") -> Tensor:
    """The mean loss's Hessian by torch.func on the whole split at once, in float64, written without hessdiag."""
    model = problem.bare_model().eval()
    inputs, targets = problem.data[split]
    named = {n: p.detach().double() for n, p in model.named_parameters()}
    sizes = [p.numel() for p in named.values()]

    def loss(flat: Tensor) -> Tensor:
        pieces = torch.split(flat, sizes)
        tensors = {n: piece.view_as(p) for (n, p), piece in zip(named.items(), pieces, strict=True)}
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            out = torch.func.functional_call(model, tensors, (inputs,))
        if problem.criterion == "mse":
            return (out - targets).square().mean()
        return F.cross_entropy(out.reshape(-1, out.shape[-1]), targets.reshape(-1), ignore_index=-100)

    flat = torch.cat([p.reshape(-1) for p in named.values()]).requires_grad_()
    # reverse over reverse, row by row: forward mode would share formulas with what is tested
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        (slope,) = torch.autograd.grad(loss(flat), flat, create_graph=True)
        rows = [torch.autograd.grad(slope[i], flat, retain_graph=True)[0] for i in range(len(flat))]
    return torch.stack(rows)


def outputs_and_jacobian(problem: Problem, split: str = "train") -> tuple[Tensor, Tensor]:
    """Outputs of the whole split and their Jacobian (n, ..., P) by torch.func, in float64."""
    model = problem.bare_model().eval()
    inputs, _ = problem.data[split]
    named = {n: p.detach().double() for n, p in model.named_parameters()}

    def outputs(tensors: dict[str, Tensor]) -> Tensor:
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            return torch.func.functional_call(model, tensors, (inputs,))

    out = outputs(named)
    pieces = torch.func.jacrev(outputs)(named)
    return out, torch.cat([pieces[n].reshape(*out.shape, -1) for n in named], dim=-1)


def dense_gauss_newton(problem: Problem, split: str = "train") -> Tensor:
    """The Gauss-Newton matrix of "cross_entropy" (classes last) or "mse" from the whole Jacobian, in float64."""
    out, jacobian = outputs_and_jacobian(problem, split)
    targets = problem.data[split][1]
    if problem.criterion == "mse":
        flat = jacobian.reshape(-1, jacobian.shape[-1])
        return 2 * flat.T @ flat / out.numel()
    jacobian, kept = jacobian.reshape(-1, *jacobian.shape[-2:]), targets.reshape(-1) != -100
    p = out.reshape(-1, out.shape[-1]).softmax(-1)
    s = torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    return torch.einsum("ncp,ncd,ndq->pq", jacobian[kept], s[kept], jacobian[kept]) / int(kept.sum())


def rounding(
    make: Callable[[], Problem], result: Callable[[Problem], Tensor], dtype: torch.dtype, roundings: int = 120
) -> float:
    """How far a result in `dtype` may lie from the truth, relative to its largest entry, on any processor.

    Kernels round in other orders, but each rounding changes the result about as much as one of its inputs would.
    So the unit is the result's own sensitivity, in float64: its change where every parameter moves by a random
    relative eps / 2. Roundings that follow one another add up as a random walk: by default those of four sweeps
    (forward, tangents, backward, tangents of backward) through three blocks of ten operations.
    """
    truth, draws, changes = result(make()), generator(17), []
    for _ in range(8):
        problem = make()
        with torch.no_grad():
            for p in problem.bare_model().parameters():
                p.mul_(1 + torch.finfo(dtype).eps / 2 * torch.randn(p.shape, generator=draws, dtype=p.dtype))
        changes.append(float((result(problem) - truth).abs().max() / truth.abs().max()))
    return (sum(c**2 for c in changes) / len(changes) * roundings) ** 0.5


ONLY_ONCE: dict[str, Callable[[Tensor], Tensor]] = {  # by the backward that torch cannot differentiate
    "_cdist_backward": lambda y: torch.cdist(y, 2 * torch.eye(y.shape[1]).to(y)),
    "_segment_reduce_backward": lambda y: torch.segment_reduce(
        y, "sum", lengths=torch.ones(len(y), dtype=torch.long, device=y.device)
    ),
}


def differentiable_once() -> tuple[str, Callable[[Tensor], Tensor]]:
    """What torch names, and an operation on rows, that this torch cannot differentiate twice: 2.14 can cdist."""
    for name, operation in ONLY_ONCE.items():
        y = torch.ones(2, 3, requires_grad=True)
        (slope,) = torch.autograd.grad(operation(y).square().sum(), y, create_graph=True)
        try:
            torch.autograd.grad(slope.sum(), y)
        except RuntimeError:
            return name, operation
    raise AssertionError("this torch differentiates all of them twice: look for another operation")


def sample(problem: Problem, batch_size: int | None = None, **options: int):
    return draw(problem.data["train"], samples=options.pop("samples", 10_000), batch_size=batch_size, **options)


def operator(
    problem: Problem,
    kind: str = "hessian",
    method: str = "retained_graph",
    dtype: torch.dtype = torch.float64,
    batch_size: int = 7,
) -> Curvature:
    """H, G or R of the whole training split, in float64."""
    return Curvature(problem, sample(problem, batch_size), kind=kind, method=method, dtype=dtype)
