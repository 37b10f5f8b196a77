"""Splits merged by log-sum-exp, and the step from latents back to heads."""

import triton
import triton.language as tl
from torch import Tensor
from triton import cdiv

from lrattn.kernels import launch
from lrattn.kernels.arguments import Values
from lrattn.kernels.tiles import LENGTHS, load_run


# fmt: off
@triton.jit(do_not_specialize=LENGTHS)
def combine_kernel(
    y, y_strides,            # [B, splits, Hq * S, Rv]  float32 partial results; not read where lse is -inf
    part_lse, lse_strides,   # [B, splits, Hq * S]      float32, natural log
    uv, uv_strides,          # [Hkv, Rv, D]     value basis, model order; None: the latents are the result
    bias,                    # [Hkv, D]         float32, by place, or None
    sinks,                   # [Hq]             float32 logits, or None
    runs, places,            # [G, 3], [Hkv]    int32: column, rank, first row; kv head -> place
    out, out_strides,        # [B, S, Hq, D | Rv]  out; latents past a head's own rank are zero
    lse, out_lse_strides,    # [B, S, Hq]       out, float32
    B, S, splits, width,
    C: tl.constexpr, M: tl.constexpr, Hkv: tl.constexpr, D: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """out[b, i, h] = (sum_j w_j y[b, j, h S + i]) @ uv[k] + mass * bias[k],   w_j = exp(lse_j - lse),  k = h // M

    lse = log(sum_j exp(lse_j) + exp(sink)) and mass = sum_j w_j, which is 1 without sinks.

    Grid: (column blocks, Hkv, row blocks of B M S). A program owns BLOCK_Q rows that share a kv head, and with it
    BLOCK_D columns of its basis (of the result when there is none): the basis is read once per row block.
    Needs: nothing of the sizes. Sums are float32, in the order of the splits.
    Reference: lrattn.reference.merge_attention, _join_sinks, _project. Derivation: docs/kernels.md#combine.
    """
    i_d = tl.program_id(0)
    head = tl.program_id(1)
    n = tl.program_id(2).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)  # (b M + m) S + s
    in_n = n < B * M * S
    b, i = n // (M * S), n % (M * S)
    place = tl.load(places + head)
    _, rank, _ = load_run(runs, place // C)
    row = head * M * S + i
    p_lse = part_lse + b * lse_strides[0] + row
    p_y = y + b * y_strides[0] + row * y_strides[2]
    h = head * M + i // S
    lse_step = tl.full([1], 1, tl.int64) * lse_strides[1]
    y_step = tl.full([1], 1, tl.int64) * y_strides[1]

    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    for j in range(splits):
        peak = tl.maximum(peak, tl.load(p_lse + j * lse_step, mask=in_n, other=float("-inf")))
    base = tl.where(peak == float("-inf"), 0.0, peak)
    if sinks is not None:
        sink = tl.load(sinks + h, mask=in_n, other=float("-inf"))
        peak = tl.maximum(peak, sink)
        base = tl.where(peak == float("-inf"), 0.0, peak)
    mass = tl.zeros([BLOCK_Q], tl.float32)
    for j in range(splits):
        mass += tl.exp(tl.load(p_lse + j * lse_step, mask=in_n, other=float("-inf")) - base)
    total = mass
    if sinks is not None:
        total += tl.exp(sink - base)
    joined = tl.where(total > 0, base + tl.log(total), float("-inf"))
    mass = mass / tl.where(total > 0, total, 1.0)
    if i_d == 0:
        p_out = lse + b * out_lse_strides[0] + (i % S) * out_lse_strides[1] + h * out_lse_strides[2]
        tl.store(p_out, joined, mask=in_n)

    c = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    result = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    if uv is None:
        for j in range(splits):
            part = tl.load(p_lse + j * lse_step, mask=in_n, other=float("-inf"))
            some = (part > float("-inf"))[:, None] & (c < rank)[None, :]
            x = tl.load((p_y + j * y_step)[:, None] + c[None, :], mask=some, other=0.0)
            result += tl.where(part == float("-inf"), 0.0, tl.exp(part - joined))[:, None] * x
    else:
        for r0 in range(0, rank, BLOCK_R):
            r = r0 + tl.arange(0, BLOCK_R)
            latent = tl.zeros([BLOCK_Q, BLOCK_R], tl.float32)
            for j in range(splits):
                part = tl.load(p_lse + j * lse_step, mask=in_n, other=float("-inf"))
                some = (part > float("-inf"))[:, None] & (r < rank)[None, :]
                x = tl.load((p_y + j * y_step)[:, None] + r[None, :], mask=some, other=0.0)
                latent += tl.where(part == float("-inf"), 0.0, tl.exp(part - joined))[:, None] * x
            u = tl.load(
                uv + head * uv_strides[0] + r[:, None] * uv_strides[1] + c[None, :] * uv_strides[2],
                mask=(r < rank)[:, None] & (c < D)[None, :],
                other=0.0,
            )
            result = tl.dot(latent.to(u.dtype), u, result, input_precision="ieee")
        if bias is not None:
            result += mass[:, None] * tl.load(bias + place * D + c, mask=c < D, other=0.0)[None, :]
    p_out = out + b * out_strides[0] + (i % S) * out_strides[1] + h * out_strides[2]
    tl.store(p_out[:, None] + c[None, :], result.to(out.dtype.element_ty), mask=in_n[:, None] & (c < width)[None, :])
# fmt: on


def combine(
    y: Tensor, part_lse: Tensor, values: Values, out: Tensor, lse: Tensor, sinks: Tensor | None = None, up: bool = False
) -> None:
    """Partial results y [B, splits, Hq S, Rv], part_lse [B, splits, Hq S] -> out [B, S, Hq, Rv], lse [B, S, Hq].

    With `up` the value basis and bias are applied, and out is [B, S, Hq, D].
    """
    batch, num_queries, query_heads, width = out.shape
    heads = values.num_heads
    rows = batch * num_queries * (query_heads // heads)
    choice = launch.pick(launch.COMBINE, launch.name(out.device), out.itemsize)
    combine_kernel[cdiv(width, choice.block_d), heads, cdiv(rows, choice.block_q)](
        y, y.stride(), part_lse, part_lse.stride(), values.up if up else None, values.up.stride(),
        values.bias if up else None, sinks, values.runs, values.places, out, out.stride(), lse, lse.stride(),
        batch, num_queries, y.shape[1], width,
        C=values.group_size, M=query_heads // heads, Hkv=heads, D=values.up.shape[2],
        BLOCK_Q=choice.block_q, BLOCK_R=choice.block_r, BLOCK_D=choice.block_d,
        num_warps=choice.warps, num_stages=choice.stages,
    )  # fmt: skip
