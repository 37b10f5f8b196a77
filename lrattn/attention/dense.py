"""Dense causal attention, blocked over queries: for prefill, and for what differentiates through attention. And
attention of a few queries over tokens of any order, with its log-sum-exp: a part of a larger softmax."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lrattn.factors.shapes import accumulator

BLOCK = 512


@dataclass(frozen=True, eq=False)
class Near:
    """Keys and values of their own for the tokens near a query: its `recent` last ones, itself included, and the sinks.

    Args:
        k, v: [n, Hkv, D] of tokens `at` [n], ascending indices in the sequence: every token that is near some query.
        recent, sinks: query i takes a token j from here where j > i - recent or j < sinks.
    """

    k: Tensor
    v: Tensor
    at: Tensor
    recent: int
    sinks: int


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None = None, near: Near | None = None
) -> Tensor:
    """q [S, Hq, D], k and v [T, Hkv, D] -> [S, Hq, D]; the queries are the last S of the T tokens.

    With `near`, a query sees near tokens there and the others in k and v: one softmax over both. Memory O(BLOCK * T).
    """
    num_queries, length = len(q), len(k)
    outs = []
    for first in range(0, num_queries, BLOCK):
        last = min(first + BLOCK, num_queries)
        own = torch.arange(first, last, device=q.device)[:, None] + (length - num_queries)
        end = length - num_queries + last
        begin = 0 if window is None else max(0, length - num_queries + first - window + 1)
        t = torch.arange(begin, end, device=q.device)
        keys, values, seen = k[begin:end], v[begin:end], t <= own
        if near is not None:
            seen = seen & ((t <= own - near.recent) & (t >= near.sinks))
            band = (near.at < near.sinks) | ((near.at > own[0] - near.recent) & (near.at < end))
            at = near.at[band]
            keys, values = torch.cat((keys, near.k[band])), torch.cat((values, near.v[band]))
            t = torch.cat((t, at))
            seen = torch.cat((seen, (at <= own) & ((at > own - near.recent) | (at < near.sinks))), 1)
        if window is not None:
            seen = seen & (t > own - window)
        heads = F.scaled_dot_product_attention(
            q[None, first:last].transpose(1, 2),
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=seen,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
        outs.append(heads[0].transpose(0, 1))
    return torch.cat(outs) if outs else torch.empty_like(q)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [B, S, Hq, D], k and v [B, n, Hkv, D], seen [B, S, n] bool -> out [B, S, Hq, D], lse [B, S, Hq].

    A query that sees nothing gives zeros and -inf. Memory O(B * S * Hq * n); sums in float32 (float64 for float64).
    """
    acc = accumulator(q.dtype)
    heads = q.to(acc).unflatten(2, (k.shape[2], -1)) * scale  # [B, S, Hkv, M, D]
    scores = torch.einsum("bshmd,bthd->bshmt", heads, k.to(acc)).masked_fill(~seen[:, :, None, None], -torch.inf)
    lse = scores.logsumexp(-1)
    p = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
    out = torch.einsum("bshmt,bthd->bshmd", p, v.to(acc))
    return out.flatten(2, 3).to(q.dtype), lse.flatten(2, 3)
