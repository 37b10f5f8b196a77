"""Truncated SVD of the weights: the baseline that looks at no data."""

from __future__ import annotations

import torch
from torch import Tensor


def decompose(weight: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The best maps of every rank in the Frobenius norm of the weights; `moment` is not used.

    W = Q S V^T is cut to its largest singular values: up = Q^T, down = V S, energies S^2.
    """
    heads, head_dim, _ = weight.shape
    q, s, vt = torch.linalg.svd(weight.flatten(0, 1), full_matrices=False)
    return s.square(), q.T.unflatten(1, (heads, head_dim)).transpose(0, 1), vt.T * s
