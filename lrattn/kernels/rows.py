"""A group's latents in a row, plain or packed, as a tuple of tiles (kernels/packed.py): [.., size] each.

ROW has them: a rank of 160 is tiles of 128 and 32. None is wider than 128, so that only one at a time has to be in
registers. What goes along a row instead, `streamed`, takes one tile for each segment.
"""

import triton
import triton.language as tl

from lrattn.kernels.packed import latents_of, load_basis_tile, load_query_tile, load_scale, load_tile


@triton.jit
def load_row(cache, segs, live, ROW: tl.constexpr, like):
    """Latents of the rows `cache` points at: [BLOCK_T, size] each."""
    z = ()
    for i in tl.static_range(len(ROW)):
        if ROW[i][2] == 0:
            scale = load_scale(cache, segs, live, ROW, i)
        z = z + (load_tile(cache, segs, live, scale, ROW, i, like),)
    return z


@triton.jit
def load_row_basis(rows, width, row, segs, c, d, D, ROW: tl.constexpr, like):
    """The basis of the latents, rows from `row` on, columns c + d (d < D): [size, len(d)] each, in like's dtype."""
    u = ()
    for i in tl.static_range(len(ROW)):
        u = u + (load_basis_tile(rows, width, row, segs, c, d, D, ROW, i, like),)
    return u


@triton.jit
def load_row_queries(a, segs, in_q, ROW: tl.constexpr):
    """Absorbed queries [BLOCK_Q, Rk] that `a` points at: [BLOCK_Q, size] each."""
    x = ()
    for i in tl.static_range(len(ROW)):
        x = x + (load_query_tile(a, segs, in_q, ROW, i),)
    return x


@triton.jit
def transposed(x):
    """[M, size] each -> [size, M] each."""
    y = ()
    for n in tl.static_range(len(x)):
        y = y + (tl.trans(x[n]),)
    return y


@triton.jit
def product(z, u):
    """sum_n z[n] @ u[n]: [BLOCK_T, size] and [size, N] each -> [BLOCK_T, N]."""
    x = tl.dot(z[0], u[0], input_precision="ieee")
    for n in tl.static_range(1, len(z)):
        x = tl.dot(z[n], u[n], x, input_precision="ieee")
    return x


@triton.jit
def keys_streamed(cache, segs, live, rows, width, row, c, d, D, ROW: tl.constexpr, like):
    """latents @ basis of the rows `cache` points at, a tile at a time: [BLOCK_T, len(d)] float32."""
    k = tl.zeros([live.shape[0], d.shape[0]], tl.float32)
    for i in tl.static_range(len(ROW)):
        scale = load_scale(cache, segs, live, ROW, i)
        for r0 in range(0, segs[4 * i + 1], ROW[i][3]):
            u = load_basis_tile(rows, width, row, segs, c, d, D, ROW, i, like, r0)
            k = tl.dot(load_tile(cache, segs, live, scale, ROW, i, like, r0), u, k, input_precision="ieee")
    return k


@triton.jit
def scores_streamed(cache, segs, live, a, in_q, ROW: tl.constexpr):
    """latents @ absorbed queries [BLOCK_Q, Rk] that `a` points at, as keys_streamed: [BLOCK_T, BLOCK_Q] float32."""
    score = tl.zeros([live.shape[0], in_q.shape[0]], tl.float32)
    for i in tl.static_range(len(ROW)):
        scale = load_scale(cache, segs, live, ROW, i)
        for r0 in range(0, segs[4 * i + 1], ROW[i][3]):
            q = tl.trans(load_query_tile(a, segs, in_q, ROW, i, r0))
            score = tl.dot(load_tile(cache, segs, live, scale, ROW, i, a, r0), q, score, input_precision="ieee")
    return score


@triton.jit
def row_zeros(M: tl.constexpr, ROW: tl.constexpr):
    """Sums to begin with: [M, size] each, float32."""
    acc = ()
    for i in tl.static_range(len(ROW)):
        acc = acc + (_zeros(M, ROW[i][3]),)
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
def store_row(y, acc, weight, segs, live, ROW: tl.constexpr):
    """acc * weight to the latents of the live rows `y` points at."""
    for i in tl.static_range(len(ROW)):
        r, some = latents_of(segs, ROW, i)
        tl.store(y[:, None] + r[None, :], acc[i] * weight[:, None], mask=live[:, None] & some[None, :])
