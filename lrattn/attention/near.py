"""PyTorch truth of the dense window: attention on tokens that are held as they are, and new ones into their places."""

from __future__ import annotations

import torch
from torch import Tensor

from lrattn.attention.dense import masked_attention
from lrattn.factors.shapes import accumulator
from lrattn.kernels.arguments import Call, Near

__all__ = ["Near", "attend_near", "far_of", "write_near"]


def write_near(near: Near, k: Tensor, v: Tensor, lens: Tensor) -> None:
    """New keys and values [B, S, Hkv, D] to their places; firsts None: sequences start at 0."""
    batch, new = k.shape[:2]
    rows, firsts = _rows(near, batch, lens.device), _long(near.firsts, batch, lens.device)
    lens = lens.long().clamp(min=0)[:, None]
    firsts = firsts[:, None].clamp(min=0)
    t = lens - new + torch.arange(new, device=lens.device)
    leading = t - firsts < near.sinks
    live = (t >= firsts) & (leading | (t >= lens - near.slots)) & ((rows >= 0) & (rows < len(near.keys)))[:, None]
    places = torch.where(leading, t - firsts, near.sinks + t % max(near.slots, 1))
    b, i = live.nonzero(as_tuple=True)
    at = rows[b], places[b, i]
    near.keys[at], near.values[at] = k[b, i], v[b, i]


def far_of(call: Call, b: int, start: int, length: int) -> tuple[int, int]:
    """Of sequence b, tokens start .. length: those that its last query sees by their latents, without a window."""
    tokens, near = call.tokens, call.tokens.near
    if near is None:
        return start, length
    first = start if near.firsts is None else int(near.firsts[b])
    return (max(start, max(first, 0) + near.sinks), length - tokens.recent) if call.far[0] else (0, 0)


def attend_near(call: Call, near: Near, b: int, own: range, start: int, length: int) -> tuple[Tensor, Tensor]:
    """Of sequence b, tokens start .. length, the queries whose own tokens are `own`: heads [S, Hq, D] and lse [S, Hq].

    Both are of the dtype of sums.
    """
    q, rule, device = call.q, call.rule, call.q.device
    wide, rows = accumulator(q.dtype), (len(own), q.shape[2])
    row = b if near.rows is None else int(near.rows[b])
    if not 0 <= row < len(near.keys):
        return q.new_zeros(*rows, q.shape[3], dtype=wide), q.new_full(rows, -torch.inf, dtype=wide)
    first = max(start if near.firsts is None else int(near.firsts[b]), 0)
    places = torch.arange(near.keys.shape[1], device=device)
    leading = places < near.sinks
    last = length - 1 - (length - 1 - places + near.sinks) % max(near.slots, 1)  # token of each place, the last there
    t = torch.where(leading, first + places, last)
    i = torch.arange(own.start, own.stop, device=device)[:, None]
    seen = (t >= max(start, 0)) & (t < length) & (t <= i) & (leading | (t >= first + near.sinks))
    seen = seen & (leading | (t > i - call.tokens.recent))
    seen = seen & (t > i - rule.window) if rule.window else seen
    at = seen.any(0).nonzero()[:, 0]
    queries = q[b, own.start - length + q.shape[1] :][: len(own)]
    k, v = near.keys[row, at], near.values[row, at]
    out, lse = masked_attention(queries[None].to(wide), k[None], v[None], seen[None, :, at], rule.scale, rule.softcap)
    return out[0], lse[0]


def _rows(near: Near, batch: int, device: torch.device) -> Tensor:
    return torch.arange(batch, device=device) if near.rows is None else near.rows.long()


def _long(x: Tensor | None, batch: int, device: torch.device) -> Tensor:
    return torch.zeros(batch, dtype=torch.int64, device=device) if x is None else x.long()
