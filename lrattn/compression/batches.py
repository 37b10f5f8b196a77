"""Token batches as users give them: what is read of them, and what is refused before any work."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import astuple
from typing import Any

import torch
from torch import Tensor, nn

from lrattn.compression.substitute import Window
from lrattn.models.interface import positions_of

Batch = Tensor | Mapping[str, Any]
ID_TYPES = (torch.int64, torch.int32, torch.int16)


def tokens_of(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Token ids [b, t] int64, and where they are live [b, t] bool; None without padding.

    Raises: ValueError for anything else.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.shape[1] or ids.dtype not in ID_TYPES:
        raise ValueError(f"batches: expected integer token ids [b, t], got {_told(ids)}")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        raise ValueError(f"batches: expected an attention_mask {list(ids.shape)}, got {_told(mask)}")
    return ids.long().clone(), None if mask is None else mask.bool()  # backward keeps them: not the caller's


def positions_in(ids: Tensor, live: Tensor | None) -> Tensor:
    """The position of every token of ids [b, t] in its sequence, padding left out: [b, t] int64."""
    if live is None:
        return torch.arange(ids.shape[1], device=ids.device).expand(len(ids), -1)
    return (live.cumsum(1) - 1).clamp_min(0)


def unpadded(ids: Tensor, live: Tensor | None) -> list[Tensor]:
    """Each sequence [t] of token ids [b, t] without its padding."""
    return list(ids) if live is None else [row[kept] for row, kept in zip(ids, live, strict=True)]


def _told(x: Any) -> str:
    return f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__


def check_batches(batches: Any) -> None:
    """Raises ValueError for what is no iterable of batches, as one batch alone that is a mapping."""
    many = isinstance(batches, Iterable) or hasattr(batches, "__getitem__")
    if not many or isinstance(batches, Mapping | str):
        raise ValueError(f"batches: expected several of token ids [b, t], in a list, got {type(batches).__name__}")


def check_lengths(model: nn.Module, lengths: Iterable[int]) -> None:
    """Raises ValueError for sequences longer than the model has positions."""
    longest, most = max(lengths, default=0), positions_of(model)
    if most is not None and longest > most:
        raise ValueError(
            f"batches: expected sequences of at most {most} tokens, the model's positions, got one of {longest}"
        )


def least_felt(window: Window, gather: Collection[str]) -> int:
    """Tokens of the shortest sequence whose gradients feel one beyond a window: the last token has no loss, and the
    first takes no part in a metric."""
    return window.recent + max(window.sinks, 0 if "fisher" in gather else 1) + 2


def unfelt(window: Window, gather: Collection[str]) -> str:
    """What is wrong with sequences none of which is as long."""
    expected = f"tokens that attention sees beyond the window far={astuple(window)}"
    least = least_felt(window, gather)
    return f"batches: expected {expected}, got none; give sequences of {least} or more, or another window"
