"""Keys that need no rotation are never rebuilt: the query is multiplied into the latents' space once a call."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrattn.factors.operands import Keys
from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch
from lrattn.kernels.arguments import Rule, Tokens
from lrattn.kernels.packed import load_query_tiles, load_tiles, scores_streamed, segments
from lrattn.kernels.pieces import product
from lrattn.kernels.tiles import (
    LENGTHS,
    SLICED,
    load_latents,
    load_rows,
    load_run,
    part_of,
    reach,
    scaled,
    seen,
    slots,
)


# fmt: off
@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=SLICED)
def absorb_queries_kernel(
    q, q_strides,            # [B, S, Hq, D]    query, model order
    uk,                      # [sum Rk, C * D]  key basis
    runs, heads,             # [G, 3], [Hkv]    int32: column, rank, first row of uk; place -> kv head
    bias,                    # [Hkv, D]         float32, by place; None without
    a, a_strides,            # [B, Hq * S, Rk]  out, dtype of q
    constant,                # [B, Hq * S]      out, float32: the bias' share of each row's scores
    S,
    C: tl.constexpr, M: tl.constexpr, D: tl.constexpr, Hkv: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """a[b, h S + i] = q[b, i, h] @ uk[k]^T,   constant = q[b, i, h] . bias[k],   k = h // M

    Grid: (row blocks * Hkv, rank blocks, B). A program owns BLOCK_Q query rows of one kv head and BLOCK_R latents.
    Needs: BLOCK_D a power of two >= 32 and >= D. Sums are float32.
    Reference: lrattn.attention.reference._absorb. Derivation: docs/kernels.md#absorbed-scores.
    """
    place = tl.program_id(0) % Hkv
    i_b = tl.program_id(2).to(tl.int64)
    head = tl.load(heads + place)
    _, rank, r0 = load_run(runs, place // C)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.arange(0, BLOCK_D)
    i = tl.program_id(0) // Hkv * BLOCK_Q + tl.arange(0, BLOCK_Q)
    in_q = i < M * S
    s, h = (i % S).to(tl.int64), (head * M + i // S).to(tl.int64)
    p_q = q + i_b * q_strides[0] + s * q_strides[1] + h * q_strides[2]
    x = tl.load(p_q[:, None] + d[None, :], mask=in_q[:, None] & (d < D)[None, :], other=0.0)
    row = (head * M * S + i).to(tl.int64)
    if bias is not None:
        if tl.program_id(1) == 0:
            shift = tl.sum(x * tl.load(bias + place * D + d, mask=d < D, other=0.0)[None, :], 1)
            tl.store(constant + i_b * Hkv * M * S + row, shift, mask=in_q)
    u = load_rows(uk, C * D, r0, rank, place % C * D, d, D, r).to(q.dtype.element_ty)
    got = tl.dot(x, tl.trans(u), input_precision="ieee")
    p_a = a + i_b * a_strides[0] + row[:, None] * a_strides[1] + r[None, :]
    tl.store(p_a, got.to(a.dtype.element_ty), mask=in_q[:, None] & (r < rank)[None, :])


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=SLICED)
def absorbed_scores_kernel(
    a, a_strides,            # [B, Hq * S, Rk]  absorbed queries
    constant,                # [B, Hq * S]      float32, or None without a key bias
    ck, ck_strides,          # [N, P, width]    key rows by page
    pages, pages_stride,     # [B, pages]       int32
    lens, lens_stride,       # [B]              int32, tokens held
    starts, starts_stride,   # [B]              int32, first token attended to, or None
    runs, heads,             # [G, 3], [Hkv]    int32: column, rank, first row of uk; place -> kv head
    packs,                   # [G, 4 n]         int32: segments of packed rows; None where they are plain
    s, s_strides,            # [B, Hq * S, T]   out, float32, T tokens of the chunk; -inf where not seen
    scale, softcap, bound, S, window, first_tile, tiles, parts,
    C: tl.constexpr, M: tl.constexpr, P: tl.constexpr, Hkv: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    R1: tl.constexpr, R2: tl.constexpr, ROW: tl.constexpr, RESIDENT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """s[b, h S + i, t] = softcap(scale * (ck[b, t, g] . a[b, h S + i] + constant[b, h S + i]))

    Grid: (row blocks * G, parts, B). A program owns BLOCK_Q of the C M S query rows of one group and one of `parts`
    equal parts of the sequence's tiles: with one row block each latent is read once.
    RESIDENT: a rank is R1 (+ R2) columns, powers of two, and the queries are read once; else R1 columns at a time.
    Packed rows come in tiles, ROW.
    Needs: P a multiple of 16. Sums are float32.
    Reference: lrattn.attention.reference._scores. Derivation: docs/kernels.md#absorbed-scores.
    """
    G: tl.constexpr = Hkv // C
    g = tl.program_id(0) % G
    i_b = tl.program_id(2).to(tl.int64)
    begin, end = reach(lens, lens_stride, starts, starts_stride, i_b, bound, S, window, WINDOWED)
    origin, t_begin, t_end = part_of(begin, end, first_tile, tiles, tl.program_id(1), parts, BLOCK_T)
    if t_begin >= t_end:
        return

    column, rank, _ = load_run(runs, g)
    i = tl.program_id(0) // G * BLOCK_Q + tl.arange(0, BLOCK_Q)  # row of the group: c (M S) + m S + s
    in_q = i < C * M * S
    head = tl.load(heads + g * C + i // (M * S), mask=in_q, other=0)
    row = (head * M * S + i % (M * S)).to(tl.int64)
    r1 = tl.arange(0, R1)
    p_a = a + i_b * a_strides[0] + row * a_strides[1]
    segs = segments(packs, g, rank, ROW)
    if RESIDENT and packs is not None:
        a_tiles = load_query_tiles(p_a, segs, in_q, ROW)
    elif RESIDENT:
        a1 = load_latents(p_a, 0, rank, in_q, r1)
        if R2 > 0:
            r2 = R1 + tl.arange(0, R2)
            a2 = load_latents(p_a, 0, rank, in_q, r2)
    if constant is not None:
        shift = tl.load(constant + i_b * Hkv * M * S + row, mask=in_q, other=0.0)
    query = tl.where(in_q, i % S, -1)
    p_s = s + i_b * s_strides[0] + row * s_strides[1]

    for t0 in range(t_begin, t_end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        live = (t >= begin) & (t < t_end)
        page, offset = slots(pages + i_b * pages_stride, t0, t, live, P, BLOCK_T)
        p_ck = ck + page * ck_strides[0] + offset * ck_strides[1]
        if packs is not None:
            if RESIDENT:
                score = product(load_tiles(p_ck, segs, live, ROW, a), a_tiles)
            else:
                score = scores_streamed(p_ck, segs, live, p_a, in_q, ROW)
        elif RESIDENT:
            score = tl.dot(load_latents(p_ck, column, rank, live, r1), tl.trans(a1), input_precision="ieee")
            if R2 > 0:
                z = load_latents(p_ck, column, rank, live, r2)
                score = tl.dot(z, tl.trans(a2), score, input_precision="ieee")
        else:
            score = tl.zeros([BLOCK_T, BLOCK_Q], tl.float32)
            for r in range(0, rank, R1):
                z = load_latents(p_ck, column, rank, live, r + r1)
                score = tl.dot(z, tl.trans(load_latents(p_a, 0, rank, in_q, r + r1)), score, input_precision="ieee")
        if constant is not None:
            score += shift[None, :]
        score = scaled(score, scale, softcap, CAPPED)
        mask = seen(t, live, query, begin, end, S, window, CAUSAL, WINDOWED)
        score = tl.where(mask, score, float("-inf"))
        tl.store(p_s[None, :] + (t - origin)[:, None], score, mask=in_q[None, :])
# fmt: on


def absorb_queries(q: Tensor, keys: Keys) -> tuple[Tensor, Tensor | None]:
    """Queries [B, S, Hq, D] -> [B, Hq S, Rk] in the latents' space, and the bias' share of their scores [B, Hq S]."""
    batch, num_queries, query_heads, head_dim = q.shape
    heads = keys.sizes.num_heads
    rows = query_heads // heads * num_queries
    a = q.new_empty(batch, query_heads * num_queries, keys.sizes.rank)
    constant = None if keys.bias is None else torch.empty(a.shape[:2], dtype=torch.float32, device=q.device)
    choice = launch.absorb_queries(launch.name(q.device), q.itemsize)
    absorb_queries_kernel[cdiv(rows, choice.block_q) * heads, cdiv(keys.sizes.rank, choice.block_r), batch](
        q, q.stride(), keys.rows, keys.runs, keys.heads, keys.bias, a, a.stride(), constant, num_queries,
        C=keys.sizes.group_size, M=query_heads // heads, D=head_dim, Hkv=heads,
        BLOCK_D=launch.block_d(head_dim), BLOCK_Q=choice.block_q, BLOCK_R=choice.block_r,
        num_warps=choice.warps, num_stages=choice.stages,
    )  # fmt: skip
    return a, constant


def absorbed_scores(
    a: Tensor, constant: Tensor | None, num_queries: int, ck: Tensor, keys: Keys, tokens: Tokens, rule: Rule,
    s: Tensor, first_tile: int, tiles: int, parts: int,
) -> None:  # fmt: skip
    """Scores of absorbed queries against tiles first_tile .. first_tile + tiles of each sequence, to s [B, Hq S, T]."""
    heads = keys.sizes.num_heads
    rows = a.shape[1] // keys.sizes.groups
    rank = launch.columns(keys.sizes.packed, keys.sizes.rank)
    choice = launch.absorbed_scores(rank, rows, a.itemsize, launch.name(a.device), keys.packs is not None)
    r1, r2 = launch.chunks(keys.sizes.rank) if choice.resident else (choice.block_r, 0)
    absorbed_scores_kernel[cdiv(rows, choice.block_q) * keys.sizes.groups, parts, a.shape[0]](
        a, a.stride(), constant, ck, ck.stride(), tokens.pages, tokens.pages.stride(0),
        tokens.lens, tokens.lens.stride(0), tokens.starts, tokens.starts_stride,
        keys.runs, keys.heads, keys.packs, s, s.stride(), rule.scale, rule.softcap, tokens.bound, num_queries,
        rule.window, first_tile, tiles, parts,
        C=keys.sizes.group_size, M=a.shape[1] // (heads * num_queries), P=ck.shape[1], Hkv=heads,
        CAUSAL=rule.causal, WINDOWED=rule.window > 0, CAPPED=rule.softcap > 0,
        R1=r1, R2=r2, ROW=launch.scored(keys.sizes.packed, choice), RESIDENT=choice.resident,
        BLOCK_Q=choice.block_q, BLOCK_T=launch.BLOCK_T,
        num_warps=choice.warps, num_stages=choice.stages,
    )  # fmt: skip
