"""How a model turns its keys: read from its config, and held against the keys themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrattn.factors.rope import Rope
from lrattn.models.layers import AttentionLayer, heads_given

TOKENS = 8
# Of the positions: fast pairs show at the first, slow ones at the last, and none is right at all of them by chance.
SHIFTS = (1, 300, 8000)  # from 8,192 on some models scale their queries by the position (Llama-4)
ROUNDINGS = 4  # so many times what dtype and float32 angles are off by, a pair may be, relative to its size
FAINT = 1e-2  # pairs below this share of the mean size are held against it instead of their own
INSTEAD = "use a method of keys as attention is given them, 'lrattn-rotated'"


def ropes_of(model: nn.Module, layers: Sequence[AttentionLayer]) -> list[Rope | None]:
    """The rotation of each layer's keys; None where positions leave them as they are, or change no more than the hidden
    states (learned positions).

    A rotation is right if it takes, pair by pair, the keys of a text to those of the same hidden states further on, at
    every shift of SHIFTS within the config's positions.

    Raises: ValueError naming the first layer whose keys are turned in another way, and what works for it.
    """
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    speaks = any(getattr(config, name, None) for name in ("rope_parameters", "rope_scaling", "rope_theta"))
    most = int(getattr(config, "max_position_embeddings", None) or TOKENS + 1)
    tokens = min(TOKENS, most - 1)
    shifts = torch.tensor(sorted({min(shift, most - tokens) for shift in SHIFTS}))
    angles = torch.finfo(torch.float32).eps * (shifts + tokens)
    passes = heads_given(model, layers, [torch.arange(tokens) + shift for shift in (0, *shifts)])
    found: list[Rope | None] = []
    for layer, *heads in zip(layers, *passes, strict=True):
        k, *shifted = (keys for keys, _ in heads)
        limits = ROUNDINGS * (torch.finfo(layer.dtype).eps + angles)
        candidates = [None, *(_candidates(config, layer.head_dim) if speaks else ())]
        errors = torch.stack([_errors(rope, k, torch.stack(shifted), shifts) for rope in candidates])
        excess, best = (errors / limits).amax(1).min(0)
        if not excess < 1:
            rounded = any(x.is_floating_point() and x.dtype.itemsize == 2 for x in model.buffers())
            cast = "; a cast has rounded its frequencies, too: load it with dtype=" if rounded else ""
            raise ValueError(
                f"model: the keys of {layer.name} are turned in a way that its config does not tell (the nearest "
                f"differs by {errors[best].max():.1e}{cast}): {INSTEAD}"
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


def _errors(rope: Rope | None, k: Tensor, shifted: Tensor, shifts: Tensor) -> Tensor:
    """Of keys [T, H, D] at positions 0 .. T - 1, and [S, T, H, D] at each of S shifts of these: the largest error of a
    pair (without a rope, of a number) at each, [S], relative to the pair's size over all tokens and heads."""
    made, order = k.expand_as(shifted), torch.arange(k.shape[-1])[:, None]
    if rope is not None:
        f, here = rope.frequencies()[0], torch.arange(len(k))[:, None]
        angles = (here + shifts[:, None, None]) * f - here * f  # each product rounded to float32, as models do
        made = rope.turned(made, torch.polar(torch.ones_like(angles), angles)[..., None, :])
        order = rope.pair_order(k.shape[-1]).view(-1, 2)
    wrong, sizes = (x[..., order].square().sum((1, 2, 4)).sqrt() for x in (made - shifted, shifted))  # [S, pairs]
    return (wrong / sizes.clamp_min(FAINT * sizes.mean())).amax(1)
