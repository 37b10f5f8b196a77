"""EigenAttention (arXiv 2408.05646) as it is with RoPE: one small basis for the keys of all heads of a layer."""

from __future__ import annotations

import torch
from torch import Tensor

from lrattn.compression.methods.weighted import damped


def decompose_keys(weight: Tensor, moment: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Principal directions B of all heads' keys before the rotation, stacked: k_h -> k_h B_r B_r^T for each head h.

    sum_h W_h C W_h^T = B L B^T, [D, D]. Every head is told the same energies, an equal part of L, so that a rule gives
    the heads of a layer ranks that differ by one step at most: prefixes of the one basis.

    Args:
        weight: [Hkv, D, n] float64, which of the n = Hkv * D inputs each head is. moment: C, [n, n].

    Returns: for each head energies [D], up [1, D, D] (equal for all heads), down [n, D].
    """
    energies, basis = torch.linalg.eigh((weight @ damped(moment) @ weight.mT).sum(0))
    energies, basis = energies.flip(0).clamp_min(0) / len(weight), basis.flip(1)
    return [(energies, basis.T[None], w.T @ basis) for w in weight]
