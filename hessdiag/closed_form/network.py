"""A network with one hidden layer and softmax cross-entropy, and what each sample adds to its Hessian.

With x̃ = [x; 1], a = A x̃, h = s(a), h̃ = [h; 1], z = B h̃, V = B without its bias column, p = softmax z,
r = p − y, S = diag p − p pᵀ, D = diag s′(a), t = Vᵀr, the Hessian of sample n has the blocks

    (A, A):  K ⊗ x̃x̃ᵀ    K = D VᵀSV D + diag(s″(a) t)
    (B, B):  S ⊗ h̃h̃ᵀ
    (A, B):  M[i, c, q] x̃ₖ    M[i, c, q] = G_ci h̃_q + R_ci [q = i],  G = SVD,  R = r s′(a)ᵀ

by the chain rule: the setting of arXiv 2604.10202 and 2606.28662, whose texts were not used. For the Gauss-Newton
matrix s″t and R are left out. Parameters that do not count leave x̃ and h̃ without their columns.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from hessdiag.closed_form.activations import Activation
from hessdiag.errors import UsageError


@dataclass(frozen=True)
class ThreeLayer:
    """Weights of an input, hidden and output layer, float64.

    Attributes:
        hidden: (h, d).
        hidden_bias: (h,) or None.
        output: (C, h).
        output_bias: (C,) or None.
        activation: of the hidden layer.
        counted: which of the four the Hessian is about; a bias that is None never counts.
        gauss_newton: leave out the residual's part.
    """

    hidden: Tensor
    hidden_bias: Tensor | None
    output: Tensor
    output_bias: Tensor | None
    activation: Activation
    counted: tuple[bool, bool, bool, bool] = (True, True, True, True)
    gauss_newton: bool = False

    def __post_init__(self) -> None:
        """Refuse shapes that do not fit."""
        shapes = [None if t is None else tuple(t.shape) for t in self.tensors]
        h = self.hidden.shape[0]
        fits = self.hidden.dim() == 2 and self.output.dim() == 2 and self.output.shape[1] == h
        fits = fits and shapes[1] in (None, (h,)) and shapes[3] in (None, (self.output.shape[0],))
        if not fits:
            msg = f"weights of shapes {shapes}: it needs (h, d), (h,) or None, (C, h), (C,) or None"
            raise UsageError(msg)
        if not any(self.counts):
            msg = "no parameter counts: at least one of the four tensors must"
            raise UsageError(msg)

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """The four tensors in the order of ``counted``."""
        return (self.hidden, self.hidden_bias, self.output, self.output_bias)

    @property
    def counts(self) -> tuple[bool, bool, bool, bool]:
        """``counted``, without biases that do not exist."""
        one, two, three, four = (c and t is not None for c, t in zip(self.counted, self.tensors, strict=True))
        return (one, two, three, four)

    @property
    def size(self) -> int:
        """P, the number of parameters that count."""
        return sum(t.numel() for t, c in zip(self.tensors, self.counts, strict=True) if c and t is not None)

    @property
    def columns(self) -> tuple[int, int]:
        """Entries of x̃ and of h̃ that belong to parameters that count."""
        first, second, third, fourth = self.counts
        return first * self.hidden.shape[1] + second, third * self.hidden.shape[0] + fourth

    @property
    def width(self) -> int:
        """Hidden units h."""
        return self.hidden.shape[0]

    @property
    def classes(self) -> int:
        """Outputs C."""
        return self.output.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, C) of inputs (n, d)."""
        h = self.activation.at(self._affine(x, self.hidden, self.hidden_bias))[0]
        return self._affine(h, self.output, self.output_bias)

    def tile(self, x: Tensor, y: Tensor, w: Tensor) -> Tile:
        """What the samples x (n, d), with targets y (n, C) summing to 1 and weights w (n,), add to H."""
        a = self._affine(x, self.hidden, self.hidden_bias)
        h, h1, h2, h3 = self.activation.at(a)
        p = torch.softmax(self._affine(h, self.output, self.output_bias), 1)
        q = p @ (1 - torch.eye(self.classes, dtype=p.dtype, device=p.device))  # 1 − p without cancellation
        r = p * (1 - y) - y * q
        # relative to the likeliest class, or confident samples would lose their digits in V − Σ pV
        away = self.output - self.output[p.argmax(1)][:, None]
        centred = away - torch.einsum("nc,nci->ni", p, away)[:, None]
        t = torch.einsum("nc,nci->ni", r, away)
        first, second, third, fourth = self.counts
        one = torch.ones_like(w)[:, None]
        xc = torch.cat([x if first else x[:, :0], one if second else one[:, :0]], 1)
        hc = torch.cat([h if third else h[:, :0], one if fourth else one[:, :0]], 1)
        return Tile(self, x, y, w, h, h1, h2, h3, p, q, r, t, p.sqrt()[:, :, None] * centred, xc, hc)

    @staticmethod
    def _affine(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return x @ weight.T if bias is None else x @ weight.T + bias


@dataclass(frozen=True)
class Tile:
    """Some samples (n) of a network; tensors as in the module's text, float64.

    Attributes:
        net: the network.
        x: inputs (n, d).
        y: target distributions (n, C).
        w: what each counts in the mean (n,).
        h: hidden values (n, h), with their derivatives h1, h2, h3.
        h1: s′(a).
        h2: s″(a).
        h3: s‴(a).
        p: probabilities (n, C).
        q: 1 − p.
        r: p − y.
        t: Vᵀr (n, h).
        root: √p (V − Σ pV) (n, C, h), so that VᵀSV = rootᵀ root.
        xc: the counted columns of x̃ (n, ·).
        hc: the counted columns of h̃ (n, ·).
    """

    net: ThreeLayer
    x: Tensor
    y: Tensor
    w: Tensor
    h: Tensor
    h1: Tensor
    h2: Tensor
    h3: Tensor
    p: Tensor
    q: Tensor
    r: Tensor
    t: Tensor
    root: Tensor
    xc: Tensor
    hc: Tensor

    @cached_property
    def S(self) -> Tensor:
        """Second derivatives by the logits (n, C, C)."""
        off = -self.p[:, :, None] * self.p[:, None, :]
        off.diagonal(dim1=1, dim2=2).copy_(self.p * self.q)
        return off

    @cached_property
    def Q(self) -> Tensor:
        """VᵀSV (n, h, h)."""
        return self.root.mT @ self.root

    @cached_property
    def SV(self) -> Tensor:
        """S V (n, C, h)."""
        return self.root * self.p.sqrt()[:, :, None]

    @cached_property
    def K(self) -> Tensor:
        """(n, h, h)."""
        inner = self.h1[:, :, None] * self.Q * self.h1[:, None, :]
        if not self.net.gauss_newton:
            inner.diagonal(dim1=1, dim2=2).add_(self.h2 * self.t)
        return inner

    @cached_property
    def G(self) -> Tensor:
        """(n, C, h)."""
        return self.SV * self.h1[:, None, :]

    @cached_property
    def R(self) -> Tensor:
        """(n, C, h); zero for the Gauss-Newton matrix, and where the output weights do not count."""
        return self.r[:, :, None] * self.h1[:, None, :] * self.coupled

    @cached_property
    def Gh(self) -> Tensor:
        """G with column i times hᵢ (n, C, h)."""
        return self.G * self.h[:, None, :]

    @property
    def coupled(self) -> float:
        """Whether R is there: 1 or 0."""
        return float(self.net.counts[2] and not self.net.gauss_newton)

    def traces(self) -> Tensor:
        """The trace of H of each sample by tensor (n, 4), in the order of `ThreeLayer.tensors`."""
        by_K, by_S = self.trace_K, self.trace_S
        columns = (self.x.square().sum(1) * by_K, by_K, self.h.square().sum(1) * by_S, by_S)
        counted = torch.tensor(self.net.counts, dtype=self.w.dtype, device=self.w.device)
        return torch.stack(columns, 1) * counted

    @property
    def trace_K(self) -> Tensor:
        """The trace of K (n,), without forming it."""
        squares = (self.root * self.h1[:, None]).square().sum((1, 2))
        return squares if self.net.gauss_newton else squares + (self.h2 * self.t).sum(1)

    @property
    def trace_S(self) -> Tensor:
        """The trace of S (n,)."""
        return (self.p * self.q).sum(1)
