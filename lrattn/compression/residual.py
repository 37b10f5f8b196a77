"""What latents lose of a text's keys and values: it tells a text unlike the one that factors were calibrated on.

    residual = mean over layers, keys and values of  sum |y - y'|^2 / sum |y|^2

y: keys or values as attention is given them, of all tokens that the dense window does not hold for good; y': what the
latents give back, packed as a cache holds them. The second moments that factors are made of are a text's: another text
has other directions, which they drop. A text that they were not made of always loses a little more.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lrattn.attention.cache import stored
from lrattn.compression.batches import Batch, tokens_of, unpadded
from lrattn.compression.substitute import substituted
from lrattn.factors.record import Factors
from lrattn.models.interface import device_of
from lrattn.models.layers import attention_layers
from lrattn.models.states import evaluating

UNLIKE = 1.4  # times the calibration's: docs/methods.md says what was measured
SEQUENCES, TOKENS = 2, 1024  # that are looked at, and of each at most so many


@torch.no_grad()
def residual(model: nn.Module, factors: Factors, batches: Iterable[Batch]) -> float:
    """The share of a text's keys and values that factors lose, in passes of the model as it is.

    Args:
        model: that the factors are of, in their dtype and on their device.
        batches: token ids [b, t], or mappings with input_ids and maybe attention_mask; of the first and the last
            sequence the first 1,024 tokens are looked at.

    Returns: a number from 0 to about 1. Factors.residual is that of the calibration's text: UNLIKE times as much says
        that the text is of another kind, or that the calibration's was too short.
    Raises: ValueError for no tokens, or factors that the model's layers do not fit.
    """
    texts = [x for batch in batches for x in unpadded(*tokens_of(batch))]
    chosen = [x for x in dict.fromkeys((0, len(texts) - 1)) if 0 <= x < len(texts)]
    layers, first = attention_layers(model), factors.near[1]
    if len(layers) != len(factors.layers):
        raise ValueError(f"factors: expected those of {len(layers)} layers, got {len(factors.layers)}")
    sums = torch.zeros(len(layers), 2, 2, dtype=torch.float64)  # of keys and values: what is lost, and all
    heads: dict[int, list[Tensor]] = {}  # of layers whose rows are not whole yet
    rows: dict[int, list[Tensor]] = {}  # of a run of layers that share rows, by its first layer: their parts

    def take(i: int, _: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        layer, run = factors.layers[i], factors.run(i)
        own = [x[0].transpose(0, 1).to(layer.device, layer.dtype) for x in (k, v)]
        positions = None if layer.rope is None else torch.arange(len(own[0]), device=layer.device)
        source = factors.donors[i] if factors.donors else run[0]
        heads.setdefault(i, own)
        if source == i or factors.span > 1:
            parts = [x for x in layer.project(own[0], own[1], positions, wide=factors.span > 1) if x is not None]
            held = rows.get(source)
            rows[source] = parts if held is None or i == run[0] else [a + b for a, b in zip(held, parts, strict=True)]
        if i == run[-1]:
            kind = [x.to(layer.dtype) for x in rows[source]]
            back = stored(layer, kind[0], kind[1] if len(kind) > 1 else None)
            for member in run:
                given = heads.pop(member)
                found = factors.layers[member].rebuild(*back, positions)
                for side, (x, y) in enumerate(zip(given, found, strict=True)):
                    lost, whole = (z[first:].double().square().sum().cpu() for z in (x.double() - y.double(), x))
                    sums[member, side] += torch.stack((lost, whole))
        return k, v

    with evaluating(model), substituted(model, layers, take):
        for n in chosen:
            ids = texts[n][None, :TOKENS].to(device_of(model))
            model(input_ids=ids, use_cache=False)
    if not sums[..., 1].all():
        raise ValueError(f"batches: expected more tokens than the first {first}, which are held dense, got too few")
    return float((sums[..., 0] / sums[..., 1]).mean())


def unlike(model: nn.Module, factors: Factors | None, batches: Iterable[Batch]) -> tuple[str, dict[str, Any]]:
    """A line for a report on a text, a warning where it is unlike the calibration's, and the numbers; "" and none where
    nothing is known of that."""
    if factors is None or (own := factors.residual) is None:
        return "", {}
    here = residual(model, factors, batches)
    told, warned = f"latents lose {here:.1%} of this text's keys and values, {own:.1%} of the calibration's", False
    if here > UNLIKE * own:
        warned = True
        told = f"warning: {told}: it is of another kind, or those were too few tokens; calibrate on text like it"
    return f"\n{told}", {"residual": own, "residual_here": here, "unlike": warned}
