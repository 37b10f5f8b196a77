"""A layer as kernels take it, derived once when it is made: the tensors and the numbers of either side in one record.

Operators take lists.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrattn.factors.band import Band
from lrattn.factors.formats import Format, table, widest
from lrattn.factors.projection import Projection
from lrattn.factors.rope import Rope
from lrattn.factors.shapes import accumulator, product_dtype


class KeySizes(NamedTuple):
    """The numbers of the key side."""

    head_dim: int
    rank: int  # the largest
    rotary_dim: int
    interleaved: int  # 1: pairs are dimensions (2j, 2j + 1)
    exact_turns: int  # 1: float32 results must use every token's own row of turns
    biased: int  # 1: there is a bias
    max_position: int  # rows of the turns: positions, or chunks; 0 without
    num_heads: int  # Hkv
    groups: int  # G
    group_size: int  # C
    chunk: int  # tokens of a chunk, whose keys are turned to their place in it; 0: they are not
    fast: int = 0  # dimensions that are rebuilt beside a band
    terms: int = 0  # T of the band; 0: there is none
    block: int = 0  # tokens that it is for
    runs: int = 0  # bytes of a packed row's runs, of all groups
    even: int = 1  # 1: all groups have the same segments
    packed: tuple[int, ...] = ()  # of the row's segments: bits, and the most latents of a group; () where it is plain

    @property
    def absorbed(self) -> bool:
        """Whether queries meet latents: no key is rebuilt."""
        return not self.rotary_dim or self.chunk > 0


class ValueSizes(NamedTuple):
    """The numbers of the value side."""

    rank: int  # the largest
    paired: int  # 1: group g holds the heads of key group g
    shared: int  # 1: its row serves the keys too
    head_dim: int
    num_heads: int  # Hkv
    groups: int  # G
    group_size: int  # C
    runs: int = 0  # as for keys, as those below
    even: int = 1
    packed: tuple[int, ...] = ()


class Keys(NamedTuple):
    """The key side of a layer, by place; the two dimensions of a rotated pair are adjacent."""

    rows: Tensor  # [sum Rk, C * D]
    runs: Tensor  # [G, 3] int32: first column in a cache row, rank, first row of `rows`
    packs: Tensor | None  # [G, 3 n] int32: n segments of packed rows, as formats.table has them
    heads: Tensor  # [Hkv] int32, place -> kv head
    norms: Tensor  # [Hkv] float32: of the longest row of each head's basis
    bias: Tensor | None  # [Hkv, D] float32
    turns: Tensor | None  # [max_position, rotary_dim] float32, cos and sin of a pair adjacent; None: no rotation
    offset_turns: Tensor | None  # [MAX_BLOCK, rotary_dim] float32, of keys that are rebuilt
    functions: Tensor | None  # [block, T] of the band, float16, or float32 in a layer of float32
    coefficients: Tensor | None  # [2, T, D / 2] float32, of the band
    sizes: KeySizes


class Values(NamedTuple):
    """The value side of a layer."""

    rows: Tensor  # [sum Rv, C * D], by place
    runs: Tensor  # [G, 3] int32, as for keys
    packs: Tensor | None  # [G, 3 n] int32
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
        cls, keys: Projection, values: Projection, rope: Rope | None, shared: bool, columns: tuple[slice, ...],
        pairs: Tensor, turns: Tensor | None, chunk: int | None,
    ) -> Operands:  # fmt: skip
        """columns: each key group's latents in a row of the key cache. pairs: [D], pair order -> model order.
        turns: complex, by position or chunk."""
        formats = (values if shared else keys).formats
        tables = turns, None if rope is None or chunk else rope.offset_turns(keys.up.device)
        turned = [None if x is None else torch.view_as_real(x).flatten(1) for x in tables]
        band = None if rope is None or chunk else rope.band(keys.head_dim, keys.up.dtype)
        functions = coefficients = None
        if isinstance(band, Band):
            kind = torch.float32 if keys.up.dtype == torch.float32 else torch.float16
            functions, coefficients = band.functions.to(keys.up.device, kind), band.coefficients.to(keys.up.device)
        banded = (band.fast, band.terms, band.block) if isinstance(band, Band) else (0, 0, 0)
        rotation = (0, 0, 0) if rope is None else (rope.rotary_dim, int(rope.interleaved), int(rope.fp32_angles))
        key = _basis(keys, columns, formats, pairs)
        value = _basis(values, values.columns, values.formats, torch.arange(values.head_dim, device=pairs.device))
        paired = [set(members) for members in keys.groups] == [set(members) for members in values.groups]
        key_sizes = KeySizes(
            keys.head_dim, max(keys.ranks), *rotation, int(keys.offset is not None), 0 if turns is None else len(turns),
            *_heads(keys), chunk or 0, *banded, *_packed(formats),
        )  # fmt: skip
        value_sizes = ValueSizes(
            max(values.ranks), int(paired), int(shared), values.head_dim, *_heads(values), *_packed(values.formats)
        )
        places = value["heads"].argsort().int()
        norms = keys.up.float().norm(dim=2).amax(1)[key["heads"].long()]
        return cls(
            Keys(
                **key,
                norms=norms,
                turns=turned[0],
                offset_turns=turned[1],
                functions=functions,
                coefficients=coefficients,
                sizes=key_sizes,
            ),
            Values(**value, places=places, up=values.up, sizes=value_sizes),
        )

    @classmethod
    def of_lists(cls, key_tensors: Any, key_numbers: Any, value_tensors: Any, value_numbers: Any) -> Operands:
        """From what `lists` gives of both sides."""
        return cls(
            Keys._make((*key_tensors, _sizes(KeySizes, key_numbers))),
            Values._make((*value_tensors, _sizes(ValueSizes, value_numbers))),
        )


def lists(*sides: Keys | Values) -> list[Any]:
    """For each side a list of its tensors and one of its numbers, as operators take them; the segments of a packed row
    come last."""
    return [fields for side in sides for fields in ([*side[:-1]], [*side.sizes[:-1], *side.sizes.packed])]


def _sizes(kind: type[KeySizes] | type[ValueSizes], numbers: Any) -> Any:
    fixed = len(kind._fields) - 1
    return kind._make((*numbers[:fixed], tuple(numbers[fixed:])))


def _packed(formats: tuple[Format, ...]) -> tuple[int, int, tuple[int, ...]]:
    """runs, even and packed of sizes."""
    return sum(f.run for f in formats), int(len(set(formats)) < 2), widest(formats)


def _heads(side: Projection) -> tuple[int, int, int]:
    return side.num_heads, len(side.ranks), side.group_size


def _basis(side: Projection, columns: tuple[slice, ...], formats: tuple[Format, ...], dims: Tensor) -> dict[str, Any]:
    """`up` group by group, and where each group's latents lie in a row of the cache: what `Keys` and `Values` share.

    A head's place is g * C + c: the c-th head of group g.

    Args:
        columns: each group's latents in a row. formats: of that row, where it is packed.
        dims: [D], order of a head's dimensions.
    """
    device, kind = side.up.device, product_dtype(side.up)
    order = torch.tensor(side.groups).flatten()
    blocks = [side.block(g).to(kind).unflatten(1, (-1, side.head_dim))[..., dims] for g in range(len(side.ranks))]
    runs = [(c.start, rank, own.start) for c, rank, own in zip(columns, side.ranks, side.columns, strict=True)]
    return {
        "rows": torch.cat([block.flatten(1) for block in blocks]),
        "runs": torch.tensor(runs, dtype=torch.int32, device=device),
        "packs": torch.tensor(table(formats), dtype=torch.int32, device=device) if formats else None,
        "heads": order.int().to(device),
        "bias": None if side.offset is None else side.offset[order][:, dims].to(accumulator(side.up.dtype)),
    }
