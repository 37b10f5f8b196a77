"""ReFreeKV (arXiv 2502.16886, DBudgetKV before): as few tokens as the last query's attention allows.

Tokens but the recent ones are in order of what the last queries give them, summed over heads. From the least on they
are dropped while

    mean_h ||a_h of those left||  >=  (1 - 0.05) mean_h ||a_h||,   a_h the last query's probabilities of them,

so that each layer and each text has a number of its own. The paper orders each head's tokens by themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrattn.selection.held import Held

LOSS = 0.05


def kept(held: Held, loss: float = LOSS) -> Tensor:
    """All but the longest run of least tokens that loses at most a share `loss` of the norm; recent ones are kept."""
    assert held.probabilities is not None
    recent = held.places >= held.lengths[:, None] - held.recent
    given = held.probabilities.sum((1, 2)).masked_fill(held.fixed, torch.inf).masked_fill(~held.live, -torch.inf)
    order = given.argsort(dim=1, stable=True)  # what is not live comes first, and has no mass
    mass = (held.probabilities[:, :, -1].double() ** 2) * ~recent[:, None]
    mass = mass.gather(2, order[:, None].expand_as(mass))
    left = mass.flip(2).cumsum(2).flip(2).sqrt().mean(1)  # [B, T], of a token and all after it
    enough = left >= (1 - loss) * left[:, :1]
    return torch.zeros_like(enough).scatter(1, order, _last_true(enough))


def _last_true(enough: Tensor) -> Tensor:
    """From the last place on that is true, [B, T]: the first always is."""
    places = torch.arange(enough.shape[1], device=enough.device)
    return places >= (enough * places).amax(1, keepdim=True)
