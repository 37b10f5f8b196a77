"""Chunks of prompts, attended to densely: tokens of their request's window exactly, the others as their latents say.

On a CPU by the attention of the transformers integration, so that both give the same tokens. On a GPU by
flash-attention twice, over what is far of each query and over what is near, merged by log-sum-exp.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrattn.attention.dense import Pair, Sight, dense_attention, with_sinks
from lrattn.attention.ops import merge_attention, rebuild
from lrattn.factors.layer import LayerFactors
from lrattn.integrations.vllm.batch import Batch, Chunk
from lrattn.integrations.vllm.window import Window


class Pass(NamedTuple):
    """What a layer is given of a batch: q [n, Hq, D], k and v [n, Hkv, D], its caches and window, and its rule.

    reach: tokens a query sees back, or None. sinks: [Hq] logits, or None.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    caches: tuple[Tensor, Tensor | None]
    layer: LayerFactors
    window: Window | None
    batch: Batch
    scale: float
    reach: int | None
    softcap: float
    sinks: Tensor | None


def attend(x: Pass, chunks: Sequence[Chunk], output: Tensor) -> None:
    """The tokens of `chunks` -> output [n, Hq, D]. Their latents are written, but they are not in the window yet."""
    if x.q.device.type != "cpu":
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func, get_flash_attn_version

        version = get_flash_attn_version(head_size=x.q.shape[2])
        for some in groups(chunks, x.batch.most):
            by_flash(flash_attn_varlen_func, x, some, output, fa_version=version)
        return
    near = (0, 0) if x.window is None else (x.window.recent, x.window.sinks)
    for chunk in chunks:
        own, request = slice(chunk.first, chunk.last), slice(chunk.request, chunk.request + 1)
        sight = Sight(chunk.begin, chunk.end, *near, x.reach)
        table, lens = x.batch.table[request], x.batch.lens[request]
        far = None if sight.all_near else rebuild(*x.caches, x.layer, table, lens, num_tokens=chunk.end)
        parts = (None if pair is None else by_head(*pair) for pair in (far, *near_of(x, chunk)))
        q, rule = x.q[own].transpose(0, 1)[None], {"softcap": x.softcap, "sinks": x.sinks}
        output[own] = dense_attention(q, sight, *parts, scale=x.scale, **rule)[0].transpose(0, 1)  # type: ignore[arg-type]


def by_head(k: Tensor, v: Tensor) -> Pair:
    """[n, Hkv, D] each -> [1, Hkv, n, D]."""
    return k.transpose(0, 1)[None], v.transpose(0, 1)[None]


def near_of(x: Pass, c: Chunk) -> tuple[Pair | None, Pair | None]:
    """Keys and values [n, Hkv, D] of the tokens that a chunk's first query sees as recent and of its own; and of the
    first ones of its sequence."""
    if x.window is None:
        return None, None
    window, own = x.window, (x.k[c.first : c.last], x.v[c.first : c.last])
    row, new = window.both[:, c.row], slice(c.begin, min(window.sinks, c.end))
    recent = first = None
    if window.recent:
        old = torch.arange(max(c.begin - window.recent + 1, 0), c.begin, device=row.device)
        recent = tuple(torch.cat(pair) for pair in zip(row[:, window.place(old)], own, strict=True))
    if window.sinks:
        first = row[:, : window.sinks].clone()
        first[0, new], first[1, new] = (side[: max(new.stop - c.begin, 0)] for side in own)
        first[:, c.end :] = 0  # which nobody sees
    return recent, None if first is None else (first[0], first[1])  # type: ignore[return-value]


def groups(chunks: Sequence[Chunk], most: int) -> Iterator[list[Chunk]]:
    """Some at a time, of no more tokens together than the longest request: these are rebuilt at once."""
    some: list[Chunk] = []
    for chunk in chunks:
        if some and sum(c.end for c in some) + chunk.end > most:
            yield some
            some = []
        some.append(chunk)
    yield some


def by_flash(flash: Callable[..., Any], x: Pass, chunks: Sequence[Chunk], output: Tensor, **more: Any) -> None:
    """`attend` by flash_attn_varlen_func, whose masks end with the last query and key of each sequence.

    Query i sees the far tokens j <= i - recent, which are causal against as many keys less; exact first tokens stand in
    their places. It sees the near ones, i - recent < j <= i, by a sliding window over them.
    """
    device, recent = x.q.device, 0 if x.window is None else x.window.recent
    own = torch.cat([torch.arange(c.first, c.last, device=device) for c in chunks])
    queries, far = [c.last - c.first for c in chunks], [max(c.end - recent, 0) for c in chunks]
    near = [near_of(x, c) for c in chunks]
    reach = x.reach or max(c.end for c in chunks)

    def part(keys: Tensor, values: Tensor, lens: list[int], back: int) -> tuple[Tensor, Tensor]:
        starts = (torch.tensor([0, *accumulate(n)], dtype=torch.int32, device=device) for n in (queries, lens))
        (q_starts, k_starts), longest = starts, (max(queries), max(lens))
        out, lse = flash(
            x.q[own], keys, values, longest[0], q_starts, longest[1], k_starts, softmax_scale=x.scale, causal=True,
            window_size=[back, 0], softcap=x.softcap, return_softmax_lse=True, **more,
        )  # fmt: skip
        return out, lse.transpose(0, 1)

    parts = []
    if any(far) and reach > recent:
        lens = torch.tensor(far, dtype=torch.int32, device=device)
        table = x.batch.table[torch.tensor([c.request for c in chunks], device=device)]
        rebuilt = rebuild(*x.caches, x.layer, table, lens, num_tokens=sum(far))
        for begin, n, (_, first) in zip(accumulate(far, initial=0), far, near, strict=False):
            for side, exact in zip(rebuilt, first or (), strict=False):
                side[begin : begin + min(n, len(exact))] = exact[:n]
        parts.append(part(*rebuilt, far, reach - recent - 1))
    if recent:
        keys, values = (torch.cat(side) for side in zip(*(pair for pair, _ in near), strict=True))
        parts.append(part(keys, values, [c.end - max(c.begin - recent + 1, 0) for c in chunks], min(recent, reach) - 1))
    outs, lses = zip(*parts, strict=True)
    out, lse = merge_attention(outs, lses) if len(parts) > 1 else parts[0]
    output[own] = with_sinks(out, lse, x.sinks)


def reserve(layer: LayerFactors, tokens: int) -> None:
    """Holds for a moment what a prefill behind so many tokens holds, where a GPU's memory is watched."""
    if layer.device.type != "cpu":
        torch.empty(2, tokens, layer.num_kv_heads, layer.head_dim, dtype=layer.dtype, device=layer.device)
