"""Dense attention in float64 over rebuilt heads: oracle.py a sequence at a time, quick enough for thousands of cases.

It takes every argument that changes a result, reads the fields of the records and the page layout as documented, and
calls nothing of lrattn but the frequencies of a rope, which test_rope.py holds against transformers.
"""

import math
from dataclasses import replace

import torch
from oracle import group_of


def dense_heads(rows, projection, starts):
    """Latent rows [n, width] -> heads [n, Hkv, D], bias added; starts: first column of each kv head's latents."""
    heads = []
    for h, (_, _, rank) in sorted(group_of(projection).items()):
        x = rows[:, starts[h] : starts[h] + rank] @ projection.up[h, :rank].double()
        heads.append(x if projection.bias is None else x + projection.bias[h].double())
    return torch.stack(heads, 1)


def rotate(x, positions, rope):
    """x [n, Hkv, D] rotated to positions [n]; angles in the dtype that the rope asks for."""
    frequencies, factor = rope.frequencies()
    angles = positions.to(frequencies.dtype)[:, None, None] * frequencies
    cos, sin = ((f(angles) * factor).double() for f in (torch.cos, torch.sin))
    n = 2 * len(frequencies)
    first, second = (slice(0, n, 2), slice(1, n, 2)) if rope.interleaved else (slice(0, n // 2), slice(n // 2, n))
    y = x.clone()
    y[..., first] = x[..., first] * cos - x[..., second] * sin
    y[..., second] = x[..., second] * cos + x[..., first] * sin
    return y


def inverse_rms(layer, rows):
    """1 / rms of the raw keys of latent rows [n, row width]: [n, Hkv]."""
    raw = dense_heads(rows.double(), layer.keys, first_columns(layer, layer.keys))
    return ((raw * raw).mean(-1) + layer.key_norm.eps) ** -0.5


def cancellation(layer, rows):
    """How far the terms of a raw key outweigh their sum, which the norm makes one: [n, Hkv], at least 1."""
    keys, bias = layer.keys, layer.keys.bias
    positive = replace(layer, keys=replace(keys, up=keys.up.abs(), bias=None if bias is None else bias.abs()))
    return inverse_rms(layer, rows) / inverse_rms(positive, rows.abs())


def first_columns(layer, projection):
    """kv head -> where its latents begin in a row; a shared row is laid out by the values' ranks."""
    laid_out = group_of(layer.values if layer.shared else projection)
    return {h: column for h, (_, column, _) in laid_out.items()}


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
    max_seq_len=None,
    window_size=None,
    softcap=0.0,
    sinks=None,
    project="heads",
    num_splits=0,
    workspace_limit=0,
):
    """Result and lse in float64, and the sway of each. The last two arguments change nothing.

    The sway is what results move by at most, to first order, when every query and key is off by one part of itself
    (with a key norm, of the terms it was summed from): times eps it is an error that rounding alone explains,
    wherever the softmax has its peak.
    """
    batch, num_queries, query_heads, head_dim = q.shape
    size, shared = k_cache.shape[1], query_heads // layer.keys.up.shape[0]
    bound = min(block_table.shape[1] * size, math.inf if max_seq_len is None else max_seq_len)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    value_groups, widest = group_of(layer.values), max(layer.values.ranks)
    outs, lses, sway = [], [], [0.0, 0.0]
    for b in range(batch):
        length = min(max(int(seq_lens[b]), 0), bound)
        t, own = torch.arange(length), torch.arange(length - num_queries, length)[:, None]
        seen = (t >= (0 if seq_starts is None else int(seq_starts[b]))).expand(num_queries, -1)
        seen = seen & (t <= own) if causal else seen
        seen = seen if window_size is None else seen & (t > own - window_size)
        t = t[seen.any(0)]  # only what some query sees is read
        seen, page, offset = seen[:, t], block_table[b, t // size].long(), t % size
        k_rows = k_cache[page, offset].double()
        v_rows = k_rows if v_cache is None else v_cache[page, offset].double()

        k = dense_heads(k_rows, layer.keys, first_columns(layer, layer.keys))
        if layer.key_norm is not None:
            k = k * inverse_rms(layer, k_rows)[..., None] * layer.key_norm.weight.double()
        if layer.rope is not None:
            k = rotate(k, t if positions is None else positions[page, offset].long(), layer.rope)
        s = torch.einsum("shd,thd->sht", q[b].double(), k.repeat_interleave(shared, 1)) * scale
        terms = torch.einsum("shd,thd->sht", q[b].double().abs(), k.abs().repeat_interleave(shared, 1)) * abs(scale)
        if layer.key_norm is not None:
            terms = terms * cancellation(layer, k_rows).repeat_interleave(shared, 1).T
        s = torch.tanh(s / softcap) * softcap if softcap else s
        s = s.masked_fill(~seen[:, None], -torch.inf)
        if sinks is not None:
            s = torch.cat((s, sinks.double()[:, None].expand(num_queries, -1, 1)), 2)
        lse = s.logsumexp(-1)
        p = (s - lse[..., None]).exp().masked_fill(lse[..., None] == -torch.inf, 0.0)[..., : len(t)]

        if project == "latent":
            v = v_rows.new_zeros(len(t), len(value_groups), widest)
            for h, (_, column, rank) in value_groups.items():
                v[:, h, :rank] = v_rows[:, column : column + rank]
        else:
            v = dense_heads(v_rows, layer.values, first_columns(layer, layer.values))
        v = v.repeat_interleave(shared, 1)
        out = torch.einsum("sht,thr->shr", p, v)
        outs.append(torch.einsum("shd,hde->se", out, layer.wo.double()) if project == "hidden" else out)
        lses.append(lse)
        if terms.numel():
            most = v.abs().amax(0)
            most = torch.einsum("hd,hde->e", most, layer.wo.double().abs()) if project == "hidden" else most
            by_score = terms.masked_fill(~seen[:, None], 0.0).max().item()
            sway = [max(sway[0], 2 * by_score * most.max().item()), max(sway[1], by_score)]
    last = {"latent": (query_heads, widest), "heads": (query_heads, head_dim), "hidden": layer.wo.shape[2:]}[project]
    empty = q.new_empty(0, num_queries, *last).double(), q.new_empty(0, num_queries, query_heads).double()
    return (torch.stack(outs), torch.stack(lses), sway) if outs else (*empty, sway)
