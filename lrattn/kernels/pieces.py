"""Latents in pieces: a rank is a tuple of powers of two, SIZES, and a tile of its columns a tuple of tiles.

A rank of 160 is pieces of 128 and 32. No piece is wider than 128, so that only one at a time has to be in registers.
"""

import triton
import triton.language as tl

from lrattn.kernels.tiles import load_latents, load_rows


@triton.jit
def load_pieces(cache, column, rank, live, SIZES: tl.constexpr):
    """Columns column .. column + rank of the rows `cache` points at: [BLOCK_T, size] each; zeros past the rank."""
    z = ()
    r = 0
    for n in tl.static_range(len(SIZES)):
        z = z + (load_latents(cache, column, rank, live, r + tl.arange(0, SIZES[n])),)
        r += SIZES[n]
    return z


@triton.jit
def load_basis(rows, width, r0, rank, c, d, D, SIZES: tl.constexpr, like):
    """Basis rows r0 .. r0 + rank, columns c + d (d < D): [size, len(d)] each, in the dtype of pointer `like`."""
    u = ()
    r = 0
    for n in tl.static_range(len(SIZES)):
        piece = load_rows(rows, width, r0, rank, c, d, D, r + tl.arange(0, SIZES[n]))
        u = u + (piece.to(like.dtype.element_ty),)
        r += SIZES[n]
    return u


@triton.jit
def transposed(x):
    """[M, size] each -> [size, M] each."""
    y = ()
    for n in tl.static_range(len(x)):
        y = y + (tl.trans(x[n]),)
    return y


@triton.jit
def zeros(M: tl.constexpr, SIZES: tl.constexpr):
    """Sums to begin with: [M, size] each, float32."""
    acc = ()
    for n in tl.static_range(len(SIZES)):
        acc = acc + (_zeros(M, SIZES[n]),)
    return acc


@triton.jit
def _zeros(M: tl.constexpr, N: tl.constexpr):
    return tl.zeros([M, N], tl.float32)


@triton.jit
def product(z, u):
    """sum_n z[n] @ u[n]: [BLOCK_T, size] and [size, N] each -> [BLOCK_T, N]."""
    x = tl.dot(z[0], u[0], input_precision="ieee")
    for n in tl.static_range(1, len(z)):
        x = tl.dot(z[n], u[n], x, input_precision="ieee")
    return x


@triton.jit
def add_weighted(acc, fade, p, z):
    """acc[n] * fade + p @ z[n]: [BLOCK_Q, size] each; fade [BLOCK_Q], p [BLOCK_Q, BLOCK_T]."""
    new = ()
    for n in tl.static_range(len(z)):
        new = new + (tl.dot(p, z[n], acc[n] * fade[:, None], input_precision="ieee"),)
    return new


@triton.jit
def store_pieces(y, acc, weight, rank, live, SIZES: tl.constexpr):
    """acc[n] * weight to columns below `rank` of the live rows `y` points at."""
    r = 0
    for n in tl.static_range(len(SIZES)):
        at = r + tl.arange(0, SIZES[n])
        tl.store(y[:, None] + at[None, :], acc[n] * weight[:, None], mask=live[:, None] & (at < rank)[None, :])
        r += SIZES[n]
