"""Palu (arXiv 2407.21118): grouped SVD, whitened by the second moment of the inputs. ReCalKV's keys are the same."""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING = 1e-6  # of the mean diagonal of the moment


def decompose(weight: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The maps of every rank with the least squared error on the calibration inputs.

    With C = sum x x^T and W C W^T = Q L Q^T, the best map of rank r is Q_r Q_r^T W (up = Q^T, down = W^T Q) and loses
    the sum of the eigenvalues cut, its energies. It is the whitened SVD of the paper (W S with S S^T = C) as a map,
    without a root or an inverse of C, and its latents come out sorted and uncorrelated. C is damped by a millionth of
    its mean diagonal, so that directions the calibration never saw are ranked by the weights alone.

    Raises: ValueError without a moment.
    """
    if moment is None:
        raise ValueError("batches: expected batches to calibrate on, got None; only method 'svd' needs none")
    heads, head_dim, inputs = weight.shape
    w = weight.flatten(0, 1)
    energies, q = torch.linalg.eigh(w @ damped(moment) @ w.T)
    n = min(len(w), inputs)
    energies, q = energies.flip(0)[:n], q.flip(1)[:, :n]
    return energies.clamp_min(0), q.T.unflatten(1, (heads, head_dim)).transpose(0, 1), w.T @ q


def damped(moment: Tensor) -> Tensor:
    """The moment [E, E] with a millionth of its mean diagonal added to the diagonal."""
    return moment + DAMPING * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)
