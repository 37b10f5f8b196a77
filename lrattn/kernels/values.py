"""Softmax of the scores over one part of the tokens, and the sum of latents under it."""

import triton.language as tl
from torch import Tensor

from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch
from lrattn.kernels.arguments import Call, Span, stride
from lrattn.kernels.pieces import next_power_of_2, pieces
from lrattn.kernels.rows import add_weighted, columns_within, load_tile, row_zeros, store_row
from lrattn.kernels.tiles import lag_of, load_run, part_of, reach, softmax_step, store_lse, tile_pages


# fmt: off
@launch.kernel
def latent_values_kernel(
    s, s_strides,            # [B, Hq * S, T]   float32 scores of the tiles; -inf where not seen
    cv, cv_stride,           # [N, P, width]    value rows by page
    pages, pages_stride,     # [B, pages]       int32
    lens, lens_stride,       # [B]              int32, tokens held
    starts, starts_stride,   # [B]              int32, first token attended to, or None
    offsets, offsets_stride, # [B]              int32, token less position, or None
    runs, heads,             # [G, 3], [Hkv]    int32: column, rank, first row of uv; place -> kv head
    y, y_strides,            # [B, slots, Hq * S, Rv]  out, float32; rows whose lse is -inf are not written
    lse, lse_strides,        # [B, slots, Hq * S]      out, float32, natural log
    bound, S, window, first_tile, tiles, splits,
    C: tl.constexpr, M: tl.constexpr, P: tl.constexpr, Hkv: tl.constexpr, WINDOWED: tl.constexpr,
    ROW: tl.constexpr, BLOCKS_R: tl.constexpr, TOKEN: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, TILE_T: tl.constexpr, WARPS: tl.constexpr,
):
    """y[b, i, h S + j] = softmax_t(s[b, h S + j, t]) @ cv[b, t, g],   t in split i

    Grid: (BLOCKS_R * row blocks * G, splits, B). A program owns one of the BLOCKS_R blocks of BLOCK_R latents of one
    group, in the pieces ROW, BLOCK_Q of its C M S query rows and one split: with one row block each latent is read
    once. A joint latent (G = 1, thousands wide) is the same with more blocks; the scores are read once a block.
    Needs: P a multiple of 16; TILE_T, the tiles of the scores, a multiple of BLOCK_T, which are read at a time. Online
    softmax, sums are float32.
    Reference: lrattn.attention.reference._attend_span. Derivation: docs/kernels.md#values.
    """
    G: tl.constexpr = Hkv // C
    i_r = tl.program_id(0) % BLOCKS_R
    g = tl.program_id(0) // BLOCKS_R % G
    i_s = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    i = tl.program_id(0) // (BLOCKS_R * G) * BLOCK_Q + tl.arange(0, BLOCK_Q)  # row of the group: c (M S) + m S + s
    in_q = i < C * M * S
    head = tl.load(heads + g * C + i // (M * S), mask=in_q, other=0)
    row = (head * M * S + i % (M * S)).to(tl.int64)
    p_lse = lse + i_b * lse_strides[0] + i_s.to(tl.int64) * lse_strides[1] + row
    begin, end = reach(lens, lens_stride, starts, starts_stride, i_b, bound, S, window, WINDOWED)
    _, shift = lag_of(offsets, offsets_stride, i_b, TILE_T)
    origin, t_begin, t_end = part_of(begin, end, first_tile, tiles, i_s, splits, TILE_T, shift)
    if t_begin >= t_end:
        if i_r == 0:
            tl.store(p_lse, tl.full([BLOCK_Q], float("-inf"), tl.float32), mask=in_q)
        return

    column, rank, _ = load_run(runs, g)
    column, rank = tl.multiple_of(column + i_r * BLOCK_R, 16), rank - i_r * BLOCK_R
    if rank <= 0:
        return
    columns = columns_within(column, rank, ROW)
    pages += i_b * pages_stride
    p_s = s + i_b * s_strides[0] + row * s_strides[1]
    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = row_zeros(BLOCK_Q, ROW)
    for t0 in tl.range(t_begin, t_end, BLOCK_T, disable_licm=True):
        t = t0 + tl.arange(0, BLOCK_T)
        live = (t >= begin) & (t < t_end)
        page = tile_pages(pages, t0, begin, t_end, P, BLOCK_T, offsets)
        z = load_tile(cv, cv_stride, page, t0, columns, TOKEN, P, BLOCK_T, WARPS, live)
        score = tl.load(p_s[:, None] + tl.multiple_of(t - origin, BLOCK_T)[None, :],
                        mask=in_q[:, None] & live[None, :], other=float("-inf"))
        p, fade, peak, total = softmax_step(score, peak, total, 1)
        acc = add_weighted(acc, fade, p.to(z[0].dtype), z)

    some = total != 0
    if i_r == 0:
        store_lse(p_lse, peak, total, in_q)
    p_y = y + i_b * y_strides[0] + i_s.to(tl.int64) * y_strides[1] + row * y_strides[2] + i_r * BLOCK_R
    store_row(p_y, acc, 1.0 / tl.where(some, total, 1.0), rank, in_q & some, ROW)
# fmt: on


def latent_values(call: Call, s: Tensor, y: Tensor, lse: Tensor, span: Span, tile: int) -> None:
    """Softmax of s [B, Hq S, T] times the latents of each split: y [B, slots, Hq S, Rv], lse [B, slots, Hq S].

    tile: tokens of the tiles that `span` counts.
    """
    q, values, tokens, size = call.q, call.values, call.tokens, call.values.sizes
    cv, rows = call.ck if call.cv is None else call.cv, s.shape[1] // size.groups
    choice = launch.latent_values(launch.name(cv.device), q.itemsize, rank=size.rank, rows=rows)
    widest = min(choice.block_r, max(16, next_power_of_2(size.rank)))
    blocks = cdiv(size.rank, widest)
    row = pieces(size, widest) if blocks == 1 else pieces(size._replace(rank=widest), widest)
    latent_values_kernel[blocks * cdiv(rows, choice.block_q) * size.groups, span.parts, s.shape[0]](
        s, s.stride(), cv, stride(cv), *tokens.paged, *tokens.seen, *tokens.lag, values.runs, values.heads,
        y, y.stride(), lse, lse.stride(), *call.limits, *span, ROW=row, BLOCKS_R=blocks, BLOCK_R=widest,
        TOKEN=cv.stride(1), TILE_T=tile, WARPS=choice.warps,
        **launch.constants("C M P Hkv WINDOWED BLOCK_Q BLOCK_T", call.form, size, choice),
    )  # fmt: skip
