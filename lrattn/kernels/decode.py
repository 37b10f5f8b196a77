"""Decode: scores and values in one pass or in two, then combine; as many sequences and tokens at a time as fit."""

import torch
from torch import Tensor

from lrattn.kernels import launch, plan
from lrattn.kernels.absorb import absorb
from lrattn.kernels.absorb_packed import absorb_packed
from lrattn.kernels.arguments import Call, Span
from lrattn.kernels.attend import attend
from lrattn.kernels.attend_packed import attend_packed
from lrattn.kernels.attend_rebuilt import attend_rebuilt
from lrattn.kernels.combine import combine
from lrattn.kernels.near import attend_near
from lrattn.kernels.plan import Cut, Workspace
from lrattn.kernels.project import project
from lrattn.kernels.values import latent_values


def decode_attention(
    call: Call, sinks: Tensor | None, wo: Tensor | None, form: str, num_splits: int, workspace_limit: int, out: Tensor,
    lse: Tensor,
) -> None:  # fmt: skip
    """q [B, S, Hq, D] -> out [B, S, Hq, Rv], [B, S, Hq, D] or [B, S, E] by `form`, lse [B, S, Hq]."""
    q, tokens = call.q, call.tokens
    batch, num_queries, query_heads, _ = q.shape
    if not batch or not num_queries:
        return
    bound, window = call.far
    size = plan.cut(
        batch, num_queries, query_heads, q.dtype, launch.name(q.device), launch.processors(q.device), call.keys.sizes,
        call.values.sizes, tokens.placed_apart, bound, window, num_splits, workspace_limit, tokens.near is not None,
    )  # fmt: skip
    work, wo = _allocate(call, size), wo if form == "hidden" else None
    for b in range(0, batch, size.batch):
        own, own_work, own_out, own_lse = call, work, out, lse
        if size.batch < batch:
            some = slice(b, min(b + size.batch, batch))
            own, own_work, own_out, own_lse = call.of(some), work.of(some.stop - b), out[some], lse[some]
        parts = _attend(own.latents, size, own_work) if bound else range(0)
        if own.tokens.near is not None:
            attend_near(own, own.tokens.near, own_work.near, own_work.near_lse)
        heads = own_out if wo is None else torch.empty_like(own.q, memory_format=torch.contiguous_format)
        combine(
            own_work.y, own_work.lse, parts, call.values, heads, own_lse, sinks, form != "latent", own_work.near,
            own_work.near_lse,
        )  # fmt: skip
        if wo is not None:
            project(heads, wo, own_out)


def _allocate(call: Call, size: Cut) -> Workspace:
    x, a, *rest = size.shapes
    kind = call.q.dtype
    if size.planes.keys is not None and call.q.itemsize == 2:
        kind = torch.float16
    elif size.banded is not None and size.banded.by_lane:
        kind = torch.float32
    queries = x and call.q.new_empty(*x, dtype=kind), a and call.q.new_empty(*a)
    fp32 = call.keys.norms.new_empty  # a shape as numbers, and no dtype: both take time to read
    return Workspace(*queries, *[None if shape is None else fp32(*shape) for shape in rest])


def _attend(call: Call, size: Cut, work: Workspace) -> range:
    """Attends to all tokens. Returns the slots of `work` whose partial results are left to be combined.

    Where tokens go in several spans, their splits are written to slots 1 .. n of n + 2, and what is combined so far
    moves between the slots at the two ends, so that what is to be combined is always one run of slots.
    """
    if not size.total:
        return range(0)
    y, lse, splits = work.y, work.lse, size.splits
    if size.tiles >= size.total:
        _attend_tiles(call, size, work, y, lse, 0)
        return range(splits)
    rows, heads = y.shape[2], (call.q.shape[2], call.q.shape[1])
    live = range(1, splits + 1)
    for first in range(0, size.total, size.tiles):
        _attend_tiles(call, size, work, y[:, 1:], lse[:, 1:], first)
        if first + size.tiles < size.total:
            after = splits + 1 if live.start == 0 or first == 0 else 0
            so_far, so_far_lse = (x[:, after, :rows].unflatten(1, heads).transpose(1, 2) for x in (y, lse))
            combine(y, lse, live, call.values, so_far, so_far_lse)
            live = range(0, splits + 1) if after == 0 else range(1, splits + 2)
    return live


def _attend_tiles(call: Call, size: Cut, work: Workspace, y: Tensor, lse: Tensor, first: int) -> None:
    """Tiles first .. first + size.tiles of every sequence, to slots 0 .. size.splits of y and lse."""
    x, a, terms, codes, way = work.x, work.a, work.terms, size.planes, size.way
    span, scored = Span(first, size.tiles, size.splits), Span(first, size.tiles, size.parts)
    if size.block or not first:  # else they are ready
        if codes.keys is not None:
            absorb_packed(call, x, terms, span, codes.keys)
        elif way is not None:
            absorb(call, x, a, terms, span, way)
    s, own_y, own_lse, own = (None, y, lse, span) if size.fused else (work.s, None, None, scored)
    if codes.keys is not None:
        attend_packed(call, x, terms, s, own_y, own_lse, own, codes.keys)
    elif way is not None and way.terms:
        attend(call, x, a, terms, s, own_y, own_lse, own, way)
    elif way is not None:
        attend_rebuilt(call, x, s, own_y, own_lse, own, way)
    if size.fused:
        return
    if codes.values is not None:
        attend_packed(call, None, None, work.s, y, lse, span, codes.values)
    else:
        latent_values(call, work.s, y, lse, span, size.block_t)
