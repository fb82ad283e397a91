"""Sums over pairs of samples, O(N²): what tr(H²) and its gradient need, for few samples of many features.

tr(H²) = Σ w w′ [X² ⟨K, K′⟩ + Y² ⟨S, S′⟩ + 2 X ⟨M, M′⟩] with X = x̃·x̃′, Y = h̃·h̃′ and
⟨M, M′⟩ = Y ⟨G, G′⟩ + ⟨G∗h, R′⟩ + ⟨R, G′∗h′⟩ + ⟨R, R′⟩: the samples' inner products.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from hessdiag.closed_form.network import Tile
from hessdiag.closed_form.symmetric import half, whole

PIECE = 128  # rows: a tile with itself takes 0.74 of the time in pieces of so many, each pair of them once


@dataclass(frozen=True)
class Sums:
    """For every sample n of a tile, sums over all samples m, each with the weights wₙwₘ.

    Attributes:
        K: X² Kₘ (n, h, h).
        S: Y² Sₘ (n, C, C).
        R: X Rₘ (n, C, h).
        Gh: X Gₘ∗hₘ (n, C, h).
        G: X Y Gₘ (n, C, h).
        hc: (Y ⟨Sₙ, Sₘ⟩ + X ⟨Gₙ, Gₘ⟩) h̃ₘ, counted columns (n, ·).
    """

    K: Tensor
    S: Tensor
    R: Tensor
    Gh: Tensor
    G: Tensor
    hc: Tensor

    def squares(self, tile: Tile) -> tuple[float, float, float]:
        """The tile's part of ‖H₁₁‖², ‖H₂₂‖² and ‖H₁₂‖²."""
        mixed = tile.G * self.G + tile.Gh * self.R + tile.R * (self.Gh + self.R)
        return float((tile.K * self.K).sum()), float((tile.S * self.S).sum()), float(mixed.sum())


@dataclass(frozen=True)
class Vectors:
    """A tile with everything flat, ready for products with other tiles."""

    w: Tensor  # (n,)
    xc: Tensor  # (n, columns)
    hc: Tensor
    K: Tensor  # (n, h(h+1)/2)
    S: Tensor  # (n, C(C+1)/2)
    G: Tensor  # (n, C h)
    Gh: Tensor
    R: Tensor

    @classmethod
    def of(cls, tile: Tile) -> Vectors:
        """The vectors of a tile."""
        flat = (tile.G.flatten(1), tile.Gh.flatten(1), tile.R.flatten(1))
        return cls(tile.w, tile.xc, tile.hc, half(tile.K), half(tile.S), *flat)

    def pieces(self) -> list[Vectors]:
        """The same, cut into a few rows each: views."""
        columns = [torch.split(getattr(self, column.name), PIECE) for column in fields(self)]
        return [Vectors(*some) for some in zip(*columns, strict=True)]


class Kept(Iterable[Vectors]):
    """Tiles for repeated passes: held where they fit into ``memory`` bytes, made anew each time elsewhere."""

    def __init__(self, tiles: Iterable[Tile], memory: float) -> None:
        self._tiles, self._left = tiles, memory
        self._held: list[Vectors] = []
        for tile in tiles:
            vectors = Vectors.of(tile)
            self._left -= 8 * sum(t.numel() for t in (vectors.K, vectors.S, vectors.G, vectors.Gh, vectors.R))
            if self._left < 0:
                self._held = []
                return
            self._held.append(vectors)

    def __iter__(self) -> Iterator[Vectors]:
        return iter(self._held) if self._held else map(Vectors.of, self._tiles)


def squares(tiles: Iterable[Vectors]) -> tuple[float, float, float]:
    """‖H₁₁‖², ‖H₂₂‖² and ‖H₁₂‖², every pair of tiles once."""
    total = [0.0, 0.0, 0.0]
    for a, b, times in _pairs(tiles):
        weight = torch.outer(a.w, b.w) * times
        X, Y = a.xc @ b.xc.T, a.hc @ b.hc.T
        mixed = Y * (a.G @ b.G.T) + (a.Gh + a.R) @ b.R.T + a.R @ b.Gh.T
        total[0] += float((weight * X.square() * (a.K @ b.K.T)).sum())
        total[1] += float((weight * Y.square() * (a.S @ b.S.T)).sum())
        total[2] += float((weight * X * mixed).sum())
    return total[0], total[1], total[2]


def _pairs(tiles: Iterable[Vectors]) -> Iterator[tuple[Vectors, Vectors, int]]:
    """Every pair once, with how often it counts."""
    for i, a in enumerate(tiles):
        for j, b in enumerate(tiles):
            if j == i:
                break
            yield a, b, 2
        pieces = a.pieces()
        for number, one in enumerate(pieces):
            yield one, one, 1
            for other in pieces[:number]:
                yield one, other, 2


def sums(a: Tile, tiles: Iterable[Vectors]) -> Sums:
    """`Sums` of one tile."""
    net, shape = a.net, (len(a.w), a.net.classes, a.net.width)
    flat_S, flat_G = half(a.S), a.G.flatten(1)
    K, S = a.w.new_zeros(len(a.w), net.width * (net.width + 1) // 2), torch.zeros_like(flat_S)
    R, Gh, G, hc = (torch.zeros_like(t) for t in (flat_G, flat_G, flat_G, a.hc))
    for b in tiles:
        weight = torch.outer(a.w, b.w)
        X, Y = a.xc @ b.xc.T, a.hc @ b.hc.T
        K += (weight * X.square()) @ b.K
        S += (weight * Y.square()) @ b.S
        R += (weight * X) @ b.R
        Gh += (weight * X) @ b.Gh
        G += (weight * X * Y) @ b.G
        hc += (weight * (Y * (flat_S @ b.S.T) + X * (flat_G @ b.G.T))) @ b.hc
    return Sums(whole(K, net.width), whole(S, net.classes), R.view(shape), Gh.view(shape), G.view(shape), hc)
