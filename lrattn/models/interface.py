"""Another attention function inside a block, by transformers' AttentionInterface."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lrattn.attention.dense import Sight, dense_attention
from lrattn.models.masks import mask_function, said

# (module, query [B, Hq, S, D], key and value [B, Hkv, T, D], mask, ...) -> ([B, S, Hq, D], None)
Attention = Callable[..., tuple[Tensor, None]]
INSIDE = "lrattn-inside"  # the one name of all functions that models attend by inside a block
_TAKEN: WeakKeyDictionary[nn.Module, Attention] = WeakKeyDictionary()


def register(name: str, function: Attention) -> None:
    """Makes an attention function known by a name, with lrattn's masks."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, mask_function)


@contextmanager
def attending(model: nn.Module, function: Attention) -> Iterator[None]:
    """Inside, every attention of the model is this function; on exit, by whatever way, it is what it was.

    Raises: ValueError if the model does not use the AttentionInterface, or is in such a block already, or another model
    is that has the same config object.
    """
    modules = list(model.modules())
    if any(module in _TAKEN for module in modules):
        raise ValueError("model: already inside a block that took its attention over; leave that one first")
    if any(config._attn_implementation == INSIDE for config in _configs(model)):
        raise _shared()
    register(INSIDE, _inside)
    with attention_set(model, INSIDE):
        _TAKEN.update(dict.fromkeys(modules, function))
        try:
            yield
        finally:
            for module in modules:
                _TAKEN.pop(module, None)


def _inside(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    if module not in _TAKEN:
        raise _shared()
    return _TAKEN[module](module, *args, **kwargs)


def _shared() -> ValueError:
    return ValueError(
        "model: its config is that of a model whose attention a block has taken over, or a copy of it; leave that "
        "block first, or build the models from configs of their own"
    )


@contextmanager
def attention_set(model: nn.Module, name: str) -> Iterator[None]:
    """Inside, the model's attention is the one of this name; on exit that of every config is what it was.

    Raises: ValueError if the model does not use the AttentionInterface.
    """
    if not hasattr(model, "set_attn_implementation"):
        raise ValueError(f"model: expected a model of transformers, got {type(model).__name__}")
    config: Any = model.config
    before = [(own, own._attn_implementation) for own in _configs(model)]
    try:
        model.set_attn_implementation(name)  # type: ignore[operator]
        if config._attn_implementation != name:
            raise ValueError(
                f"model: expected attention that goes through transformers' AttentionInterface, got "
                f"{type(model).__name__}, whose does not"
            )
        yield
    finally:
        for own, what in before:  # outer ones first: setting one sets those inside it
            own._attn_implementation = what


def _configs(model: nn.Module) -> list[Any]:
    """Those of a model and of models in it, outer ones before those they hold."""
    found: dict[int, Any] = {}

    def visit(config: Any) -> None:
        if hasattr(config, "sub_configs") and id(config) not in found:
            found[id(config)] = config
            for key in config.sub_configs:
                visit(getattr(config, key, None))

    for module in model.modules():
        visit(getattr(module, "config", None))
    return list(found.values())


def is_causal(module: nn.Module, said: bool | None) -> bool:
    """Whether an attention module is of a decoder: towers and encoders say that they are not."""
    return bool(getattr(module, "is_causal", True) if said is None else said)


def exact_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as it is without latents."""
    if not is_causal(module, kwargs.get("is_causal")):
        return not_causal(module, query, key, value, attention_mask, **kwargs)
    return attention_beyond((0, 0), (key, value), query, key, value, attention_mask, **kwargs)


def attention_beyond(
    near: tuple[int, int],
    far: tuple[Tensor, Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention to the keys and values given of the columns near a query, `near` (recent, sinks) as Sight has
    it, and to those of `far` of the others; the rest as transformers hands it to an attention function."""
    (recent, sinks), end, first = near, key.shape[2], None
    what = said(attention_mask, sliding_window, len(query), end)
    if sinks:
        pads = torch.zeros(1, dtype=torch.int64, device=key.device) if what.pads is None else what.pads
        at = (pads[:, None] + torch.arange(sinks, device=key.device)).clamp_max(end - 1)
        at = at.expand(len(key), -1)[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
        first = key.gather(2, at), value.gather(2, at)
    out = dense_attention(
        query,
        Sight(end - query.shape[2], end, recent, sinks, *what),
        far,
        (key, value) if recent else None,
        first,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap or 0.0,
        sinks=s_aux,
    )
    return out.transpose(1, 2).contiguous(), None


def not_causal(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """transformers' own attention by SDPA, of towers and encoders."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if mask is not None and mask.dim() == 2:
        mask = mask[:, None, None].bool()
    kwargs["is_causal"] = False
    out: Tensor = sdpa_attention_forward(module, query, key, value, mask, **kwargs)[0]
    return out, None


def cache_argument(cache: Any) -> dict[str, Any]:
    """A cache as the keyword argument that this release of transformers takes it by."""
    from transformers import __version__

    release = tuple(int(part) for part in __version__.split(".")[:2])
    return {"cache" if release >= (5, 24) else "past_key_values": cache}


def decoder_of(model: nn.Module) -> nn.Module:
    """The module that runs the layers, without a language model's head; the model itself where it does not tell."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    return decoder if isinstance(decoder, nn.Module) else model


def positions_of(model: nn.Module) -> int | None:
    """How many tokens a sequence may have, as the model's config says; None where it does not."""
    config: Any = model.config
    found: int | None = getattr(config.get_text_config(), "max_position_embeddings", None)
    return found


def name_of(model: nn.Module) -> str:
    """Of what it was loaded from, as its config has it; or ''."""
    return str(getattr(model.config, "_name_or_path", ""))


def device_of(model: nn.Module) -> torch.device:
    """Where token ids go: to the first parameter that is somewhere; offloaded models move them by themselves."""
    return next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))


def tokens_for(model: nn.Module, count: int) -> Tensor:
    """A few token ids [1, count], on the model's device."""
    config: Any = model.config
    most = int(config.get_text_config().vocab_size)
    return (torch.arange(count, device=device_of(model)) + 16).remainder(most)[None]
