"""The dense window in an engine: a row for each request that runs, a fixed number of bytes allocated at start.

A row holds a request's first tokens and its last ones as attention is given them (`lrattn.Near`). Tokens that come by a
prefix hit were never in it. The first ones of such a request are copied from a store of the last prefixes seen, and the
last ones of the hit are computed anew by vLLM (`LatentSpec.replay`), without writing their latents again; what those
see before them, they see by latents: rows are filled with what is rebuilt of these.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrattn.attention.cache import sections, unpack
from lrattn.attention.near import Near
from lrattn.factors.layer import LayerFactors
from lrattn.factors.projection import Projection

STORED = 4  # prefixes whose first tokens are kept, for each request that may run
NEVER = 1 << 62
REPLAY = 1  # windows that are computed anew after a hit: docs/vllm.md#the-dense-window


class Came(NamedTuple):
    """Requests that go on behind tokens which they may not have computed.

    requests: of the batch. rows: of the window. computed: tokens before. missing: [n] bool, whose row is not theirs
    yet. homes: rows of the store that hold their first tokens, or -1.
    """

    requests: Tensor
    rows: Tensor
    computed: Tensor
    missing: Tensor
    homes: Tensor


class Rows:
    """Which row of the window each request has; caches with one block table have one of these.

    A row is still a request's own if it held as many tokens, the last of them in the same page, which nobody has
    written to since. vLLM's newer model runner numbers requests; for the older one, on a CPU, rows are found like that.

    Args:
        count: rows; one more takes what nobody reads.
        pages: of the caches, of `size` tokens.
        drafts: tokens of a batch at most that a request may give back.
    """

    def __init__(self, count: int, pages: int, size: int, drafts: int, device: torch.device) -> None:
        self.count, self.size, self.drafts, self.now = count, size, drafts, 0
        self.held: dict[int, list[tuple[int, int]]] = {}  # of rows: what goes on from them, by last page and length
        self.free = list(range(count))  # the one that was used longest ago first
        self.new: set[int] = set()  # those whose request may be here for the first time
        self.twins: list[tuple[int, int]] = []  # of two requests that were one so far: its row, and one for the other

        def table(n: int, value: int = -1) -> Tensor:
            return torch.full((n + 1,), value, dtype=torch.int64, device=device)

        self.last, self.length, self.step, self.hit = table(count), table(count), table(count), table(count, 0)
        self.home, self.written = table(pages), table(pages)  # of a first page, in the store; of a page, when
        self.first, self.used = table(STORED * count), table(STORED * count)  # of a home: its page, and when
        self.used[-1] = NEVER

    def of(self, m: Any, starts: list[int]) -> list[int]:
        """Rows of a batch, on the host. m: vLLM's CommonAttentionMetadata. starts: of its requests, and the end."""
        lens = [b - a for a, b in pairwise(starts)]
        self.now, self.new, self.twins = self.now + 1, set(), []
        if m.req_idx is not None:
            told = [int(i) for i in m.req_idx]
            self.new = {row for row, prefills in zip(told, m.is_prefilling.tolist(), strict=False) if prefills}
            return [row if n else self.count for row, n in zip(told + [self.count] * len(lens), lens, strict=False)]
        if m.seq_lens.device.type != "cpu":
            raise ValueError(
                "lrattn: expected vLLM's model runner V2 on a GPU, for factors with a dense window, got V1: do without "
                "what asks for V1, or make factors with far=(0, 0)"
            )
        owners = {  # who wrote last stands last, and behind all whose drafts it would take back
            key: row
            for back in range(self.drafts, -1, -1)
            for row in self.free
            for key in self.held.get(row, ())[back : back + 1]
            if self.written[key[0]] <= self.step[row]
        }
        rows, ends = [self.count] * len(lens), m.seq_lens.tolist()
        for b, (end, n) in enumerate(zip(ends, lens, strict=True)):
            page = int(m.block_table_tensor[b, max(end - n - 1, 0) // self.size])
            row = owners.get((page, end - n), self.count) if n else self.count
            known = row < self.count
            if known and row not in rows:
                rows[b] = row
            elif n:
                rows[b] = -1 - row if known else -1 - self.count  # a free one, which the others come before
        for b, row in enumerate(rows):
            if row < 0:
                rows[b] = next(free for free in self.free if free not in rows)
                if (twin := -1 - row) < self.count:
                    self.twins.append((twin, rows[b]))
                else:
                    self.new.add(rows[b])
        for a, b in self.twins:
            for x in (self.last, self.length, self.step, self.hit):
                x[b] = x[a]
        for b, row in enumerate(rows):
            lengths = range(ends[b], max(ends[b] - self.drafts, 1) - 1, -1)
            self.held[row] = [(int(m.block_table_tensor[b, (n - 1) // self.size]), n) for n in lengths]
        self.held.pop(self.count, None)
        self.free = [r for r in self.free if r not in rows] + [r for r in self.free if r in rows]
        return rows

    def came(self, m: Any, index: list[int], rows: Tensor, computed: Tensor, replay: int) -> Came:
        """Of requests `index` of the batch, behind tokens that they may not have computed; if they did not, as many as
        `replay` come again, whose latents are there. A chunk that follows one of its own looks alike."""
        device = rows.device
        at = torch.tensor(index, device=device)
        own, before, table = rows[at], computed[at], m.block_table_tensor[at].long()
        page = table.gather(1, (before[:, None] - 1) // self.size)[:, 0]
        same = (self.last[own] == page) & (self.length[own] == before) & (self.written[page] <= self.step[own])
        self.hit[own] = torch.where(same, self.hit[own], before + replay)
        homes = self.home[table[:, 0]]
        self.used[homes] = torch.where(homes < 0, NEVER, self.now)
        return Came(at, own, before, ~same, homes)

    def settle(self, pages: Tensor) -> Tensor:
        """Homes in the store for new requests, whose first pages these are: those used longest ago."""
        homes = self.used.topk(len(pages), largest=False).indices
        old = self.first[homes]
        self.home[torch.where(self.home[old] == homes, old, -1)] = -1  # what stands last is nobody's
        self.home[pages], self.first[homes], self.used[homes] = homes, pages, self.now
        return homes

    def wrote(self, m: Any, rows: Tensor, slots: Tensor) -> None:
        """The batch's tokens are about to be written to these slots."""
        lens = m.seq_lens.long()
        page = m.block_table_tensor.long().gather(1, (lens[:, None] - 1).clamp_min(0) // self.size)[:, 0]
        self.last[rows], self.length[rows], self.step[rows] = page, lens, self.now
        self.written[torch.where(slots < 0, -1, slots // self.size)] = self.now


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

    def place(self, t: Tensor) -> Tensor:
        """Of tokens t of a sequence, in its row."""
        return torch.where(t < self.sinks, t, self.sinks + t % max(self.slots, 1))

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

    def copy(self, twins: list[tuple[int, int]]) -> None:
        """Rows to others."""
        for a, b in twins:
            self.both[:, b] = self.both[:, a]

    def fill(self, came: Came, caches: tuple[Tensor, Tensor | None], table: Tensor) -> None:
        """Rows of requests that come by a prefix hit: their first tokens from the store, or as their latents say, and
        the last ones before the hit's own as their latents say."""
        computed = came.computed[:, None]
        device, leading = computed.device, torch.arange(self.sinks, device=computed.device)
        last = computed - self.recent + torch.arange(self.recent, device=device)
        t = torch.cat((leading.expand(len(computed), -1), last), 1)  # [n, sinks + recent]
        live = came.missing[:, None] & (t < computed) & (t >= 0)
        live[:, self.sinks :] &= last >= self.sinks
        rows = torch.where(live, came.rows[:, None], len(self.keys) - 1)
        at = t.clamp_min(0)
        size = caches[0].shape[1]
        pages = table[came.requests].long().gather(1, at // size)
        zk = latents(self.layer.row_side, caches[0], pages, at % size).to(self.layer.dtype)
        zv = None if caches[1] is None else latents(self.layer.values, caches[1], pages, at % size).to(self.layer.dtype)
        k, v = self.layer.rebuild(zk, zv, at if self.layer.rope is not None else None)
        known = (came.homes >= 0)[:, None, None, None]
        for x, held in zip((k, v), self.stored, strict=True):
            x[:, : self.sinks] = torch.where(known, held[came.homes], x[:, : self.sinks])
        self.write((rows * self.keys.shape[1] + self.place(at)).flatten(), k.flatten(0, 1), v.flatten(0, 1))


def latents(side: Projection, cache: Tensor, pages: Tensor, offsets: Tensor) -> Tensor:
    """Of tokens at offsets [..] of pages [..], whatever lies between them: [.., sum R]."""
    return unpack(side, [x[pages, offsets] for x in sections(side, cache)])
