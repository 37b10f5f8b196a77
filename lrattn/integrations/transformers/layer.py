"""One layer of a LatentCache: pages of latents, and a dense window."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

from lrattn.attention.cache import allocate_cache
from lrattn.attention.dense import Pair
from lrattn.attention.near import Near
from lrattn.attention.ops import write_latents, write_near
from lrattn.factors.record import Factors
from lrattn.integrations.transformers.columns import PAGE, Columns
from lrattn.integrations.transformers.fit import check_fit, layer_of, warn_beyond, warn_untold
from lrattn.integrations.transformers.kept import Kept, Latents, latents_of, rows_of
from lrattn.integrations.transformers.keys import LatentKeys, Written
from lrattn.models.masks import Said

STEP = 16  # columns of a pass that a cache of a fixed size takes in place


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
        self.whole, self.index, self.factors = factors, index, layer_of(factors, index)
        (self.recent, self.sinks), self.columns, self.backend, self.held = near, columns, backend, held
        self.donor: LatentLayer | None = None  # the layer that this one reads; None: itself
        self.holder: LatentLayer = self  # of the rows that a run of layers shares: the last of them
        self.row: Tensor | None = None  # of a holder: what the run's layers have added up, in the pass under way
        self.readers = self.unread = 0  # others that read it, and those still to do so in the pass under way
        self.latest: LatentKeys | None = None  # of that pass, until the last of them did
        self.reset()

    def read_from(self, donor: LatentLayer) -> None:
        """This layer holds nothing, and reads what another one holds."""
        self.donor = donor
        donor.readers, self.columns.readers = donor.readers + 1, self.columns.readers + 1

    @property
    def pages(self) -> Latents:
        """Of the row's, which the layers of a run share."""
        return self.holder.held_pages

    @pages.setter
    def pages(self, pages: Latents) -> None:
        self.holder.held_pages = pages

    @torch.inference_mode(False)
    def reset(self) -> None:
        self.held_pages: Latents = allocate_cache(self.factors, 0, PAGE)
        self.row = None
        self.window = self._empty(0, 0)
        self.next: Near | None = None  # the window, once every layer holds the pass under way
        self.kept: Kept | None = None  # of columns that are gone
        self.rest: Kept | None = None  # those that were not kept, by factors of fewer bytes
        self.chosen: Tensor | None = None  # of kept tokens and columns, those that will be: see selecting.py
        self.choice: object = None
        self.given: list[Tensor] = []  # of a holder: probabilities of the run's layers, in the pass under way
        self.latest = None

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first `write` makes room."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys as a handle for the attention function, which writes them, and values as they are; or those of the layer
        that this one reads. Raises: ValueError where that one has not come yet, or is on another device."""
        donor = self.donor
        if donor is None:
            new = LatentKeys.of(key_states, value_states, self)
            self.latest, self.unread = new if self.readers else None, self.readers
            return new, value_states
        if donor.latest is None or key_states.device != donor.factors.device:
            expected = f"layer {donor.index}, which it reads, to come first in a pass, on its device"
            raise ValueError(f"layer {self.index}: expected {expected}")
        new, donor.unread = donor.latest, donor.unread - 1
        donor.latest = new if donor.unread else None
        self.columns.wrote(key_states.shape[2])
        return new, new.plain_values

    def write(self, keys: Pair, position_ids: Tensor | None, said: Said, module: nn.Module, few: bool) -> Written:
        """Holds a pass's keys and values [B, Hkv, S, D] of an attention module.

        few: after columns that are held. They are then written to the window in place, where those that they take the
        place of are near no query any more, even if the pass counts for nothing. Of others there is a new window.
        Raises: ValueError if they do not fit, or positions are beyond the rope; the cache is then as it was.
        """
        check_fit(self.whole, self.index, *keys, module)
        layer, columns, begin, new = self.factors, self.columns, self.columns.count, keys[0].shape[2]
        if not columns.written:
            if columns.turned or columns.chunked:
                warn_untold(self.whole, module, position_ids is not None)
            columns.start(len(keys[0]), new, layer.device, position_ids, said)
        if layer.turns is not None and columns.last >= (most := len(layer.turns) * (layer.chunk or 1)):
            raise ValueError(f"position_ids: expected at most {most - 1}, as the rope has it, got {columns.last}")
        if layer.max_position is not None and columns.last >= layer.max_position:
            warn_beyond(self.whole, layer.max_position, columns.last)
        positions = columns.positions_now(layer, new)
        k, v = (x.transpose(1, 2) for x in keys)
        near = None if few else self.near_pairs(begin, keys)
        if self.joined:
            latents = self._added(layer.project(k, v, positions, wide=True)[0])
        else:
            latents = layer.project(k, v, positions)
        if self.held:
            self._store(latents)
            self.next = self._with(k, v, few)
            columns.wrote(new)
        return Written(begin, latents, positions, keys, near)

    @property
    def joined(self) -> bool:
        """Whether its rows are those of several layers: whole once the last of them has written."""
        return self.whole.span > 1

    @torch.no_grad()
    def _added(self, part: Tensor) -> Latents | None:
        """This layer's part to the row of its run, [B, S, width]; the row, once it is whole."""
        holder = self.holder
        first = self.index == self.whole.run(self.index)[0]
        holder.row = part if first else holder.row + part  # type: ignore[operator]
        if holder is not self:
            return None
        row, self.row = holder.row, None
        return row.to(self.factors.dtype), None

    @torch.no_grad()
    def _store(self, latents: Latents | None) -> None:
        """Latents, where there are some yet, into the pass's slots, in pages that are as many as the columns have by
        now."""
        columns, layer = self.columns, self.factors
        if len(self.pages[0]) != columns.batch * columns.pages:
            with torch.inference_mode(False):
                grown = allocate_cache(layer, columns.batch * columns.pages, PAGE)
                for new, old in zip(grown, self.pages, strict=True):
                    if new is not None and old is not None and columns.count:
                        rows = old.unflatten(0, (columns.batch, -1))
                        new.unflatten(0, (columns.batch, -1))[:, : rows.shape[1]] = rows
                self.pages = grown
        if latents is None:
            return
        assert columns.slots is not None
        write_latents(layer, *latents, *self.pages, columns.slots.to(layer.device), backend=self.backend)

    @torch.no_grad()
    def _with(self, k: Tensor, v: Tensor, few: bool) -> Near:
        """The window with a pass's keys and values [B, S, Hkv, D] in it."""
        columns, (batch, new), base = self.columns, k.shape[:2], self.columns.base
        spare = new if few else 1 if columns.most is None else STEP
        slots = max(self.window.slots, min(self.recent + spare, columns.room)) if self.recent else 0
        with torch.inference_mode(False):
            if not columns.count:
                window = self._empty(batch, slots)
            elif few and slots == self.window.slots:
                window = self.window
            else:
                window = self._empty(batch, slots)
                held = torch.arange(max(columns.count - self.window.slots, 0), columns.count, device=k.device)
                for new_side, old in ((window.keys, self.window.keys), (window.values, self.window.values)):
                    new_side[:, : self.sinks] = old[:, : self.sinks]
                    new_side[:, self._places(held, slots)] = old[:, self._places(held, self.window.slots)]
                if few:
                    self.window = window
        firsts = None if base is None or not self.sinks else base.to(k.device, torch.int32)
        told = Near(window.keys, window.values, self.sinks, self.recent, None, firsts)
        assert columns.ends is not None
        k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (k, v))
        write_near(told, k, v, columns.ends.to(k.device), backend=self.backend)
        return window

    def commit(self) -> None:
        """The pass under way counts."""
        assert self.next is not None
        sides = zip((self.window.keys, self.window.values), (self.next.keys, self.next.values), strict=True)
        if self.next is not self.window:
            keys, values = (self.columns.renewed(old, new) for old, new in sides)
            self.window = Near(keys, values, self.sinks, self.recent)
        self.next = None

    def takes(self, new: int) -> bool:
        """Whether a pass of so many columns may be written in place."""
        return (self.columns.most is None or new <= STEP) and (not self.joined or new <= self.recent)

    def _empty(self, batch: int, slots: int) -> Near:
        layer = self.factors
        shape = batch, self.sinks + slots, layer.num_kv_heads, layer.head_dim
        keys, values = (torch.zeros(shape, dtype=layer.dtype, device=layer.device) for _ in range(2))
        return Near(keys, values, self.sinks, self.recent)

    def _places(self, columns: Tensor, slots: int) -> Tensor:
        return self.sinks + columns % max(slots, 1)

    def window_from(self, firsts: Tensor | None) -> Near:
        """The window of rows whose first columns begin at `firsts` [B] int32; None: at 0."""
        window = self.window if self.next is None else self.next
        return Near(window.keys, window.values, self.sinks, self.recent, None, firsts)

    def near_pairs(self, begin: int, keys: Pair) -> tuple[Pair | None, Pair | None]:
        """Keys and values [B, Hkv, n, D] of as many columns before a pass as its first query sees exactly, and its own;
        and of each row's first live columns, those of the pass included. None: recent=0, sinks=0."""
        recent = first = None
        sides, begins, device = (self.window.keys, self.window.values), self.columns.base, keys[0].device
        base = torch.zeros((), dtype=torch.int64, device=device) if begins is None else begins[:, None].to(device)
        if self.recent and not begin:
            recent = keys
        elif self.recent:
            held = torch.arange(max(begin - self.recent + 1, 0), begin, device=device)
            leading = (held >= base) & (held < base + self.sinks)
            at = torch.where(leading, held - base, self._places(held, self.window.slots)).expand(len(keys[0]), -1)
            rows = torch.arange(len(keys[0]), device=device)[:, None]
            held_before = (x[rows, at].transpose(1, 2) for x in sides)
            recent = _pair(torch.cat((old, own), 2) for old, own in zip(held_before, keys, strict=True))
        if self.sinks:
            at, new = torch.arange(self.sinks, device=device)[None] + base - begin, keys[0].shape[2]
            inside, at = ((x[:, None, :, None]) for x in ((at >= 0) & (at < new), at.clamp(0, new - 1)))
            own = [x.gather(2, at.expand(*x.shape[:2], -1, x.shape[3])) for x in keys]
            old = [x[:, : self.sinks].transpose(1, 2) for x in sides] if begin else [torch.zeros_like(x) for x in own]
            first = _pair(torch.where(inside, x, y) for x, y in zip(own, old, strict=True))
        return recent, first

    def places(self) -> dict[str, Any]:
        """Where its columns lie, those of the pass included, as the ops on a cache take it."""
        held, layer, device = self.columns, self.factors, self.factors.device
        assert held.table is not None and held.ends is not None
        by_column = layer.rope is not None and layer.chunk is None
        positions = held.positions.view(-1, PAGE).to(device) if by_column and held.positions is not None else None
        offsets = held.offsets.to(device) if layer.chunk is not None and held.offsets is not None else None
        return {
            "block_table": held.table.to(device),
            "seq_lens": held.ends.to(device),
            "positions": positions,
            "offsets": offsets,
        }

    def moved_back(self, count: int, cut: int, by: int) -> None:
        """The window of columns that were counted up to `count`, once those before `cut` are gone, `by` fewer."""
        window, slots = self.window, self.window.slots
        held = torch.arange(max(count - slots, cut), count, device=self.factors.device)
        moved = self._empty(len(window.keys), slots)
        for new, old in ((moved.keys, window.keys), (moved.values, window.values)):
            new[:, : self.sinks] = old[:, : self.sinks]
            if self.recent:
                new[:, self._places(held - by, slots)] = old[:, self._places(held, slots)]
        self.window = moved

    @torch.inference_mode(False)
    @torch.no_grad()
    def crop(self, columns: int) -> None:
        """To its first columns. What had left the last `recent` and is among them again comes from latents."""
        low = max(columns - self.recent, self.sinks if self.columns.gone else 0)
        lost = range(low, max(min(self.columns.count - self.recent, columns), low))
        if lost:
            at = self._places(torch.arange(lost.start, lost.stop, device=self.factors.device), self.window.slots)
            k, v = (x.transpose(1, 2) for x in self._rebuilt(lost.start, lost.stop))
            self.window.keys[:, at], self.window.values[:, at] = k, v

    def _rebuilt(self, begin: int, end: int) -> Pair:
        """Keys and values of some columns from their latents, [B, Hkv, n, D] each."""
        layer, held = self.factors, self.columns
        rows = rows_of(layer, self.pages, held.batch, begin, end)
        k, v = layer.rebuild(*latents_of(layer, rows), held.positions_of(layer, begin, end))
        return k.transpose(1, 2), v.transpose(1, 2)

    @torch.inference_mode(False)
    @torch.no_grad()
    def select(self, rows: Tensor) -> None:
        """Rows `rows` of the batch, as the columns still know it, become the new one."""
        rows, shape = rows.to(self.factors.device), (self.columns.batch, -1)
        renewed, window = self.columns.renewed, self.window
        if self.holder is self:
            k, v = (None if x is None else renewed(x, x.unflatten(0, shape)[rows].flatten(0, 1)) for x in self.pages)
            assert k is not None
            self.pages = k, v
            self.kept, self.rest = (None if x is None else x.chosen(rows) for x in (self.kept, self.rest))
        keys, values = (renewed(x, x[rows]) for x in (window.keys, window.values))
        self.window = Near(keys, values, self.sinks, self.recent)

    @property
    def tensors(self) -> list[Tensor]:
        windows = self.window, self.window if self.next is None else self.next
        dense = [x for near in windows for x in (near.keys, near.values)]
        rows = (*self.pages, *(x for own in self.older for x in own.tensors)) if self.holder is self else ()
        held = {id(x): x for x in (*rows, *dense)}
        return [x for x in held.values() if x is not None]

    @property
    def tokens(self) -> Tensor:
        """Of each row, those that it holds, [B] int64."""
        columns = self.columns
        base = torch.zeros(columns.batch, dtype=torch.int64) if columns.base is None else columns.base.cpu()
        held = columns.count - base.clamp(max=columns.count)
        return sum((x.counts.cpu() for x in self.older), held)

    @property
    def older(self) -> list[Kept]:
        """What is left of columns that are gone, as this layer reads it."""
        rest = None if self.whole.rest is None else self.whole.rest.layers[self.index]
        held = (self.holder.rest, rest), (self.holder.kept, self.factors)
        return [kept.read_by(own) for kept, own in held if kept is not None and own is not None]

    def get_seq_length(self) -> int | Tensor:
        return self.columns.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All columns, also where a window slides: masks are then of columns."""
        return self.columns.most or self.columns.count + self.columns.gone + query_length, 0

    def get_max_length(self) -> int:
        return self.columns.most or -1

    get_max_cache_shape = get_max_length  # its name in 5.5


def _pair(sides: Iterable[Tensor]) -> Pair:
    keys, values = sides
    return keys, values
