"""Dense attention of queries on columns of which near ones are exact and far ones are not: for prefill, and for what
differentiates through attention. And attention of a few queries with its log-sum-exp: a part of a larger softmax.

A column is a place in the batch's table of tokens, padding included: all rows have as many. Query i sees column j
exactly where j > i - near or j is among the first `sinks` live ones of its row, else as the far keys and values say.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lrattn.factors.shapes import accumulator

BLOCK = 512  # queries at a time
SMALL_BLOCK = 64  # where their scores are held
Pair = tuple[Tensor, Tensor]  # keys and values, [B, Hkv, n, D] each
Older = tuple[Pair, Tensor]  # and which of them are there, [B, n] bool


@dataclass(frozen=True, eq=False)
class Sight:
    """Which columns the queries of columns begin .. end see, and how.

    Args:
        window: columns a query sees back, itself included; None for all.
        pads: [B], first live column of each row; None: 0.
        live: [B, T] bool, more that is not seen; None: nothing more.
        full: [B or 1, S, T] bool, what is seen instead of all that; None: it holds.
        base: [B], where the first `sinks` columns of each row begin; None: at `pads`, which may have moved on since.
        own: from this column on all are seen exactly, whatever `near`; None: no more than that.
    """

    begin: int
    end: int
    near: int = 0
    sinks: int = 0
    window: int | None = None
    pads: Tensor | None = None
    live: Tensor | None = None
    full: Tensor | None = None
    base: Tensor | None = None
    own: int | None = None

    @property
    def plain(self) -> bool:
        """Whether the last queries of a causal mask or a window are all there is to it, but for padding on the left."""
        return self.live is None and self.full is None

    @property
    def all_near(self) -> bool:
        """Whether no query sees a far column."""
        reach = self.end if self.full is not None or self.window is None else min(self.window, self.end)
        return reach <= self.near or self.own == 0

    def _allowed(self, i: Tensor, j: Tensor, first: int, last: int) -> Tensor:
        """i [s, 1], queries first .. last; j [1 or B, 1, n], columns -> [1 or B, s, n] bool."""
        if self.full is not None:
            return _columns(self.full[:, first:last], j)
        seen = j <= i
        if self.window is not None:
            seen = seen & (j > i - self.window)
        if self.live is not None:
            seen = seen & _columns(self.live[:, None], j)
        return seen if self.pads is None else seen & (j >= self.pads[:, None, None])

    def _places(self, first: int, last: int, low: int, high: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """Queries first .. last [s, 1] and columns low .. high [1, 1, n]."""
        i = torch.arange(self.begin + first, self.begin + last, device=like.device)[:, None]
        return i, torch.arange(low, high, device=like.device)[None, None]

    def far(self, first: int, last: int, like: Tensor) -> tuple[slice, Tensor]:
        """The columns that some of these queries may see far, and which of them see which: [1 or B, s, n] bool."""
        low, high = 0, self.end if self.full is not None else max(self.begin + last - self.near, 0)
        high = high if self.own is None else min(high, self.own)
        if self.window is not None and self.full is None:
            low = min(max(self.begin + first - self.window + 1, 0), high)
        i, j = self._places(first, last, low, high, like)
        seen = self._allowed(i, j, first, last)
        if self.near:
            seen = seen & (j <= i - self.near)
        if self.sinks:
            seen = seen & ((j < self._sinks_at) | (j >= self._sinks_at + self.sinks))
        return slice(low, high), seen

    def recent(self, first: int, last: int, held: int, like: Tensor) -> tuple[slice, Tensor]:
        """As `far`, of the last `held` columns, of those that are seen exactly; the slice is among the held ones."""
        low = self.begin + first - self.near + 1
        low = max(low if self.own is None else min(low, self.own), self.end - held)
        high = self.end if self.full is not None else self.begin + last
        i, j = self._places(first, last, low, high, like)
        seen = self._allowed(i, j, first, last) & (j >= self._near_from(i))
        return slice(low - (self.end - held), high - (self.end - held)), seen

    def first(self, first: int, last: int, like: Tensor) -> Tensor:
        """Which queries see which of their row's first `sinks` columns, unless as recent ones: [1 or B, s, sinks]."""
        i, j = self._places(first, last, 0, self.sinks, like)
        j = j + self._sinks_at
        seen = self._allowed(i, j.clamp(max=self.end - 1), first, last)
        return seen & (j < self._near_from(i)) & (j < self.end)

    def _near_from(self, i: Tensor) -> Tensor:
        """From which column on queries i see them exactly."""
        begin = i - self.near + 1
        return begin if self.own is None else begin.clamp(max=self.own)

    @property
    def _sinks_at(self) -> Tensor | int:
        """Where each row's first columns begin, [B, 1, 1], or 0."""
        at = self.pads if self.base is None else self.base
        return 0 if at is None else at[:, None, None]


def _columns(rows: Tensor, j: Tensor) -> Tensor:
    """Columns j [1 or B, 1, n] of rows [1 or B, s, T]: [1 or B, s, n]."""
    batch = max(len(rows), len(j))
    return rows.expand(batch, -1, -1).gather(2, j.expand(batch, rows.shape[1], -1))


def dense_attention(
    q: Tensor,
    sight: Sight,
    far: Pair | None,
    recent: Pair | None = None,
    first: Pair | None = None,
    older: Older | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """q [B, Hq, S, D] -> [B, Hq, S, D]: one softmax over far, recent and first columns.

    Args:
        far: keys and values of all columns, as those that are far see them; None where all are near.
        recent: of the last columns, exact. first: of each row's first live columns, exact.
        older: of tokens before all columns, that every query sees.
        sinks: [Hq], logits that join the denominator alone.

    A query that sees nothing gives zeros. Memory a row: O(BLOCK * T); with softcap or sinks O(SMALL_BLOCK * Hq * T).
    Gradients pass.
    """
    plain = sight.begin == 0 and sight.plain and sight.pads is None and sight.window is None
    if far is not None and plain and not any((recent, first, older)) and not softcap and sinks is None:
        return F.scaled_dot_product_attention(
            q, *far, is_causal=True, scale=scale, enable_gqa=q.shape[1] != far[0].shape[1]
        )
    outs, step = [], SMALL_BLOCK if softcap or sinks is not None else BLOCK
    for a in range(0, q.shape[2], step):
        b = min(a + step, q.shape[2])
        k, v, seen, _ = side_by_side(sight, a, b, far, recent, first, older)
        outs.append(_attend(q[:, :, a:b], k, v, seen[:, None], scale, softcap, sinks))
    return torch.cat(outs, 2) if len(outs) > 1 else outs[0]


def side_by_side(
    sight: Sight, a: int, b: int, far: Pair | None, recent: Pair | None, first: Pair | None, older: Older | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What queries a .. b see of far, recent, first and older columns, one of which at least is given.

    Returns: k, v [B, Hkv, n, D]; which query sees which, [1 or B, b - a, n] bool; and which column each is, [1 or B,
        n], with the older ones before all others.
    """
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    before = 0 if older is None else older[1].shape[1]

    def add(pair: Pair, seen: Tensor, columns: Tensor) -> None:
        if pair[0].shape[2] or not parts:
            parts.append((*pair, seen, columns))

    def places(low: int, pair: Pair) -> Tensor:
        return torch.arange(before + low, before + low + pair[0].shape[2], device=pair[0].device)[None]

    if older is not None:
        add(older[0], older[1][:, None].expand(-1, b - a, -1), places(-before, older[0]))
    if far is not None:
        at, seen = sight.far(a, b, far[0])
        own = far[0][:, :, at], far[1][:, :, at]
        add(own, seen, places(at.start, own))
    if recent is not None:
        held = recent[0].shape[2]
        at, seen = sight.recent(a, b, held, recent[0])
        own = recent[0][:, :, at], recent[1][:, :, at]
        add(own, seen, places(at.start + sight.end - held, own))
    if first is not None:
        columns = torch.arange(sight.sinks, device=first[0].device)[None]
        base = sight.pads if sight.base is None else sight.base
        columns = columns + before if base is None else columns + before + base[:, None]
        add(first, sight.first(a, b, first[0]), columns.clamp(max=before + sight.end - 1))
    if len(parts) == 1:
        return parts[0]
    keys, values, seens, columns_of = zip(*parts, strict=True)
    batch, rows = max(map(len, seens)), max(map(len, columns_of))
    seen = torch.cat([x.expand(batch, -1, -1) for x in seens], 2)
    return torch.cat(keys, 2), torch.cat(values, 2), seen, torch.cat([x.expand(rows, -1) for x in columns_of], 1)


@torch.no_grad()
def probability_rows(
    q: Tensor,
    count: int,
    sight: Sight,
    far: Pair | None,
    recent: Pair | None,
    first: Pair | None,
    older: Older | None,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """What the last queries give to each column: [B, Hq, min(count, S), n + T] float32, n of older ones before T.

    Arguments as of `dense_attention`. Of each query's scores there is a row, and no more.
    """
    last = q.shape[2]
    a = max(last - count, 0)
    k, _, seen, columns = side_by_side(sight, a, last, far, recent, first, older)
    scores = _scores(q[:, :, a:].transpose(1, 2).float(), k.transpose(1, 2).float(), scale, softcap)
    scores = scores.flatten(2, 3).transpose(1, 2).masked_fill(~seen[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat((scores, sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)), 3)
    found = scores.softmax(3).nan_to_num(0.0)[..., : k.shape[2]]  # of a query that sees nothing: nothing
    whole = sight.end + (0 if older is None else older[1].shape[1])
    return found.new_zeros(*found.shape[:3], whole).scatter_add_(3, columns[:, None, None].expand_as(found), found)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """seen [B or 1, 1, s, n]."""
    if softcap or sinks is not None:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        out, lse = masked_attention(q, k, v, seen[:, 0], scale, softcap)
        return with_sinks(out, lse, sinks).transpose(1, 2)
    blind = ~seen.any(-1, keepdim=True)
    everything = seen | blind  # where a query sees nothing: no NaN, and its result is not used
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=everything, scale=scale, enable_gqa=grouped)
    return out.masked_fill(blind, 0.0)


def with_sinks(out: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Attention [.., Hq, D] with its lse [.., Hq], once logits [Hq] have joined the denominator."""
    if sinks is None:
        return out
    return (out.to(lse.dtype) * torch.sigmoid(lse - sinks.to(lse.dtype))[..., None]).to(out.dtype)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float = 0.0
) -> tuple[Tensor, Tensor]:
    """q [B, S, Hq, D], k and v [B, n, Hkv, D], seen [B or 1, S, n] bool -> out [B, S, Hq, D], lse [B, S, Hq].

    A query that sees nothing gives zeros and -inf. Memory O(B * S * Hq * n); sums in float32 (float64 for float64).
    """
    acc = accumulator(q.dtype)
    scores = _scores(q.to(acc), k.to(acc), scale, softcap)
    blind = ~seen.any(-1)[:, :, None, None]  # such a query sees everything until the end: gradients stay finite
    scores = scores.masked_fill(~(seen[:, :, None, None] | blind[..., None]), -torch.inf)
    lse = scores.logsumexp(-1)
    out = torch.einsum("bshmt,bthd->bshmd", (scores - lse[..., None]).exp(), v.to(acc))
    out, lse = out.masked_fill(blind[..., None], 0.0), lse.masked_fill(blind, -torch.inf)
    return out.flatten(2, 3).to(q.dtype), lse.flatten(2, 3)


def _scores(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    """q [B, S, Hq, D], k [B, n, Hkv, D] -> [B, S, Hkv, M, n], before any mask."""
    heads = q.unflatten(2, (k.shape[2], -1)) * scale  # [B, S, Hkv, M, D]
    scores = torch.einsum("bshmd,bthd->bshmt", heads, k)
    return softcap * (scores / softcap).tanh() if softcap else scores
