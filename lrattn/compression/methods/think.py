"""ThinK (arXiv 2407.21018), decided once: some channels of the rotated keys are kept, and the values as they are.

The published one chooses for every request, from its last queries; here calibration chooses for all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrattn.compression.methods import kq_svd, rotated
from lrattn.compression.moments import Moments
from lrattn.models.layers import AttentionLayer


def measure(layer: AttentionLayer, moments: Moments, i: int, side: str) -> tuple[Tensor, Tensor | None]:
    """Keys: C = sum k k^T, G = sum q q^T, as for KQ-SVD. Values, which lose nothing: C alone."""
    return (kq_svd if side == "keys" else rotated).measure(layer, moments, i, side)


def decompose(weight: Tensor, moment: Tensor, metric: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The outputs in order of what each alone adds to the error: output j of one head has the energy

        G_jj (W C W^T)_jj = ||q_j||^2 ||k_j||^2,

    which is ||q_j k_j^T||^2. up holds one 1 in a row; down, rows of W.
    """
    heads, head_dim, _ = weight.shape
    w = weight.flatten(0, 1)
    energies = ((w @ moment) * w).sum(1)
    energies = energies if metric is None else energies * metric.diagonal()
    order = energies.argsort(descending=True, stable=True)
    up = torch.eye(len(w), dtype=w.dtype)[order]  # [n, C * D]
    return energies[order], up.unflatten(1, (heads, head_dim)).transpose(0, 1), w[order].T
