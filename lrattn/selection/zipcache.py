"""ZipCache (arXiv 2405.14256): tokens by what the queries that can see them give them.

    saliency of token i = sum_h sum_k a_hki / (probe queries k that see i)

so that what stood long in the text, and was seen by more, is no more salient for it. The probes here are the last
queries; the released code takes as many at random places beside them.
"""

from __future__ import annotations

from torch import Tensor

from lrattn.selection.held import Held


def kept(held: Held) -> Tensor:
    """The most salient tokens."""
    assert held.probabilities is not None
    seen = (held.probabilities > 0).any(1).sum(1).clamp_min(1)
    return held.highest(held.probabilities.sum((1, 2)) / seen)
