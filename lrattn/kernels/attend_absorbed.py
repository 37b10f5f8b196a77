"""Attention over plain rows whose latents queries meet: softmax and the sum of value latents, or scores alone."""

import triton.language as tl
from torch import Tensor

from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch
from lrattn.kernels.arguments import Call, Span, strides_of
from lrattn.kernels.packed import SIZE, located, segments
from lrattn.kernels.pieces import Pieces, pieces
from lrattn.kernels.rows import add_weighted, load_row, load_row_queries, product, row_zeros, store_row, transposed
from lrattn.kernels.tiles import (
    chunk_of,
    lag_of,
    load_latents,
    load_run,
    part_of,
    reach,
    scaled,
    seen,
    slots,
    softmax_step,
    store_lse,
)


# fmt: off
@launch.kernel
def attend_absorbed_kernel(
    a, a_strides,            # [B, chunks, Hq * S, Rk]  absorbed queries, from the chunk of the first tile on
    constant, const_strides, # [B, chunks, 1, Hq * S]   float32, or None without a key bias
    ck, ck_strides,          # [N, P, width]    key rows by page
    cv, cv_strides,          # [N, P, width]    value rows by page; None: a row serves both
    pages, pages_stride,     # [B, pages]       int32
    lens, lens_stride,       # [B]              int32, tokens held
    starts, starts_stride,   # [B]              int32, first token attended to, or None
    offsets, offsets_stride, # [B]              int32, token less position, or None
    key_runs, value_runs,    # [G, 3]           int32: column, rank, first row of the basis
    heads,                   # [Hkv]            int32, place -> kv head
    s, s_strides,            # [B, Hq * S, T]   out without VALUES, float32, T tokens of the tiles; -inf where not seen
    y, y_strides,            # [B, slots, Hq * S, Rv]  out, float32; rows whose lse is -inf are not written
    lse, lse_strides,        # [B, slots, Hq * S]      out, float32, natural log
    scale, softcap, bound, S, window, first_tile, tiles, splits,
    C: tl.constexpr, M: tl.constexpr, P: tl.constexpr, Hkv: tl.constexpr, CHUNK: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, RESIDENT: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """y[b, i, h S + j] = softmax_t(s[b, h S + j, t]) @ cv[b, t, g],   t in split i
    s[b, h S + j, t] = softcap(scale * (ck[b, t, g] . a[b, c, h S + j] + constant[b, c, h S + j])),   t in chunk c

    Without CHUNK all tokens are in one chunk; with it a tile's absorbed queries are read with the tile, which lies in
    one. KEYS and VALUES are the pieces of a rank; without VALUES scores are written. Without cv values are columns of
    the keys' row, which is loaded once; absorbed queries are zero past the key rank.

    Grid: (row blocks * G, splits, B). A program owns BLOCK_Q of the C M S query rows of one group and one of `splits`
    equal parts of the sequence's tiles: with one row block each latent is read once.
    RESIDENT: KEYS is all of a row, and queries are read once, with CHUNK once a tile; else one of KEYS goes along it.
    Needs: P a multiple of 16; with VALUES, groups of keys and of values that hold the same heads, and RESIDENT. Online
    softmax, sums are float32.
    Reference: lrattn.attention.reference._attend_span. Derivation: docs/kernels.md#absorbed-scores, #fused.
    """
    G: tl.constexpr = Hkv // C
    g = tl.program_id(0) % G
    i_s = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) // G * BLOCK_Q + tl.arange(0, BLOCK_Q)  # row of the group: c (M S) + m S + s
    in_q = i < C * M * S
    head = tl.load(heads + g * C + i // (M * S), mask=in_q, other=0)
    row = (head * M * S + i % (M * S)).to(tl.int64)
    begin, end = reach(lens, lens_stride, starts, starts_stride, i_b, bound, S, window, WINDOWED)
    lag, shift = lag_of(offsets, offsets_stride, i_b, BLOCK_T)
    origin, t_begin, t_end = part_of(begin, end, first_tile, tiles, tl.program_id(1), splits, BLOCK_T, shift)
    if len(VALUES) > 0:
        p_lse = lse + i_b * lse_strides[0] + i_s * lse_strides[1] + row
    else:
        p_s = s + i_b * s_strides[0] + row * s_strides[1]
    if t_begin >= t_end:
        if len(VALUES) > 0:
            tl.store(p_lse, tl.full([BLOCK_Q], float("-inf"), tl.float32), mask=in_q)
        return

    key_column, key_rank, _ = load_run(key_runs, g)
    row_rank = key_rank
    if len(VALUES) > 0:
        value_column, value_rank, _ = load_run(value_runs, g)
        if cv is None:
            row_rank = value_rank  # all of a shared row: its values begin as the keys do
        value_segs = segments(None, g, value_column, value_rank, VALUES)
        peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        acc = row_zeros(BLOCK_Q, VALUES)
    key_segs = segments(None, g, key_column, row_rank, KEYS)
    query_segs = segments(None, g, key_column, key_rank, KEYS)
    p_a = a + i_b * a_strides[0] + row * a_strides[2]
    if constant is not None:
        p_constant = constant + i_b * const_strides[0] + row
    if CHUNK:
        _, before = chunk_of(origin, lag, CHUNK)
    else:
        if RESIDENT:
            x = transposed(load_row_queries(p_a, query_segs, in_q, KEYS))
        if constant is not None:
            share = tl.load(p_constant, mask=in_q, other=0.0)
    query = tl.where(in_q, i % S, -1)
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
                x = transposed(load_row_queries(p_x, query_segs, in_q, KEYS))
            if constant is not None:
                share = tl.load(p_constant + c * const_strides[1], mask=in_q, other=0.0)
        if RESIDENT:
            z = load_row(p_ck, key_segs, live, KEYS, a)
            score = product(z, x)
        else:
            score = tl.zeros([BLOCK_T, BLOCK_Q], tl.float32)
            for r0 in range(0, key_rank, KEYS[0][SIZE]):
                r = r0 + tl.arange(0, KEYS[0][SIZE])
                z = load_latents(p_ck[0], key_column, key_rank, live, r)
                x = tl.trans(load_latents(p_x, 0, key_rank, in_q, r))
                score = tl.dot(z, x, score, input_precision="ieee")
        if constant is not None:
            score += share[None, :]
        score = scaled(score, scale, softcap, CAPPED)
        mask = seen(t, live, query, begin, end, S, window, CAUSAL, WINDOWED)
        score = tl.where(mask, score, float("-inf"))
        if len(VALUES) == 0:
            tl.store(p_s[None, :] + tl.multiple_of(t - origin, BLOCK_T)[:, None], score, mask=in_q[None, :])
        else:
            p, fade, peak, total = softmax_step(score, peak, total, 0)
            p = tl.trans(p).to(a.dtype.element_ty)
            if cv is not None:
                p_cv = located(cv, cv_strides, page, offset, None, g, G, P)
                z = load_row(p_cv, value_segs, live, VALUES, a)
            acc = add_weighted(acc, fade, p, z)

    if len(VALUES) > 0:
        store_lse(p_lse, peak, total, in_q)
        some = total != 0
        p_y = y + i_b * y_strides[0] + i_s * y_strides[1] + row * y_strides[2]
        store_row(p_y, acc, 1.0 / tl.where(some, total, 1.0), value_rank, in_q & some, VALUES)
# fmt: on


def attend_absorbed(
    call: Call, a: Tensor, constant: Tensor | None, s: Tensor | None, y: Tensor | None, lse: Tensor | None, span: Span,
    choice: launch.Launch | None = None,
) -> None:  # fmt: skip
    """Absorbed queries a [B, chunks, Hq S, Rk] over the tiles of each split: y [B, slots, Hq S, Rv] and its lse, by the
    launch that is given; without y scores, to s [B, Hq S, T]."""
    ck, cv, keys, values, tokens = call.ck, call.cv, call.keys, call.values, call.tokens
    key, value = keys.sizes, values.sizes
    rows, weighted = a.shape[2] // key.groups, Pieces()
    if choice is None:
        device = launch.name(a.device)
        choice = launch.absorbed_scores(device, a.itemsize, rank=key.rank, rows=rows, chunked=bool(key.chunk))
        scored = launch.scored(key, choice)
    else:
        scored, weighted = (pieces(x, choice.block_r) for x in (value if cv is None else key, value))
    names = "C M P Hkv CHUNK CAUSAL WINDOWED CAPPED BLOCK_Q BLOCK_T"
    attend_absorbed_kernel[cdiv(rows, choice.block_q) * key.groups, span.parts, a.shape[0]](
        a, a.stride(), constant, strides_of(constant, 4), ck, ck.stride(), cv, strides_of(cv, 3),
        *tokens.paged, *tokens.seen, *tokens.lag, keys.runs, values.runs, keys.heads, s, strides_of(s, 3),
        y, strides_of(y, 3), lse, strides_of(lse, 3), *call.numbers, *span,
        KEYS=scored, VALUES=weighted, RESIDENT=choice.resident or bool(weighted),
        **launch.constants(names, call.form, key, choice),
    )  # fmt: skip
