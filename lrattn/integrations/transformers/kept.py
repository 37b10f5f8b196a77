"""What a selection has kept of a layer's older columns: their latents, side by side, and attention on them.

The rows of one text lie in pages of their own, in the order of the text. Where keys are in chunks a token's chunk goes
with it: all tokens of a chunk follow one another, and attention takes each chunk for a sequence of its own, whose first
position is the chunk's. So any tokens may be kept, latents are moved and never made anew, and no page is left half
empty between chunks.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from lrattn.attention.cache import allocate_cache, sections, unpack, write_rows
from lrattn.attention.dense import Pair
from lrattn.attention.ops import decode_attention
from lrattn.factors.layer import LayerFactors
from lrattn.factors.projection import Projection
from lrattn.factors.shapes import accumulator, cdiv
from lrattn.integrations.transformers.columns import PAGE

Latents = tuple[Tensor, Tensor | None]  # of keys and values, or pages of them; None: the first serves both
Rows = list[list[Tensor]]  # of each cache, [B, n, width] as each of its `sections` has them


def cached_sides(layer: LayerFactors) -> list[Projection]:
    """Those that have a cache."""
    return [layer.row_side] if layer.shared else [layer.row_side, layer.values]


def rows_of(layer: LayerFactors, pages: Latents, batch: int, begin: int, end: int) -> Rows:
    """Rows begin .. end of each text, which owns as many pages as the others."""
    return [
        [x.unflatten(0, (batch, -1)).flatten(1, 2)[:, begin:end] for x in sections(side, held)]
        for side, held in zip(cached_sides(layer), pages, strict=False)
        if held is not None
    ]


def latents_of(layer: LayerFactors, rows: Rows) -> Latents:
    """As the cache gives them back, [B, n, width] each, in the layer's dtype."""
    found = [unpack(side, parts).to(layer.dtype) for side, parts in zip(cached_sides(layer), rows, strict=True)]
    return found[0], found[1] if len(found) > 1 else None


def gathered(x: Tensor, at: Tensor) -> Tensor:
    """Rows `at` [B, m] of x [B, n, width]."""
    return x.gather(1, at[..., None].expand(-1, -1, x.shape[2]))


def moved(layer: LayerFactors, rows: Rows, at: Tensor, pages: int) -> Latents:
    """New pages, so many for each text, of its rows `at` [B, n] one after the other."""
    batch, count = at.shape
    made = allocate_cache(layer, batch * pages, PAGE)
    slots = torch.arange(batch, device=at.device)[:, None] * pages * PAGE + torch.arange(count, device=at.device)
    for side, new, old in zip(cached_sides(layer), made, rows, strict=False):
        assert new is not None
        new.zero_()
        for to, x in zip(sections(side, new), old, strict=True):
            write_rows(to, gathered(x, at).flatten(0, 1), slots.flatten())
    return made


class Kept:
    """Columns that were kept, [batch * pages, 16, width] in each cache.

    Args:
        rows, at: as of `moved`. counts: [B] int64, how many of `at` are kept, the first ones.
        positions: [B, n] of them, as their keys were turned to; None: keys are turned to none.
    """

    def __init__(self, layer: LayerFactors, rows: Rows, at: Tensor, counts: Tensor, positions: Tensor | None) -> None:
        self.layer, self.counts, self.most = layer, counts, at.shape[1]
        self.choice: object = None  # the same one in layers that keep the same tokens
        self.pages = moved(layer, rows, at, cdiv(self.most, PAGE))
        self.positions = None
        if positions is not None:
            self.positions = positions.new_zeros(len(at), cdiv(self.most, PAGE) * PAGE, dtype=torch.int32)
            self.positions[:, : self.most] = positions
        self.places = self._places()

    def read_by(self, layer: LayerFactors) -> Kept:
        """The same tokens, as another layer that shares their rows reads them."""
        if layer is self.layer:
            return self
        other = copy.copy(self)
        other.layer = layer
        return other

    @property
    def tensors(self) -> list[Tensor]:
        tables = (x for name, x in self.places.items() if isinstance(x, Tensor) and name != "positions")
        return [x for x in (*self.pages, self.counts, self.positions, *tables) if x is not None]

    @property
    def live(self) -> Tensor:
        """[B, most] bool."""
        return torch.arange(self.most, device=self.counts.device) < self.counts[:, None]

    @property
    def rows(self) -> Rows:
        return rows_of(self.layer, self.pages, len(self.counts), 0, self.most)

    def _places(self) -> dict[str, Any]:
        """Where they lie, as decode_attention takes it: a sequence for each text, or for each chunk of each."""
        batch, device, room, chunk = len(self.counts), self.counts.device, cdiv(self.most, PAGE), self.layer.chunk
        firsts, counts, offsets, positions = torch.zeros_like(self.counts)[:, None], self.counts[:, None], None, None
        if chunk is not None and self.positions is not None:
            of = self.positions[:, : self.most].long().clamp_min(0) // chunk
            number = (of - of[:, :1]).masked_fill(~self.live, -1)
            chunks = torch.arange(int(number.max()) + 1, device=device)
            counts = (number[:, :, None] == chunks).sum(1)  # [B, chunks]
            firsts = counts.cumsum(1) - counts
            offsets = (firsts % PAGE - (of[:, :1] + chunks) * chunk).int().flatten()
        elif self.positions is not None:
            positions = self.positions.view(-1, PAGE)
        lens = firsts % PAGE + counts
        width = torch.arange(cdiv(max(int(lens.max()), 1), PAGE), device=device)
        table = (firsts // PAGE)[..., None] + width
        table = table.clamp_max(room - 1) + torch.arange(batch, device=device)[:, None, None] * room
        return {
            "block_table": table.flatten(0, 1).int(),
            "seq_lens": lens.int().flatten(),
            "seq_starts": (firsts % PAGE).int().flatten(),
            "offsets": offsets,
            "positions": positions,
            "max_seq_len": int(lens.max()),
        }

    def attend(self, q: Tensor, scale: float, softcap: float, backend: str | None) -> list[tuple[Tensor, Tensor]]:
        """Queries [B, S, Hq, D], all after what is kept -> out [B, S, Hq, D] and lse [B, S, Hq] of parts of it."""
        sequences = len(self.places["seq_lens"]) // len(q)
        out, lse = decode_attention(
            q.repeat_interleave(sequences, 0),
            *self.pages,
            self.layer,
            **self.places,
            softmax_scale=scale,
            softcap=softcap,
            causal=False,
            return_lse=True,
            backend=backend,
        )
        parts = (x.unflatten(0, (-1, sequences)).unbind(1) for x in (out, lse.to(accumulator(q.dtype))))
        return list(zip(*parts, strict=True))

    def dense(self) -> tuple[Pair, Tensor]:
        """Keys and values [B, Hkv, most, D], and which of them are there, [B, most] bool."""
        positions = None if self.positions is None else self.positions[:, : self.most]
        k, v = self.layer.rebuild(*latents_of(self.layer, self.rows), positions)
        return (k.transpose(1, 2), v.transpose(1, 2)), self.live

    @torch.inference_mode(False)
    @torch.no_grad()
    def chosen(self, rows: Tensor) -> Kept | None:
        """Rows `rows` of the batch become the new one; None where they have no tokens here."""
        batch, counts = len(self.counts), self.counts[rows]
        most = int(counts.max())
        if not most:
            return None
        room = cdiv(most, PAGE)
        k, v = (None if x is None else x.unflatten(0, (batch, -1))[rows, :room].flatten(0, 1) for x in self.pages)
        assert k is not None
        self.pages, self.counts, self.most = (k, v), counts, most
        self.positions = None if self.positions is None else self.positions[rows, : room * PAGE]
        self.places = self._places()
        return self
