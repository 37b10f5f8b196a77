"""Dense attention over a latent cache in float64: every head rebuilt and rotated as the records say.

It takes every argument that changes a result, reads the fields of the records (bases, ranks, head order, rope
parameters) and the page layout as documented, and calls nothing of lrattn but the frequencies of a rope, which
tests/factors/test_rope.py holds against transformers.
"""

import math
from dataclasses import replace

import torch


def group_of(projection):
    """kv head -> (first latent column, rank), heads in order."""
    heads = projection.up.shape[0]
    order = projection.head_order or tuple(range(heads))
    size = heads // len(projection.ranks)
    found = {}
    for place, head in enumerate(order):
        g = place // size
        found[head] = (sum(projection.ranks[:g]), projection.ranks[g])
    return dict(sorted(found.items()))


def dense_heads(rows, projection, laid_out):
    """Latent rows [n, width] -> heads [n, Hkv, D], offset added. laid_out: the projection whose columns a row has."""
    columns = group_of(laid_out)
    heads = []
    for h, (_, rank) in group_of(projection).items():
        start, _ = columns[h]
        x = rows[:, start : start + rank] @ projection.up[h, :rank].double()
        heads.append(x if projection.offset is None else x + projection.offset[h].double())
    return torch.stack(heads, 1)


def rotate(x, positions, rope, sizes=False, chunk=None):
    """x [.., n, Hkv, D] rotated to positions [.., n], angles in the rope's own dtype; or bounds of its sizes.

    chunk: to the first position of the chunk they are in, exactly and without the attention factor.
    """
    frequencies, factor = rope.frequencies()
    if chunk is not None:
        positions, frequencies, factor = positions.clamp(min=0) // chunk * chunk, frequencies.double(), 1.0
    angles = positions.to(frequencies.dtype)[..., None, None] * frequencies
    cos, sin = ((f(angles) * factor).double() for f in (torch.cos, torch.sin))
    n = 2 * len(frequencies)
    first, second = (slice(0, n, 2), slice(1, n, 2)) if rope.interleaved else (slice(0, n // 2), slice(n // 2, n))
    y = x.clone()
    cos, sin, back = (cos.abs(), sin.abs(), sin.abs()) if sizes else (cos, sin, -sin)
    y[..., first] = x[..., first] * cos + x[..., second] * back
    y[..., second] = x[..., second] * cos + x[..., first] * sin
    return y


def positive(layer):
    """The layer whose sums are those of the sizes of this one's terms."""

    def side(x):
        return replace(x, up=x.up.abs(), offset=None if x.offset is None else x.offset.abs())

    return replace(layer, keys=side(layer.keys), values=side(layer.values))


def dense_keys(layer, rows, positions, sizes=False):
    """Key rows [n, width] -> keys [n, Hkv, D], rotated."""
    k = dense_heads(rows, layer.keys, layer.values if layer.shared else layer.keys)
    return k if layer.rope is None else rotate(k, positions, layer.rope, sizes, layer.chunk)


def dense_values(layer, rows, project="heads"):
    """Value rows [n, width] -> what is summed [n, Hkv, .]: heads, or latents padded with zeros."""
    if project != "latent":
        return dense_heads(rows, layer.values, layer.values)
    groups = group_of(layer.values)
    v = rows.new_zeros(len(rows), len(groups), max(layer.values.ranks))
    for h, (column, rank) in groups.items():
        v[:, h, :rank] = rows[:, column : column + rank]
    return v


def dense_kv(layer, k_row, v_row, position):
    """One token's latent rows -> k, v [Hkv, D]. v_row: None where keys and values share one."""
    k_row = k_row[None].double()
    v_row = k_row if v_row is None else v_row[None].double()
    return dense_keys(layer, k_row, torch.tensor([position]))[0], dense_values(layer, v_row)[0]


def exact_tokens(near, b, t, first):
    """Keys and values [n, Hkv, D] of tokens t [n] of sequence b, from their places in the dense window."""
    row = b if near.rows is None else int(near.rows[b])
    place = torch.where(t < first + near.sinks, t - first, near.sinks + t % max(near.slots, 1))
    return near.keys[row, place].double(), near.values[row, place].double()


def attend(
    q,
    k_cache,
    v_cache,
    layer,
    *,
    block_table,
    seq_lens,
    softmax_scale=None,
    positions=None,
    offsets=None,
    seq_starts=None,
    causal=True,
    max_seq_len=None,
    window_size=None,
    softcap=0.0,
    sinks=None,
    near=None,
    project="heads",
    num_splits=0,
    workspace_limit=0,
):
    """Result and lse in float64, and the sway of each: (by roundings of keys and queries, by roundings of sums).

    Times eps of the dtype and of the sums it is how far rounding alone may move them, to first order, wherever the
    softmax has its peak. The last two arguments change nothing.
    """
    batch, num_queries, query_heads, head_dim = q.shape
    size, shared = k_cache.shape[1], query_heads // layer.keys.up.shape[0]
    bound = min(block_table.shape[1] * size, math.inf if max_seq_len is None else max_seq_len)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    terms, wo = positive(layer), layer.wo.double()
    outs, lses, sway = [], [], torch.zeros(2, 2, dtype=torch.float64)
    for b in range(batch):
        length = min(max(int(seq_lens[b]), 0), bound)
        t, own = torch.arange(length), torch.arange(length - num_queries, length)[:, None]
        start = 0 if seq_starts is None else max(int(seq_starts[b]), 0)
        first = start if near is None or near.firsts is None else max(int(near.firsts[b]), 0)
        seen = (t >= max(start, first)).expand(num_queries, -1)
        seen = seen & (t <= own) if causal else seen
        seen = seen if window_size is None else seen & (t > own - window_size)
        exact = torch.zeros_like(seen) if near is None else seen & ((t > own - near.recent) | (t < first + near.sinks))
        seen = seen & ~exact
        t, t_near = t[seen.any(0)], t[exact.any(0)]  # only what some query sees is read
        seen, exact = seen[:, None, t], exact[:, None, t_near]
        page, offset = block_table[b, t // size].long(), t % size
        k_rows = k_cache[page, offset].double()
        v_rows = k_rows if v_cache is None else v_cache[page, offset].double()
        at = t - (0 if offsets is None else int(offsets[b])) if positions is None else positions[page, offset].long()

        def scores(x, k):
            return torch.einsum("shd,thd->sht", x, k.repeat_interleave(shared, 1))

        def result(p, v, wo):
            out = torch.einsum("sht,thr->shr", p, v.repeat_interleave(shared, 1))
            return torch.einsum("shd,hde->se", out, wo) if project == "hidden" else out

        k, v = dense_keys(layer, k_rows, at), dense_values(layer, v_rows, project)
        k_most, v_most = dense_keys(terms, k_rows.abs(), at, sizes=True), dense_values(terms, v_rows.abs(), project)
        if near is not None:
            k_near, v_near = exact_tokens(near, b, t_near, first)
            k, v, seen = torch.cat((k, k_near)), torch.cat((v, v_near)), torch.cat((seen, exact), 2)
            k_most, v_most = torch.cat((k_most, k_near.abs())), torch.cat((v_most, v_near.abs()))
        s = scores(q[b].double(), k) * scale
        s = torch.tanh(s / softcap) * softcap if softcap else s
        s = s.masked_fill(~seen, -torch.inf)
        if sinks is not None:
            s = torch.cat((s, sinks.double()[:, None].expand(num_queries, -1, 1)), 2)
        lse = s.logsumexp(-1)
        p = (s - lse[..., None]).exp().masked_fill(lse[..., None] == -torch.inf, 0.0)[..., : len(k)]
        outs.append(result(p, v, wo))
        lses.append(lse)
        if p.numel():
            by_score = [(scores(q[b].double().abs(), x) * seen).max() * abs(scale) for x in (k.abs(), k_most)]
            most = [x.abs().amax(0, keepdim=True) for x in (v, v_most)]
            value, summed = (result(torch.ones_like(p[..., :1]), x, wo.abs()).max() for x in most)
            moved = [[2 * by_score[0] * value, by_score[0]], [2 * by_score[1] * value + summed, by_score[1]]]
            sway = torch.maximum(sway, torch.tensor(moved, dtype=torch.float64).T)
    last = {"latent": (query_heads, max(layer.values.ranks)), "heads": (query_heads, head_dim), "hidden": wo.shape[2:]}
    empty = q.new_empty(0, num_queries, *last[project]).double(), q.new_empty(0, num_queries, query_heads).double()
    return (torch.stack(outs), torch.stack(lses), sway.tolist()) if outs else (*empty, sway.tolist())
