"""One layer's attention in vLLM: new tokens to latents and to the dense window, decode, prefill."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.attention.backend import AttentionImpl, AttentionType, CommonAttentionMetadata

from lrattn.attention.ops import decode_attention, write_latents
from lrattn.factors.layer import LayerFactors
from lrattn.factors.projection import Projection
from lrattn.integrations.vllm import prefill, source
from lrattn.integrations.vllm.backend import backend_of
from lrattn.integrations.vllm.batch import Batch
from lrattn.integrations.vllm.window import REPLAY, STORED, Window


class Engine:
    """What the layers of an engine share.

    near: recent and sinks, of the factors. drafts: tokens that a step may take back. slots, rows: of the window.
    replay: tokens that are computed anew after a prefix hit. common, batch: what was built last, and of what.
    """

    def __init__(self, config: VllmConfig) -> None:
        self.config, self.factors, self.drafts = config, source.load(config), config.num_speculative_tokens
        self.near = recent, sinks = self.factors.near
        self.slots = recent + self.drafts if recent else 0
        self.replay = REPLAY * recent if config.cache_config.enable_prefix_caching else 0
        stages, requests = config.parallel_config.pipeline_parallel_size, config.scheduler_config.max_num_seqs
        self.rows = requests * (stages + 1 if stages > 1 else 1)  # some requests are on their way through stages
        self.common: CommonAttentionMetadata | None = None
        self.batch: Batch | None = None
        told = self.factors, self.rows * (self.slots + (1 + STORED) * sinks), requests
        source.logger.info("lrattn: attention on %s; dense windows of %d tokens together, for %d requests", *told)

    def layer(self, i: int, name: str) -> LayerFactors:
        """This rank's part of a layer, in the model's dtype and on its device.

        Raises: ValueError for a layer that the factors do not have, such as a draft model's, or a group of heads that
        two ranks would share.
        """
        layers, world = self.factors.layers, get_tensor_model_parallel_world_size()
        if i >= len(layers):
            raise ValueError(
                f"lrattn: expected factors of {name}, got those of {len(layers)} layers (draft models have none: use "
                "the speculative method 'ngram')"
            )
        try:
            layer = layers[i] if world == 1 else layers[i].shard(get_tensor_model_parallel_rank(), world)
        except ValueError as error:
            raise ValueError(f"lrattn: tensor_parallel_size={world}: {error}") from error
        return layer.to(self.config.device_config.device, self.config.model_config.dtype)

    def reserve(self, nbytes: int) -> None:
        """Takes a layer's window from the bytes of the cache, where a number of them was asked for."""
        cache = self.config.cache_config
        if (held := cache.kv_cache_memory_bytes) is not None:
            if held <= nbytes:
                raise ValueError(
                    f"lrattn: kv_cache_memory_bytes: expected more than the dense window's {nbytes} bytes a layer, got "
                    f"{held} left: set a smaller max_num_seqs"
                )
            cache.kv_cache_memory_bytes = held - nbytes


class LatentImpl(AttentionImpl[Batch]):  # type: ignore[misc]
    """vLLM makes it with the model, before weights, when the first one reads the factors; and tells it that weights
    are there before it asks how many bytes a token takes."""

    def __init__(
        self, num_heads: int, head_size: int, scale: float, num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None, sliding_window: int | None = None, kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None, attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None, sinks: Tensor | None = None,
    ) -> None:  # fmt: skip
        for what, wrong in (
            ("alibi_slopes", alibi_slopes),
            ("attn_type", attn_type if attn_type != AttentionType.DECODER else None),
            ("kv_sharing_target_layer_name", kv_sharing_target_layer_name),
        ):
            if wrong is not None:
                raise ValueError(f"lrattn: {what}: expected none in a layer that attends on latents, got {wrong!r}")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, float(scale)
        self.num_kv_heads, self.sliding_window = num_kv_heads or num_heads, sliding_window
        self.kv_cache_dtype, self.softcap, self.sinks = kv_cache_dtype, logits_soft_cap or 0.0, sinks
        self.neighbours = get_current_vllm_config().compilation_config.static_forward_context
        impls = (getattr(layer, "impl", None) for layer in self.neighbours.values())
        others = (impl.engine for impl in impls if isinstance(impl, LatentImpl))
        self.engine: Engine = next(others, None) or Engine(get_current_vllm_config())
        self.factors: LayerFactors | None = None
        self.window: Window | None = None

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Raises: ValueError for factors that do not fit the layer."""
        if self.factors is not None:  # weights were loaded again
            return
        name, owner = next((n, x) for n, x in self.neighbours.items() if getattr(x, "impl", None) is self)
        engine, i = self.engine, extract_layer_index(name)
        self.factors = layer = engine.layer(i, name)
        if (got := (layer.num_kv_heads, layer.head_dim)) != (expected := (self.num_kv_heads, self.head_size)):
            raise ValueError(f"lrattn: expected factors of (Hkv, D) = {expected}, as {name} has, got {got}")
        self.sinks = None if self.sinks is None else self.sinks.float()
        if any(engine.near):
            self.window = Window(layer, engine.near, engine.slots, engine.rows)
            engine.reserve(self.window.nbytes)
        widths = row_bytes(layer.row_side), 0 if layer.shared else row_bytes(layer.values)
        owner.attn_backend = backend_of(widths, engine.replay)

    def pages(self, kv_cache: Tensor) -> tuple[Tensor, Tensor | None]:
        """vLLM's [N, 1, P, bytes] as caches [N, P, k_width] and [N, P, v_width]: a page holds the rows of all its
        keys, then those of its values."""
        layer: Any = self.factors
        pages, size = kv_cache[:, 0].flatten(1), kv_cache.shape[2]
        k, v = pages.split([cut := size * row_bytes(layer.row_side), pages.shape[1] - cut], 1)
        k = k.view(layer.k_dtype).unflatten(1, (size, layer.k_width))
        return k, None if layer.shared else v.view(layer.v_dtype).unflatten(1, (size, layer.v_width))

    def forward(
        self, layer: Any, query: Tensor, key: Tensor, value: Tensor, kv_cache: Tensor, attn_metadata: Batch | None,
        output: Tensor, output_scale: Tensor | None = None, output_block_scale: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """query [n, Hq, D], key and value [n, Hkv, D], rotated -> output [n, Hq, D]."""
        factors: Any = self.factors
        if (batch := attn_metadata) is None:  # to see how much memory a pass takes
            prefill.reserve(factors, self.engine.config.model_config.max_model_len)
            return output.fill_(0)
        window, caches = self.window, self.pages(kv_cache)
        q, k, v = (x[: batch.tokens] for x in (query, key, value))
        positions = None if factors.rope is None else batch.positions
        zk, zv = factors.project(k, v, positions)
        write_latents(factors, zk, zv, *caches, batch.slots)
        if window is not None and batch.settled is not None:
            tokens, homes = batch.settled
            window.store(homes, k[tokens], v[tokens])
        if window is not None and batch.came is not None and batch.chunks:
            window.fill(batch.came, caches, batch.table)
        if prefills := [chunk for chunk in batch.chunks if chunk.known]:
            rule = self.scale, self.sliding_window, self.softcap, self.sinks
            prefill.attend(prefill.Pass(q, k, v, caches, factors, window, batch, *rule), prefills, output)
        if window is not None and batch.places is not None:
            window.write(batch.places, k, v)
        if batch.decodes:
            self._decode(q, caches, batch, slice(0, batch.decodes), slice(0, batch.decodes * batch.queries), output)
        for chunk in batch.chunks:
            if not chunk.known:  # drafts, of which there are not as many as of the others
                own = slice(chunk.request, chunk.request + 1)
                self._decode(q, caches, batch, own, slice(chunk.first, chunk.last), output)
        return output

    def _decode(
        self, q: Tensor, caches: tuple[Tensor, Tensor | None], batch: Batch, own: slice, tokens: slice, output: Tensor
    ) -> None:
        """Of requests that have as many tokens each."""
        factors: Any = self.factors
        shape = own.stop - own.start, -1, *q.shape[1:]
        near = None if self.window is None or batch.rows is None else self.window.near(batch.rows[own])
        decode_attention(
            q[tokens].reshape(shape), *caches, factors, block_table=batch.table[own], seq_lens=batch.lens[own],
            softmax_scale=self.scale, max_seq_len=batch.most, window_size=self.sliding_window, softcap=self.softcap,
            sinks=self.sinks, near=near, out=output[tokens].view(shape),
        )  # fmt: skip


def row_bytes(side: Projection) -> int:
    """Of a token's row in a cache."""
    return side.cache_width * side.cache_dtype.itemsize
