"""A layer as operators take it: a list of tensors and a list of integers for either side.

They are the fields of `Keys` and `Values` in kernels/arguments.py, in order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lrattn.projection import Projection

if TYPE_CHECKING:
    from lrattn.factors import LayerFactors


class Operands(NamedTuple):
    key_tensors: list[Tensor | None]
    key_numbers: list[int]
    value_tensors: list[Tensor | None]
    value_numbers: list[int]

    @classmethod
    def of(cls, layer: LayerFactors) -> Operands:
        keys, values, rope = layer.key_basis, layer.value_basis, layer.rope
        turns, offsets = (
            None if x is None else torch.view_as_real(x).flatten(1) for x in (layer.turns, layer.offset_turns)
        )
        rotation = (0, 0, 0) if rope is None else (rope.rotary_dim, int(rope.interleaved), int(rope.fp32_angles))
        norm_column = -1 if layer.key_norm is None else layer.row_width
        rows = 0 if turns is None else len(turns)
        groups = layer.keys.groups, layer.values.groups
        paired = len(groups[0]) == len(groups[1]) and all(set(k) == set(v) for k, v in zip(*groups, strict=True))
        return cls(
            [keys.rows, keys.runs, keys.heads, keys.bias, layer.norm_weight, turns, offsets],
            [layer.head_dim, max(layer.keys.ranks), *rotation, norm_column, rows, *_heads(layer.keys)],
            [values.rows, values.runs, values.heads, values.places, values.bias, layer.values.up],
            [max(layer.values.ranks), int(paired), int(layer.shared), layer.head_dim, *_heads(layer.values)],
        )


def _heads(side: Projection) -> tuple[int, int, int]:
    return side.num_heads, len(side.ranks), side.group_size
