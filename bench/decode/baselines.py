"""What lrattn is compared with, written anew from the published algorithms."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

import lrattn


def released_way(layer: lrattn.LayerFactors, q: Tensor, zk: Tensor, zv: Tensor) -> Tensor:
    """The released ReCalKV and Palu code on transformers 4.44: rebuild all, rotate, repeat for the queries, sdpa.

    One decode step of one sequence: q [Hq, D] rotated, zk [T, sum Rk], zv [T, sum Rv] -> [Hq, D].
    """
    k, v = (_rebuild(side, z).transpose(0, 1) for side, z in ((layer.keys, zk), (layer.values, zv)))
    k = _rotate(layer, k)
    k, v = (x[:, None].expand(-1, len(q) // len(k), -1, -1).flatten(0, 1) for x in (k, v))
    return F.scaled_dot_product_attention(q[None, :, None], k[None], v[None])[0, :, 0]


def rebuild_tuned(layer: lrattn.LayerFactors, q: Tensor, zk: Tensor, zv: Tensor) -> Tensor:
    """The same result the best way we found of rebuilding everything: contiguous heads, no repetition."""
    k, v = (_rebuild(side, z).transpose(0, 1).contiguous() for side, z in ((layer.keys, zk), (layer.values, zv)))
    return dense(q, _rotate(layer, k), v)


def rebuild_all(layer: lrattn.LayerFactors, tokens: int) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """The same for batches on a GPU: q [B, Hq, D], zk [B, T, sum Rk], zv [B, T, sum Rv] -> [B, Hq, D].

    For heads in the order of their groups. Bases and tables are laid out once, before.
    """
    bases = {side: [side.block(g) for g in range(len(side.ranks))] for side in (layer.keys, layer.values)}
    cos, sin = _tables(layer, tokens, layer.device, layer.dtype)

    def heads(side: lrattn.Projection, z: Tensor) -> Tensor:
        """[B, Hkv, T, D]"""
        parts = [z[..., columns] @ basis for columns, basis in zip(side.columns, bases[side], strict=True)]
        found = torch.cat(parts, -1).unflatten(-1, (-1, side.head_dim))
        return (found if side.offset is None else found + side.offset).transpose(1, 2)

    def attend(q: Tensor, zk: Tensor, zv: Tensor) -> Tensor:
        k = heads(layer.keys, zk)
        rows = q.unflatten(1, (k.shape[1], -1))  # [B, Hkv, M, D]
        return F.scaled_dot_product_attention(rows, _turn(k, cos, sin), heads(layer.values, zv)).flatten(1, 2)

    return attend


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Dense decode attention over contiguous k, v [Hkv, T, D]: q [Hq, D] -> [Hq, D].

    By the faster way on a CPU, as measured: PyTorch's fused call in float32, matrix products in 16 bits.
    """
    rows = q.view(len(k), -1, q.shape[-1])  # [Hkv, M, D]
    if q.dtype == torch.float32:
        return F.scaled_dot_product_attention(rows[None], k[None], v[None])[0].flatten(0, 1)
    p = torch.softmax((rows @ k.mT).float() * q.shape[-1] ** -0.5, -1).to(v.dtype)
    return (p @ v).flatten(0, 1)


def _rebuild(side: lrattn.Projection, z: Tensor) -> Tensor:
    """Heads [T, Hkv, D] of latents [T, sum R], in the model's order."""
    heads = torch.cat([z[:, columns] @ side.block(g) for g, columns in enumerate(side.columns)], 1)
    heads = heads.unflatten(1, (-1, side.head_dim))
    return heads if side.head_order is None else heads[:, torch.tensor(side.head_order).argsort()]


def _rotate(layer: lrattn.LayerFactors, k: Tensor) -> Tensor:
    """Rotated keys [Hkv, T, D], pairs (j, j + D / 2)."""
    return _turn(k, *_tables(layer, k.shape[1], k.device, k.dtype))


def _tables(layer: lrattn.LayerFactors, tokens: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin, [T, D] each."""
    turns = layer.rope.turns(device, dtype)[:tokens]  # [T, D / 2]
    cos, sin = (torch.cat((x, x), -1).to(dtype) for x in (turns.real, turns.imag))
    return cos, sin


def _turn(k: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = k.shape[-1] // 2
    return k * cos + torch.cat((-k[..., half:], k[..., :half]), -1) * sin
