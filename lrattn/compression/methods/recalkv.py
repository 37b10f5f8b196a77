"""OVC, the offline value calibration of ReCalKV (arXiv 2505.24357, section 3.3, equations 7 and 8).

The rest of the method is elsewhere: HSR in compression/clusters.py, the whitened SVD of keys and values in palu.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrattn.compression.methods.weighted import damped

ROUNDS = 1  # as published


def calibrate_values(weight: Tensor, down: Tensor, moment: Tensor) -> tuple[Tensor, Tensor]:
    """Alternating least squares of min ||L R X - W X||^2 on the inputs X of the compressed model, from R = down^T.

    A round is  L = W C R^T (R C R^T)^-1,  then  R = (L^T L)^-1 L^T W,  with C = X X^T.

    With X for the values themselves W is the identity; C = X X^T then says what W X X^T W^T says of the inputs.

    The target is the original W on the compressed model's inputs, as published. On the inputs that R was whitened with,
    a round changes nothing: R is already the best there. X is real tokens, where the released code sums eight sequences
    into one, and biases are outside, where it fits them and adds them again. A pseudo-inverse stands for each inverse:
    latents that are always zero, past the rank of W, have none.

    Args:
        weight: W, [Hkv, D, n] float64, which of the n values each head is. down: [n, rank] float64, of all heads
            together. moment: C, [n, n] float64, of the compressed model's values.

    Returns: up [Hkv, rank, D] and down [n, rank].
    """
    w, r, c = weight.flatten(0, 1), down.T, damped(moment)
    for _ in range(ROUNDS):
        left = w @ c @ r.T @ torch.linalg.pinv(r @ c @ r.T, hermitian=True)
        r = torch.linalg.pinv(left) @ w
    return left.T.unflatten(1, weight.shape[:2]).transpose(0, 1), r.T
