"""The factors of a model: a frozen record of its layers, and the file they are kept in."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lrattn.factors import safefile
from lrattn.factors.formats import Format
from lrattn.factors.layer import LayerFactors
from lrattn.factors.projection import KeyNorm, Projection
from lrattn.factors.rope import Rope


@dataclass(frozen=True, eq=False)
class Factors:
    """The factors of every layer of a model.

    Args:
        layers: one LayerFactors per attention layer, in order.
        method: what made them. model: name of the model they were made from. rule: what shared out the ranks.
        predicted: per layer, what it adds to the loss of a token, in nats, to second order; () where not known.
        near: (recent, sinks), the dense window that a cache of these factors should hold: the last and first tokens a
            query sees exactly. Caches in transformers hold it where they are not told otherwise.
    """

    layers: tuple[LayerFactors, ...]
    method: str = "custom"
    model: str = ""
    rule: str = ""
    predicted: tuple[float, ...] = ()
    near: tuple[int, int] = (0, 0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "layers", tuple(self.layers))
        object.__setattr__(self, "predicted", tuple(self.predicted))
        object.__setattr__(self, "near", tuple(self.near))
        if not self.layers:
            raise ValueError("layers: expected at least one LayerFactors, got none")
        if self.predicted and len(self.predicted) != len(self.layers):
            raise ValueError(
                f"predicted: expected one for each of {len(self.layers)} layers, got {len(self.predicted)}"
            )
        if len(self.near) != 2 or any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in self.near):
            raise ValueError(f"near: expected two numbers of tokens, recent and sinks, got {self.near}")

    def __repr__(self) -> str:
        first = self.layers[0]
        size = f"layers={len(self.layers)}, keep={self.keep:.3f}, bytes_per_token={self.bytes_per_token:,}"
        return f"Factors(method={self.method!r}, {size}, near={self.near}, {first.dtype} on {first.device})"

    @property
    def bytes_per_token(self) -> int:
        """Bytes a token holds in the latent caches of all layers: norm columns, scales and padding included, what is
        not packed at 16 bits a number."""
        return sum(layer.bytes_per_token for layer in self.layers)

    @property
    def dense_bytes_per_token(self) -> int:
        """Bytes a token holds in a dense cache of 16-bit numbers."""
        return sum(4 * layer.num_kv_heads * layer.head_dim for layer in self.layers)

    @property
    def keep(self) -> float:
        """Bytes of the latent cache / bytes of the dense cache."""
        return self.bytes_per_token / self.dense_bytes_per_token

    def near_or(self, recent: int | None, sinks: int | None) -> tuple[int, int]:
        """The two as given, or as `near` says where they are None."""
        return self.near[0] if recent is None else recent, self.near[1] if sinks is None else sinks

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> Factors:
        return replace(self, layers=tuple(layer.to(device, dtype) for layer in self.layers))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, no pickle; the file at `path` is replaced only when the new one is whole.

        Raises: OSError if it cannot be written there.
        """
        tensors: dict[str, Tensor] = {}
        layers = []
        for i, layer in enumerate(self.layers):
            entry: dict[str, Any] = {
                "shared": layer.shared,
                "rotated": layer.rotated,
                "rope": None if layer.rope is None else asdict(layer.rope),
            }
            for name in ("keys", "values"):
                side: Projection = getattr(layer, name)
                entry[name] = {"ranks": side.ranks, "head_order": side.head_order}
                if side.formats:
                    entry[name]["format"] = [f.segments for f in side.formats]
                parts = {"up": side.up, "down": side.down, "bias": side.bias}
                tensors |= {f"{i}.{name}.{part}": x for part, x in parts.items() if x is not None}
            if layer.key_norm is not None:
                entry["key_norm"] = {"eps": layer.key_norm.eps}
                tensors[f"{i}.key_norm.weight"] = layer.key_norm.weight
            if layer.wo is not None:
                tensors[f"{i}.wo"] = layer.wo
            layers.append(entry)
        names = ("method", "model", "rule", "predicted", "near")
        record = {name: getattr(self, name) for name in names} | {"layers": layers}
        safefile.write(path, "factors", record, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Factors:
        """Reads a file that `save` wrote, to the CPU.

        Raises: FileNotFoundError; ValueError if it is damaged, truncated, foreign or newer. Never a part of it.
        """
        record, tensors = safefile.read(path, "factors")
        layers = []
        for i, entry in enumerate(record["layers"]):
            sides = {
                name: Projection(
                    up=tensors[f"{i}.{name}.up"],
                    down=tensors.get(f"{i}.{name}.down"),
                    bias=tensors.get(f"{i}.{name}.bias"),
                    **entry[name] | {"format": _formats(entry[name].get("format"))},
                )
                for name in ("keys", "values")
            }
            norm = entry.get("key_norm")
            layers.append(
                LayerFactors(
                    **sides,
                    rope=None if entry["rope"] is None else Rope(**entry["rope"]),
                    shared=entry["shared"],
                    key_norm=None if norm is None else KeyNorm(tensors[f"{i}.key_norm.weight"], norm["eps"]),
                    wo=tensors.get(f"{i}.wo"),
                    rotated=entry.get("rotated", False),
                )
            )
        given = {name: record[name] for name in ("predicted", "near") if name in record}
        return cls(tuple(layers), record["method"], record["model"], record["rule"], **given)


def _formats(segments: list[list[tuple[int, int]]] | None) -> tuple[Format, ...] | None:
    return None if segments is None else tuple(Format(tuple(map(tuple, group))) for group in segments)  # type: ignore[arg-type]
