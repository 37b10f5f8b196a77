"""Decode in three steps, scores, values, combine, for as many sequences and tokens at a time as the workspace holds."""

import torch
from torch import Tensor

from lrattn.kernels import launch
from lrattn.kernels.absorb import absorb_queries, absorbed_scores
from lrattn.kernels.arguments import Keys, Rule, Tokens, Values
from lrattn.kernels.combine import combine
from lrattn.kernels.plan import Cut, cut
from lrattn.kernels.project import project
from lrattn.kernels.scores import latent_scores, relative, turn_queries
from lrattn.kernels.values import latent_values


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor | None, keys: Keys, values: Values, tokens: Tokens, rule: Rule,
    sinks: Tensor | None, wo: Tensor | None, form: str, num_splits: int, workspace_limit: int, out: Tensor,
    lse: Tensor,
) -> None:  # fmt: skip
    """q [B, S, Hq, D] -> out [B, S, Hq, Rv], [B, S, Hq, D] or [B, S, E] by `form`, lse [B, S, Hq]."""
    batch, num_queries, query_heads, _ = q.shape
    if not q.numel():
        return
    size = cut(
        batch, num_queries, query_heads, q.dtype, q.device, keys, values, tokens.bound, rule, num_splits,
        workspace_limit,
    )  # fmt: skip
    rows, slots = query_heads * num_queries, size.splits + 2
    pairs = launch.block_d(q.shape[3]) // 2
    x = q.new_empty(size.batch, 0 if keys.turns is None else size.tiles, rows, 2, pairs)
    s = q.new_empty(size.batch, rows, size.tiles * launch.BLOCK_T, dtype=torch.float32)
    y = q.new_empty(size.batch, slots, rows, values.rank, dtype=torch.float32)
    part = q.new_empty(size.batch, slots, rows, dtype=torch.float32)
    heads = torch.empty_like(q[: size.batch], memory_format=torch.contiguous_format) if form == "hidden" else out
    cv = k_cache if v_cache is None else v_cache
    for b in range(0, batch, size.batch):
        some = slice(b, min(b + size.batch, batch))
        n = some.stop - b
        merged = _attend(q[some], k_cache, cv, keys, values, tokens.of(some), rule, size, x[:n], s[:n], y[:n], part[:n])
        if wo is None or form != "hidden":
            combine(*merged, values, out[some], lse[some], sinks, up=form == "heads")
        else:
            combine(*merged, values, heads[:n], lse[some], sinks, up=True)
            project(heads[:n], wo, out[some])


def _attend(
    q: Tensor, ck: Tensor, cv: Tensor, keys: Keys, values: Values, tokens: Tokens, rule: Rule, size: Cut,
    x: Tensor, s: Tensor, y: Tensor, part: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Partial results [B, ., Hq S, Rv] and their lse [B, ., Hq S], to be merged.

    Splits are written to slots 1 .. n of y's n + 2. Where tokens go in several chunks, what is merged so far moves
    between the slots at the two ends, so that what is to be merged is always one run of slots.
    """
    _, num_queries, query_heads, _ = q.shape
    splits, turned = size.splits, relative(keys, tokens, q.dtype)
    new = slice(1, splits + 1)
    live = new if size.total else slice(0, 0)
    if keys.turns is None:
        a, constant = absorb_queries(q, keys)
    for first in range(0, size.total, size.tiles):
        span = (first, size.tiles)
        if keys.turns is None:
            absorbed_scores(a, constant, num_queries, ck, keys, tokens, rule, s, *span, size.parts)
        else:
            if turned or not first:
                turn_queries(q, keys, tokens, rule, x, first, turned)
            latent_scores(x, num_queries, ck, keys, tokens, rule, s, *span, size.parts, turned)
        latent_values(s, num_queries, cv, values, tokens, rule, y[:, new], part[:, new], *span)
        if first + size.tiles < size.total:
            after = splits + 1 if live.start == 0 or first == 0 else 0
            heads = (query_heads, num_queries)
            so_far, so_far_lse = (x[:, after].unflatten(1, heads).transpose(1, 2) for x in (y, part))
            combine(y[:, live], part[:, live], values, so_far, so_far_lse)
            live = slice(0, splits + 1) if after == 0 else slice(1, splits + 2)
    return y[:, live], part[:, live]
