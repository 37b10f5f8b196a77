"""Queries for rebuilt keys, turned back by the first token of each tile."""

import triton.language as tl
from torch import Tensor

from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch
from lrattn.kernels.arguments import Call
from lrattn.kernels.tiles import load_pairs, load_turns, pair_columns, reach


# fmt: off
@launch.kernel
def turn_queries_kernel(
    q, q_strides,            # [B, S, Hq, D]    query, rotated, model order
    lens, lens_stride,       # [B]              int32, tokens held
    starts, starts_stride,   # [B]              int32, first token attended to, or None
    turns,                   # [max_position, ROTARY]  float32, cos and sin of a pair adjacent
    x, x_strides,            # [B, tiles, Hq * S, 2, BLOCK_D / 2]  out, dtype of q
    bound, S, window, max_position, first_tile, tiles, rows,
    D: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, TABLE: tl.constexpr, WINDOWED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """x[b, i, h S + s] = Rot(t0)^-1 q[b, s, h],  t0 the first token of tile i; first and second dims of pairs apart

    With TABLE the dims are taken apart and nothing is turned; there is one tile.

    Grid: (row blocks, tiles, B). A program owns BLOCK_Q rows for one tile.
    Needs: BLOCK_D a power of two >= D. Products are float32.
    Derivation: docs/kernels.md#scores.
    """
    i_t = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    j = tl.arange(0, BLOCK_D // 2)
    low, high = pair_columns(j, ROTARY, INTERLEAVED)
    s, h = (i % S).to(tl.int64), (i // S).to(tl.int64)
    p_q = q + i_b * q_strides[0] + s * q_strides[1] + h * q_strides[2]
    q_low, q_high = load_pairs(p_q, low, high, i < rows, D)
    if not TABLE:
        begin, end = reach(lens, lens_stride, starts, starts_stride, i_b, bound, S, window, WINDOWED)
        t0 = (begin // BLOCK_T + first_tile + i_t) * BLOCK_T
        if t0 >= end:
            return
        cos, sin = load_turns(turns, t0 + tl.zeros([1], tl.int32), max_position, tl.arange(0, BLOCK_D), ROTARY)
        turned = q_low * cos + q_high * sin
        q_high = q_high * cos - q_low * sin
        q_low = turned
    p_x = x + i_b * x_strides[0] + i_t.to(tl.int64) * x_strides[1] + i.to(tl.int64)[:, None] * x_strides[2] + j[None, :]
    tl.store(p_x, q_low.to(x.dtype.element_ty), mask=(i < rows)[:, None])
    tl.store(p_x + x_strides[3], q_high.to(x.dtype.element_ty), mask=(i < rows)[:, None])
# fmt: on


def turn_queries(call: Call, x: Tensor, first_tile: int, turned: bool) -> None:
    """q [B, S, Hq, D] as the scores take them: x [B, tiles, Hq S, 2, D / 2], turned back by each tile's first token."""
    q, keys, (batch, tiles, rows, _, _) = call.q, call.keys, x.shape
    choice = launch.turn_queries(launch.name(q.device), q.itemsize)
    names = "D ROTARY INTERLEAVED TABLE WINDOWED BLOCK_D BLOCK_Q BLOCK_T"
    turn_queries_kernel[cdiv(rows, choice.block_q), tiles if turned else 1, batch](
        q, q.stride(), *call.tokens.seen, keys.turns, x, x.stride(), *call.limits, keys.sizes.max_position,
        first_tile, tiles, rows, **launch.constants(names, call.form, keys.sizes, choice, turned),
    )  # fmt: skip
