"""The factors of a model: a frozen record of its layers, and the file they are kept in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lrattn.factors import safefile
from lrattn.factors.formats import LAYOUT, Format
from lrattn.factors.layer import LayerFactors
from lrattn.factors.projection import Projection
from lrattn.factors.rope import Rope
from lrattn.factors.selection import Selection
from lrattn.factors.shapes import check_tokens


@dataclass(frozen=True, eq=False)
class Factors:
    """The factors of every layer of a model.

    Args:
        layers: one LayerFactors per attention layer, in order.
        method: what made them. model: name of the model they were made from. rule: what shared out the ranks.
        predicted: per layer, what it adds to the loss of a token, in nats, to second order; () where not known.
        near: (recent, sinks), the dense window that a cache of these factors should hold: the last and first tokens a
            query sees exactly. Caches in transformers hold it where they are not told otherwise.
        select: which tokens a cache of these factors should keep, see Selection; None: all. Caches in transformers do
            so where they are not told otherwise; others refuse such factors.
        rest: factors of the same layers that the tokens which `select` does not keep are held by, of fewer bytes: their
            latents are made from those they had. None: they are dropped.
        donors: per layer, the one whose latents it reads: itself, or one before it, whose factors then are the layer's,
            too, for good, and nothing is held for it. () where each reads its own.
        span: each run of so many neighbours, the last one of those left over, has one row for the keys and values of
            all its layers: each adds its part to it, and reads it by an `up` of its own. 1: a layer has its own.
        residual: the share of keys and values that the latents lose of the text they were calibrated on, see
            lrattn.residual; None where not known, as of refined ones.
        samples: per layer, a few numbers of its attention's parameters, in their dtype: they tell another model, or the
            same one with other weights. () where not known.
    """

    layers: tuple[LayerFactors, ...]
    method: str = "custom"
    model: str = ""
    rule: str = ""
    predicted: tuple[float, ...] = ()
    near: tuple[int, int] = (0, 0)
    samples: tuple[Tensor, ...] = ()
    select: Selection | None = None
    donors: tuple[int, ...] = ()
    span: int = 1
    rest: Factors | None = None
    residual: float | None = None

    def __post_init__(self) -> None:
        names = "layers", "predicted", "near", "samples", "donors"
        vars(self).update({name: tuple(getattr(self, name)) for name in names})
        if not self.layers:
            raise ValueError("layers: expected at least one LayerFactors, got none")
        for name in ("predicted", "samples"):
            if (given := len(getattr(self, name))) not in (0, len(self.layers)):
                raise ValueError(f"{name}: expected one for each of {len(self.layers)} layers, got {given}")
        if len(self.near) != 2 or any(not isinstance(n, int) or isinstance(n, bool) or n < 0 for n in self.near):
            raise ValueError(f"near: expected two numbers of tokens, recent and sinks, got {self.near}")
        if self.select is not None and not isinstance(self.select, Selection):
            raise ValueError(f"select: expected None or a Selection, got {type(self.select).__name__}")
        if self.donors:
            self._share()
        if not isinstance(self.span, int) or isinstance(self.span, bool) or self.span < 1:
            raise ValueError(f"span: expected layers that share a row, 1 or more, got {self.span!r}")
        if self.span > 1:
            self._check_runs()
        if self.rest is not None:
            self._check_rest(self.rest)
        if self.residual is not None and not (isinstance(self.residual, float) and 0 <= self.residual < float("inf")):
            raise ValueError(
                f"residual: expected None or a share of keys and values, 0.0 or more, got {self.residual!r}"
            )

    def _share(self) -> None:
        donors, layers = self.donors, self.layers
        if len(donors) != len(layers) or any(not 0 <= d <= i or donors[d] != d for i, d in enumerate(donors)):
            expected = f"for each of {len(layers)} layers itself or one before it that reads its own"
            raise ValueError(f"donors: expected {expected}, got {donors}")
        for i, d in enumerate(donors):
            own, read = ((x.num_kv_heads, x.head_dim) for x in (layers[i], layers[d]))
            if own != read:
                raise ValueError(
                    f"donors: expected layers of the same heads, (Hkv, D) = {own} in layer {i}, got {read}"
                )
        vars(self).update(layers=tuple(layers[d] for d in donors), predicted=())  # it foresees nothing of sharing

    def _check_rest(self, rest: object) -> None:
        """Raises ValueError unless it can hold what these hold."""
        plain = isinstance(rest, Factors) and not rest.select and not rest.donors and rest.rest is None
        if not isinstance(rest, Factors) or not plain or self.select is None or rest.span != self.span:
            raise ValueError(f"rest: expected plain factors, beside a select that leaves tokens to them, got {rest!r}")
        if len(rest.layers) != len(self.layers):
            raise ValueError(f"rest: expected factors of {len(self.layers)} layers, got {len(rest.layers)}")
        for i, pair in enumerate(zip(self.layers, rest.layers, strict=True)):
            own, other = (
                (x.num_kv_heads, x.head_dim, x.rope, x.chunk, x.max_position, x.dtype, x.device) for x in pair
            )
            if own != other:
                raise ValueError(f"rest: expected the form of {pair[0]!r}, got {pair[1]!r} in layer {i}")
            if pair[1].values.down is None or (pair[1].keys.down is None and not pair[1].shared):
                raise ValueError(f"rest: expected a write side (down) in layer {i}, got None")

    def _check_runs(self) -> None:
        """Raises ValueError unless the layers of each run write and read one row."""
        if self.donors:
            raise ValueError(f"span: expected 1 with donors, got {self.span}")
        for i, layer in enumerate(self.layers):
            first = self.layers[self.run(i)[0]]
            own, row = (
                (x.shared, x.values.ranks, x.keys.ranks, x.values.formats, x.chunk, x.rope, x.device, x.dtype)
                for x in (layer, first)
            )
            if not layer.shared or own != row:
                raise ValueError(
                    f"span: expected layers that share a row of keys and values, {first!r}, got {layer!r} in layer {i}"
                )

    def run(self, i: int) -> range:
        """The layers that share rows with layer i, itself included."""
        first = i - i % self.span
        return range(first, min(first + self.span, len(self.layers)))

    @property
    def thinned(self) -> str:
        """What makes a cache hold less than a row for every token and layer, "select", "donors" or "span"; "" where
        nothing does."""
        given = {"select": self.select is not None, "donors": bool(self.donors), "span": self.span > 1}
        return next((name for name, is_so in given.items() if is_so), "")

    @property
    def held(self) -> tuple[LayerFactors, ...]:
        """The layers that latents are held for, of a run that shares rows the first."""
        return tuple(
            x for i, x in enumerate(self.layers) if i == self.run(i)[0] and (not self.donors or self.donors[i] == i)
        )

    def __repr__(self) -> str:
        first = self.layers[0]
        size = f"layers={len(self.layers)}, keep={self.keep:.3f}, bytes_per_token={self.bytes_per_token:,}"
        return f"Factors(method={self.method!r}, {size}, near={self.near}, {first.dtype} on {first.device})"

    @property
    def bytes_per_token(self) -> int:
        """Bytes a token holds in the latent caches of all layers, of those that are kept: scales and padding included,
        what is not packed at 16 bits a number."""
        return sum(layer.bytes_per_token for layer in self.held)

    @property
    def dense_bytes_per_token(self) -> int:
        """Bytes a token holds in a dense cache of 16-bit numbers."""
        return sum(4 * layer.num_kv_heads * layer.head_dim for layer in self.layers)

    @property
    def keep(self) -> float:
        """Bytes of the latent cache / bytes of the dense cache."""
        return self.bytes_per_token / self.dense_bytes_per_token

    def near_or(self, recent: int | None, sinks: int | None) -> tuple[int, int]:
        """The two as given, or as `near` says where they are None. Raises: ValueError unless they count tokens."""
        chosen = self.near[0] if recent is None else recent, self.near[1] if sinks is None else sinks
        check_tokens(recent=chosen[0], sinks=chosen[1])
        return chosen

    def to(
        self,
        device: torch.device | str | Sequence[torch.device | str] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Factors:
        """The same factors on another device, or each layer on one of several, and in another dtype.

        Raises: ValueError for several devices that are not one for each layer.
        """
        devices = [device] * len(self.layers) if device is None or isinstance(device, str | torch.device) else device
        if len(devices) != len(self.layers):
            raise ValueError(f"device: expected one, or one for each of {len(self.layers)} layers, got {len(devices)}")
        donors = self.donors or range(len(self.layers))
        moved = [
            x.to(d, dtype) if i == n else x
            for n, (x, d, i) in enumerate(zip(self.layers, devices, donors, strict=True))
        ]
        return replace(self, layers=tuple(moved), rest=self.rest and self.rest.to(device, dtype))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file, no pickle; the file at `path` is replaced only when the new one is whole.

        Raises: OSError if it cannot be written there.
        """
        safefile.write(path, "factors", *self._recorded())

    def _recorded(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a file holds."""
        tensors: dict[str, Tensor] = {}
        layers: list[dict[str, Any]] = []
        for i, layer in enumerate(self.layers):
            if self.donors and self.donors[i] != i:
                layers.append({})
                continue
            entry: dict[str, Any] = {"shared": layer.shared, "rope": layer.rope and asdict(layer.rope)}
            entry |= {"chunk": layer.chunk, "max_position": layer.max_position}
            for name in ("keys", "values"):
                side: Projection = getattr(layer, name)
                entry[name] = {"ranks": side.ranks, "head_order": side.head_order, "of_inputs": side.of_inputs}
                if side.formats:
                    entry[name] |= {"format": [f.segments for f in side.formats], "layout": side.formats[0].layout}
                parts = {"up": side.up, "down": side.down, "offset": side.offset}
                tensors |= {f"{i}.{name}.{part}": x for part, x in parts.items() if x is not None}
            if layer.wo is not None:
                tensors[f"{i}.wo"] = layer.wo
            layers.append(entry)
        tensors |= {f"{i}.samples": x for i, x in enumerate(self.samples)}
        names = ("method", "model", "rule", "predicted", "near", "donors", "span", "residual")
        record = {name: getattr(self, name) for name in names} | {"layers": layers}
        record["select"] = self.select and asdict(self.select)
        if self.rest is not None:
            record["rest"], own = self.rest._recorded()
            tensors |= {f"rest.{name}": x for name, x in own.items()}
        return record, tensors

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Factors:
        """Reads a file that `save` wrote, to the CPU.

        Files before version 3 have maps of attention inputs: see Projection.of_inputs.

        Raises: FileNotFoundError; ValueError if it is damaged, truncated, foreign or newer, or has the key norms of an
        older version. Never a part of it.
        """
        record, tensors, version = safefile.read(path, "factors")
        if version < 3 and any(entry.get("key_norm") for entry in record["layers"]):
            raise ValueError(
                f"{path}: expected factors without a key norm, got those of version {version}, whose latents are of "
                "keys before the norm: make them anew with lrattn.compress"
            )
        return cls._of(record, tensors, version)

    @classmethod
    def _of(cls, record: dict[str, Any], tensors: Mapping[str, Tensor], version: int) -> Factors:
        layers: list[LayerFactors] = []
        donors = record.get("donors", ())  # since version 6, as is `select`
        for i, entry in enumerate(record["layers"]):
            if not entry:
                layers.append(layers[donors[i]])
                continue
            sides: dict[str, Any] = {}
            for name in ("keys", "values"):
                kept = dict(entry[name])
                layout = kept.pop("layout", LAYOUT)  # a file holds no codes: those before version 5 read as any
                formats = tuple(Format(segments, layout) for segments in kept.pop("format", None) or ())
                if version < 3:  # latents of attention inputs, but for those of rotated keys
                    kept["of_inputs"] = not (name == "keys" and entry.get("rotated", False))
                sides[name] = Projection(
                    up=tensors[f"{i}.{name}.up"],
                    down=tensors.get(f"{i}.{name}.down"),
                    offset=tensors.get(f"{i}.{name}.{'bias' if version < 3 else 'offset'}"),
                    format=formats or None,
                    **kept,
                )
            rope = entry["rope"] and Rope(**entry["rope"])
            form: dict[str, Any] = {name: entry.get(name) for name in ("chunk", "max_position")}  # since version 4
            wo = tensors.get(f"{i}.wo")
            layers.append(LayerFactors(**sides, rope=rope, shared=entry["shared"], wo=wo, **form))
        given = {name: record[name] for name in ("rule", "predicted", "near", "residual") if name in record}
        samples = tuple(tensors[f"{i}.samples"] for i in range(len(layers)) if f"{i}.samples" in tensors)
        select = (chosen := record.get("select")) and Selection(**chosen)
        more = {"samples": samples, "select": select, "donors": donors, "span": record.get("span", 1)}
        if "rest" in record:
            own = {name.removeprefix("rest."): x for name, x in tensors.items() if name.startswith("rest.")}
            more["rest"] = cls._of(record["rest"], own, version)
        return cls(tuple(layers), record["method"], record["model"], **given, **more)
