"""A cache of transformers' that quantises what leaves its dense window: the numbers of evaluation/quantisers.py.

Numbers are held as they come back, at the model's dtype: for answers, not for bytes. A pass attends to its own tokens
as they are, as KIVI's does; what lies `recent` tokens back when a pass begins is quantised for good, in whole groups
from behind the first `sinks` tokens of a row on. A group that is not whole stays as it is: this favours the quantiser.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer

from bench.evaluation.quantisers import QUANTISERS

GROUP = 32  # tokens that are quantised at once where tokens share no scale


class HeldLayer(DynamicLayer):
    """starts: [B], the first column of each row that is no padding."""

    def __init__(self, name: str, bits: int, recent: int, sinks: int, starts: Tensor) -> None:
        super().__init__()
        self.quantiser, self.bits, self.recent = QUANTISERS[name], bits, recent
        self.group = max(self.quantiser.tokens, GROUP)
        self.done = starts + sinks  # [B]: columns before them are quantised, but for the first ones

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.get_seq_length():
            self.settle()
        return super().update(key_states, value_states, *args, **kwargs)

    def settle(self) -> None:
        """Quantises the whole groups that lie `recent` columns back for the token that comes next."""
        most = self.keys.shape[2] + 1 - self.recent
        ends = self.done + ((most - self.done).clamp_min(0) // self.group) * self.group
        if (ends == self.done).all():
            return
        self.keys, self.values = self.keys.clone(), self.values.clone()  # attention of the last pass may hold them
        for row, (begin, end) in enumerate(zip(self.done.tolist(), ends.tolist(), strict=True)):
            if end > begin:
                self.requantise(self.keys[row, :, begin:end], self.quantiser.keys)
                self.requantise(self.values[row, :, begin:end], self.quantiser.values)
        self.done = ends

    def requantise(self, heads: Tensor, side: Callable[[Tensor, int], Tensor]) -> None:
        """In place, of heads [Hkv, T, D]."""
        heads.copy_(side(heads.transpose(0, 1).float(), self.bits).transpose(0, 1))

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.done = self.done[indices]

    def crop(self, tokens_to_remove: int) -> None:
        """Raises: ValueError for taking back a token that is quantised."""
        if self.get_seq_length() - abs(tokens_to_remove) < int(self.done.max()):
            raise ValueError(f"tokens_to_remove: expected none of those quantised, got {tokens_to_remove}")
        super().crop(tokens_to_remove)


def held_cache(layers: int, name: str, bits: int, recent: int, sinks: int, starts: Tensor | None = None) -> Cache:
    """starts: of rows with padding on their left; None: one row without."""
    own = torch.zeros(1, dtype=torch.long) if starts is None else starts
    return Cache(layers=[HeldLayer(name, bits, recent, sinks, own) for _ in range(layers)])
