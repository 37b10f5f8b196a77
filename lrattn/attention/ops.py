"""The public ops: check the arguments once, choose a backend, return.

Checks read metadata only (shape, dtype, device, stride); every one happens before anything is written. The ops on a
cache are for inference: no gradient flows through them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lrattn.attention import near as window
from lrattn.attention import operators, reference
from lrattn.attention.checks import (
    backend_for,
    backend_of,
    check_caches,
    check_decode,
    check_integer,
    check_kind,
    check_near,
    check_number,
    check_slots,
    check_tables,
    check_write,
)
from lrattn.factors.formats import ALIGNMENT
from lrattn.factors.layer import LayerFactors
from lrattn.factors.operands import lists
from lrattn.factors.shapes import MAX_SPLITS, accumulator, check, check_tensors
from lrattn.kernels.arguments import Call, Near, Rule, Tokens

MOST_CHECKED = 128  # kinds of calls a layer remembers to have checked


@torch.no_grad()
def write_latents(
    layer: LayerFactors,
    zk: Tensor,
    zv: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor | None,
    slot_mapping: Tensor,
    *,
    backend: str | None = None,
) -> None:
    """Stores latents in their slots.

    Args:
        zk: [.., row_width], zv: [.., sum Rv] (None when shared), in the layer's dtype; packed here
            where its latents are.
        k_cache: [N, P, k_width]; v_cache: [N, P, v_width] (None when shared).
        slot_mapping: [..] int32 or int64, page * P + offset; slots outside [0, N * P) are skipped. What a slot
            holds after it was given twice is undefined.

    Raises: ValueError naming the tensor, what was expected and what came; the caches are then untouched.
    """
    tensors = zk, zv, k_cache, v_cache, slot_mapping
    backend = _checked(layer, check_write, tensors, backend, watched=operators.watched(zk))
    zk, slots = zk.reshape(-1, layer.row_width), slot_mapping.reshape(-1)
    zv = None if zv is None else zv.reshape(-1, layer.values.width)
    if backend == "reference":
        reference.write_latents(layer, zk, zv, k_cache, v_cache, slots)
    else:
        torch.ops.lrattn.write_latents(zk, zv, k_cache, v_cache, slots, *lists(*layer.operands))


@torch.no_grad()
def write_near(
    near: Near,
    k: Tensor,
    v: Tensor,
    seq_lens: Tensor,
    seq_starts: Tensor | None = None,
    *,
    backend: str | None = None,
) -> None:
    """Stores the newest S tokens of each sequence in the dense window, as attention is given them.

    Args:
        near: keys and values to write to. What has no place there any more is skipped: tokens before the first one,
            sequences without a row.
        k, v: [B, S, Hkv, D], keys rotated, in near's dtype; the last axis contiguous, other strides free.
        seq_lens: [B] int32 tokens held, these included, which are the last.
        seq_starts: [B] int32, as for decode_attention. near.firsts says more.
        backend: as for decode_attention.

    Raises: ValueError naming the tensor, what was expected and what came; nothing is written then.
    """
    check_kind(near)
    check_tensors(k=k)
    if k.dim() != 4:
        raise ValueError(f"k: expected shape [B, S, Hkv, D], got {list(k.shape)}")
    dims: dict[str, int] = {}
    check_near(near, len(k), dims, writable=True)
    kind: dict[str, Any] = {"dtype": near.keys.dtype, "device": near.keys.device, "contiguous": True}
    check("k", k, "B S Hkv D", dims, **kind)
    check("v", v, "B S Hkv D", dims, **kind)
    for name, x in {"seq_lens": seq_lens, **({} if seq_starts is None else {"seq_starts": seq_starts})}.items():
        check(name, x, "B", dims, dtype=torch.int32, device=k.device)
    firsts = seq_starts if near.firsts is None else near.firsts
    if backend_for(backend, k.dtype, k.device, k.shape[3], "near.keys") == "reference":
        window.write_near(Near(near.keys, near.values, near.sinks, near.recent, near.rows, firsts), k, v, seq_lens)
    else:
        torch.ops.lrattn.write_near(k, v, near.keys, near.values, near.rows, seq_lens, firsts, near.sinks)


@torch.no_grad()
def rebuild(
    k_cache: Tensor,
    v_cache: Tensor | None,
    layer: LayerFactors,
    block_table: Tensor,
    seq_lens: Tensor,
    positions: Tensor | None = None,
    *,
    offsets: Tensor | None = None,
    num_tokens: int | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Dense keys and values of the cached tokens, as attention is given them, for a dense prefill kernel.

    Args:
        k_cache, v_cache, layer, block_table, seq_lens, positions, offsets: as for decode_attention.
        num_tokens: sum T where the host knows it, so that a GPU is not waited for. More rows than that are not
            written; rows past the last token hold anything.

    Returns: k, v: [sum T, Hkv, D] in the layer's dtype, sequences one after the other.
    Raises: ValueError naming the tensor, what was expected and what came.
    """
    backend = backend_of(backend, layer)
    check_caches(layer, k_cache, v_cache)
    check_tables(layer, k_cache, block_table, seq_lens, None, positions, offsets)
    check_integer("num_tokens", num_tokens, 0, optional=True)
    if backend == "reference":
        k, v = reference.rebuild(k_cache, v_cache, layer, block_table, seq_lens, positions, offsets)
        return k[:num_tokens], v[:num_tokens]
    tables, rows = (block_table, seq_lens, positions, offsets), -1 if num_tokens is None else num_tokens
    return torch.ops.lrattn.rebuild(k_cache, v_cache, *tables, *lists(*layer.operands), rows)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor | None,
    layer: LayerFactors,
    *,
    block_table: Tensor,
    seq_lens: Tensor,
    softmax_scale: float | None = None,
    positions: Tensor | None = None,
    offsets: Tensor | None = None,
    seq_starts: Tensor | None = None,
    causal: bool = True,
    max_seq_len: int | None = None,
    window_size: int | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    near: Near | None = None,
    project: str = "heads",
    num_splits: int = 0,
    workspace_limit: int = 256 << 20,
    out: Tensor | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of the newest S tokens of each sequence over its cached latents.

    Args:
        q: [B, S, Hq, D] or [B, Hq, D] (then outputs drop the S axis), rotated, heads in the model's order. The last
            S tokens of each sequence are the queries' own, already written.
        k_cache: [N, P, k_width]; v_cache: [N, P, v_width], None when the layer is shared.
        layer: factors of the same dtype and device as q and the caches.
        block_table: [B, pages] int32; entries past a sequence's length are never followed.
        seq_lens: [B] int32 tokens held; longer ones are clamped to the table and to max_seq_len.
        softmax_scale: multiplies the scores. Default D ** -0.5.
        positions: [N, P] int32, position of each slot for RoPE, of keys before it. Default: index in the sequence.
        offsets: [B] int32, of keys in chunks: token t of a sequence is at position t - offset. Default 0. Masks and
            seq_starts go by token all the same. Layers without a rope do without both.
        seq_starts: [B] int32, first token attended to. Default 0. Does not shift positions.
        causal: bottom-right aligned; False lets every query see seq_starts..seq_lens.
        max_seq_len: upper bound of the lengths, for work and workspace. Default: all of the table.
        window_size: each query sees the most recent tokens only, its own included.
        softcap: scores become softcap * tanh(score / softcap), before masking; 0 is off.
        sinks: [Hq] float32 logits that join the denominator and lse.
        near: the dense window: each query sees its near.recent last tokens, and the sequence's first near.sinks, by
            the keys and values held there, all others by their latents; lengths and starts are those of all tokens.
            It holds them already (write_near), has near.recent + S - 1 slots or as many as max_seq_len, and after
            tokens were taken back as many more; no length is above max_seq_len then. Not with causal=False or
            project="latent": it has no latents.
        project: "latent" [B, S, Hq, max Rv] | "heads" [B, S, Hq, D] | "hidden" [B, S, E] through layer.wo.
        num_splits: token ranges merged by lse, at most 1024; 0 is planned. A fixed number makes rows independent of
            the batch; its partial results are held whatever the workspace_limit.
        workspace_limit: bytes of temporaries; beyond it tokens go some at a time.
        out: buffer of the result's shape and q's dtype to write to and return.
        return_lse: also return lse [B, S, Hq], natural log, float32 (float64 for float64).
        backend: "triton", "reference", or None: triton for a layer on a GPU that its kernels can do
            (no float64, D <= 256).

    Returns: out, or (out, lse). A query that sees no token gives zeros and lse -inf (its sink logit with sinks).
    Raises: ValueError naming the argument, what was expected and what came.
    Source: ReCalKV (arXiv 2505.24357) for the factors; online softmax and the merge by lse as in FlashAttention.
    """
    tensors: tuple[Tensor | None, ...]
    tensors = q, k_cache, v_cache, block_table, seq_lens, positions, offsets, seq_starts, sinks, out
    if near is not None:
        check_kind(near)
        tensors = *tensors, *near.tensors
    watched, held = operators.watched(q), None if near is None else (near.sinks, near.recent)
    chosen = _checked(layer, check_decode, tensors, held, project, backend, watched=watched)
    if window_size is not None:
        check_integer("window_size", window_size, 1)
    if max_seq_len is not None:
        check_integer("max_seq_len", max_seq_len, 0)
    check_integer("num_splits", num_splits, 0, MAX_SPLITS)
    check_integer("workspace_limit", workspace_limit, 1)
    if softmax_scale is not None:
        check_number("softmax_scale", softmax_scale)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    check_number("softcap", softcap, 0.0)
    if not isinstance(causal, bool):
        raise ValueError(f"causal: expected True or False, got {causal}")
    if window_size is not None and not causal:
        raise ValueError(f"window_size: expected None with causal=False, got {window_size}")
    if near is not None and (not causal or project == "latent"):
        what = "causal=False, where no token is recent" if not causal else "project='latent', as it holds no latents"
        raise ValueError(f"near: expected None with {what}, got Near")

    bound = block_table.shape[1] * k_cache.shape[1]
    bound = bound if max_seq_len is None else min(bound, max_seq_len)
    flat = q.dim() == 3
    q4 = q.unsqueeze(1) if flat else q
    if near is not None:
        check_slots(near, q4.shape[1], bound)
    to = out if out is None or not flat else out.unsqueeze(1)
    tokens = Tokens(block_table, seq_lens, seq_starts, positions, bound, offsets if layer.chunk else None, near)
    window = min(window_size, bound + q4.shape[1]) if window_size else 0
    rule = Rule(scale, float(softcap), causal, window)
    call = Call(q4, k_cache, v_cache, *layer.operands, tokens, rule)
    if chosen == "triton":
        run = operators.dispatch if watched else operators.attend
        result, lse = run(call, sinks, layer.wo, project, num_splits, workspace_limit, to)
    else:
        with torch.no_grad():
            result, lse = reference.decode_attention(call, layer, sinks, project, num_splits, workspace_limit)
            if to is not None:
                to.copy_(result)
    if out is not None:
        result = out
    elif flat:
        result = result.squeeze(1)
    if not return_lse:
        return result
    return result, lse.squeeze(1) if flat else lse


def merge_attention(outs: Sequence[Tensor] | Tensor, lses: Sequence[Tensor] | Tensor) -> tuple[Tensor, Tensor]:
    """Exact merge of attention over disjoint parts of the tokens.

    Args:
        outs: "heads" or "latent" results, [.., Hq, X] each. "hidden" results have lost the heads: refused.
        lses: their log-sum-exps, [.., Hq] each. Sinks may have joined one part only.

    Returns: out in the parts' dtype, lse.
    Raises: ValueError if the parts disagree.
    """
    outs, lses = list(outs), list(lses)
    if not outs or len(outs) != len(lses):
        raise ValueError(f"lses: expected one for each of at least one out, got {len(lses)} for {len(outs)}")
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        if out.shape != outs[0].shape or out.dtype != outs[0].dtype or out.device != outs[0].device:
            expected = f"{list(outs[0].shape)} {outs[0].dtype}"
            raise ValueError(f"outs[{i}]: expected {expected} on {outs[0].device}, got {list(out.shape)} {out.dtype}")
        if lse.shape != out.shape[:-1]:
            raise ValueError(
                f"lses[{i}]: expected {list(out.shape[:-1])}, got {list(lse.shape)}; results of project='hidden' "
                "cannot be merged, merge 'heads' or 'latent' ones"
            )
    merged, lse = reference.merge_attention(outs, lses)
    return merged, lse.to(accumulator(merged.dtype))


def workspace_bytes(
    layer: LayerFactors,
    *,
    query_heads: int,
    num_queries: int = 1,
    page_size: int = 16,
    workspace_limit: int = 256 << 20,
    batch_size: int = 1,
    max_seq_len: int | None = None,
    window_size: int | None = None,
    num_splits: int = 0,
    near: Near | None = None,
    backend: str | None = None,
) -> int:
    """Bytes of temporaries that decode_attention may hold at once, beside q, caches, results and, on a CPU, float32
    copies of 16-bit bases. It is for calls of exactly these sizes: fewer sequences are cut into more splits.

    Args:
        query_heads, num_queries, batch_size: of q. page_size: of the caches; only the reference's depend on it.
        workspace_limit, max_seq_len, window_size, num_splits, near, backend: as given to decode_attention; the
            reference's depend on the first alone, and near. max_seq_len None stands for any length, which then costs up
            to the limit.
    """
    if backend_of(backend, layer) == "reference":
        held = 0 if near is None else near.keys.shape[1]
        return reference.blocks(layer, query_heads, num_queries, page_size, workspace_limit, held).nbytes
    q_shape = batch_size, num_queries, query_heads
    bound = 1 << 24 if max_seq_len is None else max_seq_len
    given = bound, window_size or 0, num_splits, workspace_limit, near
    return operators.workspace_bytes(layer, q_shape, *given)


def _checked(
    layer: LayerFactors, check: Callable[..., str], tensors: Sequence[Tensor | None], *words: Any, watched: bool
) -> str:
    """The backend of a call whose arguments fit, as `check` says; it is asked once for each kind of call."""
    if watched:
        return check(layer, *tensors, *words)
    read = [check, *words]
    try:
        for x in tensors:  # all that checks read of one
            read += (x,) if x is None else (x.shape, x.stride(), x.storage_offset() % ALIGNMENT, x.dtype, x.device)
        chosen = layer.checked.get(kind := tuple(read))
    except (AttributeError, TypeError):
        check(layer, *tensors, *words)  # says what is no tensor, layer or string
        raise
    if chosen is None:
        chosen = check(layer, *tensors, *words)
        if len(layer.checked) >= MOST_CHECKED:
            layer.checked.clear()
        layer.checked[kind] = chosen
    return chosen
