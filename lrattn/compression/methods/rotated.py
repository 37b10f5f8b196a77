"""Principal components of rotated keys.

"kv-heads", Effectively Compress KV Heads (arXiv 2406.07056): those of all heads of a layer side by side, uncentred.
"matryoshka-pca", what MatryoshkaKV (arXiv 2410.14731) trains from: those of each head, about its mean key.
"""

from __future__ import annotations

from torch import Tensor

from lrattn.compression.moments import Moments
from lrattn.models.layers import AttentionLayer


def measure(layer: AttentionLayer, moments: Moments, i: int, side: str) -> tuple[Tensor, Tensor | None]:
    """C: sum k k^T or sum v v^T, as attention is given them, from moments with "rotated". G is the identity."""
    return moments.sum(f"rotated.{side}", i), None
