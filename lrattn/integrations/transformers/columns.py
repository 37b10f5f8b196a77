"""What the layers of a LatentCache share: rows and their pages, the positions of their columns, where rows begin."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lrattn.factors.layer import LayerFactors
from lrattn.factors.selection import Selection
from lrattn.models.masks import Said

PAGE = 16  # columns


def positions_at(given: Tensor | None, begin: int, batch: int, new: int, device: torch.device) -> Tensor:
    """Positions [B, S] int64 of columns begin .. begin + S, as attention was given them; None: their indices.

    Raises: ValueError unless they are one number a column.
    """
    if given is None:
        return torch.arange(begin, begin + new, device=device).expand(batch, new)
    rows = given
    if given.dim() == 3:
        rows = given[0]
        if not torch.equal(given, rows.expand_as(given)):
            raise ValueError(
                "position_ids: expected one position a token, got several that differ: use factors whose keys are "
                "stored as attention is given them (method 'lrattn-rotated')"
            )
    if rows.dim() != 2 or rows.shape[0] not in (1, batch) or rows.shape[1] != new:
        raise ValueError(f"position_ids: expected shape [{batch}, {new}], got {list(given.shape)}")
    return rows.to(device, torch.int64).expand(batch, new)


class Columns:
    """Columns of a batch, padding included. A row owns pages of its own, one after the other.

    Args:
        forms: the layers that share them. sinks: of the dense window. most: columns that there is room for from the
            first pass on; None: room grows. select: what is kept of them; None: all.

    count: columns that every layer holds. batch, pages: rows, and pages of each. table: [batch, pages] int32.
    positions: of keys before RoPE, [batch, room] int32; None: every position so far is its column's index.
    offsets: of keys in chunks, [batch] int32: column - offset is the position of a live column; None: 0.
    base: [batch], the first column of each row that was live when it came, `count` or more where none was; None: 0.
        There a row's first columns begin, and its offset holds. Held where there are some of either.

    lens: with `most`, count for each row and as tensors say it, [batch] int32; else None.

    Of the pass under way, or the last one: ends [B] int32, columns with it. While it is: slots [B, S] int64 of its
    columns; last, its largest position; written, how many layers hold it.

    With `most`, passes after the first read nothing from the device: rows begin in the first one for good, and what a
    mask says must be that. denied: [B] bool, of which rows it is not; None: of no row.

    With `select`, columns are counted without those that were dropped or moved to Kept: the first ones of the dense
    window come first, at once followed by what came after them. gone: how many there were. due: whether tokens are
    chosen in the pass under way, or were in the last one. begun: [B], where rows began before any were gone; None: 0.
    """

    def __init__(
        self, forms: Sequence[LayerFactors], sinks: int, most: int | None = None, select: Selection | None = None
    ) -> None:
        self.chunked = any(form.chunk is not None for form in forms)
        self.turned = any(form.rope is not None and form.chunk is None for form in forms)
        self.bounded = any(form.rope is not None or form.max_position is not None for form in forms)
        self.sinks, self.most, self.selection = sinks, most, select
        self.layers: list[Any] = []  # LatentLayers
        self.readers = 0  # of other layers: they hold nothing
        self.reset()

    def reset(self) -> None:
        self.count = self.batch = self.pages = self.gone = self.chosen_at = 0
        self.due = False
        self.begun: Tensor | None = None
        self.table: Tensor | None = None
        self.positions: Tensor | None = None
        self.offsets: Tensor | None = None
        self.base: Tensor | None = None
        self.lens: Tensor | None = None
        self.ends: Tensor | None = None
        self.denied: Tensor | None = None
        self.end()

    def end(self) -> None:
        """No pass is under way."""
        self.written = self.last = 0
        self.slots: Tensor | None = None

    @property
    def holders(self) -> list[Any]:
        """The layers that hold rows, of a run that shares them the last."""
        return [layer for layer in self.layers if layer.holder is layer]

    @property
    def room(self) -> int:
        """Columns that the pages of a row have room for."""
        return self.pages * PAGE

    @property
    def tensors(self) -> list[Tensor]:
        held = self.table, self.positions, self.offsets, self.base, self.lens, self.begun
        return [x for x in held if x is not None]

    @property
    def length(self) -> int | Tensor:
        """Columns there were; with `most` a tensor, int64, once there are some, so that a captured step goes on with
        it."""
        return self.lens[0].long() if self.lens is not None and self.count else self.count + self.gone

    @property
    def first(self) -> Tensor | None:
        """Where rows begin in the count of all columns, [B]; None: at 0."""
        return self.begun if self.gone else self.base

    @property
    def settled(self) -> bool:
        """Whether a pass reads nothing from the device any more."""
        return self.most is not None and self.count > 0

    @torch.inference_mode(False)  # what is held outlives the caller's mode
    @torch.no_grad()
    def start(self, batch: int, new: int, device: torch.device, position_ids: Tensor | None, said: Said) -> None:
        """A pass of `new` columns is under way: room for them, their slots and positions, and where rows begin.

        Raises: ValueError for another number of rows than before, for more columns than there is room for, or as
        `positions_at` and `_find_offsets`.
        """
        begin, end = self.count, self.count + new
        if begin and batch != self.batch:
            raise ValueError(f"batch: expected {self.batch} rows, as the cache holds, got {batch}")
        self.check_room(new)
        if self.settled:
            self._go_on(new, device, position_ids, said)
            return
        if not begin:
            self.positions = self.offsets = self.base = None
        told, unread, self.last = position_ids is not None, torch.compiler.is_compiling(), end + self.gone - 1
        every, since = 0 if self.selection is None else self.selection.every, end + self.gone - self.chosen_at
        self.due = self.selection is not None and (not self.chosen_at or 0 < every <= since)
        if position_ids is not None and self.bounded:
            self.last = 0 if unread else int(position_ids.max())
        first = begin + self.gone
        at = positions_at(position_ids, first, batch, new, device) if self.turned or self.chunked else None
        live = _live(said, begin, end)
        live = None if live is None else live.expand(batch, -1).to(device)
        self._find_base(live, end)
        if self.most is not None and self.base is not None and bool((self.base >= end).any()):
            raise ValueError("attention_mask: expected a column in every row of the first pass, as max_tokens needs")
        if self.chunked and told and at is not None:
            self._find_offsets(at, live, unread)
        even = not (self.turned and told)
        if at is not None and not even and not unread:
            even = torch.equal(at, positions_at(None, first, batch, new, device))
        if end > self.room or batch != self.batch:
            self._grow(batch, self.most or end, device)
        if self.most is not None and not begin:
            self.lens, even = torch.zeros(batch, dtype=torch.int32, device=device), not self.turned
        if self.positions is None and not even:
            self.positions = torch.arange(self.room, dtype=torch.int32, device=device).repeat(batch, 1)
        if self.positions is not None and at is not None:
            self.positions[:, begin:end] = at
        self.slots = torch.arange(batch, device=device)[:, None] * self.room + torch.arange(begin, end, device=device)
        self.ends = torch.full((batch,), end, dtype=torch.int32, device=device)

    def check_room(self, new: int) -> None:
        """Raises ValueError where there is no room for `new` more columns."""
        if self.most is not None and self.count + new > self.most:
            raise ValueError(f"max_tokens: expected at most {self.most} columns, got {self.count} and {new} more")

    def _go_on(self, new: int, device: torch.device, position_ids: Tensor | None, said: Said) -> None:
        """The rest of `start`, by what tensors say alone. said: with all that is live, not only what padding hides."""
        assert self.lens is not None
        batch = self.batch
        self.last = 0  # unknown
        at = self.lens[:, None] + torch.arange(new, device=device)
        if self.positions is not None:
            told = at if position_ids is None else positions_at(position_ids, 0, batch, new, device)
            self.positions.scatter_(1, at, told.int())
        self.slots = torch.arange(batch, device=device)[:, None] * self.room + at
        self.ends, self.denied = self.lens + new, None
        if said.live is not None:
            column = torch.arange(said.live.shape[1], device=device)
            begun = column >= (0 if self.base is None else self.base[:, None])
            self.denied = ((said.live.to(device) != begun) & (column < self.ends[:, None])).any(1)

    def positions_of(self, layer: LayerFactors, begin: int, end: int) -> Tensor | None:
        """Positions [batch, n] of columns begin .. end, as a layer's keys are turned from them; None: they are not."""
        if layer.rope is None:
            return None
        if layer.chunk is None and self.positions is not None:
            return self.positions[:, begin:end].to(layer.device)
        return self._turned(layer, torch.arange(begin, end, device=layer.device))

    def positions_now(self, layer: LayerFactors, new: int) -> Tensor | None:
        """Those of the pass under way, of `new` columns."""
        if not self.settled or layer.rope is None:
            return self.positions_of(layer, self.count, self.count + new)
        assert self.slots is not None
        at = self.slots % self.room
        if layer.chunk is None and self.positions is not None:
            return self.positions.gather(1, at).to(layer.device)
        return self._turned(layer, at.to(layer.device))

    def _turned(self, layer: LayerFactors, at: Tensor) -> Tensor:
        """Positions [batch, n] of columns [n] or [batch, n] that no one has told otherwise."""
        if layer.chunk is not None and self.offsets is not None:
            at = at - self.offsets[:, None].to(layer.device)
        return at.expand(self.batch, -1)

    def _grow(self, batch: int, columns: int, device: torch.device) -> None:
        """Room for so many columns, an eighth more than there was at least: appending is cheap."""
        have = self.room if self.count else 0
        self.batch, self.pages = batch, -(-max(columns, have + have // 8) // PAGE)
        self.table = _table(batch, self.pages, device)
        if self.positions is not None:
            grown = self.positions.new_zeros(batch, self.room)
            grown[:, :have] = self.positions
            self.positions = grown

    def _find_base(self, live: Tensor | None, end: int) -> None:
        """Where rows begin that had no live column before: what a later mask hides does not change it."""
        begin: Any = self.count
        if live is not None:
            begin = torch.where(live.any(1), begin + live.int().argmax(1), end)
        if self.base is not None:
            self.base = torch.where(self.base < self.count, self.base, begin)
        elif not self.count and live is not None:
            self.base = begin

    def _find_offsets(self, at: Tensor, live: Tensor | None, unread: bool) -> None:
        """Offsets of rows that begin in the pass under way; others keep theirs. at: [B, S], its positions.

        Raises: ValueError unless the positions of a row's live columns follow one another.
        """
        begin, new = self.count, at.shape[1]
        own = torch.arange(begin, begin + new, device=at.device) - at
        offsets = torch.zeros_like(own[:, 0]) if self.offsets is None else self.offsets
        if self.base is not None:  # whatever it is of a row that has no live column yet, of which nobody sees any
            first = own.gather(1, (self.base - begin).clamp(0, new - 1)[:, None])[:, 0]
            offsets = torch.where(self.base < begin, offsets, first)
        elif not begin:
            offsets = own[:, 0]
        if not unread:
            wrong = own != offsets[:, None]
            wrong = wrong if live is None else wrong & live
            if wrong.any():
                row, i = wrong.nonzero()[0].tolist()
                expected, got, column = begin + i - int(offsets[row]), int(at[row, i]), begin + i + self.gone
                raise ValueError(
                    f"position_ids: expected those of a row to follow one another, {expected} in column {column} of "
                    f"row {row}, as keys in chunks need, got {got}: use factors of method 'lrattn-rebuilt' (any "
                    "positions) or 'lrattn-rotated'"
                )
        if self.base is not None or not begin:
            self.offsets = offsets.int() if unread or offsets.any() else None

    def wrote(self, new: int) -> None:
        """One more layer holds the pass under way, or reads one that does; with the last one its columns count."""
        self.written += 1
        if self.written < len(self.layers) + self.readers:
            return
        self.count += new
        if self.lens is not None:
            self.lens.add_(new)
        for layer in self.layers:
            layer.commit()
        self.end()

    def undo(self) -> None:
        """The pass under way, if there is one, has failed: it counts for nothing."""
        for layer in self.layers:
            layer.next = layer.chosen = layer.latest = layer.row = None
            layer.given = []
        self.end()

    @torch.inference_mode(False)
    @torch.no_grad()
    def leave(self, cut: int) -> Tensor:
        """Columns before `cut` are gone, but for the first ones of the dense window -> where all that are left were,
        [B, count], before."""
        delta, device = cut - self.sinks, self.table.device  # type: ignore[union-attr]
        base = torch.zeros(self.batch, dtype=torch.int64, device=device) if self.base is None else self.base.long()
        if not self.gone and self.base is not None:
            self.begun = self.base
        at = torch.arange(self.count - delta, device=device)[None]
        at = torch.where((at < self.sinks) & (base[:, None] <= delta), base[:, None] + at, at + delta)
        if self.chunked:
            zeros = torch.zeros(self.batch, dtype=torch.int32, device=device)
            self.offsets = (zeros if self.offsets is None else self.offsets) - delta
        held = self.positions
        if self.turned and held is None:
            held = self.gone + torch.arange(self.room, dtype=torch.int32, device=device).repeat(self.batch, 1)
        self.base = None if self.base is None else (base - delta).clamp_min(0)
        if self.base is not None and not self.base.any():
            self.base = None
        self.count, self.gone, self.pages = self.count - delta, self.gone + delta, 0
        self.positions = None
        self._grow(self.batch, self.count, device)
        if held is not None:
            self.positions = held.new_zeros(self.batch, self.room)
            self.positions[:, : self.count] = held.gather(1, at)
        return at

    def crop(self, columns: int) -> None:
        """Only the first columns are left."""
        self.count = columns
        if self.lens is not None:
            self.lens.fill_(columns)

    def select(self, rows: Tensor) -> None:
        """Rows `rows` of the old batch become the new one."""
        assert self.table is not None
        self.batch, rows = len(rows), rows.to(self.table.device)
        self.table = self.renewed(self.table, _table(self.batch, self.pages, rows.device))
        held = self.positions, self.offsets, self.base, self.lens, self.begun
        chosen = (None if x is None else self.renewed(x, x[rows]) for x in held)
        self.positions, self.offsets, self.base, self.lens, self.begun = chosen

    def renewed(self, old: Tensor, new: Tensor) -> Tensor:
        """The new one, in the place of the old one where that has to stay: a captured step knows it by its address."""
        return old.copy_(new) if self.most is not None and old.shape == new.shape else new


def _live(said: Said, begin: int, end: int) -> Tensor | None:
    """Which of columns begin .. end are no padding, [B or 1, n] bool; None: all."""
    live = said.live if said.full is None else said.full.any(1)
    if live is None and said.pads is not None:
        live = torch.arange(end, device=said.pads.device) >= said.pads[:, None]
    return None if live is None else live[:, begin:end]


def _table(batch: int, pages: int, device: torch.device) -> Tensor:
    return torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages)
