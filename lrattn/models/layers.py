"""The attention layers of a model, as a short pass shows them: what fills a cache, and what attention is given."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
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
        parts: of a run of neighbours that is taken for one layer, with the heads of all: those layers. () of one layer.
    """

    name: str
    module: nn.Module = field(repr=False)
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    parts: tuple[AttentionLayer, ...] = ()

    @property
    def members(self) -> tuple[AttentionLayer, ...]:
        """The layers of a run; of one layer itself."""
        return self.parts or (self,)

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
    with _told(model) as given:
        try:
            model(input_ids=tokens_for(model, TOKENS), use_cache=True, **cache_argument(cache))
        except (AttributeError, IndexError, KeyError, NotImplementedError, TypeError, ValueError) as error:
            got = _without_keys(model) or f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ValueError(
                f"model: expected {type(model).__name__} to run on a few tokens with a cache of keys and values, got "
                f"{got}"
            ) from error
    for biased, _, _, more in given:
        if more.get("position_bias") is not None:
            raise ValueError(f"model: {type(biased).__name__} cannot attend on latents: it uses a position_bias")
    names = {module: name for name, module in model.named_modules()}
    found = []
    for i, layer in enumerate(cache.layers):
        keys, values = (getattr(layer, side, None) for side in ("keys", "values"))
        if not isinstance(keys, Tensor) or not isinstance(values, Tensor) or not keys.numel():
            got = _without_keys(model) or type(layer).__name__
            raise ValueError(f"model: expected layer {i} to cache keys and values, got {got}")
        module = next((m for m, k, v, _ in given if _same(k, keys) and _same(v, values)), None)
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


def runs_of(layers: Sequence[AttentionLayer], span: int) -> list[AttentionLayer]:
    """Each run of `span` neighbours as one layer that has the heads of all, the last one of those that are left over.

    Raises: ValueError where those of a run differ in their heads, dtype or device.
    """
    if span == 1:
        return list(layers)
    found = []
    for begin in range(0, len(layers), span):
        first, *others = parts = tuple(layers[begin : begin + span])
        kind = first.num_kv_heads, first.head_dim, first.dtype, first.device
        for x in others:
            if (got := (x.num_kv_heads, x.head_dim, x.dtype, x.device)) != kind:
                expected = f"(Hkv, D), dtype and device of {first.name}, {kind}, in the layers that share its rows"
                raise ValueError(f"span: expected {expected}, got {got} of {x.name}")
        found.append(replace(first, num_kv_heads=len(parts) * first.num_kv_heads, parts=parts))
    return found


def _same(given: Tensor, cached: Tensor) -> bool:
    alike = given.shape == cached.shape and given.dtype == cached.dtype
    return alike and torch.equal(given.nan_to_num(), cached.nan_to_num())  # NaN is told of where weights are read


def _without_keys(model: nn.Module) -> str:
    """What the layers are that cache something else, as the config says; empty where it speaks of none."""
    config: Any = model.config.get_text_config()  # type: ignore[union-attr, operator]
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    others = sorted(set(kinds) - {"attention", "full_attention", "sliding_attention", "chunked_attention"})
    what = "layers that cache other things than keys and values, as linear attention, state spaces and convolutions do"
    return f"{what}: {', '.join(others)}" if others else ""


@contextmanager
def _told(model: nn.Module) -> Iterator[list[tuple[nn.Module, Tensor, Tensor, dict[str, Any]]]]:
    """Inside, a model is in evaluation mode, and what attention modules of its decoder are given is listed: keys and
    values [B, Hkv, T, D], and what comes by name."""
    given: list[tuple[nn.Module, Tensor, Tensor, dict[str, Any]]] = []

    def watch(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        if is_causal(module, kwargs.get("is_causal")):
            given.append((module, key, value, kwargs))
        return exact_attention(module, query, key, value, *args, **kwargs)

    with evaluating(model), attending(model, watch):
        yield given


@torch.no_grad()
def heads_given(
    model: nn.Module, layers: Sequence[AttentionLayer], positions: Sequence[Tensor]
) -> list[list[tuple[Tensor, Tensor]]]:
    """Keys and values [T, Hkv, D] of each layer, as attention is given them, of some tokens: in float32, on the CPU.

    A pass for each of `positions`, [T]. In all of them a layer's hidden states are those of the first, so that nothing
    but what positions do to keys and values differs.
    """
    ids, states = tokens_for(model, len(positions[0])), dict[nn.Module, Tensor]()

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any] | None:
        if args:
            return (states.setdefault(module, args[0].clone()), *args[1:]), kwargs
        if "hidden_states" in kwargs:
            return args, kwargs | {"hidden_states": states.setdefault(module, kwargs["hidden_states"].clone())}
        return None

    passes = []
    with ExitStack() as stack:
        for layer in layers:
            stack.callback(layer.module.register_forward_pre_hook(keep, with_kwargs=True).remove)
        for at in positions:
            with _told(model) as given:
                model(input_ids=ids, position_ids=at[None].to(ids.device), use_cache=False)
            found = {module: (key[0], value[0]) for module, key, value, _ in given}
            sides = (found[layer.module] for layer in layers)
            passes.append([(k.transpose(0, 1).float().cpu(), v.transpose(0, 1).float().cpu()) for k, v in sides])
    return passes


def sample(module: nn.Module) -> Tensor | None:
    """A few numbers of every parameter of an attention module, [n] in their dtype; None where there are none to read,
    or not all, as of quantised or offloaded weights."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}
    coded = any(is_coded(x) for x in (*parameters.values(), *module.buffers()))
    if not parameters or coded or any(p.is_meta or not p.numel() for p in parameters.values()):
        return None
    return sample_of(parameters)


def samples_of(layers: Sequence[AttentionLayer]) -> tuple[Tensor, ...]:
    """Of every layer, or none."""
    found = [x for layer in layers if (x := sample(layer.module)) is not None]
    return tuple(found) if len(found) == len(layers) else ()


def sample_of(parameters: Mapping[str, Tensor]) -> Tensor:
    """The same of parameters by name."""
    ordered = [p for _, p in sorted(parameters.items())]
    found = [p.reshape(-1)[:: max(p.numel() // SAMPLED, 1)][:SAMPLED] for p in ordered]
    return torch.cat([x.to(found[0].dtype) for x in found]).cpu()


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two samples are of the same weights, each rounded to a dtype of its own."""
    if a.shape != b.shape:
        return False
    narrower = max(a.dtype, b.dtype, key=lambda kind: torch.finfo(kind).eps)
    twice = a.dtype != b.dtype and a.dtype.itemsize == b.dtype.itemsize  # bfloat16 and float16: neither holds the other
    slack = torch.finfo(narrower).eps if twice else 0.0
    a, b = (x.to(narrower).double() for x in (a, b))
    return torch.allclose(a, b, rtol=slack, atol=slack * 1e-5, equal_nan=True)


def is_coded(x: Tensor) -> bool:
    """Whether numbers stand for others: integers or 8-bit floats, as quantisers have them in parameters or buffers."""
    return x.dtype != torch.bool and (not x.is_floating_point() or x.dtype.itemsize == 1)
