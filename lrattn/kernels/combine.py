"""Splits merged by log-sum-exp, the step from latents back to heads, and there what the dense window gave."""

import triton
import triton.language as tl
from torch import Tensor

from lrattn.factors.operands import Values
from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch, plan
from lrattn.kernels.arguments import stride, strides_of
from lrattn.kernels.tiles import load_run, softmax_step


# fmt: off
@launch.kernel
def combine_kernel(
    y, y_strides,            # [B, slots, Hq * S, Rv]  float32 partial results; anything where lse is -inf
    part_lse, lse_strides,   # [B, slots, Hq * S]      float32, natural log
    uv, uv_strides,          # [Hkv, Rv, D]     value basis, model order; None: the latents are the result
    bias,                    # [Hkv, D]         float32, by place, or None
    sinks,                   # [Hq]             float32 logits, or None
    near, near_strides,      # [B, Hq * S, D]   float32, heads of tokens that are held as they are, or None
    near_lse, near_lse_stride,  # [B, Hq * S]   float32
    runs, places,            # [G, 3], [Hkv]    int32: column, rank, first row; kv head -> place
    out, out_strides,        # [B, S, Hq, D | Rv]  out; latents past a head's own rank are zero
    lse, out_lse_strides,    # [B, S, Hq]       out, float32
    B, S, first, last, width,
    C: tl.constexpr, M: tl.constexpr, Hkv: tl.constexpr, D: tl.constexpr, BLOCKS_D: tl.constexpr,
    RANK: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    CHAINED: tl.constexpr,
):
    """out[b, i, h] = mass * ((sum_j w_j y[b, j, h S + i]) @ uv[k] + bias[k]) + rest * near[b, h S + i]

    with k = h // M and w_j = exp(lse_j - merged) for slots j in first .. last; merged = log(sum_j exp(lse_j)),
    lse = log(exp(merged) + exp(near_lse) + exp(sink)), mass = exp(merged - lse) and rest = exp(near_lse - lse): 1 and 0
    without the two.

    Grid: (BLOCKS_D * Hkv * row blocks of B M S). A program owns BLOCK_Q rows that share a kv head, and with it
    BLOCK_D columns of its basis (of the result when there is none): the basis is read once per row block. Of many
    splits it owns one row, whose splits are then read by more programs.
    Needs: BLOCK_Q 1 or at least 16. Sums are float32, over BLOCK_S slots at a time.
    Reference: lrattn.attention.reference.merge_attention, _join_sinks, _project. Derivation: docs/kernels.md#combine.
    """
    if CHAINED:
        tl.extra.cuda.gdc_wait()
    i_d = tl.program_id(0) % BLOCKS_D
    head = tl.program_id(0) // BLOCKS_D % Hkv
    n = tl.program_id(0) // (BLOCKS_D * Hkv) * BLOCK_Q + tl.arange(0, BLOCK_Q)  # (b M + m) S + s
    in_n = n < B * M * S
    b, i = (n // (M * S)).to(tl.int64), n % (M * S)
    place = tl.load(places + head)
    _, rank, _ = load_run(runs, place // C)
    row = (head * M * S + i).to(tl.int64)
    p_lse = part_lse + b * lse_strides[0] + row
    p_y = y + b * y_strides[0] + row * y_strides[2]
    h = head * M + i // S
    c = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    if uv is None:
        result, merged_lse = merged(p_y, y_strides[1], p_lse, lse_strides[1], first, last, in_n, c, rank, RANK, BLOCK_S)
    else:
        result = tl.zeros([max(BLOCK_Q, 16), BLOCK_D], tl.float32)
        merged_lse = tl.full([BLOCK_Q], float("-inf"), tl.float32)
        for r0 in range(0, RANK, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            u = tl.load(uv + head * uv_strides[0] + r[:, None] * uv_strides[1] + c[None, :] * uv_strides[2],
                        mask=(r < RANK)[:, None] & (c < D)[None, :], other=0.0)
            latent, merged_lse = merged(p_y, y_strides[1], p_lse, lse_strides[1], first, last, in_n, r, rank, RANK,
                                        BLOCK_S)
            latent = tl.broadcast_to(latent, [max(BLOCK_Q, 16), BLOCK_R]).to(u.dtype)
            result = tl.dot(latent, u, result, input_precision="ieee")
        if BLOCK_Q == 1:
            result = tl.max(result, 0)[None, :]
        if bias is not None:
            result += tl.load(bias + place * D + c, mask=c < D, other=0.0)[None, :]

    some = merged_lse != float("-inf")  # a NaN stays one
    joined = merged_lse
    mass = tl.where(some, 1.0, 0.0)
    if near is not None:  # after the merge, so that a row's bits do not depend on how its tokens were cut
        beside = tl.load(near_lse + b * near_lse_stride + row, mask=in_n, other=float("-inf"))
        top = tl.maximum(joined, beside)
        base = tl.where(top == float("-inf"), 0.0, top)
        both = tl.exp(merged_lse - base) + tl.exp(beside - base)
        joined = tl.where(both != 0, base + tl.log(both), float("-inf"))
        mass = tl.where(some, tl.exp(merged_lse - joined), 0.0)
    if sinks is not None:
        sink = tl.load(sinks + h, mask=in_n, other=float("-inf"))
        top = tl.maximum(joined, sink)
        base = tl.where(top == float("-inf"), 0.0, top)
        joined = base + tl.log(tl.exp(joined - base) + tl.exp(sink - base))
        mass = tl.where(some, tl.exp(merged_lse - joined), 0.0)
    if near is not None:
        rest = tl.where(beside != float("-inf"), tl.exp(beside - joined), 0.0)
        p_near = near + b * near_strides[0] + row * near_strides[1]
    if i_d == 0:
        p_out = lse + b * out_lse_strides[0] + (i % S) * out_lse_strides[1] + h * out_lse_strides[2]
        tl.store(p_out, joined, mask=in_n)

    result *= mass[:, None]
    if near is not None:
        x = tl.load(p_near[:, None] + c[None, :], mask=(rest != 0)[:, None] & (c < D)[None, :], other=0.0)
        result += rest[:, None] * x
    p_out = out + b * out_strides[0] + (i % S) * out_strides[1] + h * out_strides[2]
    tl.store(p_out[:, None] + c[None, :], result.to(out.dtype.element_ty), mask=in_n[:, None] & (c < width)[None, :])


@triton.jit
def merged(p_y, y_stride, p_lse, lse_stride, first, last, in_n, r, rank, RANK: tl.constexpr,
           BLOCK_S: tl.constexpr):  # fmt: skip
    """sum_j exp(lse_j - lse) y_j over slots j, of latents r: [BLOCK_Q, len(r)]; and lse = log(sum_j exp(lse_j)).

    Of rows without a part zeros and -inf. What such slots hold, and columns past a rank, is loaded before that is
    known, and dropped.
    """
    Q: tl.constexpr = in_n.shape[0]
    peak = tl.full([Q], float("-inf"), tl.float32)
    total = tl.zeros([Q], tl.float32)
    sums = tl.zeros([Q, r.shape[0]], tl.float32)
    for j0 in range(first, last, BLOCK_S):
        j = (j0 + tl.arange(0, BLOCK_S)).to(tl.int64)
        there = in_n[:, None] & (j < last)[None, :]
        part = tl.load(p_lse[:, None] + j[None, :] * lse_stride, mask=there, other=float("-inf"))
        x = tl.load((p_y[:, None] + j[None, :] * y_stride)[:, :, None] + r[None, None, :],
                    mask=there[:, :, None] & (r < RANK)[None, None, :], other=0.0)
        x = tl.where((part != float("-inf"))[:, :, None] & (r < rank)[None, None, :], x, 0.0)
        weight, fade, peak, total = softmax_step(part, peak, total, 1)
        sums = sums * fade[:, None] + tl.sum(weight[:, :, None] * x, 1)
    some = total != 0
    lse = tl.where(some, tl.where(peak == float("-inf"), 0.0, peak) + tl.log(total), float("-inf"))
    return sums / tl.where(some, total, 1.0)[:, None], lse
# fmt: on


def combine(
    y: Tensor, part_lse: Tensor, parts: range, values: Values, out: Tensor, lse: Tensor, sinks: Tensor | None = None,
    up: bool = False, near: Tensor | None = None, near_lse: Tensor | None = None,
) -> None:  # fmt: skip
    """Slots `parts` of y [B, slots, Hq S, Rv], part_lse [B, slots, Hq S] -> out [B, S, Hq, Rv], lse [B, S, Hq].

    With `up` the value basis and bias are applied, and out is [B, S, Hq, D]. near [B, Hq S, D] and its lse [B, Hq S]
    join then.
    """
    batch, num_queries, query_heads, width = out.shape
    size = values.sizes
    heads, rows = size.num_heads, batch * num_queries * (query_heads // size.num_heads)
    few = len(parts) <= plan.COMBINED
    choice = (launch.combine if few else launch.combine_many)(launch.name(out.device), out.itemsize)
    blocks_d = cdiv(width, choice.block_d)
    combine_kernel[(blocks_d * heads * cdiv(rows, choice.block_q),)](
        y, y.stride(), part_lse, part_lse.stride(), values.up if up else None, values.up.stride(),
        values.bias if up else None, sinks, near, strides_of(near, 2), near_lse, stride(near_lse),
        values.runs, values.places, out, out.stride(), lse, lse.stride(),
        batch, num_queries, parts.start, parts.stop, width,
        C=size.group_size, M=query_heads // heads, Hkv=heads, D=size.head_dim, BLOCKS_D=blocks_d,
        RANK=size.rank, BLOCK_Q=choice.block_q, BLOCK_S=choice.block_s, BLOCK_R=choice.block_r, BLOCK_D=choice.block_d,
        num_warps=choice.warps, num_stages=choice.stages, **launch.pdl(out.device),
    )  # fmt: skip
