"""The paged latent cache: layout, allocation, and reading and writing its rows.

PAGE LAYOUT. A cache is [N, P, width]: N pages of P tokens, token-major, the last axis contiguous; other strides
are free, so key and value caches may be slices of one tensor.

    key row     | group 0: Rk_0 | group 1: Rk_1 | ... | hi: Hkv | lo: Hkv | pad to 16 |
    value row   | group 0: Rv_0 | group 1: Rv_1 | ... |

The columns hi and lo exist with a key norm only: 1 / rms of each rebuilt key head is hi + lo, two numbers of the
cache's dtype. With `shared` there is one row, as wide as the value row plus the norm columns, and a key group
uses the first Rk_g columns of its run. Keys are stored before norm and RoPE, values before their bias.

Where latents are packed (lrattn/factors/formats.py) a cache is uint8, and its width bytes:

    key row     | group 0: run | group 1: run | ... | hi: Hkv | lo: Hkv |
    value row   | group 0: run | group 1: run | ... |

with hi and lo of 16 bits each, float16 where the layer's dtype is wider. Keys and values may differ in this.

Token t of sequence b lies in page block_table[b, t // P] at offset t % P; its slot is page * P + offset.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrattn.factors.formats import Format, half
from lrattn.factors.layer import LayerFactors
from lrattn.factors.shapes import RANK_STEP, accumulator, norm_width

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
        dtype, device: default to the layer's. Packed latents are held in uint8 whatever `dtype` says of the others.
    """
    if page_size < RANK_STEP or page_size % RANK_STEP:
        raise ValueError(f"page_size: expected a positive multiple of {RANK_STEP}, got {page_size}")
    if num_pages < 0:
        raise ValueError(f"num_pages: expected at least 0, got {num_pages}")
    pages: dict[str, Any] = {"device": layer.device if device is None else device}
    plain = dtype or layer.dtype
    kinds = (plain if kind == layer.dtype else kind for kind in (layer.k_dtype, layer.v_dtype))
    k_cache, v_cache = (
        torch.empty(num_pages, page_size, width, dtype=kind, **pages)
        for width, kind in zip((layer.k_width, layer.v_width), kinds, strict=True)
    )
    return k_cache, None if layer.shared else v_cache


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


def pack_keys(layer: LayerFactors, zk: Tensor) -> Tensor:
    """Key latents [n, row_width] as rows of the key cache, [n, k_width] in its dtype."""
    if not layer.row_side.formats:
        return torch.cat((zk, norm_columns(layer, zk)), 1)
    runs = pack(layer.row_side.formats, zk)
    if layer.key_norm is None:
        return runs
    back = unpack(layer.row_side.formats, runs, layer.dtype).to(layer.dtype)  # as kernels unpack them
    norms = norm_columns(layer, back)[:, : 2 * layer.num_kv_heads]
    return torch.cat((runs, norms.contiguous().view(torch.uint8)), 1)


def key_rows(layer: LayerFactors, rows: Tensor) -> tuple[Tensor, Tensor | None]:
    """Rows [n, k_width] of the key cache -> latents [n, row_width] and 1 / rms of their keys [n, Hkv], or None.

    Packed latents come in the dtype of sums, plain ones in their own.
    """
    heads, latents = layer.num_kv_heads, rows
    acc = accumulator(layer.dtype)
    if layer.row_side.formats:
        width = layer.k_width - layer.norm_bytes
        latents = unpack(layer.row_side.formats, rows[:, :width], layer.dtype)
        norms = rows[:, width:].contiguous().view(half(layer.dtype))
    else:
        latents, norms = rows[:, : layer.row_width], rows[:, layer.row_width :]
    if layer.key_norm is None:
        return latents, None
    return latents, norms[:, :heads].to(acc) + norms[:, heads : 2 * heads]


def pack_values(layer: LayerFactors, zv: Tensor) -> Tensor:
    """Value latents [n, sum Rv] as rows of the value cache, [n, v_width]."""
    return pack(layer.values.formats, zv) if layer.values.formats else zv


def value_rows(layer: LayerFactors, rows: Tensor) -> Tensor:
    """Rows [n, v_width] of the value cache -> latents [n, sum Rv], as `key_rows` gives them."""
    return unpack(layer.values.formats, rows, layer.dtype) if layer.values.formats else rows


def pack(formats: tuple[Format, ...], z: Tensor) -> Tensor:
    """Latents [.., sum R] of all groups -> their runs side by side, [.., bytes]."""
    parts = z.split([f.rank for f in formats], -1)
    return torch.cat([f.encode(part) for f, part in zip(formats, parts, strict=True)], -1)


def unpack(formats: tuple[Format, ...], runs: Tensor, dtype: torch.dtype) -> Tensor:
    """Runs [.., bytes] of all groups of a layer of `dtype` -> latents [.., sum R] in the dtype of its sums."""
    parts = runs.split([f.nbytes for f in formats], -1)
    return torch.cat([f.decode(part, dtype) for f, part in zip(formats, parts, strict=True)], -1)


def stored(layer: LayerFactors, zk: Tensor, zv: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Latents [.., row_width] and [.., sum Rv] as a cache gives them back, in the layer's dtype."""

    def of(formats: tuple[Format, ...], z: Tensor) -> Tensor:
        return unpack(formats, pack(formats, z), layer.dtype).to(layer.dtype) if formats else z

    return of(layer.row_side.formats, zk), None if zv is None else of(layer.values.formats, zv)


def norm_columns(layer: LayerFactors, zk: Tensor) -> Tensor:
    """1 / rms of the keys that latents [n, row_width] stand for: [n, norm width], hi | lo | zeros; 16-bit numbers where
    latents are packed."""
    kind = half(layer.dtype) if layer.row_side.formats else layer.dtype
    heads = layer.num_kv_heads
    norms = zk.new_zeros(len(zk), 0 if layer.key_norm is None else norm_width(heads), dtype=kind)
    if layer.key_norm is not None:
        exact = torch.empty(len(zk), heads, dtype=accumulator(zk.dtype), device=zk.device)
        for g, members in enumerate(layer.keys.groups):
            exact[:, list(members)] = layer.key_norm.inverse_rms(layer.raw_keys(zk.to(exact.dtype), g))
        exact.clamp_(max=torch.finfo(kind).max)
        norms[:, :heads] = exact.to(kind)
        norms[:, heads : 2 * heads] = (exact - norms[:, :heads]).to(kind)
    return norms
