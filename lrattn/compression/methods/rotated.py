"""Principal components of rotated keys.

"kv-heads", Effectively Compress KV Heads (arXiv 2406.07056): those of all heads of a layer side by side, uncentred.
"matryoshka-pca", what MatryoshkaKV (arXiv 2410.14731) trains from: those of each head, about its mean key.
"""

from __future__ import annotations

from torch import Tensor

from lrattn.compression.moments import Moments
from lrattn.factors.parts import AttentionParts


def measure(
    part: AttentionParts, moments: Moments | None, layer: int, side: str
) -> tuple[Tensor | None, Tensor | None]:
    """Keys: C = sum k k^T, from moments with "rotated" gathered. Values: C of the inputs. G is the identity."""
    if moments is None:
        return None, None
    return (moments.sums["rotated.keys"] if side == "keys" else moments.inputs)[layer], None
