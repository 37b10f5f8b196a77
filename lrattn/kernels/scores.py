"""Scores against rebuilt keys: the kernel to read first."""

import triton
import triton.language as tl
from torch import Tensor

from lrattn.factors.operands import Keys
from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch
from lrattn.kernels.arguments import Rule, Tokens
from lrattn.kernels.packed import keys_streamed, load_basis_tiles, load_tiles, segments
from lrattn.kernels.pieces import product
from lrattn.kernels.tiles import (
    LENGTHS,
    SLICED,
    load_latents,
    load_rows,
    load_run,
    load_turns,
    pair_columns,
    part_of,
    reach,
    scaled,
    seen,
    slots,
)


# fmt: off
@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=SLICED)
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


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=SLICED)
def latent_scores_kernel(
    x, x_strides,            # [B, tiles, Hq * S, 2, D / 2]  queries by tile, dims of pairs apart, padded with zeros
    ck, ck_strides,          # [N, P, width]    key rows by page
    pages, pages_stride,     # [B, pages]       int32
    lens, lens_stride,       # [B]              int32, tokens held
    starts, starts_stride,   # [B]              int32, first token attended to, or None
    uk,                      # [sum Rk, C * D]  key basis, pairs adjacent
    runs, heads,             # [G, 3], [Hkv]    int32: column, rank, first row of uk; place -> kv head
    packs,                   # [G, 4 n]         int32: segments of packed rows; None where they are plain
    bias,                    # [Hkv, D]         float32 by place, pairs adjacent; None without
    turns,                   # [max_position, ROTARY]  float32, cos and sin of a pair adjacent; offsets' if not TABLE
    positions, pos_strides,  # [N, P]           int32, or None: the index in the sequence
    s, s_strides,            # [B, Hq * S, T]   out, float32, T tokens of the chunk; -inf where not seen
    scale, softcap, bound, S, window, max_position, first_tile, tiles, parts,
    C: tl.constexpr, M: tl.constexpr, D: tl.constexpr, P: tl.constexpr, Hkv: tl.constexpr,
    ROTARY: tl.constexpr, TABLE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    R1: tl.constexpr, R2: tl.constexpr, ROW: tl.constexpr, RESIDENT: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """s[b, h S + i, t] = softcap(scale * q[b, i, h] . Rot(t) (ck[b, t, g] @ uk[k] + bias[k])),  k = h // M, k in g

    Rot(t) = Rot(t0) Rot(t - t0): the queries come turned back by each tile's first token t0, the keys are turned by
    the offset only, whose table stays on chip. With TABLE every token's own row is read instead.

    Grid: (row blocks * Hkv, parts, B). A program owns BLOCK_Q of the M S query rows of one kv head and one of
    `parts` equal parts of the sequence's tiles; the heads of a group run side by side and meet its latents in L2.
    RESIDENT: a rank is R1 (+ R2) columns, powers of two, a head is BLOCK_D wide, and the basis is read once. Else
    R1 columns of latents and BLOCK_D of the head at a time, and both are read again. Packed rows come in tiles, ROW.
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
    d, j, r1 = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_D // 2), tl.arange(0, R1)
    c = place % C * D
    segs = segments(packs, place // C, rank, ROW)
    if RESIDENT and packs is not None:
        u = load_basis_tiles(uk, C * D, r0, segs, c, d, D, ROW, x)
    elif RESIDENT:
        u1 = load_rows(uk, C * D, r0, rank, c, d, D, r1).to(ck.dtype.element_ty)
        if R2 > 0:
            r2 = R1 + tl.arange(0, R2)
            u2 = load_rows(uk, C * D, r0, rank, c, d, D, r2).to(ck.dtype.element_ty)
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
        p_ck = ck + page * ck_strides[0] + offset * ck_strides[1]
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
            if packs is not None:
                if RESIDENT:
                    k = product(load_tiles(p_ck, segs, live, ROW, x), u)
                else:
                    k = keys_streamed(p_ck, segs, live, uk, C * D, r0, c, d0 + d, D, ROW, x)
            elif RESIDENT:
                k = tl.dot(load_latents(p_ck, column, rank, live, r1), u1, input_precision="ieee")
                if R2 > 0:
                    k = tl.dot(load_latents(p_ck, column, rank, live, r2), u2, k, input_precision="ieee")
            else:
                k = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
                for r in range(0, rank, R1):
                    u = load_rows(uk, C * D, r0, rank, c, d0 + d, D, r + r1).to(ck.dtype.element_ty)
                    k = tl.dot(load_latents(p_ck, column, rank, live, r + r1), u, k, input_precision="ieee")
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


def turn_queries(q: Tensor, keys: Keys, tokens: Tokens, rule: Rule, x: Tensor, first_tile: int, turned: bool) -> None:
    """q [B, S, Hq, D] as the scores take them: x [B, tiles, Hq S, 2, D / 2], turned back by each tile's first token."""
    batch, num_queries, query_heads, head_dim = q.shape
    rows, choice = query_heads * num_queries, launch.turn_queries(launch.name(q.device), q.itemsize)
    turn_queries_kernel[cdiv(rows, choice.block_q), x.shape[1] if turned else 1, batch](
        q, q.stride(), tokens.lens, tokens.lens.stride(0), tokens.starts, tokens.starts_stride, keys.turns,
        x, x.stride(), tokens.bound, num_queries, rule.window, keys.sizes.max_position, first_tile, x.shape[1], rows,
        D=head_dim, ROTARY=keys.sizes.rotary_dim, INTERLEAVED=bool(keys.sizes.interleaved), TABLE=not turned,
        WINDOWED=rule.window > 0, BLOCK_D=2 * x.shape[4], BLOCK_Q=choice.block_q, BLOCK_T=launch.BLOCK_T,
        num_warps=choice.warps, num_stages=choice.stages,
    )  # fmt: skip


def latent_scores(
    x: Tensor, num_queries: int, ck: Tensor, keys: Keys, tokens: Tokens, rule: Rule, s: Tensor, first_tile: int,
    tiles: int, parts: int, turned: bool,
) -> None:  # fmt: skip
    """Scores of turned queries against tiles first_tile .. first_tile + tiles of every sequence, to s [B, Hq S, T]."""
    batch, _, all_rows, _, _ = x.shape
    heads, rows = keys.sizes.num_heads, all_rows // keys.sizes.num_heads
    rank = launch.columns(keys.sizes.packed, keys.sizes.rank)
    choice = launch.latent_scores(
        rank, keys.sizes.head_dim, rows, x.itemsize, launch.name(ck.device), turned, keys.packs is not None
    )
    r1, r2 = launch.chunks(keys.sizes.rank) if choice.resident else (choice.block_r, 0)
    turns = keys.offset_turns if turned else keys.turns
    latent_scores_kernel[cdiv(rows, choice.block_q) * heads, parts, batch](
        x, x.stride(), ck, ck.stride(), tokens.pages, tokens.pages.stride(0), tokens.lens, tokens.lens.stride(0),
        tokens.starts, tokens.starts_stride, keys.rows, keys.runs, keys.heads, keys.packs, keys.bias, turns,
        tokens.positions, tokens.positions_strides, s, s.stride(), rule.scale, rule.softcap, tokens.bound,
        num_queries, rule.window, keys.sizes.max_position, first_tile, tiles, parts,
        C=keys.sizes.group_size, M=rows // num_queries, D=keys.sizes.head_dim, P=ck.shape[1], Hkv=heads,
        ROTARY=keys.sizes.rotary_dim, TABLE=not turned,
        CAUSAL=rule.causal, WINDOWED=rule.window > 0, CAPPED=rule.softcap > 0,
        R1=r1, R2=r2, ROW=launch.scored(keys.sizes.packed, choice), RESIDENT=choice.resident,
        BLOCK_D=choice.block_d, BLOCK_Q=choice.block_q, BLOCK_T=launch.BLOCK_T,
        num_warps=choice.warps, num_stages=choice.stages,
    )  # fmt: skip
