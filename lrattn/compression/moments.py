"""Moments: what calibration has summed over tokens, and the file it is kept in."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lrattn.factors import safefile

# What `calibrate` can be asked for, and the sums it is made of; each has one tensor a layer, or a run of them. k, v,
# q: keys, values and queries as attention is given them, n = Hkv * D numbers of a token, and x, what k_proj reads. u:
# k turned back from its position. g: gradient of the sequence's negative log-likelihood by u, k or v, [n]; of the text
# for "fisher", of tokens drawn from the model for the metrics. A 1 appended to what is summed keeps its mean and the
# weights' sum. What is [m, m] is symmetric, and held as its `triangle`.
GATHERED: dict[str, tuple[str, ...]] = {
    "before": ("before",),  # [2n + 1, 2n + 1]: y y^T, y = [u, v, 1]
    "rotated": (
        *("rotated.keys", "rotated.values"),  # [n + 1, n + 1]: of [k, 1] and of [v, 1]
        "rotated.queries",  # [Hkv, D, D]: q q^T, over the query heads of a kv head too
    ),
    "metric": (
        *("metric.keys", "metric.values"),  # [n, n]: g g^T / |g|, over all tokens but the first of each sequence
        *("weighted.keys", "weighted.values"),  # [2n + 1, 2n + 1]: |g| y y^T, over all tokens
    ),
    "rotated-metric": (  # the same with g by k in the place of u
        *("rotated-metric.keys", "rotated-metric.values"),
        *("rotated-weighted.keys", "rotated-weighted.values"),  # [n + 1, n + 1]: of [k, 1] and of [v, 1]
    ),
    "fisher": ("fisher.keys", "fisher.values"),  # [n, E] float32: over sequences, squares of sum g x^T
    "magnitudes": ("magnitudes",),  # [E]: |x|
}
GRADIENTS = ("fisher", "metric", "rotated-metric")  # those that take a backward pass
BEFORE = ("before", "metric", "fisher")  # those of keys before their rotation, which has to be known
WEIGHTS = ("fisher", "magnitudes")  # those of x, which only Linear models show
SYMMETRIC = {part for name, parts in GATHERED.items() if name not in WEIGHTS for part in parts} - {"rotated.queries"}
SIDES = ("keys", "values")
UNFELT = 1e-20  # nats: what an error costs that no token felt


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over calibration tokens; those of padding are left out. All on the CPU, float64 where not said.

    Args:
        sums: what `calibrate` was asked to gather, see GATHERED; each one tensor a layer.
        tokens, sequences: how many were summed.
        longest: tokens of the longest sequence: what is rotated was at positions 0 .. longest - 1. 0: not known.
        far: (recent, sinks) of the window that gradients were taken beyond; (0, 0): of all tokens.
        text: chained sha256 of the token ids. model: sha256 of numbers from every parameter.
        span: layers of a run whose heads are summed side by side, as of one layer: for rows that they share.
    """

    sums: Mapping[str, tuple[Tensor, ...]] = field(default_factory=dict)
    tokens: int = 0
    sequences: int = 0
    longest: int = 0
    far: tuple[int, int] = (0, 0)
    text: str = ""
    model: str = ""
    span: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "far", tuple(self.far))

    def __repr__(self) -> str:
        what = f"layers={self.layers}, tokens={self.tokens:,}, sequences={self.sequences:,}"
        return f"Moments({what}, gathered={self.gathered}, far={self.far})"

    @property
    def layers(self) -> int:
        return max(map(len, self.sums.values()), default=0)

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

    def sum(self, name: str, layer: int) -> Tensor:
        """A layer's sum, as GATHERED has its shape."""
        found = self.sums[name][layer]
        return square(found) if name in SYMMETRIC else found

    def seen(self, layer: int, side: str, *, rotated: bool = False) -> Tensor:
        """The mean over tokens of [x, 1] [x, 1]^T, x the "keys" or "values": as attention is given them where rotated,
        else of [u, v] together."""
        return self.sum(f"rotated.{side}" if rotated else "before", layer) / max(self.tokens, 1)

    def metric(self, layer: int, side: str, *, rotated: bool = False) -> tuple[Tensor, Tensor]:
        """Of "keys" or "values": G [n, n] and C of the loss that methods/gradient.py minimises, C as `seen` has it.

        With m = mean |g|: G = m mean(g g^T / |g|), C = mean(|g| x x^T) / m. The first token of a sequence takes part in
        C, by its own gradient, and not in G and m. Where the loss felt nothing, as of a layer whose sliding window is
        within the dense one, C is the plain mean and G an identity that weighs next to nothing.
        """
        kind = "rotated-" if rotated else ""
        g = self.sum(f"{kind}metric.{side}", layer) / max(self.tokens - self.sequences, 1)
        mean = g.trace()
        if mean == 0:
            return torch.eye(len(g), dtype=g.dtype) * UNFELT, self.seen(layer, side, rotated=rotated)
        return g * mean, self.sum(f"{kind}weighted.{side}", layer) / max(self.tokens, 1) / mean

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file; the file at `path` is replaced only when the new one is whole.

        Raises: OSError if it cannot be written there.
        """
        tensors = {f"{i}.{name}": x for name, xs in self.sums.items() for i, x in enumerate(xs)}
        names = ("tokens", "sequences", "longest", "far", "text", "model", "span")
        safefile.write(path, "moments", {name: getattr(self, name) for name in names}, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Moments:
        """Reads a file that `save`, or `calibrate` with a state, wrote.

        Raises: FileNotFoundError; ValueError if it is damaged, truncated, foreign, newer, or of a version whose moments
        are of attention inputs.
        """
        record, tensors, version = safefile.read(path, "moments")
        if version < 3:
            raise ValueError(
                f"{path}: expected moments of version 3, of keys and values, got {version}: calibrate anew"
            )
        sums: dict[str, list[Tensor]] = {}
        for name in (part for parts in GATHERED.values() for part in parts):
            i = 0
            while f"{i}.{name}" in tensors:
                x = tensors[f"{i}.{name}"]
                sums.setdefault(name, []).append(triangle(x) if name in SYMMETRIC and x.dim() == 2 else x)
                i += 1
        return cls({name: tuple(xs) for name, xs in sums.items()}, **record)


def triangle(x: Tensor) -> Tensor:
    """Of a symmetric x [m, m] what is on and below the diagonal, row by row: [m (m + 1) / 2]."""
    return x.masked_select(torch.ones_like(x, dtype=torch.bool).tril())


def square(x: Tensor) -> Tensor:
    """The matrix [m, m] of a `triangle`."""
    m = math.isqrt(8 * len(x) + 1) // 2
    found = x.new_zeros(m, m).masked_scatter_(torch.ones(m, m, dtype=torch.bool).tril(), x)
    return found + found.tril(-1).T


def about(moment: Tensor, offset: Tensor | None) -> Tensor:
    """The moment of x - offset, [m, m], from that of [x, 1], [m + 1, m + 1]; offset [m], None for 0."""
    second, first, weight = moment[:-1, :-1], moment[:-1, -1], moment[-1, -1]
    if offset is None:
        return second
    crossed = torch.outer(first, offset)
    return second - crossed - crossed.T + weight * torch.outer(offset, offset)


def mean_of(moment: Tensor) -> Tensor:
    """The mean of x, [m], from the moment of [x, 1]."""
    return moment[:-1, -1] / moment[-1, -1].clamp_min(torch.finfo(moment.dtype).tiny)
