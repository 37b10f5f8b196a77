"""Keys that need no rotation of their own are never rebuilt: queries are multiplied into the latents' space, once a
call, or once for each chunk of positions, by whose first one they are turned back.
"""

import triton.language as tl
from torch import Tensor

from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch
from lrattn.kernels.arguments import Call, Span
from lrattn.kernels.packed import load_tile, segments
from lrattn.kernels.rows import load_row, load_row_queries, product, scores_streamed, transposed
from lrattn.kernels.tiles import (
    chunk_of,
    lag_of,
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
@launch.kernel
def absorb_queries_kernel(
    q, q_strides,            # [B, S, Hq, D]    query, model order
    lens, lens_stride,       # [B]              int32, tokens held
    starts, starts_stride,   # [B]              int32, first token attended to, or None
    offsets, offsets_stride, # [B]              int32, token less position, or None
    turns,                   # [max_chunk, ROTARY]  float32, cos and sin of a pair adjacent, of chunks' first positions
    uk,                      # [sum Rk, C * D]  key basis; pairs adjacent with CHUNK
    runs, heads,             # [G, 3], [Hkv]    int32: column, rank, first row of uk; place -> kv head
    bias,                    # [Hkv, D]         float32, by place, as uk; None without
    a, a_strides,            # [B, chunks, Hq * S, Rk]  out, dtype of q; chunks of tokens only
    constant, const_strides, # [B, chunks, Hq * S]      out, float32: the bias' share of each row's scores
    bound, S, window, max_chunk, first_tile, tiles,
    C: tl.constexpr, M: tl.constexpr, D: tl.constexpr, Hkv: tl.constexpr,
    CHUNK: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, WINDOWED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """a[b, c, h S + i] = x @ uk[k]^T,   constant[b, c, h S + i] = x . bias[k],   x = Rot(-p) q[b, i, h],   k = h // M

    p is the first position of the c-th chunk, counted from that of the first of the tiles. Without CHUNK there is one,
    and x = q.

    Grid: (row blocks * Hkv, rank blocks, B). A program owns BLOCK_Q rows of one kv head, of all chunks, and BLOCK_R
    latents: the basis is read once per row block.
    Needs: BLOCK_D a power of two >= 32 and >= D. Sums are float32.
    Reference: lrattn.attention.reference._absorbed_scores. Derivation: docs/kernels.md#absorbed-scores.
    """
    place = tl.program_id(0) % Hkv
    i_b = tl.program_id(2).to(tl.int64)
    n = tl.program_id(0) // Hkv * BLOCK_Q + tl.arange(0, BLOCK_Q)  # row of the kv head: c (M S) + m S + s
    d = tl.arange(0, BLOCK_D)
    i, rows = n, M * S
    if CHUNK:
        lag, shift = lag_of(offsets, offsets_stride, i_b, BLOCK_T)
        begin, end = reach(lens, lens_stride, starts, starts_stride, i_b, bound, S, window, WINDOWED)
        origin, _, t_end = part_of(begin, end, first_tile, tiles, 0, 1, BLOCK_T, shift)
        first, before = chunk_of(origin, lag, CHUNK)
        rows *= tl.where(t_end > origin, tl.maximum(before + t_end - 1 - origin, 0) // CHUNK + 1, 0)
        if tl.program_id(0) // Hkv * BLOCK_Q >= rows:
            return
        i = n % (M * S)
    in_q = n < rows
    head = tl.load(heads + place)
    _, rank, r0 = load_run(runs, place // C)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    s, h = (i % S).to(tl.int64), (head * M + i // S).to(tl.int64)
    p_q = q + i_b * q_strides[0] + s * q_strides[1] + h * q_strides[2]
    row = (head * M * S + i).to(tl.int64)
    p_a = a + i_b * a_strides[0] + row * a_strides[2]
    if CHUNK:
        c = n // (M * S)
        p_a += c.to(tl.int64) * a_strides[1]
        low, high = pair_columns(tl.arange(0, BLOCK_D // 2), ROTARY, INTERLEAVED)
        x_low = tl.load(p_q[:, None] + low[None, :], mask=in_q[:, None] & (low < D)[None, :], other=0.0)
        x_high = tl.load(p_q[:, None] + high[None, :], mask=in_q[:, None] & (high < D)[None, :], other=0.0)
        cos, sin = load_turns(turns, first + c, max_chunk, d, ROTARY)
        x = tl.join(x_low * cos + x_high * sin, x_high * cos - x_low * sin)
        x = tl.reshape(x, [BLOCK_Q, BLOCK_D])
    else:
        x = tl.load(p_q[:, None] + d[None, :], mask=in_q[:, None] & (d < D)[None, :], other=0.0)
    if bias is not None:
        if tl.program_id(1) == 0:
            share = tl.sum(x * tl.load(bias + place * D + d, mask=d < D, other=0.0)[None, :], 1)
            p_constant = constant + i_b * const_strides[0] + row
            if CHUNK:
                p_constant += c.to(tl.int64) * const_strides[1]
            tl.store(p_constant, share, mask=in_q)
    u = load_rows(uk, C * D, r0, rank, place % C * D, d, D, r).to(q.dtype.element_ty)
    got = tl.dot(x.to(q.dtype.element_ty), tl.trans(u), input_precision="ieee")
    tl.store(p_a[:, None] + r[None, :], got.to(a.dtype.element_ty), mask=in_q[:, None] & (r < rank)[None, :])


@launch.kernel
def absorbed_scores_kernel(
    a, a_strides,            # [B, chunks, Hq * S, Rk]  absorbed queries, from the chunk of the first tile on
    constant, const_strides, # [B, chunks, Hq * S]      float32, or None without a key bias
    ck, ck_strides,          # [N, P, width]    key rows by page
    pages, pages_stride,     # [B, pages]       int32
    lens, lens_stride,       # [B]              int32, tokens held
    starts, starts_stride,   # [B]              int32, first token attended to, or None
    offsets, offsets_stride, # [B]              int32, token less position, or None
    runs, heads,             # [G, 3], [Hkv]    int32: column, rank, first row of uk; place -> kv head
    packs,                   # [G, 4 n]         int32: segments of packed rows; None where they are plain
    s, s_strides,            # [B, Hq * S, T]   out, float32, T tokens of the tiles; -inf where not seen
    scale, softcap, bound, S, window, first_tile, tiles, parts,
    C: tl.constexpr, M: tl.constexpr, P: tl.constexpr, Hkv: tl.constexpr, CHUNK: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    ROW: tl.constexpr, RESIDENT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """s[b, h S + i, t] = softcap(scale * (ck[b, t, g] . a[b, c, h S + i] + constant[b, c, h S + i])),   t in chunk c

    Without CHUNK all tokens are in one. With it a tile's absorbed queries are read with the tile, which lies in one.

    Grid: (row blocks * G, parts, B). A program owns BLOCK_Q of the C M S query rows of one group and one of `parts`
    equal parts of the sequence's tiles: with one row block each latent is read once.
    RESIDENT: ROW is all tiles of a row, and the queries are read once, with CHUNK once a tile; else a tile of ROW goes
    along each segment.
    Needs: P a multiple of 16. Sums are float32.
    Reference: lrattn.attention.reference._absorbed_scores. Derivation: docs/kernels.md#absorbed-scores.
    """
    G: tl.constexpr = Hkv // C
    g = tl.program_id(0) % G
    i_b = tl.program_id(2).to(tl.int64)
    begin, end = reach(lens, lens_stride, starts, starts_stride, i_b, bound, S, window, WINDOWED)
    lag, shift = lag_of(offsets, offsets_stride, i_b, BLOCK_T)
    origin, t_begin, t_end = part_of(begin, end, first_tile, tiles, tl.program_id(1), parts, BLOCK_T, shift)
    if t_begin >= t_end:
        return

    column, rank, _ = load_run(runs, g)
    i = tl.program_id(0) // G * BLOCK_Q + tl.arange(0, BLOCK_Q)  # row of the group: c (M S) + m S + s
    in_q = i < C * M * S
    head = tl.load(heads + g * C + i // (M * S), mask=in_q, other=0)
    row = (head * M * S + i % (M * S)).to(tl.int64)
    if packs is None:
        r1 = tl.arange(0, ROW[0][3])
    p_a = a + i_b * a_strides[0] + row * a_strides[2]
    segs = segments(packs, g, column, rank, ROW)
    if constant is not None:
        p_constant = constant + i_b * const_strides[0] + row
    if CHUNK:
        _, before = chunk_of(origin, lag, CHUNK)
    else:
        if RESIDENT:
            x = load_row_queries(p_a, segs, in_q, ROW)
            if packs is not None:
                x = transposed(x)
        if constant is not None:
            share = tl.load(p_constant, mask=in_q, other=0.0)
    query = tl.where(in_q, i % S, -1)
    p_s = s + i_b * s_strides[0] + row * s_strides[1]

    for t0 in range(t_begin, t_end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        live = (t >= begin) & (t < t_end)
        page, offset = slots(pages + i_b * pages_stride, t0, t, live, P, BLOCK_T, offsets)
        p_ck = ck + page * ck_strides[0] + offset * ck_strides[1]
        p_x = p_a
        if CHUNK:
            c = (tl.maximum(before + t0 - origin, 0) // CHUNK).to(tl.int64)
            p_x += c * a_strides[1]
            if RESIDENT:
                x = load_row_queries(p_x, segs, in_q, ROW)
                if packs is not None:
                    x = transposed(x)
            if constant is not None:
                share = tl.load(p_constant + c * const_strides[1], mask=in_q, other=0.0)
        if RESIDENT and packs is not None:
            score = product(load_row(p_ck, segs, live, ROW, a), x)
        elif RESIDENT:
            score = tl.dot(load_tile(p_ck, segs, live, None, ROW, 0, a), tl.trans(x[0]), input_precision="ieee")
            for n in tl.static_range(1, len(ROW)):
                z = load_tile(p_ck, segs, live, None, ROW, n, a)
                score = tl.dot(z, tl.trans(x[n]), score, input_precision="ieee")
        elif packs is not None:
            score = scores_streamed(p_ck, segs, live, p_x, in_q, ROW)
        else:  # as scores_streamed but for the order of the loads, which registers depend on
            score = tl.zeros([BLOCK_T, BLOCK_Q], tl.float32)
            for r in range(0, rank, ROW[0][3]):
                z = load_latents(p_ck, column, rank, live, r + r1)
                score = tl.dot(z, tl.trans(load_latents(p_x, 0, rank, in_q, r + r1)), score, input_precision="ieee")
        if constant is not None:
            score += share[None, :]
        score = scaled(score, scale, softcap, CAPPED)
        mask = seen(t, live, query, begin, end, S, window, CAUSAL, WINDOWED)
        score = tl.where(mask, score, float("-inf"))
        tl.store(p_s[None, :] + tl.multiple_of(t - origin, BLOCK_T)[:, None], score, mask=in_q[None, :])
# fmt: on


def absorb_queries(call: Call, a: Tensor, constant: Tensor | None, span: Span) -> None:
    """Queries [B, S, Hq, D] in the latents' space, to a [B, chunks, Hq S, Rk], and the bias' share of their scores, to
    constant [B, chunks, Hq S], for each chunk that tiles of `span` are in; one where keys have no chunks."""
    q, keys, tokens, rule = call.q, call.keys, call.tokens, call.rule
    size, (batch, chunks, rows, _) = keys.sizes, a.shape
    rows = chunks * rows // size.num_heads
    choice = launch.absorb_queries(launch.name(q.device), q.itemsize, chunked=bool(size.chunk))
    absorb_queries_kernel[cdiv(rows, choice.block_q) * size.num_heads, cdiv(size.rank, choice.block_r), batch](
        q, q.stride(), *tokens.held[2:], *tokens.lag, keys.turns, keys.rows, keys.runs, keys.heads, keys.bias,
        a, a.stride(), constant, strides(constant), *call.numbers[2:], size.max_position, span.first_tile, span.tiles,
        C=size.group_size, M=q.shape[2] // size.num_heads, D=size.head_dim, Hkv=size.num_heads,
        CHUNK=size.chunk, ROTARY=size.rotary_dim, INTERLEAVED=bool(size.interleaved), WINDOWED=rule.window > 0,
        BLOCK_D=launch.block_d(size.head_dim), BLOCK_Q=choice.block_q, BLOCK_R=choice.block_r, BLOCK_T=launch.BLOCK_T,
        num_warps=choice.warps, num_stages=choice.stages,
    )  # fmt: skip


def absorbed_scores(call: Call, a: Tensor, constant: Tensor | None, s: Tensor, span: Span) -> None:
    """Scores of absorbed queries against the tiles of `span` of each sequence, to s [B, Hq S, T]."""
    q, ck, _, keys, _, tokens, rule = call
    size = keys.sizes
    rows = a.shape[2] // size.groups
    choice = launch.absorbed_scores(
        launch.name(a.device), a.itemsize, rank=launch.columns(size), rows=rows, packed=bool(size.packed),
        chunked=bool(size.chunk),
    )  # fmt: skip
    absorbed_scores_kernel[cdiv(rows, choice.block_q) * size.groups, span.parts, a.shape[0]](
        a, a.stride(), constant, strides(constant), ck, ck.stride(), *tokens.held, *tokens.lag,
        keys.runs, keys.heads, keys.packs, s, s.stride(), *call.numbers, *span,
        C=size.group_size, M=q.shape[2] // size.num_heads, P=ck.shape[1], Hkv=size.num_heads, CHUNK=size.chunk,
        CAUSAL=rule.causal, WINDOWED=rule.window > 0, CAPPED=rule.softcap > 0, ROW=launch.scored(size, choice),
        RESIDENT=choice.resident, BLOCK_Q=choice.block_q, BLOCK_T=launch.BLOCK_T,
        num_warps=choice.warps, num_stages=choice.stages,
    )  # fmt: skip


def strides(constant: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if constant is None else constant.stride()
