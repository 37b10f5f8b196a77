"""Moments: what calibration has summed over tokens, and the file it is kept in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lrattn.factors import safefile

# What `calibrate` can be asked for beside the inputs' moments, and the sums it is made of; each has one tensor a layer.
# x: attention input [E]. g: gradient of the sequence's negative log-likelihood by a token's key or value before norm
# and rotation, [n], n = Hkv * D; of the text for "fisher", of tokens drawn from the model for the metrics. k, q: keys
# and queries, normed and rotated.
GATHERED: dict[str, tuple[str, ...]] = {
    "fisher": ("fisher.keys", "fisher.values"),  # [n, E] float32: over sequences, squares of sum g x^T
    "metric": (
        *("metric.keys", "metric.values"),  # [n, n]: g g^T / |g|, over all tokens but the first of each sequence
        *("weighted.keys", "weighted.values"),  # [E, E]: |g| x x^T, over all tokens
    ),
    "rotated-metric": (  # the same with g by k, and k in the place of the keys' x: [n, n]
        *("rotated-metric.keys", "rotated-metric.values"),
        *("rotated-weighted.keys", "rotated-weighted.values"),
    ),
    "rotated": (
        *("rotated.keys", "rotated.mean"),  # [n, n] and [n]: k k^T, and k
        "rotated.queries",  # [Hkv, D, D]: q q^T, over the query heads of a kv head too
    ),
    "magnitudes": ("magnitudes",),  # [E]: |x|
    "means": ("means",),  # [E]: x
}
GRADIENTS = ("fisher", "metric", "rotated-metric")  # those that take a backward pass
UNFELT = 1e-20  # nats: what an error costs that no token felt


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over calibration tokens; those of padding are left out. All on the CPU, float64 where not said.

    Args:
        inputs: per layer [E, E], sum of x x^T over the attention inputs x; uncentred, no biases.
        tokens, sequences: how many were summed.
        sums: what `calibrate` was asked to gather beside them, see GATHERED; each one tensor a layer.
        far: (recent, sinks) of the window that gradients were taken beyond; (0, 0): of all tokens.
        text: chained sha256 of the token ids. model: sha256 of numbers from every parameter.
    """

    inputs: tuple[Tensor, ...]
    tokens: int
    sequences: int = 0
    sums: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    far: tuple[int, int] = (0, 0)
    text: str = ""
    model: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", tuple(self.inputs))
        object.__setattr__(self, "far", tuple(self.far))

    def __repr__(self) -> str:
        inputs = len(self.inputs[0]) if self.inputs else 0
        what = f"layers={len(self.inputs)}, inputs={inputs}, tokens={self.tokens:,}, sequences={self.sequences:,}"
        return f"Moments({what}, gathered={self.gathered}, far={self.far})"

    @property
    def gathered(self) -> tuple[str, ...]:
        """Which of GATHERED are here."""
        return tuple(name for name, parts in GATHERED.items() if all(part in self.sums for part in parts))

    @property
    def fisher(self) -> list[tuple[float, float]] | None:
        """Per layer, of the key and the value projection: mean over the weights of their root mean square gradient.

        The score by which Palu and ReCalKV share out ranks. None if "fisher" was not gathered.
        """
        if "fisher" not in self.gathered:
            return None

        def score(squares: Tensor) -> float:
            return (squares / max(self.sequences, 1)).sqrt().mean(dtype=torch.float64).item()

        keys, values = (self.sums[name] for name in GATHERED["fisher"])
        return [(score(k), score(v)) for k, v in zip(keys, values, strict=True)]

    def metric(self, layer: int, side: str, *, rotated: bool = False) -> tuple[Tensor, Tensor]:
        """Of "keys" or "values": G [n, n] and C [E, E] of the loss that methods/gradient.py minimises.

        rotated: of keys normed and rotated, from "rotated-metric" and "rotated"; C of the keys is then [n, n].
        With m = mean |g|: G = m mean(g g^T / |g|), C = mean(|g| x x^T) / m. The first token of a sequence takes part in
        C, by its own gradient, and not in G and m. Where the loss felt nothing, as of a layer whose sliding window is
        within the dense one, C is the inputs' moment and G an identity that weighs next to nothing.
        """
        kind = "rotated-" if rotated else ""
        g = self.sums[f"{kind}metric.{side}"][layer] / max(self.tokens - self.sequences, 1)
        mean = g.trace()
        if mean == 0:
            inputs = self.sums["rotated.keys"] if rotated and side == "keys" else self.inputs
            return torch.eye(len(g), dtype=g.dtype) * UNFELT, inputs[layer] / max(self.tokens, 1)
        return g * mean, self.sums[f"{kind}weighted.{side}"][layer] / max(self.tokens, 1) / mean

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file; the file at `path` is replaced only when the new one is whole.

        Raises: OSError if it cannot be written there.
        """
        tensors = {
            f"{i}.{name}": x for name, xs in {"inputs": self.inputs, **self.sums}.items() for i, x in enumerate(xs)
        }
        names = ("tokens", "sequences", "far", "text", "model")
        safefile.write(path, "moments", {name: getattr(self, name) for name in names}, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Moments:
        """Reads a file that `save`, or `calibrate` with a state, wrote.

        Raises: FileNotFoundError; ValueError if it is damaged, truncated, foreign or newer.
        """
        record, tensors = safefile.read(path, "moments")
        sums: dict[str, list[Tensor]] = {}
        for i in range(sum(name.endswith(".inputs") for name in tensors)):
            for name in ("inputs", *(part for parts in GATHERED.values() for part in parts)):
                if f"{i}.{name}" in tensors:
                    sums.setdefault(name, []).append(tensors[f"{i}.{name}"])
        found: dict[str, Any] = {name: tuple(xs) for name, xs in sums.items()}
        return cls(inputs=found.pop("inputs"), sums=found, **record)
