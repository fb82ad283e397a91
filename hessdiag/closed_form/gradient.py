"""The analytic gradient of tr H and tr H² of a three-layer network, and so of every function of the two.

d(α tr H + β tr H²) = tr((αI + 2βH) dH), carried back through the network's formulas by hand: the object of
arXiv 2606.28662 (whose text was not used), for any smooth activation, with or without biases. Needs s‴.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hessdiag.closed_form.network import ThreeLayer, Tile
from hessdiag.closed_form.pairwise import Sums


@dataclass(frozen=True)
class Gradients:
    """A gradient with respect to the network's tensors.

    Attributes:
        hidden: (h, d).
        hidden_bias: (h,) or None.
        output: (C, h).
        output_bias: (C,) or None.
    """

    hidden: Tensor
    hidden_bias: Tensor | None
    output: Tensor
    output_bias: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor, Tensor | None, Tensor, Tensor | None]:
        """In the order of `ThreeLayer.tensors`."""
        return (self.hidden, self.hidden_bias, self.output, self.output_bias)

    @classmethod
    def zero(cls, net: ThreeLayer) -> Gradients:
        """All zeros."""
        biases = [None if t is None else torch.zeros_like(t) for t in (net.hidden_bias, net.output_bias)]
        return cls(torch.zeros_like(net.hidden), biases[0], torch.zeros_like(net.output), biases[1])

    def plus(self, other: Gradients, scale: float = 1.0) -> Gradients:
        """This one and ``scale`` times another."""
        return Gradients(
            self.hidden + scale * other.hidden,
            _plus(self.hidden_bias, other.hidden_bias, scale),
            self.output + scale * other.output,
            _plus(self.output_bias, other.output_bias, scale),
        )

    def times(self, scale: float) -> Gradients:
        """``scale`` times this one."""
        return self.plus(self, scale - 1)


def _plus(one: Tensor | None, other: Tensor | None, scale: float) -> Tensor | None:
    return None if one is None or other is None else one + scale * other


@dataclass
class _Bars:
    """Derivatives by what H is made of, per sample."""

    K: Tensor  # (n, h, h)
    S: Tensor  # (n, C, C)
    G: Tensor  # (n, C, h)
    R: Tensor  # (n, C, h)
    h: Tensor  # (n, h)


def trace_part(tile: Tile) -> Gradients:
    """The tile's part of the gradient of tr H."""
    weight = tile.w
    K = torch.diag_embed((weight * tile.xc.square().sum(1))[:, None].expand(-1, tile.net.width))
    S = torch.diag_embed((weight * tile.hc.square().sum(1))[:, None].expand(-1, tile.net.classes))
    by_h = 2 * (weight * tile.trace_S)[:, None] * tile.h * float(tile.net.counts[2])
    zero = torch.zeros_like(tile.G)
    return _back(tile, _Bars(K, S, zero, zero, by_h))


def square_part(tile: Tile, sums: Sums) -> Gradients:
    """The tile's part of the gradient of tr H², both arguments of every pair."""
    through_G = 4 * sums.R
    by_h = 4 * _columns(sums.hc, tile) + (through_G * tile.G).sum(1)
    bars = _Bars(
        K=2 * sums.K,
        S=2 * sums.S,
        G=4 * sums.G + through_G * tile.h[:, None],
        R=4 * (sums.R + sums.Gh) * tile.coupled,
        h=by_h,
    )
    return _back(tile, bars)


def _columns(hc: Tensor, tile: Tile) -> Tensor:
    return hc[:, : tile.net.width] if tile.net.counts[2] else torch.zeros_like(tile.h)


def _back(tile: Tile, bars: _Bars) -> Gradients:
    """From K, S, G, R and h back to the weights."""
    V, h1, residual = tile.net.output, tile.h1, float(not tile.net.gauss_newton)
    diagonal = residual * bars.K.diagonal(dim1=1, dim2=2)
    by_t = diagonal * tile.h2
    by_Q = h1[:, :, None] * bars.K * h1[:, None]
    by_h1 = 2 * ((bars.K * tile.Q) @ h1[:, :, None])[:, :, 0]
    by_h1 += torch.einsum("nci,nc->ni", bars.R, tile.r) + (bars.G * tile.SV).sum(1)
    by_SV = bars.G * h1[:, None]
    by_S = bars.S + (V @ by_Q + by_SV) @ V.T
    by_V = (2 * tile.SV @ by_Q + tile.S @ by_SV).sum(0) + tile.r.T @ by_t
    by_r = torch.einsum("nci,ni->nc", bars.R, h1) + by_t @ V.T
    both = by_S + by_S.mT
    by_p = by_S.diagonal(dim1=1, dim2=2) - (both @ tile.p[:, :, None])[:, :, 0] + by_r
    by_z = (tile.S @ by_p[:, :, None])[:, :, 0]
    by_h = bars.h + by_z @ V
    by_a = by_h * h1 + by_h1 * tile.h2 + diagonal * tile.t * tile.h3
    net = tile.net
    return Gradients(
        hidden=by_a.T @ tile.x,
        hidden_bias=None if net.hidden_bias is None else by_a.sum(0),
        output=by_z.T @ tile.h + by_V,
        output_bias=None if net.output_bias is None else by_z.sum(0),
    )
