"""Attention functions of given factors, for passes without a cache: by a name, or inside a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from lrattn.attention.ops import check_backend
from lrattn.factors.record import Factors
from lrattn.integrations.transformers.attention import latent_forward, no_cache
from lrattn.integrations.transformers.columns import Columns
from lrattn.integrations.transformers.fit import near_of
from lrattn.integrations.transformers.handle import LatentKeys
from lrattn.integrations.transformers.layer import LatentLayer
from lrattn.models.interface import Attention, attending, is_causal, register


def bind(factors: Factors, *, recent: int | None = None, sinks: int | None = None, backend: str | None = None) -> str:
    """The name of an attention function of these factors, for model.set_attn_implementation: scoring needs no cache.

    A pass without a cache sees far columns as their latents say; to go on from one takes a LatentCache, which has a
    window of its own. The function stays registered, and so do the factors.

    Args:
        recent, sinks, backend: as of LatentCache.

    Raises: ValueError for a negative number or an unknown backend.
    """
    near = near_of(factors, recent, sinks)
    name = f"lrattn-{id(factors):x}-{near[0]}-{near[1]}-{backend}"
    register(name, _bound(factors, near, backend))
    return name


@contextmanager
def latent_attention(
    model: nn.Module,
    factors: Factors,
    backend: str | None = None,
    *,
    recent: int | None = None,
    sinks: int | None = None,
) -> Iterator[nn.Module]:
    """Inside, a model attends on latents; on exit, by whatever way, as before.

    Passes without a cache, such as scoring, need nothing else; generate is given a LatentCache or use_cache=False.

    Args:
        model: of transformers. factors: of that model, in its dtype and on its device.
        recent, sinks, backend: of passes without a cache, as LatentCache says. A cache has its own.

    Raises: ValueError for a negative number, an unknown backend, a model whose attention is not transformers'
    AttentionInterface, or one that is inside such a block.
    """
    with attending(model, _bound(factors, near_of(factors, recent, sinks), backend)):
        yield model


def _bound(factors: Factors, near: tuple[int, int], backend: str | None) -> Attention:
    """latent_forward; where there is no LatentCache, on a layer of its own that is thrown away after the pass."""
    check_backend(backend)

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if not isinstance(key, LatentKeys) and is_causal(module, kwargs.get("is_causal")):
            i = getattr(key, "latent_layer", getattr(module, "layer_idx", None))  # of who made them, where layers share
            if key.shape[2] != query.shape[2] or i is None:
                raise no_cache()
            if i >= len(factors.layers):
                raise ValueError(f"factors: expected factors of layer {i}, got those of {len(factors.layers)} layers")
            key.latent_layer = i  # type: ignore[attr-defined]
            columns = Columns(factors.layers[i].rope is not None, near[1])
            key = LatentKeys.of(key, value, LatentLayer(factors, i, near, columns, backend, held=False))
        return latent_forward(module, query, key, value, attention_mask, **kwargs)

    return forward
