"""Rotary position embedding: every variant becomes one table of unit complex numbers.

Pair j of a head at position t is rotated by the angle t * f_j. Scaled variants (linear, yarn, llama3,
longrope) only change the frequencies f_j and multiply the rotated pairs by one attention factor; partial
rotary leaves the last dimensions alone. Frequencies follow the definitions in transformers'
`modeling_rope_utils` (yarn: arXiv 2309.00071, longrope: arXiv 2402.13753).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from lrattn.factors.band import Band, find
from lrattn.factors.shapes import accumulator, cdiv

KINDS = ("default", "linear", "yarn", "llama3", "longrope")
MAX_BLOCK = 128  # most tokens that kernels rotate relative to the first of them
MOST_CHUNKED = 1 << 20  # positions that chunks are counted up to, whatever the model says
_TABLES: WeakValueDictionary[tuple[Rope, int, int, bool, str, torch.dtype], Tensor] = WeakValueDictionary()


@dataclass(frozen=True)
class Rope:
    """How the keys of a layer are rotated.

    Args:
        theta: base of the frequencies.
        dim: head dimension, or the rotated part of it when the head is wider.
        max_position: rows of the table; positions are 0 .. max_position - 1.
        scaling: as `rope_scaling` / `rope_parameters` of a transformers config, or None.
        interleaved: pairs are dimensions (2j, 2j + 1); otherwise (j, j + rotary_dim / 2).
        partial_rotary_factor: share of `dim` that is rotated, from its first dimension on.
        fp32_angles: multiply position and frequency in float32, as transformers and vLLM do, so that keys
            meet queries those engines rotated bit for bit. Default: float64, correct at any position.

    Raises: ValueError for an unknown variant, a missing parameter, or dynamic NTK.
    """

    theta: float
    dim: int
    max_position: int
    scaling: Mapping[str, Any] | None = field(default=None, hash=False)
    interleaved: bool = False
    partial_rotary_factor: float = 1.0
    fp32_angles: bool = False

    def __post_init__(self) -> None:
        given = {k: v for k, v in dict(self.scaling or {}).items() if v is not None}
        scaling = {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in given.items()}
        object.__setattr__(self, "scaling", scaling or None)
        if self.kind == "dynamic":
            raise ValueError(
                "rope: dynamic NTK is refused: its frequencies change with the length of the sequence, so keys "
                "rebuilt from latents would not match queries of earlier steps; use yarn or linear"
            )
        if self.kind not in KINDS:
            raise ValueError(f"rope: expected a scaling of {', '.join(KINDS)}, got {self.kind!r}")
        if self.rotary_dim < 2 or self.rotary_dim % 2 or self.max_position < 1:
            raise ValueError(
                f"rope: expected an even rotary dim and max_position >= 1, got {self.rotary_dim}, {self.max_position}"
            )
        self.frequencies()  # a missing or ill-sized parameter fails here, not in a call

    @property
    def kind(self) -> str:
        scaling = self.scaling or {}
        return str(scaling.get("rope_type", scaling.get("type", "default")))

    @property
    def rotary_dim(self) -> int:
        return int(self.dim * self.partial_rotary_factor)

    @classmethod
    def from_config(cls, config: Any, layer_type: str | None = None, **changes: Any) -> Rope:
        """The rotation a transformers config describes (version 4 and 5 spellings).

        Args:
            layer_type: picks the entry where `rope_parameters` holds one per layer type (Gemma 3).
            changes: fields to set otherwise, such as max_position or interleaved.
        """
        scaling = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
        if any(isinstance(v, Mapping) for v in scaling.values()):
            if layer_type not in scaling:
                raise ValueError(f"rope: expected layer_type to be one of {sorted(scaling)}, got {layer_type!r}")
            scaling = dict(scaling[layer_type])
        theta: float = scaling.pop("rope_theta", None) or config.rope_theta
        partial = scaling.pop("partial_rotary_factor", None) or getattr(config, "partial_rotary_factor", None) or 1.0
        max_position = int(config.max_position_embeddings)
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind in ("yarn", "longrope"):
            outer = getattr(config, "original_max_position_embeddings", None)
            original: int = scaling.get("original_max_position_embeddings") or outer or max_position
            scaling["original_max_position_embeddings"] = original
            scaling.setdefault("factor", max_position / original)
        given: dict[str, Any] = {"theta": float(theta), "max_position": max_position}
        given |= {"scaling": scaling if kind != "default" else None, "partial_rotary_factor": float(partial)}
        if "dim" not in changes:  # configs of layers with different heads have none of their own
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            given["dim"] = int(head_dim)
        return cls(**given | changes)

    def frequencies(self) -> tuple[Tensor, float]:
        """Angles per position, [rotary_dim / 2] float32 or float64 (see fp32_angles), and the attention factor."""
        dtype = torch.float32 if self.fp32_angles else torch.float64
        periods = self.theta ** (torch.arange(0, self.rotary_dim, 2, dtype=dtype) / self.rotary_dim)
        try:
            return getattr(self, f"_{self.kind}")(periods, self.scaling or {})
        except KeyError as missing:
            raise ValueError(f"rope: scaling of kind {self.kind!r} needs {missing}") from None

    def turns(self, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """cos + i sin of every position and pair, times the attention factor: [max_position, rotary_dim / 2].

        complex64, complex128 for float64. Equal Ropes share one table per device and dtype while any holder lives.
        """
        return self._table(1, self.max_position, True, str(device), accumulator(dtype))

    def offset_turns(self, device: torch.device | str = "cpu") -> Tensor:
        """cos + i sin of offsets 0 .. MAX_BLOCK - 1, without the attention factor: [MAX_BLOCK, rotary_dim / 2].

        complex64, angles in float64: the key of token t is turned by that of its block's first token t0 times that
        of t - t0. Shared as `turns` is.
        """
        return self._table(1, MAX_BLOCK, False, str(device), torch.float32)

    def chunk_turns(self, chunk: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Tensor:
        """cos + i sin of the first positions 0, chunk, 2 chunk, .. of chunks, without the attention factor.

        [chunks, rotary_dim / 2], as many as a million positions have, or max_position if that is more; angles in
        float64. Dtype and sharing as of `turns`.
        """
        chunks = cdiv(max(self.max_position, MOST_CHUNKED), chunk)
        return self._table(chunk, chunks, False, str(device), accumulator(dtype))

    def band(self, head_dim: int, dtype: torch.dtype) -> Band | str:
        """What turns the slow pairs of keys within a block of tokens, on the CPU, or why nothing does: see band.py.

        head_dim, dtype: of the layer. Equal Ropes share one band.
        """
        if self.fp32_angles and dtype == torch.float32:
            return "each token's own rounded angle is part of the result"
        return find(tuple(self.frequencies()[0].tolist()), head_dim, dtype)

    def _table(self, step: int, count: int, whole: bool, device: str, dtype: torch.dtype) -> Tensor:
        """Of positions 0, step, .., `count` of them; whole: with the attention factor, as the model rounds angles."""
        found = _TABLES.get(key := (self, step, count, whole, device, dtype))
        if found is None:
            with torch.inference_mode(False):  # the table outlives the caller's mode
                frequencies, factor = self.frequencies()
                if not whole:
                    frequencies, factor = frequencies.double(), 1.0
                angles = (torch.arange(count, dtype=frequencies.dtype) * step)[:, None] * frequencies
                parts = (x.mul_(factor).to(device, dtype) for x in (angles.cos(), angles.sin()))
                found = _TABLES[key] = torch.complex(*parts)
        return found

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [.., H, D] rotated to positions [..]; sums in float32 (float64 for float64), result in x.dtype."""
        return self.turned(x, self._turns_at(x, positions)).to(x.dtype)

    def turn_back(self, x: Tensor, positions: Tensor) -> Tensor:
        """The inverse of `rotate`, the attention factor taken out too; result in the dtype of the sums."""
        return self.turned(x, self._turns_at(x, positions).reciprocal())

    def pull_back(self, gradient: Tensor, positions: Tensor) -> Tensor:
        """The gradient by x of what has this gradient [.., H, D] by rotate(x, positions); in the dtype of the sums."""
        return self.turned(gradient, self._turns_at(gradient, positions).conj())

    def _turns_at(self, x: Tensor, positions: Tensor) -> Tensor:
        """[.., 1, rotary_dim / 2]."""
        rows = rows_at(self.turns(x.device, x.dtype), positions.reshape(-1).to(x.device))
        return rows.view(*positions.shape, 1, rows.shape[-1])

    def turned(self, x: Tensor, turns: Tensor, order: Tensor | None = None) -> Tensor:
        """x [.., H, D] with its pairs turned by turns [.., 1, rotary_dim / 2]; in the dtype of the sums.

        order: `pair_order` on x's device, of who holds it; None: made.
        """
        n, x = self.rotary_dim, x.to(accumulator(x.dtype))
        order = self.pair_order(x.shape[-1]).to(x.device) if order is None else order
        pairs = x[..., order[:n]].unflatten(-1, (-1, 2)).contiguous()
        turned = torch.view_as_real(torch.view_as_complex(pairs) * turns)
        whole = turned.flatten(-2) if self.interleaved else turned.transpose(-2, -1).flatten(-2)
        return torch.cat((whole, x[..., n:]), -1)

    def pair_order(self, head_dim: int) -> Tensor:
        """Permutation [head_dim] that puts the two dimensions of every pair next to each other."""
        n = self.rotary_dim
        pairs = torch.arange(n) if self.interleaved else torch.arange(n).view(2, -1).T.reshape(-1)
        return torch.cat((pairs, torch.arange(n, head_dim)))

    # One function per variant: (theta ** (2 j / dim), parameters) -> (f_j, attention factor).

    def _default(self, periods: Tensor, p: Mapping[str, Any]) -> tuple[Tensor, float]:
        return 1.0 / periods, 1.0

    def _linear(self, periods: Tensor, p: Mapping[str, Any]) -> tuple[Tensor, float]:
        return 1.0 / periods / p["factor"], 1.0

    def _llama3(self, periods: Tensor, p: Mapping[str, Any]) -> tuple[Tensor, float]:
        f = 1.0 / periods
        original, low, high = (
            p[k] for k in ("original_max_position_embeddings", "low_freq_factor", "high_freq_factor")
        )
        waves = 2 * math.pi / f
        blend = (original / waves - low) / (high - low)
        blended = (1 - blend) * (f / p["factor"]) + blend * f
        scaled = torch.where(waves > original / low, f / p["factor"], blended)
        return torch.where(waves < original / high, f, scaled), 1.0

    def _yarn(self, periods: Tensor, p: Mapping[str, Any]) -> tuple[Tensor, float]:
        n, factor, original = self.rotary_dim, p["factor"], p["original_max_position_embeddings"]

        def pair_turning(rotations: float) -> float:  # the (real) pair index that turns this often in `original`
            return n * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(self.theta))

        low, high = pair_turning(p.get("beta_fast", 32)), pair_turning(p.get("beta_slow", 1))
        if p.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, n - 1)
        span = (high - low) or 0.001
        keep = 1 - ((torch.arange(n // 2, dtype=torch.float32) - low) / span).clamp(0, 1).to(periods.dtype)
        frequencies = 1.0 / (factor * periods) * (1 - keep) + 1.0 / periods * keep

        def magnitude(weight: float) -> float:
            return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

        mscale, mscale_all = p.get("mscale"), p.get("mscale_all_dim")
        inferred = magnitude(mscale) / magnitude(mscale_all) if mscale and mscale_all else magnitude(1.0)
        return frequencies, float(p.get("attention_factor", inferred))

    def _longrope(self, periods: Tensor, p: Mapping[str, Any]) -> tuple[Tensor, float]:
        """Static: the long factors if the table reaches past the original context, the short ones if not."""
        original = p["original_max_position_embeddings"]
        name = "long_factor" if self.max_position > original else "short_factor"
        stretch = torch.tensor(p[name], dtype=periods.dtype)
        if stretch.numel() != periods.numel():
            raise ValueError(f"rope: expected {periods.numel()} numbers in {name}, got {stretch.numel()}")
        factor = p.get("factor", self.max_position / original)
        inferred = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        return 1.0 / (stretch * periods), float(p.get("attention_factor", inferred))


def rows_at(turns: Tensor, positions: Tensor, chunk: int | None = None) -> Tensor:
    """Of positions [n] their rows in a table of turns, or those of their chunks: [n, rotary_dim / 2].

    Positions before 0 are in the first chunk.
    Raises: ValueError for a position outside the table (on a CPU; a GPU stops by itself).
    """
    try:
        return turns.index_select(0, positions.long() if chunk is None else positions.long().clamp_min(0) // chunk)
    except IndexError:
        got = f"{int(positions.min())} .. {int(positions.max())}"
        raise ValueError(f"positions: expected 0 .. {len(turns) * (chunk or 1) - 1} of the rope, got {got}") from None
