"""lrattn's own factors: the least loss of the model, to second order, that maps of a rank can have.

An error dW of a projection moves the output of token t by dW x_t, and the loss by g_t^T dW x_t plus second-order terms,
g_t the gradient of the loss by that output. Over tokens the first-order terms cancel, and the second-order ones are the
Fisher information: half of the mean of (g_t^T dW x_t)^2. As a product of one matrix a side (K-FAC),

    loss = 1/2 tr(G dW C dW^T)   nats a token,   G = mean g g^T,   C = mean |g|^2 x x^T / tr G.

Keys, values and layers are measured in the same nats, so that one water-filling spends the bytes of all, and keys and
values can share a row (lrattn/methods/rows.py). The attention sink, the first token of a sequence, has hundreds of
times the gradient of others: each token weighs in C by its own gradient, and the sinks' directions are left out of G.
"""

from __future__ import annotations

from torch import Tensor

from lrattn.moments import Moments
from lrattn.parts import AttentionParts


def measure(
    part: AttentionParts, moments: Moments | None, layer: int, side: str
) -> tuple[Tensor | None, Tensor | None]:
    """C and G of the formula above, from moments with "metric" gathered."""
    if moments is None:
        return None, None
    metric, moment = moments.metric(layer, side)
    return moment, metric
