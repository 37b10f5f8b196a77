"""One pass over the latents where keys need no rotation: scores, softmax and the sum of value latents."""

import triton.language as tl
from torch import Tensor

from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch
from lrattn.kernels.arguments import Call, Span, strides_of
from lrattn.kernels.packed import located, segments
from lrattn.kernels.pieces import pieces
from lrattn.kernels.rows import add_weighted, load_row, load_row_queries, product, row_zeros, store_row, transposed
from lrattn.kernels.tiles import (
    chunk_of,
    lag_of,
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
def fused_absorbed_kernel(
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
    y, y_strides,            # [B, slots, Hq * S, Rv]  out, float32; rows whose lse is -inf are not written
    lse, lse_strides,        # [B, slots, Hq * S]      out, float32, natural log
    scale, softcap, bound, S, window, first_tile, tiles, splits,
    C: tl.constexpr, M: tl.constexpr, P: tl.constexpr, Hkv: tl.constexpr, CHUNK: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """y[b, i, h S + j] = softmax_t(softcap(scale * (ck[b, t, g] . a[b, c, h S + j] + constant))) @ cv[b, t, g]

    with t in split i and chunk c. Without CHUNK all tokens are in one; with it a tile's absorbed queries are read with
    the tile, which lies in one. KEYS and VALUES are the pieces of a rank. Without cv they are the same columns of one
    row, which is loaded once; absorbed queries are zero past the key rank.

    Grid: (row blocks * G, splits, B). A program owns BLOCK_Q of the C M S query rows of one group and one split:
    with one row block each latent is read once.
    Needs: P a multiple of 16; groups of keys and of values hold the same heads. Online softmax, sums are float32.
    Reference: lrattn.attention.reference._attend_span. Derivation: docs/kernels.md#fused.
    """
    G: tl.constexpr = Hkv // C
    g = tl.program_id(0) % G
    i_s = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) // G * BLOCK_Q + tl.arange(0, BLOCK_Q)  # row of the group: c (M S) + m S + s
    in_q = i < C * M * S
    head = tl.load(heads + g * C + i // (M * S), mask=in_q, other=0)
    row = (head * M * S + i % (M * S)).to(tl.int64)
    p_lse = lse + i_b * lse_strides[0] + i_s * lse_strides[1] + row
    begin, end = reach(lens, lens_stride, starts, starts_stride, i_b, bound, S, window, WINDOWED)
    lag, shift = lag_of(offsets, offsets_stride, i_b, BLOCK_T)
    origin, t_begin, t_end = part_of(begin, end, first_tile, tiles, tl.program_id(1), splits, BLOCK_T, shift)
    if t_begin >= t_end:
        tl.store(p_lse, tl.full([BLOCK_Q], float("-inf"), tl.float32), mask=in_q)
        return

    key_column, key_rank, _ = load_run(key_runs, g)
    value_column, value_rank, _ = load_run(value_runs, g)
    row_rank = key_rank if cv is not None else value_rank  # all of a shared row: its values begin as the keys do
    key_segs = segments(None, g, key_column, row_rank, KEYS)
    value_segs = segments(None, g, value_column, value_rank, VALUES)
    query_segs = segments(None, g, key_column, key_rank, KEYS)
    p_a = a + i_b * a_strides[0] + row * a_strides[2]
    if constant is not None:
        p_constant = constant + i_b * const_strides[0] + row
    if CHUNK:
        _, before = chunk_of(origin, lag, CHUNK)
    else:
        x = transposed(load_row_queries(p_a, query_segs, in_q, KEYS))
        if constant is not None:
            share = tl.load(p_constant, mask=in_q, other=0.0)
    query = tl.where(in_q, i % S, -1)
    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = row_zeros(BLOCK_Q, VALUES)
    for t0 in range(t_begin, t_end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        live = (t >= begin) & (t < t_end)
        page, offset = slots(pages + i_b * pages_stride, t0, t, live, P, BLOCK_T, offsets)
        p_ck = located(ck, ck_strides, page, offset, None, g, G, P)
        if CHUNK:
            c = (tl.maximum(before + t0 - origin, 0) // CHUNK).to(tl.int64)
            x = transposed(load_row_queries(p_a + c * a_strides[1], query_segs, in_q, KEYS))
            if constant is not None:
                share = tl.load(p_constant + c * const_strides[1], mask=in_q, other=0.0)
        z = load_row(p_ck, key_segs, live, KEYS, a)
        score = product(z, x)
        if constant is not None:
            score += share[None, :]
        score = scaled(score, scale, softcap, CAPPED)
        mask = seen(t, live, query, begin, end, S, window, CAUSAL, WINDOWED)
        score = tl.where(mask, score, float("-inf"))
        p, fade, peak, total = softmax_step(score, peak, total, 0)
        p = tl.trans(p).to(a.dtype.element_ty)
        if cv is not None:
            p_cv = located(cv, cv_strides, page, offset, None, g, G, P)
            z = load_row(p_cv, value_segs, live, VALUES, a)
        acc = add_weighted(acc, fade, p, z)

    store_lse(p_lse, peak, total, in_q)
    some = total != 0
    p_y = y + i_b * y_strides[0] + i_s * y_strides[1] + row * y_strides[2]
    store_row(p_y, acc, 1.0 / tl.where(some, total, 1.0), value_rank, in_q & some, VALUES)
# fmt: on


def fused_absorbed(
    call: Call, a: Tensor, constant: Tensor | None, y: Tensor, lse: Tensor, span: Span, choice: launch.Launch
) -> None:
    """Absorbed queries a [B, chunks, Hq S, Rk] over the tiles of each split: y [B, slots, Hq S, Rv] and its lse."""
    ck, cv, keys, values, tokens = call.ck, call.cv, call.keys, call.values, call.tokens
    key, value, names = keys.sizes, values.sizes, "C M P Hkv CHUNK CAUSAL WINDOWED CAPPED BLOCK_Q BLOCK_T"
    fused_absorbed_kernel[cdiv(a.shape[2] // key.groups, choice.block_q) * key.groups, span.parts, a.shape[0]](
        a, a.stride(), constant, strides_of(constant, 4), ck, ck.stride(), cv, strides_of(cv, 2),
        *tokens.paged, *tokens.seen, *tokens.lag, keys.runs, values.runs, keys.heads, y, y.stride(), lse, lse.stride(),
        *call.numbers, *span, KEYS=pieces(value if cv is None else key, choice.block_r),
        VALUES=pieces(value, choice.block_r), **launch.constants(names, call.form, key, choice),
    )  # fmt: skip
