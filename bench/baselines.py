"""What lrattn is compared with, written anew from the published algorithms."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

import lrattn


def rebuild_then_attend(layer: lrattn.LayerFactors, q: Tensor, zk: Tensor, zv: Tensor) -> Tensor:
    """The way of the released ReCalKV and Palu code: rebuild all keys and values, rotate the keys, attend.

    One decode step of one sequence: q [Hq, D] rotated, zk [T, sum Rk], zv [T, sum Rv] -> [Hq, D].
    """
    k, v = (
        torch.cat([z[:, c] @ block for c, block in zip(side.columns, blocks, strict=True)], 1).unflatten(
            1, (-1, side.head_dim)
        )
        for side, z, blocks in (
            (layer.keys, zk, [layer.keys.block(g) for g in range(len(layer.keys.ranks))]),
            (layer.values, zv, layer.value_blocks),
        )
    )
    k, v = (x[:, _inverse(side)] for side, x in ((layer.keys, k), (layer.values, v)))
    turns = layer.rope.turns(k.device, k.dtype)[: len(k)]  # [T, D / 2]
    cos, sin = (torch.cat((x, x), -1)[:, None].to(k.dtype) for x in (turns.real, turns.imag))
    half = k.shape[-1] // 2
    k = k * cos + torch.cat((-k[..., half:], k[..., :half]), -1) * sin
    return attend(q, k, v)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense decode attention as transformers' sdpa path calls it: q [Hq, D], k and v [T, Hkv, D] -> [Hq, D]."""
    k, v = (x.transpose(0, 1)[None] for x in (k, v))
    return F.scaled_dot_product_attention(q[None, :, None], k, v, enable_gqa=q.shape[0] != k.shape[1])[0, :, 0]


def _inverse(side: lrattn.Projection) -> slice | list[int]:
    if side.head_order is None:
        return slice(None)
    return torch.tensor(side.head_order).argsort().tolist()
