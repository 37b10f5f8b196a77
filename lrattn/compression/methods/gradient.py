"""lrattn's own factors: the least loss of the model, to second order, that maps of a rank can have.

An error dW of a map of heads x_t moves the keys or values of token t by dW x_t, and the loss by g_t^T dW x_t plus
second-order terms, g_t the gradient of the loss by those. With labels drawn from the model's own predictions the
first-order terms cancel, and the second-order ones are the Fisher information: half of the mean of (g_t^T dW x_t)^2. As
a product of one matrix a side,

    loss = 1/2 tr(G dW C dW^T)   nats a token,   G = m mean(g g^T / |g|),   C = mean(|g| x x^T) / m,   m = mean |g|.

Gradients have heavy tails: with |g|^2 for weights, as K-FAC has it, few tokens outweigh all others, and factors fitted
to them do worse on other text (docs/decisions.md). So each side has half of a token's weight, |g|.

Keys, values and layers are measured in the same nats, so that one water-filling spends the bytes of all, and keys and
values can share a row (rows.py). The attention sink, the first token of a sequence, has hundreds of
times the gradient of others: each token weighs in C by its own gradient, and the sinks' directions are left out of G.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from lrattn.compression.moments import Moments
from lrattn.models.layers import AttentionLayer


def measure(
    layer: AttentionLayer, moments: Moments, i: int, side: str, *, rotated: bool = False
) -> tuple[Tensor, Tensor | None]:
    """C and G of the formula above, from moments with "metric": x_t are keys before RoPE and values, W selects. Those
    of keys in chunks are averages of them.

    rotated: keys are as attention is given them: from "rotated-metric" and "rotated".
    """
    metric, moment = moments.metric(i, side, rotated=rotated)
    return moment, metric


measure_rotated = partial(measure, rotated=True)
