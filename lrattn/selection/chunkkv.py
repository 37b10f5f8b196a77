"""ChunkKV (arXiv 2502.00299): whole chunks of consecutive tokens, by what the last queries give them.

The probability of a token is the mean over the probe queries, summed over heads; a chunk of 10 scores the mean of its
tokens'. The chunks lie between the first and the recent tokens, which are kept. Every second layer keeps what the
layer before it chose.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrattn.factors.shapes import cdiv
from lrattn.selection.held import Held

CHUNK, REUSE = 10, 2


def kept(held: Held, chunk: int = CHUNK, reuse: int = REUSE) -> Tensor:
    """The chunks that score highest, as many as the budget has room for."""
    if held.index % reuse and held.before is not None:
        return held.before
    assert held.probabilities is not None
    given, fixed, places = held.probabilities.mean(2).sum(1), held.fixed, held.places
    of = ((places - held.sinks).clamp_min(0) // chunk).expand(len(given), -1)
    free = held.live & ~fixed
    count = cdiv(max(given.shape[1] - held.sinks, 1), chunk)
    zeros = given.new_zeros(len(given), count)
    sizes = zeros.scatter_add(1, of, free.float())
    scores = zeros.scatter_add(1, of, given * free) / sizes.clamp_min(1.0)
    order = scores.masked_fill(sizes == 0, -torch.inf).argsort(dim=1, descending=True, stable=True)
    room = (held.budget - fixed.sum(1))[:, None]
    taken = torch.zeros_like(order, dtype=torch.bool).scatter(1, order, sizes.gather(1, order).cumsum(1) <= room)
    return fixed | (free & taken.gather(1, of))
