"""One pass over the latents with keys rebuilt on chip: rotate, score, softmax and the sum of value latents."""

import triton.language as tl
from torch import Tensor

from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch
from lrattn.kernels.arguments import Call, Span, strides_of
from lrattn.kernels.packed import located, segments
from lrattn.kernels.pieces import pieces
from lrattn.kernels.rows import add_weighted, load_row, load_row_basis, product, row_zeros, store_row
from lrattn.kernels.tiles import load_run, load_turns, part_of, reach, scaled, seen, slots, softmax_step, store_lse


# fmt: off
@launch.kernel
def fused_rebuilt_kernel(
    x, x_strides,            # [B, tiles, Hq * S, 2, D / 2]  queries by tile, dims of pairs apart, padded with zeros
    ck, ck_strides,          # [N, P, width]    key rows by page
    cv, cv_strides,          # [N, P, width]    value rows by page; None: a row serves both
    pages, pages_stride,     # [B, pages]       int32
    lens, lens_stride,       # [B]              int32, tokens held
    starts, starts_stride,   # [B]              int32, first token attended to, or None
    uk,                      # [sum Rk, C * D]  key basis, pairs adjacent
    key_runs, value_runs,    # [G, 3]           int32: column, rank, first row of the basis
    heads,                   # [Hkv]            int32, place -> kv head
    bias,                    # [Hkv, D]         float32 by place, pairs adjacent; None without
    turns,                   # [max_position, ROTARY]  float32, cos and sin of a pair adjacent; offsets' if not TABLE
    positions, pos_strides,  # [N, P]           int32, or None: the index in the sequence
    y, y_strides,            # [B, slots, Hq * S, Rv]  out, float32; rows whose lse is -inf are not written
    lse, lse_strides,        # [B, slots, Hq * S]      out, float32, natural log
    scale, softcap, bound, S, window, max_position, first_tile, tiles, splits,
    C: tl.constexpr, M: tl.constexpr, D: tl.constexpr, P: tl.constexpr, Hkv: tl.constexpr,
    ROTARY: tl.constexpr, TABLE: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    KEYS: tl.constexpr, VALUES: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """y[b, i, h S + j] = softmax_t(softcap(scale * q[b, j, h] . Rot(t) (ck[b, t] @ uk[k] + bias[k]))) @ cv[b, t]

    with t in split i, k = h // M. As in the scores, queries come turned back by each tile's first token and keys are
    turned by the offset only; with TABLE every token's own row is read instead. KEYS and VALUES are the pieces of a
    rank. Without cv they are the same columns of one row, which is loaded once; the basis is zero past the key rank.

    Grid: (row blocks * Hkv, splits, B). A program owns BLOCK_Q of the M S query rows of one kv head and one split; the
    heads of a group run side by side and meet its latents in L2. With one head a group each latent is read once.
    Needs: BLOCK_D a power of two >= 32 and >= D, P a multiple of 16, rows of x that lie together; groups of keys and of
    values hold the same heads. Online softmax, sums are float32.
    Reference: lrattn.attention.reference._attend_span. Derivation: docs/kernels.md#fused.
    """
    place = tl.program_id(0) % Hkv
    i_s = tl.program_id(1).to(tl.int64)
    i_b = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) // Hkv * BLOCK_Q + tl.arange(0, BLOCK_Q)  # row m S + s of the kv head
    in_q = i < M * S
    head = tl.load(heads + place)
    row = (head * M * S + i).to(tl.int64)
    p_lse = lse + i_b * lse_strides[0] + i_s * lse_strides[1] + row
    begin, end = reach(lens, lens_stride, starts, starts_stride, i_b, bound, S, window, WINDOWED)
    origin, t_begin, t_end = part_of(begin, end, first_tile, tiles, tl.program_id(1), splits, BLOCK_T)
    if t_begin >= t_end:
        tl.store(p_lse, tl.full([BLOCK_Q], float("-inf"), tl.float32), mask=in_q)
        return

    key_column, key_rank, r0 = load_run(key_runs, place // C)
    value_column, value_rank, _ = load_run(value_runs, place // C)
    row_rank = key_rank if cv is not None else value_rank  # all of a shared row: its values begin as the keys do
    key_segs = segments(None, place // C, key_column, row_rank, KEYS)
    value_segs = segments(None, place // C, value_column, value_rank, VALUES)
    d, j = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_D // 2)
    basis_segs = segments(None, place // C, key_column, key_rank, KEYS)
    u = load_row_basis(uk, C * D, r0, basis_segs, place % C * D, d, D, KEYS, x)
    if not TABLE:
        cos, sin = load_turns(turns, tl.arange(0, BLOCK_T), BLOCK_T, d, ROTARY)
    first_x = x + i_b * x_strides[0] + (head * M * S).to(tl.int64) * BLOCK_D
    query = tl.where(in_q, i % S, -1)
    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = row_zeros(BLOCK_Q, VALUES)

    for t0 in range(t_begin, t_end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        live = (t >= begin) & (t < t_end)
        page, offset = slots(pages + i_b * pages_stride, t0, t, live, P, BLOCK_T)
        p_ck = located(ck, ck_strides, page, offset, None, place // C, Hkv // C, P)
        z = load_row(p_ck, key_segs, live, KEYS, x)
        k = product(z, u)
        if bias is not None:
            k += tl.load(bias + place * D + d, mask=d < D, other=0.0)[None, :]
        p_x = first_x + (i * BLOCK_D)[:, None] + j[None, :]
        if TABLE:
            at = t
            if positions is not None:
                at = tl.load(positions + page * pos_strides[0] + offset * pos_strides[1], mask=live, other=0)
            cos, sin = load_turns(turns, at, max_position, d, ROTARY)
        else:
            p_x += ((t0 - origin) // BLOCK_T).to(tl.int64) * x_strides[1]
        x_low = tl.load(p_x, mask=in_q[:, None], other=0.0)
        x_high = tl.load(p_x + BLOCK_D // 2, mask=in_q[:, None], other=0.0)
        k_low, k_high = tl.split(tl.reshape(k, [BLOCK_T, BLOCK_D // 2, 2]))
        turned = (k_low * cos - k_high * sin).to(x.dtype.element_ty)
        score = tl.dot(turned, tl.trans(x_low), input_precision="ieee")
        turned = (k_low * sin + k_high * cos).to(x.dtype.element_ty)
        score = tl.dot(turned, tl.trans(x_high), score, input_precision="ieee")
        score = scaled(score, scale, softcap, CAPPED)
        mask = seen(t, live, query, begin, end, S, window, CAUSAL, WINDOWED)
        score = tl.where(mask, score, float("-inf"))
        p, fade, peak, total = softmax_step(score, peak, total, 0)
        p = tl.trans(p).to(x.dtype.element_ty)
        if cv is not None:
            p_cv = located(cv, cv_strides, page, offset, None, place // C, Hkv // C, P)
            z = load_row(p_cv, value_segs, live, VALUES, x)
        acc = add_weighted(acc, fade, p, z)

    store_lse(p_lse, peak, total, in_q)
    some = total != 0
    p_y = y + i_b * y_strides[0] + i_s * y_strides[1] + row * y_strides[2]
    store_row(p_y, acc, 1.0 / tl.where(some, total, 1.0), value_rank, in_q & some, VALUES)
# fmt: on


def fused_rebuilt(
    call: Call, x: Tensor, y: Tensor, lse: Tensor, span: Span, turned: bool, choice: launch.Launch
) -> None:
    """Turned queries x over the tiles of each split: y [B, slots, Hq S, Rv], lse [B, slots, Hq S]."""
    ck, cv, keys, values, tokens = call.ck, call.cv, call.keys, call.values, call.tokens
    key, value = keys.sizes, values.sizes
    names = "C M P Hkv CAUSAL WINDOWED CAPPED D ROTARY TABLE BLOCK_D BLOCK_Q BLOCK_T"
    fused_rebuilt_kernel[cdiv(x.shape[2] // key.num_heads, choice.block_q) * key.num_heads, span.parts, x.shape[0]](
        x, x.stride(), ck, ck.stride(), cv, strides_of(cv, 2), *tokens.paged, *tokens.seen,
        keys.rows, keys.runs, values.runs, keys.heads, keys.bias,
        keys.offset_turns if turned else keys.turns, *tokens.placed, y, y.stride(), lse, lse.stride(),
        *call.numbers, key.max_position, *span, KEYS=pieces(value if cv is None else key, choice.block_r),
        VALUES=pieces(value, choice.block_r), **launch.constants(names, call.form, key, choice, turned),
    )  # fmt: skip
