"""Truncated SVD of the weights: the baseline that looks at no data."""

from __future__ import annotations

from torch import Tensor

from lrattn.compression.moments import Moments
from lrattn.models.layers import AttentionLayer
from lrattn.models.weights import weight


def measure(layer: AttentionLayer, moments: Moments, i: int, side: str) -> tuple[Tensor, Tensor | None]:
    """C = W W^T: the best maps in the Frobenius norm of the weights, energies squared singular values."""
    own = weight(layer, side)
    return own @ own.T, None
