"""Softmax of the scores over one part of the tokens, and the sum of latents under it."""

import triton.language as tl
from torch import Tensor

from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch
from lrattn.kernels.arguments import Call, Span
from lrattn.kernels.pieces import next_power_of_2
from lrattn.kernels.tiles import lag_of, load_latents, load_run, part_of, reach, slots, softmax_step, store_lse


# fmt: off
@launch.kernel
def latent_values_kernel(
    s, s_strides,            # [B, Hq * S, T]   float32 scores of the tiles; -inf where not seen
    cv, cv_strides,          # [N, P, width]    value rows by page
    pages, pages_stride,     # [B, pages]       int32
    lens, lens_stride,       # [B]              int32, tokens held
    starts, starts_stride,   # [B]              int32, first token attended to, or None
    offsets, offsets_stride, # [B]              int32, token less position, or None
    runs, heads,             # [G, 3], [Hkv]    int32: column, rank, first row of uv; place -> kv head
    y, y_strides,            # [B, slots, Hq * S, Rv]  out, float32; rows whose lse is -inf are not written
    lse, lse_strides,        # [B, slots, Hq * S]      out, float32, natural log
    bound, S, window, first_tile, tiles, splits,
    C: tl.constexpr, M: tl.constexpr, P: tl.constexpr, Hkv: tl.constexpr, WINDOWED: tl.constexpr,
    PIECES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """y[b, i, h S + j] = softmax_t(s[b, h S + j, t]) @ cv[b, t, g],   t in split i

    Grid: (PIECES * row blocks * G, splits, B). A program owns one of the PIECES pieces of BLOCK_R latents of one group,
    BLOCK_Q of its C M S query rows and one split: with one row block each latent is read once. A joint latent (G = 1,
    thousands wide) is the same with more pieces; the scores are read once a piece.
    Needs: P a multiple of 16, BLOCK_T as in the scores. Online softmax, sums are float32.
    Reference: lrattn.attention.reference._attend_span. Derivation: docs/kernels.md#values.
    """
    G: tl.constexpr = Hkv // C
    i_r = tl.program_id(0) % PIECES
    g = tl.program_id(0) // PIECES % G
    i_s = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) // (PIECES * G) * BLOCK_Q + tl.arange(0, BLOCK_Q)  # row of the group: c (M S) + m S + s
    in_q = i < C * M * S
    head = tl.load(heads + g * C + i // (M * S), mask=in_q, other=0)
    row = (head * M * S + i % (M * S)).to(tl.int64)
    p_lse = lse + i_b * lse_strides[0] + i_s.to(tl.int64) * lse_strides[1] + row
    begin, end = reach(lens, lens_stride, starts, starts_stride, i_b, bound, S, window, WINDOWED)
    _, shift = lag_of(offsets, offsets_stride, i_b, BLOCK_T)
    origin, t_begin, t_end = part_of(begin, end, first_tile, tiles, i_s, splits, BLOCK_T, shift)
    if t_begin >= t_end:
        if i_r == 0:
            tl.store(p_lse, tl.full([BLOCK_Q], float("-inf"), tl.float32), mask=in_q)
        return

    column, rank, _ = load_run(runs, g)
    r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    p_s = s + i_b * s_strides[0] + row * s_strides[1]
    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_R], tl.float32)
    for t0 in range(t_begin, t_end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        live = (t >= begin) & (t < t_end)
        page, offset = slots(pages + i_b * pages_stride, t0, t, live, P, BLOCK_T, offsets)
        score = tl.load(p_s[:, None] + tl.multiple_of(t - origin, BLOCK_T)[None, :],
                        mask=in_q[:, None] & live[None, :], other=float("-inf"))
        p, fade, peak, total = softmax_step(score, peak, total, 1)
        z = load_latents(cv + page * cv_strides[0] + offset * cv_strides[1], column, rank, live, r)
        acc = tl.dot(p.to(z.dtype), z, acc * fade[:, None], input_precision="ieee")

    some = total != 0
    if i_r == 0:
        store_lse(p_lse, peak, total, in_q)
    p_y = y + i_b * y_strides[0] + i_s.to(tl.int64) * y_strides[1] + row * y_strides[2]
    acc *= (1.0 / tl.where(some, total, 1.0))[:, None]
    tl.store(p_y[:, None] + r[None, :], acc, mask=(in_q & some)[:, None] & (r < rank)[None, :])
# fmt: on


def latent_values(call: Call, s: Tensor, y: Tensor, lse: Tensor, span: Span) -> None:
    """Softmax of s [B, Hq S, T] times the latents of each split: y [B, slots, Hq S, Rv], lse [B, slots, Hq S]."""
    q, values, tokens, size = call.q, call.values, call.tokens, call.values.sizes
    cv, rows = call.ck if call.cv is None else call.cv, s.shape[1] // size.groups
    choice = launch.latent_values(launch.name(cv.device), q.itemsize, rank=size.rank, rows=rows)
    width = min(choice.block_r, max(16, next_power_of_2(size.rank)))
    pieces = cdiv(size.rank, width)
    latent_values_kernel[pieces * cdiv(rows, choice.block_q) * size.groups, span.parts, s.shape[0]](
        s, s.stride(), cv, cv.stride(), *tokens.paged, *tokens.seen, *tokens.lag, values.runs, values.heads,
        y, y.stride(), lse, lse.stride(), *call.limits, *span, PIECES=pieces, BLOCK_R=width,
        **launch.constants("C M P Hkv WINDOWED BLOCK_Q BLOCK_T", call.form, size, choice),
    )  # fmt: skip
