"""The attention of vLLM's CPU platform, which takes no name for it: `Backend` is ours where the configuration names it,
and vLLM's own elsewhere."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    from vllm.config import get_current_vllm_config
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    if name != "Backend":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    chosen = get_current_vllm_config().attention_config.backend
    path = (
        AttentionBackendEnum.CUSTOM.get_path()
        if chosen == AttentionBackendEnum.CUSTOM
        else AttentionBackendEnum.CPU_ATTN.value
    )
    return resolve_obj_by_qualname(path)
