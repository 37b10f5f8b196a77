"""Factors of a version before 3, whose latents are maps of attention inputs, as maps of keys and values."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from lrattn.factors.layer import LayerFactors
from lrattn.factors.projection import Projection
from lrattn.factors.record import Factors
from lrattn.models.layers import AttentionLayer, attention_layers
from lrattn.models.ropes import ropes_of
from lrattn.models.weights import NAMES, check_readable, weight

OUTSIDE = 1e-2  # of a map, as a share of its length: more than 16 bits round


@torch.no_grad()
def in_kv_space(factors: Factors, model: nn.Module) -> Factors:
    """The same factors, with a write side that `LayerFactors.project` can use: latents and rows stay what they were.

    With W the weights that make keys and values of attention inputs, x @ down = (x @ W^T) @ down' where down lies in
    the span of W's rows: down' = pinv(W^T) @ down. All methods but distillation make such maps.

    Args:
        factors: as `Factors.load` reads them from older files. Layers that are maps of heads already stay as they are.
        model: the one they were made from, whose projections are Linear layers; its biases are the factors' already.

    Raises: ValueError if layers or shapes do not fit the model, its weights cannot be read, or a map lies outside of
    their span, as after a distillation or of another model; but where a layer has as many keys and values as inputs
    everything lies in it, and nothing tells.
    """
    layers = attention_layers(model)
    check_readable(model, layers, ropes_of(model, layers))
    if len(layers) != len(factors.layers):
        raise ValueError(f"factors: expected {len(layers)} layers as in the model, got {len(factors.layers)}")
    made = [_layer(i, *pair) for i, pair in enumerate(zip(factors.layers, layers, strict=True))]
    return replace(factors, layers=tuple(made))


def _layer(i: int, layer: LayerFactors, own: AttentionLayer) -> LayerFactors:
    expected, got = (own.num_kv_heads, own.head_dim), (layer.num_kv_heads, layer.head_dim)
    if expected != got:
        raise ValueError(f"factors: expected (Hkv, D) = {expected} in layer {i} as in {own.name}, got {got}")
    sides = {}
    for name in NAMES:
        side: Projection = getattr(layer, name)
        if side.down is not None and side.of_inputs:
            read = torch.cat([weight(own, s) for s in (NAMES if layer.shared else (name,))])
            side = replace(side, down=_in_span(f"{name}.down of layer {i}", side.down, read))
        sides[name] = replace(side, of_inputs=False)
    return replace(layer, keys=sides["keys"], values=sides["values"])


def _in_span(what: str, down: Tensor, read: Tensor) -> Tensor:
    """down [E, sum R] as a map of read [n, E] @ x: [n, sum R]."""
    wanted = down.double().cpu()
    if wanted.shape[0] != read.shape[1]:
        raise ValueError(f"factors: expected {what} to read {read.shape[1]} inputs, got {wanted.shape[0]}")
    found = torch.linalg.pinv(read.T) @ wanted
    outside = ((read.T @ found - wanted).norm() / wanted.norm().clamp_min(torch.finfo(torch.float64).tiny)).item()
    if outside > OUTSIDE:
        raise ValueError(
            f"factors: expected {what} in the span of the model's projections, got a map of which {outside:.0%} lies "
            "outside: distilled factors, or those of another model; make them anew with lrattn.compress"
        )
    return found.to(down).contiguous()
