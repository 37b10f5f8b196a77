"""The attention function "lrattn", by which a model attends on what a LatentCache holds; and functions of given
factors, by a name or inside a block, for passes without a cache.

Prefill and long passes are dense attention on rebuilt keys and values; a few queries after cached columns run
lrattn.decode_attention on their latents.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lrattn.attention.cache import stored
from lrattn.attention.dense import Pair, Sight, dense_attention, probability_rows
from lrattn.attention.ops import decode_attention, merge_attention, rebuild
from lrattn.factors.record import Factors
from lrattn.factors.shapes import accumulator
from lrattn.integrations.transformers.columns import Columns
from lrattn.integrations.transformers.fit import layer_of, near_of
from lrattn.integrations.transformers.keys import LatentKeys, Written
from lrattn.integrations.transformers.layer import LatentLayer
from lrattn.integrations.transformers.selecting import choose, remaining
from lrattn.models.interface import Attention, attending, cache_argument, is_causal, not_causal, register
from lrattn.models.masks import Said, said
from lrattn.selection import policy_of

DECODE_ROWS = 64  # query rows per kv head up to which decode_attention is tuned


def latent_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The attention function "lrattn": query [B, Hq, S, D] -> [B, S, Hq, D].

    Args:
        key, value: [B, Hkv, S, D], as LatentCache.update returned them.
        attention_mask: of lrattn.models.masks, or a caller's own. Others: as transformers calls it; no dropout.

    Raises: ValueError without a LatentCache, for factors that do not fit, a position bias or output_attentions.
    """
    if not isinstance(key, LatentKeys):
        if is_causal(module, kwargs.get("is_causal")):
            raise _no_cache()
        return not_causal(module, query, key, value, attention_mask, **kwargs)
    device = query.device.type
    narrowed = torch.is_autocast_enabled(device)
    with torch.autocast(device, enabled=False):
        out = _attend(module, query, key, value, attention_mask, narrowed, **kwargs)
    return out.to(query.dtype), None


def _no_cache() -> ValueError:
    """What to write where there is no LatentCache."""
    (name,) = cache_argument(None)
    return ValueError(
        f"{name}: expected a LatentCache where a model attends on latents: pass {name}=LatentCache(factors), a new one "
        "for each text"
    )


def _attend(
    module: nn.Module,
    query: Tensor,
    key: LatentKeys,
    value: Tensor,
    mask: Tensor | None,
    narrowed: bool,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """narrowed: by autocast, whose dtype is not the factors'."""
    if kwargs.get("position_bias") is not None:
        raise ValueError(f"position_bias: expected none in {type(module).__name__}, where it attends on latents")
    if kwargs.get("output_attentions"):
        raise ValueError("output_attentions: expected False where a model attends on latents: no weights are formed")
    if value is not key.plain_values:
        raise ValueError(f"values: expected those that the cache returned in {type(module).__name__}, got others")
    layer, written, kind = key.layer, key.written, key.layer.factors.dtype
    begin = layer.columns.count if written is None else written.begin
    few = begin > 0 and query.shape[2] * (query.shape[1] // key.shape[1]) <= DECODE_ROWS and layer.takes(query.shape[2])
    fixed = few and layer.columns.most is not None and (mask is None or hasattr(mask, "word"))
    end = begin + query.shape[2]
    what = _unread(mask, sliding_window) if fixed else said(mask, sliding_window, len(query), end + layer.columns.gone)
    what, writes = remaining(layer, what), written is None
    if written is None:  # else layers share keys
        keys = (key.plain_keys.to(kind), value.to(kind)) if narrowed else (key.plain_keys, value)
        written = key.written = layer.write(keys, position_ids, what, module, few)
    what = what._replace(pads=layer.columns.base, live=None) if fixed else what
    sight = _sight(what, end, layer, written)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (query, key.plain_keys, value))
    query, selection = query.to(kind), layer.columns.selection
    rule: dict[str, Any] = {"scale": scale, "softcap": softcap or 0.0, "sinks": s_aux}
    if few and sight.plain and not differentiated:
        seen, out = None, _decode(query.transpose(1, 2).contiguous(), layer, sight, scale, softcap or 0.0, s_aux)
    else:
        seen = _seen(layer, written, sight)
        out = dense_attention(query, sight, *seen, **rule).transpose(1, 2).contiguous()
    if writes and layer.held and selection is not None and layer.columns.due:
        probes, rows = policy_of(selection).probes, None
        if probes:
            rows = probability_rows(query, probes, sight, *(seen or _seen(layer, written, sight)), **rule)
        choose(layer, end, rows)
    return out


def _unread(mask: Tensor | None, window: int | None) -> Said:
    """What a mask says, as it says it: nothing is read from the device."""
    return Said(window) if mask is None else Said(mask.word.window, None, mask.word.live)  # type: ignore[attr-defined]


def _sight(what: Said, end: int, layer: LatentLayer, written: Written) -> Sight:
    """A mask's word. First columns that are held dense stay where they were, whatever a later mask hides or shows: what
    was padding when it came stays so."""
    base = layer.columns.base.to(layer.factors.device) if layer.sinks and layer.columns.base is not None else None
    if layer.sinks and base is not what.pads:
        live = base if what.pads is None else what.pads
        base = torch.zeros_like(live) if base is None else base  # type: ignore[arg-type]
        what = what._replace(pads=torch.maximum(live, base))  # type: ignore[arg-type]
    own = written.begin if layer.joined else None  # rows of this pass are not whole yet
    return Sight(written.begin, end, layer.recent, layer.sinks, *what, base, own)


def _decode(q: Tensor, layer: LatentLayer, sight: Sight, scale: float, softcap: float, s_aux: Tensor | None) -> Tensor:
    """A few queries [B, S, Hq, D] -> heads: on the latents of far columns, and on near ones as they are."""
    starts, older = None if sight.pads is None else sight.pads.int(), layer.older
    firsts = starts if sight.base is None else sight.base.int()
    if (denied := layer.columns.denied) is not None:  # what cannot be right must not look right
        q = q.masked_fill(denied.to(q.device)[:, None, None, None], torch.nan)
    heads = decode_attention(
        q,
        *layer.pages,
        layer.factors,
        **layer.places(),
        seq_starts=starts,
        softmax_scale=scale,
        softcap=softcap,
        max_seq_len=layer.columns.most or sight.end,
        window_size=sight.window,
        sinks=None if s_aux is None else s_aux.to(accumulator(q.dtype)),
        near=layer.window_from(firsts) if layer.recent or layer.sinks else None,
        return_lse=bool(older),
        backend=layer.backend,
    )
    if not older:
        return cast(Tensor, heads)
    parts = (part for kept in older for part in kept.attend(q, scale, softcap, layer.backend))
    outs, lses = zip(heads, *parts, strict=True)
    return merge_attention(outs, lses)[0]


def _seen(layer: LatentLayer, written: Written, sight: Sight) -> tuple[Any, Any, Any, Any]:
    """Far, recent, first and older keys and values, as dense attention takes them."""
    near = written.near or layer.near_pairs(written.begin, written.keys)
    older = [kept.dense() for kept in layer.older]
    if len(older) > 1:
        pairs, live = zip(*older, strict=True)
        k, v = (torch.cat(sides, 2) for sides in zip(*pairs, strict=True))
        older = [((k, v), torch.cat(live, 1))]
    return _far(layer, written, sight), *near, older[0] if older else None


def _far(layer: LatentLayer, written: Written, sight: Sight) -> Pair | None:
    """Keys and values of all columns as a cache gives them back, [B, Hkv, T, D] each; None where all are near.

    Of a pass with nothing before it they are made of its own latents, so that gradients pass.
    """
    if sight.all_near:
        return None
    if not written.begin and written.latents is not None:
        k, v = layer.factors.rebuild(*stored(layer.factors, *written.latents), written.positions)
    else:
        places, tokens = layer.places(), layer.columns.batch * sight.end
        found = rebuild(*layer.pages, layer.factors, **places, num_tokens=tokens, backend=layer.backend)
        k, v = (x.unflatten(0, (-1, sight.end)) for x in found)
    return k.transpose(1, 2), v.transpose(1, 2)


def bind(factors: Factors, *, recent: int | None = None, sinks: int | None = None, backend: str | None = None) -> str:
    """The name of an attention function of these factors, for model.set_attn_implementation: scoring needs no cache.

    A pass without a cache sees far columns as their latents say; to go on from one takes a LatentCache, which has a
    window of its own. The function stays registered, and so do the factors.

    Args:
        recent, sinks, backend: as of LatentCache.

    Raises: ValueError for a negative number or an unknown backend.
    """
    near = near_of(factors, recent, sinks, backend)
    name = f"lrattn-{id(factors):x}-{near[0]}-{near[1]}-{backend}"
    register(name, _bound(factors, near, backend))
    return name


@contextmanager
def latent_attention(
    model: nn.Module,
    factors: Factors,
    backend: str | None = None,
    *,
    recent: int | None = None,
    sinks: int | None = None,
) -> Iterator[nn.Module]:
    """Inside, a model attends on latents; on exit, by whatever way, as before.

    Passes without a cache, such as scoring, need nothing else; generate is given a LatentCache or use_cache=False.

    Args:
        model: of transformers. factors: of that model, in its dtype and on its device.
        recent, sinks, backend: of passes without a cache, as LatentCache says. A cache has its own.

    Raises: ValueError for a negative number, an unknown backend, a model whose attention is not transformers'
    AttentionInterface, or one that is inside such a block.
    """
    with attending(model, _bound(factors, near_of(factors, recent, sinks, backend), backend)):
        yield model


def _bound(factors: Factors, near: tuple[int, int], backend: str | None) -> Attention:
    """latent_forward; where there is no LatentCache, on a layer of its own that is thrown away after the pass."""

    donors = factors.donors or tuple(range(len(factors.layers)))
    last = {d: i for i, d in enumerate(donors) if d != i}  # of the layers that read another
    latest: dict[int, LatentKeys] = {}  # of those that are read, in the pass under way

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if not isinstance(key, LatentKeys) and is_causal(module, kwargs.get("is_causal")):
            i = getattr(key, "latent_layer", getattr(module, "layer_idx", None))  # of who made them, where layers share
            if key.shape[2] != query.shape[2] or i is None:
                raise _no_cache()
            if factors.select is not None:
                raise ValueError(f"select: these factors select tokens after a pass ({factors.select}): {_no_cache()}")
            if factors.span > 1:
                raise ValueError(f"span: rows of {factors.span} layers are whole after a pass: {_no_cache()}")
            if not i:
                latest.clear()  # a pass begins
            key.latent_layer = i  # type: ignore[attr-defined]
            columns, donor = Columns((layer_of(factors, i),), near[1]), donors[i]
            if donor == i:
                key = LatentKeys.of(key, value, LatentLayer(factors, i, near, columns, backend, held=False))
                latest.update({i: key} if i in last else {})
            else:
                read = getattr(key, "latent_read", latest.get(donor))
                if read is None:
                    raise ValueError(f"layer {i}: expected layer {donor}, which it reads, to come first in a pass")
                key.latent_read = read  # type: ignore[attr-defined]  # for layers that share these keys by themselves
                if last[donor] == i:
                    latest.pop(donor, None)
                key, value = read, read.plain_values
        return latent_forward(module, query, key, value, attention_mask, **kwargs)

    return forward
