"""Chunks of prompts, attended to densely: tokens of their request's window exactly, the others as their latents say.

On a CPU by the attention of the transformers integration, so that both give the same tokens. On a GPU by
flash-attention twice, over what is far of each query and over what is near, merged by log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lrattn.attention.dense import Pair, Sight, dense_attention, with_sinks
from lrattn.attention.ops import merge_attention, rebuild
from lrattn.factors.layer import LayerFactors
from lrattn.integrations.vllm.batch import Batch, Chunk
from lrattn.integrations.vllm.window import Window, places_of

Caches = tuple[Tensor, Tensor | None]


class Rule(NamedTuple):
    """scale of scores; window: tokens a query sees back, or None; softcap; sinks: [Hq] logits, or None."""

    scale: float
    window: int | None
    softcap: float
    sinks: Tensor | None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    caches: Caches,
    layer: LayerFactors,
    window: Window | None,
    batch: Batch,
    chunks: Sequence[Chunk],
    rule: Rule,
    output: Tensor,
) -> None:
    """Of the batch's tokens q [n, Hq, D], k and v [n, Hkv, D], those of `chunks` -> output [n, Hq, D].

    Their latents are written, but they are not in the window yet.
    """
    if q.device.type != "cpu":
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

        version = get_flash_attn_version(head_size=q.shape[2])
        for some in groups(chunks, batch.most):
            by_flash(
                flash_attn_varlen_func, q, k, v, caches, layer, window, batch, some, rule, output, fa_version=version
            )
        return
    recent, sinks = (0, 0) if window is None else (window.recent, window.sinks)
    for chunk in chunks:
        own = slice(chunk.first, chunk.last)
        sight = Sight(chunk.begin, chunk.end, recent, sinks, rule.window)
        far = None
        if not sight.all_near:
            ours = slice(chunk.index, chunk.index + 1)
            far = by_head(*rebuild(*caches, layer, batch.table[ours], batch.lens[ours], num_tokens=chunk.end))
        near = (None, None) if window is None else near_pairs(window, chunk, k[own], v[own])
        out = dense_attention(
            q[own].transpose(0, 1)[None], sight, far, *near, scale=rule.scale, softcap=rule.softcap, sinks=rule.sinks
        )
        output[own] = out[0].transpose(0, 1)


def by_head(k: Tensor, v: Tensor) -> Pair:
    """[n, Hkv, D] each -> [1, Hkv, n, D]."""
    return k.transpose(0, 1)[None], v.transpose(0, 1)[None]


def near_pairs(window: Window, chunk: Chunk, k: Tensor, v: Tensor) -> tuple[Pair | None, Pair | None]:
    """The recent tokens of a chunk's first query and its own, k and v [n, Hkv, D]; and the sequence's first ones."""
    old = np.arange(max(chunk.begin - window.recent + 1, 0), chunk.begin)
    at = torch.from_numpy(places_of(window.sinks, window.slots, old)).to(k.device)
    held = window.keys[chunk.row], window.values[chunk.row]
    recent = by_head(*(torch.cat((x[at], own)) for x, own in zip(held, (k, v), strict=True))) if window.recent else None
    if not window.sinks:
        return recent, None
    first = [x[: window.sinks].clone() for x in held]
    for x, own in zip(first, (k, v), strict=True):
        x[chunk.begin :] = 0
        new = own[: max(window.sinks - chunk.begin, 0)]
        x[chunk.begin : chunk.begin + len(new)] = new
    return recent, by_head(*first)


def groups(chunks: Sequence[Chunk], most: int) -> Iterator[list[Chunk]]:
    """Some at a time, of no more tokens together than the longest request: these are rebuilt at once."""
    some: list[Chunk] = []
    for chunk in chunks:
        if some and sum(c.end for c in some) + chunk.end > most:
            yield some
            some = []
        some.append(chunk)
    if some:
        yield some


def by_flash(
    flash: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    caches: Caches,
    layer: LayerFactors,
    window: Window | None,
    batch: Batch,
    chunks: Sequence[Chunk],
    rule: Rule,
    output: Tensor,
    **more: Any,
) -> None:
    """`attend` by flash_attn_varlen_func, whose masks end with the last query and key of each sequence.

    Query i sees the far tokens j <= i - recent, which are causal against as many keys less; exact first tokens stand in
    their places. It sees the near ones, i - recent < j <= i, by a sliding window over them.
    """
    device, recent = q.device, 0 if window is None else window.recent
    own = torch.from_numpy(np.concatenate([np.arange(c.first, c.last) for c in chunks])).to(device)
    queries, far = [c.last - c.first for c in chunks], [max(c.end - recent, 0) for c in chunks]
    reach = rule.window or max(c.end for c in chunks)

    def part(keys: Tensor, values: Tensor, lens: list[int], back: int) -> tuple[Tensor, Tensor]:
        out, lse = flash(
            q[own], keys, values, max(queries), ends_of(queries, device), max(lens), ends_of(lens, device),
            softmax_scale=rule.scale, causal=True, window_size=[back, 0], softcap=rule.softcap, return_softmax_lse=True,
            **more,
        )  # fmt: skip
        return out, lse.transpose(0, 1)

    parts = []
    if any(far) and reach > recent:
        ours = torch.tensor([c.index for c in chunks], device=device)
        lens = torch.tensor(far, dtype=torch.int32, device=device)
        keys, values = rebuild(*caches, layer, batch.table[ours], lens, num_tokens=sum(far))
        if window is not None and window.sinks:
            _put_first(window, chunks, far, k, v, keys, values)
        parts.append(part(keys, values, far, reach - recent - 1))
    if window is not None and recent:
        keys, values = _near_rows(window, chunks, k, v)
        near = [c.end - max(c.begin - recent + 1, 0) for c in chunks]
        parts.append(part(keys, values, near, min(recent, reach) - 1))
    outs, lses = zip(*parts, strict=True)
    out, lse = merge_attention(outs, lses) if len(parts) > 1 else parts[0]
    output[own] = with_sinks(out, lse, rule.sinks)


def ends_of(lens: list[int], device: torch.device) -> Tensor:
    return torch.from_numpy(np.concatenate(([0], np.cumsum(lens)))).to(device, torch.int32)


def _put_first(
    window: Window, chunks: Sequence[Chunk], far: list[int], k: Tensor, v: Tensor, keys: Tensor, values: Tensor
) -> None:
    """Exact first tokens in the places of those rebuilt, of which each chunk has `far`."""
    begin = 0
    for c, n in zip(chunks, far, strict=True):
        old, all_ = min(c.begin, window.sinks, n), min(window.sinks, n)
        for x, held, own in ((keys, window.keys, k), (values, window.values, v)):
            x[begin : begin + old] = held[c.row, :old]
            x[begin + old : begin + all_] = own[c.first : c.first + all_ - old]
        begin += n


def _near_rows(window: Window, chunks: Sequence[Chunk], k: Tensor, v: Tensor) -> Pair:
    """Exact tokens from the first one that is recent to each chunk's first query on, chunk by chunk: [n, Hkv, D]."""
    parts: tuple[list[Tensor], list[Tensor]] = ([], [])
    for c in chunks:
        old = places_of(window.sinks, window.slots, np.arange(max(c.begin - window.recent + 1, 0), c.begin))
        at = torch.from_numpy(old).to(k.device)
        for side, held, own in zip(parts, (window.keys, window.values), (k, v), strict=True):
            side += held[c.row, at], own[c.first : c.last]
    return torch.cat(parts[0]), torch.cat(parts[1])


def reserve(layer: LayerFactors, tokens: int) -> None:
    """Holds for a moment what a prefill behind so many tokens holds, where a GPU's memory is watched."""
    if layer.device.type != "cpu":
        torch.empty(2, tokens, layer.num_kv_heads, layer.head_dim, dtype=layer.dtype, device=layer.device)
