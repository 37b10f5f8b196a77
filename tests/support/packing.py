"""Packed caches read the plain way, as documented: bit by bit, nothing shared with lrattn but a record's fields."""

from dataclasses import replace

import torch

POISON = 255  # every byte of a slot that must not be read: a segment of this scale is no number


def poison(dtype):
    return POISON if dtype == torch.uint8 else torch.nan


def segments(rank, widths):
    """A rank in one segment of 16 latents or more for each width, as even as it goes."""
    blocks = rank // 16
    counts = [blocks * (i + 1) // len(widths) - blocks * i // len(widths) for i in range(len(widths))]
    return tuple((16 * n, bits) for n, bits in zip(counts, widths) if n)


def read_run(run, parts, half):
    """One token's run of one group, a list of bytes -> its latents; half: the dtype of 16-bit numbers."""
    latents, at = [], 0
    scale_at = sum(rank * bits // 8 for rank, bits in parts)
    for rank, bits in parts:
        if bits == 16:
            held = torch.tensor(run[at : at + 2 * rank], dtype=torch.uint8).view(half)
            latents += held.double().tolist()
        else:
            e, f = divmod(run[scale_at], 8)
            scale = float("nan") if run[scale_at] == 255 else (1 + f / 8) * 2.0 ** (e - 16)
            each = 8 // bits
            codes = [run[at + i // each] >> (i % each * bits) & (2**bits - 1) for i in range(rank)]
            latents += [(code - (2**bits - 1) / 2) * scale for code in codes]
            scale_at += 1
        at += rank * bits // 8
    return latents


def read_cache(cache, formats, dtype):
    """[N, P, bytes] uint8 -> plain rows [N, P, width] float64."""
    half = dtype if dtype in (torch.float16, torch.bfloat16) else torch.float16
    rows = []
    for row in cache.flatten(0, 1).tolist():
        latents, at = [], 0
        for own in formats:
            latents += read_run(row[at : at + own.nbytes], own.segments, half)
            at += own.nbytes
        rows.append(latents)
    return torch.tensor(rows, dtype=torch.float64).unflatten(0, cache.shape[:2])


def plain(problem):
    """A problem of cases.make whose latents are plain and the same, in float64."""
    layer, q, k_cache, v_cache, kwargs = problem
    k_side, wide = layer.values if layer.shared else layer.keys, layer.to(dtype=torch.float64)
    k_cache = read_cache(k_cache, k_side.format, layer.dtype) if k_side.format else k_cache.double()
    if v_cache is not None:
        v_cache = read_cache(v_cache, layer.values.format, layer.dtype) if layer.values.format else v_cache.double()
    keys, values = (replace(side, format=None) for side in (wide.keys, wide.values))
    if (near := kwargs.get("near")) is not None:
        kwargs = kwargs | {"near": replace(near, keys=near.keys.double(), values=near.values.double())}
    return replace(wide, keys=keys, values=values), q.double(), k_cache, v_cache, kwargs
