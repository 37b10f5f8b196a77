"""LoRC (arXiv 2410.03111): truncated SVD of the weights of a whole layer; the layers' ranks by condition numbers.

The decomposition is that of svd.py with one group, the rule `condition` of lrattn/compression/ranks.py.
"""

from __future__ import annotations

import torch

from lrattn.models.layers import AttentionLayer
from lrattn.models.weights import NAMES, weight


def log_condition(layer: AttentionLayer) -> float:
    """log kappa(Wk) + log kappa(Wv), kappa the largest singular value over the smallest."""
    total = 0.0
    for side in NAMES:
        sizes = torch.linalg.svdvals(weight(layer, side))
        least = sizes[0] * torch.finfo(sizes.dtype).eps  # smaller ones are rounding
        total += (sizes[0] / sizes[-1].clamp_min(least)).log().item()
    return total
