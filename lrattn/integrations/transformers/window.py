"""DenseWindow: the tokens that a LatentCache holds uncompressed beside their latents."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lrattn.attention.checks import check_integer
from lrattn.factors.layer import LayerFactors
from lrattn.factors.record import Factors


class Places(NamedTuple):
    """Where n tokens come from and go to, [n] int64 each: sequence, column of a pass, slot, index in the sequence."""

    rows: Tensor
    columns: Tensor
    slots: Tensor
    tokens: Tensor


class DenseWindow:
    """Exact keys and values of the first `sinks` and the last `recent` tokens of each sequence of a batch.

    Token j lies in slot j, and once those are full in slot sinks + (j - sinks) % recent: it takes the place of the
    token that leaves the window. Tensors grow with the sequences until there are sinks + recent slots.

    at: [B, slots] int32, the token in each slot, -1 where there is none. k, v: a layer's [B, slots, Hkv, D] each.
    """

    def __init__(self, layers: tuple[LayerFactors, ...], recent: int, sinks: int) -> None:
        self.recent, self.sinks = recent, sinks
        first = layers[0]
        self.at = torch.empty(0, 0, dtype=torch.int32, device=first.device)
        self.k = [x.keys.up.new_empty(0, 0, x.num_kv_heads, x.head_dim) for x in layers]
        self.v = [torch.empty_like(k) for k in self.k]
        self.staged: dict[int, tuple[Tensor, Tensor]] = {}
        self.places = Places(*torch.empty(4, 0, dtype=torch.int64, device=first.device))

    @property
    def tensors(self) -> list[Tensor]:
        return [self.at, *self.k, *self.v]

    def reserve(self, begins: list[int], counts: list[int], lengths: list[int]) -> None:
        """Room for those of a pass's new tokens that it will leave near: `counts` from column `begins` on, `lengths`
        in all. Nothing is held before `commit`, so that a pass that fails changes nothing."""
        self.staged = {}
        self._grow(len(counts), min(max(lengths, default=0), self.sinks + self.recent))
        places = [
            (b, begin + t - old, t)
            for b, (begin, count, length) in enumerate(zip(begins, counts, lengths, strict=True))
            for old in (length - count,)
            for t in (*range(old, min(self.sinks, length)), *range(max(old, self.sinks, length - self.recent), length))
        ]
        self.places = self._places(places)

    def stage(self, i: int, k: Tensor, v: Tensor) -> None:
        """The pass's keys and values of layer i, [B, S, Hkv, D] each: what will be held of them is copied."""
        rows, columns = self.places.rows, self.places.columns
        self.staged[i] = k.detach()[rows, columns], v.detach()[rows, columns]

    def commit(self) -> None:
        """Every layer has staged its tokens: they are held."""
        for i, (k, v) in self.staged.items():
            self.put(i, self.places, k, v)
        self.at[self.places.rows, self.places.slots] = self.places.tokens.int()
        self.staged = {}

    def put(self, i: int, places: Places, k: Tensor, v: Tensor) -> None:
        """Keys and values [n, Hkv, D] into their slots."""
        self.k[i][places.rows, places.slots], self.v[i][places.rows, places.slots] = k, v

    def tokens(self, i: int, b: int) -> tuple[Tensor, Tensor, Tensor]:
        """What layer i holds of sequence b: k, v [n, Hkv, D] and at [n], ascending."""
        at, slots = self.at[b].sort()
        slots = slots[at >= 0]
        return self.k[i][b, slots], self.v[i][b, slots], at[at >= 0]

    def select(self, rows: Tensor) -> None:
        """Sequences rows[i] of the old batch become the new batch."""
        rows = rows.to(self.at.device)
        self.at = self.at[rows]
        self.k, self.v = [k[rows] for k in self.k], [v[rows] for v in self.v]

    def crop(self, before: list[int], after: list[int]) -> Places:
        """Sequences of `before` tokens now have `after`. Returns the places of tokens that are near again, to be put
        there: they had left the window and are no longer held."""
        self.at.masked_fill_(self.at >= torch.tensor(after, device=self.at.device)[:, None], -1)
        places = self._places(
            [
                (b, 0, t)
                for b, (old, new) in enumerate(zip(before, after, strict=True))
                for t in range(max(new - self.recent, self.sinks), min(old - self.recent, new))
            ]
        )
        self.at[places.rows, places.slots] = places.tokens.int()
        return places

    def _places(self, places: list[tuple[int, int, int]]) -> Places:
        """(sequence, column, token) of each, with the slot of the token."""
        full = self.sinks + self.recent
        slots = [t if t < full else self.sinks + (t - self.sinks) % self.recent for _, _, t in places]
        rows, columns, tokens = zip(*places, strict=True) if places else ((), (), ())
        return Places(*torch.tensor([rows, columns, slots, tokens], dtype=torch.int64, device=self.at.device))

    @torch.inference_mode(False)  # what is held outlives the caller's mode
    def _grow(self, batch: int, slots: int) -> None:
        """At least `slots` slots for each of `batch` sequences; an eighth more than there were, so that appending is
        cheap. Slots with no token hold zeros, which attention multiplies with zero."""
        if len(self.at) != batch:  # the first pass, or one after a first pass that failed
            self.at = self.at.new_empty(batch, 0)
            self.k, self.v = ([x.new_empty(batch, 0, *x.shape[2:]) for x in side] for side in (self.k, self.v))
        have = self.at.shape[1]
        if slots <= have:
            return
        more = min(max(slots, have + have // 8), self.sinks + self.recent) - have
        self.at = torch.cat((self.at, self.at.new_full((batch, more), -1)), 1)
        self.k, self.v = (
            [torch.cat((x, x.new_zeros(batch, more, *x.shape[2:])), 1) for x in side] for side in (self.k, self.v)
        )


def near_of(factors: Factors, recent: int | None, sinks: int | None) -> tuple[int, int]:
    """The two as given, or as the factors say where they are None. Raises ValueError unless they count tokens."""
    for name, given in (("recent", recent), ("sinks", sinks)):
        if given is not None:
            check_integer(name, given, 0)
    return factors.near_or(recent, sinks)
