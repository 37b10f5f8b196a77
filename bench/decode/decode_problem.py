"""One decode step of one layer, seeded: the layer, its filled caches, and the dense cache they stand for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

import lrattn
from bench.decode.decode_shapes import CHUNK, Shape
from lrattn.attention.cache import stored
from lrattn.factors.shapes import RANK_STEP, cdiv

REBUILT = 8192  # tokens at a time, in float32


@dataclass(frozen=True, eq=False)
class Problem:
    """B sequences of T tokens each. Latents lie in shuffled pages, as engines keep them, and once more in order; of
    packed rows those that they stand for."""

    layer: lrattn.LayerFactors
    q: Tensor  # [B, Hq, D]
    zk: Tensor  # [B, T, row width]
    zv: Tensor | None  # [B, T, sum Rv]; None when shared
    k_cache: Tensor  # [N, P, k_width]
    v_cache: Tensor | None
    table: Tensor  # [B, T / P] int32
    lens: Tensor  # [B] int32

    @property
    def batch(self) -> int:
        return len(self.q)

    @property
    def tokens(self) -> int:
        return self.zk.shape[1]

    @property
    def must_read(self) -> int:
        """Bytes that a step on latents has to read: every token's rows and both bases, once."""
        rows = self.batch * self.tokens * self.layer.bytes_per_token
        return rows + sum(side.up.numel() * side.up.itemsize for side in (self.layer.keys, self.layer.values))

    @cached_property
    def wide(self) -> lrattn.LayerFactors:
        """The layer in float32."""
        return self.layer.to(dtype=torch.float32)

    def heads(self, b: int) -> tuple[Tensor, Tensor]:
        """Dense keys and values of one sequence, [T, Hkv, D], rebuilt in float32 and rounded."""
        parts = []
        for t in torch.arange(self.tokens, device=self.q.device).split(REBUILT):
            zv = None if self.zv is None else self.zv[b, t].float()
            parts.append([x.to(self.q.dtype) for x in self.wide.rebuild(self.zk[b, t].float(), zv, t)])
        k, v = (torch.cat(part) for part in zip(*parts, strict=True))
        return k, v

    def dense(self) -> tuple[Tensor, Tensor]:
        """The dense cache, [B, T, Hkv, D] each."""
        shape = (self.batch, self.tokens, self.layer.num_kv_heads, self.layer.head_dim)
        k, v = self.q.new_empty(shape), self.q.new_empty(shape)
        for b in range(self.batch):
            k[b], v[b] = self.heads(b)
        return k, v

    def unrotated(self) -> Problem:
        """The same latents of a layer whose keys are not rotated."""
        return replace(self, layer=replace(self.layer, rope=None))

    def chunked(self) -> Problem:
        """The same latents of a layer whose keys are in chunks, rotated to any position with nothing rebuilt."""
        return replace(self, layer=replace(self.layer, chunk=CHUNK))


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The truth of one sequence, in float32: q [Hq, D], k, v [T, Hkv, D] -> [Hq, D]."""
    rows = q.float().unflatten(0, (k.shape[1], -1))  # [Hkv, M, D]
    p = torch.softmax(rows @ k.float().permute(1, 2, 0) * q.shape[-1] ** -0.5, -1)
    return (p @ v.float().transpose(0, 1)).flatten(0, 1)


def make(
    shape: Shape, tokens: int, batch: int, dtype: torch.dtype, device: torch.device | str = "cpu", *,
    shared: bool = False, page: int = 64,
) -> Problem:  # fmt: skip
    """A problem of random latents and bases, scaled so that keys and values have unit variance.

    shared: a layer of the same bytes with one row a group, keys using its first columns and values all of it.
    """
    g = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=g, device=device).mul_(scale).to(dtype)

    layer = _layer(shape, tokens, shared, normal)
    zk = normal(batch, tokens, layer.row_width)
    zv = None if shared else normal(batch, tokens, layer.values.width)
    pages = cdiv(tokens, page)
    table = torch.randperm(batch * pages, generator=g, device=device).view(batch, pages)
    k_cache, v_cache = lrattn.allocate_cache(layer, batch * pages, page)
    t = torch.arange(tokens, device=device)
    for b in range(batch):
        slots = table[b, t // page] * page + t % page
        lrattn.write_latents(layer, zk[b], None if zv is None else zv[b], k_cache, v_cache, slots)
    zk, zv = stored(layer, zk, zv)
    lens = torch.full((batch,), tokens, dtype=torch.int32, device=device)
    q = normal(batch, shape.model.query_heads, shape.model.head_dim)
    return Problem(layer, q, zk, zv, k_cache, v_cache, table.int(), lens)


def _layer(shape: Shape, tokens: int, shared: bool, normal: Callable[..., Tensor]) -> lrattn.LayerFactors:
    model = shape.model

    def side(ranks: tuple[int, ...]) -> lrattn.Projection:
        up = normal(model.kv_heads, ranks[0], model.head_dim, scale=ranks[0] ** -0.5)
        offset = normal(model.kv_heads, model.head_dim) if model.offset else None
        return lrattn.Projection(up, ranks, offset=offset, format=shape.formats(ranks))

    key_ranks, value_ranks = shape.key_ranks, shape.value_ranks
    if shared:
        own = sum(value_ranks) // len(key_ranks) // RANK_STEP * RANK_STEP
        value_ranks = tuple(rank + own for rank in key_ranks)
    rope = lrattn.Rope(model.theta, model.head_dim, tokens, scaling=dict(model.scaling))
    keys, values = side(key_ranks), side(value_ranks)
    return lrattn.LayerFactors(replace(keys, format=None) if shared else keys, values, rope, shared=shared)
