"""latent_attention: a context in which a transformers model attends on latents."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from lrattn.attention.cache import stored
from lrattn.attention.dense import Near, causal_attention, masked_attention
from lrattn.attention.ops import check_backend, decode_attention, merge_attention, rebuild, write_latents
from lrattn.factors.parts import AttentionParts, attention_parts, decoder_of, shadowed
from lrattn.factors.record import Factors
from lrattn.integrations.transformers.cache import LatentCache, Span
from lrattn.integrations.transformers.naming import cache_in, cache_name, with_cache
from lrattn.integrations.transformers.verify import check_fit, verify
from lrattn.integrations.transformers.window import near_of

Pair = tuple[Tensor, Tensor]  # keys and values, or out and lse

# Query rows per kv head up to which decode_attention is tuned; beyond, dense attention on rebuilt tokens.
DECODE_ROWS = 64


@contextmanager
def latent_attention(
    model: nn.Module,
    factors: Factors,
    backend: str | None = None,
    *,
    recent: int | None = None,
    sinks: int | None = None,
) -> Iterator[nn.Module]:
    """Inside, model(...) and model.generate(...) attend on latents; on exit, by whatever way, the model is as before.

    Prefill and scoring run dense attention on keys and values rebuilt from the latents; decode runs
    lrattn.decode_attention on the cache. A cache is given as `cache` or `past_key_values`, whatever the release calls
    it. Where transformers would make a cache of its own a LatentCache is made; another cache raises, and so does a
    pass that fills another one. Padding must be on the left where a cache is used, and is not stored.

    Args:
        model: a transformers causal language model. factors: of that model, in its dtype and on its device.
        backend: passed to lrattn.decode_attention.
        recent, sinks: tokens seen by their exact keys and values, as LatentCache says: of the caches made here, and
            of passes without a cache. A cache that is given has its own. None: as the factors say (Factors.near).

    Raises: ValueError if the factors do not fit, the model's attention is not one that can be rebuilt, or for a
    negative number.
    """
    check_backend(backend)
    near = near_of(factors, recent, sinks)
    parts = attention_parts(model)
    decoder = decoder_of(model)
    if any(isinstance(p.module.__dict__.get("forward"), _Forward) for p in parts):
        raise ValueError("model: already inside latent_attention; leave that block first")
    verify(model, parts)
    check_fit(model, factors)
    session = _Session(model, decoder, parts, factors, near)
    with ExitStack() as undo:
        for i, part in enumerate(parts):
            undo.enter_context(shadowed(part.module, "forward", _Forward(session, part, i, backend)))
        if (original := getattr(model, "_prepare_cache_for_generation", None)) is not None:
            owner = getattr(original, "__self__", model)  # the model itself, where another is wrapped around it
            undo.enter_context(shadowed(owner, "_prepare_cache_for_generation", session.prepare_cache(original)))
            undo.enter_context(shadowed(owner, "generate", session.generate(owner.generate)))  # type: ignore[arg-type]
        if model is not decoder:
            undo.callback(model.register_forward_pre_hook(session.enter, with_kwargs=True).remove)
            undo.callback(model.register_forward_hook(session.leave, always_call=True).remove)
        undo.callback(decoder.register_forward_pre_hook(session.before, with_kwargs=True).remove)
        undo.callback(decoder.register_forward_hook(session.after).remove)
        yield model


class _Session:
    """What one forward pass of the decoder tells its attention layers."""

    def __init__(
        self,
        model: nn.Module,
        decoder: nn.Module,
        parts: Sequence[AttentionParts],
        factors: Factors,
        near: tuple[int, int],
    ) -> None:
        self.model, self.decoder, self.factors = model, decoder, factors
        self.default = self.near = near  # recent and sinks of the context, of this pass
        self.config: Any = decoder.config
        self.names = list(inspect.signature(decoder.forward).parameters)
        self.cache_name = cache_name(decoder.forward)
        self.given: Any = None  # the cache that the model around the decoder was called with
        self.promised: LatentCache | None = None  # the cache of a generation whose first pass is still to come
        ropes = [part.rope for part in parts] + [layer.rope for layer in factors.layers if layer.rope is not None]
        self.limit = min(rope.max_position for rope in ropes)
        self.cache: LatentCache | None = None
        self.span = Span(None, [], [], [])
        self.runs: list[tuple[int, slice]] = []  # the live columns of each sequence
        self.positions = self.seq_lens = torch.empty(0)
        self.extends = False  # some sequence has tokens from before this pass

    def new_cache(self) -> LatentCache:
        recent, sinks = self.default
        return LatentCache(self.model, self.factors, recent=recent, sinks=sinks)

    def generate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """`generate`, which takes its cache by either name."""

        @functools.wraps(original)
        def generate(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **with_cache(kwargs, self.cache_name, cache_in(kwargs)))
            finally:
                self.promised = None

        return generate

    def prepare_cache(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The step of `generate` that makes a cache, whichever kind was configured: a LatentCache here."""

        @functools.wraps(original)
        def prepare(generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            done = None
            if cache_in(model_kwargs) is None and generation_config.use_cache is not False:
                model_kwargs[self.cache_name] = self.new_cache()
            else:
                done = original(generation_config, model_kwargs, *args, **kwargs)
            self.promised = cache_in(model_kwargs)
            return done

        return prepare

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The model is called: its cache, by whichever name, is what the decoder has to be called with."""
        self.given = cache_in(kwargs)
        return args, with_cache(kwargs, self.cache_name, self.given)

    def leave(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.given = None

    def before(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[()], dict[str, Any]]:
        """Finds the live tokens and their slots; padding is handled here, so the decoder is given no mask."""
        kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        cache, name = cache_in(kwargs), self.cache_name
        expected = next((c for c in (self.promised, self.given) if c is not None), cache)
        self.promised = None
        if cache is not expected:
            raise RuntimeError(
                f"{name}: expected the {type(expected).__name__} of this call in its decoder, got "
                f"{'none' if cache is None else 'another'}: this release of transformers hands caches on in a way that "
                "lrattn does not know"
            )
        use_cache = kwargs.get("use_cache")
        if cache is None and (self.config.use_cache if use_cache is None else use_cache):
            cache = self.new_cache()
        kwargs = with_cache(kwargs, name, cache)
        if cache is not None and not isinstance(cache, LatentCache):
            raise ValueError(f"{name}: expected a LatentCache inside latent_attention, got {type(cache).__name__}")
        if cache is not None and cache.factors is not self.factors:
            raise ValueError(f"{name}: expected a LatentCache of the factors given to latent_attention, got another")
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions: expected False inside latent_attention, where no weights are formed")
        inputs = kwargs.get("input_ids")
        inputs = kwargs.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:
            raise ValueError("input_ids: expected input_ids or inputs_embeds, got neither")
        batch, columns = inputs.shape[:2]
        if cache is not None and cache.lengths and len(cache.lengths) != batch:
            raise ValueError(f"{name}: expected a batch of {len(cache.lengths)}, got {batch}")
        past = cache.lengths if cache is not None and cache.lengths else [0] * batch
        seen = 0 if cache is None else cache.seen
        span = _live_span(kwargs.get("attention_mask"), past, seen, batch, columns, cached=cache is not None)
        expected = None if cache is None else cache.next_positions
        span = span._replace(next_positions=_next_positions(kwargs.get("position_ids"), span, expected))
        if max(span.lengths, default=0) > self.limit:
            raise ValueError(f"input_ids: expected at most max_position={self.limit} tokens, got {max(span.lengths)}")
        kwargs["attention_mask"] = None
        self.cache, self.span = cache, span if cache is None else cache.reserve(span)
        self.near = self.default if cache is None else (cache.recent, cache.sinks)
        starts = torch.tensor([n - c - b for n, c, b in zip(span.lengths, span.counts, span.begins, strict=True)])
        self.positions = (starts[:, None] + torch.arange(columns)).clamp_min(0).to(inputs.device)
        self.seq_lens = torch.tensor(span.lengths, dtype=torch.int32, device=inputs.device)
        self.runs = [(b, slice(i, i + n)) for b, (i, n) in enumerate(zip(span.begins, span.counts, strict=True))]
        self.extends = span.lengths != span.counts
        return (), kwargs

    def after(self, decoder: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """The pass is whole: its cache holds its tokens from now on, and is the one that is given back."""
        back = output.get(self.cache_name) if isinstance(output, Mapping) else None
        if back is not None and back is not self.cache:
            raise RuntimeError(
                f"{self.cache_name}: expected the decoder to fill the cache it was given, got another one back"
            )
        if self.cache is not None:
            self.cache.commit(self.span, self.positions.shape[1])
        self.cache = None


def _live_span(mask: Any, past: list[int], seen: int, batch: int, columns: int, *, cached: bool) -> Span:
    """The live run of each sequence among the new columns, from a 2-D attention mask."""
    if mask is None:
        return Span(None, [0] * batch, [columns] * batch, [n + columns for n in past])
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape != (batch, seen + columns):
        got = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: expected shape [{batch}, {seen + columns}], tokens and cache, got {got}")
    whole = mask.bool().cpu()
    if whole[:, :seen].sum(1).tolist() != past:
        raise ValueError(f"attention_mask: expected {past} live tokens before this call, as cached, got another mask")
    live = whole[:, seen:]
    counts = live.sum(1).tolist()
    begins = [int(row.int().argmax()) if n else columns for row, n in zip(live, counts, strict=True)]
    runs = torch.arange(columns)
    expected = torch.stack([(runs >= b) & (runs < b + n) for b, n in zip(begins, counts, strict=True)])
    if not torch.equal(live, expected):
        raise ValueError("attention_mask: expected one run of live tokens a sequence, got holes")
    if cached and any(n and b + n != columns for b, n in zip(begins, counts, strict=True)):
        raise ValueError("attention_mask: expected padding on the left where a cache is used, got padding on the right")
    if cached and any(p and n != columns for p, n in zip(past, counts, strict=True)):
        raise ValueError("attention_mask: expected no padding after a sequence has begun, got some")
    lengths = [p + n for p, n in zip(past, counts, strict=True)]
    return Span(None if bool(live.all()) else live.to(mask.device), begins, counts, lengths)


def _next_positions(position_ids: Any, span: Span, expected: list[int] | None) -> list[int] | None:
    """Positions only matter by their differences: those of a sequence's tokens must go up by one, across calls too."""
    if position_ids is None:
        return None if expected is None else [e + n for e, n in zip(expected, span.counts, strict=True)]
    rows = position_ids.expand(len(span.counts), -1).tolist()
    after = []
    for i, (row, begin, count) in enumerate(zip(rows, span.begins, span.counts, strict=True)):
        live = row[begin : begin + count]
        first = live[0] if live else 0
        if expected is not None and span.lengths[i] > count:
            first = expected[i]
        if live != list(range(first, first + count)):
            held, got = span.lengths[i] - count, f"{live[:8]}.."
            if expected is None or not held:
                raise ValueError(f"position_ids: expected {count} consecutive positions from {first} on, got {got}")
            raise ValueError(
                f"cache: it holds {held} tokens; expected positions to go on from {first}, got {got}: give the whole "
                f"text, those {held} tokens first, or a new cache"
            )
        after.append(first + count)
    return after


class _Forward:
    """The forward of one attention module, on latents."""

    def __init__(self, session: _Session, part: AttentionParts, index: int, backend: str | None) -> None:
        self.session, self.part, self.index, self.backend = session, part, index, backend

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        session, part, cache = self.session, self.part, self.session.cache
        layer = session.factors.layers[self.index]
        q = part.rotated("q", hidden_states, session.positions)
        own, keys = None, None
        if layer.rotated or any(session.near):
            keys = part.rotated("k", hidden_states, session.positions)
        if keys is not None and any(session.near):
            own = keys, part.heads("v", hidden_states)
        zk, zv = layer.project(hidden_states, keys if layer.rotated else None)
        if cache is None or not session.extends:
            k, v = layer.rebuild(*stored(layer, zk, zv), session.positions)
            heads = self._dense(q, [k[b, run] for b, run in session.runs], [v[b, run] for b, run in session.runs], own)
        if cache is not None:
            self._write(zk, zv, *cache.caches[self.index])
            if own is not None:
                cache.window.stage(self.index, *own)
            if session.extends:
                few = q.shape[1] * (q.shape[2] // layer.num_kv_heads) <= DECODE_ROWS
                heads = (self._decode if few else self._extend)(q, cache, own)
        return part.linear("o_proj")(heads.flatten(2)), None

    def _write(self, zk: Tensor, zv: Tensor | None, k_cache: Tensor, v_cache: Tensor | None) -> None:
        """The live tokens' latents into their slots."""
        span, layer = self.session.span, self.session.factors.layers[self.index]
        live = slice(None) if span.live is None else span.live.flatten()
        values = None if zv is None else zv.flatten(0, 1)[live]
        write_latents(layer, zk.flatten(0, 1)[live], values, k_cache, v_cache, span.slots, backend=self.backend)

    @torch.no_grad()
    def _decode(self, q: Tensor, cache: LatentCache, own: Pair | None) -> Tensor:
        """A few queries a sequence: attention on the latents of far tokens, and on near ones as they are."""
        session, (recent, sinks), window = self.session, self.session.near, self.part.window
        # Bottom-right alignment with lengths cut by `recent` lets query i see the tokens up to i - recent.
        longest = max(session.span.lengths) - recent
        parts = []
        if longest > sinks and (window is None or window > recent):
            far = decode_attention(
                q,
                *cache.caches[self.index],
                session.factors.layers[self.index],
                block_table=cache.block_table,
                seq_lens=(session.seq_lens - recent).clamp_min(0) if recent else session.seq_lens,
                seq_starts=torch.full_like(session.seq_lens, sinks) if sinks else None,
                softmax_scale=self.part.scale,
                max_seq_len=longest,
                window_size=None if window is None else window - recent,
                return_lse=True,
                backend=self.backend,
            )
            parts.append(cast(Pair, far))
        if own is not None:
            at = session.seq_lens[:, None] - q.shape[1] + torch.arange(q.shape[1], device=q.device)  # [B, S]
            held = cache.window
            for k, v, tokens in ((held.k[self.index], held.v[self.index], held.at), (*own, at)):
                j, i = tokens[:, None], at[..., None]
                seen = (j >= 0) & (j <= i) & ((j > i - recent) | (j < sinks))  # [B, S, n]
                if window is not None:
                    seen = seen & (j > i - window)
                parts.append(masked_attention(q, k, v, seen, self.part.scale))
        return merge_attention(*zip(*parts, strict=True))[0] if len(parts) > 1 else parts[0][0]

    def _extend(self, q: Tensor, cache: LatentCache, own: Pair | None) -> Tensor:
        """A long run after cached tokens: dense attention on everything rebuilt."""
        session, layer = self.session, self.session.factors.layers[self.index]
        k, v = rebuild(*cache.caches[self.index], layer, cache.block_table, session.seq_lens, backend=self.backend)
        return self._dense(q, k.split(session.span.lengths), v.split(session.span.lengths), own, cache)

    def _dense(
        self, q: Tensor, k: Sequence[Tensor], v: Sequence[Tensor], own: Pair | None, cache: LatentCache | None = None
    ) -> Tensor:
        """q [B, S, Hq, D] against each sequence's own k, v [T, Hkv, D]; zeros on padding."""
        heads = torch.zeros_like(q)
        for b, run in self.session.runs:
            near = None if own is None else self._near(b, run, own, cache)
            heads[b, run] = causal_attention(q[b, run], k[b], v[b], self.part.scale, self.part.window, near)
        return heads

    def _near(self, b: int, run: slice, own: Pair, cache: LatentCache | None) -> Near:
        """What the dense window holds of sequence b, if there is a cache to go on from, and its new tokens."""
        (k, v), length = (x[b, run] for x in own), self.session.span.lengths[b]
        at = torch.arange(length - len(k), length, device=k.device)
        if cache is not None:
            held = cache.window.tokens(self.index, b)
            k, v, at = (torch.cat(pair) for pair in zip(held, (k, v, at), strict=True))
        return Near(k, v, at, *self.session.near)
