"""What quantised caches of dense keys and values give back: the same numbers, without packing them.

Tensors are one sequence's, [T, Hkv, D]; keys are normed and rotated. Scales and zeros are 16-bit numbers and rounded to
that. A zero-point quantiser of b bits has x = code * scale + zero, zero = min, scale = (max - min) / (2^b - 1).

half       numbers of 16 bits.
kivi-N     KIVI (arXiv 2402.02750): keys have a scale and a zero for each channel of N consecutive tokens, values for
           each token and N consecutive channels of a head.
rotated    TurboQuant (arXiv 2504.19874), its variant of least squared error: one random rotation of all heads, a scale
           (the root mean square) for each token and head, and the levels that are best for a Gaussian (Lloyd and Max).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

SCALE = 16  # bits of a scale or a zero


class Quantiser(Protocol):
    """`tokens`: of which keys share a scale, consecutive ones from the first on."""

    @property
    def tokens(self) -> int: ...

    def keys(self, k: Tensor, bits: int) -> Tensor:
        """What comes back of [T, Hkv, D]."""

    def values(self, v: Tensor, bits: int) -> Tensor:
        """What comes back of [T, Hkv, D]."""

    def bits_per_number(self, bits: int, head_dim: int) -> float:
        """Scales and zeros included."""


@dataclass(frozen=True)
class Half:
    tokens: int = 1

    def keys(self, k: Tensor, bits: int) -> Tensor:
        if bits != 16:
            raise ValueError(f"bits: expected 16, got {bits!r}")
        return rounded(k)

    values = keys

    def bits_per_number(self, bits: int, head_dim: int) -> float:
        return bits


@dataclass(frozen=True)
class Kivi:
    """tokens: N, which is also the number of a value's channels that share a scale."""

    tokens: int = 32

    def keys(self, k: Tensor, bits: int) -> Tensor:
        """An incomplete last group is quantised as it is."""
        groups = self.grouped(k)
        found = zero_point(groups, groups.amin(1, True), groups.amax(1, True), bits)
        return found.flatten(0, 1)[: len(k)]

    def growing_keys(self, k: Tensor, bits: int) -> Tensor:
        """[T, N, Hkv, D]: what comes back of the group of token t, quantised from its tokens up to t; what stands
        there for later ones says nothing."""
        groups = self.grouped(k)
        low, high = groups.cummin(1).values, groups.cummax(1).values
        found = zero_point(groups[:, None], low[:, :, None], high[:, :, None], bits)  # [groups, t, tokens, Hkv, D]
        return found.flatten(0, 1)[: len(k)]

    def values(self, v: Tensor, bits: int) -> Tensor:
        groups = v.unflatten(-1, (-1, self.tokens))
        return zero_point(groups, groups.amin(-1, True), groups.amax(-1, True), bits).flatten(-2)

    def bits_per_number(self, bits: int, head_dim: int) -> float:
        return bits + 2 * SCALE / self.tokens

    def grouped(self, x: Tensor) -> Tensor:
        """[T, Hkv, D] -> [groups, N, Hkv, D], the last token again where the last group is incomplete."""
        return torch.cat((x, x[-1:].expand(-len(x) % self.tokens, -1, -1))).unflatten(0, (-1, self.tokens))


@dataclass(frozen=True)
class Rotated:
    tokens: int = 1

    def keys(self, k: Tensor, bits: int) -> Tensor:
        turn, levels = rotation(k.shape[-1]).to(k), gaussian_levels(bits).to(k)
        scale = rounded(k.square().mean(-1, keepdim=True).sqrt())
        unit = (k @ turn) / scale.clamp_min(torch.finfo(k.dtype).tiny)
        codes = torch.bucketize(unit, (levels[1:] + levels[:-1]) / 2)
        return (levels[codes] * scale) @ turn.T

    values = keys

    def bits_per_number(self, bits: int, head_dim: int) -> float:
        return bits + SCALE / head_dim


QUANTISERS: dict[str, Quantiser] = {"half": Half(), "kivi-32": Kivi(32), "kivi-64": Kivi(64), "rotated": Rotated()}


def zero_point(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """x between its least and its largest number, at 2^bits levels; it is cut where these are not its own."""
    most = 2**bits - 1
    zero, scale = rounded(low), rounded((high - low) / most)
    codes = ((x - zero) / scale.clamp_min(torch.finfo(x.dtype).tiny)).round().clamp(0, most)
    return codes * scale + zero


def rounded(x: Tensor) -> Tensor:
    """To 16 bits."""
    return x.half().to(x.dtype)


@cache
def rotation(dim: int) -> Tensor:
    """[dim, dim] float64, orthogonal: the same random one for all."""
    normal = torch.randn(dim, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return torch.linalg.qr(normal).Q


@cache
def gaussian_levels(bits: int, steps: int = 1000) -> Tensor:
    """[2^bits] float64, ascending: of least squared error for a unit Gaussian.

    Levels lie at the means of their cells (Lloyd's iteration), from those of Panter and Dite on, which are best for
    many bits: quantiles of the Gaussian of three times the variance.
    """
    normal = torch.distributions.Normal(torch.zeros((), dtype=torch.float64), 1.0)
    places = (torch.arange(2**bits, dtype=torch.float64) + 0.5) / 2**bits
    levels = 3**0.5 * normal.icdf(places)
    for _ in range(steps):
        edges = F.pad((levels[1:] + levels[:-1]) / 2, (1, 1), value=torch.inf)
        edges[0] = -torch.inf
        mass, density = normal.cdf(edges).diff(), normal.log_prob(edges).exp()
        levels = -density.diff() / mass
    return levels
