"""transformers: a cache that holds latents only, and a context in which a model attends on it.

with latent_attention(model, factors):
    model.generate(**inputs)             # prefill on rebuilt keys and values, decode on latents

cache = LatentCache(model, factors)      # to keep the cache, or to look at cache.nbytes
with latent_attention(model, factors):
    model.generate(**inputs, past_key_values=cache)
"""

from lrattn.integrations.transformers.attention import latent_attention
from lrattn.integrations.transformers.cache import LatentCache

__all__ = ["LatentCache", "latent_attention"]
