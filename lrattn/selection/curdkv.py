"""CurDKV (arXiv 2509.15038): tokens by the leverage of their keys and values, as a CUR decomposition picks rows.

    score = sum_h  l_h / sum l_h,   l_h = ||k_h||^2 / sum_w ||k_h||^2  *  ||v_h||^2 / sum_w ||v_h||^2

w: the window of 16 tokens that a token lies in. The paper ranks each head's scores by themselves, and may multiply keys
and values by a few random columns first.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrattn.factors.shapes import cdiv
from lrattn.selection.held import Held

WINDOW = 16


def kept(held: Held, window: int = WINDOW) -> Tensor:
    """The tokens of the highest score."""
    live = held.live[..., None]
    leverage = _local(held.key_norms() * live, window) * _local(held.value_norms() * live, window)
    return held.highest((leverage / _nonzero(leverage.sum(1, keepdim=True))).sum(-1))


def _local(norms: Tensor, window: int) -> Tensor:
    """[B, T, Hkv] over its sum in each window of tokens."""
    tokens = norms.shape[1]
    padded = torch.nn.functional.pad(norms, (0, 0, 0, cdiv(tokens, window) * window - tokens))
    windows = padded.unflatten(1, (-1, window))
    return (windows / _nonzero(windows.sum(2, keepdim=True))).flatten(1, 2)[:, :tokens]


def _nonzero(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1.0)
