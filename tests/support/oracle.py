"""Attention over a latent cache, written the plain way: token by token, head by head, nothing shared with lrattn.

It reads the fields of the records (bases, ranks, head order, rope parameters) and the page layout as documented,
rebuilds every key and value, and attends densely in float64.
"""

import math

import torch


def group_of(projection):
    """kv head -> (group, first latent column, rank)."""
    heads = projection.up.shape[0]
    order = projection.head_order or tuple(range(heads))
    size = heads // len(projection.ranks)
    found = {}
    for place, head in enumerate(order):
        g = place // size
        found[head] = (g, sum(projection.ranks[:g]), projection.ranks[g])
    return found


def rotate(x, position, rope):
    """One head [D] rotated to one position, pair by pair."""
    frequencies, factor = rope.frequencies()
    n = 2 * len(frequencies)
    y = x.clone()
    for j, f in enumerate(frequencies.tolist()):
        a, b = (2 * j, 2 * j + 1) if rope.interleaved else (j, j + n // 2)
        cos, sin = math.cos(position * f) * factor, math.sin(position * f) * factor
        y[a], y[b] = x[a] * cos - x[b] * sin, x[b] * cos + x[a] * sin
    return y


def dense_kv(layer, k_row, v_row, position):
    """One token's latent rows -> k, v [Hkv, D] in float64."""
    k_row = k_row.double()
    v_row = k_row if v_row is None else v_row.double()
    keys, values = group_of(layer.keys), group_of(layer.values)
    ks, vs = [], []
    for h in range(layer.keys.up.shape[0]):
        _, start, rank = keys[h]
        if layer.shared:
            start = values[h][1]
        k = k_row[start : start + rank] @ layer.keys.up[h, :rank].double()
        if layer.keys.bias is not None:
            k = k + layer.keys.bias[h].double()
        if layer.key_norm is not None:
            k = k / torch.sqrt((k * k).mean() + layer.key_norm.eps) * layer.key_norm.weight.double()
        ks.append(k if layer.rope is None else rotate(k, position, layer.rope))
        _, start, rank = values[h]
        v = v_row[start : start + rank] @ layer.values.up[h, :rank].double()
        vs.append(v if layer.values.bias is None else v + layer.values.bias[h].double())
    return torch.stack(ks), torch.stack(vs)


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
    seq_starts=None,
    causal=True,
    window_size=None,
    softcap=0.0,
    sinks=None,
):
    """Heads [B, S, Hq, D] and lse [B, S, Hq] in float64."""
    batch, num_queries, query_heads, head_dim = q.shape
    size = k_cache.shape[1]
    kv_heads = layer.keys.up.shape[0]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    out = torch.zeros(batch, num_queries, query_heads, head_dim, dtype=torch.float64)
    lse = torch.full((batch, num_queries, query_heads), -math.inf, dtype=torch.float64)
    for b in range(batch):
        length = min(int(seq_lens[b]), block_table.shape[1] * size)
        start = 0 if seq_starts is None else int(seq_starts[b])
        tokens = {}
        for s in range(num_queries):
            own = length - num_queries + s
            last = own if causal else length - 1
            first = max(start, 0, own - window_size + 1 if window_size else 0)
            seen = range(first, last + 1)
            for t in seen:
                if t not in tokens:
                    page, offset = int(block_table[b, t // size]), t % size
                    position = t if positions is None else int(positions[page, offset])
                    v_row = None if v_cache is None else v_cache[page, offset]
                    tokens[t] = dense_kv(layer, k_cache[page, offset], v_row, position)
            for h in range(query_heads):
                kv = h // (query_heads // kv_heads)
                scores = [float(q[b, s, h].double() @ tokens[t][0][kv]) * scale for t in seen]
                if softcap:
                    scores = [softcap * math.tanh(x / softcap) for x in scores]
                logits = scores + ([] if sinks is None else [float(sinks[h])])
                if not logits:
                    continue
                peak = max(logits)
                weights = [math.exp(x - peak) for x in logits]
                lse[b, s, h] = peak + math.log(sum(weights))
                for w, t in zip(weights, seen):
                    out[b, s, h] += w / sum(weights) * tokens[t][1][kv]
    return out, lse
