"""What a decode step would take of a GPU that need not be here: its kernels, bytes, products and microseconds.

Everything here is [estimated]; no kernel is run. Kernels and splits are those that `plan` chooses from shapes. A step,
of one new token a sequence, is the sum over its kernels of

    max(bytes / memory rate, products / tensor rate) / share  +  us for each launch

with `share` and `us` of REACHED, one pair for each kernel and way. They were chosen by hand to agree with
bench/results of an H100, and every figure there is within a factor of 1.35 of its estimate (tests/attention):

    attend, absorb_band         simulated_calls.json [simulated], whole calls
    attend_absorbed, _packed    simulated.json [simulated], one pass, ranks 256
    the others                  launches_gpu.json [measured], kernels and steps on keys that are rebuilt; merge and
                                combine, which were two kernels, are one
    attend_near                 nothing: as other small kernels

What those do not have, such as narrow ranks, 2 bits alone, or other GPUs, is not held by anything. Bytes are latents,
once for each pass that reads them; bases; the dense window; scores between two passes; partial results; queries made
ready, as written, and as read again where L2 does not hold them. Products are 2 a multiplication with its sum, as
tensor cores do them: query rows padded, ranks as the largest of a layer. A dense 16-bit cache is its bytes at DENSE of
the memory rate. Neither has the projections of the model, or of new tokens to latents.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from lrattn.attention.gpus import GPU, GPUS
from lrattn.factors.layer import LayerFactors
from lrattn.factors.operands import KeySizes, ValueSizes
from lrattn.factors.record import Factors
from lrattn.factors.shapes import cdiv
from lrattn.factors.summary import aligned, band_of
from lrattn.kernels import launch, plan
from lrattn.kernels.arguments import far
from lrattn.kernels.pieces import parts

DENSE = 0.92  # of the memory rate, that a kernel of a dense cache reaches
WORKSPACE = 256 << 20  # bytes, the default of decode_attention
CACHED = 30 << 20  # bytes of queries that stay in L2, as in an H100's
FAMILIES = sorted({gpu.family for gpu in GPUS.values()})
BOUNDS = ("memory", "tensor cores", "launches")


class Reached(NamedTuple):
    """share: of the memory's or the tensor cores' rate, whichever binds. us: of a launch, beside."""

    share: float
    us: float


REACHED = {
    "absorb_band": Reached(0.7, 2.0),
    "absorb_queries": Reached(0.3, 2.0),
    "turn_queries": Reached(0.27, 1.5),
    "attend": Reached(0.82, 7.5),
    "attend_absorbed": Reached(0.79, 9.0),
    "attend_packed": Reached(0.75, 9.0),
    "attend_rebuilt": Reached(0.25, 8.0),
    "attend_rebuilt, one pass": Reached(0.17, 8.0),
    "attend_rebuilt, packed": Reached(0.12, 20.0),
    "latent_values": Reached(0.78, 5.0),
    "attend_near": Reached(0.3, 5.0),
    "combine": Reached(0.5, 12.0),
}


class Kernel(NamedTuple):
    """All launches of a kernel in a step. kind: of REACHED."""

    name: str
    kind: str
    launches: int
    latents: int  # bytes of them
    others: int  # bytes of all else
    flops: int

    def times(self, gpu: GPU) -> tuple[float, float, float]:
        """Microseconds, as BOUNDS: those of what binds, and those of launches."""
        share, us = REACHED[self.kind]
        memory, tensor = (self.latents + self.others) / gpu.memory, self.flops / gpu.tensor
        busy = max(memory, tensor) / share * 1e6
        return busy * (memory >= tensor), busy * (memory < tensor), us * self.launches


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
    if gpu not in GPUS:
        raise ValueError(f"device: expected one of {', '.join(GPUS)}, got {gpu!r}")
    for name, n in (("context", context), ("batch", batch)):
        if n < 1:
            raise ValueError(f"{name}: expected at least 1, got {n}")
    for layer in factors.layers:
        if query_heads < 1 or query_heads % layer.num_kv_heads:
            raise ValueError(f"query-heads: expected a multiple of Hkv={layer.num_kv_heads}, got {query_heads}")
        if layer.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"dtype: expected bfloat16 or float16, got {str(layer.dtype).removeprefix('torch.')}")
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


def layer_outlook(
    layer: LayerFactors, query_heads: int, gpu: GPU, context: int, batch: int, near: tuple[int, int] = (0, 0)
) -> dict[str, Any]:
    """A step of one layer [estimated].

    way: in words. not_by_a_band: why keys before RoPE are rebuilt whole, else None. binds: of BOUNDS, what takes most
    of the time. latent_bytes, window_bytes, other_bytes: that are read, or written for a later kernel.
    """
    recent, sinks = near
    bound, _ = far(context, 0, recent, sinks)
    way, splits, kernels, why = "the dense window alone", 0, list[Kernel](), None
    held = layer.num_kv_heads * layer.head_dim * 4  # bytes of a token's keys and values
    window = batch * (min(context, recent + sinks) if recent or sinks else 0) * held
    if bound:
        size = _cut(layer, query_heads, gpu, bound, batch, bool(window))
        way, splits, kernels = _way(layer, size), size.splits, _far(layer, size, query_heads, gpu, bound - sinks, batch)
        why = None if layer.absorbed or size.banded else unbanded(layer, query_heads, gpu)
    merges, latents = kernels[0].launches if kernels else 1, sum(kernel.latents for kernel in kernels)
    if window:
        rows = _products(2 * layer.head_dim, layer.num_kv_heads, query_heads)
        kernels.append(Kernel("attend_near", "attend_near", merges, 0, window, window // held * rows))
    partial = batch * splits * query_heads * layer.operands.values.sizes.rank * 4
    basis = layer.operands.values.rows.numel() * 2
    kernels.append(Kernel("combine", "combine", merges, 0, partial + merges * basis, 0))
    shares = [sum(times) for times in zip(*(kernel.times(gpu) for kernel in kernels), strict=True)]
    us, dense = sum(shares), batch * context * held / (DENSE * gpu.memory) * 1e6
    return {
        "way": way,
        "not_by_a_band": why,
        "splits": splits,
        "latent_bytes": latents,
        "window_bytes": window,
        "other_bytes": sum(kernel.others for kernel in kernels) - window,
        "flops": sum(kernel.flops for kernel in kernels),
        "us": us,
        "dense_us": dense,
        "dense_over_it": dense / us,
        "binds": BOUNDS[shares.index(max(shares))],
        "kernels": [
            {"kernel": k.name, "launches": k.launches, "bytes": k.latents + k.others, "flops": k.flops,
             "us": sum(k.times(gpu))}
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

    def taken(rows: int = rows, family: str = gpu.family, values: ValueSizes = values) -> bool:
        return plan.banded(rows, layer.dtype, family, keys, values) is not None

    if taken(values=values._replace(packed=())):
        return "values are packed"
    if taken(rows=1):
        return f"not for {rows} query heads of a kv head, in {keys.terms} terms"
    if others := [family for family in FAMILIES if taken(family=family)]:
        return f"not on {gpu.family}, but on {' and '.join(others)}"
    return f"not for ranks {keys.rank} and {values.rank} on {gpu.family}"


def _cut(layer: LayerFactors, query_heads: int, gpu: GPU, bound: int, batch: int, near: bool) -> plan.Cut:
    keys, values = layer.operands.keys.sizes, layer.operands.values.sizes
    what = layer.dtype, gpu.family, gpu.processors, keys, values
    return plan.cut(batch, 1, query_heads, *what, False, bound, 0, 0, WORKSPACE, near)


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
    return ", ".join([*told, "one pass" if size.fused else "scores and values"])


def _far(
    layer: LayerFactors, size: plan.Cut, query_heads: int, gpu: GPU, tokens: int, batch: int
) -> list[Kernel]:  # fmt: skip
    """Kernels of the latents. tokens: of a sequence, that are seen by them."""
    keys, values = layer.operands.keys.sizes, layer.operands.values.sizes
    launches, seen = cdiv(batch, size.batch) * cdiv(size.total, size.tiles), batch * tokens
    queries = _queries(layer, size, query_heads, batch, launches)
    read = queries.others // launches
    others = queries.others if read > CACHED else 0
    name = "attend_packed" if size.planes.keys else "attend" if size.banded else "attend_absorbed"
    owners, kind = keys.groups, name
    if size.banded:
        owners = keys.num_heads // size.banded.heads
    elif not keys.absorbed:
        name, owners = "attend_rebuilt", keys.num_heads
        kind = name + (", packed" if keys.packed else ", one pass" if size.fused else "")
    if not keys.absorbed:
        others += launches * layer.operands.keys.rows.numel() * layer.dtype.itemsize
    scores = _score_products(keys, query_heads, size)
    if size.fused:
        flops = seen * (scores + _products(values.rank, owners, query_heads))
        return [queries, Kernel(name, kind, launches, seen * layer.bytes_per_token, others, flops)]
    held, written = layer.row_side.latent_bytes, seen * query_heads * 4
    if layer.shared:  # keys are the first columns of a row
        held = held * layer.keys.width // layer.values.width
    if size.planes.values:
        second, times = "attend_packed", len(parts(values))
    else:
        rows = query_heads // values.groups
        choice = launch.latent_values(gpu.family, layer.dtype.itemsize, rank=values.rank, rows=rows)
        second, times = "latent_values", cdiv(values.rank, choice.block_r)
    summed = seen * _products(values.rank, values.groups, query_heads)
    return [
        queries,
        Kernel(name, kind, launches, seen * held, others + written, seen * scores),
        Kernel(second, second, launches, seen * layer.values.latent_bytes, times * written, summed),
    ]


def _queries(layer: LayerFactors, size: plan.Cut, query_heads: int, batch: int, launches: int) -> Kernel:
    """The kernel that makes queries ready: what it writes, and the products of absorbing."""
    keys, shapes = layer.operands.keys.sizes, size.shapes
    name = "absorb_band" if size.banded else "absorb_queries" if keys.absorbed else "turn_queries"
    x = 4 if size.banded and size.banded.by_lane else 2
    sizes = ((shapes.x, x), (shapes.a, 2), (shapes.terms, 4))
    written = sum(math.prod(shape[1:]) * itemsize for shape, itemsize in sizes if shape)
    spans = batch * cdiv(size.total, size.tiles)
    blocks, products = (shapes.a or shapes.x)[1], 2 * query_heads * keys.head_dim * keys.rank * (keys.terms or 1)
    flops = 0 if name == "turn_queries" else spans * blocks * products
    return Kernel(name, name, launches, 0, spans * written, flops)


def _products(columns: int, owners: int, query_heads: int) -> int:
    """Of a token's columns in so many programs, each with its share of the query rows."""
    rows = query_heads // owners
    block = launch.block_q(rows)
    return 2 * columns * owners * cdiv(rows, block) * block


def _score_products(keys: KeySizes, query_heads: int, size: plan.Cut) -> int:
    """Of a token's keys: to rebuild them, and with queries."""
    if size.banded:
        heads, rows, by_lane = size.banded.heads, size.banded.rows, size.banded.by_lane
        fast, owners = sum(size.banded.fast), keys.num_heads // heads
        met = 0 if by_lane else 2 * fast * heads * rows  # by lane they are sums beside the products
        return owners * (met + 2 * keys.rank * (fast * heads + rows * keys.terms))
    if keys.absorbed:
        return _products(keys.rank, keys.groups, query_heads)
    rebuilt = 2 * keys.num_heads * keys.head_dim * keys.rank
    return rebuilt + _products(keys.head_dim, keys.num_heads, query_heads)


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
    beside = "" if results["device"] == "h100" else f", not of a {results['device']}"
    lines.append(f"shares of the rates and costs of launches are of an H100{beside}, in part simulated")
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
