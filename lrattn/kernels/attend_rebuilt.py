"""Attention with keys rebuilt on chip: rotate, score, softmax and the sum of value latents, or scores alone."""

import triton.language as tl
from torch import Tensor

from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch
from lrattn.kernels.arguments import Call, Span, stride, strides_of
from lrattn.kernels.packed import located, segments
from lrattn.kernels.pieces import pieces, strides
from lrattn.kernels.plan import Way
from lrattn.kernels.rows import (
    add_weighted,
    columns_within,
    keys_streamed,
    load_row,
    load_row_basis,
    load_tile,
    product,
    row_zeros,
    store_row,
)
from lrattn.kernels.tiles import (
    load_run,
    load_turns,
    part_of,
    reach,
    scaled,
    seen,
    slots,
    softmax_step,
    store_lse,
    tile_pages,
)


# fmt: off
@launch.kernel
def attend_rebuilt_kernel(
    x, x_strides,            # [B, tiles, Hq * S, 2, D / 2]  queries by tile, dims of pairs apart, padded with zeros
    ck, ck_strides,          # [N, P, width]    key rows by page
    cv, cv_stride,           # [N, P, width]    value rows by page; None: a row serves both
    pages, pages_stride,     # [B, pages]       int32
    lens, lens_stride,       # [B]              int32, tokens held
    starts, starts_stride,   # [B]              int32, first token attended to, or None
    uk,                      # [sum Rk, C * D]  key basis, pairs adjacent
    key_runs, value_runs,    # [G, 3]           int32: column, rank, first row of the basis
    heads,                   # [Hkv]            int32, place -> kv head
    packs,                   # [G, 3 n]         int32: segments of packed rows; None where they are plain
    bias,                    # [Hkv, D]         float32 by place, pairs adjacent; None without
    turns,                   # [max_position, ROTARY]  float32, cos and sin of a pair adjacent; offsets' if not TABLE
    positions, pos_strides,  # [N, P]           int32, or None: the index in the sequence
    s, s_strides,            # [B, Hq * S, T]   out without VALUES, float32, T tokens of the tiles; -inf where not seen
    y, y_strides,            # [B, slots, Hq * S, Rv]  out, float32; rows whose lse is -inf are not written
    lse, lse_strides,        # [B, slots, Hq * S]      out, float32, natural log
    scale, softcap, bound, S, window, max_position, first_tile, tiles, splits,
    C: tl.constexpr, M: tl.constexpr, D: tl.constexpr, P: tl.constexpr, Hkv: tl.constexpr,
    ROTARY: tl.constexpr, TABLE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr, RESIDENT: tl.constexpr,
    KEY_TOKEN: tl.constexpr, VALUE_TOKEN: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, WARPS: tl.constexpr,
):
    """y[b, i, h S + j] = softmax_t(s[b, h S + j, t]) @ cv[b, t, g],   t in split i
    s[b, h S + j, t] = softcap(scale * q[b, j, h] . Rot(t) (ck[b, t, g] @ uk[k] + bias[k])),   k = h // M, k in g

    Rot(t) = Rot(t0) Rot(t - t0): the queries come turned back by each tile's first token t0, the keys are turned by
    the offset only, whose table stays on chip. With TABLE every token's own row is read instead. KEYS and VALUES are
    the pieces of a row; without VALUES scores are written. Without cv values are columns of the keys' row, which is
    loaded once; the basis is zero past the key rank.

    Grid: (row blocks * Hkv, splits, B). A program owns BLOCK_Q of the M S query rows of one kv head and one of `splits`
    equal parts of the sequence's tiles; the heads of a group run side by side and meet its latents in L2.
    RESIDENT: KEYS is all of a row, a head is BLOCK_D wide, and the basis is read once. Else a piece of KEYS goes along
    each segment, BLOCK_D of the head at a time, and both are read again. A resident plain row's keys are loaded a tile
    ahead. KEY_TOKEN, VALUE_TOKEN: from a token to the next in a page.
    Needs: BLOCK_D a power of two >= 32, P a multiple of 16; with VALUES, groups of keys and of values that hold the
    same heads, plain rows, and RESIDENT. Online softmax, sums are float32.
    Reference: lrattn.attention.reference._attend_span. Derivation: docs/kernels.md#scores, #fused.
    """
    place = tl.program_id(0) % Hkv
    i_s = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) // Hkv * BLOCK_Q + tl.arange(0, BLOCK_Q)  # row m S + s of the kv head
    in_q = i < M * S
    head = tl.load(heads + place)
    row = (head * M * S + i).to(tl.int64)
    begin, end = reach(lens, lens_stride, starts, starts_stride, i_b, bound, S, window, WINDOWED)
    origin, t_begin, t_end = part_of(begin, end, first_tile, tiles, tl.program_id(1), splits, BLOCK_T)
    if len(VALUES) > 0:
        p_lse = lse + i_b * lse_strides[0] + i_s * lse_strides[1] + row
    else:
        p_s = s + i_b * s_strides[0] + row * s_strides[1]
    if t_begin >= t_end:
        if len(VALUES) > 0:
            tl.store(p_lse, tl.full([BLOCK_Q], float("-inf"), tl.float32), mask=in_q)
        return

    key_column, key_rank, r0 = load_run(key_runs, place // C)
    row_rank = key_rank
    pages += i_b * pages_stride
    p_x = x + i_b * x_strides[0] + (head * M * S + tl.minimum(i, M * S - 1)).to(tl.int64)[:, None] * x_strides[2]
    if len(VALUES) > 0:
        value_column, value_rank, _ = load_run(value_runs, place // C)
        value_columns = columns_within(value_column, value_rank, VALUES)
        if cv is None:
            row_rank = value_rank  # all of a shared row: its values begin as the keys do
        peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_Q], tl.float32)
        acc = row_zeros(BLOCK_Q, VALUES)
    key_segs = segments(packs, place // C, key_column, row_rank, KEYS)
    d, c = tl.arange(0, BLOCK_D), place % C * D
    p_x += tl.arange(0, BLOCK_D // 2)[None, :]
    if RESIDENT:
        basis_segs = segments(packs, place // C, key_column, key_rank, KEYS)
        u = load_row_basis(uk, C * D, r0, basis_segs, c, d, D, KEYS, x)
    if RESIDENT and not TABLE:
        cos, sin = load_turns(turns, tl.arange(0, BLOCK_T), BLOCK_T, d, ROTARY)
    query = tl.where(in_q, i % S, -1)
    PLAIN: tl.constexpr = RESIDENT and packs is None
    AHEAD: tl.constexpr = PLAIN and (len(VALUES) == 0 or cv is not None)  # the next tile's keys wait in registers
    if PLAIN:
        key_columns = columns_within(key_column, row_rank, KEYS)
        page = tile_pages(pages, t_begin, begin, t_end, P, BLOCK_T)
        last_tile = t_begin + (t_end - 1 - t_begin) // BLOCK_T * BLOCK_T
    if AHEAD:
        z = load_tile(ck, ck_strides[0], page, t_begin, key_columns, KEY_TOKEN, P, BLOCK_T, WARPS)

    for t0 in tl.range(t_begin, t_end, BLOCK_T, disable_licm=True):
        t = t0 + tl.arange(0, BLOCK_T)
        live = (t >= begin) & (t < t_end)
        if PLAIN:
            here, t_next = page, tl.minimum(t0 + BLOCK_T, last_tile)
            page = tile_pages(pages, t_next, begin, t_end, P, BLOCK_T)
        if not PLAIN or positions is not None:
            token_page, offset = slots(pages, t0, t, live, P, BLOCK_T)
        if not PLAIN:
            p_ck = located(ck, ck_strides, token_page, offset, packs, place // C, Hkv // C, P)
        if TABLE:
            at = t
            if positions is not None:
                at = tl.load(positions + token_page * pos_strides[0] + offset * pos_strides[1], mask=live, other=0)
            p_q = p_x
        else:
            at = tl.arange(0, BLOCK_T)
            p_q = p_x + ((t0 - origin) // BLOCK_T).to(tl.int64) * x_strides[1]
        score = tl.zeros([BLOCK_T, BLOCK_Q], tl.float32)
        for d0 in tl.static_range(0, D, BLOCK_D):
            q_low, q_high = tl.load(p_q + d0 // 2), tl.load(p_q + x_strides[3] + d0 // 2)
            if PLAIN and not AHEAD:
                z = load_tile(ck, ck_strides[0], here, t0, key_columns, KEY_TOKEN, P, BLOCK_T, WARPS, live)
            elif not PLAIN and RESIDENT:
                z = load_row(p_ck, key_segs, live, KEYS, x)
            if RESIDENT:
                k = product(z, u)
            else:
                k = keys_streamed(p_ck, key_segs, live, uk, C * D, r0, c, d0 + d, D, KEYS, x)
            if bias is not None:
                k += tl.load(bias + place * D + d0 + d, mask=d0 + d < D, other=0.0)[None, :]
            if TABLE:
                cos, sin = load_turns(turns, at, max_position, d0 + d, ROTARY)
            elif not RESIDENT:
                cos, sin = load_turns(turns, at, BLOCK_T, d0 + d, ROTARY)
            k_low, k_high = tl.split(tl.reshape(k, [BLOCK_T, BLOCK_D // 2, 2]))
            turned_low = (k_low * cos - k_high * sin).to(x.dtype.element_ty)
            turned_high = (k_low * sin + k_high * cos).to(x.dtype.element_ty)
            score = tl.dot(turned_low, tl.trans(q_low), score, input_precision="ieee")
            score = tl.dot(turned_high, tl.trans(q_high), score, input_precision="ieee")
        if len(VALUES) > 0 and cv is not None:
            v = load_tile(cv, cv_stride, here, t0, value_columns, VALUE_TOKEN, P, BLOCK_T, WARPS, live)
        elif len(VALUES) > 0:
            v = z
        if AHEAD:
            z = load_tile(ck, ck_strides[0], page, t_next, key_columns, KEY_TOKEN, P, BLOCK_T, WARPS)
        score = scaled(score, scale, softcap, CAPPED)
        mask = seen(t, live, query, begin, end, S, window, CAUSAL, WINDOWED)
        score = tl.where(mask, score, float("-inf"))
        if len(VALUES) == 0:
            tl.store(p_s[None, :] + (t - origin)[:, None], score, mask=in_q[None, :])
        else:
            p, fade, peak, total = softmax_step(score, peak, total, 0)
            p = tl.trans(p).to(x.dtype.element_ty)
            acc = add_weighted(acc, fade, p, v)

    if len(VALUES) > 0:
        store_lse(p_lse, peak, total, in_q)
        some = total != 0
        p_y = y + i_b * y_strides[0] + i_s * y_strides[1] + row * y_strides[2]
        store_row(p_y, acc, 1.0 / tl.where(some, total, 1.0), value_rank, in_q & some, VALUES)
# fmt: on


def attend_rebuilt(
    call: Call, x: Tensor, s: Tensor | None, y: Tensor | None, lse: Tensor | None, span: Span, way: Way
) -> None:  # fmt: skip
    """Turned queries x [B, tiles, Hkv, M S, BLOCK_D] over the tiles of each split: y [B, slots, Hq S, Rv] and its lse;
    without y scores, to s [B, Hq S, T]."""
    ck, cv, keys, values, tokens, choice = call.ck, call.cv, call.keys, call.values, call.tokens, way.launch
    key, turned, (batch, tiles, _, row, _) = keys.sizes, way.block > 0, x.stride()
    names = "C M P Hkv CAUSAL WINDOWED CAPPED D ROTARY TABLE BLOCK_D BLOCK_Q BLOCK_T"
    attend_rebuilt_kernel[cdiv(x.shape[3], choice.block_q) * key.num_heads, span.parts, x.shape[0]](
        x, (batch, tiles, row, row // 2, 1), ck, strides(ck, keys), cv, stride(cv), *tokens.paged, *tokens.seen,
        keys.rows, keys.runs, values.runs, keys.heads, keys.packs, keys.bias,
        keys.offset_turns if turned else keys.turns, *tokens.placed, s, strides_of(s, 3), y, strides_of(y, 3),
        lse, strides_of(lse, 3), *call.numbers, key.max_position, *span,
        KEYS=way.row, VALUES=() if y is None else pieces(values.sizes, choice.block_r),
        RESIDENT=choice.resident or y is not None, WARPS=choice.warps,
        KEY_TOKEN=ck.stride(1), VALUE_TOKEN=0 if cv is None else cv.stride(1),
        **launch.constants(names, call.form, key, choice, turned),
    )  # fmt: skip
