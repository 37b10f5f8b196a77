"""Dense keys or values of the cached tokens, for a dense prefill kernel."""

import triton.language as tl
from torch import Tensor

from lrattn.factors.operands import Keys, Values
from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch
from lrattn.kernels.arguments import Tokens
from lrattn.kernels.packed import SIZE, located, segments
from lrattn.kernels.pieces import streamed, strides
from lrattn.kernels.rows import keys_streamed
from lrattn.kernels.tiles import lag_of, load_latents, load_rows, load_run, load_turns, pair_columns, slots


# fmt: off
@launch.kernel
def rebuild_kernel(
    cache, cache_strides,    # [N, P, width]    key or value rows by page
    pages, pages_stride,     # [B, pages]       int32
    lens, lens_stride,       # [B]              int32, tokens held
    ends,                    # [B]              int64, rows of x up to and with each sequence
    basis,                   # [sum R, C * D]   for keys with pairs adjacent
    runs, heads,             # [G, 3], [Hkv]    int32: column, rank, first row of basis; place -> kv head
    packs,                   # [G, 3 n]         int32: segments of packed rows; None where they are plain
    bias,                    # [Hkv, D]         float32, as the basis; None without
    turns,                   # [max_position, ROTARY]  float32, cos and sin of a pair adjacent; None: no rotation
    positions, pos_strides,  # [N, P]           int32, or None: the index in the sequence
    offsets, offsets_stride, # [B]              int32, token less position, or None
    x, x_strides,            # [sum T, Hkv, D]  out, model order
    bound, tiles, rows, max_position,
    C: tl.constexpr, D: tl.constexpr, P: tl.constexpr, Hkv: tl.constexpr,
    ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, CHUNK: tl.constexpr,
    ROW: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """x[ends[b] - T_b + t, k] = Rot(t) (cache[b, t, g] @ basis[k] + bias[k])

    In chunks of positions the rotation is that of the chunk's first, and rows of `turns` are of chunks.

    Grid: (Hkv * tiles * B). A program owns BLOCK_T tokens of one kv head; a piece of ROW goes along each segment.
    Needs: BLOCK_D a power of two >= 32 and >= D, P a multiple of 16. Sums are float32.
    Reference: lrattn.attention.reference.rebuild. Derivation: docs/kernels.md#rebuild.
    """
    place = tl.program_id(0) % Hkv
    i_b = (tl.program_id(0) // Hkv // tiles).to(tl.int64)
    length = tl.minimum(tl.maximum(tl.load(lens + i_b * lens_stride), 0), bound)
    t0 = tl.program_id(0) // Hkv % tiles * BLOCK_T
    if t0 >= length:
        return
    t = t0 + tl.arange(0, BLOCK_T)
    live = t < length
    column, rank, r0 = load_run(runs, place // C)
    head = tl.load(heads + place)
    d = tl.arange(0, BLOCK_D)
    page, offset = slots(pages + i_b * pages_stride, t0, t, live, P, BLOCK_T)
    p_cache = located(cache, cache_strides, page, offset, packs, place // C, Hkv // C, P)
    segs = segments(packs, place // C, column, rank, ROW)
    if packs is not None:
        k = keys_streamed(p_cache, segs, live, basis, C * D, r0, place % C * D, d, D, ROW, x)
    else:  # as keys_streamed but for the order of the loads, which registers depend on
        k = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for r in range(0, rank, ROW[0][SIZE]):
            z = load_latents(p_cache[0], column, rank, live, r + tl.arange(0, ROW[0][SIZE]))
            u = load_rows(basis, C * D, r0, rank, place % C * D, d, D, r + tl.arange(0, ROW[0][SIZE])).to(z.dtype)
            k = tl.dot(z, u, k, input_precision="ieee")
    if bias is not None:
        k += tl.load(bias + place * D + d, mask=d < D, other=0.0)[None, :]
    at = tl.load(ends + i_b) - length + t
    p_x = x + at * x_strides[0] + head * x_strides[1]
    stored = live & (at < rows)
    if turns is None:
        tl.store(p_x[:, None] + d[None, :], k.to(x.dtype.element_ty), mask=stored[:, None] & (d < D)[None, :])
    else:
        j = tl.arange(0, BLOCK_D // 2)
        low, high = pair_columns(j, D, ROTARY, INTERLEAVED)
        k_low, k_high = tl.split(tl.reshape(k, [BLOCK_T, BLOCK_D // 2, 2]))
        where = t
        if positions is not None:
            where = tl.load(positions + page * pos_strides[0] + offset * pos_strides[1], mask=live, other=0)
        if CHUNK:
            lag, _ = lag_of(offsets, offsets_stride, i_b, BLOCK_T)
            where = tl.maximum(t.to(tl.int64) - lag, 0) // CHUNK
        cos, sin = load_turns(turns, where, max_position, d, ROTARY)
        turned = (k_low * cos - k_high * sin).to(x.dtype.element_ty)
        tl.store(p_x[:, None] + low[None, :], turned, mask=stored[:, None] & (2 * j < D)[None, :])
        turned = (k_low * sin + k_high * cos).to(x.dtype.element_ty)
        tl.store(p_x[:, None] + high[None, :], turned, mask=stored[:, None] & (high < D)[None, :])
# fmt: on


def rebuild_keys(ck: Tensor, keys: Keys, tokens: Tokens, ends: Tensor, x: Tensor) -> None:
    """Keys of all tokens, rotated, to x [sum T, Hkv, D]."""
    size = keys.sizes
    _rebuild(
        ck, keys, keys.turns, tokens, ends, x, max_position=size.max_position,
        ROTARY=size.rotary_dim, INTERLEAVED=bool(size.interleaved), CHUNK=size.chunk,
    )  # fmt: skip


def rebuild_values(cv: Tensor, values: Values, tokens: Tokens, ends: Tensor, x: Tensor) -> None:
    """Values of all tokens to x [sum T, Hkv, D]."""
    _rebuild(cv, values, None, tokens, ends, x, max_position=0, ROTARY=0, INTERLEAVED=False, CHUNK=0)


def _rebuild(cache, side, turns, tokens, ends, x, *, max_position, **constants):
    page_size, head_dim, packed = cache.shape[1], x.shape[2], side.sizes.packed
    choice = launch.rebuild(launch.name(cache.device), x.itemsize, head=launch.block_d(head_dim), packed=bool(packed))
    tiles = cdiv(tokens.bound, choice.block_n)
    programs = side.sizes.num_heads * tiles * tokens.lens.shape[0]
    if not programs or not x.shape[0]:
        return
    rebuild_kernel[(programs,)](
        cache, strides(cache, side), *tokens.paged, *tokens.seen[:2], ends,
        side.rows, side.runs, side.heads, side.packs, side.bias, turns, *tokens.placed, *tokens.lag,
        x, x.stride(), tokens.bound, tiles, x.shape[0], max_position,
        C=side.sizes.group_size, D=head_dim, P=page_size, Hkv=side.sizes.num_heads, **constants,
        ROW=streamed(side.sizes, choice.block_r), BLOCK_D=launch.block_d(head_dim),
        BLOCK_T=choice.block_n, num_warps=choice.warps, num_stages=choice.stages,
    )  # fmt: skip
