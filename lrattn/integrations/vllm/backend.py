"""The backend that vLLM is told of, and how many bytes a token takes in its pages."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from vllm.v1.attention.backend import AttentionBackend, AttentionImpl, AttentionMetadataBuilder, MultipleOf
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheLayout, replace_as

from lrattn.factors.shapes import RANK_STEP


@dataclass(frozen=True, kw_only=True)
class LatentSpec(FullAttentionSpec):  # type: ignore[misc]
    """Pages of all tokens. After a prefix hit vLLM computes the last `replay` tokens of it anew: with them the dense
    window is filled."""

    replay: int = 0

    @property
    def prefix_replay_tokens(self) -> int:
        return self.replay

    @classmethod
    def merge(cls, specs: list[Self]) -> Self:
        return replace(super().merge(specs), replay=specs[0].replay)


class LatentBackend(AttentionBackend):  # type: ignore[misc]
    """`widths`, bytes of a token's key row and value row, and `replay` are those of a layer's subclass."""

    forward_includes_kv_cache_update: bool = True  # latents of keys that are turned back need positions
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = ["auto", "float16", "bfloat16"]
    supports_sliding_window = supports_sink = classmethod(lambda cls: True)
    supports_kv_connector = supports_device_cpu_query_lens_mismatch = classmethod(lambda cls: False)
    widths: ClassVar[tuple[int, int] | None] = None
    replay: ClassVar[int] = 0

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[AttentionImpl]:
        from lrattn.integrations.vllm.layer import LatentImpl

        return LatentImpl

    @staticmethod
    def get_builder_cls() -> type[AttentionMetadataBuilder]:
        from lrattn.integrations.vllm.batch import BatchBuilder

        return BatchBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        return [MultipleOf(RANK_STEP)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """A page's bytes lie together; with blocks outermost, pages of layers of several widths share a block."""
        return (KVCacheLayout.BLNHC, KVCacheLayout.BLHNC, KVCacheLayout.LBNHC, KVCacheLayout.LBHNC)

    @classmethod
    def customize_spec(cls, spec: AttentionSpec) -> AttentionSpec:
        """One head slot a token, of bytes. Layers of a sliding window hold all tokens where some may be replayed, whose
        own windows reach further back than a hit does."""
        if cls.widths is None or spec.state_content_bytes is not None:
            return spec
        size = {"num_head_slots": 1, "state_content_bytes": sum(cls.widths), "dtype": torch.uint8}
        if cls.replay:  # also of a SlidingWindowSpec, which alone has what is dropped
            return replace_as(spec, LatentSpec, drop=("extra_retained_tokens",), replay=cls.replay, **size)
        return replace(spec, **size)


@functools.cache
def backend_of(widths: tuple[int, int], replay: int) -> type[LatentBackend]:
    """vLLM tells backends apart by their names."""
    name = f"LatentBackend_{widths[0]}_{widths[1]}"
    return type(name, (LatentBackend,), {"widths": widths, "replay": replay, "__module__": __name__})
