"""One layer of a LatentCache: pages of latents, and a dense window."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from lrattn.attention.cache import allocate_cache, unpack
from lrattn.attention.dense import Pair
from lrattn.attention.ops import write_latents
from lrattn.factors.record import Factors
from lrattn.integrations.transformers.columns import PAGE, Columns, positions_at
from lrattn.integrations.transformers.fit import check_fit
from lrattn.integrations.transformers.handle import LatentKeys
from lrattn.models.masks import Said

Latents = tuple[Tensor, Tensor | None]  # of them; None: the first row serves both


class Written(NamedTuple):
    """A pass's columns in one layer, as attention reads them.

    begin: columns before it. latents: [B, S, width] each. positions: [B, S], where keys were turned to, or None.
    recent: exact keys and values [B, Hkv, n, D] of the last columns before the pass and of its own; None: recent=0.
    first: of each row's first live columns, [B, Hkv, sinks, D]; None: sinks=0.
    """

    begin: int
    latents: Latents
    positions: Tensor | None
    recent: Pair | None
    first: Pair | None


class LatentLayer(CacheLayerMixin):  # type: ignore[misc]
    """One layer of a LatentCache: pages of latents, [batch * pages, 16, width] each, and a dense window.

    Args:
        near: its columns, recent and sinks. held: False for one that is thrown away after its pass: it has no pages.
    """

    is_croppable = True

    def __init__(
        self,
        factors: Factors,
        index: int,
        near: tuple[int, int],
        columns: Columns,
        backend: str | None = None,
        held: bool = True,
    ) -> None:
        super().__init__()
        self.whole, self.index, self.factors = factors, index, factors.layers[index]
        (self.recent, self.sinks), self.columns, self.backend, self.held = near, columns, backend, held
        self.reset()

    @torch.inference_mode(False)
    def reset(self) -> None:
        self.pages: Latents = allocate_cache(self.factors, 0, PAGE)
        self.ring: Pair | None = None  # the last `recent` columns
        self.first: Pair | None = None  # the first `sinks` of each row
        self.before: tuple[Pair | None, Pair | None] | None = None  # the two, until every layer holds the pass

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first `write` makes room."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys as a handle for the attention function, which writes them, and values as they are."""
        return LatentKeys.of(key_states, value_states, self), value_states

    def write(self, keys: Pair, position_ids: Tensor | None, said: Said, module: nn.Module) -> Written:
        """Holds a pass's keys and values [B, Hkv, S, D] of an attention module.

        Raises: ValueError if they do not fit, or positions are beyond the rope; the cache is then as it was.
        """
        check_fit(self.whole, self.index, *keys, module)
        layer, columns, begin, new = self.factors, self.columns, self.columns.count, keys[0].shape[2]
        if not columns.written:
            columns.start(len(keys[0]), new, layer.device, position_ids, said)
        positions = None
        if layer.rope is not None and columns.at is not None:
            if columns.last >= (most := layer.rope.max_position):
                raise ValueError(f"position_ids: expected at most {most - 1}, as the rope has it, got {columns.last}")
            positions = columns.at.to(layer.device)
        k, v = (x.transpose(1, 2) for x in keys)
        latents = layer.project(k, v, positions)
        recent, first = self._with_ring(keys), self._with_first(keys)
        if self.held:
            self._store(latents)
            self.before = self.ring, self.first
            self.ring = None if recent is None else (self._kept(recent[0]), self._kept(recent[1]))
            self.first = None if first is None else (first[0].detach(), first[1].detach())
            columns.wrote(new)
        return Written(begin, latents, positions, recent, first)

    @torch.no_grad()
    def _store(self, latents: Latents) -> None:
        """Latents into the pass's slots, in pages that are as many as the columns have by now."""
        columns, layer = self.columns, self.factors
        if len(self.pages[0]) != columns.batch * columns.pages:
            with torch.inference_mode(False):
                grown = allocate_cache(layer, columns.batch * columns.pages, PAGE)
                for new, old in zip(grown, self.pages, strict=True):
                    if new is not None and old is not None and columns.count:
                        rows = old.unflatten(0, (columns.batch, -1))
                        new.unflatten(0, (columns.batch, -1))[:, : rows.shape[1]] = rows
                self.pages = grown
        assert columns.slots is not None
        zk, zv = latents[0].detach(), None if latents[1] is None else latents[1].detach()
        write_latents(layer, zk, zv, *self.pages, columns.slots.to(layer.device), backend=self.backend)

    def _with_ring(self, keys: Pair) -> Pair | None:
        """As many columns before the pass as its first query sees exactly, and its own."""
        if not self.recent or self.ring is None:
            return keys if self.recent else None
        last = max(self.ring[0].shape[2] - (self.recent - 1), 0)
        return torch.cat((self.ring[0][:, :, last:], keys[0]), 2), torch.cat((self.ring[1][:, :, last:], keys[1]), 2)

    def _kept(self, x: Tensor) -> Tensor:
        """The last columns of what `_with_ring` gave, in memory of their own."""
        last = x[:, :, -self.recent :].detach()
        return last if self.ring is not None and last.shape == x.shape else last.clone()

    def _with_first(self, keys: Pair) -> Pair | None:
        """Each row's first live columns, those of the pass included."""
        columns, new = self.columns, keys[0].shape[2]
        if not self.sinks or (columns.firm is not None and columns.count >= columns.firm):
            return self.first
        at = torch.arange(self.sinks, device=keys[0].device)[None] - columns.count
        at = at if columns.base is None else at + columns.base[:, None].to(at.device)
        inside, at = ((x[:, None, :, None]) for x in ((at >= 0) & (at < new), at.clamp(0, new - 1)))
        sides = []
        for i, x in enumerate(keys):
            found = x.gather(2, at.expand(*x.shape[:2], -1, x.shape[3]))
            sides.append(torch.where(inside, found, 0.0 if self.first is None else self.first[i]))
        return sides[0], sides[1]

    def undo(self) -> None:
        if self.before is not None:
            (self.ring, self.first), self.before = self.before, None

    def places(self, columns: int) -> dict[str, Any]:
        """Where its first `columns` columns lie, as the ops on a cache take it."""
        held, device = self.columns, self.factors.device
        assert held.table is not None
        positions = None if self.factors.rope is None or held.positions is None else held.positions.view(-1, PAGE)
        return {
            "block_table": held.table.to(device),
            "seq_lens": torch.full((held.batch,), columns, dtype=torch.int32, device=device),
            "positions": None if positions is None else positions.to(device),
        }

    @torch.inference_mode(False)
    @torch.no_grad()
    def crop(self, columns: int) -> None:
        """To its first columns. What is near again but no longer held comes from latents."""
        if self.ring is None:
            return
        low, begin = max(columns - self.recent, 0), self.columns.count - self.ring[0].shape[2]
        held = slice(max(low - begin, 0), max(columns - begin, 0))
        lost = self._rebuilt(low, max(min(begin, columns), low))
        k, v = (torch.cat((x, own[:, :, held]), 2) for x, own in zip(lost, self.ring, strict=True))
        self.ring = k, v

    def _rebuilt(self, begin: int, end: int) -> Pair:
        """Keys and values of some columns from their latents, [B, Hkv, n, D] each."""
        layer, held = self.factors, self.columns
        sides = []
        for side, pages in zip((layer.row_side, layer.values), self.pages, strict=True):
            rows = None if pages is None else pages.unflatten(0, (held.batch, -1)).flatten(1, 2)[:, begin:end]
            sides.append(None if rows is None else unpack(side, rows).to(layer.dtype))
        positions = None
        if layer.rope is not None:
            own = None if held.positions is None else held.positions[:, begin:end]
            positions = positions_at(own, begin, held.batch, end - begin, layer.device)
        assert sides[0] is not None
        k, v = layer.rebuild(sides[0], sides[1], positions)
        return k.transpose(1, 2), v.transpose(1, 2)

    @torch.inference_mode(False)
    @torch.no_grad()
    def select(self, rows: Tensor) -> None:
        """Rows `rows` of the batch, as the columns still know it, become the new one."""
        rows, shape = rows.to(self.factors.device), (self.columns.batch, -1)
        k, v = (None if x is None else x.unflatten(0, shape)[rows].flatten(0, 1) for x in self.pages)
        assert k is not None
        self.pages = k, v
        self.ring, self.first = (None if x is None else (x[0][rows], x[1][rows]) for x in (self.ring, self.first))

    @property
    def tensors(self) -> list[Tensor]:
        pairs = self.pages, self.ring, self.first, *(self.before or ())
        return [x for pair in pairs if pair is not None for x in pair if x is not None]

    def get_seq_length(self) -> int:
        return self.columns.count

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All columns, also where a window slides: masks are then of columns."""
        return self.columns.count + query_length, 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length  # its name in 5.5
