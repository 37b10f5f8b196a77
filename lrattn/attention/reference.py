"""PyTorch truth of every op, in data-flow order; also the path of CPU tensors.

Sequences are taken one by one and their tokens in blocks, so that a row's result depends on that row alone and
memory beyond the cache is O(block). Sums are float32 (float64 for float64); arguments are checked by the caller.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from lrattn.attention import cache
from lrattn.attention.cache import WHOLE_PAGES, read_latents, read_rows
from lrattn.attention.near import attend_near, far_of
from lrattn.factors.layer import LayerFactors
from lrattn.factors.rope import rows_at
from lrattn.factors.shapes import accumulator, product_dtype
from lrattn.kernels.arguments import Call

TILE_BYTES = 1 << 21  # of rebuilt keys per block: fastest of 2^19 .. 2^22 on a two-core EPYC
MOST_READ = 1 << 13  # tokens per block where no keys are rebuilt


def write_latents(
    layer: LayerFactors, zk: Tensor, zv: Tensor | None, k_cache: Tensor, v_cache: Tensor | None, slots: Tensor
) -> None:
    """zk [n, row_width], zv [n, sum Rv] -> rows `slots` [n] of the caches."""
    cache.write_latents(layer.row_side, zk, k_cache, slots)
    if zv is not None and v_cache is not None:
        cache.write_latents(layer.values, zv, v_cache, slots)


def rebuild(
    k_cache: Tensor,
    v_cache: Tensor | None,
    layer: LayerFactors,
    block_table: Tensor,
    seq_lens: Tensor,
    positions: Tensor | None,
    offsets: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Dense keys and values of all sequences, one after the other: [sum T, Hkv, D] each."""
    limit = block_table.shape[1] * k_cache.shape[1]
    parts = []
    for b, (pages, length) in enumerate(zip(block_table, seq_lens.clamp(0, limit).tolist(), strict=True)):
        offset = 0 if offsets is None else int(offsets[b])
        _check_positions(layer, length, offset, positions)
        _check_pages(k_cache, pages, 0, length)
        zk, zv = _read(layer, k_cache, v_cache, pages, 0, length)
        at = torch.arange(length, device=k_cache.device) - offset
        if positions is not None:
            at = _read_positions(positions, pages, 0, length)
        parts.append(layer.rebuild(zk.to(layer.dtype), None if zv is None else zv.to(layer.dtype), at))
    empty = layer.keys.up.new_empty(0, layer.num_kv_heads, layer.head_dim)
    return torch.cat([empty, *(k for k, _ in parts)]), torch.cat([empty, *(v for _, v in parts)])


def _read(
    layer: LayerFactors, k_cache: Tensor, v_cache: Tensor | None, pages: Tensor, begin: int, end: int
) -> tuple[Tensor, Tensor | None]:
    """Latents of tokens begin..end of one sequence: [n, row_width], and [n, sum Rv] unless the row serves both."""
    zk = read_latents(layer.row_side, k_cache, pages, begin, end)
    return zk, None if v_cache is None else read_latents(layer.values, v_cache, pages, begin, end)


def _read_positions(positions: Tensor, pages: Tensor, begin: int, end: int) -> Tensor:
    return read_rows(positions[..., None], pages, begin, end)[:, 0]


class Blocks(NamedTuple):
    """Work in flight: so many queries of a sequence against so many tokens."""

    queries: int
    tokens: int
    nbytes: int


def blocks(
    layer: LayerFactors, query_heads: int, num_queries: int, page_size: int, limit: int, near: int = 0
) -> Blocks:
    """Queries and tokens per block, so that temporaries stay within `limit` bytes (one query, 16 tokens at least).

    near: tokens of a sequence that are held as they are.
    """
    size = accumulator(layer.dtype).itemsize
    widest = max(layer.values.ranks)
    tile = layer.keys.group_size * layer.head_dim
    most = TILE_BYTES // (tile * size)
    if layer.absorbed and not layer.packed:
        most = max(most, MOST_READ)
    absorbed = (most // layer.chunk + 2 if layer.chunk else 1) * (max(layer.keys.ranks) + 2 * layer.head_dim)
    ready = 3 * layer.head_dim + (absorbed if layer.absorbed else 0)  # queries in three forms, and a chunk's
    per_query = query_heads * (3 * widest + ready) * size
    queries = max(1, min(num_queries, limit // 2 // per_query))
    row = (layer.k_width + layer.v_width) * size
    if layer.packed:  # latents, and the codes they are made of
        row += 3 * (layer.row_width + (0 if layer.shared else layer.values.width)) * size
    per_token = 3 * tile * size + 3 * query_heads * queries * size + 2 * row  # keys, scores, rows read and widened
    edges = 2 * page_size * row if page_size <= WHOLE_PAGES else 0  # of the pages that a block begins and ends in
    tokens = min(most, max(limit // 2 - edges, 0) // per_token)
    tokens = max(16, tokens // 16 * 16)
    beside = near * (4 * layer.num_kv_heads * layer.head_dim + 4 * query_heads * queries) * size
    return Blocks(queries, tokens, queries * per_query + tokens * per_token + edges + beside)


def decode_attention(
    call: Call, layer: LayerFactors, sinks: Tensor | None, project: str, num_splits: int, workspace_limit: int
) -> tuple[Tensor, Tensor]:
    """Output [B, S, Hq, Rv | D] or [B, S, E] in q's dtype, lse [B, S, Hq]."""
    q, tokens = call.q, call.tokens
    batch, num_queries, query_heads, _ = q.shape
    acc = accumulator(q.dtype)
    plan = blocks(layer, query_heads, num_queries, call.ck.shape[1], workspace_limit)
    out = empty_result(call, layer.wo, project)
    lse = torch.empty(batch, num_queries, query_heads, dtype=acc, device=q.device)
    starts, offsets = ([0] * batch if x is None else x.tolist() for x in (tokens.starts, tokens.offsets))
    lengths = tokens.lens.clamp(0, tokens.bound).tolist()
    for b, (start, length, offset) in enumerate(zip(starts, lengths, offsets, strict=True)):
        _check_positions(layer, length, offset, tokens.positions)
        for first in range(0, num_queries, plan.queries):
            some = slice(first, min(first + plan.queries, num_queries))
            own, (begin, end) = range(length - num_queries, length)[some], far_of(call, b, start, length)
            row = _Row(layer, call, tokens.pages[b], range(end - num_queries, end)[some], offset)
            latent, row_lse = _attend(
                row, q[b, some].to(acc) * call.rule.scale, *row.sight(begin, end), plan.tokens, num_splits
            )
            near = None if call.tokens.near is None else attend_near(call, call.tokens.near, b, own, start, length)
            latent, row_lse, mass, heads = _join(latent, row_lse, near, sinks)
            out[b, some] = _project(latent, mass, heads, layer, project).to(out.dtype)
            lse[b, some] = row_lse
    return out, lse


def empty_result(call: Call, wo: Tensor | None, project: str) -> Tensor:
    """[B, S, Hq, Rv | D] or [B, S, E], for decode_attention to fill."""
    q = call.q
    last = {"latent": (q.shape[2], call.values.sizes.rank), "heads": q.shape[2:]}
    return q.new_empty(*q.shape[:2], *(last[project] if wo is None or project != "hidden" else wo.shape[2:]))


class _Row(NamedTuple):
    """Some queries of one sequence, and where its tokens lie."""

    layer: LayerFactors
    call: Call
    pages: Tensor
    own: range  # the queries' own tokens
    offset: int  # a token's position is that many less than its place in the sequence

    def sight(self, start: int, length: int) -> tuple[int, int]:
        """The tokens start..length that some query sees."""
        rule = self.call.rule
        if rule.window:
            start = max(start, self.own.start - (rule.window - self.call.tokens.recent) + 1)
        return max(start, 0), self.own.stop if rule.causal else length

    def blocks(self, begin: int, end: int, step: int) -> Iterator[tuple[int, int]]:
        """Tokens begin..end, at most `step` at a time; of whole chunks where one fits."""
        chunk = self.layer.chunk or 1
        while begin < end:
            after = begin + step
            after = min(end, after - (after - self.offset) % chunk if step >= chunk else after)
            yield begin, after
            begin = after

    def chunks(self, t0: int, t1: int) -> tuple[range, list[tuple[slice, slice]]]:
        """Which chunks tokens t0..t1 are of; and runs of these chunks that have as many tokens each, with all those
        tokens: the first chunk, whole ones, the last. One where there are no chunks."""
        if not (size := self.layer.chunk):
            return range(1), [(slice(0, 1), slice(0, t1 - t0))]
        first, last = (max(t - self.offset, 0) // size for t in (t0, t1 - 1))
        count = last - first + 1
        borders = sorted({0, 1, count - 1, count})
        at = [0, *(self.offset + (first + n) * size - t0 for n in borders[1:-1]), t1 - t0]
        runs = zip(pairwise(borders), pairwise(at), strict=True)
        return range(first, last + 1), [(slice(*own), slice(*tokens)) for own, tokens in runs]


def _attend(row: _Row, q: Tensor, begin: int, end: int, step: int, num_splits: int) -> tuple[Tensor, Tensor]:
    """Scaled queries [S, Hq, D] -> latent result [S, Hq, Rv] and lse [S, Hq] over tokens begin..end."""
    heads, (num_queries, _, head_dim) = row.layer.num_kv_heads, q.shape
    q = q.view(num_queries, heads, -1, head_dim).permute(1, 2, 0, 3).reshape(heads, -1, head_dim)  # [Hkv, M S, D]
    _check_pages(row.call.ck, row.pages, begin, end)
    live, parts = max(end - begin, 0), max(num_splits, 1)
    (first, *others) = pairwise(begin + live * i // parts for i in range(parts + 1))
    q = q[..., row.layer.pairs]
    latent, lse = _attend_span(row, q, *first, step)  # [Hkv, M S, Rv], [Hkv, M S]
    for span in others:
        part, part_lse = _attend_span(row, q, *span, step)
        latent, lse = merge_attention([latent, part], [lse, part_lse])
    latent = latent.unflatten(1, (-1, num_queries)).permute(2, 0, 1, 3).flatten(1, 2)
    return latent, lse.unflatten(1, (-1, num_queries)).permute(2, 0, 1).flatten(1, 2)


def _attend_span(row: _Row, q: Tensor, begin: int, end: int, step: int) -> tuple[Tensor, Tensor]:
    """Softmax of queries [Hkv, M S, D], pairs adjacent, over tokens begin..end, block by block with a running
    maximum."""
    layer = row.layer
    heads, rows = layer.num_kv_heads, q.shape[1]
    peak = q.new_full((heads, rows), -torch.inf)
    total = q.new_zeros(heads, rows)
    latent = q.new_zeros(heads, rows, max(layer.values.ranks))
    for t0, t1 in row.blocks(begin, end, step):
        ck, cv = _read(layer, row.call.ck, row.call.cv, row.pages, t0, t1)
        cv = ck if cv is None else cv
        s = (_absorbed_scores if layer.absorbed else _rebuilt_scores)(row, q, ck, t0, t1)  # [Hkv, M S, n]
        if softcap := row.call.rule.softcap:
            s.div_(softcap).tanh_().mul_(softcap)
        seen = _seen(row, t0, t1)
        if seen is not None:
            s.unflatten(1, (-1, len(seen))).masked_fill_(~seen, -torch.inf)
        above = torch.maximum(peak, s.amax(-1))
        base = above.masked_fill(above == -torch.inf, 0.0)
        p = s.sub_(base[..., None]).exp_()
        fade = (peak - base).exp_()
        total = total * fade + p.sum(-1)
        latent *= fade[..., None]
        for members, columns in zip(layer.values.groups, layer.values.columns, strict=True):
            mixed = p[list(members)].flatten(0, 1) @ cv[:, columns].to(p.dtype)  # [C M S, Rv]
            latent[list(members), :, : mixed.shape[1]] += mixed.unflatten(0, (-1, rows))
        peak = above
    empty = total == 0
    lse = peak + total.log()
    return latent / total.masked_fill(empty, 1.0)[..., None], lse.masked_fill(empty, -torch.inf)


def _absorbed_scores(row: _Row, q: Tensor, ck: Tensor, t0: int, t1: int) -> Tensor:
    """Scaled scores [Hkv, M S, n] of key latents [n, row_width], neither capped nor masked: queries are turned back by
    the first position of each chunk and multiplied into the latents' space."""
    layer, (chunks, runs) = row.layer, row.chunks(t0, t1)
    x = q.flatten(0, 1).expand(len(chunks), -1, -1)  # [chunks, Hkv M S, D]
    if layer.turns is not None:
        x = layer.turn_(x.clone(), layer.turns[chunks.start : chunks.stop].conj())
    x = x.unflatten(1, q.shape[:2]).transpose(0, 1).flatten(1, 2)  # [Hkv, chunks M S, D]
    s = q.new_empty(*q.shape[:2], t1 - t0)
    for g, members in enumerate(layer.keys.groups):
        block = layer.operands.keys.rows[layer.keys.columns[g]].to(q.dtype)
        up = block.unflatten(1, (len(members), -1)).permute(1, 2, 0)  # [C, D, Rk]
        a = (x[list(members)] @ up).unflatten(1, (len(chunks), -1)).transpose(0, 1).flatten(1, 2)
        z = ck[:, layer.key_columns[g]].to(q.dtype)
        for own, tokens in runs:
            absorbed = a[own]  # [chunks, C M S, Rk]
            found = absorbed @ z[tokens].unflatten(0, (len(absorbed), -1)).transpose(1, 2)  # [chunks, C M S, n]
            s[list(members), :, tokens] = found.transpose(0, 1).flatten(1).unflatten(0, (len(members), -1))
    if layer.keys.offset is not None:
        shift = (x @ layer.keys.offset[:, layer.pairs].to(q.dtype)[..., None]).unflatten(1, (len(chunks), -1))
        for own, tokens in runs:
            s[..., tokens].unflatten(-1, (own.stop - own.start, -1)).add_(shift[:, own].transpose(1, 2))
    return s


def _rebuilt_scores(row: _Row, q: Tensor, ck: Tensor, t0: int, t1: int) -> Tensor:
    """As _absorbed_scores, of keys before RoPE."""
    layer, turns = row.layer, row.layer.turns
    if turns is not None:
        positions = row.call.tokens.positions
        at = None if positions is None else _read_positions(positions, row.pages, t0, t1)
        turns = turns[t0:t1] if at is None else rows_at(turns, at)
    s = q.new_empty(*q.shape[:2], t1 - t0)
    for g, members in enumerate(layer.keys.groups):
        tile = layer.turn_(layer.raw_keys(ck, g), turns)  # [n, C, D]
        s[list(members)] = q[list(members)] @ tile.permute(1, 2, 0)
    return s


def _seen(row: _Row, t0: int, t1: int) -> Tensor | None:
    """Which of tokens t0..t1 each query sees, [S, n]; None where every query sees them all."""
    rule, own = row.call.rule, row.own
    window = rule.window - row.call.tokens.recent
    if not rule.causal or (t1 <= own.start + 1 and (not rule.window or t0 > own.stop - 1 - window)):
        return None
    i, t = (torch.arange(x.start, x.stop, device=row.pages.device) for x in (own, range(t0, t1)))
    seen = t <= i[:, None]
    return seen & (t > i[:, None] - window) if rule.window else seen


def merge_attention(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Results over disjoint tokens -> the result over all: outs [.., X] each, lses [..] each."""
    acc = accumulator(outs[0].dtype)
    stacked = torch.stack(lses).to(acc)
    lse = torch.logsumexp(stacked, 0)
    weights = (stacked - lse.masked_fill(lse == -torch.inf, 0.0)).exp()[..., None]
    parts = torch.stack(outs).to(acc)
    return (weights * parts.masked_fill(weights == 0, 0.0)).sum(0).to(outs[0].dtype), lse


def _join(
    latent: Tensor, lse: Tensor, near: tuple[Tensor, Tensor] | None, sinks: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """What the dense window gives, heads [S, Hq, D] and lse [S, Hq], and sink logits [Hq] join the denominator: latents
    and these heads as they then count, the lse, and the probability mass on latents, [S, Hq]."""
    joined = lse if near is None else torch.logaddexp(lse, near[1])
    joined = joined if sinks is None else torch.logaddexp(joined, sinks.to(lse.dtype))
    if joined is lse:
        return latent, lse, (lse > -torch.inf).to(lse.dtype), None
    base = joined.masked_fill(joined == -torch.inf, 0.0)
    mass = (lse - base).exp()
    heads = None if near is None else near[0] * (near[1] - base).exp()[..., None]
    return latent * mass[..., None], joined, mass, heads


def _project(latent: Tensor, mass: Tensor, near: Tensor | None, layer: LayerFactors, project: str) -> Tensor:
    """Latent results [S, Hq, Rv], and heads [S, Hq, D] beside them -> what was asked for; the value offset counts with
    the mass on latents."""
    if project == "latent":
        return latent
    split = (layer.num_kv_heads, -1)
    up = layer.values.up.to(latent.dtype)
    heads = torch.einsum("shmr,hrd->shmd", latent.unflatten(1, split), up)
    if layer.values.offset is not None:
        heads += mass.unflatten(1, split)[..., None] * layer.values.offset[:, None].to(heads.dtype)
    heads = heads.flatten(1, 2) if near is None else heads.flatten(1, 2) + near
    if project == "heads" or layer.wo is None:
        return heads
    kind = product_dtype(layer.wo)
    return heads.flatten(1).to(kind) @ layer.wo.flatten(0, 1).to(kind)


def _check_positions(layer: LayerFactors, length: int, offset: int, positions: Tensor | None) -> None:
    """Raises ValueError for a token at a position beyond the rope's."""
    if layer.turns is None or positions is not None or length <= 0:
        return
    most = len(layer.turns) * (layer.chunk or 1)
    if length - offset > most:
        if not offset:
            raise ValueError(f"seq_lens: expected at most max_position={most} of the rope, got {length}")
        raise ValueError(
            f"offsets: expected at least {length - most} of a sequence of {length} tokens, whose positions are below "
            f"max_position={most} of the rope, got {offset}"
        )


def _check_pages(cache: Tensor, pages: Tensor, begin: int, end: int) -> None:
    if begin >= end:
        return
    low, high = pages[begin // cache.shape[1] : -(-end // cache.shape[1])].aminmax()
    if low < 0 or high >= len(cache):
        got = f"{int(low)} .. {int(high)}"
        raise ValueError(f"block_table: expected pages 0 .. {len(cache) - 1} where tokens are read, got {got}")
