"""Queries in the space of packed latents whose codes are operands (attend_packed.py), scaled as these need it: once a
call, or once for each chunk of positions, by whose first one they are turned back."""

import triton.language as tl
from torch import Tensor

from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch
from lrattn.kernels.arguments import Call, Span
from lrattn.kernels.packed import BITS, COLUMN, FIRST, SEGMENT, SEGMENTS, SIZE
from lrattn.kernels.pieces import PLANES, pieces
from lrattn.kernels.planes import LOG2_E
from lrattn.kernels.tiles import blocks_of, load_pairs, load_run, turned_back


# fmt: off
@launch.kernel
def absorb_packed_kernel(
    q, q_strides,            # [B, S, Hq, D]    query, model order
    lens, lens_stride,       # [B]              int32, tokens held
    starts, starts_stride,   # [B]              int32, first token attended to, or None
    offsets, offsets_stride, # [B]              int32, token less position, or None
    turns,                   # [max_chunk, ROTARY]  float32, cos and sin of a pair adjacent, of chunks' first positions
    uk,                      # [sum Rk, C * D]  key basis; pairs adjacent with CHUNK
    runs, heads,             # [G, 3], [Hkv]    int32: column, rank, first row of uk; place -> kv head
    bias,                    # [Hkv, D]         float32, by place, as uk; None without
    norms,                   # [Hkv]            float32, by place: of the longest row of a head's basis
    packs,                   # [G, 3 n]         int32: segments
    a, a_strides,            # [B, chunks, Hq * S, columns]  out, float16, or float32 of such a layer
    terms, terms_strides,    # [B, chunks, n, Hq * S]        out, float32
    scale, bound, S, window, max_chunk, first_tile, tiles,
    KEYS: tl.constexpr,
    C: tl.constexpr, M: tl.constexpr, D: tl.constexpr, Hkv: tl.constexpr,
    CHUNK: tl.constexpr, ROTARY: tl.constexpr, INTERLEAVED: tl.constexpr, WINDOWED: tl.constexpr,
    MAGIC: tl.constexpr, CHAINED: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr,
):
    """a[b, c, h S + i, n, m] = log2(e) scale (x @ uk[k]^T)[latents of plane m of piece n] / (2^position(m) factor)
    terms[b, c, n, h S + i] = sum_m middle a[.., n, m];  after those of all pieces: factor, log2(e) scale x . bias[k]

    x = Rot(-p) q[b, i, h],   k = h // M, p the first position of the c-th chunk, counted from that of the first of the
    tiles. Without CHUNK there is one, and x = q. KEYS are the pieces of a row. `factor`, a power of two of each row,
    brings its largest below 2^15: |x| max_r |uk[k, r]| is no smaller, and known to each program alone. It takes in what
    codes, as float16, and scales lack: 2^24 (1 with MAGIC) and 2^-8.

    Grid: (row blocks * Hkv, pieces, B). A program owns BLOCK_Q rows of one kv head, of all chunks, and one piece,
    BLOCK_R columns at a time: the basis is read once per row block. Columns past a segment's end, or the key rank, are
    zero.
    Needs: BLOCK_D a power of two >= 32 and >= D. Sums are float32.
    Reference: lrattn.attention.reference._absorbed_scores. Derivation: docs/kernels.md#absorbed-scores, #packed.
    """
    if CHAINED:
        tl.extra.cuda.gdc_launch_dependents()
    i_b = tl.program_id(2).to(tl.int64)
    first, chunks, _ = blocks_of(lens, lens_stride, starts, starts_stride, offsets, offsets_stride, i_b, bound, S,
                                 window, first_tile, tiles, WINDOWED, CHUNK, BLOCK_T)
    n = tl.program_id(0) // Hkv * BLOCK_Q + tl.arange(0, BLOCK_Q)  # row of the kv head: c (M S) + m S + s
    if tl.program_id(0) // Hkv * BLOCK_Q >= chunks * M * S:
        return
    place, d = tl.program_id(0) % Hkv, tl.arange(0, BLOCK_D)
    i = n % (M * S)
    c, s, head = (n // (M * S)).to(tl.int64), (i % S).to(tl.int64), (tl.load(heads + place) * M + i // S).to(tl.int64)
    in_q, row, at = c < chunks, head * S + s, None
    q += i_b * q_strides[0] + s * q_strides[1] + head * q_strides[2]
    if CHUNK:
        at = first + c
    low, high = load_pairs(q, 0, BLOCK_D, in_q, D, ROTARY, INTERLEAVED)
    squared = tl.sum(low * low + high * high, 1)  # before it is turned: the same of all chunks
    low, high = turned_back(low, high, turns, at, max_chunk, 0, BLOCK_D, ROTARY)
    x = tl.reshape(tl.join(low, high), [BLOCK_Q, BLOCK_D])
    _, rank, r0 = load_run(runs, place // C)
    p_a = a + i_b * a_strides[0] + c * a_strides[1] + row * a_strides[2]
    p_terms = terms + i_b * terms_strides[0] + c * terms_strides[1] + row
    largest = tl.sqrt(squared) * tl.load(norms + place) * tl.abs(scale) * LOG2_E
    exponent = ((largest.to(tl.int32, bitcast=True) >> 23) & 255) - 127  # of what is not finite 128
    exponent = tl.minimum(tl.maximum(exponent, -40), 100)  # below that scores are nothing
    up = tl.exp2((14 - exponent).to(tl.float32)) * (scale * LOG2_E)
    if tl.program_id(1) == 0:
        factor = tl.exp2((exponent + (2 - 24 * MAGIC)).to(tl.float32))
        tl.store(p_terms + len(KEYS) * terms_strides[2], factor, mask=in_q)
        if bias is not None:
            share = tl.sum(x * tl.load(bias + place * D + d, mask=d < D, other=0.0)[None, :], 1)
            tl.store(p_terms + (len(KEYS) + 1) * terms_strides[2], share * scale * LOG2_E, mask=in_q)
    rounded = x.to(q.dtype.element_ty)
    rest = (x - rounded.to(tl.float32)).to(rounded.dtype)  # what turning left of it
    segment, bits, begin, size, column = 0, 16, 0, 1, 0
    for k in tl.static_range(len(KEYS)):
        if tl.program_id(1) == k:
            segment, bits, begin = KEYS[k][SEGMENT], KEYS[k][BITS], KEYS[k][FIRST]
            size, column = KEYS[k][SIZE], KEYS[k][COLUMN]
    packs += place // C * 3 * KEYS[0][SEGMENTS]
    halfwords, latent = tl.load(packs + 3 * segment + 1) * bits // 16, tl.load(packs + 3 * segment + 2)
    middles = tl.zeros([BLOCK_Q], tl.float32)
    for j0 in range(0, size * (16 // bits), BLOCK_R):
        j = j0 + tl.arange(0, BLOCK_R)
        m, h = j // size, begin + j % size
        r = latent + m * halfwords + h
        inside = j < size * (16 // bits)
        there = inside & (h < halfwords) & (r < rank)
        u = tl.load(uk + (r0 + r)[:, None] * (C * D) + (place % C * D + d)[None, :],
                    mask=there[:, None] & (d < D)[None, :], other=0.0, eviction_policy="evict_last")
        moved = tl.where(bits >= 8, 0, tl.where(bits == 4, m % 2 * 4, m * 2 % 10))
        weight = tl.exp2(-moved.to(tl.float32))
        u = tl.trans(u.to(rounded.dtype))
        got = tl.dot(rounded, u, input_precision="ieee")
        if CHUNK:
            got = tl.dot(rest, u, got, input_precision="ieee")
        got = (got * up[:, None] * weight[None, :]).to(a.dtype.element_ty)
        tl.store(p_a[:, None] + (column + j)[None, :], got, mask=in_q[:, None] & inside[None, :])
        middles += tl.sum(got.to(tl.float32) * (1.0 / weight)[None, :], 1)
    middle = tl.where(bits == 16, 0.0, ((1 << bits) - 1) * 0.5)
    middles *= middle * tl.where(MAGIC, 1.0, 2.0**-24)
    tl.store(p_terms + tl.program_id(1) * terms_strides[2], middles, mask=in_q)
# fmt: on


def absorb_packed(call: Call, a: Tensor, terms: Tensor, span: Span, codes: launch.Launch) -> None:
    """Queries [B, S, Hq, D] for each chunk that tiles of `span` are in, one where keys have no chunks: a [B, chunks,
    Hq S, columns], and what goes with it, terms [B, chunks, n, Hq S]. codes: the launch of attend_packed."""
    q, keys, tokens, size = call.q, call.keys, call.tokens, call.keys.sizes
    row, rows = pieces(size, PLANES), a.shape[1] * q.shape[1] * q.shape[2] // size.num_heads
    choice = launch.absorb_packed(launch.name(q.device), q.itemsize)
    block_q = min(choice.block_q, launch.block_q(rows))
    names = "C M D Hkv CHUNK ROTARY INTERLEAVED WINDOWED BLOCK_D BLOCK_R"
    absorb_packed_kernel[cdiv(rows, block_q) * size.num_heads, len(row), q.shape[0]](
        q, q.stride(), *tokens.seen, *tokens.lag, keys.turns, keys.rows, keys.runs, keys.heads, keys.bias, keys.norms,
        keys.packs, a, a.stride(), terms, terms.stride(), call.rule.scale, *call.limits, size.max_position, *span[:2],
        KEYS=row, MAGIC=codes.magic, CHAINED=launch.chained(q.device), BLOCK_Q=block_q, BLOCK_T=codes.block_t,
        **launch.constants(names, call.form, size, choice),
    )  # fmt: skip
