"""The mask function that goes with lrattn's attention functions, and what a mask says.

Causal masks and sliding windows are handed to attention as REACH [B, T] int32: from how many columns on, its own
included, a column is seen; 0 for padding, FAR without a window. transformers passes a 2-D mask through, as it does for
flash attention. All other masks (chunks, images, packed texts, a caller's own) are bool [B, 1, S, T].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

FAR = 2**31 - 1


class Said(NamedTuple):
    """What a mask says, in the order that Sight has it.

    window: columns a query sees back, itself included; None for all.
    pads: [B] int64, the first live column of each row; None: 0 everywhere.
    live: [B, T] bool where there is more than padding on the left; None: all columns from `pads` on.
    full: [B or 1, S, T] bool, the whole of it, where it is neither causal nor a window; None: it is.
    """

    window: int | None = None
    pads: Tensor | None = None
    live: Tensor | None = None
    full: Tensor | None = None


class Word:
    """What a mask of REACH says, read when it is asked for: once a pass, not once a layer, and by some passes never.

    window: as Said has it. live: [B, T] bool, padding on the left among what is not; None: all.
    """

    def __init__(self, window: int | None, live: Tensor | None) -> None:
        self.window, self.live = window, live
        self.read: Said | None = None

    def said(self, columns: int) -> Said:
        """Of the first columns; the same number at every call."""
        if self.read is None:
            self.read = _said(self.window, None if self.live is None else self.live[:, :columns])
        return self.read


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *,
    mask_function: Callable[..., Any],
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """As transformers calls it: REACH for causal masks and windows, else the mask in full.

    transformers says by allow_is_causal_skip=False that something was put on top of the causal mask.
    """
    from transformers.masking_utils import sdpa_mask

    if not allow_is_causal_skip or (local_size is not None and not slides(mask_function, local_size)):
        whole: Tensor | None = sdpa_mask(
            batch_size,
            q_length,
            kv_length,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            allow_is_causal_skip=False,
            **kwargs,
        )
        return whole
    device, live = kwargs.get("device", "cpu"), None
    reach = torch.full((batch_size, kv_length), local_size or FAR, dtype=torch.int32, device=device)
    if attention_mask is not None:
        live = torch.zeros(batch_size, kv_length, dtype=torch.bool, device=device)
        given = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
        live[:, : given.shape[1]] = given
        reach = reach * live
    reach.word = Word(local_size, live)  # type: ignore[attr-defined]
    return reach


def said(mask: Tensor | None, window: int | None, batch: int, columns: int) -> Said:
    """What a mask says that attention was given, whoever made it.

    Args:
        window: what the layer itself says, for masks that do not.
        batch, columns: of the keys; a mask may have more columns.

    Raises: ValueError for a mask of another shape.
    """
    word: Word | None = getattr(mask, "word", None)
    if word is not None or mask is None:
        return Said(window) if word is None else word.said(columns)
    if mask.dim() == 2 and len(mask) == batch and mask.shape[1] >= columns:
        mask = mask[:, :columns]
        if mask.dtype == torch.int32 and (farthest := int(mask.max())) > 1:  # REACH that was copied to another device
            window = None if farthest == FAR else farthest
        return _said(window, mask.bool())
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[3] < columns:
        expected = f"[{batch}, {columns}] or [{batch}, 1, queries, {columns}]"
        raise ValueError(f"attention_mask: expected shape {expected}, got {list(mask.shape)}")
    full = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    full = full[:, 0, :, :columns]
    return Said(None, full.any(1).int().argmax(1).expand(batch), None, full)


def _said(window: int | None, live: Tensor | None) -> Said:
    """Of a causal mask; live: [B, T] bool, None for all."""
    if live is None or bool(live.all()):
        return Said(window)
    pads = live.int().argmax(1)
    run = torch.arange(live.shape[1], device=live.device) >= pads[:, None]
    return Said(window, pads, None if torch.equal(run & live, run) else live)


def slides(mask_function: Callable[..., Any], window: int) -> bool:
    """Whether a mask function is a causal sliding window, asked of it at some points: chunks have a local size, too."""
    kv = torch.arange(4 * window + 2)
    zero = torch.zeros((), dtype=torch.int64)
    for at in (window - 1, window, 2 * window - 1, 3 * window + 1):
        seen = torch.as_tensor(mask_function(zero, zero, torch.tensor(at), kv)).expand(len(kv))
        if not torch.equal(seen, (kv <= at) & (kv > at - window)):
            return False
    return True
