"""The low-rank factors of one side, keys or values, as a frozen record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lrattn.factors.formats import Format
from lrattn.factors.shapes import FLOATS, RANK_STEP, check


@dataclass(frozen=True, eq=False)
class Projection:
    """(heads - offset) @ down = latents; latents of group g @ up[h, :ranks[g]] + offset[h] = head h.

    Args:
        up: [Hkv, max rank, D], heads in the model's order; rows past a group's rank are zero.
        ranks: one rank per group, each a multiple of 16; C = Hkv / len(ranks) heads share a group.
        down: [Hkv * D, sum ranks], groups side by side; [2 * Hkv * D, sum ranks], keys before values, of the values
            whose row serves both. Needed only to write latents.
        offset: [Hkv, D], such as the model's bias or the mean: taken from heads before the map and added to what is
            rebuilt; outside the low-rank part, so exact. Of keys, before RoPE where the layer has one.
        head_order: kv heads listed group by group; None is 0 .. Hkv - 1.
        format: bits of the latents, one Format for each group or one for all; None is plain numbers of the cache's
            dtype. Widths come in the same order in every group.
        of_inputs: down reads attention inputs, [E, sum ranks], as in files before version 3: latents are read, and not
            written, until `lrattn.in_kv_space`.

    Raises: ValueError naming the tensor, what was expected and what came.
    """

    up: Tensor
    ranks: tuple[int, ...]
    down: Tensor | None = None
    offset: Tensor | None = None
    head_order: tuple[int, ...] | None = None
    format: Format | tuple[Format, ...] | None = None
    of_inputs: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "ranks", tuple(self.ranks))
        dims: dict[str, int] = {}
        check("up", self.up, "Hkv R D", dims, dtype=FLOATS)
        if not self.ranks or any(not isinstance(r, int) or r < RANK_STEP or r % RANK_STEP for r in self.ranks):
            raise ValueError(f"ranks: expected positive multiples of {RANK_STEP}, got {self.ranks}")
        if not self.up.numel():
            raise ValueError(f"up: expected heads and dimensions, got shape {list(self.up.shape)}")
        if dims["R"] != max(self.ranks):
            raise ValueError(f"up: expected {max(self.ranks)} rows, the largest rank, got {dims['R']}")
        if self.num_heads % len(self.ranks):
            groups = len(self.ranks)
            raise ValueError(f"ranks: expected a number of groups that divides Hkv={self.num_heads}, got {groups}")
        kind: dict[str, Any] = {"dtype": self.up.dtype, "device": self.up.device}
        if self.down is not None:
            check("down", self.down, f"n {sum(self.ranks)}", dims, **kind)
            n = self.num_heads * self.head_dim
            if not self.of_inputs and dims["n"] not in (n, 2 * n):
                raise ValueError(f"down: expected Hkv * D = {n} rows, or twice as many in shared rows, got {dims['n']}")
        if self.offset is not None:
            check("offset", self.offset, "Hkv D", dims, **kind)
        if self.head_order is not None:
            object.__setattr__(self, "head_order", tuple(int(h) for h in self.head_order))
            if sorted(self.head_order) != list(range(self.num_heads)):
                last = self.num_heads - 1
                raise ValueError(f"head_order: expected a permutation of 0..{last}, got {self.head_order}")
        if self.format is not None:
            self._check_format()

    def _check_format(self) -> None:
        formats = (self.format,) * len(self.ranks) if isinstance(self.format, Format) else self.format
        if not isinstance(formats, tuple | list) or not all(isinstance(f, Format) for f in formats):
            raise ValueError(f"format: expected None, a Format or one for each group, got {self.format!r}")
        object.__setattr__(self, "format", tuple(formats))
        if (ranks := tuple(f.rank for f in formats)) != self.ranks:
            raise ValueError(f"format: expected segments of the ranks {self.ranks}, got ranks {ranks}")
        if len(widths := {tuple(bits for _, bits in f.segments) for f in formats}) > 1:
            raise ValueError(f"format: expected the same widths in every group, got {sorted(widths)}")

    def __repr__(self) -> str:
        more = "".join(f", {name}" for name in ("down", "offset") if getattr(self, name) is not None)
        what = f"heads={self.num_heads}, head_dim={self.head_dim}, {self.latents_told}{more}"
        return f"Projection({what}, {self.up.dtype} on {self.up.device})"

    @property
    def latents_told(self) -> str:
        """How many of them there are, in words."""
        groups = f" in {len(self.ranks)} groups" if len(self.ranks) > 1 else ""
        return f"{self.width} {'packed ' if self.formats else ''}latents{groups}"

    @property
    def num_heads(self) -> int:
        return self.up.shape[0]

    @property
    def head_dim(self) -> int:
        return self.up.shape[2]

    @property
    def group_size(self) -> int:
        """C, kv heads per group."""
        return self.num_heads // len(self.ranks)

    @property
    def width(self) -> int:
        """Latents of one token."""
        return sum(self.ranks)

    @property
    def formats(self) -> tuple[Format, ...]:
        """Of each group; none where latents are plain."""
        return self.format or ()  # type: ignore[return-value]  # a tuple since construction

    @property
    def latent_bytes(self) -> int:
        """Bytes of one token's latents, scales and padding included; plain ones at 16 bits."""
        return sum(f.nbytes for f in self.formats) or 2 * self.width

    @property
    def cache_width(self) -> int:
        """Columns of a cache of them: latents, or bytes where they are packed."""
        return self.latent_bytes if self.formats else self.width

    @property
    def cache_dtype(self) -> torch.dtype:
        """Of a cache of them: uint8 where they are packed."""
        return torch.uint8 if self.formats else self.up.dtype

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The kv heads of each group."""
        order = self.head_order or tuple(range(self.num_heads))
        size = self.group_size
        return tuple(order[i : i + size] for i in range(0, self.num_heads, size))

    @property
    def columns(self) -> tuple[slice, ...]:
        """Where each group's latents lie in a row of [width]."""
        ends = accumulate(self.ranks)
        return tuple(slice(end - rank, end) for rank, end in zip(self.ranks, ends, strict=True))

    def block(self, g: int) -> Tensor:
        """Basis of one group, its heads side by side: [rank, C * D]."""
        heads = self.up[list(self.groups[g]), : self.ranks[g]]
        return heads.transpose(0, 1).reshape(self.ranks[g], -1)

    def dense(self) -> Tensor:
        """The map it stands for, [inputs, Hkv * D], offset not included.

        Raises: ValueError without `down`.
        """
        if self.down is None:
            raise ValueError(f"down: expected [Hkv * D, {self.width}], got None")
        made = self.up.new_empty(self.down.shape[0], self.num_heads, self.head_dim)
        for g, (heads, columns) in enumerate(zip(self.groups, self.columns, strict=True)):
            made[:, list(heads)] = (self.down[:, columns] @ self.block(g)).unflatten(1, (-1, self.head_dim))
        return made.flatten(1)

    def take(self, latents: Sequence[Sequence[int]]) -> Projection:
        """Some latents of each group, by their place in its row.

        Raises: ValueError for packed latents, of which a segment may be cut.
        """
        if self.format is not None:
            raise ValueError(f"format: expected plain latents to take some of, got {self.format}")
        ranks = tuple(map(len, latents))
        up = self.up.new_zeros(self.num_heads, max(ranks), self.head_dim)
        for heads, rank, kept in zip(self.groups, ranks, latents, strict=True):
            up[list(heads), :rank] = self.up[list(heads)][:, list(kept)]
        columns = [c.start + i for c, kept in zip(self.columns, latents, strict=True) for i in kept]
        return replace(self, up=up, ranks=ranks, down=None if self.down is None else self.down[:, columns])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Projection:
        moved = {n: x.to(device, dtype) for n in ("up", "down", "offset") if (x := getattr(self, n)) is not None}
        return replace(self, **moved)

    def select(self, heads: list[int]) -> Projection:
        """The same projection for some kv heads, in the order given: it reads those heads alone.

        Raises: ValueError if groups would keep different numbers of heads, or latents read other heads.
        """
        kept = [g for g, members in enumerate(self.groups) if set(members) & set(heads)]
        parts = [[h for h in self.groups[g] if h in heads] for g in kept]
        if len({len(part) for part in parts}) != 1:
            raise ValueError(f"shard: expected every group cut into equal parts, got heads {parts} for heads {heads}")
        ranks = tuple(self.ranks[g] for g in kept)
        order = tuple(heads.index(h) for part in parts for h in part)
        down = None if self.down is None else torch.cat([self.down[:, self.columns[g]] for g in kept], 1)
        if down is not None and not self.of_inputs:
            by_head = down.unflatten(0, (-1, self.num_heads, self.head_dim))  # [1 or 2, Hkv, D, sum R]
            if by_head[:, [h for h in range(self.num_heads) if h not in heads]].any():
                raise ValueError(
                    f"shard: expected latents that are written from heads {heads} alone, got some that need others; "
                    "compress(shards=) makes groups within shards"
                )
            down = by_head[:, heads].flatten(0, 2)
        return replace(
            self,
            up=self.up[heads, : max(ranks)].contiguous(),
            ranks=ranks,
            down=down,
            offset=None if self.offset is None else self.offset[heads].contiguous(),
            head_order=None if order == tuple(range(len(heads))) else order,
            format=tuple(self.formats[g] for g in kept) if self.formats else None,
        )
