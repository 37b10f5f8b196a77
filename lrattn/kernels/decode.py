"""Decode: scores and values in one pass or in two, then combine; as many sequences and tokens at a time as fit."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrattn.kernels import launch, plan
from lrattn.kernels.absorb import absorb_queries, absorbed_scores
from lrattn.kernels.arguments import Keys, Rule, Tokens, Values
from lrattn.kernels.combine import combine
from lrattn.kernels.fused_absorbed import fused_absorbed
from lrattn.kernels.fused_rebuilt import fused_rebuilt
from lrattn.kernels.merge import merge
from lrattn.kernels.plan import Cut
from lrattn.kernels.project import project
from lrattn.kernels.scores import latent_scores, relative, turn_queries
from lrattn.kernels.values import latent_values
from lrattn.shapes import round_up


class Call(NamedTuple):
    """What is attended with, and to."""

    q: Tensor  # [B, S, Hq, D]
    ck: Tensor  # [N, P, width]
    cv: Tensor | None  # [N, P, width]; None: a row serves both
    keys: Keys
    values: Values
    tokens: Tokens
    rule: Rule

    def of(self, some: slice) -> "Call":
        """The same for some of the sequences."""
        return self._replace(q=self.q[some], tokens=self.tokens.of(some))


class Workspace(NamedTuple):
    """Temporaries of the sequences taken at a time, B of them."""

    x: Any  # [B, tiles, Hq S, 2, D / 2] queries by tile, in q's dtype; one tile where none are turned back, or None
    s: Any  # [B, Hq S, tokens] float32 scores, or None
    y: Tensor  # [B, slots, Hq S, Rv] float32 partial results, a slot each; one more to merge, two for chunks of tokens
    lse: Tensor  # [B, slots, Hq S padded] float32

    @classmethod
    def allocate(cls, q: Tensor, size: Cut, rank: int, query_tiles: int) -> "Workspace":
        rows, half = q.shape[1] * q.shape[2], launch.block_d(q.shape[3]) // 2
        slots = size.splits + (size.splits > plan.COMBINED if size.tiles >= size.total else 2)
        return cls(
            q.new_empty(size.batch, query_tiles, rows, 2, half) if query_tiles else None,
            None if size.fused else q.new_empty(size.batch, rows, size.tiles * launch.BLOCK_T, dtype=torch.float32),
            q.new_empty(size.batch, slots, rows, rank, dtype=torch.float32),
            # every row of splits at a multiple of 16, whatever the number of splits: one compilation
            q.new_empty(size.batch, slots, round_up(rows, 16), dtype=torch.float32),
        )

    def of(self, n: int) -> "Workspace":
        return Workspace._make(None if x is None else x[:n] for x in self)


def decode_attention(
    call: Call, sinks: Tensor | None, wo: Tensor | None, form: str, num_splits: int, workspace_limit: int, out: Tensor,
    lse: Tensor,
) -> None:  # fmt: skip
    """q [B, S, Hq, D] -> out [B, S, Hq, Rv], [B, S, Hq, D] or [B, S, E] by `form`, lse [B, S, Hq]."""
    q, keys, values = call.q, call.keys, call.values
    if not q.numel():
        return
    batch = q.shape[0]
    turned = relative(keys, call.tokens, q.dtype)
    device = launch.name(q.device)
    one_pass = plan.fused(q.shape[1] * q.shape[2], q.dtype, device, keys.sizes, values.sizes, turned)
    size = plan.cut(
        *q.shape[:3], q.dtype, device, launch.processors(q.device), keys.sizes, values.sizes, one_pass,
        call.tokens.bound, call.rule.window, num_splits, workspace_limit, turned,
    )  # fmt: skip
    work = Workspace.allocate(q, size, values.sizes.rank, 0 if keys.turns is None else size.tiles if turned else 1)
    heads = torch.empty_like(q[: size.batch], memory_format=torch.contiguous_format) if form == "hidden" else None
    for b in range(0, batch, size.batch):
        results = out, lse
        if size.batch < batch:
            some = slice(b, min(b + size.batch, batch))
            n = some.stop - b
            results = out[some], lse[some]
            parts = _attend(call.of(some), size, turned, work.of(n))
        else:
            parts = _attend(call, size, turned, work)
        if heads is None or wo is None:
            combine(*parts, values, *results, sinks, up=form == "heads")
        else:
            found = heads[: len(results[0])]
            combine(*parts, values, found, results[1], sinks, up=True)
            project(found, wo, results[0])


def _attend(call: Call, size: Cut, turned: bool, work: Workspace) -> tuple[Tensor, Tensor]:
    """Partial results [B, ., Hq S, Rv] and their lse [B, ., Hq S], to be merged.

    Where tokens go in several chunks, their splits are written to slots 1 .. n of n + 2, and what is merged so far
    moves between the slots at the two ends, so that what is to be merged is always one run of slots.
    """
    absorbed = absorb_queries(call.q, call.keys) if call.keys.turns is None and size.total else None
    y, lse = work.y, work.lse
    if size.tiles >= size.total:
        if not size.total:
            return y[:, :0], lse[:, :0]
        if size.splits <= plan.COMBINED:
            _attend_tiles(call, size, turned, work, absorbed, y, lse, 0)
            return y, lse
        _attend_tiles(call, size, turned, work, absorbed, y[:, :-1], lse[:, :-1], 0)
        return merge(y, lse, call.values, y.shape[2])
    rows, heads = y.shape[2], (call.q.shape[2], call.q.shape[1])
    new = live = slice(1, size.splits + 1)
    for first in range(0, size.total, size.tiles):
        _attend_tiles(call, size, turned, work, absorbed, y[:, new], lse[:, new], first)
        if first + size.tiles < size.total:
            after = size.splits + 1 if live.start == 0 or first == 0 else 0
            so_far, so_far_lse = (x[:, after, :rows].unflatten(1, heads).transpose(1, 2) for x in (y, lse))
            combine(y[:, live], lse[:, live], call.values, so_far, so_far_lse)
            live = slice(0, size.splits + 1) if after == 0 else slice(1, size.splits + 2)
    return y[:, live], lse[:, live]


def _attend_tiles(
    call: Call, size: Cut, turned: bool, work: Workspace, absorbed: tuple[Tensor, Tensor | None] | None, y: Tensor,
    lse: Tensor, first: int,
) -> None:  # fmt: skip
    """Tiles first .. first + size.tiles of every sequence, to y [B, splits, Hq S, Rv] and lse [B, splits, Hq S]."""
    q, ck, cv, keys, values, tokens, rule = call
    num_queries = q.shape[1]
    if absorbed is None and (turned or not first):
        turn_queries(q, keys, tokens, rule, work.x, first, turned)
    if size.fused and absorbed is not None:
        fused_absorbed(
            *absorbed, num_queries, ck, cv, keys, values, tokens, rule, y, lse, first, size.tiles, size.fused
        )  # fmt: skip
    elif size.fused:
        fused_rebuilt(
            work.x, num_queries, ck, cv, keys, values, tokens, rule, y, lse, first, size.tiles, turned, size.fused
        )  # fmt: skip
    else:
        if absorbed is not None:
            absorbed_scores(
                *absorbed, num_queries, ck, keys, tokens, rule, work.s, first, size.tiles, size.parts
            )  # fmt: skip
        else:
            latent_scores(
                work.x, num_queries, ck, keys, tokens, rule, work.s, first, size.tiles, size.parts, turned
            )  # fmt: skip
        latent_values(
            work.s, num_queries, ck if cv is None else cv, values, tokens, rule, y, lse, first, size.tiles
        )  # fmt: skip
