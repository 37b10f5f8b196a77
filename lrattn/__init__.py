"""Attention directly on low-rank KV caches. The pipeline:

    factors = lrattn.compress(model, batches, keep=0.5, far=(0, 0))  # model and text -> Factors, offline
    layer = factors.layers[0]                                        # up, down, ranks, rope of one layer
    k_cache, v_cache = lrattn.allocate_cache(layer, num_pages=64, page_size=16)
    zk, zv = layer.project(k, v, positions)                          # keys and values [T, Hkv, D] -> latents
    lrattn.write_latents(layer, zk, zv, k_cache, v_cache, slots)     # latents -> pages; nothing else is cached
    y = lrattn.decode_attention(q, k_cache, v_cache, layer, block_table=block_table, seq_lens=seq_lens)

Last and first tokens may be held as they are beside their latents: lrattn.Near, write_near, decode_attention(near=).
In transformers, once lrattn.integrations.transformers is imported: model.set_attn_implementation("lrattn"), and
model.generate(**inputs, cache=LatentCache(factors)). There caches also hold the last 64 and first 4 tokens dense, and
factors are made for that, unless far=(0, 0) says no.
"""

from lrattn.attention.cache import allocate_cache
from lrattn.attention.near import Near
from lrattn.attention.ops import (
    decode_attention,
    merge_attention,
    rebuild,
    workspace_bytes,
    write_latents,
    write_near,
)
from lrattn.compression import methods
from lrattn.compression.calibrate import calibrate
from lrattn.compression.compress import compress
from lrattn.compression.moments import Moments
from lrattn.compression.nested import narrowed
from lrattn.compression.older import in_kv_space
from lrattn.compression.refine import refine
from lrattn.compression.residual import residual
from lrattn.compression.sharing import donors
from lrattn.factors.formats import Format
from lrattn.factors.layer import LayerFactors
from lrattn.factors.projection import Projection
from lrattn.factors.record import Factors
from lrattn.factors.rope import Rope
from lrattn.factors.selection import Selection

__all__ = [
    "Factors",
    "Format",
    "LayerFactors",
    "Moments",
    "Near",
    "Projection",
    "Rope",
    "Selection",
    "allocate_cache",
    "calibrate",
    "compress",
    "decode_attention",
    "donors",
    "in_kv_space",
    "merge_attention",
    "methods",
    "narrowed",
    "rebuild",
    "refine",
    "residual",
    "workspace_bytes",
    "write_latents",
    "write_near",
]
__version__ = "0.1.0"
