"""Attention over rows whose latents queries meet, a whole group in a program: softmax and the sum of value latents, or
scores alone. Of keys before RoPE, plain or packed, the fast pairs are rebuilt and turned, the slow ones absorbed by
block. The kernel to read first."""

import triton
import triton.language as tl
from torch import Tensor

from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch
from lrattn.kernels.arguments import Call, Span, stride, strides_of
from lrattn.kernels.packed import segments
from lrattn.kernels.pieces import next_power_of_2, pieces, strides
from lrattn.kernels.plan import Way
from lrattn.kernels.rows import (
    add_repeated,
    columns_within,
    load_keys,
    load_row_basis,
    load_tile,
    product,
    repeated,
    row_zeros,
    store_row,
    tile_rows,
    unpack,
)
from lrattn.kernels.scores import fast_scores, load_absorbed, load_fast, load_terms, streamed
from lrattn.kernels.tiles import (
    chunk_of,
    lag_of,
    load_run,
    load_turns,
    part_of,
    reach,
    scaled,
    seen,
    softmax_step,
    store_lse,
    tile_pages,
)


# fmt: off
@launch.kernel
def attend_kernel(
    x, x_strides,            # [B, tiles, owners, rows, F]  fast pairs of queries, from the first tile's block on; None
    a, a_strides,            # [B, blocks, owners, rows * T, LONG]  queries, or their slow pairs, in the latents' space
    terms, terms_strides,    # [B, blocks, owners, rows * T]        float32, the bias' share of these, or None
    ck, ck_stride,           # [N, P, width]    key rows by page
    cv, cv_stride,           # [N, P, width]    value rows by page, plain, for VALUES; None: a row serves both
    pages, pages_stride,     # [B, pages]       int32
    lens, lens_stride,       # [B]              int32, tokens held
    starts, starts_stride,   # [B]              int32, first token attended to, or None
    offsets, offsets_stride, # [B]              int32, token less position, or None
    uk,                      # [sum Rk, C * D]  key basis, pairs adjacent
    key_runs, value_runs,    # [G, 3]           int32: column, rank, first row of the basis
    heads,                   # [Hkv]            int32, place -> kv head
    packs,                   # [G, 3 n]         int32: segments of packed key rows; None where they are plain
    bias,                    # [Hkv, D]         float32 by place, pairs adjacent; None without
    turns,                   # [BLOCK, ROTARY]  float32, cos and sin of a pair adjacent, of offsets
    functions,               # [BLOCK, T]       of the band, float16, or float32 in a layer of float32; None without
    s, s_strides,            # [B, Hq * S, T]   out without VALUES, float32, T tokens of the tiles; -inf where not seen
    y, y_strides,            # [B, slots, Hq * S, Rv]  out, float32; rows whose lse is -inf are not written
    lse, lse_strides,        # [B, slots, Hq * S]      out, float32, natural log
    scale, softcap, bound, S, window, first_tile, tiles, splits,
    C: tl.constexpr, M: tl.constexpr, D: tl.constexpr, P: tl.constexpr, Hkv: tl.constexpr, ROTARY: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, PADDED: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_H: tl.constexpr, FAST: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
    BY_LANE: tl.constexpr, KEYS: tl.constexpr, LONG: tl.constexpr, STREAMED: tl.constexpr, VALUES: tl.constexpr,
    KEY_TOKEN: tl.constexpr, KEY_WORDS: tl.constexpr, VALUE_TOKEN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, WARPS: tl.constexpr, CHAINED: tl.constexpr,
):
    """y[b, i, w] = softmax_t(s[b, w, t]) @ cv[b, t, g],   t in split i
    s[b, w, t] = softcap(scale * (sum_fast x[w] . Rot(t - t0) k_t + sum_p functions[t - b0, p] (ck[b, t, g] . a[w, p])))

    k = ck @ uk + bias; t0 and b0 are the first tokens of t's tile and block. FAST are the pieces of a head's first
    dimensions, whose pairs are fast. Queries that are absorbed whole, once a chunk of positions, have none, one term,
    and no functions: s[b, w, t] = softcap(scale * (ck[b, t, g] . a[w] + terms[w])); with BLOCK 0 there is one chunk.

    Grid: (row blocks * owners, splits, B). A program, an owner, has HEADS kv heads of one group, BLOCK_Q of their HEADS
    M S query rows and one of `splits` equal parts of the sequence's tiles. Keys are loaded a tile ahead, packed ones
    unpacked once for all heads of the program. KEYS and VALUES are the pieces of a row; without VALUES scores are
    written. Without cv values are columns of the keys' row, which is loaded once; queries are zero past the key rank.
    STREAMED: KEYS is one piece, to go along the row. KEY_TOKEN, VALUE_TOKEN: from a token to the next in a page;
    KEY_WORDS: of its scales.
    BY_LANE, one query row a head: products of keys and queries are sums where the keys lie, in float32, of pairs 4 i +
    lane; x has them by lane. Else turned keys are rounded and meet all rows, of which each keeps its own head's.
    PADDED: some of an owner's rows are none. MASKED: not every row sees every token in reach.
    Needs: P a multiple of 16; BLOCK a multiple of BLOCK_T; with VALUES, groups of keys and of values that hold the same
    heads. Online softmax, sums are float32.
    Reference: lrattn.attention.reference._attend_span. Derivation: docs/kernels.md#banded, #absorbed-scores, #fused.
    """
    OWNERS: tl.constexpr = Hkv // HEADS
    WIDE: tl.constexpr = dims(FAST)
    owner = tl.program_id(0) % OWNERS
    g = owner * HEADS // C
    i_s = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    first_row = tl.program_id(0) // OWNERS * BLOCK_Q
    i = first_row + tl.arange(0, BLOCK_Q)  # row of the owner: c (M S) + m S + s
    in_q = i < HEADS * M * S
    begin, end = reach(lens, lens_stride, starts, starts_stride, i_b, bound, S, window, WINDOWED)
    lag, shift = lag_of(offsets, offsets_stride, i_b, BLOCK_T)
    origin, t_begin, t_end = part_of(begin, end, first_tile, tiles, tl.program_id(1), splits, BLOCK_T, shift)
    head = tl.load(heads + owner * HEADS + tl.where(in_q, i // (M * S), 0))
    row = (head * M * S + i % (M * S)).to(tl.int64)
    if len(VALUES) > 0:
        p_lse = lse + i_b * lse_strides[0] + i_s * lse_strides[1] + row
    else:
        p_s = s + i_b * s_strides[0] + row * s_strides[1]
    if t_begin >= t_end or t_end <= begin:
        if CHAINED:
            tl.extra.cuda.gdc_wait()
        if len(VALUES) > 0:
            tl.store(p_lse, tl.full([BLOCK_Q], float("-inf"), tl.float32), mask=in_q)
        return

    key_column, key_rank, r0 = load_run(key_runs, g)
    row_rank = key_rank
    if len(VALUES) > 0:
        value_column, value_rank, _ = load_run(value_runs, g)
        value_columns = columns_within(value_column, value_rank, VALUES)
        if cv is None:
            row_rank = value_rank  # all of a shared row: its values begin as the keys do
        peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_T, BLOCK_Q] if BY_LANE else [BLOCK_Q], tl.float32)  # by lane each sums its own
        acc = row_zeros(max(BLOCK_Q, 16), VALUES)
    key_columns = columns_within(key_column, row_rank, KEYS)
    segs = segments(packs, g, key_column, key_rank, KEYS)
    pages += i_b * pages_stride
    place = tl.minimum(owner * HEADS % C + tl.arange(0, BLOCK_H), C - 1)  # in its group
    u, table = (), ()
    d = 0
    for n in tl.static_range(len(FAST)):
        columns = tl.reshape(place[:, None] * D + d + tl.arange(0, FAST[n])[None, :], [BLOCK_H * FAST[n]])
        u = u + (load_row_basis(uk, C * D, r0, segs, 0, columns, C * D, KEYS, a),)  # type: ignore[assignment]
        table = table + (load_turns(turns, tl.arange(0, BLOCK_T), BLOCK_T, d + tl.arange(0, FAST[n]), ROTARY),)  # type: ignore
        d += FAST[n]
    first = origin  # token of the first block
    if BLOCK and offsets is None:
        first = origin // BLOCK * BLOCK
    elif BLOCK:
        _, before = chunk_of(origin, lag, BLOCK)
        first -= before
    if WIDE:
        x += i_b * x_strides[0] + owner * x_strides[2] + first_row * WIDE
    a += i_b * a_strides[0] + owner.to(tl.int64) * a_strides[2] + first_row.to(tl.int64) * (T * LONG)
    if terms is not None:
        terms += i_b * terms_strides[0] + owner * terms_strides[2] + first_row * T
    query = tl.where(in_q, i % S, -1)
    left = None
    if PADDED:
        left = HEADS * M * S - first_row
    last_tile = t_begin + (t_end - 1 - t_begin) // BLOCK_T * BLOCK_T
    page = tile_pages(pages, t_begin, begin, t_end, P, BLOCK_T, offsets)
    SHARED: tl.constexpr = len(VALUES) > 0 and cv is None
    held = load_keys(ck, ck_stride, packs, page, t_begin, key_columns, segs, g, begin, t_end, KEYS, KEY_TOKEN,
                     KEY_WORDS, Hkv // C, P, BLOCK_T, WARPS, SHARED, STREAMED)
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if not (BLOCK or STREAMED):
        slow = load_absorbed(a, left, BLOCK_Q, T, KEYS, LONG, BY_LANE)

    for t0 in tl.range(t_begin, t_end, BLOCK_T, disable_licm=True):
        here, t_next = page, tl.minimum(t0 + BLOCK_T, last_tile)
        page = tile_pages(pages, t_next, begin, t_end, P, BLOCK_T, offsets)
        t = t0 + tl.arange(0, BLOCK_T)
        live = (t >= begin) & (t < t_end)
        p_a, p_terms = a, terms
        if BLOCK:
            if offsets is None:
                block = (t0 // BLOCK - first // BLOCK).to(tl.int64)
            else:
                block = (tl.maximum(t0 - first, 0) // BLOCK).to(tl.int64)
            p_a += block * a_strides[1]
            if terms is not None:
                p_terms += block * terms_strides[1]
        if BLOCK and not STREAMED:
            slow = load_absorbed(p_a, left, BLOCK_Q, T, KEYS, LONG, BY_LANE)
        z = held
        if packs is not None:
            z = unpack(held, KEYS, a)
        if BY_LANE:
            score = tl.zeros([BLOCK_T, BLOCK_H, 4], tl.float32)
        elif WIDE:
            score = tl.zeros([BLOCK_H * BLOCK_T, BLOCK_Q], tl.float32)
        d = 0
        for n in tl.static_range(len(FAST)):
            p_x = x + ((t0 - first) // BLOCK_T).to(tl.int64) * x_strides[1] + d
            fast = load_fast(p_x, left, BLOCK_Q, FAST[n], WIDE, BY_LANE)
            k = product(z, u[n])
            if bias is not None:
                p_bias = bias + (g * C + place)[:, None] * D + d + tl.arange(0, FAST[n])[None, :]
                k += tl.reshape(tl.load(p_bias), [BLOCK_H * FAST[n]])[None, :]
            score = fast_scores(score, k, fast, table[n], BLOCK_H, FAST[n], BLOCK_T, BY_LANE)
            d += FAST[n]
        if STREAMED:
            rows = tile_rows(ck, ck_stride, here, t0, KEY_TOKEN, P, BLOCK_T, BLOCK_T)
            k = streamed(rows, key_column, key_rank, live, p_a, left, BLOCK_Q, KEYS, LONG)
        else:
            k = product(z, slow)
        if terms is not None:
            k += load_terms(p_terms, left, BLOCK_Q, T, BY_LANE)[None, :]
        if functions is not None:
            phi = tl.load(functions + (t0 % BLOCK + tl.arange(0, BLOCK_T))[:, None] * T + tl.arange(0, T)[None, :],
                          eviction_policy="evict_last").to(tl.float32)
        if functions is None:
            score = k
        elif not BY_LANE:
            mine = (tl.arange(0, BLOCK_H)[:, None] == (i // (M * S))[None, :])[:, None, :]
            score = tl.sum(tl.where(mine, tl.reshape(score, [BLOCK_H, BLOCK_T, BLOCK_Q]), 0.0), 0)
            score += tl.sum(tl.reshape(k, [BLOCK_T, T, BLOCK_Q]) * phi[:, :, None], 1)
        elif T % 8 == 0:
            even, odd = tl.split(tl.reshape(k, [BLOCK_T, BLOCK_H, T // 8, 4, 2]))
            phi_even, phi_odd = tl.split(tl.reshape(phi, [BLOCK_T, 1, T // 8, 4, 2]))
            score = tl.sum(score + tl.sum(even * phi_even + odd * phi_odd, 2), 2)
        else:
            score = tl.sum(score, 2) + tl.sum(tl.reshape(k, [BLOCK_T, BLOCK_H, T]) * phi[:, None, :], 2)
        score = scaled(score, scale, softcap, CAPPED)
        if SHARED:
            v = z
        elif len(VALUES) > 0:
            v = load_tile(cv, cv_stride, here, t0, value_columns, VALUE_TOKEN, P, BLOCK_T, WARPS, live)
        held = load_keys(ck, ck_stride, packs, page, t_next, key_columns, segs, g, begin, t_end, KEYS, KEY_TOKEN,
                         KEY_WORDS, Hkv // C, P, BLOCK_T, WARPS, SHARED, STREAMED)
        mask = live[:, None]
        if MASKED:
            mask = seen(t, live, query, begin, end, S, window, CAUSAL, WINDOWED)
        score = tl.where(mask, score, float("-inf"))
        if len(VALUES) == 0:
            tl.store(p_s[None, :] + tl.multiple_of(t - origin, BLOCK_T)[:, None], score, mask=in_q[None, :])
        else:
            p, fade, peak, total = softmax_step(score, peak, total, 0)
            acc = add_repeated(acc, fade, tl.trans(p).to(v[0].dtype), v)

    if len(VALUES) > 0:
        sums = total
        if BY_LANE:
            sums = tl.sum(total, 0)
        store_lse(p_lse, peak, sums, in_q)
        some = sums != 0
        EACH: tl.constexpr = max(16 // BLOCK_Q, 1)
        n = tl.arange(0, EACH * BLOCK_Q)
        i = first_row + n // EACH
        stored = (i < HEADS * M * S) & (n % EACH == 0) & (repeated(some.to(tl.int32)) != 0)
        head = tl.load(heads + owner * HEADS + tl.where(stored, i // (M * S), 0))
        p_y = y + i_b * y_strides[0] + i_s * y_strides[1] + (head * M * S + i % (M * S)).to(tl.int64) * y_strides[2]
        store_row(p_y, acc, repeated(1.0 / tl.where(some, sums, 1.0)), value_rank, stored, VALUES)


@triton.constexpr_function
def dims(fast):
    """Of a head that are rebuilt."""
    return sum(fast)


# fmt: on


def attend(
    call: Call, x: Tensor | None, a: Tensor, terms: Tensor | None, s: Tensor | None, y: Tensor | None,
    lse: Tensor | None, span: Span, way: Way,
) -> None:  # fmt: skip
    """Absorbed queries over the tiles of each split: y [B, slots, Hq S, Rv] and its lse; without y scores, to s
    [B, Hq S, T]."""
    ck, cv, keys, values, tokens = call.ck, call.cv, call.keys, call.values, call.tokens
    key, value, form, choice = keys.sizes, values.sizes, call.form, way.launch
    names = "C M D P Hkv ROTARY CAUSAL WINDOWED CAPPED BLOCK_T"
    owners, (_, row, words) = key.num_heads // way.heads, strides(ck, keys)
    rows = cdiv(a.shape[3], way.rows * way.terms)
    attend_kernel[rows * owners, span.parts, a.shape[0]](
        x, strides_of(x, 5), a, a.stride(), terms, strides_of(terms, 4), ck, stride(ck), cv, stride(cv),
        *tokens.paged, *tokens.seen, *tokens.lag, keys.rows, keys.runs, values.runs, keys.heads, keys.packs, keys.bias,
        keys.offset_turns, keys.functions, s, strides_of(s, 3), y, strides_of(y, 4), lse, strides_of(lse, 3),
        *call.numbers, *span,
        MASKED=(form.causal and form.num_queries > 1) or form.windowed,
        PADDED=rows * way.rows * owners != form.query_heads * form.num_queries, HEADS=way.heads,
        BLOCK_H=next_power_of_2(way.heads), FAST=way.fast, T=way.terms, BLOCK=way.block, BY_LANE=way.by_lane,
        KEYS=way.row, LONG=a.shape[4], STREAMED=way.streamed,
        VALUES=() if y is None else pieces(value, choice.block_r),
        KEY_TOKEN=row, KEY_WORDS=words, VALUE_TOKEN=0 if cv is None else cv.stride(1), BLOCK_Q=way.rows,
        WARPS=choice.warps,
        **launch.constants(names, form, key, choice), **launch.pdl(ck.device),
    )  # fmt: skip
