"""Scores against rebuilt keys: the kernel to read first."""

import triton.language as tl
from torch import Tensor

from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch
from lrattn.kernels.arguments import Call, Span
from lrattn.kernels.packed import load_piece, located, segments
from lrattn.kernels.pieces import columns, strides
from lrattn.kernels.rows import keys_streamed, load_row, load_row_basis, product
from lrattn.kernels.tiles import load_run, load_turns, pair_columns, part_of, reach, scaled, seen, slots


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
    q_low = tl.load(p_q[:, None] + low[None, :], mask=(i < rows)[:, None] & (low < D)[None, :], other=0.0)
    q_high = tl.load(p_q[:, None] + high[None, :], mask=(i < rows)[:, None] & (high < D)[None, :], other=0.0)
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


@launch.kernel
def latent_scores_kernel(
    x, x_strides,            # [B, tiles, Hq * S, 2, D / 2]  queries by tile, dims of pairs apart, padded with zeros
    ck, ck_strides,          # [N, P, width]    key rows by page
    pages, pages_stride,     # [B, pages]       int32
    lens, lens_stride,       # [B]              int32, tokens held
    starts, starts_stride,   # [B]              int32, first token attended to, or None
    uk,                      # [sum Rk, C * D]  key basis, pairs adjacent
    runs, heads,             # [G, 3], [Hkv]    int32: column, rank, first row of uk; place -> kv head
    packs,                   # [G, 3 n]         int32: segments of packed rows; None where they are plain
    bias,                    # [Hkv, D]         float32 by place, pairs adjacent; None without
    turns,                   # [max_position, ROTARY]  float32, cos and sin of a pair adjacent; offsets' if not TABLE
    positions, pos_strides,  # [N, P]           int32, or None: the index in the sequence
    s, s_strides,            # [B, Hq * S, T]   out, float32, T tokens of the tiles; -inf where not seen
    scale, softcap, bound, S, window, max_position, first_tile, tiles, parts,
    C: tl.constexpr, M: tl.constexpr, D: tl.constexpr, P: tl.constexpr, Hkv: tl.constexpr,
    ROTARY: tl.constexpr, TABLE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    ROW: tl.constexpr, RESIDENT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """s[b, h S + i, t] = softcap(scale * q[b, i, h] . Rot(t) (ck[b, t, g] @ uk[k] + bias[k])),  k = h // M, k in g

    Rot(t) = Rot(t0) Rot(t - t0): the queries come turned back by each tile's first token t0, the keys are turned by
    the offset only, whose table stays on chip. With TABLE every token's own row is read instead.

    Grid: (row blocks * Hkv, parts, B). A program owns BLOCK_Q of the M S query rows of one kv head and one of
    `parts` equal parts of the sequence's tiles; the heads of a group run side by side and meet its latents in L2.
    RESIDENT: ROW is all pieces of a row, a head is BLOCK_D wide, and the basis is read once. Else a piece of ROW goes
    along each segment, BLOCK_D of the head at a time, and both are read again.
    Needs: BLOCK_D a power of two >= 32, P a multiple of 16. Sums are float32.
    Reference: lrattn.attention.reference._scores. Derivation: docs/kernels.md#scores.
    """
    place = tl.program_id(0) % Hkv
    i_b = tl.program_id(2).to(tl.int64)
    begin, end = reach(lens, lens_stride, starts, starts_stride, i_b, bound, S, window, WINDOWED)
    origin, t_begin, t_end = part_of(begin, end, first_tile, tiles, tl.program_id(1), parts, BLOCK_T)
    if t_begin >= t_end:
        return

    column, rank, r0 = load_run(runs, place // C)
    d, j, c = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_D // 2), place % C * D
    segs = segments(packs, place // C, column, rank, ROW)
    if RESIDENT:
        u = load_row_basis(uk, C * D, r0, segs, c, d, D, ROW, x)
    if RESIDENT and not TABLE:
        cos, sin = load_turns(turns, tl.arange(0, BLOCK_T), BLOCK_T, d, ROTARY)
    i = tl.program_id(0) // Hkv * BLOCK_Q + tl.arange(0, BLOCK_Q)  # row m S + s of the kv head
    head = tl.load(heads + place)
    row = (head * M * S + i).to(tl.int64)
    in_q = i < M * S
    query = tl.where(in_q, i % S, -1)
    p_s = s + i_b * s_strides[0] + row * s_strides[1]

    for t0 in range(t_begin, t_end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        live = (t >= begin) & (t < t_end)
        page, offset = slots(pages + i_b * pages_stride, t0, t, live, P, BLOCK_T)
        p_ck = located(ck, ck_strides, page, offset, packs, place // C, Hkv // C, P)
        p_x = x + i_b * x_strides[0] + row[:, None] * x_strides[2] + j[None, :]
        if TABLE:
            at = t
            if positions is not None:
                at = tl.load(positions + page * pos_strides[0] + offset * pos_strides[1], mask=live, other=0)
        else:
            at = tl.arange(0, BLOCK_T)
            p_x += ((t0 - origin) // BLOCK_T).to(tl.int64) * x_strides[1]
        score = tl.zeros([BLOCK_T, BLOCK_Q], tl.float32)
        for d0 in tl.static_range(0, D, BLOCK_D):
            if RESIDENT and packs is not None:
                k = product(load_row(p_ck, segs, live, ROW, x), u)
            elif RESIDENT:
                k = tl.dot(load_piece(p_ck[0], segs, live, ROW, 0), u[0], input_precision="ieee")
                for n in tl.static_range(1, len(ROW)):
                    k = tl.dot(load_piece(p_ck[0], segs, live, ROW, n), u[n], k, input_precision="ieee")
            else:
                k = keys_streamed(p_ck, segs, live, uk, C * D, r0, c, d0 + d, D, ROW, x)
            if bias is not None:
                k += tl.load(bias + place * D + d0 + d, mask=d0 + d < D, other=0.0)[None, :]
            if TABLE:
                cos, sin = load_turns(turns, at, max_position, d0 + d, ROTARY)
            elif not RESIDENT:
                cos, sin = load_turns(turns, at, BLOCK_T, d0 + d, ROTARY)
            k_low, k_high = tl.split(tl.reshape(k, [BLOCK_T, BLOCK_D // 2, 2]))
            turned_low = (k_low * cos - k_high * sin).to(x.dtype.element_ty)
            turned_high = (k_low * sin + k_high * cos).to(x.dtype.element_ty)
            q_low = tl.load(p_x + d0 // 2, mask=in_q[:, None], other=0.0)
            score = tl.dot(turned_low, tl.trans(q_low), score, input_precision="ieee")
            q_high = tl.load(p_x + x_strides[3] + d0 // 2, mask=in_q[:, None], other=0.0)
            score = tl.dot(turned_high, tl.trans(q_high), score, input_precision="ieee")
        score = scaled(score, scale, softcap, CAPPED)
        mask = seen(t, live, query, begin, end, S, window, CAUSAL, WINDOWED)
        score = tl.where(mask, score, float("-inf"))
        tl.store(p_s[None, :] + (t - origin)[:, None], score, mask=in_q[None, :])
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


def latent_scores(call: Call, x: Tensor, s: Tensor, span: Span, turned: bool) -> None:
    """Scores of turned queries against the tiles of `span` of every sequence, to s [B, Hq S, T]."""
    ck, keys, tokens, size = call.ck, call.keys, call.tokens, call.keys.sizes
    rows = x.shape[2] // size.num_heads
    choice = launch.latent_scores(
        launch.name(ck.device), x.itemsize, head=size.head_dim, rank=columns(size), rows=rows, turned=turned,
        packed=bool(size.packed),
    )  # fmt: skip
    names = "C M P Hkv CAUSAL WINDOWED CAPPED D ROTARY TABLE RESIDENT BLOCK_D BLOCK_Q BLOCK_T"
    latent_scores_kernel[cdiv(rows, choice.block_q) * size.num_heads, span.parts, x.shape[0]](
        x, x.stride(), ck, strides(ck, keys), *tokens.paged, *tokens.seen, keys.rows, keys.runs, keys.heads, keys.packs,
        keys.bias, keys.offset_turns if turned else keys.turns, *tokens.placed, s, s.stride(),
        *call.numbers, size.max_position, *span, ROW=launch.scored(size, choice),
        **launch.constants(names, call.form, size, choice, turned),
    )  # fmt: skip
