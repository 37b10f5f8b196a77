"""KQ-SVD (arXiv 2512.05916): the best approximation of the scores themselves, head by head, after the rotation.

With K the rotated keys of a kv head and Q the queries of its query heads, the rank-r matrix nearest to K Q^T is its
truncated SVD. As a map of keys it is the one that minimises

    ||(K - K') Q^T||^2 = tr(dW C dW^T G),   C = K^T K,   G = Q^T Q:

two Gram matrices say it all. Values likewise by what they add to the layer's output, ||(V - V') Wo||^2.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from lrattn.compression.methods import palu, rotated
from lrattn.compression.methods.weighted import INPUT_DAMPING
from lrattn.compression.moments import Moments
from lrattn.models.layers import AttentionLayer
from lrattn.models.weights import linear

# These metrics are sums over all tokens, or of weights: they have no noise to damp, only directions never seen.
decompose = partial(palu.decompose, damping=INPUT_DAMPING)


def measure(layer: AttentionLayer, moments: Moments, i: int, side: str) -> tuple[Tensor, Tensor | None]:
    """Keys: C = sum k k^T, G = sum q q^T over a kv head's query heads, from moments with "rotated" gathered.

    Values: C = sum v v^T, G = mean of Wo Wo^T over a kv head's query heads, of models whose o_proj is a Linear layer.
    (The released code has the mean of Wo in its place, where output projections of opposite signs cancel.) The blocks
    of G between heads are zero.
    """
    moment, _ = rotated.measure(layer, moments, i, side)
    if side == "keys":
        return moment, torch.block_diag(*moments.sums["rotated.queries"][i])
    wo = linear(layer, "o_proj").weight.detach().double().cpu()  # [E, Hq * D]
    heads = wo.T.reshape(layer.num_kv_heads, -1, layer.head_dim, len(wo))  # [Hkv, Hq / Hkv, D, E]
    return moment, torch.block_diag(*(heads @ heads.mT).mean(1))
