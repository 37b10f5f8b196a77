"""New tokens into their pages: latents as they come, and 1 / rms of the keys they stand for."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrattn.factors.formats import half
from lrattn.factors.operands import Keys, Values
from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch
from lrattn.kernels.pack import pack_latents
from lrattn.kernels.packed import keys_streamed, segments
from lrattn.kernels.tiles import LENGTHS, SLICED, half_pointer, load_latents, load_rows, load_run


# fmt: off
@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=SLICED)
def write_latents_kernel(
    zk, zk_stride,           # [n, row width]   key latents
    zv, zv_stride,           # [n, v width]     value latents, or None
    ck, ck_strides,          # [N, P, k width]  out
    cv, cv_strides,          # [N, P, v width]  out, or None
    slots, slots_stride,     # [n]              int32 or int64, page * P + offset; others than 0 .. N P are skipped
    n, num_slots, row_width, pad_column, k_width, v_width,
    P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """ck[slot[i]] = zk[i] | . | zeros,   cv[slot[i]] = zv[i]

    Columns row_width .. pad_column are left to norm_columns_kernel.

    Grid: (token blocks, column blocks of the key row and then of the value row). A program copies one tile.
    Needs: nothing of the sizes.
    Reference: lrattn.attention.reference.write_latents. Derivation: docs/kernels.md#write.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.load(slots + i * slots_stride, mask=i < n, other=-1).to(tl.int64)
    live = (slot >= 0) & (slot < num_slots)
    key_blocks = tl.cdiv(k_width, BLOCK_R)
    if tl.program_id(1) < key_blocks:
        r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        z = load_latents(zk + i * zk_stride, 0, row_width, live, r)
        p_ck = ck + slot // P * ck_strides[0] + slot % P * ck_strides[1]
        mine = (r < row_width) | ((r >= pad_column) & (r < k_width))
        tl.store(p_ck[:, None] + r[None, :], z, mask=live[:, None] & mine[None, :])
    elif zv is not None:
        r = (tl.program_id(1) - key_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
        z = load_latents(zv + i * zv_stride, 0, v_width, live, r)
        p_cv = cv + slot // P * cv_strides[0] + slot % P * cv_strides[1]
        tl.store(p_cv[:, None] + r[None, :], z, mask=live[:, None] & (r < v_width)[None, :])


@triton.jit(do_not_specialize=LENGTHS, do_not_specialize_on_alignment=SLICED)
def norm_columns_kernel(
    zk, zk_stride,           # [n, row width]   key latents
    ck, ck_strides,          # [N, P, k width]  out: two columns of each token and kv head
    slots, slots_stride,     # [n]              int32 or int64
    uk,                      # [sum Rk, C * D]  key basis
    runs, heads,             # [G, 3], [Hkv]    int32: column, rank, first row of uk; place -> kv head
    packs,                   # [G, 4 n]         int32: segments of packed rows; None where they are plain
    bias,                    # [Hkv, D]         float32 by place, or None
    n, num_slots, norm_column, eps, largest,
    C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, Hkv: tl.constexpr, ROW: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """hi + lo = min((mean((zk[i, g] @ uk[k] + bias[k])^2) + eps)^-1/2, largest),   hi, lo in the cache's dtype

    Of packed rows the latents are those that were stored, in tiles ROW: norm_column is then a byte, hi and lo 16 bits.

    Grid: (token blocks, Hkv). A program owns BLOCK_N tokens of one kv head, so that a key is rebuilt once.
    Needs: BLOCK_D a power of two >= 32 and >= D. Sums are float32.
    Reference: lrattn.attention.cache.norm_columns. Derivation: docs/kernels.md#write.
    """
    place = tl.program_id(1)
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.load(slots + i * slots_stride, mask=i < n, other=-1).to(tl.int64)
    live = (slot >= 0) & (slot < num_slots)
    column, rank, r0 = load_run(runs, place // C)
    d = tl.arange(0, BLOCK_D)
    p_ck = ck + slot // P * ck_strides[0] + slot % P * ck_strides[1]
    segs = segments(packs, place // C, rank, ROW)
    if packs is not None:
        k = keys_streamed(p_ck, segs, live, uk, C * D, r0, place % C * D, d, D, ROW, zk)
    else:
        k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
        for r in range(0, rank, BLOCK_R):
            z = load_latents(zk + i * zk_stride, column, rank, live, r + tl.arange(0, BLOCK_R))
            u = load_rows(uk, C * D, r0, rank, place % C * D, d, D, r + tl.arange(0, BLOCK_R)).to(z.dtype)
            k = tl.dot(z, u, k, input_precision="ieee")
    if bias is not None:
        k += tl.load(bias + place * D + d, mask=d < D, other=0.0)[None, :]
    inverse = tl.minimum(1.0 / tl.sqrt(tl.sum(k * k, 1) / D + eps), largest)
    p_norm = p_ck + norm_column
    if packs is not None:
        p_norm = half_pointer(p_norm, zk)
    p_norm += tl.load(heads + place)
    hi = inverse.to(p_norm.dtype.element_ty)
    tl.store(p_norm, hi, mask=live)
    tl.store(p_norm + Hkv, (inverse - hi.to(tl.float32)).to(p_norm.dtype.element_ty), mask=live)
# fmt: on


def write_latents(
    zk: Tensor, zv: Tensor | None, ck: Tensor, cv: Tensor | None, slots: Tensor, keys: Keys, values: Values, eps: float
) -> None:
    """zk [n, row width], zv [n, v width] to rows `slots` [n] of the caches, with the norm columns of a key norm."""
    n, row_width = zk.shape
    num_pages, page_size, k_width = ck.shape
    if not n:
        return
    if keys.packs is not None:
        pack_latents(zk, ck, slots, keys)
        k_width = 0  # what is left to copy
    v_width = 0 if zv is None else zv.shape[1]
    if zv is not None and cv is not None and values.packs is not None:
        pack_latents(zv, cv, slots, values)
        v_width = 0
    normed = keys.sizes.norm_column >= 0
    choice = launch.write_latents(launch.name(ck.device), zk.itemsize)
    if columns := cdiv(k_width, choice.block_r) + cdiv(v_width, choice.block_r):
        write_latents_kernel[cdiv(n, choice.block_n), columns](
            zk, zk.stride(0), zv, 0 if zv is None else zv.stride(0), ck, ck.stride(), cv,
            (0, 0) if cv is None else cv.stride(), slots, slots.stride(0), n, num_pages * page_size, row_width,
            row_width + normed * 2 * keys.sizes.num_heads, k_width, v_width,
            P=page_size, BLOCK_N=choice.block_n, BLOCK_R=choice.block_r, num_warps=choice.warps,
            num_stages=choice.stages,
        )  # fmt: skip
    if not normed:
        return
    choice = launch.norm_columns(launch.name(ck.device), zk.itemsize, packed=keys.packs is not None)
    kind = ck.dtype if keys.packs is None else half(zk.dtype)
    norm_columns_kernel[cdiv(n, choice.block_n), keys.sizes.num_heads](
        zk, zk.stride(0), ck, ck.stride(), slots, slots.stride(0), keys.rows, keys.runs, keys.heads, keys.packs,
        keys.bias, n, num_pages * page_size, keys.sizes.norm_column, eps, torch.finfo(kind).max,
        C=keys.sizes.group_size, D=keys.sizes.head_dim, P=page_size, Hkv=keys.sizes.num_heads,
        ROW=launch.streamed(keys.sizes.packed, choice.block_r),
        BLOCK_D=launch.block_d(keys.sizes.head_dim), BLOCK_N=choice.block_n, BLOCK_R=choice.block_r,
        num_warps=choice.warps, num_stages=choice.stages,
    )  # fmt: skip
