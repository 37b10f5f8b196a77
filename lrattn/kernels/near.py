"""The dense window: attention on tokens that are held as they are, and new ones into their places."""

import triton
import triton.language as tl
from torch import Tensor

from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch
from lrattn.kernels.arguments import Call, Near, stride
from lrattn.kernels.tiles import scaled, softmax_step, store_lse

SUMS = 4096  # of a program, whose query rows are as wide as a head


# fmt: off
@launch.kernel
def attend_near_kernel(
    q, q_strides,            # [B, S, Hq, D]    query, rotated, model order
    keys, key_strides,       # [n, sinks + slots, Hkv, D]  keys as attention is given them
    values, value_strides,   # [n, sinks + slots, Hkv, D]
    rows, rows_stride,       # [B]              int32, which of the n; None: 0 .. B
    lens, lens_stride,       # [B]              int32, tokens held
    starts, starts_stride,   # [B]              int32, first token attended to, or None
    firsts, firsts_stride,   # [B]              int32, token of the first row; None: where it starts
    y, y_strides,            # [B, Hq * S, D]   out, float32; rows whose lse is -inf are not written
    lse, lse_strides,        # [B, Hq * S]      out, float32, natural log
    scale, softcap, bound, S, window, recent, sinks, slots, n,
    M: tl.constexpr, D: tl.constexpr, Hkv: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, CHAINED: tl.constexpr,
):
    """y[b, h S + i] = softmax_t(softcap(scale * q[b, i, h] . keys[b, place(t), k])) @ values[b, place(t), k]

    with k = h // M and t among the first `sinks` tokens, of which the j-th has place j, or the `recent` last of query
    i, of which place(t) = sinks + t % slots.

    Grid: (row blocks * Hkv, B). A program owns BLOCK_Q of the M S query rows of one kv head, and all of its tokens.
    Needs: BLOCK_D a power of two >= 32 and >= D; slots that hold the recent tokens of all queries. Online softmax, sums
    are float32.
    Reference: lrattn.attention.near.attend_near. Derivation: docs/kernels.md#near.
    """
    if CHAINED:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    head = tl.program_id(0) % Hkv
    i_b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) // Hkv * BLOCK_Q + tl.arange(0, BLOCK_Q)  # row m S + s of the kv head
    in_q = i < M * S
    s, h = (i % S).to(tl.int64), (head * M + i // S).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    row, length, start, first, held = window_of(
        rows, rows_stride, lens, lens_stride, starts, starts_stride, firsts, firsts_stride, i_b, n
    )
    length = tl.minimum(length, bound)
    own = length - S + i % S
    recents = tl.where(recent > 0, recent + S - 1, 0)  # of all queries; they end with the length
    p_q = q + i_b * q_strides[0] + s * q_strides[1] + h * q_strides[2]
    x = tl.load(p_q[:, None] + d[None, :], mask=in_q[:, None] & (d < D)[None, :], other=0.0)
    p_k = keys + row * key_strides[0] + head.to(tl.int64) * key_strides[2]
    p_v = values + row * value_strides[0] + head.to(tl.int64) * value_strides[2]
    peak = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_Q], tl.float32)
    acc = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for u0 in range(0, tl.where(held, sinks + recents, 0), BLOCK_T):
        u = u0 + tl.arange(0, BLOCK_T)
        leading = u < sinks
        t = tl.where(leading, first + u, length - recents + u - sinks)
        place = tl.where(leading, u, sinks + t % slots).to(tl.int64)
        live = (t >= start) & (t < length) & (leading | (t >= first + sinks))
        loaded = live[:, None] & (d < D)[None, :]
        k = tl.load(p_k + place[:, None] * key_strides[1] + d[None, :], mask=loaded, other=0.0)
        score = scaled(tl.dot(k, tl.trans(x), input_precision="ieee"), scale, softcap, CAPPED)
        mask = live[:, None] & in_q[None, :] & (t[:, None] <= own[None, :])
        mask &= leading[:, None] | (t[:, None] > (own - recent)[None, :])
        if WINDOWED:
            mask &= t[:, None] > (own - window)[None, :]
        score = tl.where(mask, score, float("-inf"))
        p, fade, peak, total = softmax_step(score, peak, total, 0)
        v = tl.load(p_v + place[:, None] * value_strides[1] + d[None, :], mask=loaded, other=0.0)
        acc = tl.dot(tl.trans(p).to(v.dtype), v, acc * fade[:, None], input_precision="ieee")

    out = h * S + s
    store_lse(lse + i_b * lse_strides[0] + out, peak, total, in_q)
    some = total != 0
    acc /= tl.where(some, total, 1.0)[:, None]
    p_y = y + i_b * y_strides[0] + out * y_strides[1]
    tl.store(p_y[:, None] + d[None, :], acc, mask=(in_q & some)[:, None] & (d < D)[None, :])


@launch.kernel
def write_near_kernel(
    k, k_strides,            # [B, S, Hkv, D]   new keys
    v, v_strides,            # [B, S, Hkv, D]   new values
    keys, key_strides,       # [n, sinks + slots, Hkv, D]  out
    values, value_strides,   # [n, sinks + slots, Hkv, D]  out
    rows, rows_stride,       # [B]              int32, which of the n; None: 0 .. B
    lens, lens_stride,       # [B]              int32, tokens held, the new ones included
    firsts, firsts_stride,   # [B]              int32, token of the first row; None: 0
    S, sinks, slots, n,
    D: tl.constexpr, Hkv: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """keys[b, place(t)] = k[b, i],   values[b, place(t)] = v[b, i],   t = lens[b] - S + i

    of tokens among the first `sinks`, whose place is their number there, and of the last `slots`, whose place is
    sinks + t % slots.

    Grid: (token blocks * Hkv, B). A program copies BLOCK_N tokens of one kv head.
    Needs: BLOCK_D >= D.
    Reference: lrattn.attention.near.write_near. Derivation: docs/kernels.md#near.
    """
    head = (tl.program_id(0) % Hkv).to(tl.int64)
    i_b = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) // Hkv * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    row, length, _, first, held = window_of(
        rows, rows_stride, lens, lens_stride, None, 0, firsts, firsts_stride, i_b, n
    )
    t = length - S + i
    leading = t - first < sinks
    live = held & (i < S) & (t >= first) & (leading | (t >= length - slots))
    place = tl.where(leading, t - first, sinks + t % tl.maximum(slots, 1)).to(tl.int64)
    copied = live[:, None] & (d < D)[None, :]
    s = i.to(tl.int64)
    x = tl.load(k + i_b * k_strides[0] + head * k_strides[2] + s[:, None] * k_strides[1] + d[None, :], mask=copied)
    p_keys = keys + row * key_strides[0] + head * key_strides[2]
    tl.store(p_keys + place[:, None] * key_strides[1] + d[None, :], x, mask=copied)
    x = tl.load(v + i_b * v_strides[0] + head * v_strides[2] + s[:, None] * v_strides[1] + d[None, :], mask=copied)
    p_values = values + row * value_strides[0] + head * value_strides[2]
    tl.store(p_values + place[:, None] * value_strides[1] + d[None, :], x, mask=copied)


@triton.jit
def window_of(rows, rows_stride, lens, lens_stride, starts, starts_stride, firsts, firsts_stride, i_b, n):
    """Of sequence i_b: its row, its length, where it starts, the token of its first row, and whether a row is its."""
    row = i_b
    if rows is not None:
        row = tl.load(rows + i_b * rows_stride).to(tl.int64)
    length = tl.maximum(tl.load(lens + i_b * lens_stride), 0)
    start, first = 0, 0
    if starts is not None:
        start = tl.minimum(tl.maximum(tl.load(starts + i_b * starts_stride), 0), length)
        first = start
    if firsts is not None:
        first = tl.minimum(tl.maximum(tl.load(firsts + i_b * firsts_stride), 0), length)
    return row, length, start, first, (row >= 0) & (row < n)
# fmt: on


def attend_near(call: Call, near: Near, y: Tensor, lse: Tensor) -> None:
    """q [B, S, Hq, D] on the tokens that are held as they are: y [B, Hq S, D] and its lse [B, Hq S]."""
    q, rule, tokens, size = call.q, call.rule, call.tokens, call.keys.sizes
    batch, num_queries, query_heads, _ = q.shape
    recent = min(tokens.recent, rule.window or tokens.recent)
    rows, most = query_heads // size.num_heads * num_queries, SUMS // launch.block_d(size.head_dim)
    choice = launch.attend_near(launch.name(q.device), q.itemsize, head=size.head_dim, rows=min(rows, most))
    names, (held, width, *_) = "M D Hkv WINDOWED CAPPED BLOCK_Q BLOCK_D", near.keys.shape
    attend_near_kernel[cdiv(rows, choice.block_q) * size.num_heads, batch](
        q, q.stride(), *tensors(near), *tokens.seen, near.firsts, stride(near.firsts),
        y, y.stride(), lse, lse.stride(), *call.numbers[:4], rule.window, recent, near.sinks,
        max(width - near.sinks, 1), held, BLOCK_T=choice.block_n, **launch.constants(names, call.form, size, choice),
        **launch.pdl(q.device),
    )  # fmt: skip


def write_near(near: Near, k: Tensor, v: Tensor, lens: Tensor) -> None:
    """New keys and values [B, S, Hkv, D] to their places; firsts None: sequences start at 0."""
    batch, new, heads, head_dim = k.shape
    if not batch or not new or not near.keys.numel():
        return
    choice = launch.write_near(launch.name(k.device), k.itemsize)
    write_near_kernel[cdiv(new, choice.block_n) * heads, batch](
        k, k.stride(), v, v.stride(), *tensors(near), lens, lens.stride(0), near.firsts, stride(near.firsts),
        new, near.sinks, near.slots, near.keys.shape[0],
        D=head_dim, Hkv=heads, BLOCK_N=choice.block_n, BLOCK_D=launch.block_d(head_dim),
        num_warps=choice.warps, num_stages=choice.stages,
    )  # fmt: skip


def tensors(near: Near):
    """Keys, values and rows as kernels take them."""
    return near.keys, near.keys.stride(), near.values, near.values.stride(), near.rows, stride(near.rows)
