"""The paged latent cache: layout, allocation, and reading and writing its rows.

PAGE LAYOUT. A cache is [N, P, width]: N pages of P tokens, token-major, the last axis contiguous; other strides
are free, so key and value caches may be slices of one tensor.

    key row     | group 0: Rk_0 | group 1: Rk_1 | ...
    value row   | group 0: Rv_0 | group 1: Rv_1 | ...

With `shared` there is one row, the value row, and a key group uses the first Rk_g columns of its run. Latents stand for
keys and values without their offsets; for keys before RoPE where the layer has one.

Where latents are packed (lrattn/factors/formats.py) a cache is uint8, and a page holds the runs of all its tokens, then
their words of scales; its bytes lie together. Keys and values may differ in this.

    page        | runs of token 0 | runs of token 1 | .. | words of token 0 | words of token 1 | ..
    runs        | group 0 | group 1 | ..        words   | group 0 | group 1 | ..

So codes and scales start at multiples of 16 bytes with no padding between tokens.

Token t of sequence b lies in page block_table[b, t // P] at offset t % P; its slot is page * P + offset.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrattn.factors.layer import LayerFactors
from lrattn.factors.projection import Projection
from lrattn.factors.shapes import RANK_STEP

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

    def pages(width: int, kind: torch.dtype) -> Tensor:
        kind = dtype if dtype is not None and kind == layer.dtype else kind
        return torch.empty(num_pages, page_size, width, dtype=kind, device=layer.device if device is None else device)

    return pages(layer.k_width, layer.k_dtype), None if layer.shared else pages(layer.v_width, layer.v_dtype)


def read_latents(side: Projection, cache: Tensor, pages: Tensor, begin: int, end: int) -> Tensor:
    """Latents of tokens begin..end of one sequence, [end - begin, sum R]; pages: [.] int32 page ids from token 0 on."""
    return unpack(side, [read_rows(x, pages, begin, end) for x in sections(side, cache)])


def write_latents(side: Projection, z: Tensor, cache: Tensor, slots: Tensor) -> None:
    """Writes latents z [n, sum R] to slots [n]; slots outside the cache are skipped."""
    for to, rows in zip(sections(side, cache), pack(side, z), strict=True):
        write_rows(to, rows, slots)


def read_rows(cache: Tensor, pages: Tensor, begin: int, end: int) -> Tensor:
    """Rows of tokens begin..end of one sequence, [end - begin, width]; pages: [.] int32 page ids from token 0 on.

    Of pages that lie one after the other they are a view of the cache.
    """
    size = cache.shape[1]
    first = begin // size
    own = pages[first : -(-end // size)]
    if len(own) and torch.equal(own, own[0] + torch.arange(len(own), dtype=own.dtype, device=own.device)):
        page = int(own[0])
        rows = cache[page : page + len(own)].flatten(0, 1)
    elif size > WHOLE_PAGES:
        t = torch.arange(begin, end, device=cache.device)
        return cache[pages[t // size], t % size]
    else:
        rows = cache.index_select(0, own).flatten(0, 1)
    return rows[begin - first * size : end - first * size]


def write_rows(cache: Tensor, rows: Tensor, slots: Tensor) -> None:
    """Writes rows [n, width] to slots [n]; slots outside the cache are skipped."""
    num_pages, page_size, _ = cache.shape
    inside = (slots >= 0) & (slots < num_pages * page_size)
    if not inside.all():  # choosing takes as long as writing
        slots, rows = slots[inside], rows[inside]
    slots = slots.long()
    cache[slots // page_size, slots % page_size] = rows


def sections(side: Projection, cache: Tensor) -> list[Tensor]:
    """What tokens have in a cache, views of [N, P, width] each: latents as they are, or runs and words."""
    if not side.formats:
        return [cache]
    (pages, size, _), widths = cache.shape, [sum(f.run for f in side.formats), sum(f.words for f in side.formats)]
    parts = cache.view(pages, size * sum(widths)).split([size * width for width in widths], 1)
    return [x.view(pages, size, width) for x, width in zip(parts, widths, strict=True)]


def pack(side: Projection, z: Tensor) -> list[Tensor]:
    """Latents [.., sum R] as `sections` have them, [.., width] each."""
    if not side.formats:
        return [z]
    packed = [f.encode(part) for f, part in zip(side.formats, z.split(side.ranks, -1), strict=True)]
    return [torch.cat(parts, -1) for parts in zip(*packed, strict=True)]


def unpack(side: Projection, parts: list[Tensor]) -> Tensor:
    """What `sections` have, [.., width] each -> latents [.., sum R]; packed ones in the dtype of sums."""
    if not side.formats:
        return parts[0]
    runs = parts[0].split([f.run for f in side.formats], -1)
    words = parts[1].split([f.words for f in side.formats], -1)
    return torch.cat([f.decode(r, w, side.up.dtype) for f, r, w in zip(side.formats, runs, words, strict=True)], -1)


def stored(layer: LayerFactors, zk: Tensor, zv: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Latents [.., row_width] and [.., sum Rv] as a cache gives them back, in the layer's dtype."""

    def of(side: Projection, z: Tensor) -> Tensor:
        return unpack(side, pack(side, z)).to(layer.dtype)

    return of(layer.row_side, zk), None if zv is None else of(layer.values, zv)
