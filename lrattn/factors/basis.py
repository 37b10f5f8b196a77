"""A projection's basis as attention reads it: derived once when a layer is made, never in a call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lrattn.factors.formats import Format, table
from lrattn.factors.projection import Projection
from lrattn.factors.shapes import accumulator, product_dtype


@dataclass(frozen=True, eq=False)
class Basis:
    """`up` group by group, with where each group's latents lie in a row of the cache.

    A head's place is g * C + c: the c-th head of group g. `heads` says which kv head of the model that is.
    """

    rows: Tensor  # [sum ranks, C * D], groups one below the other, the heads of a group side by side
    bias: Tensor | None  # the offset, [Hkv, D] by place, float32 (float64 for float64)
    heads: Tensor  # [Hkv] int32, place -> kv head
    places: Tensor  # [Hkv] int32, kv head -> place
    runs: Tensor  # [G, 3] int32: first column in a cache row, rank, first row of `rows`
    packs: Tensor | None  # [G, 4 n] int32: n segments of packed rows, as formats.table has them
    blocks: tuple[Tensor, ...]  # per group [rank, C * D], views of `rows`
    biases: tuple[Tensor, ...]  # per group [C, D], views of `bias`; no groups without an offset

    @classmethod
    def of(cls, side: Projection, columns: tuple[slice, ...], dims: Tensor, formats: tuple[Format, ...]) -> Basis:
        """The basis of one side whose groups' latents begin where `columns` do; dims [D] orders each head's dims.

        formats: of the rows it is read from, where they are packed.
        """
        device, kind = side.up.device, product_dtype(side.up)
        order = torch.tensor([h for members in side.groups for h in members], dtype=torch.int32)
        blocks = [side.block(g).to(kind).unflatten(1, (-1, side.head_dim))[..., dims] for g in range(len(side.ranks))]
        rows = torch.cat([b.flatten(1) for b in blocks])
        bias = None if side.offset is None else side.offset[order.long()][:, dims].to(accumulator(side.up.dtype))
        runs = [(c.start, rank, own.start) for c, rank, own in zip(columns, side.ranks, side.columns, strict=True)]
        return cls(
            rows=rows,
            bias=bias,
            heads=order.to(device),
            places=order.argsort().int().to(device),
            runs=torch.tensor(runs, dtype=torch.int32, device=device),
            packs=torch.tensor(table(formats), dtype=torch.int32, device=device) if formats else None,
            blocks=rows.split(list(side.ranks)),
            biases=() if bias is None else bias.split(side.group_size),
        )
