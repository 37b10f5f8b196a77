"""Attention over rows of keys before RoPE, plain or packed, a whole group in a program: the fast pairs of a key are
rebuilt and turned, its slow ones absorbed by block; softmax and the sum of value latents, or scores alone."""

import triton
import triton.language as tl
from torch import Tensor

from lrattn.kernels import launch
from lrattn.kernels.arguments import Call, Span, stride, strides_of
from lrattn.kernels.packed import BITS, COLUMN, SIZE, operands, segments
from lrattn.kernels.pieces import next_power_of_2, pieces, strides
from lrattn.kernels.plan import Banded
from lrattn.kernels.rows import (
    columns_within,
    load_codes,
    load_row_basis,
    load_tile,
    product,
    row_zeros,
    store_row,
    tile_located,
    unpack,
)
from lrattn.kernels.tiles import load_run, load_turns, part_of, reach, scaled, seen, store_lse, tile_pages


# fmt: off
@launch.kernel
def attend_kernel(
    x, x_strides,            # [B, tiles, owners, rows, F]  fast pairs of queries, from the first tile's block on
    a, a_strides,            # [B, blocks, owners, rows * T, LONG]  slow pairs in the latents' space
    terms, terms_strides,    # [B, blocks, owners, rows * T]        float32, the bias' share of these, or None
    ck, ck_stride,           # [N, P, width]    key rows by page
    cv, cv_stride,           # [N, P, width]    value rows by page, plain, for VALUES
    pages, pages_stride,     # [B, pages]       int32
    lens, lens_stride,       # [B]              int32, tokens held
    starts, starts_stride,   # [B]              int32, first token attended to, or None
    uk,                      # [sum Rk, C * D]  key basis, pairs adjacent
    key_runs, value_runs,    # [G, 3]           int32: column, rank, first row of the basis
    heads,                   # [Hkv]            int32, place -> kv head
    packs,                   # [G, 3 n]         int32: segments of packed key rows; None where they are plain
    bias,                    # [Hkv, D]         float32 by place, pairs adjacent; None without
    turns,                   # [BLOCK, ROTARY]  float32, cos and sin of a pair adjacent, of offsets
    functions,               # [BLOCK, T]       of the band, float16, or float32 in a layer of float32
    s, s_strides,            # [B, Hq * S, T]   out without VALUES, float32, T tokens of the tiles; -inf where not seen
    y, y_strides,            # [B, slots, Hq * S, Rv]  out, float32; rows whose lse is -inf are not written
    lse, lse_strides,        # [B, slots, Hq * S]      out, float32, natural log
    scale, softcap, bound, S, window, first_tile, tiles, splits,
    C: tl.constexpr, M: tl.constexpr, D: tl.constexpr, P: tl.constexpr, Hkv: tl.constexpr, ROTARY: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, MASKED: tl.constexpr, PADDED: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_H: tl.constexpr, FAST: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
    BY_LANE: tl.constexpr, KEYS: tl.constexpr, LONG: tl.constexpr, VALUES: tl.constexpr,
    KEY_TOKEN: tl.constexpr, KEY_WORDS: tl.constexpr, VALUE_TOKEN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, WARPS: tl.constexpr, CHAINED: tl.constexpr,
):
    """y[b, i, w] = softmax_t(s[b, w, t]) @ cv[b, t, g],   t in split i
    s[b, w, t] = softcap(scale * (sum_fast x[w] . Rot(t - t0) k_t + sum_p functions[t - b0, p] (ck[b, t, g] . a[w, p])))

    k = ck @ uk + bias; t0 and b0 are the first tokens of t's tile and block. FAST are the pieces of a head's first
    dimensions, whose pairs are fast. Packed keys are unpacked once for all heads of the program.

    Grid: (row blocks * owners, splits, B). A program, an owner, has HEADS kv heads of one group, BLOCK_Q of their HEADS
    M S query rows and one of `splits` equal parts of the sequence's tiles. Keys are loaded a tile ahead. KEY_TOKEN,
    VALUE_TOKEN: from a token to the next in a page; KEY_WORDS: of its scales.
    BY_LANE, one query row a head: products of keys and queries are sums where the keys lie, in float32, of pairs 4 i +
    lane; x has them by lane. Else turned keys are rounded and meet all rows, of which each keeps its own head's.
    PADDED: some of an owner's rows are none. MASKED: not every row sees every token in reach.
    Needs: P a multiple of 16; BLOCK a multiple of BLOCK_T; groups of keys and of values that hold the same heads.
    Reference: lrattn.attention.reference._attend_span. Derivation: docs/kernels.md#banded.
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
    origin, t_begin, t_end = part_of(begin, end, first_tile, tiles, tl.program_id(1), splits, BLOCK_T)
    head = tl.load(heads + owner * HEADS + tl.where(in_q, i // (M * S), 0))
    row = (head * M * S + i % (M * S)).to(tl.int64)
    if len(VALUES) > 0:
        p_lse = lse + i_b * lse_strides[0] + i_s * lse_strides[1] + row
    else:
        p_s = s + i_b * s_strides[0] + row * s_strides[1]
    if t_begin >= t_end:
        if CHAINED:
            tl.extra.cuda.gdc_wait()
        if len(VALUES) > 0:
            tl.store(p_lse, tl.full([BLOCK_Q], float("-inf"), tl.float32), mask=in_q)
        return

    key_column, key_rank, r0 = load_run(key_runs, g)
    if len(VALUES) > 0:
        value_column, value_rank, _ = load_run(value_runs, g)
        value_columns = columns_within(value_column, value_rank, VALUES)
        peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_T if BY_LANE else 1, BLOCK_Q], tl.float32)  # by lane each sums its own
        acc = row_zeros(max(BLOCK_Q, 16), VALUES)
    key_columns = columns_within(key_column, key_rank, KEYS)
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
    first_block = origin // BLOCK
    x += i_b * x_strides[0] + owner * x_strides[2] + first_row * WIDE
    a += i_b * a_strides[0] + owner * a_strides[2] + first_row * (T * LONG)
    if terms is not None:
        terms += i_b * terms_strides[0] + owner * terms_strides[2] + first_row * T
    query = tl.where(in_q, i % S, -1)
    left = None
    if PADDED:
        left = HEADS * M * S - first_row
    last_tile = t_begin + (t_end - 1 - t_begin) // BLOCK_T * BLOCK_T
    page = tile_pages(pages, t_begin, begin, t_end, P, BLOCK_T)
    held = load_keys(ck, ck_stride, packs, page, t_begin, key_columns, segs, g, KEYS, KEY_TOKEN, KEY_WORDS, Hkv // C,
                     P, BLOCK_T, WARPS)
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()

    for t0 in tl.range(t_begin, t_end, BLOCK_T, disable_licm=True):
        here, t_next = page, tl.minimum(t0 + BLOCK_T, last_tile)
        page = tile_pages(pages, t_next, begin, t_end, P, BLOCK_T)
        t = t0 + tl.arange(0, BLOCK_T)
        live = (t >= begin) & (t < t_end)
        p_a = a + (t0 // BLOCK - first_block).to(tl.int64) * a_strides[1]
        slow = load_absorbed(p_a, left, BLOCK_Q, T, KEYS, LONG, BY_LANE)
        z = held
        if packs is not None:
            z = unpack(held, KEYS, a)
        if BY_LANE:
            score = tl.zeros([BLOCK_T, BLOCK_H, 4], tl.float32)
        else:
            score = tl.zeros([BLOCK_H * BLOCK_T, BLOCK_Q], tl.float32)
        d = 0
        for n in tl.static_range(len(FAST)):
            p_x = x + ((t0 - first_block * BLOCK) // BLOCK_T).to(tl.int64) * x_strides[1] + d
            fast = load_fast(p_x, left, BLOCK_Q, FAST[n], WIDE, BY_LANE)
            k = product(z, u[n])
            if bias is not None:
                p_bias = bias + (g * C + place)[:, None] * D + d + tl.arange(0, FAST[n])[None, :]
                k += tl.reshape(tl.load(p_bias), [BLOCK_H * FAST[n]])[None, :]
            score = fast_scores(score, k, fast, table[n], BLOCK_H, FAST[n], BLOCK_T, BY_LANE)
            d += FAST[n]
        k = product(z, slow)
        if terms is not None:
            p_terms = terms + (t0 // BLOCK - first_block).to(tl.int64) * terms_strides[1]
            k += tl.load(p_terms + tl.arange(0, T * BLOCK_Q))[None, :]
        phi = tl.load(functions + (t0 % BLOCK + tl.arange(0, BLOCK_T))[:, None] * T + tl.arange(0, T)[None, :],
                      eviction_policy="evict_last").to(tl.float32)
        if not BY_LANE:
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
        if len(VALUES) > 0:
            v = load_tile(cv, cv_stride, here, t0, value_columns, VALUE_TOKEN, P, BLOCK_T, WARPS, live)
        held = load_keys(ck, ck_stride, packs, page, t_next, key_columns, segs, g, KEYS, KEY_TOKEN, KEY_WORDS, Hkv // C,
                         P, BLOCK_T, WARPS)
        mask = live[:, None]
        if MASKED:
            mask = seen(t, live, query, begin, end, S, window, CAUSAL, WINDOWED)
        score = tl.where(mask, score, float("-inf"))
        if len(VALUES) == 0:
            tl.store(p_s[None, :] + tl.multiple_of(t - origin, BLOCK_T)[:, None], score, mask=in_q[None, :])
        else:
            above = tl.maximum(peak, tl.max(score, 0))
            base = tl.where(above == float("-inf"), 0.0, above)
            p = tl.exp(score - base[None, :])
            fade = tl.exp(peak - base)
            if BY_LANE:
                total = total * fade[None, :] + p
            else:
                total = total * fade[None, :] + tl.sum(p, 0)[None, :]
            peak = above
            acc = add_repeated(acc, fade, tl.trans(p).to(v[0].dtype), v)

    if len(VALUES) > 0:
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


@triton.jit
def load_keys(ck, ck_stride, packs, pages, t0, columns, segs, g, ROW: tl.constexpr, TOKEN: tl.constexpr,
              WORDS: tl.constexpr, G: tl.constexpr, P: tl.constexpr, BLOCK_T: tl.constexpr,
              WARPS: tl.constexpr):  # fmt: skip
    """Rows of group g of the tile from token t0 on as they are held: their latents, or what `unpack` takes."""
    if packs is None:
        held = load_tile(ck, ck_stride, pages, t0, columns, TOKEN, P, BLOCK_T, WARPS)
    else:
        held = load_codes(tile_located(ck, ck_stride, pages, t0, g, TOKEN, WORDS, G, P, BLOCK_T), segs, None, ROW)
    return held


@triton.jit
def load_absorbed(a, left, Q: tl.constexpr, T: tl.constexpr, ROW: tl.constexpr, LONG: tl.constexpr,
                  BY_LANE: tl.constexpr):  # fmt: skip
    """Absorbed queries of Q rows, T each, by the pieces of a row: [columns, T Q] each; zeros from row `left` on."""
    u, n = (), tl.arange(0, T * Q)
    for i in tl.static_range(len(ROW)):
        r = ROW[i][COLUMN] + tl.arange(0, ROW[i][SIZE] * operands(ROW[i][BITS]))
        at = a + (n * LONG)[:, None] + r[None, :]
        if left is None:
            x = tl.load(at, eviction_policy="evict_last")
        elif BY_LANE:
            x = tl.load(at, mask=(n < left * T)[:, None], other=0.0, eviction_policy="evict_last")
        else:
            x = tl.load(at, mask=(n % Q < left)[:, None], other=0.0, eviction_policy="evict_last")
        u = u + (tl.trans(x),)  # type: ignore[assignment]
    return u


@triton.jit
def load_fast(x, left, Q: tl.constexpr, F: tl.constexpr, WIDE: tl.constexpr, BY_LANE: tl.constexpr):
    """A piece of Q rows' fast pairs: both halves [Q, F / 8, 4] of pair 4 i + lane, or [F, Q], pairs adjacent; zeros
    from row `left` on."""
    i = tl.arange(0, Q)
    at = x + (i * WIDE)[:, None] + tl.arange(0, F)[None, :]
    if left is None:
        own = tl.load(at)
    else:
        own = tl.load(at, mask=(i < left)[:, None], other=0.0)
    if BY_LANE:
        fast = tl.split(tl.permute(tl.reshape(own, [Q, 4, F // 8, 2]), (0, 2, 1, 3)))
    else:
        fast = tl.trans(own)
    return fast


@triton.jit
def fast_scores(score, k, x, table, H: tl.constexpr, F: tl.constexpr, BLOCK_T: tl.constexpr, BY_LANE: tl.constexpr):
    """Adds those of keys k [BLOCK_T, H F]: to score [BLOCK_T, H, 4], a sum of each lane, or [H BLOCK_T, BLOCK_Q]."""
    cos, sin = table
    if BY_LANE:
        low, high = tl.split(tl.reshape(k, [BLOCK_T, H, F // 8, 4, 2]))
        x_low, x_high = x
        along = low * x_low[None] + high * x_high[None]
        across = low * x_high[None] - high * x_low[None]
        cos, sin = tl.reshape(cos, [BLOCK_T, 1, F // 8, 4]), tl.reshape(sin, [BLOCK_T, 1, F // 8, 4])
        score += tl.sum(cos * along + sin * across, 2)
    else:
        low, high = tl.split(tl.reshape(k, [BLOCK_T, H, F // 2, 2]))
        cos, sin = cos[:, None, :], sin[:, None, :]
        turned = tl.join(low * cos - high * sin, low * sin + high * cos)
        turned = tl.reshape(turned, [BLOCK_T, H, F]).to(x.dtype)
        turned = tl.reshape(tl.permute(turned, (1, 0, 2)), [H * BLOCK_T, F])
        score = tl.dot(turned, x, score, input_precision="ieee")
    return score


@triton.jit
def repeated(x):
    """[Q] -> [16] of fewer than 16 rows, each so many times as it takes."""
    Q: tl.constexpr = x.shape[0]
    if Q < 16:
        x = tl.reshape(tl.broadcast_to(x[:, None], [Q, 16 // Q]), [16])
    return x


@triton.jit
def add_repeated(acc, fade, p, z):
    """acc[n] * fade + p @ z[n], of rows repeated up to 16: [rows, size] each; fade [Q], p [Q, BLOCK_T]."""
    Q: tl.constexpr = p.shape[0]
    BLOCK_T: tl.constexpr = p.shape[1]
    if Q < 16:
        p = tl.reshape(tl.broadcast_to(p[:, None, :], [Q, 16 // Q, BLOCK_T]), [16, BLOCK_T])
    fade = repeated(fade)
    new = ()
    for n in tl.static_range(len(z)):
        new = new + (tl.dot(p, z[n], acc[n] * fade[:, None], input_precision="ieee"),)
    return new
# fmt: on


def attend(
    call: Call, x: Tensor, a: Tensor, terms: Tensor | None, s: Tensor | None, y: Tensor | None, lse: Tensor | None,
    span: Span, way: Banded,
) -> None:  # fmt: skip
    """Queries of `absorb_band` over the tiles of each split: y [B, slots, Hq S, Rv] and its lse; without y scores, to
    s [B, Hq S, T]."""
    ck, cv, keys, values, tokens = call.ck, call.cv, call.keys, call.values, call.tokens
    key, value, form, choice = keys.sizes, values.sizes, call.form, way.launch
    names = "C M D P Hkv ROTARY CAUSAL WINDOWED CAPPED BLOCK_T"
    owners, (_, row, words) = key.num_heads // way.heads, strides(ck, keys)
    attend_kernel[x.shape[3] // way.rows * owners, span.parts, x.shape[0]](
        x, x.stride(), a, a.stride(), terms, strides_of(terms, 4), ck, stride(ck), cv, stride(cv),
        *tokens.paged, *tokens.seen, keys.rows, keys.runs, values.runs, keys.heads, keys.packs, keys.bias,
        keys.offset_turns, keys.functions, s, strides_of(s, 3), y, strides_of(y, 4), lse, strides_of(lse, 3),
        *call.numbers, *span,
        MASKED=(form.causal and form.num_queries > 1) or form.windowed,
        PADDED=x.shape[3] * owners != form.query_heads * form.num_queries, HEADS=way.heads,
        BLOCK_H=next_power_of_2(way.heads), FAST=way.fast, T=key.terms, BLOCK=key.block, BY_LANE=way.by_lane,
        KEYS=way.row, LONG=a.shape[4], VALUES=() if y is None else pieces(value, choice.block_r),
        KEY_TOKEN=row, KEY_WORDS=words, VALUE_TOKEN=0 if cv is None else cv.stride(1), BLOCK_Q=way.rows,
        WARPS=choice.warps,
        **launch.constants(names, form, key, choice), **launch.pdl(ck.device),
    )  # fmt: skip
