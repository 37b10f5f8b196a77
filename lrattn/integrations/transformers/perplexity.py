"""Perplexity over fixed windows: every token of a window but its first is predicted from those before it."""

from __future__ import annotations

import math
from statistics import fmean

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lrattn.models.states import evaluating


def perplexity(model: nn.Module, windows: Tensor, label: str = "", *, progress: bool = True) -> float:
    """exp of the mean negative log-likelihood of windows [n, length], scored one by one, without a cache.

    Raises: ValueError if a window has fewer than two tokens.
    """
    mean = fmean(losses(model, windows, label, progress=progress))
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def losses(model: nn.Module, windows: Tensor, label: str = "", *, progress: bool = True) -> list[float]:
    """Mean negative log-likelihood of a token, in nats, of each of n windows [n, length], as `perplexity` takes it.

    Windows scored by two models are pairs: their differences say how sure the difference of the means is.
    Raises: ValueError as `perplexity` does.
    """
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows: expected [n, length] of two tokens or more, got {list(windows.shape)}")
    device, found = next(model.parameters()).device, []
    label = f"perplexity, {label}" if label else "perplexity"
    with evaluating(model):
        for ids in tqdm(windows.to(device), desc=label, unit="window", disable=not progress):
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            found.append(nn.functional.cross_entropy(logits.float(), ids[1:], reduction="none").double().mean().item())
    return found
