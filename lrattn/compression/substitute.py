"""Other keys and values in a model's attention: what its loss feels of them, and what they do to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lrattn.attention.dense import dense_attention
from lrattn.models.interface import attending, is_causal, not_causal, sight_of
from lrattn.models.layers import AttentionLayer
from lrattn.models.masks import said

# (layer, queries [B, Hq, T, D], keys and values [B, Hkv, T, D]) -> others in place of the last two
Replace = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Window:
    """What a query is given exactly: its `recent` last tokens, itself included, and the first `sinks`."""

    recent: int = 0
    sinks: int = 0

    def __post_init__(self) -> None:
        for name in ("recent", "sinks"):
            n = getattr(self, name)
            if not isinstance(n, int) or isinstance(n, bool) or n < 0:
                raise ValueError(f"{name}: expected a number of tokens, 0 or more, got {n!r}")

    @classmethod
    def of(cls, far: Sequence[int]) -> Window:
        """Of two numbers, recent and sinks. Raises: ValueError for anything else."""
        if not isinstance(far, Sequence) or isinstance(far, str) or len(far) != 2:
            raise ValueError(f"far: expected (recent, sinks), got {far!r}")
        return cls(*far)


@contextmanager
def substituted(
    model: nn.Module, layers: Sequence[AttentionLayer], replace: Replace, window: Window = Window()
) -> Iterator[None]:
    """Inside, passes without a cache attend to the keys and values that `replace` returns, given the model's own.

    With a window, each query still has the model's own of the tokens in it: only what is far from a query is replaced.
    Layers that attend to the keys of another have its replaced ones. Gradients pass through all keys and values.
    """
    index = {layer.module: i for i, layer in enumerate(layers)}
    made = WeakTensorKeyDictionary()  # keys, while the model holds them, and what is in their place; None: they are

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        if not is_causal(module, kwargs.get("is_causal")):
            return not_causal(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        i, end = index.get(module), key.shape[2]
        if key not in made:
            if i is None:
                raise ValueError(
                    f"model: expected keys of a layer that fills a cache in {type(module).__name__}, got others"
                )
            if end != query.shape[2]:
                raise ValueError(f"model: expected a pass of whole texts through {type(module).__name__}, got another")
            given = replace(i, query, key, value)
            made[key] = None if given[0] is key and given[1] is value else given
        far = made[key] or (key, value)
        what = said(attention_mask, sliding_window, len(query), end)
        sight = sight_of(what, 0, end, window.recent, window.sinks)
        recent = (key, value) if window.recent else None
        first = None
        if window.sinks:
            pads = torch.zeros(1, dtype=torch.int64, device=key.device) if what.pads is None else what.pads
            at = (pads[:, None] + torch.arange(window.sinks, device=key.device)).clamp_max(end - 1)
            at = at.expand(len(key), -1)[:, None, :, None]
            at = at.expand(-1, key.shape[1], -1, key.shape[3])
            first = key.gather(2, at), value.gather(2, at)
        out = dense_attention(
            query,
            sight,
            far,
            recent,
            first,
            scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=softcap or 0.0,
            sinks=s_aux,
        )
        return out.transpose(1, 2).contiguous(), None

    with attending(model, attention):
        yield
