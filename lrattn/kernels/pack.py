"""New tokens into packed rows: each segment's scale, then its codes."""

import triton.language as tl
from torch import Tensor

from lrattn.factors.formats import ALIGNMENT, MEAN_BITS
from lrattn.factors.operands import Keys, Values
from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch
from lrattn.kernels.packed import BROKEN, SCALE_FRACTION, SCALE_LEAST, half_pointer, segment
from lrattn.kernels.tiles import load_run

NEAREST, UPWARDS = tl.constexpr(1 << 19), tl.constexpr((1 << 20) - 1)  # added before a scale's fraction is cut


# fmt: off
@launch.kernel
def pack_latents_kernel(
    z, z_stride,             # [n, sum R]       latents
    cache, cache_strides,    # [N, P, bytes]    out, uint8
    slots, slots_stride,     # [n]              int32 or int64, page * P + offset; others than 0 .. N P are skipped
    runs,                    # [G, 3]           int32: first column in z
    packs,                   # [G, 4 n]         int32: segments
    n, num_slots,
    P: tl.constexpr, BITS: tl.constexpr, LAST: tl.constexpr, PADDING: tl.constexpr, MEAN_BITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """scale = least that cuts nothing, or next to the root mean square up to MEAN_BITS bits
    code[r] = clamp(floor(z[r] / scale) + 2^(b - 1), 0, 2^b - 1)

    BITS: of each segment. LAST: the last that has a scale, behind which are PADDING zeros.

    Grid: (token blocks, G). A program writes the runs of BLOCK_N tokens of one group; it reads their latents twice.
    Needs: nothing of the sizes. The division is IEEE, so that codes are those of the reference.
    Reference: lrattn.factors.formats.Format.encode. Derivation: docs/kernels.md#packed.
    """
    g = tl.program_id(1)
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.load(slots + i * slots_stride, mask=i < n, other=-1).to(tl.int64)
    live = (slot >= 0) & (slot < num_slots)
    column, _, _ = load_run(runs, g)
    packs += g * 4 * len(BITS)
    p_z = z + i * z_stride + column
    p_row = cache + slot // P * cache_strides[0] + slot % P * cache_strides[1]
    at = tl.arange(0, BLOCK_R)
    for s in tl.static_range(len(BITS)):
        start, rank, latent, scale_at = segment(packs, s, 1 << 30)
        if BITS[s] == 16:
            p_half = half_pointer(p_row + start, z)
            for r0 in range(0, rank, BLOCK_R):
                mask = live[:, None] & (r0 + at < rank)[None, :]
                x = tl.load(p_z[:, None] + (latent + r0 + at)[None, :], mask=mask, other=0.0)
                tl.store(p_half[:, None] + (r0 + at)[None, :], x.to(p_half.dtype.element_ty), mask=mask)
        else:
            size, bad = tl.zeros([BLOCK_N], tl.float32), tl.zeros([BLOCK_N], tl.int32)
            for r0 in range(0, rank, BLOCK_R):
                mask = live[:, None] & (r0 + at < rank)[None, :]
                x = tl.load(p_z[:, None] + (latent + r0 + at)[None, :], mask=mask, other=0.0).to(tl.float32)
                bad += tl.sum(tl.where(x - x == 0, 0, 1), 1)
                if BITS[s] <= MEAN_BITS:
                    size += tl.sum(x * x, 1)
                else:
                    size = tl.maximum(size, tl.max(tl.abs(x), 1))
            if BITS[s] <= MEAN_BITS:
                held = tl.sqrt_rn(size / rank).to(tl.int32, bitcast=True) + NEAREST
            else:
                held = (size / 2 ** (BITS[s] - 1)).to(tl.int32, bitcast=True) + UPWARDS
            held = (held - SCALE_LEAST) >> SCALE_FRACTION
            held = tl.minimum(tl.maximum(held, 0), BROKEN - 1)
            scale = ((held << SCALE_FRACTION) + SCALE_LEAST).to(tl.float32, bitcast=True)
            held = tl.where(bad > 0, BROKEN, held)
            p_scale = p_row + scale_at
            tl.store(p_scale, held.to(tl.uint8), mask=live)
            if s == LAST:
                for zero in tl.static_range(PADDING):
                    tl.store(p_scale + 1 + zero, tl.zeros([BLOCK_N], tl.uint8), mask=live)
            for j0 in range(0, rank * BITS[s] // 8, BLOCK_R):
                j = j0 + at
                mask = live[:, None] & (j < rank * BITS[s] // 8)[None, :]
                byte = tl.zeros([BLOCK_N, BLOCK_R], tl.int32)
                for k in tl.static_range(8 // BITS[s]):
                    r = latent + 8 // BITS[s] * j + k
                    x = tl.load(p_z[:, None] + r[None, :], mask=mask, other=0.0).to(tl.float32)
                    q = tl.floor(tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))) + 2 ** (BITS[s] - 1)
                    q = tl.where(q == q, tl.minimum(tl.maximum(q, 0.0), 2.0 ** BITS[s] - 1), 2.0 ** (BITS[s] - 1))
                    byte |= q.to(tl.int32) << (k * BITS[s])
                tl.store(p_row[:, None] + (start + j)[None, :], byte.to(tl.uint8), mask=mask)
# fmt: on


def pack_latents(z: Tensor, cache: Tensor, slots: Tensor, side: Keys | Values) -> None:
    """Latents z [n, sum R] to rows `slots` [n] of the cache that `side` reads."""
    num_pages, page_size, _ = cache.shape
    bits = side.sizes.packed[::2]
    scaled = [n for n, b in enumerate(bits) if b < 16]
    choice = launch.write_latents(launch.name(cache.device), z.itemsize)
    pack_latents_kernel[cdiv(z.shape[0], choice.block_n), side.sizes.groups](
        z, z.stride(0), cache, cache.stride(), slots, slots.stride(0), side.runs, side.packs, z.shape[0],
        num_pages * page_size, P=page_size, BITS=bits, LAST=scaled[-1] if scaled else -1,
        PADDING=-len(scaled) % ALIGNMENT, MEAN_BITS=MEAN_BITS,
        BLOCK_N=choice.block_n, BLOCK_R=choice.block_r, num_warps=choice.warps, num_stages=choice.stages,
    )  # fmt: skip
