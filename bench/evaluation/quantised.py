"""A model that attends on quantised keys and values, and the bytes of its cache.

`quantised` computes what a cache would give back (quantisers.py), whole sequences at once. `quantised_cache` runs
the quantised cache of transformers itself, on optimum-quanto, in chunks: every chunk attends to what the cache has made
of those before it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import QuantizedCache

from bench.evaluation.quantisers import QUANTISERS, Kivi
from lrattn.attention.dense import masked_attention
from lrattn.attention.ops import merge_attention
from lrattn.compression.substitute import Window, substituted
from lrattn.models.interface import Attention, attending, cache_argument, decoder_of
from lrattn.models.layers import AttentionLayer, attention_layers
from lrattn.models.masks import said

PEER = "quanto"
CHUNK = 32  # tokens; the cache of transformers quantises no more often than every 128
BLOCK = 256  # queries


def attending_quantised(
    model: nn.Module, name: str, bits: int, recent: int, sinks: int
) -> AbstractContextManager[object]:
    """Inside, the model attends on keys and values quantised to `bits`, but for the first `sinks` and the last `recent`
    tokens of each query. name: of QUANTISERS, or PEER, whose cache holds up to `recent` tokens as they are.

    Raises: ImportError without optimum-quanto.
    """
    if name != PEER:
        return quantised(model, name, bits, recent, sinks)
    if sinks:
        raise ValueError(f"sinks: expected 0 with {PEER!r}, got {sinks}")
    return quantised_cache(model, bits, recent)


@contextmanager
def quantised(model: nn.Module, name: str, bits: int, recent: int = 0, sinks: int = 0) -> Iterator[None]:
    """Sequences are whole and without padding. Groups of tokens begin behind the sinks.

    A group of tokens that is not complete when a query comes is quantised from those that are there, the query's own
    last, so that no later token changes what it sees. Few tokens in a group come back better than many: this favours
    the quantiser, as does not counting what a cache would hold to do so. In a dense window of a group's length or more
    such tokens are dense anyway.
    """
    quantiser = QUANTISERS[name]

    def replace(_: int, __: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        def back(x: Tensor, side: Callable[[Tensor, int], Tensor]) -> Tensor:
            tokens = x.transpose(1, 2)  # [B, T, Hkv, D]
            return torch.stack([torch.cat((s[:sinks], side(s[sinks:], bits))) for s in tokens]).transpose(1, 2)

        return back(k, quantiser.keys), back(v, quantiser.values)

    if quantiser.tokens <= recent + 1:
        with substituted(model, attention_layers(model), replace, Window(recent, sinks)):
            yield
    elif isinstance(quantiser, Kivi) and not recent and not sinks:
        with attending(model, growing(quantiser, bits)):
            yield
    else:
        raise ValueError(f"recent: expected 0 and no sinks, or {quantiser.tokens - 1} or more, got {recent}, {sinks}")


def growing(quantiser: Kivi, bits: int) -> Attention:
    """An attention function where every query sees the group of its own token as it is then."""

    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q [T, Hq, D], k and v [T, Hkv, D] -> [T, Hq, D]."""
        whole, own_keys = quantiser.keys(k, bits), quantiser.growing_keys(k, bits)
        values = quantiser.values(v, bits)
        own_values = quantiser.grouped(values)  # [groups, N, Hkv, D]
        t = torch.arange(len(k), device=k.device)
        place = torch.arange(quantiser.tokens, device=k.device)
        outs = []
        for at in t.split(BLOCK):
            group, end = at // quantiser.tokens, int(at[-1])
            before = t[:end] < (group * quantiser.tokens)[:, None]  # [queries, end]
            far, far_lse = masked_attention(q[None, at], whole[None, :end], values[None, :end], before[None], scale)
            seen = place <= (at % quantiser.tokens)[:, None]
            near = masked_attention(q[at, None], own_keys[at], own_values[group], seen[:, None], scale)
            outs.append(merge_attention((far[0], near[0][:, 0]), (far_lse[0], near[1][:, 0]))[0])
        return torch.cat(outs)

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        what = said(attention_mask, sliding_window, len(query), key.shape[2])
        if any(x is not None for x in what) or query.shape[2] != key.shape[2]:
            raise ValueError(f"model: expected attention of whole texts to all tokens before, got {what}")
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        rows = zip(*(x.transpose(1, 2) for x in (query, key, value)), strict=True)
        return torch.stack([attend(*row, scale) for row in rows]), None

    return attention


@contextmanager
def quantised_cache(model: nn.Module, bits: int, residual: int) -> Iterator[None]:
    """Inside, model(input_ids=, logits_to_keep=) feeds a new cache of transformers' in chunks.

    A chunk's tokens attend to each other as they are, as tokens of the cache's residual do.
    Raises: ImportError without optimum-quanto.
    """
    new_cache(model, bits, residual)  # refused before any work
    forward = model.forward

    def chunked(input_ids: Tensor, use_cache: bool = False, logits_to_keep: int = 0) -> SimpleNamespace:
        held, logits = new_cache(model, bits, residual), list[Tensor]()
        skipped = input_ids.shape[1] - logits_to_keep if logits_to_keep else 0
        for at, ids in enumerate(input_ids.split(CHUNK, 1)):
            found = forward(input_ids=ids, **cache_argument(held), use_cache=True).logits
            logits.append(found[:, max(skipped - at * CHUNK, 0) :])
        return SimpleNamespace(logits=torch.cat(logits, 1))

    model.forward = chunked
    try:
        yield
    finally:
        del model.forward


def new_cache(model: nn.Module, bits: int, residual: int) -> QuantizedCache:
    return QuantizedCache(PEER, decoder_of(model).config, nbits=bits, residual_length=residual)


def bytes_held(
    model: nn.Module, name: str, bits: int, recent: int, sinks: int, contexts: Sequence[int]
) -> tuple[float, dict[int, float]]:
    """Bytes a token, of all layers: of a cache without end, and at each context. A token in the dense window of 16-bit
    numbers is held there only. For PEER, of its own tensors for 16-bit keys and values."""
    layers = attention_layers(model)
    numbers = sum(2 * layer.dense for layer in layers)
    if name == PEER:
        held = {n: len(layers) * layer_bytes(model, layers[0], bits, recent, n) for n in contexts}
        (first, fewer), *_, (last, more) = sorted(held.items())  # equally many tokens in the residual
        return (more - fewer) / (last - first), {n: total / n for n, total in held.items()}
    each = numbers * QUANTISERS[name].bits_per_number(bits, layers[0].head_dim) / 8
    return each, {n: each + (recent + sinks) * (2 * numbers - each) / n for n in contexts}


def layer_bytes(model: nn.Module, own: AttentionLayer, bits: int, residual: int, context: int) -> int:
    """Bytes of what one layer of the cache holds after so many tokens, in chunks."""
    held = new_cache(model, bits, residual)
    tokens = torch.randn(context, 1, own.num_kv_heads, 1, own.head_dim, dtype=torch.float16)
    for chunk in tokens.split(CHUNK):
        k = torch.cat(list(chunk), 2)  # [1, Hkv, chunk, D]
        held.update(k, k, 0)
    layer = held.layers[0]
    return sum(map(nbytes, (layer._quantized_keys, layer._quantized_values, layer.keys, layer.values)))


def nbytes(x: Tensor) -> int:
    """Of the plain tensors that a tensor is made of."""
    if is_traceable_wrapper_subclass(x):
        return sum(nbytes(getattr(x, name)) for name in x.__tensor_flatten__()[0])
    return x.nbytes
