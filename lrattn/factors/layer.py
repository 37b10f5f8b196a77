"""The factors of one layer: a frozen record that writes latents and reads heads back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lrattn.factors.operands import Keys, Operands, Values
from lrattn.factors.projection import Projection
from lrattn.factors.rope import Rope, rows_at
from lrattn.factors.shapes import CHUNK_STEP, INTEGERS, accumulator, check, check_tensors, product_dtype


@dataclass(frozen=True, eq=False)
class LayerFactors:
    """What attention needs of one layer beside the query and the cache.

    Latents are written from keys and values as attention is given them: after the model's norms and rotation. Keys are
    stored in one of three forms, k_t being a key as it is given, R(t) the rotation to position t:

        rope and chunk N    R(-(t // N) N) k_t: turned to their place in a chunk of N positions. Queries are turned back
                            by a chunk's first position and meet its latents themselves. For positions below
                            2^20, or the rope's max_position where that is more.
        rope alone          R(-t) k_t: before RoPE. They are rebuilt from their latents, and turned again.
        no rope             k_t, as it comes. Queries meet the latents themselves.

    Args:
        keys, values: the two sides. Heads, head dim, dtype and device agree.
        rope: the model's rotation of keys.
        shared: one row per group serves both: values use the whole row, keys its first keys.ranks[g] columns.
        wo: [Hq, D, E] output projection, needed only for project="hidden".
        chunk: N, a multiple of 64.
        max_position: of a layer without a rope, the positions that latents of rotated keys stand for: 0 ..
            max_position - 1. None: any, as of a model that does not rotate, or not known.

    Raises: ValueError naming the tensor, what was expected and what came.
    """

    keys: Projection
    values: Projection
    rope: Rope | None
    shared: bool = False
    wo: Tensor | None = None
    chunk: int | None = None
    max_position: int | None = None
    # Derived once.
    pairs: Tensor = field(init=False, repr=False)  # [D], pair order -> model order
    turns: Tensor | None = field(init=False, repr=False)  # [positions or chunks, rotary_dim / 2] complex
    operands: Operands = field(init=False, repr=False)
    checked: dict[Any, str] = field(init=False, repr=False, default_factory=dict)  # see attention.ops

    def __post_init__(self) -> None:
        self._check()
        rope, columns, turns = self.rope, self.key_columns, None
        pairs = (torch.arange(self.head_dim) if rope is None else rope.pair_order(self.head_dim)).to(self.device)
        if rope is not None:
            where = self.device, self.dtype
            turns = rope.turns(*where) if self.chunk is None else rope.chunk_turns(self.chunk, *where)
        operands = Operands.of(self.keys, self.values, rope, self.shared, columns, pairs, turns, self.chunk)
        vars(self).update(pairs=pairs, turns=turns, operands=operands)

    def _check(self) -> None:
        up, dims = self.keys.up, {"Hkv": self.keys.num_heads, "D": self.keys.head_dim}
        kind: dict[str, Any] = {"dtype": up.dtype, "device": up.device}
        check("values.up", self.values.up, "Hkv Rv D", dims, **kind)
        n = self.num_kv_heads * self.head_dim
        for name, side, rows in (("keys", self.keys, n), ("values", self.values, 2 * n if self.shared else n)):
            if side.down is not None and not side.of_inputs:
                check(f"{name}.down", side.down, f"{rows} {side.width}", dims)
        if self.rope is not None and (self.rope.rotary_dim > self.head_dim or self.head_dim % 2):
            raise ValueError(f"rope: expected an even D of at least {self.rope.rotary_dim}, got D={self.head_dim}")
        self._check_form()
        if self.wo is not None:
            check("wo", self.wo, "Hq D E", dims, **kind)
            if dims["Hq"] % dims["Hkv"]:
                raise ValueError(f"wo: expected a multiple of Hkv={dims['Hkv']} heads, got {dims['Hq']}")
        if self.shared:
            self._check_shared()

    def _check_form(self) -> None:
        for name, n, needed in (("chunk", self.chunk, True), ("max_position", self.max_position, False)):
            if n is None:
                continue
            step = CHUNK_STEP if name == "chunk" else 1
            if not isinstance(n, int) or isinstance(n, bool) or n < step or n % step:
                raise ValueError(f"{name}: expected None or a positive multiple of {step}, got {n!r}")
            if (self.rope is not None) != needed:
                raise ValueError(f"{name}: expected None {'without' if needed else 'with'} a rope, got {n}")

    def _check_shared(self) -> None:
        keys, values = self.keys, self.values
        if keys.format is not None:
            wrong = f"keys.format to be None (values.format packs the row), got {keys.format}"
        elif keys.groups != values.groups:
            wrong = f"equal groups, got {keys.groups} and {values.groups}"
        elif any(k > v for k, v in zip(keys.ranks, values.ranks, strict=True)):
            wrong = f"key ranks within value ranks, got {keys.ranks} and {values.ranks}"
        elif keys.down is not None:
            wrong = "keys.down to be None (values.down writes the row), got a tensor"
        else:
            return
        raise ValueError(f"shared: expected {wrong}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied without what is derived, whose tables are views of each other in other dtypes."""
        form = self.chunk, self.max_position
        return LayerFactors, (self.keys, self.values, self.rope, self.shared, self.wo, *form)

    def __repr__(self) -> str:
        sides = f"keys={self.keys.latents_told}, values={self.values.latents_told}"
        form = ", shared" if self.shared else ""
        if self.rope is not None:
            form += ", before RoPE" if self.chunk is None else f", in chunks of {self.chunk}"
        heads = f"heads={self.num_kv_heads}, head_dim={self.head_dim}"
        return f"LayerFactors({heads}, {sides}{form}, {self.dtype} on {self.device})"

    @property
    def num_kv_heads(self) -> int:
        return self.keys.num_heads

    @property
    def head_dim(self) -> int:
        return self.keys.head_dim

    @property
    def dtype(self) -> torch.dtype:
        return self.keys.up.dtype

    @property
    def device(self) -> torch.device:
        return self.keys.up.device

    @property
    def absorbed(self) -> bool:
        """Whether queries meet the latents of keys: none is rebuilt."""
        return self.operands.keys.sizes.absorbed

    @property
    def row_side(self) -> Projection:
        """The side whose latents the key cache holds: the values', in the only cache, when shared."""
        return self.values if self.shared else self.keys

    @property
    def row_width(self) -> int:
        """Latents in a row of the key cache (of the only cache when shared)."""
        return self.row_side.width

    @property
    def packed(self) -> bool:
        """Whether some latents are."""
        return bool(self.row_side.formats or self.values.formats)

    @property
    def k_width(self) -> int:
        """Columns of the key cache: latents, or bytes where they are packed."""
        return self.row_side.cache_width

    @property
    def v_width(self) -> int:
        """Columns of the value cache, bytes where its latents are packed; 0 when shared."""
        return 0 if self.shared else self.values.cache_width

    @property
    def k_dtype(self) -> torch.dtype:
        """Of the key cache: the layer's, or uint8 where its latents are packed."""
        return self.row_side.cache_dtype

    @property
    def v_dtype(self) -> torch.dtype:
        """Of the value cache."""
        return self.values.cache_dtype

    @property
    def bytes_per_token(self) -> int:
        """Bytes a token holds in the caches: scales and padding included, plain numbers at 16 bits."""
        return self.row_side.latent_bytes + (0 if self.shared else self.values.latent_bytes)

    @property
    def key_columns(self) -> tuple[slice, ...]:
        """Each key group's latents in a row of the key cache."""
        return _columns_in_rows(self.keys, self.values) if self.shared else self.keys.columns

    def check_presence(self, name: str, x: Tensor | None) -> None:
        """Raises ValueError unless the value side's tensor `x` is there, or None for a shared layer."""
        if (x is None) != self.shared:
            expected = "None, the layer is shared" if self.shared else "a tensor, the layer is not shared"
            raise ValueError(f"{name}: expected {expected}, got {'None' if x is None else 'a tensor'}")

    def project(
        self, k: Tensor, v: Tensor, positions: Tensor | None = None, *, wide: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Keys and values -> latents (zk [.., sum Rk], zv [.., sum Rv]); (row, None) when shared.

            z = ([k, v] - offset) @ down,   k turned back as its layer stores it

        Args:
            k, v: [.., Hkv, D] each, as attention is given them: after the model's norms, keys rotated.
            positions: [..] integers, of a layer with a rope: where the keys were rotated to; in chunks those before 0
                count as of the first. Others take none.
            wide: latents in the dtype of the products, as where those of several layers are added up.

        Products are of the layer's dtype (float32 for float16 on a CPU); what comes before is in float32.
        Raises: ValueError if a write side (`down`) is missing or reads attention inputs, or a tensor does not fit.
        """
        check_tensors(k=k, v=v)
        lead = k.shape[:-2]
        heads = self.num_kv_heads, self.head_dim
        self._check_like("k", k, (*lead, *heads), ("..", *heads))
        self._check_like("v", v, (*lead, *heads), (*lead, *heads))
        if self.rope is not None and self.turns is not None:  # Rope.turn_back, by the layer's own tables
            turns = self._turns_at(positions, lead, k.device)
            k = self.rope.turned(k, turns.reciprocal().view(*lead, 1, turns.shape[-1]), self.pairs)
        elif positions is not None:
            raise ValueError("positions: expected None, the layer has no rope, got a tensor")
        k, v = self._centred(self.keys, k), self._centred(self.values, v)
        if self.shared:
            return self._latents("values", torch.cat((k, v), -1), wide), None
        return self._latents("keys", k, wide), self._latents("values", v, wide)

    def _centred(self, side: Projection, x: Tensor) -> Tensor:
        """x [.., Hkv, D] without the offset, heads side by side: [.., Hkv * D]."""
        acc = accumulator(self.dtype)
        return (x if side.offset is None else x.to(acc) - side.offset.to(acc)).flatten(-2)

    def _latents(self, name: str, x: Tensor, wide: bool) -> Tensor:
        side: Projection = getattr(self, name)
        if side.down is None:
            raise ValueError(f"{name}.down: expected [{x.shape[-1]}, {side.width}] to write latents, got None")
        if side.of_inputs:
            raise ValueError(
                f"{name}.down: expected a map of heads, got one of attention inputs, from a file before version 3: "
                "use lrattn.in_kv_space(factors, model)"
            )
        kind = product_dtype(side.down)
        kind = accumulator(self.dtype) if wide else kind
        z = x.to(kind) @ side.down.to(kind)
        return z if wide else z.to(self.dtype)

    def _check_like(self, name: str, x: Tensor, shape: tuple[int, ...], told: tuple[int | str, ...]) -> None:
        """Raises ValueError unless x has this shape, told so, and the layer's dtype and device."""
        if x.shape != shape or x.dtype != self.dtype or x.device != self.device:
            expected = f"[{', '.join(map(str, told))}] {self.dtype} on {self.device}"
            raise ValueError(f"{name}: expected {expected}, got {list(x.shape)} {x.dtype} on {x.device}")

    def _positions(self, positions: Tensor | None, lead: torch.Size) -> Tensor:
        """Raises ValueError unless they are integers of this shape."""
        if not isinstance(positions, Tensor) or positions.shape != lead or positions.dtype not in INTEGERS:
            got = f"{list(positions.shape)} {positions.dtype}" if isinstance(positions, Tensor) else positions
            raise ValueError(f"positions: expected integers of shape {list(lead)}, got {got}")
        return positions

    def _turns_at(self, positions: Tensor | None, lead: torch.Size, device: torch.device) -> Tensor:
        """Of the keys at these positions, [n, rotary_dim / 2]."""
        assert self.turns is not None
        return rows_at(self.turns, self._positions(positions, lead).reshape(-1).to(device), self.chunk)

    def raw_keys(self, row: Tensor, g: int) -> Tensor:
        """Keys of group g from rows [n, >= row_width], as they are stored: [n, C, D], pairs adjacent, not rotated.

        Rows wider than the layer's dtype are multiplied in their own.
        """
        return _heads(self.keys, self.operands.keys, g, row[:, self.key_columns[g]])

    def turn_(self, tile: Tensor, turns: Tensor | None) -> Tensor:
        """Rotation of raw keys [n, C, D] in place; turns [n, rotary_dim / 2]."""
        if self.rope is not None and turns is not None:
            rotated = tile[..., : self.rope.rotary_dim].unflatten(-1, (-1, 2))
            torch.view_as_complex(rotated).mul_(turns[:, None])
        return tile

    def rebuild(self, zk: Tensor, zv: Tensor | None, positions: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Latents -> dense keys (rotated) and values, [.., Hkv, D] each, in the latents' dtype.

        Args:
            zk: [.., row width]; zv: [.., sum Rv], None when shared.
            positions: [..] integers; may be None only without a rope.

        Raises: ValueError naming the tensor, what was expected and what came.
        """
        self.check_presence("zv", zv)
        lead = zk.shape[:-1]
        for name, x, width in (("zk", zk, self.row_width), ("zv", zv, self.values.width)):
            if x is not None:
                self._check_like(name, x, (*lead, width), (*lead, width))
        rows = zk.reshape(-1, zk.shape[-1])
        value_rows = rows if zv is None else zv.reshape(-1, zv.shape[-1])
        turns = None
        if self.turns is not None:
            turns = self._turns_at(positions, lead, rows.device)
        k, v = (rows.new_empty(len(rows), self.num_kv_heads, self.head_dim) for _ in range(2))
        for g, heads in enumerate(self.keys.groups):
            tile = self.turn_(self.raw_keys(rows, g), turns)
            for i, h in enumerate(heads):
                k[:, h, self.pairs] = tile[:, i].to(k.dtype)
        for g, (heads, columns) in enumerate(zip(self.values.groups, self.values.columns, strict=True)):
            v[:, list(heads)] = _heads(self.values, self.operands.values, g, value_rows[:, columns]).to(v.dtype)
        return k.view(*lead, *k.shape[1:]), v.view(*lead, *v.shape[1:])

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> LayerFactors:
        return replace(
            self,
            keys=self.keys.to(device, dtype),
            values=self.values.to(device, dtype),
            wo=None if self.wo is None else self.wo.to(device, dtype),
        )

    def shard(self, rank: int, world: int) -> LayerFactors:
        """The part of one tensor-parallel rank: consecutive kv heads, their query heads and their rows of wo.

        Where world exceeds Hkv, kv heads are repeated and their query heads divided, as engines do. "hidden"
        results of the ranks are partial sums. A latent group that is cut is held by every rank it serves.

        Raises: ValueError if the heads do not divide, groups would be cut unevenly, or latents of rotated keys
        would need the keys of another shard.
        """
        heads = self.num_kv_heads
        if not 0 <= rank < world or (heads % world and world % heads):
            raise ValueError(f"shard: expected rank < world and Hkv={heads} to divide evenly, got {rank} of {world}")
        first = rank * heads // world
        chosen = list(range(first, first + max(heads // world, 1)))
        wo = self.wo
        if wo is not None:
            if wo.shape[0] % world:
                raise ValueError(f"shard: expected Hq={wo.shape[0]} to be divisible by world, got {world}")
            wo = wo.chunk(world)[rank].contiguous()
        return replace(self, keys=self.keys.select(chosen), values=self.values.select(chosen), wo=wo)


def _heads(side: Projection, basis: Keys | Values, g: int, z: Tensor) -> Tensor:
    """Heads of group g from its latents [n, rank]: [n, C, D] in the basis' order, in the dtype of sums."""
    block, size = basis.rows[side.columns[g]], side.group_size
    kind = torch.promote_types(z.dtype, block.dtype)
    tile = (z.to(kind) @ block.to(kind)).to(accumulator(z.dtype)).unflatten(1, (size, -1))
    return tile if basis.bias is None else tile + basis.bias[g * size : (g + 1) * size]


def sides_of(keys: Projection, values: Projection) -> tuple[Projection, Projection]:
    """Keys and values of a layer, each with a write side of its own: keys without one read the values' row."""
    if keys.down is not None or values.down is None:
        return keys, values
    down = torch.cat([values.down[:, columns] for columns in _columns_in_rows(keys, values)], 1)
    return replace(keys, down=down, of_inputs=values.of_inputs), values


def _columns_in_rows(keys: Projection, values: Projection) -> tuple[slice, ...]:
    """Where each key group's latents lie in rows that keys and values share: the first of the group's run."""
    return tuple(slice(c.start, c.start + rank) for c, rank in zip(values.columns, keys.ranks, strict=True))
