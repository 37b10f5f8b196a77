"""Packed caches read the plain way, as documented: bit by bit, nothing shared with lrattn but a record's fields."""

from dataclasses import replace

import torch

POISON = 255  # every byte of a slot that must not be read: a segment of this scale is no number


def poison(dtype):
    return POISON if dtype == torch.uint8 else torch.nan


def segments(rank, widths):
    """A rank in parts of 16 latents or more, one for each width and as even as it goes; neighbours of one width are one
    segment."""
    blocks, found = rank // 16, []
    for i, bits in enumerate(widths):
        n = 16 * (blocks * (i + 1) // len(widths) - blocks * i // len(widths))
        if found and found[-1][1] == bits:
            found[-1] = found[-1][0] + n, bits
        elif n:
            found.append((n, bits))
    return tuple(found)


def places(own):
    """Of each segment of a format: rank, bits, first byte of its codes in a run, byte of its scale in words or None."""
    at, scales, found = 0, 0, []
    for rank, bits in own.segments:
        found.append((rank, bits, at, None if bits == 16 else 4 * (scales // 3) + scales % 3))
        at += (rank * bits // 8 + 15) // 16 * 16
        scales += bits < 16
    return found


def sizes(own):
    """Bytes of a run and of its words."""
    scales = sum(bits < 16 for _, bits in own.segments)
    return sum((rank * bits // 8 + 15) // 16 * 16 for rank, bits in own.segments), (scales + 2) // 3 * 4


def sections(cache, formats):
    """Views of what every slot holds, [N, P, ..] each: of a packed cache its runs and its words."""
    if not formats:
        return [cache]
    pages, size, width = cache.shape
    runs, words = (size * sum(n) for n in zip(*map(sizes, formats)))
    assert runs + words == size * width and cache[0].is_contiguous()
    flat = cache.as_strided((pages, size * width), (cache.stride(0), 1))
    return [x.unflatten(1, (size, -1)) for x in (flat[:, :runs], flat[:, runs:])]


def fill(cache, formats, slots, byte):
    """Slots [n] of a cache, which may be packed, with one number everywhere."""
    for part in sections(cache, formats):
        part[slots // cache.shape[1], slots % cache.shape[1]] = byte


def code(run, at, rank, bits, latent):
    """Of one latent of a segment whose codes begin at byte `at` of a run, a list of bytes."""
    halfwords = rank * bits // 16
    plane, h = divmod(latent, halfwords)
    low, high = run[at + 2 * h], run[at + 2 * h + 1]
    return ((low + 256 * high) // 2 ** (bits * plane)) % 2**bits


def scale(byte):
    """The float16 with this byte on top, under its sign, over 2^8."""
    exponent, fraction = byte // 8, byte % 8 / 8
    if exponent == 31:
        return float("nan") if fraction else float("inf")
    return (fraction if exponent == 0 else 1 + fraction) * 2.0 ** (max(exponent, 1) - 15 - 8)


def read_group(run, words, own):
    """One token's run and words of one group, lists of bytes -> its latents."""
    latents = []
    for rank, bits, at, scale_at in places(own):
        if bits == 16:
            latents += torch.tensor(run[at : at + 2 * rank], dtype=torch.uint8).view(torch.float16).double().tolist()
        else:
            step = scale(words[scale_at])
            latents += [(code(run, at, rank, bits, i) - (2**bits - 1) / 2) * step for i in range(rank)]
    return latents


def read_cache(cache, formats):
    """[N, P, bytes] uint8 -> plain rows [N, P, width] float64."""
    rows = []
    for run, words in zip(*(x.flatten(0, 1).tolist() for x in sections(cache, formats))):
        latents = []
        for own in formats:
            n, m = sizes(own)
            latents += read_group(run[:n], words[:m], own)
            run, words = run[n:], words[m:]
        assert not run and not words
        rows.append(latents)
    return torch.tensor(rows, dtype=torch.float64).unflatten(0, cache.shape[:2])


def plain(problem):
    """A problem of cases.make whose latents are plain and the same, in float64."""
    layer, q, k_cache, v_cache, kwargs = problem
    k_side, wide = layer.values if layer.shared else layer.keys, layer.to(dtype=torch.float64)
    k_cache = read_cache(k_cache, k_side.format) if k_side.format else k_cache.double()
    if v_cache is not None:
        v_cache = read_cache(v_cache, layer.values.format) if layer.values.format else v_cache.double()
    keys, values = (replace(side, format=None) for side in (wide.keys, wide.values))
    if (near := kwargs.get("near")) is not None:
        kwargs = kwargs | {"near": replace(near, keys=near.keys.double(), values=near.values.double())}
    return replace(wide, keys=keys, values=values), q.double(), k_cache, v_cache, kwargs
