"""The output projection of merged heads."""

import triton.language as tl
from torch import Tensor

from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch


# fmt: off
@launch.kernel
def project_kernel(
    x, x_strides,            # [B, S, Hq, D]    heads
    wo, wo_strides,          # [Hq, D, E]       output projection, any strides
    out, out_strides,        # [B, S, E]        out
    B, S, E,
    Hq: tl.constexpr, D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCKS_D: tl.constexpr,
):
    """out[b, i] = sum_h x[b, i, h] @ wo[h]

    Grid: (BLOCKS_D * row blocks). A program owns BLOCK_Q of the B S rows and BLOCK_D of the E columns, and sums
    over all heads in one order: a row's result does not depend on its batch.
    Needs: nothing of the sizes. Sums are float32.
    Reference: lrattn.attention.reference._project. Derivation: docs/kernels.md#combine.
    """
    n = tl.program_id(0) // BLOCKS_D * BLOCK_Q + tl.arange(0, BLOCK_Q)
    e = tl.program_id(0) % BLOCKS_D * BLOCK_D + tl.arange(0, BLOCK_D)
    b, i = (n // S).to(tl.int64), n % S
    p_x = x + b * x_strides[0] + i * x_strides[1]
    result = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for k0 in range(0, Hq * D, BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        in_k = k < Hq * D
        a = tl.load(p_x[:, None] + (k // D * x_strides[2] + k % D)[None, :],
                    mask=(n < B * S)[:, None] & in_k[None, :], other=0.0)
        p_wo = wo + (k // D).to(tl.int64) * wo_strides[0] + k % D * wo_strides[1]
        w = tl.load(p_wo[:, None] + e[None, :] * wo_strides[2], mask=in_k[:, None] & (e < E)[None, :], other=0.0)
        result = tl.dot(a, w, result, input_precision="ieee")
    p_out = out + b * out_strides[0] + i * out_strides[1]
    tl.store(p_out[:, None] + e[None, :], result.to(out.dtype.element_ty), mask=(n < B * S)[:, None] & (e < E)[None, :])
# fmt: on


def project(x: Tensor, wo: Tensor, out: Tensor) -> None:
    """Heads x [B, S, Hq, D] through wo [Hq, D, E], to out [B, S, E]."""
    batch, num_queries, query_heads, head_dim = x.shape
    rows, width = batch * num_queries, wo.shape[2]
    choice = launch.project(launch.name(x.device), x.itemsize)
    blocks_d = cdiv(width, choice.block_d)
    project_kernel[(blocks_d * cdiv(rows, choice.block_q),)](
        x, x.stride(), wo, wo.stride(), out, out.stride(), batch, num_queries, width,
        Hq=query_heads, D=head_dim, BLOCK_Q=choice.block_q, BLOCK_K=choice.block_r, BLOCK_D=choice.block_d,
        BLOCKS_D=blocks_d,
        num_warps=choice.warps, num_stages=choice.stages,
    )  # fmt: skip
