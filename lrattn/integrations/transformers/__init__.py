"""transformers: a cache of latents, and the attention function that reads it, by official interfaces alone.

    factors = lrattn.compress(model, batches, keep=0.3)
    model.set_attn_implementation("lrattn")                    # registered by importing this package
    model.generate(**inputs, past_key_values=LatentCache(factors))

From transformers 5.24 on the argument is called `cache`. To score texts without a cache:

    with latent_attention(model, factors):                     # or model.set_attn_implementation(bind(factors))
        model(**inputs)
"""

from lrattn.integrations.transformers.attention import bind, latent_attention, latent_forward
from lrattn.integrations.transformers.cache import LatentCache
from lrattn.models.interface import register

register("lrattn", latent_forward)

__all__ = ["LatentCache", "bind", "latent_attention"]
