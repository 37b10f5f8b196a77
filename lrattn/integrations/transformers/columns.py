"""What the layers of a LatentCache share: rows and their pages, where keys were turned to, where rows begin."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

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
        turned: keys of some layer are turned back from their positions. sinks: of the dense window.

    count: columns that every layer holds. batch, pages: rows, and pages of each. table: [batch, pages] int32.
    positions: [batch, room] int32; None: every position so far is its column's index.
    base: [batch], the first column of each row that was live when it came; None: 0.

    While a pass is under way: slots [B, S] int64 of its columns; at [B, S], where their keys were turned to, and last,
    the largest of these; written, how many layers hold it.
    """

    def __init__(self, turned: bool, sinks: int) -> None:
        self.turned, self.sinks = turned, sinks
        self.layers: list[Any] = []  # LatentLayers
        self.reset()

    def reset(self) -> None:
        self.count = self.batch = self.pages = 0
        self.table: Tensor | None = None
        self.positions: Tensor | None = None
        self.base: Tensor | None = None
        self.firm: int | None = None  # from so many columns on each row's first ones are known
        self.end()

    def end(self) -> None:
        """No pass is under way."""
        self.written, self.last, self.begun = 0, 0, False
        self.slots: Tensor | None = None
        self.at: Tensor | None = None

    @property
    def room(self) -> int:
        """Columns that the pages of a row have room for."""
        return self.pages * PAGE

    @property
    def tensors(self) -> list[Tensor]:
        return [x for x in (self.table, self.positions, self.base) if x is not None]

    @torch.inference_mode(False)  # what is held outlives the caller's mode
    @torch.no_grad()
    def start(self, batch: int, new: int, device: torch.device, position_ids: Tensor | None, said: Said) -> None:
        """A pass of `new` columns is under way: room for them, their slots and positions, and where rows begin.

        Raises: ValueError for another number of rows than before, or as `positions_at`.
        """
        begin, end = self.count, self.count + new
        if begin and batch != self.batch:
            raise ValueError(f"batch: expected {self.batch} rows, as the cache holds, got {batch}")
        even = position_ids is None or not self.turned
        if self.turned:
            whole = said.full is not None  # of which later passes see nothing of earlier chunks, which are no padding
            if position_ids is None and said.pads is not None and not (whole and (begin or not said.pads.any())):
                warnings.warn(
                    "position_ids: attention of this model is told none, and in a padded batch keys may be turned back "
                    "from other positions than they were turned to; factors of method 'lrattn-rotated' turn none",
                    stacklevel=2,
                )
            self.at = positions_at(position_ids, begin, batch, new, device)
            if not even and not torch.compiler.is_compiling():  # where nothing is read
                even = torch.equal(self.at, positions_at(None, begin, batch, new, device))
                self.last = int(self.at.max())
            self.last = end - 1 if even else self.last
        self.positions = self.positions if begin else None
        if end > self.room or batch != self.batch:
            self._grow(batch, end, device)
        if self.positions is None and not even:
            self.positions = torch.arange(self.room, dtype=torch.int32, device=device).repeat(batch, 1)
        if self.positions is not None and self.at is not None:
            self.positions[:, begin:end] = self.at
        self.slots = torch.arange(batch, device=device)[:, None] * self.room + torch.arange(begin, end, device=device)
        if self.sinks:
            self._find_base(said, end)

    def _grow(self, batch: int, columns: int, device: torch.device) -> None:
        """Room for so many columns, an eighth more than there was at least: appending is cheap."""
        have = self.room if self.count else 0
        self.batch, self.pages = batch, -(-max(columns, have + have // 8) // PAGE)
        self.table = _table(batch, self.pages, device)
        if self.positions is not None:
            grown = self.positions.new_zeros(batch, self.room)
            grown[:, :have] = self.positions
            self.positions = grown

    def _find_base(self, said: Said, end: int) -> None:
        """Where rows begin that had no live column before: what a later mask hides does not change it."""
        live = said.live if said.full is None else said.full.any(1)
        self.begun = live is None  # every row has by now
        own = said.pads
        if own is not None and live is not None:
            own = torch.where(live.any(1), own, end)
        if not self.count:
            self.base = own
        elif self.base is not None and own is not None:
            self.base = torch.where(self.base < self.count, self.base, own)

    def wrote(self, new: int) -> None:
        """One more layer holds the pass under way; with the last one it is over, and its columns count."""
        self.written += 1
        if self.written < len(self.layers):
            return
        self.count += new
        if self.firm is None and self.begun:
            self.firm = self.sinks if self.base is None else self.count + self.sinks
        for layer in self.layers:
            (layer.ring, layer.first), layer.next = layer.next, None
        self.end()

    def undo(self) -> None:
        """The pass under way, if there is one, has failed: it counts for nothing."""
        for layer in self.layers:
            layer.next = None
        self.end()

    def crop(self, columns: int) -> None:
        """Only the first columns are left."""
        self.count = columns
        if self.firm is not None and columns < self.firm:
            self.firm = None

    def select(self, rows: Tensor) -> None:
        """Rows `rows` of the old batch become the new one."""
        assert self.table is not None
        self.batch, rows = len(rows), rows.to(self.table.device)
        self.table = _table(self.batch, self.pages, rows.device)
        self.positions = None if self.positions is None else self.positions[rows]
        self.base = None if self.base is None else self.base[rows]


def _table(batch: int, pages: int, device: torch.device) -> Tensor:
    return torch.arange(batch * pages, dtype=torch.int32, device=device).view(batch, pages)
