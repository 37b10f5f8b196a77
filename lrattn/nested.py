"""Fewer latents of the same factors: a rank chosen when they are loaded.

Latents of a group are sorted by what each is worth, so that the first r are factors of their own: one file, any budget
below its own. For most methods they are the factors of that rank, with ranks in proportion instead of by a rule.
`refine(nested=True)` trains all prefixes together, as MatryoshkaKV (arXiv 2410.14731) does.
"""

from __future__ import annotations

from dataclasses import replace

from lrattn.factors import Factors
from lrattn.layer import LayerFactors
from lrattn.projection import Projection
from lrattn.ranks import proportional
from lrattn.shapes import RANK_STEP, round_up


def narrowed(factors: Factors, keep: float) -> Factors:
    """The first latents of every group, as many as `keep` allows, in proportion to those there are.

    Args:
        keep: bytes of the latent cache / bytes of the dense cache: met from below to a step of 16 latents.

    Raises: ValueError if values ride on the keys' latents (the row is sorted in two runs), or if keep is above that of
    the factors, or too small for one step a group.
    """
    check_nested(factors)
    if not 0 < keep <= factors.keep:
        raise ValueError(f"keep: expected a share in (0, {factors.keep:.4g}], what the factors have, got {keep}")
    ranks = [rank for layer in factors.layers for rank in _ranks(layer)]
    norms = sum(layer.k_width - layer.row_width for layer in factors.layers)
    total = int(keep * factors.dense_numbers_per_token - norms + 1e-6) // RANK_STEP
    if total < len(ranks):
        need = (RANK_STEP * len(ranks) + norms) / factors.dense_numbers_per_token
        raise ValueError(f"keep: expected at least {need:.3f}, one step of {RANK_STEP} a group, got {keep}")
    steps = iter(proportional([rank // RANK_STEP for rank in ranks], total))
    layers = []
    for layer in factors.layers:
        own = tuple(RANK_STEP * next(steps) for _ in _ranks(layer))
        keys, values = first(layer.keys, layer.values, own, shared=layer.shared)
        layers.append(replace(layer, keys=keys, values=values))
    return replace(factors, layers=tuple(layers), predicted=())


def shared_out(layer: LayerFactors, share: float) -> tuple[int, ...]:
    """Ranks of a layer's groups at this share of each, a step of 16 or more."""
    return tuple(round_up(max(int(share * rank), 1), RANK_STEP) for rank in _ranks(layer))


def first(
    keys: Projection, values: Projection, ranks: tuple[int, ...], *, shared: bool
) -> tuple[Projection, Projection]:
    """The first latents of each group of keys, then of values; of the rows where they are shared, keys' own first."""
    if shared:
        return keys.first(tuple(map(min, keys.ranks, ranks))), values.first(ranks)
    groups = len(keys.ranks)
    return keys.first(ranks[:groups]), values.first(ranks[groups:])


def check_nested(factors: Factors) -> None:
    """Raises: ValueError unless the first latents of every row are its best."""
    for i, layer in enumerate(factors.layers):
        if layer.shared and layer.keys.ranks != layer.values.ranks:
            raise ValueError(
                f"factors: expected rows whose latents all serve keys and values, got in layer {i} rows of "
                f"{layer.values.ranks} whose first {layer.keys.ranks} serve keys"
            )


def _ranks(layer: LayerFactors) -> tuple[int, ...]:
    return layer.values.ranks if layer.shared else (*layer.keys.ranks, *layer.values.ranks)
