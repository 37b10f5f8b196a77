"""Other keys and values in a model's attention: what its loss feels of them, and what they do to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from lrattn.factors.shapes import check_tokens
from lrattn.models.interface import attending, attention_beyond, is_causal, not_causal
from lrattn.models.layers import AttentionLayer

# (layer, queries [B, Hq, T, D], keys and values [B, Hkv, T, D]) -> others in place of the last two
Replace = Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Window:
    """What a query is given exactly: its `recent` last tokens, itself included, and the first `sinks`."""

    recent: int = 0
    sinks: int = 0

    def __post_init__(self) -> None:
        check_tokens(recent=self.recent, sinks=self.sinks)

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
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        if not is_causal(module, kwargs.get("is_causal")):
            return not_causal(module, query, key, value, attention_mask, **kwargs)
        if key not in made:
            if (i := index.get(module)) is None:
                raise ValueError(
                    f"model: expected keys of a layer that fills a cache in {type(module).__name__}, got others"
                )
            if key.shape[2] != query.shape[2]:
                raise ValueError(f"model: expected a pass of whole texts through {type(module).__name__}, got another")
            given = replace(i, query, key, value)
            made[key] = None if given[0] is key and given[1] is value else given
        far = made[key] or (key, value)
        return attention_beyond(astuple(window), far, query, key, value, attention_mask, **kwargs)

    with attending(model, attention):
        yield
