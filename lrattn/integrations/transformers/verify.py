"""Do the factors fit the model, and does the model's attention compute what its parts say?"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn

from lrattn.attention.dense import causal_attention
from lrattn.factors.layer import LayerFactors
from lrattn.factors.parts import AttentionParts, attention_parts, decoder_of, evaluating
from lrattn.factors.projection import Projection
from lrattn.factors.record import Factors
from lrattn.factors.rope import Rope

TOKENS = 8
SHUFFLES = 32  # of a weight's outputs, to learn what chance makes of a cosine
PROBES, ALIKE = 16, 0.1  # random inputs a layer; the cosine below which weights, or directions, are taken for unrelated
_VERIFIED: WeakSet[nn.Module] = WeakSet()
_COMPARED: WeakKeyDictionary[nn.Module, WeakSet[Factors]] = WeakKeyDictionary()


@torch.no_grad()
def check_fit(model: nn.Module, factors: Factors) -> None:
    """Raises ValueError if the factors are of another model, dtype or device.

    Factors of another model with the same shapes and rotation are told by their weights: on random inputs, low-rank
    maps of a weight point where it points (by sqrt(rank / full rank), about), those of another weight anywhere. Where
    they hardly do, chance is the measure. That is computed once for a model and its factors; a cache is made in every
    generation.
    """
    parts = attention_parts(model)
    if len(parts) != len(factors.layers):
        raise ValueError(f"factors: expected {len(parts)} layers as in the model, got {len(factors.layers)}")
    for i, (part, layer) in enumerate(zip(parts, factors.layers, strict=True)):
        weight = part.linear("k_proj").weight
        inputs = None if layer.values.down is None else layer.values.down.shape[0]
        expected = (part.num_kv_heads, part.head_dim, part.linear("k_proj").in_features)
        got = (layer.num_kv_heads, layer.head_dim, inputs)
        if expected != got:
            raise ValueError(f"factors: expected (Hkv, D, E) = {expected} in layer {i} as in {part.name}, got {got}")
        if (weight.dtype, weight.device) != (layer.dtype, layer.device):
            raise ValueError(
                f"factors: expected {weight.dtype} on {weight.device} in layer {i} as in the model, got {layer.dtype} "
                f"on {layer.device}; use factors.to(device, dtype)"
            )
        if layer.keys.down is None and not layer.shared:
            raise ValueError(f"factors: expected keys.down in layer {i}, to write latents, got None")
        norms = [None if norm is None else norm.weight for norm in (part.key_norm, layer.key_norm)]
        alike = {"value bias": _same_but_for_mean(part, layer.values)}
        if not layer.rotated:  # else they are in the keys that latents are made of
            alike |= {
                "rotation": _same_rotation(part.rope, layer.rope),
                "key norm": _same(*norms) and (None in norms or part.key_norm.eps == layer.key_norm.eps),  # type: ignore[union-attr]
                "key bias": _same(part.bias("k_proj"), layer.keys.bias),
            }
        for what, same in alike.items():
            if not same:
                raise ValueError(f"factors: expected the {what} of {part.name} in layer {i}, got another")
    compared = _COMPARED.setdefault(model, WeakSet())
    if factors not in compared:
        for part, layer in zip(parts, factors.layers, strict=True):
            _compare_weights(part, layer)
        compared.add(factors)


def _compare_weights(part: AttentionParts, layer: LayerFactors) -> None:
    for name, side, cosine in zip(("k_proj", "v_proj"), layer.sides, _cosines(part, layer), strict=True):
        if not cosine > ALIKE and not _beyond_chance(part, name, side, layer.rotated and side is layer.keys):
            raise ValueError(
                f"factors: expected a low-rank map of {part.name}.{name}, got that of other weights (their outputs "
                f"have a cosine of {cosine:.2f}); are they factors of another model?"
            )


def _cosines(part: AttentionParts, layer: LayerFactors) -> list[float]:
    """Between the outputs of the model's weights and of the factors, keys and values, biases aside.

    Latents of rotated keys stand for those keys: the map there and back is held against none.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(PROBES, part.linear("k_proj").in_features, generator=generator).to(layer.device, layer.dtype)
    keys = None
    if layer.rotated:
        keys = torch.randn(PROBES, part.num_kv_heads, part.head_dim, generator=generator).to(x)
    row, values = layer.project(x, keys)
    values = row if values is None else values
    sides = (("k_proj", layer.keys, row, layer.key_columns), ("v_proj", layer.values, values, layer.values.columns))
    found = []
    for name, side, latents, columns in sides:
        latents = latents.float()
        heads = torch.einsum("ne,hde->nhd", x.float(), part.weight(name).float())
        heads = keys.float() if keys is not None and side is layer.keys else heads
        expected = torch.cat([heads[:, list(members)].flatten(1) for members in side.groups], 1)
        got = torch.cat([latents[:, columns[g]] @ side.block(g).float() for g in range(len(side.groups))], 1)
        found.append(nn.functional.cosine_similarity(got.flatten(), expected.flatten(), 0).item())
    return found


def _beyond_chance(part: AttentionParts, name: str, side: Projection, rotated: bool) -> bool:
    """Whether a map points where its weight does more than where that weight would with its outputs shuffled.

    A map of few latents that is a projection in a metric of its own is long where it errs cheaply: its cosine is small
    against 1, and yet large against those of chance. Outputs are shuffled, not inputs: large inputs are large in every
    layer.
    """
    weight = part.weight(name).float()
    if rotated:
        weight = torch.eye(weight[..., 0].numel()).to(weight)
    weight, made = weight.flatten(0, -2), side.dense().float().flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    shuffles = (torch.randperm(len(weight), generator=generator).to(weight.device) for _ in range(SHUFFLES))
    chance = max((made * weight[shuffle]).sum().abs().item() for shuffle in shuffles)
    return (made * weight).sum().item() > 1.5 * chance


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is b if a is None or b is None else torch.equal(a, b)


def _same_but_for_mean(part: AttentionParts, values: Projection) -> bool:
    """Whether the bias is the model's, or that and a constant in directions that no latent spans.

    That is what centred methods add: what the latents lose of the mean value.
    """
    bias = part.bias("v_proj")
    if _same(bias, values.bias):
        return True
    weight = part.weight("v_proj")
    own, given = (weight.new_zeros(weight.shape[:2]) if b is None else b for b in (bias, values.bias))  # [Hkv, D]
    added = given.float() - own.float()
    spanned = [
        nn.functional.normalize(values.block(g).float()) @ added[list(heads)].flatten()
        for g, heads in enumerate(values.groups)
    ]
    rounding = 4 * torch.finfo(weight.dtype).eps * (own.float().norm() + weight.float().norm())
    return bool(torch.cat(spanned).norm() <= ALIKE * added.norm() + rounding)


def _same_rotation(a: Rope, b: Rope | None) -> bool:
    """Whether two ropes rotate alike up to the rounding of their angles."""
    if b is None or (a.interleaved, a.rotary_dim) != (b.interleaved, b.rotary_dim):
        return False
    (f, factor), (g, other) = a.frequencies(), b.frequencies()
    return abs(factor - other) < 1e-6 and torch.allclose(f.double(), g.double(), rtol=1e-5, atol=0)


@torch.no_grad()
def verify(model: nn.Module, parts: list[AttentionParts]) -> None:
    """Runs each attention module, and plain attention built from its parts, on the same random inputs.

    Inputs are scaled so that scores are of order one: a rotation in other pairs, a missing norm or a scale would
    show. Once per model.

    Raises: ValueError naming the first module that computes something else.
    """
    if model in _VERIFIED:
        return
    calls: dict[int, dict[str, Any]] = {}

    def watch(i: int) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            calls[i] = {n: v for n, v in kwargs.items() if n != "hidden_states"}

        return hook

    device = next(model.parameters()).device
    hooks = [p.module.register_forward_pre_hook(watch(i), with_kwargs=True) for i, p in enumerate(parts)]
    with evaluating(model):
        try:
            decoder_of(model)(input_ids=torch.zeros(1, TOKENS, dtype=torch.int64, device=device), use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        for i, part in enumerate(parts):
            _compare(part, calls[i])
    _VERIFIED.add(model)


def _compare(part: AttentionParts, call: dict[str, Any]) -> None:
    q_weight = part.linear("q_proj").weight
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, TOKENS, q_weight.shape[1], generator=generator).to(q_weight)
    q, k, _ = _heads(part, x)
    groups = q.shape[2] // k.shape[2]
    spread = (
        torch.einsum("bshd,bthd->bhst", q.float(), k.float().repeat_interleave(groups, 2)).std().item() * part.scale
    )
    if 0 < spread < 2:
        x = x * (2 / spread) ** 0.5
    q, k, v = _heads(part, x)
    expected = part.module(x, **call)[0]
    got = part.linear("o_proj")(causal_attention(q[0], k[0], v[0], part.scale, part.window).flatten(1))[None]
    error = ((got - expected).float().norm() / expected.float().norm()).item()
    if not error < 4 * torch.finfo(x.dtype).eps ** 0.5:
        raise ValueError(
            f"model: {part.name} ({type(part.module).__name__}) cannot attend on latents: plain attention made of its "
            f"parts differs from it by {error:.1e} (other pairs of RoPE, a layer without it, or a step of its own)"
        )


def _heads(part: AttentionParts, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values [1, T, H, D] of the uncompressed layer, rotated."""
    positions = torch.arange(x.shape[1], device=x.device)[None]
    return part.rotated("q", x, positions), part.rotated("k", x, positions), part.heads("v", x)
