"""The L2-norm strategy (arXiv 2406.11430): tokens whose keys are short draw attention, and are kept.

Of a layer the lengths of a token's keys are added over heads; the paper ranks each head's by themselves, which a row of
latents that heads share cannot follow. The first two layers keep all.
"""

from __future__ import annotations

from torch import Tensor

from lrattn.selection.held import Held


def kept(held: Held) -> Tensor:
    """The tokens of least sum_h ||k_h||."""
    return held.highest(-held.key_norms().sqrt().sum(-1))
