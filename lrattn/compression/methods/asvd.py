"""ASVD (arXiv 2312.05821): SVD of the weights with each input scaled by the size it has."""

from __future__ import annotations

import torch
from torch import Tensor

from lrattn.compression.moments import Moments
from lrattn.factors.parts import AttentionParts

ALPHA = 0.5  # as published


def measure(
    part: AttentionParts, moments: Moments | None, layer: int, side: str
) -> tuple[Tensor | None, Tensor | None]:
    """C = S^2, S = diag((mean |x|)^alpha), from moments with "magnitudes" gathered: W S is decomposed, S is undone."""
    if moments is None:
        return None, None
    sizes = moments.sums["magnitudes"][layer] / max(moments.tokens, 1)
    return torch.diag(sizes ** (2 * ALPHA)), None
