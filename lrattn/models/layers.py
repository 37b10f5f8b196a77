"""The attention layers of a model, as a short pass shows them: what fills a cache, and what attention is given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lrattn.models.interface import attending, cache_argument, exact_attention, is_causal, tokens_for
from lrattn.models.states import evaluating

TOKENS = 4  # of the pass
SAMPLED = 8  # numbers of a parameter that tell a layer's weights


@dataclass(frozen=True, eq=False)
class AttentionLayer:
    """One layer that fills a cache.

    Args:
        name: path of its attention module in the model. module: that one.
        num_kv_heads, head_dim, dtype, device: of the keys and values that attention is given.
    """

    name: str
    module: nn.Module = field(repr=False)
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device

    @property
    def dense(self) -> int:
        """Numbers of one token's keys, and of its values."""
        return self.num_kv_heads * self.head_dim


@torch.no_grad()
def attention_layers(model: nn.Module) -> list[AttentionLayer]:
    """The layers of a model's cache, in order.

    Raises: ValueError if some of them cannot attend on latents: where attention is not that of transformers'
    AttentionInterface, is given other keys and values than the cache returned, or a position bias.
    """
    from transformers import DynamicCache

    cache = DynamicCache()
    given: list[tuple[nn.Module, Tensor, Tensor]] = []
    biased: list[nn.Module] = []

    def watch(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_causal(module, kwargs.get("is_causal")):
            given.append((module, key, value))
            biased.extend([] if kwargs.get("position_bias") is None else [module])
        return exact_attention(module, query, key, value, *args, **kwargs)

    with evaluating(model), attending(model, watch):
        try:
            model(input_ids=tokens_for(model, TOKENS), use_cache=True, **cache_argument(cache))
        except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError) as error:
            raise ValueError(
                f"model: expected {type(model).__name__} to run on a few tokens with a cache of keys and values, got "
                f"{type(error).__name__}: {' '.join(str(error).split())}"
            ) from error
    if biased:
        raise ValueError(f"model: {type(biased[0]).__name__} cannot attend on latents: it uses a position_bias")
    names = {module: name for name, module in model.named_modules()}
    found = []
    for i, layer in enumerate(cache.layers):
        keys, values = (getattr(layer, side, None) for side in ("keys", "values"))
        if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or not keys.numel():
            raise ValueError(f"model: expected layer {i} to cache keys and values, got {type(layer).__name__}")
        module = next((m for m, k, v in given if _same(k, keys) and _same(v, values)), None)
        if module is None:
            raise ValueError(
                f"model: layer {i} of {type(model).__name__} cannot attend on latents: its attention is not given the "
                "keys and values that its cache returned"
            )
        if keys.shape != values.shape:
            raise ValueError(
                f"model: {names[module]} cannot attend on latents: expected keys and values of one shape, got "
                f"{list(keys.shape)} and {list(values.shape)}"
            )
        found.append(AttentionLayer(names[module], module, keys.shape[1], keys.shape[3], keys.dtype, keys.device))
    if not found:
        raise ValueError(f"model: expected layers that fill a cache, got none in {type(model).__name__}")
    return found


def _same(given: Tensor, cached: Tensor) -> bool:
    alike = given.shape == cached.shape and given.dtype == cached.dtype
    return alike and torch.equal(given.nan_to_num(), cached.nan_to_num())  # NaN is told of where weights are read


@torch.no_grad()
def heads_given(model: nn.Module, layers: Sequence[AttentionLayer], positions: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values [T, Hkv, D] of each layer, as attention is given them, of some tokens at positions [T]: in
    float32, on the CPU."""
    found: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def watch(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_causal(module, kwargs.get("is_causal")):
            k, v = (x[0].transpose(0, 1).float().cpu() for x in (key, value))
            found[module] = k, v
        return exact_attention(module, query, key, value, *args, **kwargs)

    ids = tokens_for(model, len(positions))
    with evaluating(model), attending(model, watch):
        model(input_ids=ids, position_ids=positions[None].to(ids.device), use_cache=False)
    return [found[layer.module] for layer in layers]


def sample(module: nn.Module) -> Tensor | None:
    """A few numbers of every parameter of an attention module, [n] in their dtype; None where there are none to read,
    as of quantised or offloaded weights."""
    parameters = [p.detach() for _, p in sorted(module.named_parameters()) if p.is_floating_point()]
    if not parameters or any(p.is_meta or not p.numel() for p in parameters):
        return None
    found = [p.reshape(-1)[:: max(p.numel() // SAMPLED, 1)][:SAMPLED] for p in parameters]
    return torch.cat([x.to(found[0].dtype) for x in found]).cpu()
