"""Pieces of a row's latents; of packed rows, unpacked in registers to the latents that they stand for.

A row is loaded in pieces, unrolled at compile time (kernels/pieces.py): so many latents of a plain row, so many
halfwords of a segment of a packed one. A piece gives an operand of a product: of its planes side by side, or, where
it goes along a segment, one for each plane of its halfwords:

    latent = (code - (2^b - 1) / 2) * scale

In float32 that is exact, in whatever order. In bf16 it is at 4 and 2 bits, a scale having a fraction of 3 bits, and
rounded by an eighth of a step at 8. Kernels whose queries meet the codes themselves do without: attend_packed.py.
"""

import triton
import triton.language as tl

from lrattn.kernels.planes import SCALE_UNIT, middle, scale_of
from lrattn.kernels.tiles import load_latents

# What a piece says: its segment, bits (0: plain), the first of its columns or halfwords and how many, a power of two;
# the rest is for packed rows alone. COLUMN: among operands side by side. SCALE: which of the group's. START: byte of a
# group's run, LATENT: first, HELD: halfwords, of the segment, where all groups have the same. OPENS, CLOSES: whether
# the piece is the first, or the last, of its segment. SEGMENTS: how many a row has.
SEGMENT, BITS, FIRST, SIZE, COLUMN, SCALE = (tl.constexpr(i) for i in range(6))
START, LATENT, HELD, OPENS, CLOSES, SEGMENTS = (tl.constexpr(i) for i in range(6, 12))


@triton.constexpr_function
def operands(bits):
    """That a piece gives."""
    return 1 if bits == 0 else 16 // bits


@triton.jit
def located(cache, strides, page, offset, packs, g, G: tl.constexpr, P: tl.constexpr):
    """Rows of tokens in a cache, and the words of scales of group g. strides: of pages, of rows and, in packed pages,
    of the words behind all their rows."""
    rows = cache + page * strides[0] + offset * strides[1]
    words = rows
    if packs is not None:
        words = cache + page * strides[0] + P * strides[1] + offset * strides[2] + g * (strides[2] // G)
    return rows, words


@triton.jit
def segment(packs, n, rank, BITS: tl.constexpr):
    """Of segment n of packed rows: its first byte, its halfwords, its first latent, and how many of its latents are
    among the group's first `rank`."""
    start, held, latent = tl.load(packs + 3 * n), tl.load(packs + 3 * n + 1), tl.load(packs + 3 * n + 2)
    return tl.multiple_of(start, 16), held * BITS // 16, tl.multiple_of(latent, 16), tl.minimum(held, rank - latent)


@triton.jit
def segments(packs, g, column, rank, ROW: tl.constexpr):
    """`segment` of each piece of group g, one after the other, to be read once. Of a plain row, whose group begins at
    `column`: that, its rank, zero and the rank."""
    segs = ()
    if packs is not None:
        packs += g * 3 * ROW[0][SEGMENTS]
    for i in tl.static_range(len(ROW)):
        if packs is not None:
            segs = segs + segment(packs, ROW[i][SEGMENT], rank, ROW[i][BITS])
        else:
            segs = segs + (column, rank, 0, rank)
    return segs


@triton.jit
def load_scale(words, live, N: tl.constexpr):
    """Scale N of the words that `words` points at, [BLOCK_T] float32; NaN where it is broken."""
    p = (tl.multiple_of(words, 4) + N // 3 * 4).to(tl.pointer_type(tl.int32))
    if live is None:
        word = tl.load(p)
    else:
        word = tl.load(p, mask=live, other=0)
    return scale_of(word, N % 3, False).to(tl.float32) * SCALE_UNIT


@triton.jit
def load_piece(rows, segs, live, ROW: tl.constexpr, N: tl.constexpr, first=0):
    """What a piece of the rows that `rows` points at holds: [BLOCK_T, size] latents or halfwords; zeros past the end.

    first: columns or halfwords beyond the piece's own first, a multiple of its size.
    """
    h = first + ROW[N][FIRST] + tl.arange(0, ROW[N][SIZE])
    if ROW[N][BITS] == 0:
        x = load_latents(rows, segs[4 * N], segs[4 * N + 1], live, h)
    else:
        p = (rows + segs[4 * N]).to(tl.pointer_type(tl.int16))
        x = load_latents(p, 0, padded(segs[4 * N + 1]), live, h)
    return x


@triton.jit
def padded(halfwords):
    """A segment's, up to 16 bytes: what it is filled with is zeros, and loads are not cut short."""
    return tl.multiple_of(tl.cdiv(halfwords, 8) * 8, 8)


@triton.jit
def unpacked(x, scale, BITS: tl.constexpr, M, like):
    """Latents of plane M of halfwords [BLOCK_T, size], or a plain row's, in the dtype of `like`.

    A code is moved to the top of a float's fraction, where it needs no conversion from an integer: 2^b + code.
    """
    if BITS == 0:
        z = x
    elif BITS == 16:
        z = x.to(tl.float16, bitcast=True)
    else:
        code = x.to(tl.int32) << (23 - BITS - BITS * M)
        code = code & (((1 << BITS) - 1) << (23 - BITS)) | ((127 + BITS) << 23)
        z = code.to(tl.float32, bitcast=True) * scale[:, None] - (2**BITS + middle(BITS)) * scale[:, None]
    return z.to(like.dtype.element_ty)


@triton.jit
def joined(x, scale, BITS: tl.constexpr, like):
    """Latents of all planes of halfwords, or of a plain row's: [BLOCK_T, planes * size], those of a halfword side by
    side."""
    z = ()
    for m in tl.static_range(operands(BITS)):
        z = z + (unpacked(x, scale, BITS, m, like),)
    for _ in tl.static_range(3):
        if len(z) > 1:
            z = _paired(z)
    return tl.reshape(z[0], [x.shape[0], operands(BITS) * x.shape[1]])  # type: ignore[misc]


@triton.jit
def _paired(z):
    """z[m] and z[m + half] side by side, for each m: when one is left, planes lie in their order."""
    HALF: tl.constexpr = len(z) // 2
    found = ()
    for m in tl.static_range(HALF):
        found = found + (tl.join(z[m], z[m + HALF]),)
    return found


@triton.jit
def latents_of(segs, ROW: tl.constexpr, N: tl.constexpr, M, first=0):
    """Which latents of the group the columns of an operand of a piece are, and whether there are such: [size] each, of
    plane M; or of all planes with None, those of a halfword side by side."""
    if M is None:
        PLANES: tl.constexpr = operands(ROW[N][BITS])
        column = tl.arange(0, ROW[N][SIZE] * PLANES)
        h, m = ROW[N][FIRST] + column // PLANES, column % PLANES
    else:
        h, m = first + ROW[N][FIRST] + tl.arange(0, ROW[N][SIZE]), M
    r = m * segs[4 * N + 1] + h
    return segs[4 * N + 2] + r, (h < segs[4 * N + 1]) & (r < segs[4 * N + 3])


@triton.jit
def load_basis_piece(
    rows, width, row, segs, c, d, D, ROW: tl.constexpr, N: tl.constexpr, M, like, first=0
):  # fmt: skip
    """Rows of the basis from `row` on that an operand of a piece meets, see latents_of, columns c + d (d < D):
    [size, len(d)]; zeros past the group's rank."""
    r, some = latents_of(segs, ROW, N, M, first)
    u = tl.load(
        rows + (row + r)[:, None] * width + (c + d)[None, :],
        mask=some[:, None] & (d < D)[None, :],
        other=0.0,
        eviction_policy="evict_last",
    )
    return u.to(like.dtype.element_ty)
