"""Queries for keys before RoPE: their fast pairs turned back by tile, their slow ones absorbed by block."""

import triton
import triton.language as tl
from torch import Tensor

from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch
from lrattn.kernels.arguments import Call, Span, strides_of
from lrattn.kernels.packed import BITS, COLUMN, SIZE, load_basis_piece, operands, segments
from lrattn.kernels.pieces import pieces
from lrattn.kernels.plan import Grouped
from lrattn.kernels.tiles import load_pairs, load_run, load_turns, pair_columns, part_of, reach


# fmt: off
@launch.kernel
def absorb_band_kernel(
    q, q_strides,            # [B, S, Hq, D]    query, rotated, model order
    lens, lens_stride,       # [B]              int32, tokens held
    starts, starts_stride,   # [B]              int32, first token attended to, or None
    turns,                   # [max_position, ROTARY]  float32, cos and sin of a pair adjacent
    coefficients,            # [2, T, D / 2]    float32, of the band, by pair; None with T = 0
    uk,                      # [sum Rk, C * D]  key basis, pairs adjacent
    packs,                   # [G, 3 n]         int32: segments of packed rows; None where they are plain
    runs, heads,             # [G, 3], [Hkv]    int32: column, rank, first row of uk; place -> kv head
    bias,                    # [Hkv, D]         float32 by place, pairs adjacent; None without
    x, x_strides,            # [B, tiles, owners, rows, F]      out, dtype of q, or float32 BY_LANE
    a, a_strides,            # [B, blocks, owners, rows * T, LONG]  out, dtype of q
    terms, terms_strides,    # [B, blocks, owners, rows * T]    out, float32, or None
    bound, S, window, max_position, first_tile, tiles,
    C: tl.constexpr, M: tl.constexpr, D: tl.constexpr, Hkv: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, WINDOWED: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, FAST: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
    BY_LANE: tl.constexpr, ROW: tl.constexpr, LONG: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, CHAINED: tl.constexpr,
):
    """x[b, i, w] = Rot(-t0) q[b, w],   t0 the first token of tile i, of fast pairs, whose pieces are FAST
    a[b, j, w, p] = (coefficients[p] applied to Rot(-b0) q[b, w]) @ uk[k]^T,   b0 the first of block j

    coefficients[:, p] are alpha and beta of each pair: (low, high) -> (alpha low + beta high, alpha high - beta low).
    terms are the same with the bias in uk's place. Tiles and blocks are counted from the first block of the tiles on.
    An owner has HEADS kv heads, ROWS query rows at a time; a row's terms follow each other BY_LANE, else a term's rows.
    BY_LANE, of a piece's pairs those come first that are a multiple of 4, then those after these.

    Grid: (row blocks * Hkv, 2, B). A program owns BLOCK_Q rows of one kv head, of all blocks: their fast pairs, or
    their slow ones, for one of the pieces ROW at a time; zeros past the key rank.
    Needs: BLOCK_D a power of two >= D. Sums are float32.
    Reference: lrattn.factors.band. Derivation: docs/kernels.md#banded.
    """
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
    i_b = tl.program_id(2).to(tl.int64)
    begin, end = reach(lens, lens_stride, starts, starts_stride, i_b, bound, S, window, WINDOWED)
    origin, _, t_end = part_of(begin, end, first_tile, tiles, 0, 1, BLOCK_T)
    first = origin // BLOCK
    blocks = tl.where(t_end > origin, (tl.maximum(t_end, 1) - 1) // BLOCK - first + 1, 0)
    n0 = tl.program_id(0) // Hkv * BLOCK_Q  # row of the kv head: c (M S) + m S + s, c the block
    if n0 >= blocks * M * S:
        return
    place = tl.program_id(0) % Hkv
    owner, kv = place // HEADS, tl.load(heads + place)
    q += i_b * q_strides[0]
    x += i_b * x_strides[0] + owner * x_strides[2]
    if tl.program_id(1) == 0:
        _turn(q, q_strides, turns, x, x_strides, n0, first, blocks, t_end, kv, place % HEADS, S, max_position,
              M, D, ROTARY, INTERLEAVED, FAST, BLOCK, BY_LANE, BLOCK_Q, BLOCK_T)
    else:
        a += i_b * a_strides[0] + owner * a_strides[2]
        if terms is not None:
            terms += i_b * terms_strides[0] + owner * terms_strides[2]
        _absorb(q, q_strides, turns, coefficients, uk, runs, packs, bias, a, a_strides, terms, terms_strides, n0, first,
                blocks, kv, place, S, max_position, C, M, D, ROTARY, INTERLEAVED, HEADS, ROWS, T, BLOCK, BY_LANE, ROW,
                LONG, BLOCK_D, BLOCK_Q)


@triton.jit
def _turn(
    q, q_strides, turns, x, x_strides, n0, first, blocks, t_end, kv, head, S, max_position,
    M: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, FAST: tl.constexpr,
    BLOCK: tl.constexpr, BY_LANE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """Fast pairs of rows n0 .. n0 + BLOCK_Q of a kv head, its owner's `head`-th, for each tile of their block."""
    TILES: tl.constexpr = BLOCK // BLOCK_T
    n = n0 * TILES + tl.arange(0, BLOCK_Q * TILES)  # rows, each as often as a block has tiles
    c, i = n // TILES // (M * S), n // TILES % (M * S)
    tile = c * TILES + n % TILES
    t0 = first * BLOCK + tile * BLOCK_T
    stored = (c < blocks) & (t0 < t_end)
    q += (i % S).to(tl.int64) * q_strides[1] + (kv * M + i // S).to(tl.int64) * q_strides[2]
    x += tile.to(tl.int64) * x_strides[1] + (head * (M * S) + i).to(tl.int64) * x_strides[3]
    d = 0
    for m in tl.static_range(len(FAST)):
        own = tl.arange(0, FAST[m] // 2)
        low, high = pair_columns(d // 2 + own, ROTARY, INTERLEAVED)
        q_low, q_high = load_pairs(q, low, high, stored, D)
        cos, sin = load_turns(turns, t0, max_position, d + tl.arange(0, FAST[m]), ROTARY)
        if BY_LANE:
            own = own % 4 * (FAST[m] // 8) + own // 4
        to = x[:, None] + (d + 2 * own)[None, :]
        tl.store(to, (q_low * cos + q_high * sin).to(x.dtype.element_ty), mask=stored[:, None])
        tl.store(to + 1, (q_high * cos - q_low * sin).to(x.dtype.element_ty), mask=stored[:, None])
        d += FAST[m]


@triton.jit
def _absorb(
    q, q_strides, turns, coefficients, uk, runs, packs, bias, a, a_strides, terms, terms_strides, n0, first, blocks, kv,
    place, S, max_position, C: tl.constexpr, M: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
    BY_LANE: tl.constexpr, ROW: tl.constexpr, LONG: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr,
):
    """Slow pairs of rows n0 .. n0 + BLOCK_Q of a kv head in the space of latents, for their block."""
    n = n0 + tl.arange(0, BLOCK_Q)
    c, i = n // (M * S), n % (M * S)
    in_q = c < blocks
    q += (i % S).to(tl.int64) * q_strides[1] + (kv * M + i // S).to(tl.int64) * q_strides[2]
    j, d = tl.arange(0, BLOCK_D // 2), tl.arange(0, BLOCK_D)
    low, high = pair_columns(j, ROTARY, INTERLEAVED)
    q_low, q_high = load_pairs(q, low, high, in_q, D)
    cos, sin = load_turns(turns, (first + c) * BLOCK, max_position, d, ROTARY)
    x_low, x_high = (q_low * cos + q_high * sin)[:, None, :], (q_high * cos - q_low * sin)[:, None, :]
    at = coefficients + tl.arange(0, T)[:, None] * (D // 2) + j[None, :]
    alpha = tl.load(at, mask=(j < D // 2)[None, :], other=0.0)[None, :, :]
    beta = tl.load(at + T * (D // 2), mask=(j < D // 2)[None, :], other=0.0)[None, :, :]
    y = tl.join(alpha * x_low + beta * x_high, alpha * x_high - beta * x_low)  # [BLOCK_Q, T, BLOCK_D / 2, 2]
    y = tl.reshape(y, [BLOCK_Q * T, BLOCK_D])
    k = tl.arange(0, BLOCK_Q * T)
    m, p = n0 + k // T, k % T
    block, w = m // (M * S), place % HEADS * (M * S) + m % (M * S)
    if BY_LANE:
        column = w * T + p
    else:
        column = w // ROWS * (ROWS * T) + p * ROWS + w % ROWS
    stored = block < blocks
    if terms is not None:
        share = tl.sum(y * tl.load(bias + place * D + d, mask=d < D, other=0.0)[None, :], 1)
        tl.store(terms + block.to(tl.int64) * terms_strides[1] + column, share, mask=stored)
    _, rank, r0 = load_run(runs, place // C)
    y = y.to(a.dtype.element_ty)
    a += block.to(tl.int64) * a_strides[1] + column * LONG
    segs = segments(packs, place // C, 0, rank, ROW)
    for n in tl.static_range(len(ROW)):
        u = load_basis_piece(uk, C * D, r0, segs, place % C * D, d, D, ROW, n, None, a)
        got = tl.dot(y, tl.trans(u), input_precision="ieee")
        to = a[:, None] + ROW[n][COLUMN] + tl.arange(0, ROW[n][SIZE] * operands(ROW[n][BITS]))[None, :]
        tl.store(to, got.to(a.dtype.element_ty), mask=stored[:, None])
# fmt: on


def absorb_band(call: Call, x: Tensor, a: Tensor, terms: Tensor | None, span: Span, way: Grouped) -> None:
    """Queries [B, S, Hq, D] for `attend`: x [B, tiles, owners, rows, F], a [B, blocks, owners, rows T, R] and what the
    bias adds, terms [B, blocks, owners, rows T], for each block that tiles of `span` are in."""
    q, keys, tokens, size = call.q, call.keys, call.tokens, call.keys.sizes
    choice = launch.absorb_band(launch.name(q.device), q.itemsize)
    block_q = choice.block_q // size.terms
    rows = a.shape[1] * q.shape[1] * q.shape[2] // size.num_heads
    absorb_band_kernel[cdiv(rows, block_q) * size.num_heads, 2, q.shape[0]](
        q, q.stride(), *tokens.seen, keys.turns, keys.coefficients, keys.rows, keys.packs, keys.runs, keys.heads,
        keys.bias, x, x.stride(), a, a.stride(), terms, strides_of(terms, 3), *call.limits, size.max_position,
        *span[:2], HEADS=way.heads, ROWS=way.rows, FAST=way.fast, T=size.terms, BLOCK=size.block, BY_LANE=way.by_lane,
        ROW=way.row if size.packed else pieces(size._replace(rank=a.shape[4]), choice.block_r), LONG=a.shape[4],
        BLOCK_Q=block_q, BLOCK_T=way.launch.block_t, CHAINED=launch.chained(q.device),
        **launch.constants("C M D Hkv ROTARY INTERLEAVED WINDOWED BLOCK_D", call.form, size, choice),
    )  # fmt: skip
