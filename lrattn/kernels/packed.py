"""Tiles of a row's latents; of packed rows, unpacked in registers to the latents that they stand for.

TILES says what a row is loaded as, unrolled at compile time: (segment, bits, first, size) of each tile: `size` latents,
a power of two, from latent `first` of the segment on; a plain row is one segment of 0 bits. `segs` says where those
lie. Latents past a segment's end are not read, and what stands for them meets zeros.

    latent = (code - (2^b - 1) / 2) * scale

In float32 that is exact, in whatever order. In bf16 it is at 4 and 2 bits, a scale having a fraction of 3 bits, and
rounded by an eighth of a step at 8.
"""

import triton
import triton.language as tl

from lrattn.kernels.tiles import load_latents

SCALE_FRACTION, SCALE_LEAST = tl.constexpr(20), tl.constexpr(111 << 23)  # see lrattn/factors/formats.py
BROKEN = tl.constexpr(255)


@triton.jit
def segment(packs, n, rank):
    """Of segment n: its first byte in a row, how many of its latents are among the group's first `rank`, its first
    latent, and the byte of its scale."""
    start, latent = tl.load(packs + 4 * n), tl.load(packs + 4 * n + 2)
    held = tl.minimum(tl.load(packs + 4 * n + 1), rank - latent)
    scale = tl.load(packs + 4 * n + 3)
    return tl.multiple_of(start, 4), tl.multiple_of(held, 16), tl.multiple_of(latent, 16), scale


@triton.jit
def segments(packs, g, column, rank, TILES: tl.constexpr):
    """`segment` of each tile of group g, one after the other, to be read once. Of a plain row, whose group begins at
    `column`: that, its rank and zeros."""
    segs = ()
    if packs is not None:
        packs += g * 4 * (TILES[len(TILES) - 1][0] + 1)
    for i in tl.static_range(len(TILES)):
        if packs is not None:
            segs = segs + segment(packs, TILES[i][0], rank)
        else:
            segs = segs + (column, rank, 0, 0)
    return segs


@triton.jit
def half_pointer(p, like):
    """`p` as a pointer to the 16-bit numbers in packed rows of a layer of the dtype of pointer `like`."""
    if like.dtype.element_ty.primitive_bitwidth > 16:
        half = p.to(tl.pointer_type(tl.float16))
    else:
        half = p.to(tl.pointer_type(like.dtype.element_ty))
    return half


@triton.jit
def words(p):
    """`p` as a pointer to words of 32 bits: bytes are loaded by no less, since single ones meet in shared memory."""
    return p.to(tl.pointer_type(tl.uint32))


@triton.jit
def load_scale(cache, segs, live, TILES: tl.constexpr, N: tl.constexpr):
    """Scale of a tile's segment in the rows `cache` points at, [BLOCK_T] float32; NaN where it is broken."""
    if TILES[N][1] % 16 == 0:
        scale = tl.full(live.shape, 1.0, tl.float32)
    else:
        byte = segs[4 * N + 3]
        word = tl.load(words(tl.multiple_of(cache, 4) + byte // 4 * 4), mask=live, other=0)
        held = (word >> (byte % 4 * 8).to(tl.uint32)).to(tl.int32) & 255
        scale = ((held << SCALE_FRACTION) + SCALE_LEAST).to(tl.float32, bitcast=True)
        scale = tl.where(held == BROKEN, float("nan"), scale)
    return scale


@triton.jit
def load_tile(cache, segs, live, scale, TILES: tl.constexpr, N: tl.constexpr, like, r0=0):
    """Latents in the rows `cache` points at: [BLOCK_T, size], in the dtype of `like`; zeros past the group's rank.

    r0: latents beyond the tile's first, a multiple of its size.
    """
    start, held = segs[4 * N], segs[4 * N + 1]
    first = r0 + TILES[N][2]
    BITS: tl.constexpr = TILES[N][1]
    if BITS == 0:
        z = load_latents(cache, start, held, live, first + tl.arange(0, TILES[N][3]))
    elif BITS == 16:
        r = first + tl.arange(0, TILES[N][3])
        z = load_latents(half_pointer(tl.multiple_of(cache, 4) + start, like), 0, held, live, r)
    else:
        j = first // (32 // BITS) + tl.arange(0, TILES[N][3] * BITS // 32)
        mask = live[:, None] & (j < held * BITS // 32)[None, :]
        x = tl.load(words(tl.multiple_of(cache, 4) + start)[:, None] + j[None, :], mask=mask, other=0)
        x = tl.reshape(unpacked(x, BITS), [x.shape[0], TILES[N][3]])
        z = x * scale[:, None] - (2**BITS + (2**BITS - 1) / 2) * scale[:, None]
    return z.to(like.dtype.element_ty)


@triton.jit
def unpacked(x, BITS: tl.constexpr):
    """2^BITS + code of every code in words [.., n]: [.., n, 2, 2, ..] float32, codes in order.

    Each is moved to the top of a float's fraction, where it needs no conversion from an integer.
    """
    x = tl.join(x << 7, x >> 9)
    x = tl.join(x << 8, x)
    if BITS <= 4:
        x = tl.join(x << 4, x)
    if BITS == 2:
        x = tl.join(x << 2, x)
    return (x & (2**BITS - 1 << 23 - BITS) | (127 + BITS << 23)).to(tl.float32, bitcast=True)


@triton.jit
def latents_of(segs, TILES: tl.constexpr, N: tl.constexpr, r0=0):
    """Which latents of the group a tile's columns are, and whether there are such: [size] each."""
    r = r0 + TILES[N][2] + tl.arange(0, TILES[N][3])
    return segs[4 * N + 2] + r, r < segs[4 * N + 1]


@triton.jit
def load_basis_tile(rows, width, row, segs, c, d, D, TILES: tl.constexpr, N: tl.constexpr, like, r0=0):
    """Rows of the basis from `row` on that a tile of latents meets, columns c + d (d < D): [size, len(d)]; zeros past
    the group's rank."""
    r, some = latents_of(segs, TILES, N, r0)
    u = tl.load(
        rows + (row + r)[:, None] * width + (c + d)[None, :],
        mask=some[:, None] & (d < D)[None, :],
        other=0.0,
        eviction_policy="evict_last",
    )
    return u.to(like.dtype.element_ty)


@triton.jit
def load_query_tile(a, segs, in_q, TILES: tl.constexpr, N: tl.constexpr, r0=0):
    """Absorbed queries [BLOCK_Q, Rk] that `a` points at, of a tile of latents: [BLOCK_Q, size]."""
    r, some = latents_of(segs, TILES, N, r0)
    return tl.load(a[:, None] + r[None, :], mask=in_q[:, None] & some[None, :], other=0.0)
