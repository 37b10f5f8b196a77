"""Factors whose latents are the heads themselves, for methods that hold fewer tokens or fewer layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lrattn.compression.arguments import check_share
from lrattn.compression.batches import Batch
from lrattn.compression.methods import METHODS
from lrattn.compression.sharing import donors
from lrattn.factors.layer import LayerFactors
from lrattn.factors.projection import Projection
from lrattn.factors.record import Factors
from lrattn.factors.selection import Selection
from lrattn.factors.shapes import RANK_STEP, round_up
from lrattn.models.interface import name_of
from lrattn.models.layers import AttentionLayer, attention_layers, samples_of
from lrattn.selection import KEEP, policy_of, shares

SHARED = 0.75  # of the layers hold their own, where the caller names no share


def whole(
    model: nn.Module,
    batches: Iterable[Batch] | None,
    method: str,
    keep: float | None,
    choices: Mapping[str, Any],
    progress: bool,
) -> Factors:
    """Factors of a method that compresses no heads. keep: share of the tokens, or of the layers, that are held.

    Raises: ValueError for choices of those that do, for a share that cannot be, or without text to find layers by.
    """
    recipe, read = METHODS[method], tuple[int, ...]()
    for name, x in choices.items():
        if x is not None:
            raise ValueError(f"{name}: expected none with method {method!r}, which compresses no heads, got {x!r}")
    if keep is not None:
        check_share(keep)
    layers = attention_layers(model)
    select = recipe.select
    if select is not None:
        select = replace(select, keep=KEEP if keep is None and policy_of(select).counted else keep)
        shares(select, len(layers))
    if recipe.shares_layers:
        if batches is None:
            raise ValueError(f"batches: method {method!r} needs some text to find layers that can share, got None")
        others = math.ceil((1 - (SHARED if keep is None else keep)) * len(layers) - 1e-6)
        if others >= len(layers):
            raise ValueError(f"keep: expected one of {len(layers)} layers at least, got {keep}")
        read = donors(model, batches, others, progress=progress)
    made = tuple(map(exact, layers))
    named: dict[str, Any] = {"method": method, "model": name_of(model), "samples": samples_of(layers)}
    return Factors(made, near=recipe.near, select=select, donors=read, **named)


def check_method(method: str, keep: float | None, select: Selection | str | None, text: bool) -> None:
    """Raises ValueError for what is wrong with a method whatever the model, with a text to calibrate on or without."""
    recipe = METHODS[method]
    if not text and (recipe.needs_data or recipe.shares_layers):
        raise ValueError(f"calibration: expected a text for method {method!r}, got None")
    if recipe.exact and select is not None:
        raise ValueError(f"select: expected none with method {method!r}, which compresses no heads, got {select}")
    if recipe.select is not None:
        policy_of(replace(recipe.select, keep=keep))


def exact(layer: AttentionLayer) -> LayerFactors:
    """Latents that are a layer's keys, as attention is given them, and its values: nothing is lost."""
    heads, size = layer.num_kv_heads, layer.head_dim
    rank = round_up(size, RANK_STEP)
    up = torch.eye(rank, size, dtype=layer.dtype, device=layer.device)
    side = Projection(up.expand(heads, -1, -1).contiguous(), (rank,) * heads, torch.block_diag(*[up.T] * heads))
    return LayerFactors(side, side, rope=None)
