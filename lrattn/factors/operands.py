"""A layer as kernels take it: the tensors and the numbers of either side in one record; operators take lists."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrattn.factors.basis import Basis
from lrattn.factors.projection import Projection
from lrattn.factors.rope import Rope


class KeySizes(NamedTuple):
    """The numbers of the key side."""

    head_dim: int
    rank: int  # the largest
    rotary_dim: int
    interleaved: int  # 1: pairs are dimensions (2j, 2j + 1)
    exact_turns: int  # 1: float32 results must use every token's own row of turns
    biased: int  # 1: there is a bias
    max_position: int  # rows of the turns; 0 without
    num_heads: int  # Hkv
    groups: int  # G
    group_size: int  # C
    packed: tuple[int, ...] = ()  # of the row's segments: bits, and the most latents of a group; () where it is plain


class ValueSizes(NamedTuple):
    """The numbers of the value side."""

    rank: int  # the largest
    paired: int  # 1: group g holds the heads of key group g
    shared: int  # 1: its row serves the keys too
    head_dim: int
    num_heads: int  # Hkv
    groups: int  # G
    group_size: int  # C
    packed: tuple[int, ...] = ()  # as for keys


class Keys(NamedTuple):
    """The key side of a layer, by place; the two dimensions of a rotated pair are adjacent."""

    rows: Tensor  # [sum Rk, C * D]
    runs: Tensor  # [G, 3] int32: first column in a cache row, rank, first row of `rows`
    packs: Tensor | None  # [G, 4 n] int32: n segments of packed rows, see Basis
    heads: Tensor  # [Hkv] int32, place -> kv head
    bias: Tensor | None  # [Hkv, D] float32
    turns: Tensor | None  # [max_position, rotary_dim] float32, cos and sin of a pair adjacent; None: no rotation
    offset_turns: Tensor | None  # [MAX_BLOCK, rotary_dim] float32
    sizes: KeySizes


class Values(NamedTuple):
    """The value side of a layer."""

    rows: Tensor  # [sum Rv, C * D], by place
    runs: Tensor  # [G, 3] int32, as for keys
    packs: Tensor | None  # [G, 4 n] int32
    heads: Tensor  # [Hkv] int32, place -> kv head
    places: Tensor  # [Hkv] int32, kv head -> place
    bias: Tensor | None  # [Hkv, D] float32, by place
    up: Tensor  # [Hkv, Rv, D], model order
    sizes: ValueSizes


class Operands(NamedTuple):
    keys: Keys
    values: Values

    @classmethod
    def of(
        cls, keys: Projection, values: Projection, bases: tuple[Basis, Basis], rope: Rope | None, shared: bool,
        tables: tuple[Tensor | None, Tensor | None], packs: tuple[tuple[int, ...], tuple[int, ...]],
    ) -> Operands:  # fmt: skip
        """bases: of keys and of values. tables: complex turns by position and by offset in a tile. packs: segments of
        the rows that keys and values are read from."""
        key, value = bases
        turns, offsets = (None if x is None else torch.view_as_real(x).flatten(1) for x in tables)
        positions = 0 if turns is None else len(turns)
        rotation = (0, 0, 0) if rope is None else (rope.rotary_dim, int(rope.interleaved), int(rope.fp32_angles))
        biased = int(key.bias is not None)
        groups = keys.groups, values.groups
        paired = len(groups[0]) == len(groups[1]) and all(set(k) == set(v) for k, v in zip(*groups, strict=True))
        key_sizes = KeySizes(keys.head_dim, max(keys.ranks), *rotation, biased, positions, *_heads(keys), packs[0])
        value_sizes = ValueSizes(
            max(values.ranks), int(paired), int(shared), values.head_dim, *_heads(values), packs[1]
        )
        return cls(
            Keys(key.rows, key.runs, key.packs, key.heads, key.bias, turns, offsets, key_sizes),
            Values(value.rows, value.runs, value.packs, value.heads, value.places, value.bias, values.up, value_sizes),
        )

    @classmethod
    def of_lists(cls, key_tensors: Any, key_numbers: Any, value_tensors: Any, value_numbers: Any) -> Operands:
        """From what `lists` gives of both sides."""
        values = Values._make((*value_tensors, value_sizes_of(value_numbers)))
        return cls(keys_of(key_tensors, key_numbers), values)


def lists(*sides: Keys | Values) -> list[Any]:
    """For each side a list of its tensors and one of its numbers, as operators take them."""
    return [fields for side in sides for fields in ([*side[:-1]], [*side.sizes[:-1], *side.sizes.packed])]


def keys_of(tensors: Any, numbers: Any) -> Keys:
    return Keys._make((*tensors, key_sizes_of(numbers)))


def key_sizes_of(numbers: Any) -> KeySizes:
    """From the list of numbers: the segments of a packed row come last."""
    fixed = len(KeySizes._fields) - 1
    return KeySizes._make((*numbers[:fixed], tuple(numbers[fixed:])))


def value_sizes_of(numbers: Any) -> ValueSizes:
    fixed = len(ValueSizes._fields) - 1
    return ValueSizes._make((*numbers[:fixed], tuple(numbers[fixed:])))


def _heads(side: Projection) -> tuple[int, int, int]:
    return side.num_heads, len(side.ranks), side.group_size
