"""Everything a decode step is timed with: dense kernels on the dense cache, ours on latents, and rebuilding all.

A provider takes tensors and returns a run, or raises Unavailable with the reason. Runs return heads [B, Hq, D]. Dense
kernels get their cache as they like it best: in order, one sequence after the other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

import lrattn
from bench.decode import baselines, palu_scores, ways
from bench.decode.decode_problem import Problem
from bench.decode.installed import Unavailable, need
from bench.decode.low_bit import LOW_BIT

Run = Callable[[], Tensor]
FLASHINFER_PAGE = 16
FLASHINFER_WORKSPACE = 128 << 20  # bytes, what its documentation advises
TENSOR_CORE_ROWS = 4  # query heads per kv head from which its tensor-core kernel is the faster


def flash_attention_3(q: Tensor, k: Tensor, v: Tensor) -> Run:
    """q [B, Hq, D], k, v [B, T, Hkv, D]; splits and packing by its own heuristics."""
    module = need("flash_attn_interface")
    lens = torch.full((len(q),), k.shape[1], dtype=torch.int32, device=q.device)

    def run() -> Tensor:
        out: Tensor = module.flash_attn_with_kvcache(q[:, None], k, v, cache_seqlens=lens)
        return out[:, 0]

    return run


def flashinfer(q: Tensor, k: Tensor, v: Tensor) -> Run:
    """Its paged decode, planned once outside what is timed, as for a captured graph."""
    module = need("flashinfer")
    (batch, heads, dim), (tokens, kv_heads) = q.shape, k.shape[1:3]
    if tokens % FLASHINFER_PAGE:
        raise Unavailable(f"takes pages of {FLASHINFER_PAGE} tokens here")
    pages = tokens // FLASHINFER_PAGE
    indptr, indices = (torch.arange(n, dtype=torch.int32, device=q.device) for n in (batch + 1, batch * pages))
    last = torch.full((batch,), FLASHINFER_PAGE, dtype=torch.int32, device=q.device)
    wrapper = module.BatchDecodeWithPagedKVCacheWrapper(
        torch.zeros(FLASHINFER_WORKSPACE, dtype=torch.uint8, device=q.device),
        "NHD",
        use_cuda_graph=True,
        use_tensor_cores=heads // kv_heads >= TENSOR_CORE_ROWS,
        paged_kv_indptr_buffer=indptr * pages,
        paged_kv_indices_buffer=indices,
        paged_kv_last_page_len_buffer=last,
    )
    wrapper.plan(
        indptr * pages, indices, last, heads, kv_heads, dim, FLASHINFER_PAGE,
        q_data_type=q.dtype, kv_data_type=k.dtype,
    )  # fmt: skip
    cache = tuple(x.view(-1, FLASHINFER_PAGE, kv_heads, dim) for x in (k, v))
    return lambda: wrapper.run(q, cache)


def sdpa(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor], Run]:
    """PyTorch's attention by one backend; query heads that share a kv head are rows of one product."""

    def build(q: Tensor, k: Tensor, v: Tensor) -> Run:
        rows, keys, values = folded(q, k, v)

        def run() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(rows, keys, values).flatten(1, 2)

        try:
            run()
        except RuntimeError as error:
            raise Unavailable(str(error).splitlines()[0]) from error
        return run

    return build


def flex(q: Tensor, k: Tensor, v: Tensor) -> Run:
    """FlexAttention, compiled on a GPU for exactly these shapes."""
    rows, keys, values = folded(q, k, v)
    attend: Any = flex_attention
    if q.is_cuda:
        attend = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return lambda: attend(rows, keys, values).flatten(1, 2)


def folded(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As PyTorch's kernels take them: [B, Hkv, M, D] and [B, Hkv, T, D]."""
    return q.unflatten(1, (k.shape[2], -1)), k.transpose(1, 2), v.transpose(1, 2)


def rebuild_all(x: Problem) -> Run:
    """All keys and values by matrix products, from latents in order, then PyTorch's own choice of attention."""
    assert x.zv is not None
    attend, zv = baselines.rebuild_all(x.layer, x.tokens), x.zv
    return lambda: attend(x.q, x.zk, zv)


def palu(x: Problem, launch: palu_scores.Launch = palu_scores.PUBLISHED) -> Run:
    """Palu's scores; then softmax and the sum of latents in PyTorch, as its released code does."""
    scores = palu_scorer(x, launch)
    assert x.zv is not None
    layer, zv = x.layer, x.zv[0]
    up = layer.values.up.repeat_interleave(palu_scores.HEADS // layer.num_kv_heads, 0)  # [Hq, Rv, D]
    latents = torch.stack([zv[:, columns] for columns in layer.values.columns])  # [groups, T, Rv]

    def attend() -> Tensor:
        p = torch.softmax(scores()[0].float() * layer.head_dim**-0.5, -1).to(zv.dtype)
        y = p.unflatten(0, (len(latents), -1)) @ latents  # [groups, Hq / groups, Rv]
        return (y.flatten(0, 1)[:, None] @ up)[None, :, 0]

    return attend


def palu_scorer(x: Problem, launch: palu_scores.Launch = palu_scores.PUBLISHED) -> Run:
    """Palu's scores alone, [1, Hq, T].

    Raises: Unavailable outside its limits.
    """
    keys, rope = x.layer.keys, x.layer.rope
    plain = rope is not None and rope.theta == palu_scores.THETA and rope.kind == "default" and not rope.interleaved
    for fits, what in (
        (x.batch == 1, "one sequence"),
        (plain, f"a plain RoPE of theta {palu_scores.THETA:.0f}"),
        (keys.offset is None, "keys without an offset"),
        (x.layer.num_kv_heads == palu_scores.HEADS, f"{palu_scores.HEADS} kv heads"),
        (keys.head_order is None and len(set(keys.ranks)) == 1, "heads in order and groups of one rank"),
    ):
        if not fits:
            raise Unavailable(f"the published kernel takes {what}")
    latents = torch.stack([x.zk[0][:, columns] for columns in keys.columns])  # [G, T, R]
    try:
        palu_scores.palu_scores(x.q[0], latents, keys.up, launch)
    except palu_scores.Unfit as reason:
        raise Unavailable(str(reason)) from reason
    return lambda: palu_scores.palu_scores(x.q[0], latents, keys.up, launch)[None]


def ours(x: Problem, num_splits: int = 0) -> Run:
    """decode_attention as an engine calls it; which kernels run is its own choice."""

    def run() -> Tensor:
        out = lrattn.decode_attention(
            x.q,
            x.k_cache,
            x.v_cache,
            x.layer,
            block_table=x.table,
            seq_lens=x.lens,
            num_splits=num_splits,
            backend="triton",
        )
        assert isinstance(out, Tensor)
        return out

    return run


def ours_in_two_passes(x: Problem) -> Run:
    run = ours(x)

    def inside() -> Tensor:
        with ways.two_passes():
            return run()

    return inside


DENSE: dict[str, Callable[[Tensor, Tensor, Tensor], Run]] = {
    "FlashAttention-3": flash_attention_3,
    "FlashInfer": flashinfer,
    "SDPA, flash": sdpa(SDPBackend.FLASH_ATTENTION),
    "SDPA, cuDNN": sdpa(SDPBackend.CUDNN_ATTENTION),
    "FlexAttention": flex,
}
OURS: dict[str, Callable[[Problem], Run]] = {
    "lrattn": ours,
    "lrattn, two passes": ours_in_two_passes,
}
FREE, SHARED = "lrattn, position-free", "lrattn, shared row"
REBUILDING: dict[str, Callable[[Problem], Run]] = {
    "Palu's scores, then PyTorch": palu,
    "rebuild all, then SDPA": rebuild_all,
}
NAMES = (*DENSE, *OURS, FREE, SHARED, *LOW_BIT, *REBUILDING)
PEERS = ("flash_attn_3", "flashinfer-python", "vllm")  # packages
