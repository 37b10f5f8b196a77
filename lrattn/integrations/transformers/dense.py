"""Dense causal attention for prefill, blocked over queries: memory O(block * T)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 512


def causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """q [S, Hq, D], k and v [T, Hkv, D] -> [S, Hq, D]; the queries are the last S of the T tokens."""
    num_queries, length = len(q), len(k)
    k, v = (x.transpose(0, 1)[None] for x in (k, v))
    out = torch.empty_like(q)
    for first in range(0, num_queries, BLOCK):
        last = min(first + BLOCK, num_queries)
        own = torch.arange(first, last, device=q.device)[:, None] + (length - num_queries)
        end = length - num_queries + last
        begin = 0 if window is None else max(0, length - num_queries + first - window + 1)
        t = torch.arange(begin, end, device=q.device)
        seen = t <= own
        if window is not None:
            seen &= t > own - window
        out[first:last] = F.scaled_dot_product_attention(
            q[None, first:last].transpose(1, 2),
            k[:, :, begin:end],
            v[:, :, begin:end],
            attn_mask=seen,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )[0].transpose(0, 1)
    return out
