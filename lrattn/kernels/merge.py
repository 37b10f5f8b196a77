"""Many splits merged into one by log-sum-exp, before the step back to heads."""

import triton.language as tl
from torch import Tensor

from lrattn.factors.operands import Values
from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch
from lrattn.kernels.tiles import load_run


# fmt: off
@launch.kernel
def merge_kernel(
    y, y_strides,            # [B, splits + 1, Hq * S, Rv]  float32; not read where lse is -inf; the last slot is out
    part_lse, lse_strides,   # [B, splits + 1, Hq * S]      float32, natural log; the last slot is out
    runs, places,            # [G, 3], [Hkv]    int32: column, rank, first row; kv head -> place
    rows, splits,
    C: tl.constexpr, Hkv: tl.constexpr, BLOCKS_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """y[b, splits, i] = sum_j w_j y[b, j, i],   w_j = exp(lse[b, j, i] - lse),   lse = log(sum_j exp(lse[b, j, i]))

    Grid: (BLOCKS_R * rows, B). A program owns BLOCK_R latents of one query row: many rows or few, each split is read
    by programs of its own, BLOCK_S splits at a time.
    Needs: nothing of the sizes. Sums are float32, in one order.
    Reference: lrattn.attention.reference.merge_attention. Derivation: docs/kernels.md#combine.
    """
    i_r = tl.program_id(0) % BLOCKS_R
    i = (tl.program_id(0) // BLOCKS_R).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    place = tl.load(places + i // (rows // Hkv))
    _, rank, _ = load_run(runs, place // C)
    r = i_r * BLOCK_R + tl.arange(0, BLOCK_R)
    j = tl.arange(0, BLOCK_S).to(tl.int64)
    p_y = y + i_b * y_strides[0] + i * y_strides[2]
    p_lse = part_lse + i_b * lse_strides[0] + i

    peak = tl.full([1], float("-inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    acc = tl.zeros([BLOCK_R], tl.float32)
    for j0 in range(0, splits, BLOCK_S):
        part = tl.load(p_lse + (j0 + j) * lse_strides[1], mask=j0 + j < splits, other=float("-inf"))
        above = tl.maximum(peak, tl.max(part, 0))
        base = tl.where(above == float("-inf"), 0.0, above)
        weight = tl.exp(part - base)
        fade = tl.exp(peak - base)
        x = tl.load(
            p_y + ((j0 + j) * y_strides[1])[:, None] + r[None, :],
            mask=(part != float("-inf"))[:, None] & (r < rank)[None, :],
            other=0.0,
        )
        acc = acc * fade + tl.sum(weight[:, None] * x, 0)
        total = total * fade + tl.sum(weight, 0)
        peak = above

    some = total != 0  # a NaN stays one
    if i_r == 0:
        tl.store(p_lse + splits * lse_strides[1] + tl.arange(0, 1), tl.where(some, peak + tl.log(total), float("-inf")))
    tl.store(p_y + splits * y_strides[1] + r, acc / tl.where(some, total, 1.0), mask=some & (r < rank))
# fmt: on


def merge(y: Tensor, lse: Tensor, splits: int, values: Values) -> None:
    """Slots 0 .. splits of y [B, splits + 1, Hq S, Rv] and lse [B, splits + 1, Hq S] merged into the last."""
    batch, _, rows, _ = y.shape
    size, choice = values.sizes, launch.merge(launch.name(y.device), y.itemsize)
    blocks_r = cdiv(size.rank, choice.block_r)
    merge_kernel[blocks_r * rows, batch](
        y, y.stride(), lse, lse.stride(), values.runs, values.places, rows, splits,
        C=size.group_size, Hkv=size.num_heads, BLOCKS_R=blocks_r, BLOCK_S=choice.block_s, BLOCK_R=choice.block_r,
        num_warps=choice.warps, num_stages=choice.stages,
    )  # fmt: skip
