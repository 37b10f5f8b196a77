"""Perplexity over fixed windows: every token of a window but its first is predicted from those before it."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lrattn.models.interface import cache_argument
from lrattn.models.states import evaluating


def perplexity(model: nn.Module, windows: Tensor, label: str = "", **how: Any) -> float:
    """exp of the mean negative log-likelihood of windows [n, length], as `losses` scores them, and is told how.

    Raises: ValueError as `losses` does.
    """
    mean = fmean(losses(model, windows, label, **how))
    return math.exp(mean) if mean < 700 else math.inf


@torch.no_grad()
def losses(
    model: nn.Module,
    windows: Tensor,
    label: str = "",
    *,
    read: int = 0,
    step: int = 0,
    cache: Callable[[], Any] | None = None,
    progress: bool = True,
) -> list[float]:
    """Mean negative log-likelihood of a token, in nats, of each of n windows [n, length], one by one, without a cache.

    Windows scored by two models are pairs: their differences say how sure the difference of the means is.

    Args:
        read: first tokens of a window that are read into a cache of its own before the others are scored: what a cache
            drops once it has read a prompt is then felt, by the last pass of these. `cache` makes one. 0: all but the
            first token are scored.
        step: tokens of a pass, where a cache sees those of a pass otherwise than those before it. 0: all at once.

    Raises: ValueError if a window has fewer than two tokens, or none after those that are read.
    """
    if windows.dim() != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows: expected [n, length] of two tokens or more, got {list(windows.shape)}")
    if not 0 <= read < windows.shape[1] or bool(read or step) != (cache is not None):
        raise ValueError(f"read: expected fewer tokens than {windows.shape[1]}, and a cache for them, got {read}")
    device, found = next(model.parameters()).device, []
    label = f"perplexity, {label}" if label else "perplexity"
    with evaluating(model):
        for ids in tqdm(windows.to(device), desc=label, unit="window", disable=not progress):
            if cache is None:
                logits, scored = model(input_ids=ids[None], use_cache=False).logits[0, :-1], ids[1:]
            else:
                held, scored, size = cache(), ids[max(read, 1) :], step or len(ids)
                passes = [x for part in (ids[:read], ids[read:-1]) for x in part.split(size) if len(x)]
                select, end, logits = getattr(held, "selection", None), 0, list[Tensor]()
                for x in passes:
                    end += len(x)
                    if select is not None and len(x) < read and end <= read:  # chosen by the last part of a prompt
                        held.selection = select if end == read else None
                    logits.append(model(input_ids=x[None], **cache_argument(held)).logits[0])
                logits = torch.cat(logits)[-len(scored) :]
            found.append(nn.functional.cross_entropy(logits.float(), scored, reduction="none").double().mean().item())
    return found
