"""A layer as operators take it: a list of tensors and a list of integers for either side.

They are the fields of `Keys` and `Values` in kernels/arguments.py, in order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lrattn.basis import Basis
from lrattn.projection import Projection
from lrattn.rope import Rope


class Operands(NamedTuple):
    key_tensors: list[Tensor | None]
    key_numbers: list[int]
    value_tensors: list[Tensor | None]
    value_numbers: list[int]

    @classmethod
    def of(
        cls, keys: Projection, values: Projection, bases: tuple[Basis, Basis], rope: Rope | None, shared: bool,
        norm_weight: Tensor | None, norm_column: int, tables: tuple[Tensor | None, Tensor | None],
    ) -> Operands:  # fmt: skip
        """bases: of keys and of values. tables: complex turns by position and by offset in a tile."""
        key, value = bases
        turns, offsets = (None if x is None else torch.view_as_real(x).flatten(1) for x in tables)
        positions = 0 if turns is None else len(turns)
        rotation = (0, 0, 0) if rope is None else (rope.rotary_dim, int(rope.interleaved), int(rope.fp32_angles))
        extras = (key.bias is not None) + (norm_weight is not None)
        groups = keys.groups, values.groups
        paired = len(groups[0]) == len(groups[1]) and all(set(k) == set(v) for k, v in zip(*groups, strict=True))
        return cls(
            [key.rows, key.runs, key.heads, key.bias, norm_weight, turns, offsets],
            [keys.head_dim, max(keys.ranks), *rotation, extras, norm_column, positions, *_heads(keys)],
            [value.rows, value.runs, value.heads, value.places, value.bias, values.up],
            [max(values.ranks), int(paired), int(shared), values.head_dim, *_heads(values)],
        )


def _heads(side: Projection) -> tuple[int, int, int]:
    return side.num_heads, len(side.ranks), side.group_size
