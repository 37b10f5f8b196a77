"""Decode in three steps, scores, values, combine, for as many sequences and tokens at a time as the workspace holds."""

from typing import NamedTuple

import torch
from torch import Tensor

from lrattn.kernels import launch
from lrattn.kernels.absorb import absorb_queries, absorbed_scores
from lrattn.kernels.arguments import Keys, Rule, Tokens, Values
from lrattn.kernels.combine import combine
from lrattn.kernels.plan import Cut, cut
from lrattn.kernels.project import project
from lrattn.kernels.scores import latent_scores, relative, turn_queries
from lrattn.kernels.values import latent_values
from lrattn.shapes import round_up


class Workspace(NamedTuple):
    """Temporaries of the sequences taken at a time, B of them."""

    x: Tensor  # [B, tiles, Hq S, 2, D / 2] queries by tile, in q's dtype; one tile where none are turned back
    s: Tensor  # [B, Hq S, tokens] float32 scores
    y: Tensor  # [B, splits + 2, Hq S, Rv] float32 partial results
    lse: Tensor  # [B, splits + 2, Hq S] float32

    @classmethod
    def allocate(cls, q: Tensor, size: Cut, rank: int, query_tiles: int) -> "Workspace":
        rows, head_dim = q.shape[1] * q.shape[2], launch.block_d(q.shape[3])
        return cls(
            q.new_empty(size.batch, query_tiles, rows, 2, head_dim // 2),
            q.new_empty(size.batch, rows, size.tiles * launch.BLOCK_T, dtype=torch.float32),
            q.new_empty(size.batch, size.splits + 2, rows, rank, dtype=torch.float32),
            # every row of splits at a multiple of 16, whatever the number of splits: one compilation
            q.new_empty(size.batch, size.splits + 2, round_up(rows, 16), dtype=torch.float32)[:, :, :rows],
        )

    def of(self, n: int) -> "Workspace":
        return Workspace(*(x[:n] for x in self))


def decode_attention(
    q: Tensor, k_cache: Tensor, v_cache: Tensor | None, keys: Keys, values: Values, tokens: Tokens, rule: Rule,
    sinks: Tensor | None, wo: Tensor | None, form: str, num_splits: int, workspace_limit: int, out: Tensor,
    lse: Tensor,
) -> None:  # fmt: skip
    """q [B, S, Hq, D] -> out [B, S, Hq, Rv], [B, S, Hq, D] or [B, S, E] by `form`, lse [B, S, Hq]."""
    batch, num_queries, query_heads, _ = q.shape
    if not q.numel():
        return
    size = cut(
        batch, num_queries, query_heads, q.dtype, q.device, keys, values, tokens.bound, rule, num_splits,
        workspace_limit,
    )  # fmt: skip
    turned = relative(keys, tokens, q.dtype)
    work = Workspace.allocate(q, size, values.rank, 0 if keys.turns is None else size.tiles if turned else 1)
    heads = torch.empty_like(q[: size.batch], memory_format=torch.contiguous_format) if form == "hidden" else out
    cv = k_cache if v_cache is None else v_cache
    for b in range(0, batch, size.batch):
        some = slice(b, min(b + size.batch, batch))
        n = some.stop - b
        parts = _attend(q[some], k_cache, cv, keys, values, tokens.of(some), rule, size, turned, work.of(n))
        if wo is None or form != "hidden":
            combine(*parts, values, out[some], lse[some], sinks, up=form == "heads")
        else:
            combine(*parts, values, heads[:n], lse[some], sinks, up=True)
            project(heads[:n], wo, out[some])


def _attend(
    q: Tensor, ck: Tensor, cv: Tensor, keys: Keys, values: Values, tokens: Tokens, rule: Rule, size: Cut,
    turned: bool, work: Workspace,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Partial results [B, ., Hq S, Rv] and their lse [B, ., Hq S], to be merged.

    Splits are written to slots 1 .. n of n + 2. Where tokens go in several chunks, what is merged so far moves
    between the slots at the two ends, so that what is to be merged is always one run of slots.
    """
    x, s, y, lse = work
    heads = (q.shape[2], q.shape[1])
    new = slice(1, size.splits + 1)
    live = new if size.total else slice(0, 0)
    if keys.turns is None:
        a, constant = absorb_queries(q, keys)
    for first in range(0, size.total, size.tiles):
        if keys.turns is None:
            absorbed_scores(a, constant, q.shape[1], ck, keys, tokens, rule, s, first, size.tiles, size.parts)
        else:
            if turned or not first:
                turn_queries(q, keys, tokens, rule, x, first, turned)
            latent_scores(x, q.shape[1], ck, keys, tokens, rule, s, first, size.tiles, size.parts, turned)
        latent_values(s, q.shape[1], cv, values, tokens, rule, y[:, new], lse[:, new], first, size.tiles)
        if first + size.tiles < size.total:
            after = size.splits + 1 if live.start == 0 or first == 0 else 0
            so_far, so_far_lse = (part[:, after].unflatten(1, heads).transpose(1, 2) for part in (y, lse))
            combine(y[:, live], lse[:, live], values, so_far, so_far_lse)
            live = slice(0, size.splits + 1) if after == 0 else slice(1, size.splits + 2)
    return y[:, live], lse[:, live]
