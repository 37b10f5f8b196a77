"""Scores of one tile by queries that are ready for its latents (absorb.py), for `attend`."""

import triton
import triton.language as tl

from lrattn.kernels.packed import BITS, COLUMN, SIZE, operands
from lrattn.kernels.tiles import load_latents


@triton.jit
def load_absorbed(a, left, Q: tl.constexpr, T: tl.constexpr, ROW: tl.constexpr, LONG: tl.constexpr,
                  BY_LANE: tl.constexpr):  # fmt: skip
    """Absorbed queries of Q rows, T each, by the pieces of a row: [columns, T Q] each; zeros from row `left` on."""
    u, n = (), tl.arange(0, T * Q)
    for i in tl.static_range(len(ROW)):
        r = ROW[i][COLUMN] + tl.arange(0, ROW[i][SIZE] * operands(ROW[i][BITS]))
        at = a + (n * LONG)[:, None] + r[None, :]
        if left is None:
            x = tl.load(at, eviction_policy="evict_last")
        elif BY_LANE:
            x = tl.load(at, mask=(n < left * T)[:, None], other=0.0, eviction_policy="evict_last")
        else:
            x = tl.load(at, mask=(n % Q < left)[:, None], other=0.0, eviction_policy="evict_last")
        u = u + (tl.trans(x),)  # type: ignore[assignment]
    return u


@triton.jit
def load_terms(terms, left, Q: tl.constexpr, T: tl.constexpr, BY_LANE: tl.constexpr):
    """The bias' share of what `load_absorbed` gives: [T Q]; zeros from row `left` on."""
    n = tl.arange(0, T * Q)
    if left is None:
        share = tl.load(terms + n)
    elif BY_LANE:
        share = tl.load(terms + n, mask=n < left * T, other=0.0)
    else:
        share = tl.load(terms + n, mask=n % Q < left, other=0.0)
    return share


@triton.jit
def load_fast(x, left, Q: tl.constexpr, F: tl.constexpr, WIDE: tl.constexpr, BY_LANE: tl.constexpr):
    """A piece of Q rows' fast pairs: both halves [Q, F / 8, 4] of pair 4 i + lane, or [F, Q], pairs adjacent; zeros
    from row `left` on."""
    i = tl.arange(0, Q)
    at = x + (i * WIDE)[:, None] + tl.arange(0, F)[None, :]
    if left is None:
        own = tl.load(at)
    else:
        own = tl.load(at, mask=(i < left)[:, None], other=0.0)
    if BY_LANE:
        fast = tl.split(tl.permute(tl.reshape(own, [Q, 4, F // 8, 2]), (0, 2, 1, 3)))
    else:
        fast = tl.trans(own)
    return fast


@triton.jit
def fast_scores(score, k, x, table, H: tl.constexpr, F: tl.constexpr, BLOCK_T: tl.constexpr, BY_LANE: tl.constexpr):
    """Adds those of keys k [BLOCK_T, H F]: to score [BLOCK_T, H, 4], a sum of each lane, or [H BLOCK_T, BLOCK_Q]."""
    cos, sin = table
    if BY_LANE:
        low, high = tl.split(tl.reshape(k, [BLOCK_T, H, F // 8, 4, 2]))
        x_low, x_high = x
        along = low * x_low[None] + high * x_high[None]
        across = low * x_high[None] - high * x_low[None]
        cos, sin = tl.reshape(cos, [BLOCK_T, 1, F // 8, 4]), tl.reshape(sin, [BLOCK_T, 1, F // 8, 4])
        score += tl.sum(cos * along + sin * across, 2)
    else:
        low, high = tl.split(tl.reshape(k, [BLOCK_T, H, F // 2, 2]))
        cos, sin = cos[:, None, :], sin[:, None, :]
        turned = tl.join(low * cos - high * sin, low * sin + high * cos)
        turned = tl.reshape(turned, [BLOCK_T, H, F]).to(x.dtype)
        turned = tl.reshape(tl.permute(turned, (1, 0, 2)), [H * BLOCK_T, F])
        score = tl.dot(turned, x, score, input_precision="ieee")
    return score


@triton.jit
def streamed(rows, column, rank, live, a, left, Q: tl.constexpr, ROW: tl.constexpr, LONG: tl.constexpr):
    """rows @ a^T, a piece at a time: latents of the rows that `rows` points at, and absorbed queries: [BLOCK_T, Q]."""
    SIZE_R: tl.constexpr = ROW[0][SIZE]
    i = tl.arange(0, Q)
    k = tl.zeros([rows.shape[0], Q], tl.float32)
    for r0 in range(0, rank, SIZE_R):
        r = r0 + tl.arange(0, SIZE_R)
        if left is None:
            x = tl.load(a + (i * LONG)[:, None] + r[None, :])
        else:
            x = tl.load(a + (i * LONG)[:, None] + r[None, :], mask=(i < left)[:, None], other=0.0)
        k = tl.dot(load_latents(rows, column, rank, live, r), tl.trans(x), k, input_precision="ieee")
    return k
