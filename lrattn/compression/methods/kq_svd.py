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

from lrattn.compression.methods import palu
from lrattn.compression.methods.weighted import INPUT_DAMPING
from lrattn.compression.moments import Moments
from lrattn.factors.parts import AttentionParts

# These metrics are sums over all tokens, or of weights: they have no noise to damp, only directions never seen.
decompose = partial(palu.decompose, damping=INPUT_DAMPING)


def measure(
    part: AttentionParts, moments: Moments | None, layer: int, side: str
) -> tuple[Tensor | None, Tensor | None]:
    """Keys: C = sum k k^T, G = sum q q^T over a kv head's query heads, from moments with "rotated" gathered.

    Values: C of the inputs, G = mean of Wo Wo^T over a kv head's query heads. (The released code has the mean of Wo in
    its place, where output projections of opposite signs cancel.) The blocks of G between heads are zero.
    """
    if moments is None:
        return None, None
    if side == "keys":
        queries = moments.sums["rotated.queries"][layer]
        return moments.sums["rotated.keys"][layer], torch.block_diag(*queries)
    wo = part.linear("o_proj").weight.detach().double().cpu()  # [E, Hq * D]
    heads = wo.T.reshape(part.num_kv_heads, -1, part.head_dim, len(wo))  # [Hkv, Hq / Hkv, D, E]
    return moments.inputs[layer], torch.block_diag(*(heads @ heads.mT).mean(1))
