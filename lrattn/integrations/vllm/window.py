"""The dense window in an engine: a row for each request that runs, a fixed number of bytes allocated at start.

A row holds a request's first tokens and its last ones as attention is given them (`lrattn.Near`). Tokens that come by a
prefix hit were never in it. The first ones of such a request are copied from a store of the last prefixes seen, and the
last ones of the hit are computed anew by vLLM (`LatentSpec.replay`), without writing their latents again; what those
see before them, they see by latents: rows are filled with what is rebuilt of these.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lrattn.attention.cache import sections, unpack
from lrattn.attention.near import Near
from lrattn.factors.layer import LayerFactors
from lrattn.factors.projection import Projection

STORED = 4  # prefixes whose first tokens are kept, for each request that may run
REPLAY = 2  # windows that are computed anew after a hit: in the second one tokens have seen the first one's exactly


class Came(NamedTuple):
    """Requests that are here for the first time, or seem so, and go on behind tokens that they did not compute.

    index: of the batch. rows: of the window. computed: tokens before. missing: [n] bool, whose row is not theirs yet.
    homes: rows of the store that hold their first tokens, or -1.
    """

    index: Tensor
    rows: Tensor
    computed: Tensor
    missing: Tensor
    homes: Tensor


class Rows:
    """Which row of the window each request has; a group of caches with one block table has one of these.

    A row is a request's own if the page of its last token was last written from that row, which held as many tokens.
    vLLM's newer model runner numbers requests; without that number they are found by these pages, on the host.

    Args:
        count: requests at most. One more row takes what nobody reads.
        pages: of the caches, of `size` tokens.
    """

    def __init__(self, count: int, pages: int, size: int, device: torch.device) -> None:
        self.count, self.size, self.now = count, size, 0
        self.free = list(range(count))  # the one that was used longest ago first
        self.new: set[int] = set()  # those that changed hands with this batch, where the host knows

        def table(n: int, value: int = -1) -> Tensor:
            return torch.full((n + 1,), value, dtype=torch.int64, device=device)

        self.owner, self.home = table(pages), table(pages)  # of a page: the row it was written from; of a first page
        self.last, self.length, self.hit = table(count), table(count, 0), table(count, 0)
        self.first, self.seen = table(STORED * count), table(STORED * count, 0)  # of a home: its page; when it was used
        self.seen[-1] = 1 << 62  # nobody's

    def of(self, m: Any, starts: list[int]) -> list[int]:
        """Rows of a batch, on the host; m: vLLM's CommonAttentionMetadata; starts: of its query tokens, and the end."""
        lens = [b - a for a, b in pairwise(starts)]
        if m.req_idx is not None:
            rows = [int(i) for i in m.req_idx[: len(lens)]]
            return [r if n else self.count for r, n in zip(rows, lens, strict=False)] + [self.count] * (
                len(lens) - len(rows)
            )
        if m.seq_lens.device.type != "cpu":
            raise ValueError(
                "lrattn: expected vLLM's model runner V2 for factors with a dense window, got V1: unset "
                "VLLM_USE_V2_MODEL_RUNNER, or use factors made with far=(0, 0)"
            )
        rows = [self.count] * len(lens)
        for b, (end, n) in enumerate(zip(m.seq_lens.tolist(), lens, strict=True)):
            if n and (computed := end - n):
                page = int(m.block_table_tensor[b, (computed - 1) // self.size])
                r = int(self.owner[page])
                if r not in rows and r >= 0 and self.last[r] == page and self.length[r] == computed:
                    rows[b] = r
        self.new = set()
        for b, n in enumerate(lens):
            if n and rows[b] == self.count:
                rows[b] = next(r for r in self.free if r not in rows)
                self.new.add(rows[b])
        used = set(rows)
        self.free = [r for r in self.free if r not in used] + [r for r in self.free if r in used]
        return rows

    def came(self, m: Any, index: list[int], rows: Tensor, computed: Tensor, replay: int) -> Came:
        """Of requests `index` of the batch, which did not compute what is before them. A first chunk behind a hit is
        followed by chunks that look like it: their rows are theirs."""
        at = torch.tensor(index, device=rows.device)
        own, before, table = rows[at], computed[at], m.block_table_tensor[at].long()
        page = table.gather(1, (before[:, None] - 1) // self.size)[:, 0]
        missing = (self.owner[page] != own) | (self.last[own] != page) | (self.length[own] != before)
        self.hit[own] = torch.where(missing, before + replay, self.hit[own])
        homes = self.home[table[:, 0]]
        self.now += 1
        self.seen[homes] = torch.where(homes < 0, self.seen[-1], self.now)
        return Came(at, own, before, missing, homes)

    def settle(self, pages: Tensor) -> Tensor:
        """Homes for the first tokens of new requests, whose first pages these are: those used longest ago."""
        self.now += 1
        homes = self.seen.topk(len(pages), largest=False).indices
        old = self.first[homes]
        self.home[torch.where(self.home[old] == homes, old, -1)] = -1  # what stands last is nobody's
        self.home[pages], self.first[homes], self.seen[homes] = homes, pages, self.now
        return homes

    def wrote(self, m: Any, rows: Tensor, slots: Tensor, row_of: Tensor) -> None:
        """The batch's tokens are about to be written: to these slots, of a row each."""
        lens = m.seq_lens.long()
        page = m.block_table_tensor.long().gather(1, (lens[:, None] - 1).clamp_min(0) // self.size)[:, 0]
        self.last[rows], self.length[rows] = page, lens
        at = torch.where(slots < 0, len(self.owner) - 1, slots // self.size)
        self.owner[at] = row_of


class Window:
    """One layer's: `keys` and `values` [requests + 1, sinks + slots, Hkv, D], and the first tokens of prefixes."""

    def __init__(self, layer: LayerFactors, near: tuple[int, int], slots: int, count: int) -> None:
        self.layer, (self.recent, self.sinks), self.slots = layer, near, slots

        def rows(n: int, places: int) -> Tensor:
            shape = 2, n + 1, places, layer.num_kv_heads, layer.head_dim
            return torch.full(shape, 0.0, dtype=layer.dtype, device=layer.device)

        self.both, self.stored = rows(count, self.sinks + slots), rows(STORED * count, self.sinks)
        self.keys, self.values = self.both

    @property
    def nbytes(self) -> int:
        return self.both.nbytes + self.stored.nbytes

    def near(self, rows: Tensor) -> Near:
        """For a call whose sequences have these rows, int32."""
        return Near(self.keys[:-1], self.values[:-1], self.sinks, self.recent, rows)

    def write(self, places: Tensor, k: Tensor, v: Tensor) -> None:
        """Tokens [n, Hkv, D] to places row * (sinks + slots) + place."""
        for to, x in zip(self.both, (k, v), strict=True):
            to.flatten(0, 1).index_copy_(0, places, x)

    def store(self, homes: Tensor, k: Tensor, v: Tensor) -> None:
        """First tokens [n, sinks, Hkv, D] of prefixes."""
        for to, x in zip(self.stored, (k, v), strict=True):
            to.index_copy_(0, homes, x)

    def fill(self, came: Came, caches: tuple[Tensor, Tensor | None], table: Tensor) -> None:
        """Rows of requests that come by a prefix hit: their first tokens from the store, or as their latents say, and
        the last ones before the hit's own as their latents say."""
        computed = came.computed[:, None]
        device, leading = computed.device, torch.arange(self.sinks, device=computed.device)
        last = computed - self.recent + torch.arange(self.recent, device=device)
        t = torch.cat((leading.expand(len(computed), -1), last), 1)  # [n, sinks + recent]
        live = came.missing[:, None] & (t < computed) & (t >= 0)
        live[:, self.sinks :] &= last >= self.sinks
        place = torch.where(t < self.sinks, t, self.sinks + t % max(self.slots, 1))
        rows = torch.where(live, came.rows[:, None], len(self.keys) - 1)
        at = t.clamp_min(0)
        size = caches[0].shape[1]
        pages = table[came.index].long().gather(1, at // size)
        zk = latents(self.layer.row_side, caches[0], pages, at % size).to(self.layer.dtype)
        zv = None if caches[1] is None else latents(self.layer.values, caches[1], pages, at % size).to(self.layer.dtype)
        k, v = self.layer.rebuild(zk, zv, at if self.layer.rope is not None else None)
        known = (came.homes >= 0)[:, None, None, None]
        for x, held in zip((k, v), self.stored, strict=True):
            x[:, : self.sinks] = torch.where(known, held[came.homes], x[:, : self.sinks])
        self.write((rows * self.keys.shape[1] + place).flatten(), k.flatten(0, 1), v.flatten(0, 1))


def latents(side: Projection, cache: Tensor, pages: Tensor, offsets: Tensor) -> Tensor:
    """Of tokens at offsets [..] of pages [..], whatever lies between them: [.., sum R]."""
    return unpack(side, [x[pages, offsets] for x in sections(side, cache)])


def places_of(sinks: int, slots: int, t: np.ndarray) -> np.ndarray:
    """Of tokens t of a sequence, where they lie in its row."""
    return np.where(t < sinks, t, sinks + t % max(slots, 1))
