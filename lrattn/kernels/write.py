"""New tokens into their pages: latents as they come, or packed."""

import triton.language as tl
from torch import Tensor

from lrattn.factors.operands import Keys, Values
from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch
from lrattn.kernels.pack import pack_latents
from lrattn.kernels.tiles import load_latents


# fmt: off
@launch.kernel
def write_latents_kernel(
    zk, zk_stride,           # [n, k width]     key latents
    zv, zv_stride,           # [n, v width]     value latents, or None
    ck, ck_strides,          # [N, P, k width]  out
    cv, cv_strides,          # [N, P, v width]  out, or None
    slots, slots_stride,     # [n]              int32 or int64, page * P + offset; others than 0 .. N P are skipped
    n, num_slots, k_width, v_width,
    P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """ck[slot[i]] = zk[i],   cv[slot[i]] = zv[i]

    Grid: (token blocks, column blocks of the key row and then of the value row). A program copies one tile.
    Needs: nothing of the sizes; a width is 0 where that side is not copied.
    Reference: lrattn.attention.reference.write_latents. Derivation: docs/kernels.md#write.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.load(slots + i * slots_stride, mask=i < n, other=-1).to(tl.int64)
    live = (slot >= 0) & (slot < num_slots)
    key_blocks = tl.cdiv(k_width, BLOCK_R)
    if tl.program_id(1) < key_blocks:
        r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
        z = load_latents(zk + i * zk_stride, 0, k_width, live, r)
        p_ck = ck + slot // P * ck_strides[0] + slot % P * ck_strides[1]
        tl.store(p_ck[:, None] + r[None, :], z, mask=live[:, None] & (r < k_width)[None, :])
    elif zv is not None:
        r = (tl.program_id(1) - key_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
        z = load_latents(zv + i * zv_stride, 0, v_width, live, r)
        p_cv = cv + slot // P * cv_strides[0] + slot % P * cv_strides[1]
        tl.store(p_cv[:, None] + r[None, :], z, mask=live[:, None] & (r < v_width)[None, :])
# fmt: on


def write_latents(
    zk: Tensor, zv: Tensor | None, ck: Tensor, cv: Tensor | None, slots: Tensor, keys: Keys, values: Values
) -> None:
    """zk [n, row width], zv [n, v width] to rows `slots` [n] of the caches."""
    n, k_width = zk.shape
    num_pages, page_size, _ = ck.shape
    if not n:
        return
    if keys.packs is not None:
        pack_latents(zk, ck, slots, keys)
        k_width = 0  # what is left to copy
    v_width = 0 if zv is None else zv.shape[1]
    if zv is not None and cv is not None and values.packs is not None:
        pack_latents(zv, cv, slots, values)
        v_width = 0
    choice = launch.write_latents(launch.name(ck.device), zk.itemsize)
    if columns := cdiv(k_width, choice.block_r) + cdiv(v_width, choice.block_r):
        write_latents_kernel[cdiv(n, choice.block_n), columns](
            zk, zk.stride(0), zv, 0 if zv is None else zv.stride(0), ck, ck.stride(), cv,
            (0, 0) if cv is None else cv.stride(), slots, slots.stride(0), n, num_pages * page_size, k_width, v_width,
            P=page_size, BLOCK_N=choice.block_n, BLOCK_R=choice.block_r,
            num_warps=choice.warps, num_stages=choice.stages,
        )  # fmt: skip
