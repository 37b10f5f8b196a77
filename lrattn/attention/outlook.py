"""What a decode step of a model on its latents would take of a GPU that need not be here [estimated].

A step of each layer is that of `step`, which says what the figures rest on; beside it stands a dense 16-bit cache, as
its bytes at DENSE of the memory rate.
"""

from __future__ import annotations

from typing import Any

import torch

from lrattn.attention.gpus import GPU, GPUS
from lrattn.attention.step import BOUNDS, REACHED, step
from lrattn.factors.layer import LayerFactors
from lrattn.factors.record import Factors
from lrattn.factors.summary import aligned, band_of
from lrattn.kernels import plan

DENSE = 0.92  # of the memory rate, that a kernel of a dense cache reaches
FAMILIES = sorted({gpu.family for gpu in GPUS.values()})


def outlook(factors: Factors, query_heads: int, gpu: str, context: int, batch: int) -> dict[str, Any]:
    """A decode step of every layer and of all together, beside a dense cache's [estimated].

    Args:
        factors: of bfloat16 or float16. Their window, `near`, is part of the step.
        query_heads: Hq.
        gpu: one of GPUS.
        context: tokens of each sequence, all of which every layer sees. batch: sequences.

    Returns: times in microseconds; bytes; of each layer what `layer_outlook` gives, under "layers".
    Raises: ValueError naming the argument, what was expected and what came.
    """
    check(gpu, context, batch, factors.layers[0].dtype)
    if factors.select is not None:
        raise ValueError(f"plan: expected factors of which a cache keeps every token, got select={factors.select}")
    for layer in factors.layers:
        if query_heads < 1 or query_heads % layer.num_kv_heads:
            raise ValueError(f"query-heads: expected a multiple of Hkv={layer.num_kv_heads}, got {query_heads}")
    layers = [layer_outlook(layer, query_heads, GPUS[gpu], context, batch, factors.near) for layer in factors.layers]
    names = ("latent_bytes", "window_bytes", "other_bytes", "flops", "us", "dense_us")
    totals = {name: sum(x[name] for x in layers) for name in names}
    return {
        "method": factors.method,
        "model": factors.model,
        "figures": "estimated",
        "device": gpu,
        **GPUS[gpu]._asdict(),
        "memory": GPUS[gpu].memory,
        "dtype": str(factors.layers[0].dtype).removeprefix("torch."),
        "query_heads": query_heads,
        "context": context,
        "batch": batch,
        "near": factors.near,
        "positions": min((n for n in map(_positions, factors.layers) if n), default=None),
        **totals,
        "dense_over_it": totals["dense_us"] / totals["us"],
        "layers": layers,
    }


def check(gpu: str, context: int, batch: int, dtype: torch.dtype) -> None:
    """Raises ValueError for what there is no outlook of."""
    if gpu not in GPUS:
        raise ValueError(f"device: expected one of {', '.join(GPUS)}, got {gpu!r}")
    for name, n in (("context", context), ("batch", batch)):
        if n < 1:
            raise ValueError(f"{name}: expected at least 1, got {n}")
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"dtype: expected bfloat16 or float16, got {str(dtype).removeprefix('torch.')}")


def layer_outlook(
    layer: LayerFactors, query_heads: int, gpu: GPU, context: int, batch: int, near: tuple[int, int] = (0, 0)
) -> dict[str, Any]:
    """A step of one layer [estimated].

    way: in words. not_by_a_band: why keys before RoPE are rebuilt whole, else None. binds: of BOUNDS, what takes most
    of the time. latent_bytes, window_bytes, other_bytes: that are read, or written for a later kernel.
    """
    found = step(layer, query_heads, gpu, context, batch, near)
    size, kernels, shares = found.size, found.kernels, found.times(gpu)
    rebuilt = size is not None and size.banded is None and not layer.absorbed
    us, latents = sum(shares), sum(kernel.latents for kernel in kernels)
    dense = batch * context * 4 * layer.num_kv_heads * layer.head_dim / (DENSE * gpu.memory) * 1e6
    return {
        "way": "the dense window alone" if size is None else _way(layer, size),
        "not_by_a_band": unbanded(layer, query_heads, gpu) if rebuilt else None,
        "splits": 0 if size is None else size.splits,
        "latent_bytes": latents,
        "window_bytes": found.window,
        "other_bytes": sum(kernel.others for kernel in kernels) - found.window,
        "flops": sum(kernel.flops for kernel in kernels),
        "us": us,
        "dense_us": dense,
        "dense_over_it": dense / us,
        "binds": BOUNDS[shares.index(max(shares))],
        "kernels": [
            {"kernel": k.name, "launches": k.launches, "bytes": k.latents + k.others, "flops": k.flops,
             "us": sum(k.times(gpu)), "by": REACHED[k.kind].by}
            for k in kernels
        ],
    }  # fmt: skip


def unbanded(layer: LayerFactors, query_heads: int, gpu: GPU) -> str:
    """Why keys before RoPE do not go by a band: as its rope or its rows have it, or by what a plan takes in its
    place."""
    known = band_of(layer)
    if isinstance(known, str):
        return known
    keys, values = layer.operands.keys.sizes, layer.operands.values.sizes
    rows = query_heads // layer.num_kv_heads

    def taken(rows: int = rows, family: str = gpu.family) -> bool:
        return plan.banded(rows, layer.dtype, family, keys, values) is not None

    if taken(rows=1):
        return f"not for {rows} query heads of a kv head, in {keys.terms} terms"
    if others := [family for family in FAMILIES if taken(family=family)]:
        return f"not on {gpu.family}, but on {' and '.join(others)}"
    ranks = f"ranks {keys.rank} and {values.rank}"
    return f"not for {'packed rows of ' if keys.packed else ''}{ranks} on {gpu.family}"


def _way(layer: LayerFactors, size: plan.Cut) -> str:
    keys, told = layer.operands.keys.sizes, []
    if size.banded:
        told.append(f"by a band, F={keys.fast} T={keys.terms}")
    elif keys.absorbed:
        told.append(f"absorbed, chunks of {keys.chunk}" if keys.chunk else "absorbed")
    else:
        told.append("rebuilt")
    if size.planes.keys or size.planes.values:
        told.append("packed by plane" if size.planes.keys or not keys.packed else "packed, values by plane")
    elif keys.packed:
        told.append("packed")
    return ", ".join([*told, "one pass" if size.fused else "scores and values"])


def _positions(layer: LayerFactors) -> int | None:
    """For how many positions keys hold; None for any, or where it is not known."""
    if layer.rope is None:
        return layer.max_position
    return layer.operands.keys.sizes.max_position * (layer.chunk or 1)


def table(results: dict[str, Any]) -> str:
    """What `outlook` found: a line for each kind of layer, and of the model."""
    recent, sinks = results["near"]
    of_each = dict[str, list[int]]()
    rows = {}
    for i, x in enumerate(results["layers"]):
        row = _row(x, str(x["splits"]), x["binds"], f"{x['way']}: {', '.join(k['kernel'] for k in x['kernels'])}")
        of_each.setdefault(key := str(row), []).append(i)
        rows[key] = row
    shown = [{"layers": _runs(of_each[key])} | row for key, row in rows.items()]
    shown.append({"layers": "model"} | _row(results | {"splits": 0}, "", "", f"{len(results['layers'])} layers"))
    sequences = f"{results['batch']:,} sequence{'s' * (results['batch'] > 1)} of {results['context']:,} tokens"
    lines = [
        f"[estimated] a decode step of attention on {results['device']}, {sequences}, one new token each",
        f"{results['method']}, of {results['model'] or 'a model'}: {results['query_heads']} query heads, "
        f"{results['dtype']}",
        "",
        aligned(shown),
        "",
        f"dense: the bytes of a 16-bit cache at {DENSE:.0%} of {results['memory'] / 1e12:.2f} TB/s",
    ]
    if recent or sinks:
        mb = f"{results['window_bytes'] / 1e6:,.1f} MB"
        lines.append(f"the dense window, last {recent} and first {sinks} tokens, is part of the step: {mb}")
    if (most := results["positions"]) and most < results["context"]:
        lines.append(f"keys hold for positions 0..{most - 1:,} alone, fewer than the context")
    for why in dict.fromkeys(x["not_by_a_band"] for x in results["layers"] if x["not_by_a_band"]):
        own = [i for i, x in enumerate(results["layers"]) if x["not_by_a_band"] == why]
        lines.append(f"not by a band, so that keys are rebuilt whole: {why} (layers {_runs(own)})")
    sources = dict[str, dict[str, None]]()
    for kernel in (kernel for x in results["layers"] for kernel in x["kernels"]):
        sources.setdefault(kernel["by"], {})[kernel["kernel"]] = None
    told = "; ".join(f"{', '.join(names)} {by}" for by, names in sorted(sources.items()))
    lines.append(f"shares of the rates and costs of launches are an H100's: {told}")
    if results["device"] != "h100":
        lines.append(f"nothing was measured or simulated on {results['device']}")
    return "\n".join(lines)


def _row(x: dict[str, Any], splits: str, binds: str, how: str) -> dict[str, str]:
    return {
        "splits": splits,
        "latents MB": f"{x['latent_bytes'] / 1e6:,.1f}",
        "other MB": f"{(x['window_bytes'] + x['other_bytes']) / 1e6:,.1f}",
        "GFLOP": f"{x['flops'] / 1e9:,.1f}",
        "us": f"{x['us']:,.1f}",
        "dense us": f"{x['dense_us']:,.1f}",
        "dense / it": f"{x['dense_over_it']:.2f}",
        "bound by": binds,
        "way": how,
    }


def _runs(numbers: list[int]) -> str:
    """0-3 5 for 0, 1, 2, 3 and 5."""
    runs: list[list[int]] = []
    for n in numbers:
        if runs and n == runs[-1][-1] + 1:
            runs[-1].append(n)
        else:
            runs.append([n])
    return " ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
