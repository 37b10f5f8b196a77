"""A group's latents in a row, plain or packed: loaded, and met by what they are multiplied with, by one name.

ROW is the pieces of a rank (kernels/pieces.py), or with `packs` the tiles of its segments (kernels/packed.py).
"""

import triton
import triton.language as tl

from lrattn.kernels.packed import load_basis_tiles, load_query_tiles, load_tiles, packed_zeros, store_tiles
from lrattn.kernels.pieces import load_basis, load_pieces, store_pieces, transposed, zeros


@triton.jit
def packs_of(g, ROW: tl.constexpr):
    """Where group g begins in the segments of packed rows."""
    return g * 4 * (ROW[len(ROW) - 1][0] + 1)


@triton.jit
def load_row(cache, column, rank, packs, live, ROW: tl.constexpr, like):
    """Latents of the rows `cache` points at: [BLOCK_T, size] each."""
    if packs is None:
        z = load_pieces(cache, column, rank, live, ROW)
    else:
        z = load_tiles(cache, rank, packs, live, ROW, like)
    return z


@triton.jit
def load_row_basis(rows, width, r0, rank, packs, c, d, D, ROW: tl.constexpr, like):
    """The basis of the latents, columns c + d (d < D): [size, len(d)] each, in the dtype of pointer `like`."""
    if packs is None:
        u = load_basis(rows, width, r0, rank, c, d, D, ROW, like)
    else:
        u = load_basis_tiles(rows, width, r0, rank, packs, c, d, D, ROW, like)
    return u


@triton.jit
def load_row_queries(a, rank, packs, in_q, ROW: tl.constexpr):
    """Absorbed queries [BLOCK_Q, Rk] that `a` points at: [size, BLOCK_Q] each."""
    if packs is None:
        x = transposed(load_pieces(a, 0, rank, in_q, ROW))
    else:
        x = load_query_tiles(a, packs, rank, in_q, ROW)
    return x


@triton.jit
def row_zeros(M: tl.constexpr, packs, ROW: tl.constexpr):
    """Sums to begin with: [M, size] each, float32."""
    if packs is None:
        acc = zeros(M, ROW)
    else:
        acc = packed_zeros(M, ROW)
    return acc


@triton.jit
def store_row(y, acc, weight, rank, packs, live, ROW: tl.constexpr):
    """acc * weight to the latents of the live rows `y` points at."""
    if packs is None:
        store_pieces(y, acc, weight, rank, live, ROW)
    else:
        store_tiles(y, acc, weight, rank, packs, live, ROW)
