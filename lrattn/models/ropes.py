"""How a model turns its keys: read from its config, and held against the keys themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrattn.factors.rope import Rope
from lrattn.models.layers import AttentionLayer, heads_given

TOKENS = 8
SHIFT = 8000  # of the positions, at most: far enough that slow pairs show
ALIKE = 1e-3  # relative error of turned keys
ROUGHLY = 5e-2  # in 16 bits
INSTEAD = "use a method of keys as attention is given them, 'lrattn-rotated'"


def ropes_of(model: nn.Module, layers: Sequence[AttentionLayer]) -> list[Rope | None]:
    """The rotation of each layer's keys; None where positions leave them as they are, or no config speaks of one.

    A rotation is right if it takes the keys of a text to those of the same text a few thousand positions on: hidden
    states of such models know relative positions alone.

    Raises: ValueError naming the first layer whose keys are turned in another way, and what works for it.
    """
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    if not any(getattr(config, name, None) for name in ("rope_parameters", "rope_scaling", "rope_theta")):
        return [None] * len(layers)
    most = int(config.max_position_embeddings)
    here = torch.arange(TOKENS)
    there = here + max(min(SHIFT, most - TOKENS), 0)
    before, after = (heads_given(model, layers, at) for at in (here, there))
    found: list[Rope | None] = []
    for layer, (k, _), (turned, _) in zip(layers, before, after, strict=True):
        limit = ROUGHLY if layer.dtype.itemsize == 2 else ALIKE
        candidates = [None, *_candidates(config, layer.head_dim)]
        errors = [_error(rope, k, turned, here, there) for rope in candidates]
        best = min(range(len(candidates)), key=lambda i: errors[i])
        if not errors[best] < limit:
            rounded = any(x.is_floating_point() and x.dtype.itemsize == 2 for x in model.buffers())
            cast = "; a cast has rounded its frequencies, too: load it with dtype=" if rounded else ""
            raise ValueError(
                f"model: the keys of {layer.name} are turned in a way that its config does not tell (the nearest "
                f"differs by {errors[best]:.1e}{cast}): {INSTEAD}"
            )
        found.append(candidates[best])
    return found


def _candidates(config: Any, head_dim: int) -> Iterator[Rope]:
    """Every rotation that a config may mean."""
    parameters = getattr(config, "rope_parameters", None) or {}
    types = [name for name, value in parameters.items() if isinstance(value, Mapping)] or [None]
    for layer_type in types:
        for interleaved in (False, True):
            try:
                yield Rope.from_config(config, layer_type, dim=head_dim, interleaved=interleaved, fp32_angles=True)
            except ValueError as error:
                raise ValueError(f"model: {error}; {INSTEAD}") from error


def _error(rope: Rope | None, k: Tensor, turned: Tensor, here: Tensor, there: Tensor) -> float:
    made = k if rope is None else rope.rotate(rope.turn_back(k, here), there)
    return ((made - turned).norm() / turned.norm()).item()
