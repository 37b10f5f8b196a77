"""Keys that need no rotation are never rebuilt: the query is multiplied into the latents' space once a call."""

import torch
import triton.language as tl
from torch import Tensor

from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch
from lrattn.kernels.arguments import Call, Span
from lrattn.kernels.packed import load_tile, segments
from lrattn.kernels.rows import load_row, load_row_queries, product, scores_streamed, transposed
from lrattn.kernels.tiles import load_latents, load_rows, load_run, part_of, reach, scaled, seen, slots


# fmt: off
@launch.kernel
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


@launch.kernel
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
    ROW: tl.constexpr, RESIDENT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """s[b, h S + i, t] = softcap(scale * (ck[b, t, g] . a[b, h S + i] + constant[b, h S + i]))

    Grid: (row blocks * G, parts, B). A program owns BLOCK_Q of the C M S query rows of one group and one of `parts`
    equal parts of the sequence's tiles: with one row block each latent is read once.
    RESIDENT: ROW is all tiles of a row, and the queries are read once; else a tile of ROW goes along each segment.
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
    if packs is None:
        r1 = tl.arange(0, ROW[0][3])
    p_a = a + i_b * a_strides[0] + row * a_strides[1]
    segs = segments(packs, g, column, rank, ROW)
    if RESIDENT:
        x = load_row_queries(p_a, segs, in_q, ROW)
        if packs is not None:
            x = transposed(x)
    if constant is not None:
        shift = tl.load(constant + i_b * Hkv * M * S + row, mask=in_q, other=0.0)
    query = tl.where(in_q, i % S, -1)
    p_s = s + i_b * s_strides[0] + row * s_strides[1]

    for t0 in range(t_begin, t_end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        live = (t >= begin) & (t < t_end)
        page, offset = slots(pages + i_b * pages_stride, t0, t, live, P, BLOCK_T)
        p_ck = ck + page * ck_strides[0] + offset * ck_strides[1]
        if RESIDENT and packs is not None:
            score = product(load_row(p_ck, segs, live, ROW, a), x)
        elif RESIDENT:
            score = tl.dot(load_tile(p_ck, segs, live, None, ROW, 0, a), tl.trans(x[0]), input_precision="ieee")
            for n in tl.static_range(1, len(ROW)):
                z = load_tile(p_ck, segs, live, None, ROW, n, a)
                score = tl.dot(z, tl.trans(x[n]), score, input_precision="ieee")
        elif packs is not None:
            score = scores_streamed(p_ck, segs, live, p_a, in_q, ROW)
        else:  # as scores_streamed but for the order of the loads, which registers depend on
            score = tl.zeros([BLOCK_T, BLOCK_Q], tl.float32)
            for r in range(0, rank, ROW[0][3]):
                z = load_latents(p_ck, column, rank, live, r + r1)
                score = tl.dot(z, tl.trans(load_latents(p_a, 0, rank, in_q, r + r1)), score, input_precision="ieee")
        if constant is not None:
            score += shift[None, :]
        score = scaled(score, scale, softcap, CAPPED)
        mask = seen(t, live, query, begin, end, S, window, CAUSAL, WINDOWED)
        score = tl.where(mask, score, float("-inf"))
        tl.store(p_s[None, :] + (t - origin)[:, None], score, mask=in_q[None, :])
# fmt: on


def absorb_queries(call: Call) -> tuple[Tensor, Tensor | None]:
    """Queries [B, S, Hq, D] -> [B, Hq S, Rk] in the latents' space, and the bias' share of their scores [B, Hq S]."""
    q, keys, size = call.q, call.keys, call.keys.sizes
    batch, num_queries, query_heads, head_dim = q.shape
    a = q.new_empty(batch, query_heads * num_queries, size.rank)
    constant = None if keys.bias is None else q.new_empty(a.shape[:2], dtype=torch.float32)
    choice = launch.absorb_queries(launch.name(q.device), q.itemsize)
    blocks = cdiv(a.shape[1] // size.num_heads, choice.block_q)
    absorb_queries_kernel[blocks * size.num_heads, cdiv(size.rank, choice.block_r), batch](
        q, q.stride(), keys.rows, keys.runs, keys.heads, keys.bias, a, a.stride(), constant, num_queries,
        C=size.group_size, M=query_heads // size.num_heads, D=head_dim, Hkv=size.num_heads,
        BLOCK_D=launch.block_d(head_dim), BLOCK_Q=choice.block_q, BLOCK_R=choice.block_r,
        num_warps=choice.warps, num_stages=choice.stages,
    )  # fmt: skip
    return a, constant


def absorbed_scores(call: Call, a: Tensor, constant: Tensor | None, s: Tensor, span: Span) -> None:
    """Scores of absorbed queries against the tiles of `span` of each sequence, to s [B, Hq S, T]."""
    q, ck, _, keys, _, tokens, rule = call
    size = keys.sizes
    rows = a.shape[1] // size.groups
    choice = launch.absorbed_scores(
        launch.name(a.device), a.itemsize, rank=launch.columns(size), rows=rows, packed=bool(size.packed)
    )
    absorbed_scores_kernel[cdiv(rows, choice.block_q) * size.groups, span.parts, a.shape[0]](
        a, a.stride(), constant, ck, ck.stride(), *tokens.held, keys.runs, keys.heads, keys.packs, s, s.stride(),
        *call.numbers, *span, C=size.group_size, M=q.shape[2] // size.num_heads, P=ck.shape[1], Hkv=size.num_heads,
        CAUSAL=rule.causal, WINDOWED=rule.window > 0, CAPPED=rule.softcap > 0, ROW=launch.scored(size, choice),
        RESIDENT=choice.resident, BLOCK_Q=choice.block_q, BLOCK_T=launch.BLOCK_T,
        num_warps=choice.warps, num_stages=choice.stages,
    )  # fmt: skip
