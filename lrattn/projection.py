"""The low-rank factors of one side, keys or values, as a frozen record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from lrattn.shapes import FLOATS, RANK_STEP, check


@dataclass(frozen=True, eq=False)
class Projection:
    """x -> x @ down = latents; latents of group g @ up[h, :ranks[g]] + bias[h] = head h.

    Args:
        up: [Hkv, max rank, D], heads in the model's order; rows past a group's rank are zero.
        ranks: one rank per group, each a multiple of 16; C = Hkv / len(ranks) heads share a group.
        down: [E, sum ranks], groups side by side; needed only to write latents.
        bias: [Hkv, D], added to every head; outside the low-rank part, so exact.
        head_order: kv heads listed group by group; None is 0 .. Hkv - 1.
        format: storage format of the latents; None is plain numbers of the cache's dtype.

    Raises: ValueError naming the tensor, what was expected and what came.
    """

    up: Tensor
    ranks: tuple[int, ...]
    down: Tensor | None = None
    bias: Tensor | None = None
    head_order: tuple[int, ...] | None = None
    format: Any = None

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
            raise ValueError(
                f"ranks: expected a number of groups that divides Hkv={self.num_heads}, got {len(self.ranks)}"
            )
        kind: dict[str, Any] = {"dtype": self.up.dtype, "device": self.up.device}
        if self.down is not None:
            check("down", self.down, f"E {sum(self.ranks)}", dims, **kind)
        if self.bias is not None:
            check("bias", self.bias, "Hkv D", dims, **kind)
        if self.head_order is not None:
            object.__setattr__(self, "head_order", tuple(int(h) for h in self.head_order))
            if sorted(self.head_order) != list(range(self.num_heads)):
                raise ValueError(
                    f"head_order: expected a permutation of 0..{self.num_heads - 1}, got {self.head_order}"
                )
        if self.format is not None:
            raise ValueError(f"format: expected None (plain latents), got {self.format!r}")

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
        """The weight it stands for, [Hkv, D, E], bias not included.

        Raises: ValueError without `down`.
        """
        if self.down is None:
            raise ValueError(f"down: expected [E, {self.width}], got None")
        weight = self.up.new_empty(self.num_heads, self.head_dim, self.down.shape[0])
        for heads, columns, rank in zip(self.groups, self.columns, self.ranks, strict=True):
            weight[list(heads)] = self.up[list(heads), :rank].mT @ self.down[:, columns].T
        return weight

    def take(self, latents: Sequence[Sequence[int]]) -> Projection:
        """Some latents of each group, by their place in its row."""
        ranks = tuple(map(len, latents))
        up = self.up.new_zeros(self.num_heads, max(ranks), self.head_dim)
        for heads, rank, kept in zip(self.groups, ranks, latents, strict=True):
            up[list(heads), :rank] = self.up[list(heads)][:, list(kept)]
        columns = [c.start + i for c, kept in zip(self.columns, latents, strict=True) for i in kept]
        return replace(self, up=up, ranks=ranks, down=None if self.down is None else self.down[:, columns])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Projection:
        moved = {n: x.to(device, dtype) for n in ("up", "down", "bias") if (x := getattr(self, n)) is not None}
        return replace(self, **moved)

    def select(self, heads: list[int]) -> Projection:
        """The same projection for some kv heads, in the order given.

        A group is kept whole if any of its heads is chosen: where a group is cut, its latents are needed by
        several shards and each of them holds a copy.

        Raises: ValueError if groups would keep different numbers of heads.
        """
        kept = [g for g, members in enumerate(self.groups) if set(members) & set(heads)]
        parts = [[h for h in self.groups[g] if h in heads] for g in kept]
        if len({len(part) for part in parts}) != 1:
            raise ValueError(f"shard: expected every group cut into equal parts, got heads {parts} for heads {heads}")
        ranks = tuple(self.ranks[g] for g in kept)
        order = tuple(heads.index(h) for part in parts for h in part)
        return replace(
            self,
            up=self.up[heads, : max(ranks)].contiguous(),
            ranks=ranks,
            down=None if self.down is None else torch.cat([self.down[:, self.columns[g]] for g in kept], 1),
            bias=None if self.bias is None else self.bias[heads].contiguous(),
            head_order=None if order == tuple(range(len(heads))) else order,
        )


@dataclass(frozen=True, eq=False)
class KeyNorm:
    """RMS norm of each rebuilt key head, before RoPE: k * weight / sqrt(mean(k^2) + eps).

    Args:
        weight: [D]; where a model stores it as an offset from one (Gemma), the offset is added already.
        eps: added to the mean square.
    """

    weight: Tensor
    eps: float = 1e-6

    def inverse_rms(self, k: Tensor) -> Tensor:
        """1 / rms of raw keys [.., D] -> [..]."""
        return (k.square().mean(-1) + self.eps).rsqrt()

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> KeyNorm:
        return replace(self, weight=self.weight.to(device, dtype))
