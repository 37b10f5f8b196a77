"""Packed rows: segments of codes, unpacked in registers to the latents that they stand for.

TILES says what a row is loaded as, unrolled at compile time: (segment, bits, first, size) of each tile: `size` latents,
a power of two, from latent `first` of the segment on. packs points at a group's row of Basis.packs. Latents past a
segment's end are not read, and what stands for them meets zeros.

    latent = (code - (2^b - 1) / 2) * scale

In bf16 that is exact at 4 and 2 bits, a scale having a fraction of 3 bits, and rounded by an eighth of a step at 8.
"""

import triton
import triton.language as tl

from lrattn.kernels.tiles import half_pointer

SCALE_FRACTION, SCALE_LEAST = tl.constexpr(20), tl.constexpr(111 << 23)  # see lrattn/formats.py
BROKEN = tl.constexpr(255)


@triton.jit
def segment(packs, n, rank):
    """Of segment n: its first byte in a row, how many of its latents are among the group's first `rank`, its first."""
    start, latent = tl.load(packs + 4 * n), tl.load(packs + 4 * n + 2)
    held = tl.minimum(tl.load(packs + 4 * n + 1), rank - latent)
    return tl.multiple_of(start, 4), tl.multiple_of(held, 16), tl.multiple_of(latent, 16)


@triton.jit
def load_scale(cache, packs, live, TILES: tl.constexpr, N: tl.constexpr):
    """Scale of a tile's segment in the rows `cache` points at, [BLOCK_T] float32; NaN where it is broken."""
    if TILES[N][1] == 16:
        scale = tl.full(live.shape, 1.0, tl.float32)
    else:
        held = tl.load(cache + tl.load(packs + 4 * TILES[N][0] + 3), mask=live, other=0).to(tl.int32)
        scale = ((held << SCALE_FRACTION) + SCALE_LEAST).to(tl.float32, bitcast=True)
        scale = tl.where(held == BROKEN, float("nan"), scale)
    return scale


@triton.jit
def load_tile(cache, rank, packs, live, scale, TILES: tl.constexpr, N: tl.constexpr, like, r0=0):
    """Of the group's first `rank` latents in the rows `cache` points at: [BLOCK_T, size], in the dtype of `like`.

    r0: latents beyond the tile's first, a multiple of its size.
    """
    start, held, _ = segment(packs, TILES[N][0], rank)
    first = r0 + TILES[N][2]
    cache = tl.multiple_of(cache, 4)
    if TILES[N][1] == 16:
        r = first + tl.arange(0, TILES[N][3])
        p = half_pointer(cache + start, like)
        z = tl.load(p[:, None] + r[None, :], mask=live[:, None] & (r < held)[None, :], other=0.0)
    else:
        j = first // (8 // TILES[N][1]) + tl.arange(0, TILES[N][3] * TILES[N][1] // 8)
        mask = live[:, None] & (j < held * TILES[N][1] // 8)[None, :]
        x = tl.load(cache[:, None] + (start + j)[None, :], mask=mask, other=0)
        if TILES[N][1] == 4:
            x = tl.reshape(tl.join(x & 15, x >> 4), [x.shape[0], TILES[N][3]])
        if TILES[N][1] == 2:
            even, odd = tl.join(x & 3, x >> 4 & 3), tl.join(x >> 2 & 3, x >> 6)
            x = tl.reshape(tl.join(even, odd), [x.shape[0], TILES[N][3]])
        z = (x.to(tl.float32) - (2 ** TILES[N][1] - 1) / 2) * scale[:, None]
    return z.to(like.dtype.element_ty)


@triton.jit
def load_tiles(cache, rank, packs, live, TILES: tl.constexpr, like):
    """As load_tile, for all tiles."""
    z = ()
    for i in tl.static_range(len(TILES)):
        if TILES[i][2] == 0:
            scale = load_scale(cache, packs, live, TILES, i)
        z = z + (load_tile(cache, rank, packs, live, scale, TILES, i, like),)
    return z


@triton.jit
def latents_of(packs, rank, TILES: tl.constexpr, N: tl.constexpr, r0=0):
    """Which latents of the group a tile's columns are, and whether they are among its first `rank`: [size] each."""
    _, held, latent = segment(packs, TILES[N][0], rank)
    r = r0 + TILES[N][2] + tl.arange(0, TILES[N][3])
    return latent + r, r < held


@triton.jit
def load_basis_tile(rows, width, row, rank, packs, c, d, D, TILES: tl.constexpr, N: tl.constexpr, like, r0=0):
    """Rows of the basis from `row` on that a tile of latents meets, columns c + d (d < D): [size, len(d)]; zeros past
    `rank`."""
    at, some = latents_of(packs, rank, TILES, N, r0)
    u = tl.load(
        rows + (row + at)[:, None] * width + (c + d)[None, :],
        mask=some[:, None] & (d < D)[None, :],
        other=0.0,
        eviction_policy="evict_last",
    )
    return u.to(like.dtype.element_ty)


@triton.jit
def load_basis_tiles(rows, width, row, rank, packs, c, d, D, TILES: tl.constexpr, like):
    """As load_basis_tile, for all tiles."""
    u = ()
    for i in tl.static_range(len(TILES)):
        u = u + (load_basis_tile(rows, width, row, rank, packs, c, d, D, TILES, i, like),)
    return u


@triton.jit
def load_query_tile(a, packs, rank, in_q, TILES: tl.constexpr, N: tl.constexpr, r0=0):
    """Absorbed queries [BLOCK_Q, Rk] that `a` points at, as a tile of latents meets them: [size, BLOCK_Q]."""
    at, some = latents_of(packs, rank, TILES, N, r0)
    x = tl.load(a[:, None] + at[None, :], mask=in_q[:, None] & some[None, :], other=0.0)
    return tl.trans(x)


@triton.jit
def load_query_tiles(a, packs, rank, in_q, TILES: tl.constexpr):
    """As load_query_tile, for all tiles."""
    x = ()
    for i in tl.static_range(len(TILES)):
        x = x + (load_query_tile(a, packs, rank, in_q, TILES, i),)
    return x


@triton.jit
def keys_streamed(cache, packs, live, rows, width, row, rank, c, d, D, TILES: tl.constexpr, like):
    """latents @ basis of the rows `cache` points at, a tile at a time: [BLOCK_T, len(d)] float32.

    TILES: one for each segment, which goes along it.
    """
    k = tl.zeros([live.shape[0], d.shape[0]], tl.float32)
    for i in tl.static_range(len(TILES)):
        _, held, _ = segment(packs, TILES[i][0], rank)
        scale = load_scale(cache, packs, live, TILES, i)
        for r0 in range(0, held, TILES[i][3]):
            u = load_basis_tile(rows, width, row, rank, packs, c, d, D, TILES, i, like, r0)
            k = tl.dot(load_tile(cache, rank, packs, live, scale, TILES, i, like, r0), u, k, input_precision="ieee")
    return k


@triton.jit
def scores_streamed(cache, packs, live, a, rank, in_q, TILES: tl.constexpr):
    """latents @ absorbed queries [BLOCK_Q, Rk] that `a` points at, as keys_streamed: [BLOCK_T, BLOCK_Q] float32."""
    score = tl.zeros([live.shape[0], in_q.shape[0]], tl.float32)
    for i in tl.static_range(len(TILES)):
        _, held, _ = segment(packs, TILES[i][0], rank)
        scale = load_scale(cache, packs, live, TILES, i)
        for r0 in range(0, held, TILES[i][3]):
            q = load_query_tile(a, packs, rank, in_q, TILES, i, r0)
            score = tl.dot(
                load_tile(cache, rank, packs, live, scale, TILES, i, a, r0), q, score, input_precision="ieee"
            )
    return score


@triton.jit
def packed_zeros(M: tl.constexpr, TILES: tl.constexpr):
    """Sums to begin with: [M, size] each, float32."""
    acc = ()
    for i in tl.static_range(len(TILES)):
        acc = acc + (_zeros(M, TILES[i][3]),)
    return acc


@triton.jit
def _zeros(M: tl.constexpr, N: tl.constexpr):
    return tl.zeros([M, N], tl.float32)


@triton.jit
def store_tiles(y, acc, weight, rank, packs, live, TILES: tl.constexpr):
    """acc * weight to the columns of their latents in the live rows `y` points at."""
    for i in tl.static_range(len(TILES)):
        at, some = latents_of(packs, rank, TILES, i)
        tl.store(y[:, None] + at[None, :], acc[i] * weight[:, None], mask=live[:, None] & some[None, :])
