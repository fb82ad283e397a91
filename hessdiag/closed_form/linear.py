"""The same sums in one pass over the samples, O(N): for many samples of few features.

The blocks of H are accumulated in their compressed form, half(K) ⊗ half(x̃x̃ᵀ), half(S) ⊗ half(h̃h̃ᵀ) and
(G ⊗ h̃ + R at q = i) ⊗ x̃, whose squared norms are those of the blocks.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hessdiag.closed_form.network import ThreeLayer, Tile
from hessdiag.closed_form.pairwise import Sums
from hessdiag.closed_form.symmetric import half, outer, whole


class Accumulated:
    """H in compressed blocks.

    Attributes:
        first: Σ w half(K) ⊗ half(x̃x̃ᵀ), (h(h+1)/2, ·).
        second: Σ w half(S) ⊗ half(h̃h̃ᵀ), (C(C+1)/2, ·).
        mixed: Σ w G ⊗ h̃ ⊗ x̃, (C, h, columns of h̃, columns of x̃).
        residual: Σ w R ⊗ x̃, (C, h, columns of x̃).
    """

    def __init__(self, net: ThreeLayer, tiles: Iterable[Tile]) -> None:
        n, h, C = net.columns, net.width, net.classes
        zeros = net.hidden.new_zeros
        self.net = net
        self.first = zeros(h * (h + 1) // 2, n[0] * (n[0] + 1) // 2)
        self.second = zeros(C * (C + 1) // 2, n[1] * (n[1] + 1) // 2)
        self.mixed = zeros(C, h, n[1], n[0])
        self.residual = zeros(C, h, n[0])
        for tile in tiles:
            w = tile.w[:, None]
            self.first.addmm_(half(tile.K).T, w * outer(tile.xc))
            self.second.addmm_(half(tile.S).T, w * outer(tile.hc))
            pairs = (tile.hc[:, :, None] * (w * tile.xc)[:, None]).flatten(1)
            self.mixed.view(C * h, -1).addmm_(tile.G.flatten(1).T, pairs)
            self.residual.view(C * h, -1).addmm_(tile.R.flatten(1).T, w * tile.xc)

    @property
    def diagonal(self) -> Tensor:
        """``mixed`` at q = i: a view (C, columns of x̃, h), if the output weights count."""
        return self.mixed[:, :, : self.net.width].diagonal(dim1=1, dim2=2)

    def squares(self) -> tuple[float, float, float]:
        """‖H₁₁‖², ‖H₂₂‖² and ‖H₁₂‖²."""
        both = float(self.mixed.square().sum())
        if self.net.counts[2]:
            both += float((self.residual.mT * (self.residual.mT + 2 * self.diagonal)).sum())
        return float(self.first.square().sum()), float(self.second.square().sum()), both

    def sums(self, tile: Tile) -> Sums:
        """`Sums` of one tile."""
        net, w, shape = self.net, tile.w[:, None], (len(tile.w), self.net.classes, self.net.width)
        K = whole(w * (outer(tile.xc) @ self.first.T), net.width)
        S = whole(w * (outer(tile.hc) @ self.second.T), net.classes)
        weighted = w * tile.xc
        R = weighted @ self.residual.flatten(0, 1).T
        Gh = torch.zeros_like(R)
        if net.counts[2]:
            Gh = torch.einsum("nk,cki->nci", weighted, self.diagonal).flatten(1)
        pairs = (tile.hc[:, :, None] * weighted[:, None]).flatten(1)
        G = pairs @ self.mixed.flatten(0, 1).flatten(1).T
        by_S = whole(half(tile.S) @ self.second, net.columns[1])
        hc = w * (by_S @ tile.hc[:, :, None])[:, :, 0]
        by_G = (tile.G.flatten(1) @ self.mixed.flatten(0, 1).flatten(1)).view(len(w), *net.columns[::-1])
        hc = hc + (by_G @ weighted[:, :, None])[:, :, 0]
        return Sums(K, S, R.view(shape), Gh.view(shape), G.view(shape), hc)
