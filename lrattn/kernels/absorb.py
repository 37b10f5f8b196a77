"""Queries that are made ready, once a call or for each block of tokens: pairs that are turned back by tile, and others
that are multiplied into the space of latents, so that their keys are never rebuilt."""

from functools import lru_cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lrattn.factors.operands import KeySizes
from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch
from lrattn.kernels.arguments import Call, Form, Span, strides_of
from lrattn.kernels.packed import BITS, COLUMN, SIZE, load_basis_piece, operands, segments
from lrattn.kernels.pieces import Pieces, pieces
from lrattn.kernels.plan import Way
from lrattn.kernels.tiles import blocks_of, load_pairs, load_rows, load_run, turned_back

NARROW = 32  # latents of a piece by a band: so four programs fit on a multiprocessor, with wider ones three


# fmt: off
@launch.kernel
def absorb_kernel(
    q, q_strides,            # [B, S, Hq, D]    query, model order
    lens, lens_stride,       # [B]              int32, tokens held
    starts, starts_stride,   # [B]              int32, first token attended to, or None
    offsets, offsets_stride, # [B]              int32, token less position, or None
    turns,                   # [max_position, ROTARY]  float32, cos and sin of a pair adjacent; of first positions of
    #                          blocks, with neither FAST nor coefficients
    coefficients,            # [2, T, D / 2]    float32, of the band, by pair; None where queries are absorbed whole
    uk,                      # [sum Rk, C * D]  key basis, pairs adjacent
    packs,                   # [G, 3 n]         int32: segments of packed rows; None where they are plain
    runs, heads,             # [G, 3], [Hkv]    int32: column, rank, first row of uk; place -> kv head
    bias,                    # [Hkv, D]         float32 by place, as uk; None without
    x, x_strides,            # [B, tiles, owners, rows, F]          out for FAST, dtype of q, or float32 BY_LANE
    a, a_strides,            # [B, blocks, owners, rows * T, LONG]  out with T, dtype of q
    terms, terms_strides,    # [B, blocks, owners, rows * T]        out, float32, or None
    bound, S, window, max_position, first_tile, tiles,
    C: tl.constexpr, M: tl.constexpr, D: tl.constexpr, Hkv: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, WINDOWED: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, FAST: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
    BY_LANE: tl.constexpr, ROW: tl.constexpr, LONG: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, CHAINED: tl.constexpr,
):
    """x[b, i, w] = Rot(-t0) q[b, w],   t0 the first token of tile i, of fast pairs, whose pieces are FAST
    a[b, j, w, p] = (coefficients[p] applied to Rot(-b0) q[b, w]) @ uk[k]^T,   b0 the first position of block j

    coefficients[:, p] are alpha and beta of each pair: (low, high) -> (alpha low + beta high, alpha high - beta low).
    Queries that are absorbed whole have none, and one term. terms are a with the bias in uk's place. Tiles and blocks
    are counted from the first block of the tiles on; with BLOCK 0 there is one of each, and nothing is turned.
    An owner has HEADS kv heads, ROWS query rows at a time; a row's terms follow each other BY_LANE, else a term's rows.
    BY_LANE, of a piece's pairs those come first that are a multiple of 4, then those after these. For keys that are
    rebuilt T is 0: FAST is a whole head, an owner a kv head in the model's order, and first dimensions of pairs lie
    before all second ones.

    Grid: (row blocks * Hkv, 1 for FAST and the rest for latents, B). A program owns BLOCK_Q rows of one kv head, of all
    blocks: their fast pairs, or all latents, one of the pieces ROW at a time, or without these BLOCK_R latents; zeros
    past the key rank.
    Needs: BLOCK_D a power of two >= 32 and >= D. Sums are float32.
    Reference: lrattn.factors.band, lrattn.attention.reference._absorbed_scores. Derivation: docs/kernels.md#scores,
    #banded, #absorbed-scores.
    """
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
    i_b = tl.program_id(2).to(tl.int64)
    place = tl.program_id(0) % Hkv
    owner, head, kv = place // HEADS, place % HEADS, tl.load(heads + place)
    first, blocks, t_end = blocks_of(lens, lens_stride, starts, starts_stride, offsets, offsets_stride, i_b, bound, S,
                                     window, first_tile, tiles, WINDOWED, BLOCK, BLOCK_T)
    n0 = tl.program_id(0) // Hkv * BLOCK_Q  # row of the kv head: c (M S) + m S + s, c the block
    if n0 >= blocks * M * S:
        return
    q += i_b * q_strides[0] + (kv * M).to(tl.int64) * q_strides[2]
    step = tl.program_id(1) - (len(FAST) > 0)
    if len(FAST) > 0:
        if step < 0:
            x += i_b * x_strides[0] + (kv if T == 0 else owner).to(tl.int64) * x_strides[2]
            _turn(q, q_strides, turns, x, x_strides, n0, first, blocks, t_end, head, S, max_position, M, D, ROTARY,
                  INTERLEAVED, FAST, T == 0, BLOCK, BY_LANE, BLOCK_Q, BLOCK_T)
    if T > 0:
        if step >= 0:
            a += i_b * a_strides[0] + owner.to(tl.int64) * a_strides[2]
            if terms is not None:
                terms += i_b * terms_strides[0] + owner * terms_strides[2]
            _absorb(q, q_strides, turns, coefficients, uk, runs, packs, bias, a, a_strides, terms, terms_strides, n0,
                    first, blocks, place, head, step, S, max_position, C, M, D, ROTARY, INTERLEAVED, ROWS, T, BLOCK,
                    BY_LANE, ROW, LONG, BLOCK_D, BLOCK_Q, BLOCK_R)


@triton.jit
def _turn(
    q, q_strides, turns, x, x_strides, n0, first, blocks, t_end, head, S, max_position,
    M: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, FAST: tl.constexpr,
    APART: tl.constexpr, BLOCK: tl.constexpr, BY_LANE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """Fast pairs of rows n0 .. n0 + BLOCK_Q of a kv head, its owner's `head`-th, for each tile of their block."""
    TILES: tl.constexpr = max(BLOCK // BLOCK_T, 1)
    n = n0 * TILES + tl.arange(0, BLOCK_Q * TILES)  # rows, each as often as a block has tiles
    c, i = n // TILES // (M * S), n // TILES % (M * S)
    tile = c * TILES + n % TILES
    stored, t0 = c < blocks, None
    if BLOCK:
        t0 = first * BLOCK + tile * BLOCK_T
        stored &= t0 < t_end
    q += (i % S).to(tl.int64) * q_strides[1] + (i // S).to(tl.int64) * q_strides[2]
    x += tile.to(tl.int64) * x_strides[1] + (head * (M * S) + i).to(tl.int64) * x_strides[3]
    d = 0
    for m in tl.static_range(len(FAST)):
        low, high = load_pairs(q, d, FAST[m], stored, D, ROTARY, INTERLEAVED)
        low, high = turned_back(low, high, turns, t0, max_position, d, FAST[m], ROTARY)
        if APART:
            to = x[:, None] + d + tl.arange(0, FAST[m] // 2)[None, :]
            tl.store(to, low.to(x.dtype.element_ty), mask=stored[:, None])
            tl.store(to + FAST[m] // 2, high.to(x.dtype.element_ty), mask=stored[:, None])
        else:
            pairs = tl.join(low, high).to(x.dtype.element_ty)
            if BY_LANE:
                pairs = tl.permute(tl.reshape(pairs, [BLOCK_Q * TILES, FAST[m] // 8, 4, 2]), (0, 2, 1, 3))
            pairs = tl.reshape(pairs, [BLOCK_Q * TILES, FAST[m]])
            tl.store(x[:, None] + d + tl.arange(0, FAST[m])[None, :], pairs, mask=stored[:, None])
        d += FAST[m]


@triton.jit
def _absorb(
    q, q_strides, turns, coefficients, uk, runs, packs, bias, a, a_strides, terms, terms_strides, n0, first, blocks,
    place, head, step, S, max_position, C: tl.constexpr, M: tl.constexpr, D: tl.constexpr, ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr, ROWS: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr, BY_LANE: tl.constexpr,
    ROW: tl.constexpr, LONG: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """Rows n0 .. n0 + BLOCK_Q of a kv head, or their slow pairs, in the space of latents, for their block."""
    _, rank, r0 = load_run(runs, place // C)
    n = n0 + tl.arange(0, BLOCK_Q)
    c, i = n // (M * S), n % (M * S)
    q += (i % S).to(tl.int64) * q_strides[1] + (i // S).to(tl.int64) * q_strides[2]
    at = None
    if coefficients is not None:
        j = tl.arange(0, BLOCK_D // 2)
        of = coefficients + tl.arange(0, T)[:, None] * (D // 2) + j[None, :]
        alpha = tl.load(of, mask=(j < D // 2)[None, :], other=0.0)[None, :, :]
        beta = tl.load(of + T * (D // 2), mask=(j < D // 2)[None, :], other=0.0)[None, :, :]
        at = (first + c) * BLOCK
    elif BLOCK:
        at = first + c
    low, high = load_pairs(q, 0, BLOCK_D, c < blocks, D, ROTARY, INTERLEAVED)
    low, high = turned_back(low, high, turns, at, max_position, 0, BLOCK_D, ROTARY)
    if coefficients is not None:
        low, high = low[:, None, :], high[:, None, :]
        low, high = alpha * low + beta * high, alpha * high - beta * low  # [BLOCK_Q, T, BLOCK_D / 2]
    y = tl.reshape(tl.join(low, high), [BLOCK_Q * T, BLOCK_D])
    k, d = tl.arange(0, BLOCK_Q * T), tl.arange(0, BLOCK_D)
    m, p = n0 + k // T, k % T
    block, w = m // (M * S), head * (M * S) + m % (M * S)
    if BY_LANE:
        column = w * T + p
    else:
        column = w // ROWS * (ROWS * T) + p * ROWS + w % ROWS
    stored = block < blocks
    if terms is not None:
        if step == 0:
            share = tl.sum(y * tl.load(bias + place * D + d, mask=d < D, other=0.0)[None, :], 1)
            tl.store(terms + block.to(tl.int64) * terms_strides[1] + column, share, mask=stored)
    y = y.to(a.dtype.element_ty)
    a += block.to(tl.int64) * a_strides[1] + column.to(tl.int64) * LONG
    if len(ROW) == 0:
        r = step * BLOCK_R + tl.arange(0, BLOCK_R)
        u = load_rows(uk, C * D, r0, rank, place % C * D, d, D, r).to(y.dtype)
        got = tl.dot(y, tl.trans(u), input_precision="ieee")
        tl.store(a[:, None] + r[None, :], got.to(y.dtype), mask=stored[:, None] & (r < LONG)[None, :])
    else:
        segs = segments(packs, place // C, 0, rank, ROW)
        for n in tl.static_range(len(ROW)):
            u = load_basis_piece(uk, C * D, r0, segs, place % C * D, d, D, ROW, n, None, a)
            got = tl.dot(y, tl.trans(u), input_precision="ieee")
            to = a[:, None] + ROW[n][COLUMN] + tl.arange(0, ROW[n][SIZE] * operands(ROW[n][BITS]))[None, :]
            tl.store(to, got.to(y.dtype), mask=stored[:, None])
# fmt: on


def absorb(call: Call, x: Tensor | None, a: Tensor | None, terms: Tensor | None, span: Span, way: Way) -> None:
    """Queries [B, S, Hq, D] for each block that tiles of `span` are in: x [B, tiles, owners, rows, F], a [B, blocks,
    owners, rows T, LONG], and what a bias adds, terms [B, blocks, owners, rows T]."""
    q, keys, tokens, size = call.q, call.keys, call.tokens, call.keys.sizes
    blocks, *_, long = next(made.shape[1:] for made in (a, x) if made is not None)  # tiles, where there are no terms
    rows = blocks * q.shape[1] * q.shape[2] // size.num_heads
    device = launch.name(q.device), launch.chained(q.device)
    most, steps, constants = _launch(*device, q.itemsize, call.form, size, way, long)
    block_q = min(most, launch.block_q(rows))
    absorb_kernel[cdiv(rows, block_q) * size.num_heads, steps, q.shape[0]](
        q, q.stride(), *tokens.seen, *tokens.lag, keys.turns, keys.coefficients, keys.rows, keys.packs, keys.runs,
        keys.heads, keys.bias, x, strides_of(x, 5), a, strides_of(a, 5), terms, strides_of(terms, 4), *call.limits,
        size.max_position, *span[:2], BLOCK_Q=block_q, **constants,
    )  # fmt: skip


@lru_cache(maxsize=256)
def _launch(
    device: str, chained: bool, itemsize: int, form: Form, size: KeySizes, way: Way, long: int
) -> tuple[int, int, dict[str, Any]]:
    """Most query rows of a program, programs for fast pairs and for latents, and constants; once for all calls."""
    choice, fast = launch.absorb(device, itemsize, head=size.head_dim), len(way.fast) > 0
    row: Pieces = ()
    if way.banded:
        row = way.row if size.packed else pieces(size._replace(rank=long), NARROW)
    steps = 0 if not way.terms else 1 if way.banded else cdiv(long, choice.block_r)
    names = "C M D Hkv ROTARY INTERLEAVED WINDOWED BLOCK_D BLOCK_R"
    constants = launch.constants(names, form, size, choice) | {
        "HEADS": way.heads, "ROWS": way.rows if way.banded else 1, "FAST": way.fast, "T": way.terms, "BLOCK": way.block,
        "BY_LANE": way.by_lane, "ROW": row, "LONG": long, "BLOCK_T": way.launch.block_t,
        "CHAINED": chained,
    }  # fmt: skip
    return choice.block_q // (way.terms or 4), fast + steps, constants
