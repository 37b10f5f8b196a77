"""Perplexity over fixed windows: every token of a window but its first is predicted from those before it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from tqdm import tqdm


@torch.no_grad()
def perplexity(model: nn.Module, windows: Tensor, label: str) -> float:
    """exp of the mean negative log-likelihood; windows [n, length] are scored one by one, without a cache."""
    total = 0.0
    for ids in tqdm(windows, desc=f"perplexity, {label}", unit="window"):
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        total += nn.functional.cross_entropy(logits.float(), ids[1:], reduction="sum").item()
    return math.exp(total / (windows.shape[0] * (windows.shape[1] - 1)))
