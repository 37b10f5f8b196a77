"""What the kernels are given: tensors and numbers, one record for each side, for the tokens, and for the softmax."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class KeySizes(NamedTuple):
    """The numbers of the key side."""

    head_dim: int
    rank: int  # the largest
    rotary_dim: int
    interleaved: int  # 1: pairs are dimensions (2j, 2j + 1)
    exact_turns: int  # 1: float32 results must use every token's own row of turns
    extras: int  # how many of bias and key norm there are
    norm_column: int  # where 1 / rms begins in a key row; -1: no key norm
    max_position: int  # rows of the turns; 0 without
    num_heads: int  # Hkv
    groups: int  # G
    group_size: int  # C


class ValueSizes(NamedTuple):
    """The numbers of the value side."""

    rank: int  # the largest
    paired: int  # 1: group g holds the heads of key group g
    shared: int  # 1: its row serves the keys too
    head_dim: int
    num_heads: int  # Hkv
    groups: int  # G
    group_size: int  # C


class Keys(NamedTuple):
    """The key side of a layer, by place; the two dimensions of a rotated pair are adjacent."""

    rows: Tensor  # [sum Rk, C * D]
    runs: Tensor  # [G, 3] int32: first column in a cache row, rank, first row of `rows`
    heads: Tensor  # [Hkv] int32, place -> kv head
    bias: Tensor | None  # [Hkv, D] float32
    weight: Tensor | None  # [D] float32, of the key norm
    turns: Tensor | None  # [max_position, rotary_dim] float32, cos and sin of a pair adjacent; None: no rotation
    offset_turns: Tensor | None  # [MAX_BLOCK, rotary_dim] float32
    sizes: KeySizes


class Values(NamedTuple):
    """The value side of a layer."""

    rows: Tensor  # [sum Rv, C * D], by place
    runs: Tensor  # [G, 3] int32, as for keys
    heads: Tensor  # [Hkv] int32, place -> kv head
    places: Tensor  # [Hkv] int32, kv head -> place
    bias: Tensor | None  # [Hkv, D] float32, by place
    up: Tensor  # [Hkv, Rv, D], model order
    sizes: ValueSizes


class Tokens(NamedTuple):
    """Where the tokens of each sequence lie."""

    pages: Tensor  # [B, pages] int32
    lens: Tensor  # [B] int32
    starts: Tensor | None  # [B] int32
    positions: Tensor | None  # [N, P] int32
    bound: int  # lengths are clamped to it

    @property
    def starts_stride(self) -> int:
        return 0 if self.starts is None else self.starts.stride(0)

    @property
    def positions_strides(self) -> tuple[int, ...]:
        return (0, 0) if self.positions is None else self.positions.stride()

    def of(self, some: slice) -> Tokens:
        """The tokens of some of the sequences."""
        starts = None if self.starts is None else self.starts[some]
        return self._replace(pages=self.pages[some], lens=self.lens[some], starts=starts)


class Rule(NamedTuple):
    """How scores become probabilities, and who sees what."""

    scale: float
    softcap: float  # 0: none
    causal: bool
    window: int  # 0: none
