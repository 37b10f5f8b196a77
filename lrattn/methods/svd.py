"""Truncated SVD of the weights: the baseline that looks at no data."""

from __future__ import annotations

import torch
from torch import Tensor

from lrattn.shapes import pad_rank


def factorize(weight: Tensor, moment: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-`rank` map in the Frobenius norm of the weights; `moment` is not used.

    W = Q S V^T is cut to its largest singular values: up = Q^T, down = V S.
    """
    heads, head_dim, _ = weight.shape
    q, s, vt = torch.linalg.svd(weight.flatten(0, 1), full_matrices=False)
    down = vt.T[:, :rank] * s[:rank]
    return pad_rank(q[:, :rank].T.unflatten(1, (heads, head_dim)).transpose(0, 1), 1, rank), pad_rank(down, 1, rank)
