"""The paged latent cache: layout, allocation, and reading and writing its rows.

PAGE LAYOUT. A cache is [N, P, width]: N pages of P tokens, token-major, the last axis contiguous; other strides
are free, so key and value caches may be slices of one tensor.

    key row     | group 0: Rk_0 | group 1: Rk_1 | ... | hi: Hkv | lo: Hkv | pad to 16 |
    value row   | group 0: Rv_0 | group 1: Rv_1 | ... |

The columns hi and lo exist with a key norm only: 1 / rms of each rebuilt key head is hi + lo, two numbers of the
cache's dtype. With `shared` there is one row, as wide as the value row plus the norm columns, and a key group
uses the first Rk_g columns of its run. Keys are stored before norm and RoPE, values before their bias.

Token t of sequence b lies in page block_table[b, t // P] at offset t % P; its slot is page * P + offset.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrattn.layer import LayerFactors
from lrattn.shapes import RANK_STEP, accumulator

WHOLE_PAGES = 64  # up to this page size whole pages are copied and cut, which is faster than copying rows


def allocate_cache(
    layer: LayerFactors,
    num_pages: int,
    page_size: int,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Uninitialised pages for one layer: [N, P, layer.k_width] and [N, P, layer.v_width] (None when shared).

    Args:
        page_size: tokens per page, a multiple of 16.
        dtype, device: default to the layer's.
    """
    if page_size < RANK_STEP or page_size % RANK_STEP:
        raise ValueError(f"page_size: expected a positive multiple of {RANK_STEP}, got {page_size}")
    if num_pages < 0:
        raise ValueError(f"num_pages: expected at least 0, got {num_pages}")
    kind: dict[str, Any] = {"dtype": dtype or layer.dtype, "device": layer.device if device is None else device}
    k_cache = torch.empty(num_pages, page_size, layer.k_width, **kind)
    v_cache = None if layer.shared else torch.empty(num_pages, page_size, layer.v_width, **kind)
    return k_cache, v_cache


def read_rows(cache: Tensor, pages: Tensor, begin: int, end: int) -> Tensor:
    """Rows of tokens begin..end of one sequence, [end - begin, width]; pages: [.] int32 page ids from token 0 on."""
    size = cache.shape[1]
    if size > WHOLE_PAGES:
        t = torch.arange(begin, end, device=cache.device)
        return cache[pages[t // size], t % size]
    first = begin // size
    rows = cache.index_select(0, pages[first : -(-end // size)]).flatten(0, 1)
    return rows[begin - first * size : end - first * size]


def write_rows(cache: Tensor, rows: Tensor, slots: Tensor) -> None:
    """Writes rows [n, width] to slots [n]; slots outside the cache are skipped."""
    num_pages, page_size, _ = cache.shape
    inside = (slots >= 0) & (slots < num_pages * page_size)
    slots = slots[inside].long()
    cache[slots // page_size, slots % page_size] = rows[inside]


def norm_columns(layer: LayerFactors, zk: Tensor) -> Tensor:
    """1 / rms of the keys that latents [n, row_width] stand for: [n, k_width - row_width], hi | lo | zeros."""
    norms = zk.new_zeros(len(zk), layer.k_width - layer.row_width)
    if layer.key_norm is not None:
        heads = layer.num_kv_heads
        exact = torch.empty(len(zk), heads, dtype=accumulator(zk.dtype), device=zk.device)
        for g, members in enumerate(layer.keys.groups):
            exact[:, list(members)] = layer.key_norm.inverse_rms(layer.raw_keys(zk.to(exact.dtype), g))
        exact.clamp_(max=torch.finfo(zk.dtype).max)
        norms[:, :heads] = exact.to(zk.dtype)
        norms[:, heads : 2 * heads] = (exact - norms[:, :heads]).to(zk.dtype)
    return norms


def inverse_rms(layer: LayerFactors, rows: Tensor) -> Tensor:
    """The stored 1 / rms of rows [n, k_width]: [n, Hkv]."""
    heads, start = layer.num_kv_heads, layer.row_width
    hi, lo = rows[:, start : start + heads], rows[:, start + heads : start + 2 * heads]
    return hi.to(accumulator(rows.dtype)) + lo
