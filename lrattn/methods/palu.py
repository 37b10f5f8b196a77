"""Palu (arXiv 2407.21118): grouped SVD, whitened by the second moment of the inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from lrattn.shapes import pad_rank

DAMPING = 1e-6  # of the mean diagonal of the moment


def factorize(weight: Tensor, moment: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """The rank-`rank` map with the least squared error on the calibration inputs.

    With C = sum x x^T and W C W^T = Q L Q^T, the best map is Q_r Q_r^T W (up = Q_r^T, down = W^T Q_r) and loses the
    sum of the eigenvalues cut. It is the whitened SVD of the paper (W S with S S^T = C) as a map, without a root or
    an inverse of C, and its latents come out sorted and uncorrelated. C is damped by a millionth of its mean
    diagonal, so that directions the calibration never saw are ranked by the weights alone.

    Raises: ValueError without a moment.
    """
    if moment is None:
        raise ValueError("batches: method 'palu' needs calibration batches, got None")
    heads, head_dim, _ = weight.shape
    w = weight.flatten(0, 1)
    damping = DAMPING * moment.diagonal().mean()
    _, q = torch.linalg.eigh(w @ moment @ w.T + damping * (w @ w.T))
    q = q.flip(1)[:, :rank]
    up = q.T.unflatten(1, (heads, head_dim)).transpose(0, 1)
    return pad_rank(up, 1, rank), pad_rank(w.T @ q, 1, rank)
