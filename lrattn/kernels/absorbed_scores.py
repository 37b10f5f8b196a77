"""Scores of absorbed queries against the latents of plain rows."""

import triton.language as tl
from torch import Tensor

from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch
from lrattn.kernels.arguments import Call, Span, strides_of
from lrattn.kernels.packed import SIZE, load_piece, located, segments
from lrattn.kernels.rows import load_row_queries
from lrattn.kernels.tiles import chunk_of, lag_of, load_latents, load_run, part_of, reach, scaled, seen, slots


# fmt: off
@launch.kernel
def absorbed_scores_kernel(
    a, a_strides,            # [B, chunks, Hq * S, Rk]  absorbed queries, from the chunk of the first tile on
    constant, const_strides, # [B, chunks, 1, Hq * S]   float32, or None without a key bias
    ck, ck_strides,          # [N, P, width]    key rows by page
    pages, pages_stride,     # [B, pages]       int32
    lens, lens_stride,       # [B]              int32, tokens held
    starts, starts_stride,   # [B]              int32, first token attended to, or None
    offsets, offsets_stride, # [B]              int32, token less position, or None
    runs, heads,             # [G, 3], [Hkv]    int32: column, rank, first row of uk; place -> kv head
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
    RESIDENT: ROW is all pieces of a row, and the queries are read once, with CHUNK once a tile; else one of ROW goes
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
    r1 = tl.arange(0, ROW[0][SIZE])
    p_a = a + i_b * a_strides[0] + row * a_strides[2]
    segs = segments(None, g, column, rank, ROW)
    if constant is not None:
        p_constant = constant + i_b * const_strides[0] + row
    if CHUNK:
        _, before = chunk_of(origin, lag, CHUNK)
    else:
        if RESIDENT:
            x = load_row_queries(p_a, segs, in_q, ROW)
        if constant is not None:
            share = tl.load(p_constant, mask=in_q, other=0.0)
    query = tl.where(in_q, i % S, -1)
    p_s = s + i_b * s_strides[0] + row * s_strides[1]

    for t0 in range(t_begin, t_end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        live = (t >= begin) & (t < t_end)
        page, offset = slots(pages + i_b * pages_stride, t0, t, live, P, BLOCK_T, offsets)
        p_ck = located(ck, ck_strides, page, offset, None, g, G, P)
        p_x = p_a
        if CHUNK:
            c = (tl.maximum(before + t0 - origin, 0) // CHUNK).to(tl.int64)
            p_x += c * a_strides[1]
            if RESIDENT:
                x = load_row_queries(p_x, segs, in_q, ROW)
            if constant is not None:
                share = tl.load(p_constant + c * const_strides[1], mask=in_q, other=0.0)
        if RESIDENT:
            score = tl.dot(load_piece(p_ck[0], segs, live, ROW, 0), tl.trans(x[0]), input_precision="ieee")
            for n in tl.static_range(1, len(ROW)):
                z = load_piece(p_ck[0], segs, live, ROW, n)
                score = tl.dot(z, tl.trans(x[n]), score, input_precision="ieee")
        else:
            score = tl.zeros([BLOCK_T, BLOCK_Q], tl.float32)
            for r in range(0, rank, ROW[0][SIZE]):
                z = load_latents(p_ck[0], column, rank, live, r + r1)
                score = tl.dot(z, tl.trans(load_latents(p_x, 0, rank, in_q, r + r1)), score, input_precision="ieee")
        if constant is not None:
            score += share[None, :]
        score = scaled(score, scale, softcap, CAPPED)
        mask = seen(t, live, query, begin, end, S, window, CAUSAL, WINDOWED)
        score = tl.where(mask, score, float("-inf"))
        tl.store(p_s[None, :] + tl.multiple_of(t - origin, BLOCK_T)[:, None], score, mask=in_q[None, :])
# fmt: on


def absorbed_scores(call: Call, a: Tensor, constant: Tensor | None, s: Tensor, span: Span) -> None:
    """Scores of absorbed queries against the tiles of `span` of each sequence, to s [B, Hq S, T]."""
    ck, keys, tokens, size = call.ck, call.keys, call.tokens, call.keys.sizes
    rows, names = a.shape[2] // size.groups, "C M P Hkv CHUNK CAUSAL WINDOWED CAPPED RESIDENT BLOCK_Q BLOCK_T"
    choice = launch.absorbed_scores(
        launch.name(a.device), a.itemsize, rank=size.rank, rows=rows, chunked=bool(size.chunk)
    )  # fmt: skip
    absorbed_scores_kernel[cdiv(rows, choice.block_q) * size.groups, span.parts, a.shape[0]](
        a, a.stride(), constant, strides_of(constant, 4), ck, ck.stride(), *tokens.paged, *tokens.seen, *tokens.lag,
        keys.runs, keys.heads, s, s.stride(), *call.numbers, *span, ROW=launch.scored(size, choice),
        **launch.constants(names, call.form, size, choice),
    )  # fmt: skip
