"""A model on the latents of its factors, or as it is where there are none: for what compares the two."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from torch import nn
from transformers import DynamicCache

from lrattn.factors import Factors
from lrattn.integrations.transformers.attention import latent_attention
from lrattn.integrations.transformers.cache import LatentCache


def attending(model: nn.Module, factors: Factors | None) -> AbstractContextManager[nn.Module]:
    """`latent_attention`; without factors the model is left as it is."""
    return nullcontext(model) if factors is None else latent_attention(model, factors)


def new_cache(model: nn.Module, factors: Factors | None) -> DynamicCache | LatentCache:
    """An empty cache: of latents, or dense without factors."""
    return DynamicCache() if factors is None else LatentCache(model, factors)


def held_bytes(cache: DynamicCache | LatentCache) -> int:
    """Bytes of the tensors a cache holds."""
    if isinstance(cache, LatentCache):
        return cache.nbytes
    return sum(x.untyped_storage().nbytes() for layer in cache.layers for x in (layer.keys, layer.values))
