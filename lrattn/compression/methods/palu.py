"""Palu (arXiv 2407.21118): grouped SVD, whitened by the second moment of the inputs. ReCalKV's keys are the same.

With one group for a layer it is SVD-LLM (arXiv 2403.07378), and what the training of CSKV (arXiv 2409.10593) tends to.
"""

from __future__ import annotations

from torch import Tensor

from lrattn.compression.methods.weighted import METRIC_DAMPING, low_rank
from lrattn.compression.moments import Moments
from lrattn.models.layers import AttentionLayer


def measure(layer: AttentionLayer, moments: Moments, i: int, side: str) -> tuple[Tensor, Tensor | None]:
    """C: second moment of the heads on the calibration text, keys before RoPE; G the identity: their squared errors.

    With W x for the heads it is W (sum x x^T) W^T, what the published whitening comes to.
    """
    return moments.sum("before", i), None


def decompose(
    weight: Tensor, moment: Tensor, metric: Tensor | None = None, *, damping: float = METRIC_DAMPING
) -> tuple[Tensor, Tensor, Tensor]:
    """The maps of every rank with the least tr(G dW C dW^T).

    With G the identity it is the whitened SVD of the paper (W S with S S^T = C) as a map, without a root or an inverse
    of C. Shapes as in lrattn/compression/methods/__init__.py; damping: of G, see `low_rank`.
    """
    heads, head_dim, _ = weight.shape
    energies, up, down = low_rank(weight.flatten(0, 1), moment, metric, damping=damping)
    return energies, up.unflatten(1, (heads, head_dim)).transpose(0, 1), down
