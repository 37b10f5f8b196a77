"""How a decode call is cut: sequences and tiles at a time, parts of the tiles to a program; from shapes alone."""

from typing import NamedTuple

import torch
from triton import cdiv

from lrattn.kernels import launch
from lrattn.kernels.arguments import Keys, Rule, Values
from lrattn.shapes import round_up

WAVES = 2  # programs a multiprocessor should get at least
PART_TILES = 32  # most tiles of one program of the scores, so that ragged batches balance
SPLIT_TILES = 4  # fewest tiles of a planned split, so that partial results stay small beside the latents
LARGEST_AXIS = 65535  # of a CUDA grid, but for the first
MOST_TILES = 32767  # at a time: times a number of parts they stay below 2^31


class Cut(NamedTuple):
    """Sizes of one call; every number is a bound from shapes, never from lengths on the device."""

    batch: int  # sequences at a time
    total: int  # tiles that a sequence can have
    tiles: int  # tiles at a time
    parts: int  # of those tiles: one to a program of the scores
    splits: int  # of those tiles: one to a program of the values
    nbytes: int  # of temporaries


def cut(
    batch: int, num_queries: int, query_heads: int, dtype: torch.dtype, device: torch.device, keys: Keys,
    values: Values, bound: int, rule: Rule, num_splits: int, limit: int,
) -> Cut:  # fmt: skip
    """The cut of a call with tokens up to `bound`, within `limit` bytes if one tile of one sequence is.

    How the tiles of a sequence are cut into splits depends on the batch only where num_splits is 0.
    """
    device_name, rows = launch.name(device), query_heads * num_queries
    per_group = rows // keys.groups
    per_head = rows // keys.num_heads
    if keys.turns is None:
        block_q = launch.absorbed_scores(keys.rank, per_group, dtype.itemsize, device_name).block_q
        score_programs = cdiv(per_group, block_q) * keys.groups
    else:
        score_programs = cdiv(per_head, launch.block_q(per_head)) * keys.num_heads
    per_group = rows // values.groups
    choice = launch.latent_values(values.rank, per_group, dtype.itemsize, device_name)
    value_programs = cdiv(values.rank, choice.block_r) * cdiv(per_group, choice.block_q) * values.groups

    total = cdiv(bound, launch.BLOCK_T)
    if rule.window:  # a window may begin and end inside a tile
        total = min(total, cdiv(rule.window + num_queries - 2, launch.BLOCK_T) + 1)
    fill = WAVES * launch.processors(device)
    per_split = (rows * values.rank + round_up(rows, 16)) * 4  # a partial result and its lse
    wanted = min(cdiv(fill, batch * value_programs), total // SPLIT_TILES, limit // (2 * per_split))
    splits = num_splits or max(1, wanted)
    fixed = rows * (keys.rank + 1) * 4 if keys.turns is None else 0  # absorbed queries
    fixed += rows * keys.head_dim * dtype.itemsize  # heads before the output projection
    fixed += (splits + 2) * per_split
    per_tile = rows * launch.BLOCK_T * 4
    if keys.turns is not None:  # queries, turned back for each tile
        per_tile += rows * launch.block_d(keys.head_dim) * dtype.itemsize
    tiles = max(1, min(total, (limit - fixed) // per_tile, MOST_TILES))
    held = fixed + tiles * per_tile
    at_once = max(1, min(batch, limit // held, LARGEST_AXIS))
    parts = max(cdiv(tiles, PART_TILES), min(cdiv(fill, at_once * score_programs), tiles // 2), 1)
    return Cut(at_once, total, tiles, parts, splits, at_once * held)
