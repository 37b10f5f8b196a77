"""ASVD (arXiv 2312.05821): SVD of the weights with each input scaled by the size it has."""

from __future__ import annotations

from torch import Tensor

from lrattn.compression.moments import Moments
from lrattn.models.layers import AttentionLayer
from lrattn.models.weights import weight

ALPHA = 0.5  # as published


def measure(layer: AttentionLayer, moments: Moments, i: int, side: str) -> tuple[Tensor, Tensor | None]:
    """C = W S^2 W^T, S = diag((mean |x|)^alpha), from moments with "magnitudes": W S is decomposed, S is undone."""
    sizes = moments.sums["magnitudes"][i] / max(moments.tokens, 1)
    scaled = weight(layer, side) * sizes**ALPHA
    return scaled @ scaled.T, None
