"""CommonKV (arXiv 2508.16134): one SVD of the keys' and values' weights of neighbouring layers.

Its latents are inputs times a down side that the layers have in common, and those of the layers are averaged where they
agree. Here, of W = [.. Wk_l ..; .. Wv_l ..] and its left singular vectors Q, layer l of a run adds

    [k_l, v_l] Q_l = y_l W_l^T Q_l = (y_l V S) (Q_l^T Q_l),   sum_l Q_l^T Q_l = 1,   Q_l: rows of the layer,

to the row they share: a mean of the latents y_l V S of its inputs y_l, whose weights, matrices, add up to one. Latents
that are alike are so merged exactly, at any rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrattn.compression.moments import SIDES, Moments
from lrattn.models.layers import AttentionLayer
from lrattn.models.weights import weight


def measure(run: AttentionLayer, moments: Moments, i: int, side: str) -> tuple[Tensor, Tensor | None]:
    """C = W W^T of keys and values of all layers of a run, as if their inputs were one: energies squared singular
    values."""
    own = torch.cat([weight(part, name) for name in SIDES for part in run.members])
    return own @ own.T, None
