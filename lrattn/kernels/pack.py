"""New tokens into packed rows: each segment's scale, then its codes."""

import triton
import triton.language as tl
from torch import Tensor

from lrattn.factors import formats
from lrattn.factors.formats import SCALES, WORD
from lrattn.factors.operands import Keys, Values
from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch
from lrattn.kernels.packed import segment
from lrattn.kernels.pieces import words
from lrattn.kernels.tiles import load_run

ALIGNMENT, MEAN_BITS = tl.constexpr(formats.ALIGNMENT), tl.constexpr(formats.MEAN_BITS)
SMALLEST, LARGEST, BROKEN = (tl.constexpr(x) for x in (formats.SMALLEST, formats.LARGEST, formats.BROKEN))
FRACTION, LEAST = tl.constexpr(formats.FRACTION), tl.constexpr(formats.LEAST)
NEAREST, UPWARDS = tl.constexpr(1 << 19), tl.constexpr((1 << 20) - 1)  # added before a scale's fraction is cut


# fmt: off
@launch.kernel
def pack_latents_kernel(
    z, z_stride,             # [n, sum R]       latents
    cache, cache_strides,    # [N, P, bytes]    out, uint8
    slots, slots_stride,     # [n]              int32 or int64, page * P + offset; others than 0 .. N P are skipped
    runs,                    # [G, 3]           int32: first column in z
    packs,                   # [G, 3 n]         int32: segments
    n, num_slots,
    P: tl.constexpr, ROW: tl.constexpr, WORDS: tl.constexpr, BITS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):
    """scale = least that cuts nothing, or next to the root mean square up to MEAN_BITS bits
    code[r] = clamp(floor(z[r] / scale) + 2^(b - 1), 0, 2^b - 1)

    ROW: bytes of all runs of a token. WORDS: bytes of its words of scales, of a group. BITS: of each segment.

    Grid: (token blocks, G). A program writes the runs of BLOCK_N tokens of one group; it reads their latents twice.
    Needs: nothing of the sizes. The division is IEEE, so that codes are those of the reference.
    Reference: lrattn.factors.formats.Format.encode. Derivation: docs/kernels.md#packed.
    """
    g = tl.program_id(1)
    i = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    slot = tl.load(slots + i * slots_stride, mask=i < n, other=-1).to(tl.int64)
    live = (slot >= 0) & (slot < num_slots)
    column, _, _ = load_run(runs, g)
    packs += g * 3 * len(BITS)
    p_z = z + i * z_stride + column
    p_page = cache + slot // P * cache_strides[0]
    p_row = p_page + slot % P * ROW
    p_words = p_page + P * ROW + (slot % P * tl.num_programs(1) + g) * WORDS
    at = tl.arange(0, BLOCK_R)
    for i_word in tl.static_range(WORDS):
        if not holds(BITS, i_word):
            tl.store(p_words + i_word, tl.zeros([BLOCK_N], tl.uint8), mask=live)
    for s in tl.static_range(len(BITS)):
        start, halfwords, latent, rank = segment(packs, s, 1 << 30, BITS[s])
        if BITS[s] == 16:
            p_half = (p_row + start).to(tl.pointer_type(tl.float16))
            for r0 in range(0, rank, BLOCK_R):
                mask = live[:, None] & (r0 + at < rank)[None, :]
                x = tl.load(p_z[:, None] + (latent + r0 + at)[None, :], mask=mask, other=0.0)
                tl.store(p_half[:, None] + (r0 + at)[None, :], x.to(tl.float16), mask=mask)
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
            held = (held - LEAST) >> FRACTION
            held = tl.minimum(tl.maximum(held, SMALLEST), LARGEST)
            scale = ((held << FRACTION) + LEAST).to(tl.float32, bitcast=True)
            held = tl.where(bad > 0, BROKEN, held)
            tl.store(p_words + scale_byte(BITS, s), held.to(tl.uint8), mask=live)
            padded = tl.cdiv(2 * halfwords, ALIGNMENT) * ALIGNMENT
            for j0 in range(0, padded, BLOCK_R):
                j = j0 + at
                mask = live[:, None] & (j < 2 * halfwords)[None, :]
                byte = tl.zeros([BLOCK_N, BLOCK_R], tl.int32)
                for k in tl.static_range(8 // BITS[s]):
                    r = latent + (j % 2 * (8 // BITS[s]) + k) * halfwords + j // 2
                    x = tl.load(p_z[:, None] + r[None, :], mask=mask, other=0.0).to(tl.float32)
                    q = tl.floor(tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))) + 2 ** (BITS[s] - 1)
                    q = tl.where(q == q, tl.minimum(tl.maximum(q, 0.0), 2.0 ** BITS[s] - 1), 2.0 ** (BITS[s] - 1))
                    byte |= q.to(tl.int32) << (k * BITS[s])
                byte = tl.where((j < 2 * halfwords)[None, :], byte, 0)
                inside = live[:, None] & (j < padded)[None, :]
                tl.store(p_row[:, None] + (start + j)[None, :], byte.to(tl.uint8), mask=inside)


@triton.constexpr_function
def scale_byte(bits, n):
    """Where among a group's words the scale of segment n is."""
    scale = sum(b < 16 for b in bits[:n])
    return scale // SCALES * WORD + scale % SCALES


@triton.constexpr_function
def holds(bits, byte):
    """Whether a byte of the words is a scale."""
    return any(b < 16 and scale_byte(bits, n) == byte for n, b in enumerate(bits))
# fmt: on


def pack_latents(z: Tensor, cache: Tensor, slots: Tensor, side: Keys | Values) -> None:
    """Latents z [n, sum R] to rows `slots` [n] of the cache that `side` reads."""
    num_pages, page_size, _ = cache.shape
    bits = side.sizes.packed[::2]
    choice = launch.write_latents(launch.name(cache.device), z.itemsize)
    pack_latents_kernel[cdiv(z.shape[0], choice.block_n), side.sizes.groups](
        z, z.stride(0), cache, cache.stride(), slots, slots.stride(0), side.runs, side.packs, z.shape[0],
        num_pages * page_size, P=page_size, ROW=side.sizes.runs, WORDS=words(side.sizes) // side.sizes.groups,
        BITS=bits, BLOCK_N=choice.block_n, BLOCK_R=choice.block_r, num_warps=choice.warps, num_stages=choice.stages,
    )  # fmt: skip
