"""The factors of one layer: a frozen record that writes latents and reads heads back."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from lrattn.factors.basis import Basis
from lrattn.factors.formats import widest
from lrattn.factors.operands import Operands
from lrattn.factors.projection import Projection
from lrattn.factors.rope import Rope, rows_at
from lrattn.factors.shapes import accumulator, check, check_tensors, product_dtype


@dataclass(frozen=True, eq=False)
class LayerFactors:
    """What attention needs of one layer beside the query and the cache.

    Latents are written from keys and values as attention is given them: after the model's norms and rotation. With a
    rope, keys are turned back before they are stored, and again when they are rebuilt; without one they are stored as
    they come, and queries meet the latents themselves.

    Args:
        keys, values: the two sides. Heads, head dim, dtype and device agree.
        rope: the model's rotation, which stored keys are without; None: keys are stored as attention is given them.
        shared: one row per group serves both: values use the whole row, keys its first keys.ranks[g] columns.
        wo: [Hq, D, E] output projection, needed only for project="hidden".

    Raises: ValueError naming the tensor, what was expected and what came.
    """

    keys: Projection
    values: Projection
    rope: Rope | None
    shared: bool = False
    wo: Tensor | None = None
    # Derived once. The key basis has the two dimensions of a rotated pair side by side.
    key_basis: Basis = field(init=False, repr=False)
    value_basis: Basis = field(init=False, repr=False)
    pairs: Tensor = field(init=False, repr=False)  # [D], pair order -> model order
    turns: Tensor | None = field(init=False, repr=False)  # [max_position, rotary_dim / 2] complex
    offset_turns: Tensor | None = field(init=False, repr=False)  # [MAX_BLOCK, rotary_dim / 2] complex, factor 1
    operands: Operands = field(init=False, repr=False)
    checked: dict[Any, str] = field(init=False, repr=False, default_factory=dict)  # see attention.decode_attention

    def __post_init__(self) -> None:
        self._check()
        head_dim, device = self.head_dim, self.keys.up.device
        pairs = torch.arange(head_dim) if self.rope is None else self.rope.pair_order(head_dim)
        object.__setattr__(self, "pairs", pairs.to(device))
        whole = torch.arange(head_dim, device=device)
        object.__setattr__(self, "key_basis", Basis.of(self.keys, self.key_columns, self.pairs, self.row_side.formats))
        object.__setattr__(self, "value_basis", Basis.of(self.values, self.values.columns, whole, self.values.formats))
        turns = None if self.rope is None else self.rope.turns(device, self.dtype)
        object.__setattr__(self, "turns", turns)
        offsets = None if self.rope is None else self.rope.offset_turns(device)
        object.__setattr__(self, "offset_turns", offsets)
        given = self.keys, self.values, (self.key_basis, self.value_basis), self.rope, self.shared
        packs = widest(self.row_side.formats), widest(self.values.formats)
        object.__setattr__(self, "operands", Operands.of(*given, (turns, offsets), packs))

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
        if self.wo is not None:
            check("wo", self.wo, "Hq D E", dims, **kind)
            if dims["Hq"] % dims["Hkv"]:
                raise ValueError(f"wo: expected a multiple of Hkv={dims['Hkv']} heads, got {dims['Hq']}")
        if self.shared:
            if self.keys.format is not None:
                raise ValueError(
                    f"shared: expected keys.format to be None (values.format packs the row), got {self.keys.format}"
                )
            if self.keys.groups != self.values.groups:
                raise ValueError(f"shared: expected equal groups, got {self.keys.groups} and {self.values.groups}")
            if any(k > v for k, v in zip(self.keys.ranks, self.values.ranks, strict=True)):
                raise ValueError(
                    f"shared: expected key ranks within value ranks, got {self.keys.ranks} and {self.values.ranks}"
                )
            if self.keys.down is not None:
                raise ValueError("shared: expected keys.down to be None (values.down writes the row), got a tensor")

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickled and copied without what is derived, whose tables are views of each other in other dtypes."""
        return LayerFactors, (self.keys, self.values, self.rope, self.shared, self.wo)

    def __repr__(self) -> str:
        sides = f"keys={self.keys.latents_told}, values={self.values.latents_told}"
        form = (", shared" if self.shared else "") + ("" if self.rope is None else ", before RoPE")
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
    def row_width(self) -> int:
        """Latents in a row of the key cache (of the only cache when shared)."""
        return self.values.width if self.shared else self.keys.width

    @property
    def row_side(self) -> Projection:
        """The side whose latents the key cache holds: the values', in the only cache, when shared."""
        return self.values if self.shared else self.keys

    @property
    def packed(self) -> bool:
        """Whether some latents are."""
        return bool(self.row_side.formats or self.values.formats)

    @property
    def k_width(self) -> int:
        """Columns of the key cache: latents, or bytes where they are packed."""
        return self.row_side.latent_bytes if self.row_side.formats else self.row_width

    @property
    def v_width(self) -> int:
        """Columns of the value cache, bytes where its latents are packed; 0 when shared."""
        side = self.values
        return 0 if self.shared else side.latent_bytes if side.formats else side.width

    @property
    def k_dtype(self) -> torch.dtype:
        """Of the key cache: the layer's, or uint8 where its latents are packed."""
        return torch.uint8 if self.row_side.formats else self.dtype

    @property
    def v_dtype(self) -> torch.dtype:
        """Of the value cache."""
        return torch.uint8 if self.values.formats else self.dtype

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

    def project(self, k: Tensor, v: Tensor, positions: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Keys and values -> latents (zk [.., sum Rk], zv [.., sum Rv]); (row, None) when shared.

            z = ([k, v] - offset) @ down,   k turned back from its position where the layer has a rope

        Args:
            k, v: [.., Hkv, D] each, as attention is given them: after the model's norms, keys rotated.
            positions: [..] integers, of a layer with a rope: where the keys were rotated to. Others take none.

        Products are of the layer's dtype (float32 for float16 on a CPU); what comes before is in float32.
        Raises: ValueError if a write side (`down`) is missing or reads attention inputs, or a tensor does not fit.
        """
        check_tensors(k=k, v=v)
        lead = k.shape[:-2]
        for name, x, leading in (("k", k, ".."), ("v", v, ", ".join(map(str, lead)))):
            shape = (*lead, self.num_kv_heads, self.head_dim)
            if x.shape != shape or x.dtype != self.dtype or x.device != self.device:
                told = ", ".join(filter(None, (leading, str(self.num_kv_heads), str(self.head_dim))))
                expected = f"[{told}] {self.dtype} on {self.device}"
                raise ValueError(f"{name}: expected {expected}, got {list(x.shape)} {x.dtype} on {x.device}")
        if self.rope is not None and self.turns is not None:  # Rope.turn_back, by the layer's own tables
            turns = rows_at(self.turns, self._positions(positions, lead).reshape(-1).to(k.device))
            k = self.rope.turned(k, turns.reciprocal().view(*lead, 1, turns.shape[-1]), self.pairs)
        elif positions is not None:
            raise ValueError("positions: expected None, the layer has no rope, got a tensor")
        heads = [self._centred(side, x) for side, x in ((self.keys, k), (self.values, v))]
        if self.shared:
            return self._latents("values", torch.cat(heads, -1)), None
        return self._latents("keys", heads[0]), self._latents("values", heads[1])

    def _centred(self, side: Projection, x: Tensor) -> Tensor:
        """x [.., Hkv, D] without the offset, heads side by side: [.., Hkv * D]."""
        acc = accumulator(self.dtype)
        return (x if side.offset is None else x.to(acc) - side.offset.to(acc)).flatten(-2)

    def _latents(self, name: str, x: Tensor) -> Tensor:
        side: Projection = getattr(self, name)
        if side.down is None:
            raise ValueError(f"{name}.down: expected [{x.shape[-1]}, {side.width}] to write latents, got None")
        if side.of_inputs:
            raise ValueError(
                f"{name}.down: expected a map of heads, got one of attention inputs, from a file before version 3: "
                "use lrattn.in_kv_space(factors, model)"
            )
        kind = product_dtype(side.down)
        return (x.to(kind) @ side.down.to(kind)).to(self.dtype)

    def _positions(self, positions: Tensor | None, lead: torch.Size) -> Tensor:
        """Raises ValueError unless they are integers of this shape."""
        if not isinstance(positions, Tensor) or positions.shape != lead or positions.is_floating_point():
            got = f"{list(positions.shape)} {positions.dtype}" if isinstance(positions, Tensor) else positions
            raise ValueError(f"positions: expected integers of shape {list(lead)}, got {got}")
        return positions

    def raw_keys(self, row: Tensor, g: int) -> Tensor:
        """Keys of group g from rows [n, >= row_width], as they are stored: [n, C, D], pairs adjacent, not rotated.

        Rows wider than the layer's dtype are multiplied in their own.
        """
        block = self.key_basis.blocks[g]
        kind = torch.promote_types(row.dtype, block.dtype)
        tile = (row[:, self.key_columns[g]].to(kind) @ block.to(kind)).to(accumulator(row.dtype))
        tile = tile.unflatten(1, (-1, self.head_dim))
        return tile + self.key_basis.biases[g] if self.key_basis.biases else tile

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
            if x is not None and (x.shape != (*lead, width) or x.dtype != self.dtype or x.device != self.device):
                expected = f"{[*lead, width]} {self.dtype} on {self.device}"
                raise ValueError(f"{name}: expected {expected}, got {list(x.shape)} {x.dtype} on {x.device}")
        rows = zk.reshape(-1, zk.shape[-1])
        value_rows = rows if zv is None else zv.reshape(-1, zv.shape[-1])
        turns = None
        if self.turns is not None:
            turns = rows_at(self.turns, self._positions(positions, lead).reshape(-1).to(rows.device))
        k = rows.new_empty(len(rows), self.num_kv_heads, self.head_dim)
        for g, heads in enumerate(self.keys.groups):
            tile = self.turn_(self.raw_keys(rows, g), turns)
            for i, h in enumerate(heads):
                k[:, h, self.pairs] = tile[:, i].to(k.dtype)
        return k.view(*lead, *k.shape[1:]), self.values_of(value_rows).view(*lead, *k.shape[1:])

    def values_of(self, rows: Tensor) -> Tensor:
        """Value latents [n, sum Rv] -> [n, Hkv, D], in the latents' dtype."""
        v = rows.new_empty(len(rows), self.num_kv_heads, self.head_dim)
        basis = self.value_basis
        for g, (heads, columns) in enumerate(zip(self.values.groups, self.values.columns, strict=True)):
            block = basis.blocks[g]
            tile = (rows[:, columns].to(block.dtype) @ block).unflatten(1, (-1, self.head_dim))
            v[:, list(heads)] = (tile + basis.biases[g] if basis.biases else tile).to(v.dtype)
        return v

    def fold_output(self) -> Tensor:
        """Value basis folded into the output projection: [Hq, max Rv, E] = uv[h // M] @ wo[h].

        With it a "latent" result needs one product instead of two. It is smaller than the two only when Rv <= D;
        the value offset stays outside: it adds (mass on tokens) * offset[h // M] @ wo[h].
        """
        if self.wo is None:
            raise ValueError("wo: expected [Hq, D, E] to fold the value basis into, got None")
        acc = accumulator(self.dtype)
        up = self.values.up.repeat_interleave(self.wo.shape[0] // self.num_kv_heads, 0)
        return (up.to(acc) @ self.wo.to(acc)).to(self.dtype)

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
        chosen = (
            [rank * heads // world]
            if world > heads
            else list(range(rank * heads // world, (rank + 1) * heads // world))
        )
        wo = self.wo
        if wo is not None:
            if wo.shape[0] % world:
                raise ValueError(f"shard: expected Hq={wo.shape[0]} to be divisible by world, got {world}")
            wo = wo.chunk(world)[rank].contiguous()
        return replace(self, keys=self.keys.select(chosen), values=self.values.select(chosen), wo=wo)


def sides_of(keys: Projection, values: Projection) -> tuple[Projection, Projection]:
    """Keys and values of a layer, each with a write side of its own: keys without one read the values' row."""
    if keys.down is not None or values.down is None:
        return keys, values
    down = torch.cat([values.down[:, columns] for columns in _columns_in_rows(keys, values)], 1)
    return replace(keys, down=down, of_inputs=values.of_inputs), values


def _columns_in_rows(keys: Projection, values: Projection) -> tuple[slice, ...]:
    """Where each key group's latents lie in rows that keys and values share: the first of the group's run."""
    return tuple(slice(c.start, c.start + rank) for c, rank in zip(values.columns, keys.ranks, strict=True))
