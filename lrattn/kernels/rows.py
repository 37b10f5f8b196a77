"""A group's latents in a row, plain or packed, as the operands of its pieces (kernels/packed.py): [.., size] each.

ROW has the pieces: a rank of 160 is pieces of 128 and 32. Of packed rows, and where values are summed, none is wider
than 128, so that only one at a time has to be in registers. What goes along a row instead, `streamed`, takes one piece
for each segment.
"""

import triton
import triton.language as tl

from lrattn.kernels.packed import (
    BITS,
    FIRST,
    OPENS,
    SCALE,
    SIZE,
    joined,
    load_basis_piece,
    load_piece,
    load_scale,
    operands,
    unpacked,
)


@triton.jit
def columns_within(column, rank, ROW: tl.constexpr):
    """Columns of the pieces of a plain row whose latents are `column` + 0 .. rank: [size] each. Past the rank they are
    those of the group's first latents again, so that they are loaded without a mask; what they meet is zero, or not
    stored."""
    found = ()
    for i in tl.static_range(len(ROW)):
        r = ROW[i][FIRST] + tl.arange(0, ROW[i][SIZE])
        found = found + (tl.max_contiguous(tl.multiple_of(column + tl.where(r < rank, r, r % 16), 16), 16),)
    return found


@triton.jit
def tile_rows(cache, stride, pages, t0, TOKEN: tl.constexpr, P: tl.constexpr, BLOCK_T: tl.constexpr,
              STEP: tl.constexpr):  # fmt: skip
    """Pointers [BLOCK_T] to the rows of the tile from token t0 on, TOKEN apart; pages: of `tile_pages`, `stride` apart.

    STEP: rows that are loaded at a time. What is left of a row's number is then a constant of its register, and goes
    into the instruction.
    """
    t = tl.arange(0, BLOCK_T)
    if len(pages[0].shape) > 0:
        rows = cache + pages[0].to(tl.int64) * stride + tl.maximum(t0 + t, 0) % P * TOKEN
    elif P % BLOCK_T == 0:
        rows = cache + (pages[0].to(tl.int64) * stride + t0 % P * TOKEN)
        rows += t // STEP * (STEP * TOKEN) + t % STEP * TOKEN
    else:
        first = tl.zeros([BLOCK_T], tl.int64) + pages[0].to(tl.int64) * stride
        for n in tl.static_range(1, BLOCK_T // P):
            first = tl.where(t // P >= n, pages[n].to(tl.int64) * stride, first)
        PART: tl.constexpr = min(STEP, P)
        rows = cache + first + (t % P // PART * (PART * TOKEN) + t % P % PART * TOKEN)
    return rows


@triton.jit
def tile_located(cache, stride, pages, t0, g, TOKEN: tl.constexpr, WORDS: tl.constexpr, G: tl.constexpr,
                 P: tl.constexpr, BLOCK_T: tl.constexpr):  # fmt: skip
    """Packed rows of a tile and the words of scales of group g, as `located` has those of tokens."""
    rows = tile_rows(cache, stride, pages, t0, TOKEN, P, BLOCK_T, BLOCK_T)
    return rows, tile_rows(cache + (P * TOKEN + g * (WORDS // G)), stride, pages, t0, WORDS, P, BLOCK_T, BLOCK_T)


@triton.constexpr_function
def at_a_time(cache, columns, warps):
    """Rows of so many columns that so many warps load at a time, 16 bytes a lane."""
    return max(warps * 4096 // cache.dtype.element_ty.primitive_bitwidth // columns.shape[0], 1)


@triton.jit
def load_tile(cache, stride, pages, t0, columns, TOKEN: tl.constexpr, P: tl.constexpr, BLOCK_T: tl.constexpr,
              WARPS: tl.constexpr, live=None):  # fmt: skip
    """Latents of the tile from token t0 on: [BLOCK_T, size] each. Dead tokens give zeros where `live` is given."""
    z = ()
    for i in tl.static_range(len(columns)):
        rows = tile_rows(cache, stride, pages, t0, TOKEN, P, BLOCK_T, at_a_time(cache, columns[i], WARPS))
        if live is None:
            z = z + (tl.load(rows[:, None] + columns[i][None, :]),)
        else:
            z = z + (tl.load(rows[:, None] + columns[i][None, :], mask=live[:, None], other=0.0),)
    return z


@triton.jit
def load_codes(located, segs, live, ROW: tl.constexpr):
    """The rows located as they are held: [BLOCK_T, size] each piece, and the scales [BLOCK_T] of the packed ones."""
    x, scales = (), ()
    for i in tl.static_range(len(ROW)):
        if ROW[i][OPENS] and ROW[i][BITS] % 16 != 0:
            scales = scales + (load_scale(located[1], live, ROW[i][SCALE]),)
        x = x + (load_piece(located[0], segs, live, ROW, i),)
    return x, scales


@triton.jit
def unpack(held, ROW: tl.constexpr, like):
    """Latents of what `load_codes` gives: [BLOCK_T, columns] each."""
    z, scale = (), None
    for i in tl.static_range(len(ROW)):
        if ROW[i][BITS] % 16 != 0:
            scale = held[1][ROW[i][SCALE]]
        z = z + (joined(held[0][i], scale, ROW[i][BITS], like),)
    return z


@triton.jit
def load_keys(ck, ck_stride, packs, pages, t0, columns, segs, g, begin, t_end, ROW: tl.constexpr, TOKEN: tl.constexpr,
              WORDS: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BLOCK_T: tl.constexpr, WARPS: tl.constexpr,
              SHARED: tl.constexpr, STREAMED: tl.constexpr):  # fmt: skip
    """Rows of group g of the tile from token t0 on as they are held: their latents, zeros of dead tokens where values
    are among them, or what `unpack` takes; nothing where they are read piece by piece."""
    held = ()
    if packs is not None:
        held = load_codes(tile_located(ck, ck_stride, pages, t0, g, TOKEN, WORDS, G, P, BLOCK_T), segs, None, ROW)
    elif SHARED:
        t = t0 + tl.arange(0, BLOCK_T)
        held = load_tile(ck, ck_stride, pages, t0, columns, TOKEN, P, BLOCK_T, WARPS, (t >= begin) & (t < t_end))
    elif not STREAMED:
        held = load_tile(ck, ck_stride, pages, t0, columns, TOKEN, P, BLOCK_T, WARPS)
    return held


@triton.jit
def load_row(located, segs, live, ROW: tl.constexpr, like):
    """Latents of the rows located: [BLOCK_T, columns] each."""
    return unpack(load_codes(located, segs, live, ROW), ROW, like)


@triton.jit
def load_row_basis(rows, width, row, segs, c, d, D, ROW: tl.constexpr, like):
    """The basis of the latents, rows from `row` on, columns c + d (d < D): [columns, len(d)] each, in like's dtype."""
    u = ()
    for i in tl.static_range(len(ROW)):
        u = u + (load_basis_piece(rows, width, row, segs, c, d, D, ROW, i, None, like),)
    return u


@triton.jit
def product(z, u):
    """sum_n z[n] @ u[n]: [BLOCK_T, size] and [size, N] each -> [BLOCK_T, N]."""
    x = tl.dot(z[0], u[0], input_precision="ieee")
    for n in tl.static_range(1, len(z)):
        x = tl.dot(z[n], u[n], x, input_precision="ieee")
    return x


@triton.jit
def keys_streamed(located, segs, live, rows, width, row, c, d, D, ROW: tl.constexpr, like):
    """latents @ basis of the rows located, a piece at a time: [BLOCK_T, len(d)] float32."""
    k, scale = tl.zeros([live.shape[0], d.shape[0]], tl.float32), None
    for i in tl.static_range(len(ROW)):
        if ROW[i][BITS] % 16 != 0:
            scale = load_scale(located[1], live, ROW[i][SCALE])
        for first in range(0, segs[4 * i + 1], ROW[i][SIZE]):
            x = load_piece(located[0], segs, live, ROW, i, first)
            for m in range(operands(ROW[i][BITS])):
                u = load_basis_piece(rows, width, row, segs, c, d, D, ROW, i, m, like, first)
                k = tl.dot(unpacked(x, scale, ROW[i][BITS], m, like), u, k, input_precision="ieee")
    return k


@triton.jit
def row_zeros(M: tl.constexpr, ROW: tl.constexpr):
    """Sums of plain rows to begin with: [M, size] each, float32."""
    acc = ()
    for i in tl.static_range(len(ROW)):
        acc = acc + (_zeros(M, ROW[i][SIZE]),)
    return acc


@triton.jit
def _zeros(M: tl.constexpr, N: tl.constexpr):
    return tl.zeros([M, N], tl.float32)


@triton.jit
def add_weighted(acc, fade, p, z):
    """acc[n] * fade + p @ z[n]: [BLOCK_Q, size] each; fade [BLOCK_Q], p [BLOCK_Q, BLOCK_T]."""
    new = ()
    for n in tl.static_range(len(z)):
        new = new + (tl.dot(p, z[n], acc[n] * fade[:, None], input_precision="ieee"),)
    return new


@triton.jit
def repeated(x):
    """[Q] -> [16] of fewer than 16 rows, each so many times as it takes."""
    Q: tl.constexpr = x.shape[0]
    if Q < 16:
        x = tl.reshape(tl.broadcast_to(x[:, None], [Q, 16 // Q]), [16])
    return x


@triton.jit
def add_repeated(acc, fade, p, z):
    """acc[n] * fade + p @ z[n], of rows repeated up to 16: [rows, size] each; fade [Q], p [Q, BLOCK_T]."""
    Q: tl.constexpr = p.shape[0]
    BLOCK_T: tl.constexpr = p.shape[1]
    if Q < 16:
        p = tl.reshape(tl.broadcast_to(p[:, None, :], [Q, 16 // Q, BLOCK_T]), [16, BLOCK_T])
    return add_weighted(acc, repeated(fade), p, z)


@triton.jit
def store_row(y, acc, weight, rank, live, ROW: tl.constexpr):
    """acc * weight to the latents, up to `rank`, of the live rows `y` points at."""
    for i in tl.static_range(len(ROW)):
        r = ROW[i][FIRST] + tl.arange(0, ROW[i][SIZE])
        tl.store(y[:, None] + r[None, :], acc[i] * weight[:, None], mask=live[:, None] & (r < rank)[None, :])
