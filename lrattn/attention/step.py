"""The kernels of a decode step on a GPU that need not be here: their bytes, products and microseconds.

Everything here is [estimated]; no kernel is run. Kernels and splits are those that `plan` chooses from shapes. A step,
of one new token a sequence, is the sum over its kernels of

    max(bytes / memory rate, products / tensor rate) / share  +  us for each launch

with `share` and `us` of REACHED, chosen by hand to agree with what bench/results has of an H100. Each of these figures
is within a factor of 1.35 of its estimate (tests/attention/test_outlook.py):

    attend and absorb, by a band    simulated_calls.json [simulated], whole calls
    attend, absorbed; attend_packed simulated.json [simulated], the pass alone, of rank 256
    the others                      launches_gpu.json [measured], whole steps by the kernels of then: merge and
                                    combine are one now, queries were absorbed once, and not for each chunk
    attend_near, absorb_packed      nothing: as other small kernels

Packed rows that queries are absorbed for were measured by kernels of then alone, which took 2 to 9 times as long: those
are left out. The kernel that writes queries took 2 to 3 times as long on an H100 as it was simulated. What none of
these figures has is held by nothing: narrow ranks, 2 bits alone, absorbing queries for chunks, other GPUs.

Bytes are latents, once for each pass that reads them; bases; the dense window; scores between two passes; partial
results, once; queries made ready, as they are written, and again where L2 does not hold them. Products are 2 a
multiplication with its sum, as tensor cores do them: query rows padded, ranks as the largest of a layer. Left out are
the model's projections, and new tokens' own latents and their writing.
"""

from __future__ import annotations

import math
from typing import NamedTuple

from lrattn.attention.gpus import GPU
from lrattn.factors.layer import LayerFactors
from lrattn.factors.operands import KeySizes
from lrattn.factors.shapes import cdiv
from lrattn.kernels import launch, plan
from lrattn.kernels.arguments import far
from lrattn.kernels.pieces import parts

WORKSPACE = 256 << 20  # bytes, the default of decode_attention
CACHED = 30 << 20  # bytes of queries that stay in L2, as in an H100's
BOUNDS = ("memory", "tensor cores", "launches")


class Reached(NamedTuple):
    """share: of the memory's or the tensor cores' rate, whichever binds. us: of a launch, beside. by: what both agree
    with."""

    share: float
    us: float
    by: str


REACHED = {
    "absorb": Reached(0.55, 2.0, "simulated"),
    "absorb, whole": Reached(0.3, 2.0, "measured"),
    "absorb, none": Reached(0.27, 1.5, "measured"),
    "absorb_packed": Reached(0.3, 2.0, "guessed"),
    "attend": Reached(0.82, 7.5, "simulated"),
    "attend, packed": Reached(0.38, 7.5, "simulated"),
    "attend, absorbed": Reached(0.965, 3.0, "simulated"),
    "attend_packed": Reached(0.75, 9.0, "simulated"),
    "attend_rebuilt": Reached(0.25, 8.0, "measured"),
    "attend_rebuilt, one pass": Reached(0.17, 8.0, "measured"),
    "attend_rebuilt, packed": Reached(0.115, 20.0, "measured"),
    "latent_values": Reached(0.78, 5.0, "measured"),
    "attend_near": Reached(0.3, 5.0, "guessed"),
    "combine": Reached(0.5, 12.0, "measured"),
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
        share, us, _ = REACHED[self.kind]
        memory, tensor = (self.latents + self.others) / gpu.memory, self.flops / gpu.tensor
        busy = max(memory, tensor) / share * 1e6
        return busy * (memory >= tensor), busy * (memory < tensor), us * self.launches


class Step(NamedTuple):
    """Of a layer. size: how it is cut; None where all tokens are in the dense window."""

    size: plan.Cut | None
    kernels: list[Kernel]
    window: int  # bytes of the dense window that are read

    def times(self, gpu: GPU) -> list[float]:
        """Microseconds, as BOUNDS."""
        return [sum(times) for times in zip(*(kernel.times(gpu) for kernel in self.kernels), strict=True)]


def step(
    layer: LayerFactors, query_heads: int, gpu: GPU, context: int, batch: int, near: tuple[int, int] = (0, 0)
) -> Step:
    """Of `batch` sequences of `context` tokens each. near: last and first of them that are read as they are."""
    recent, sinks = near
    keys, values = layer.operands.keys.sizes, layer.operands.values.sizes
    bound, _ = far(context, 0, recent, sinks)
    size, kernels, merges, partial = None, list[Kernel](), 1, 0
    if bound:
        what = layer.dtype, gpu.family, gpu.processors, keys, values
        size = plan.cut(batch, 1, query_heads, *what, False, bound, 0, 0, WORKSPACE, any(near))
        kernels = _far(layer, size, query_heads, gpu, bound - sinks, batch)
        merges, partial = kernels[0].launches, batch * size.splits * query_heads * values.rank * 4
    tokens = batch * min(context, recent + sinks)
    window = tokens * 2 * layer.num_kv_heads * layer.head_dim * layer.dtype.itemsize
    if window:
        flops = tokens * _products(2 * layer.head_dim, layer.num_kv_heads, query_heads)
        kernels.append(Kernel("attend_near", "attend_near", merges, 0, window, flops))
    basis = layer.operands.values.rows.numel() * layer.dtype.itemsize
    kernels.append(Kernel("combine", "combine", merges, 0, partial + merges * basis, 0))
    return Step(size, kernels, window)


def _far(
    layer: LayerFactors, size: plan.Cut, query_heads: int, gpu: GPU, tokens: int, batch: int
) -> list[Kernel]:  # fmt: skip
    """Kernels of the latents. tokens: of a sequence, that are seen by them."""
    keys, values = layer.operands.keys.sizes, layer.operands.values.sizes
    launches, seen = cdiv(batch, size.batch) * cdiv(size.total, size.tiles), batch * tokens
    queries = _queries(layer, size, query_heads, batch, launches)
    read = queries.others // launches
    others = queries.others if read > CACHED else 0
    owners, name, kind = keys.groups, "attend", "attend, absorbed"
    if size.planes.keys:
        name = kind = "attend_packed"
    elif size.banded:
        owners, kind = keys.num_heads // size.banded.heads, "attend, packed" if keys.packed else "attend"
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
    name = "absorb_packed" if size.planes.keys else "absorb"
    kind = name + ("" if size.banded or size.planes.keys else ", whole" if keys.absorbed else ", none")
    x = 4 if size.banded and size.banded.by_lane else 2
    sizes = ((shapes.x, x), (shapes.a, 2), (shapes.terms, 4))
    written = sum(math.prod(shape[1:]) * itemsize for shape, itemsize in sizes if shape)
    spans = batch * cdiv(size.total, size.tiles)
    blocks, products = (shapes.a or shapes.x)[1], 2 * query_heads * keys.head_dim * keys.rank * (keys.terms or 1)
    flops = 0 if shapes.a is None and not size.planes.keys else spans * blocks * products
    return Kernel(name, kind, launches, 0, spans * written, flops)


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
