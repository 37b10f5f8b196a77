"""A model on the latents of its factors, or as it is where there are none: for what compares the two."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn
from transformers import DynamicCache

from lrattn.factors.record import Factors
from lrattn.integrations.transformers.attention import latent_attention
from lrattn.integrations.transformers.cache import LatentCache


def attending(
    model: nn.Module, factors: Factors | None, recent: int | None = None, sinks: int | None = None
) -> AbstractContextManager[nn.Module]:
    """`latent_attention`; without factors the model is left as it is.

    Raises: ValueError as it does, and for recent or sinks without factors.
    """
    if factors is not None:
        return latent_attention(model, factors, recent=recent, sinks=sinks)
    for name, tokens in (("recent", recent), ("sinks", sinks)):
        if tokens:
            raise ValueError(f"{name}: expected 0 without factors, where every token is held dense, got {tokens}")
    return nullcontext(model)


def new_cache(
    factors: Factors | None, recent: int | None = None, sinks: int | None = None
) -> DynamicCache | LatentCache:
    """An empty cache for a model that is `attending`: of latents, or dense without factors. Raises: as LatentCache."""
    return DynamicCache() if factors is None else LatentCache(factors, recent=recent, sinks=sinks)


def held_bytes(cache: DynamicCache | LatentCache) -> int:
    """Bytes of the tensors a cache holds."""
    if isinstance(cache, LatentCache):
        return cache.nbytes
    return sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))
