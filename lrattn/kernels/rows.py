"""A group's latents in a row, plain or packed: loaded, and met by what they are multiplied with, by one name.

ROW is the pieces of a rank (kernels/pieces.py); or, with `segs`, the tiles of its segments (kernels/packed.py).
"""

import triton
import triton.language as tl

from lrattn.kernels.packed import load_basis_tiles, load_query_tiles, load_tiles, packed_zeros, store_tiles
from lrattn.kernels.pieces import load_basis, load_pieces, store_pieces, transposed, zeros


@triton.jit
def load_row(cache, column, rank, segs, live, ROW: tl.constexpr, like):
    """Latents of the rows `cache` points at: [BLOCK_T, size] each."""
    if len(segs) == 0:
        z = load_pieces(cache, column, rank, live, ROW)
    else:
        z = load_tiles(cache, segs, live, ROW, like)
    return z


@triton.jit
def load_row_basis(rows, width, r0, rank, segs, c, d, D, ROW: tl.constexpr, like):
    """The basis of the latents, columns c + d (d < D): [size, len(d)] each, in the dtype of pointer `like`."""
    if len(segs) == 0:
        u = load_basis(rows, width, r0, rank, c, d, D, ROW, like)
    else:
        u = load_basis_tiles(rows, width, r0, segs, c, d, D, ROW, like)
    return u


@triton.jit
def load_row_queries(a, rank, segs, in_q, ROW: tl.constexpr):
    """Absorbed queries [BLOCK_Q, Rk] that `a` points at: [size, BLOCK_Q] each."""
    if len(segs) == 0:
        x = transposed(load_pieces(a, 0, rank, in_q, ROW))
    else:
        x = load_query_tiles(a, segs, in_q, ROW)
    return x


@triton.jit
def row_zeros(M: tl.constexpr, segs, ROW: tl.constexpr):
    """Sums to begin with: [M, size] each, float32."""
    if len(segs) == 0:
        acc = zeros(M, ROW)
    else:
        acc = packed_zeros(M, ROW)
    return acc


@triton.jit
def store_row(y, acc, weight, rank, segs, live, ROW: tl.constexpr):
    """acc * weight to the latents of the live rows `y` points at."""
    if len(segs) == 0:
        store_pieces(y, acc, weight, rank, live, ROW)
    else:
        store_tiles(y, acc, weight, segs, live, ROW)
