"""Small training runs that the promises about regularizers share."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hessdiag.regularizers import ASAM, GSAM, MSAM, NSO, SAM, USAM, FriendlySAM, LookSAM
from tests.models import labels, randn

DIFFERENCE = 1e-6  # step of central differences in float64: error about 1e-9 relative
KINDS = {
    "SAM": lambda optimizer, **options: SAM(optimizer, rho=0.3, **options),
    "ASAM": lambda optimizer, **options: ASAM(optimizer, rho=0.3, **options),
    "NSO": lambda optimizer, **options: NSO(optimizer, sigma=0.2, draws=2, mix=0.2, **options),
    "USAM": lambda optimizer, **options: USAM(optimizer, rho=0.3, **options),
    "MSAM": lambda optimizer, **options: MSAM(optimizer, rho=0.3, **options),
    "GSAM": lambda optimizer, **options: GSAM(optimizer, rho=0.3, **options),
    "LookSAM": lambda optimizer, **options: LookSAM(optimizer, rho=0.3, every=1, **options),
    "FriendlySAM": lambda optimizer, **options: FriendlySAM(optimizer, rho=0.3, **options),
}
PASSES = dict.fromkeys(KINDS, 2) | {"NSO": 5}
X, Y = randn(12, 4), labels(12, 3)


def net(*middle: nn.Module, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def loss_of(model: nn.Module, rows: slice = slice(None)):
    dtype = next(model.parameters()).dtype
    return lambda: F.cross_entropy(model(X[rows].to(dtype)), Y[rows])


def sgd(model: nn.Module, **options: float) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, **options)


def state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> list[Tensor]:
    """Everything a failed step must leave alone, copied."""
    tensors = [*model.state_dict().values(), *(p.grad for p in model.parameters() if p.grad is not None)]
    for own in optimizer.state.values() if optimizer else ():
        tensors += [value for value in own.values() if isinstance(value, Tensor)]
    return [tensor.detach().clone() for tensor in tensors]


def near(a: list[Tensor], b: list[Tensor], tolerance: float = 1e-12) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.allclose(x, y, rtol=tolerance, atol=tolerance), float((x - y).abs().max())


class Net:
    """A tanh network in float64, its batch, and its loss as a function of a flat θ."""

    def __init__(self, *middle: nn.Module) -> None:
        torch.manual_seed(0)
        layers = [nn.Linear(4, 6), *middle, nn.Tanh(), nn.Linear(6, 3)]
        self.model = nn.Sequential(*layers).double()
        self.x, self.y = randn(12, 4), labels(12, 3)
        self.params = list(self.model.parameters())

    def closure(self) -> Tensor:
        return F.cross_entropy(self.model(self.x), self.y)

    @property
    def theta(self) -> Tensor:
        return nn.utils.parameters_to_vector(self.params).detach().clone()

    def loss(self, theta: Tensor) -> Tensor:
        names = [name for name, _ in self.model.named_parameters()]
        pieces = torch.split(theta, [p.numel() for p in self.params])
        tensors = {n: t.view_as(p) for n, t, p in zip(names, pieces, self.params, strict=True)}
        return F.cross_entropy(torch.func.functional_call(self.model, tensors, (self.x,)), self.y)

    def split(self, vector: Tensor) -> tuple[Tensor, ...]:
        pieces = torch.split(vector, [p.numel() for p in self.params])
        return tuple(t.view_as(p) for t, p in zip(pieces, self.params, strict=True))

    def sgd(self, **options: float) -> torch.optim.SGD:
        return torch.optim.SGD(self.params, lr=0.1, **options)

    def stepped(self, regularizer) -> Tensor:
        """The gradient one step hands to the optimizer, flat."""
        regularizer.step(self.closure)
        return flat([p.grad for p in self.params])


def flat(pieces) -> Tensor:
    return torch.cat([piece.reshape(-1) for piece in pieces]).detach().clone()


def slope(function, theta: Tensor) -> Tensor:
    """The gradient by central differences of values."""
    eye = torch.eye(len(theta), dtype=theta.dtype) * DIFFERENCE
    with torch.no_grad():
        return torch.stack([function(theta + e) - function(theta - e) for e in eye]) / (2 * DIFFERENCE)


def close(a: Tensor, b: Tensor, tolerance: float) -> None:
    assert float((a - b).norm()) <= tolerance * float(b.norm()), float((a - b).norm() / b.norm())
