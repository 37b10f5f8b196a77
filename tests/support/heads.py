"""Keys and values of a text as a model's attention is given them, and what factors make of them."""

import torch
from transformers import DynamicCache

from lrattn.models.interface import cache_argument


@torch.no_grad()
def heads_of(model, ids):
    """What each layer holds in a cache of its own of a text [b, t]: (k, v), [b, t, Hkv, D] each."""
    cache = DynamicCache()
    model(input_ids=ids, use_cache=True, **cache_argument(cache))
    return [tuple(x.transpose(1, 2) for x in (layer.keys, layer.values)) for layer in cache.layers]


def positions_for(layer, k):
    """Of heads [b, t, Hkv, D], where the layer needs them."""
    return None if layer.rope is None else torch.arange(k.shape[1]).expand(k.shape[:2])


def latents_of(layer, k, v):
    return layer.project(k, v, positions_for(layer, k))


def rebuilt(layer, k, v):
    """The heads that latents give back."""
    return layer.rebuild(*latents_of(layer, k, v), positions_for(layer, k))


def errors(layer, k, v):
    """Of the keys and of the values, relative."""
    return tuple(((got - x).norm() / x.norm()).item() for got, x in zip(rebuilt(layer, k, v), (k, v)))
