"""Attention over packed rows whose latents queries meet: in one pass, or scores and values in a pass each."""

from functools import lru_cache
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from lrattn.factors.operands import KeySizes, ValueSizes
from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch
from lrattn.kernels.arguments import Call, Form, Span, strides_of
from lrattn.kernels.packed import (
    BITS,
    CLOSES,
    COLUMN,
    FIRST,
    HELD,
    LATENT,
    OPENS,
    SCALE,
    SEGMENT,
    SEGMENTS,
    SIZE,
    START,
    padded,
)
from lrattn.kernels.pieces import PLANES, parts, pieces, words
from lrattn.kernels.planes import LOG2_E, SCALE_UNIT, middle, planes, scale_of, unit, weighed
from lrattn.kernels.tiles import chunk_of, lag_of, part_of, reach, soft_cap

LN_2 = tl.constexpr(0.6931471805599453)
NOTHING = tl.constexpr(-1e30)  # a peak below all scores


# fmt: off
@launch.kernel
def attend_packed_kernel(
    a, a_strides,            # [B, chunks, Hq * S, columns]  DTYPE, absorbed queries by plane, see absorb
    terms, terms_strides,    # [B, chunks, n, Hq * S]  float32: middles of KEYS' pieces, the factor, the bias' share
    ck, ck_page,             # [N, P, bytes]    uint8, key rows by page, and bytes from page to page
    cv, cv_page,             # [N, P, bytes]    value rows; ck where a row serves both
    pages, pages_stride,     # [B, pages]       int32
    lens, lens_stride,       # [B]              int32, tokens held
    starts, starts_stride,   # [B]              int32, first token attended to, or None
    offsets, offsets_stride, # [B]              int32, token less position, or None
    key_packs, value_packs,  # [G, 3 n]         int32: segments, where they differ by group; else None
    heads,                   # [Hkv]            int32, place -> kv head
    s, s_strides,            # [B, Hq * S, T]   float32 scores: read without KEYS, written without VALUES
    y, y_strides,            # [B, slots, Hq * S, Rv]  out, float32; rows whose lse is -inf are not written
    lse, lse_strides,        # [B, slots, Hq * S]      out, float32, natural log
    softcap, bound, S, window, first_tile, tiles, splits,
    KEYS: tl.constexpr, KEY_RUN: tl.constexpr, KEY_ROW: tl.constexpr, KEY_WORDS: tl.constexpr,
    VALUES: tl.constexpr, VALUE_RUN: tl.constexpr, VALUE_ROW: tl.constexpr, VALUE_WORDS: tl.constexpr,
    C: tl.constexpr, M: tl.constexpr, P: tl.constexpr, Hkv: tl.constexpr, CHUNK: tl.constexpr, BIASED: tl.constexpr,
    MASKED: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    DTYPE: tl.constexpr, MAGIC: tl.constexpr, ASM: tl.constexpr, CHAINED: tl.constexpr,
    BLOCK_T: tl.constexpr, W: tl.constexpr, T: tl.constexpr,
):
    """y[b, i, h S + j] = softmax_t(s[b, h S + j, t]) @ (scale[t] (codes[t] - middle)),   t in split i
    s[b, h S + j, t] = softcap(factor * sum_n scale[t] (sum_m a[b, c, h S + j, n, m] . plane[t, n, m] - middle) + bias)

    over pieces n of a row and planes m of a piece, t in chunk c; in base 2 within. KEYS and VALUES are the pieces of
    either side. Without KEYS scores are read, without VALUES they are written. RUN: bytes of a group's run, ROW: of all
    runs of a token, WORDS: of all its words. DTYPE: of operands, float16, or float32 in a layer of float32.

    Grid: (row blocks * G, splits, B). A program owns 16 of the C M S query rows of one group and one split of tiles of
    BLOCK_T tokens. It takes W T tokens at a time, T to a warp, whose products, peak and sums are its own till the end.
    Needs: P a multiple of 16, W warps, chunks of whole tiles; groups of keys and of values that hold the same heads;
    VALUES of 256 columns and 7 scales at most. Pages in reach alone are read, but all rows of them. Sums are float32.
    Reference: lrattn.attention.reference._attend_span. Derivation: docs/kernels.md#packed.
    """
    G: tl.constexpr = Hkv // C
    BEHIND: tl.constexpr = starts is not None or window[2] is not None  # tokens may begin within a tile
    g = tl.program_id(0) % G
    i_s = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    in_q, row = _queries(heads, g, S, C, M, G, tl.uint32)
    begin, end = reach(lens, lens_stride, starts, starts_stride, i_b, bound, S, window, WINDOWED)
    lag, shift = lag_of(offsets, offsets_stride, i_b, BLOCK_T)
    origin, t_begin, t_end = part_of(begin, end, first_tile, tiles, tl.program_id(1), splits, BLOCK_T, shift)
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if t_begin >= t_end or t_end <= begin:
        if len(VALUES) > 0:
            p_lse = lse + i_b * lse_strides[0] + i_s * lse_strides[1] + row
            tl.store(p_lse, tl.full([16], float("-inf"), tl.float32), mask=in_q)
        return

    _, before = chunk_of(origin, lag, CHUNK)
    if s is not None:
        p_s = s + i_b * s_strides[0] + row.to(tl.int64) * s_strides[1]
    seen_to = end - S + row % S  # last token that a query sees
    n_terms: tl.constexpr = len(KEYS)
    if len(KEYS) > 0:
        a += i_b * a_strides[0]
        terms += i_b * terms_strides[0]
        factor = tl.load(terms + n_terms * terms_strides[2] + row)  # of all chunks
    key_segs, value_segs = _segments(key_packs, KEYS, g), _segments(value_packs, VALUES, g)
    acc = ()
    for n in tl.static_range(len(VALUES)):
        mine = ()
        for _ in tl.static_range(16 // VALUES[n][BITS]):
            mine = mine + (_zeros(W, VALUES[n][SIZE]),)
        acc = acc + (mine,)
    sums = _zeros(W, 8)  # columns: of p, and of p * scale of each segment, for its codes' middle
    peak = tl.full([W, 16], NOTHING, tl.float32)
    eight = tl.broadcast_to(tl.arange(0, 8)[None, None, :], [W, T, 8])
    own = tl.arange(0, W)[:, None] * T + tl.arange(0, T)[None, :]
    pages += i_b * pages_stride
    first_page, last_page = begin // P, (t_end - 1) // P

    for t0 in range(t_begin, t_end, W * T):
        t = t0 + own
        live = t < t_end
        if MASKED or BEHIND or offsets is not None:
            live &= t >= begin
        at = t
        if offsets is not None:
            at = tl.maximum(t, 0)
        k = tl.minimum(at // P, last_page)
        if WINDOWED or BEHIND:
            k = tl.maximum(k, first_page)
        page = tl.load(pages + k).to(tl.int64)
        place = own % P
        if W * T % P != 0 or offsets is not None:
            place = at % P
        if len(KEYS) > 0:
            c = (tl.maximum(before + t0 - origin, 0) // CHUNK).to(tl.int64)
            p_page = ck + page * ck_page
            kw = _words(p_page + P * KEY_ROW + place * KEY_WORDS, g, KEY_WORDS // G)
            p_row = p_page + g * KEY_RUN + place * KEY_ROW
            p_a = a + c * a_strides[1] + row * a_strides[2]
            p_terms = terms + c * terms_strides[1] + row
            score = tl.zeros([W, 16, T], tl.float32)
            for n in tl.static_range(len(KEYS)):
                z = planes(_halfwords(p_row, key_segs, KEYS, n), KEYS[n][BITS], MAGIC, ASM)
                if KEYS[n][OPENS]:
                    part = tl.zeros([W, 16, T], tl.float32)
                for m in tl.static_range(16 // KEYS[n][BITS]):
                    column = KEYS[n][COLUMN] + m * KEYS[n][SIZE] + tl.arange(0, KEYS[n][SIZE])
                    x = tl.load(p_a[:, None] + column[None, :])
                    x = tl.broadcast_to(x[None], [W, 16, KEYS[n][SIZE]])
                    part = _dot(x, tl.permute(z[m].to(DTYPE), (0, 2, 1)), part)
                if KEYS[n][BITS] == 16:
                    if KEYS[n][CLOSES]:
                        score += part * 2.0 ** (24 * MAGIC - 16)  # which codes and scales lack, see absorb
                else:
                    part -= tl.load(p_terms + n * terms_strides[2])[None, :, None]
                    if KEYS[n][CLOSES]:
                        scale = scale_of(kw[KEYS[n][SCALE] // 3], KEYS[n][SCALE] % 3, ASM)
                        score += part * scale.to(tl.float32)[:, None, :]
            share = tl.zeros([16], tl.float32)
            if BIASED:
                share = tl.load(p_terms + (n_terms + 1) * terms_strides[2])
            if CAPPED or len(VALUES) == 0:
                score = (score * factor[None, :, None] + share[None, :, None]) * LN_2
                if CAPPED:
                    score = soft_cap(score, softcap)
        else:
            column = tl.multiple_of(t0 - origin, W * T) + own
            score = tl.load(p_s[None, :, None] + column[:, None, :], mask=live[:, None, :], other=float("-inf"))
        mask = live[:, None, :]
        if CAUSAL and MASKED:
            mask &= t[:, None, :] <= seen_to[None, :, None]
        if WINDOWED:
            mask &= t[:, None, :] > (seen_to - window[0])[None, :, None]
        score = tl.where(mask, score, float("-inf"))
        if len(VALUES) == 0:
            column = tl.multiple_of(t0 - origin, W * T) + own
            tl.store(p_s[None, :, None] + column[:, None, :], score, mask=in_q[None, :, None])
        else:
            p_page = cv + page * cv_page
            vw = _words(p_page + P * VALUE_ROW + place * VALUE_WORDS, g, VALUE_WORDS // G)
            p_row = p_page + g * VALUE_RUN + place * VALUE_ROW
            if CAPPED or len(KEYS) == 0:
                above = tl.maximum(peak, tl.max(score, 2) * LOG2_E)
                p = tl.exp2(score * LOG2_E - above[:, :, None])
            else:
                above = tl.maximum(peak, tl.max(score, 2) * factor[None, :] + share[None, :])
                p = tl.exp2(score * factor[None, :, None] - (above - share[None, :])[:, :, None])
            fade = tl.exp2(peak - above)[:, :, None]
            peak = above
            p = p.to(DTYPE)
            sums, new = _dot(p, (eight == 0).to(DTYPE), sums * fade), ()
            for n in tl.static_range(len(VALUES)):
                z = planes(_halfwords(p_row, value_segs, VALUES, n), VALUES[n][BITS], MAGIC, ASM)
                mine = ()
                if VALUES[n][BITS] == 16:  # what is not live may be no number
                    ps, z = p, (tl.where(live[:, :, None], z[0], 0.0),)
                elif VALUES[n][OPENS]:
                    word = tl.where(live, vw[VALUES[n][SCALE] // 3], 0)
                    ps = weighed(p, scale_of(word, VALUES[n][SCALE] % 3, ASM)[:, None, :], ASM)
                    sums = _dot(ps, (eight == 1 + VALUES[n][SCALE] - VALUES[0][SCALE]).to(DTYPE), sums)
                for m in tl.static_range(16 // VALUES[n][BITS]):
                    mine = mine + (_dot(ps, z[m].to(DTYPE), acc[n][m] * fade),)
                new = new + (mine,)
            acc = new

    if len(VALUES) > 0:
        top = tl.max(peak, 0)
        share = tl.exp2(peak - top[None])
        whole = tl.sum(_column(sums, 0) * share, 0)
        some = whole != 0  # a NaN stays one
        in_q, row = _queries(heads, g, S, C, M, G, tl.int32)
        p_lse = lse + i_b * lse_strides[0] + i_s * lse_strides[1] + row
        tl.store(p_lse, tl.where(some, (tl.log2(whole) + top) * LN_2, float("-inf")), mask=in_q)
        share *= (1.0 / tl.where(some, whole, 1.0))[None, :]
        p_y = y + i_b * y_strides[0] + i_s * y_strides[1] + row.to(tl.int64) * y_strides[2]
        for n in tl.static_range(len(VALUES)):
            held, latent = VALUES[n][HELD], VALUES[n][LATENT]
            if value_packs is not None:
                held, latent = value_segs[3 * n + 1], value_segs[3 * n + 2]
            h = VALUES[n][FIRST] + tl.arange(0, VALUES[n][SIZE])
            if VALUES[n][OPENS] and VALUES[n][BITS] < 16:
                weight = share * (middle(VALUES[n][BITS]) * SCALE_UNIT)
                less = _column(sums, 1 + VALUES[n][SCALE] - VALUES[0][SCALE]) * weight
            for m in tl.static_range(16 // VALUES[n][BITS]):
                if VALUES[n][BITS] == 16:
                    x = tl.sum(acc[n][m] * share[:, :, None], 0)
                else:
                    weight = share * (SCALE_UNIT / unit(VALUES[n][BITS], m, MAGIC))
                    x = tl.sum(acc[n][m] * weight[:, :, None] - less[:, :, None], 0)
                mask = (in_q & some)[:, None] & (h < held)[None, :]
                tl.store(p_y[:, None] + (latent + m * held + h)[None, :], x, mask=mask)


@triton.jit
def _queries(heads, g, S, C: tl.constexpr, M: tl.constexpr, G: tl.constexpr, KIND: tl.constexpr):
    """The program's rows c (M S) + m S + s of group g: which there are, and the row h S + s of all heads of each.

    In another KIND of numbers they are found anew after the loop, not held through it in registers that it needs.
    """
    i = tl.program_id(0) // G * 16 + tl.arange(0, 16)
    in_q = i < C * M * S
    i, each = tl.where(in_q, i, 0).to(KIND), tl.cast(M * S, KIND)
    return in_q, tl.load(heads + g * C + (i // each).to(tl.int32)) * (M * S) + (i % each).to(tl.int32)


@triton.jit
def _dot(x, y, acc):
    return tl.dot(x, y, acc, input_precision="ieee")


@triton.jit
def _zeros(W: tl.constexpr, N: tl.constexpr):
    return tl.zeros([W, 16, N], tl.float32)


@triton.jit
def _column(sums, N: tl.constexpr):
    """Column N of sums [W, 16, 8]."""
    return tl.sum(tl.where(tl.arange(0, 8)[None, None, :] == N, sums, 0.0), 2)


@triton.jit
def _words(p, g, BYTES: tl.constexpr):
    """Words of scales of group g, which has so many bytes of those that `p` points at: int32 each."""
    w = ()
    for n in tl.static_range(BYTES // 4):
        w = w + (tl.load((p + g * BYTES + 4 * n).to(tl.pointer_type(tl.int32))),)
    return w


@triton.jit
def _segments(packs, PIECES: tl.constexpr, g):
    """Of each piece's segment in group g, where groups differ: its first byte, its halfwords and its first latent."""
    segs = ()
    if packs is not None:
        packs += g * 3 * PIECES[0][SEGMENTS]
        for n in tl.static_range(len(PIECES)):
            p = packs + 3 * PIECES[n][SEGMENT]
            segs = segs + (tl.multiple_of(tl.load(p), 16), tl.load(p + 1) * PIECES[n][BITS] // 16, tl.load(p + 2))
    return segs


@triton.jit
def _halfwords(rows, segs, PIECES: tl.constexpr, N: tl.constexpr):
    """Halfwords of a piece of rows: [W, T, size] int16. Past a segment's end there is some other one, or zeros."""
    h = (PIECES[N][FIRST] + tl.arange(0, PIECES[N][SIZE]))[None, None, :]
    if len(segs) == 0:
        x = tl.load((rows + PIECES[N][START]).to(tl.pointer_type(tl.int16))[:, :, None] + h)
    else:
        p = (rows + segs[3 * N]).to(tl.pointer_type(tl.int16))
        x = tl.load(p[:, :, None] + h, mask=h < padded(segs[3 * N + 1]), other=0)
    return x
# fmt: on


def attend_packed(
    call: Call, a: Tensor | None, terms: Tensor | None, s: Tensor | None, y: Tensor | None, lse: Tensor | None,
    span: Span, choice: launch.Launch,
) -> None:  # fmt: skip
    """Absorbed queries by plane `a` over the tiles of each split: y [B, slots, Hq S, Rv] and its lse; without y scores,
    to s [B, Hq S, T]. Without `a` scores come from there."""
    q, ck, keys, values, tokens = call.q, call.ck, call.keys, call.values, call.tokens
    side, cv = values if a is None else keys, ck if call.cv is None else call.cv
    blocks = cdiv(q.shape[1] * q.shape[2] // side.sizes.groups, 16) * side.sizes.groups
    key_packs = None if a is None or keys.sizes.even else keys.packs
    value_packs = None if y is None or values.sizes.even else values.packs
    for fixed in _constants(keys.sizes, values.sizes, call.form, choice, a is None, y is None):
        attend_packed_kernel[blocks, span.parts, q.shape[0]](
            a, strides_of(a, 4), terms, strides_of(terms, 4), ck, ck.stride()[0], cv, cv.stride()[0],
            *tokens.paged, *tokens.seen, *tokens.lag, key_packs, value_packs, (keys if y is None else values).heads,
            s, strides_of(s, 3), y, strides_of(y, 4), lse, strides_of(lse, 3), call.rule.softcap, *call.limits, *span,
            DTYPE=tl.float32 if q.itemsize == 4 else tl.float16, ASM=q.itemsize == 2 and launch.assembles(ck.device),
            **launch.pdl(ck.device), **fixed,
        )  # fmt: skip


@lru_cache(maxsize=256)
def _constants(
    key: KeySizes, value: ValueSizes, form: Form, choice: launch.Launch, given: bool, alone: bool
) -> list[dict[str, Any]]:
    """Of each launch. given: scores are. alone: they are the result."""
    names = "C M P Hkv CAUSAL WINDOWED CAPPED MAGIC BLOCK_T"
    fixed = launch.constants(names, form, value if given else key, choice) | {
        "KEYS": () if given else pieces(key, PLANES), "KEY_ROW": key.runs, "KEY_WORDS": words(key),
        "KEY_RUN": key.runs // key.groups if key.even else 0, "VALUE_ROW": value.runs, "VALUE_WORDS": words(value),
        "VALUE_RUN": value.runs // value.groups if value.even else 0, "CHUNK": key.chunk or 1 << 30,
        "BIASED": bool(key.biased), "MASKED": (form.causal and form.num_queries > 1) or form.windowed,
        "W": choice.warps, "T": choice.block_n,
    }  # fmt: skip
    return [fixed | {"VALUES": x} for x in ([()] if alone else parts(value))]
