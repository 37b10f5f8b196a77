"""Fewer latents of the same factors: a rank chosen when they are loaded.

Latents are sorted by what each is worth, so that the first of them are factors of their own: one file, any budget below
its own. For most methods these are the factors of that rank, with ranks in proportion instead of by a rule.
`refine(nested=True)` trains all prefixes together, as MatryoshkaKV (arXiv 2410.14731) does.

A run is a stretch of latents in that order: those of a group of keys or of values; of rows that both share, those that
keys read, and those that values read beside them.
"""

from __future__ import annotations

from dataclasses import replace

from lrattn.compression.ranks import affordable, proportional
from lrattn.factors.layer import LayerFactors
from lrattn.factors.projection import Projection
from lrattn.factors.record import Factors
from lrattn.factors.shapes import RANK_STEP, round_up


def narrowed(factors: Factors, keep: float) -> Factors:
    """The first latents of every run, as many as `keep` allows, in proportion to those there are.

    Args:
        factors: of any method; they are left as they are.
        keep: bytes of the latent cache / bytes of the dense cache: met from below to a step of 16 latents; all latents
            where it allows more than there are.

    Raises: ValueError for a keep outside (0, 1], or too small for one step of every run, and for packed latents.
    """
    if any(layer.packed for layer in factors.layers):
        raise ValueError(f"factors: expected plain latents to take {keep} of, got packed ones: make some with bits=16")
    if name := factors.thinned:
        raise ValueError(f"factors: expected some of a row for every token and layer, got {name} in {factors!r}")
    own = [runs(layer) for layer in factors.layers]
    steps = [length // RANK_STEP for layer in own for length in layer]
    least = sum(n > 0 for n in steps)
    total = affordable(keep, factors.dense_bytes_per_token, 0, least, f"one step of {RANK_STEP} a run")
    chosen = iter(proportional(steps, min(total, sum(steps))))
    layers = []
    for layer, lengths in zip(factors.layers, own, strict=True):
        cut = tuple(RANK_STEP * next(chosen) for _ in lengths)
        keys, values = first(layer.keys, layer.values, cut, shared=layer.shared)
        layers.append(replace(layer, keys=keys, values=values))
    return replace(factors, layers=tuple(layers), rule="", predicted=(), residual=None)


def runs(layer: LayerFactors) -> tuple[int, ...]:
    """Latents in each run of a layer: of keys group by group, then of values, or of values alone in shared rows."""
    keys, values = layer.keys.ranks, layer.values.ranks
    return (*keys, *(row - rank for row, rank in zip(values, keys, strict=True))) if layer.shared else (*keys, *values)


def shared_out(layer: LayerFactors, share: float) -> tuple[int, ...]:
    """Latents of each run at this share of it, a step of 16 or more."""
    return tuple(round_up(max(int(share * length), min(length, 1)), RANK_STEP) for length in runs(layer))


def first(
    keys: Projection, values: Projection, lengths: tuple[int, ...], *, shared: bool
) -> tuple[Projection, Projection]:
    """Keys and values with so many latents of each run."""
    of_keys, of_values = lengths[: len(keys.ranks)], lengths[len(keys.ranks) :]
    heads = [range(n) for n in of_keys]
    if not shared:
        return keys.take(heads), values.take([range(n) for n in of_values])
    rest = [range(rank, rank + n) for rank, n in zip(keys.ranks, of_values, strict=True)]
    return keys.take(heads), values.take([[*a, *b] for a, b in zip(heads, rest, strict=True)])
