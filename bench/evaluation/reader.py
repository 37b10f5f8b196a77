"""A model that reads on in a cache: what benchmarks of caches after a prompt share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrattn.models.interface import cache_argument


class Reader:
    """model: of transformers, one text at a time."""

    model: Any

    def passed(self, cache: Any, ids: Tensor, kept: int = 1) -> Tensor:
        """Logits of the last `kept` of ids [t], which the cache then holds."""
        return self.model(input_ids=ids[None], logits_to_keep=kept, **cache_argument(cache)).logits[0].float()

    def scored(self, cache: Any, ids: Tensor, step: int | None = None) -> tuple[Tensor, Tensor]:
        """Loss of each of ids[1:], and whether it is held likeliest, [t - 1]; a cache has read all before ids.

        step: tokens of a pass; None: all at once.
        """
        parts = ids[:-1].split(step or len(ids))
        logits = torch.cat([self.passed(cache, part, len(part)) for part in parts])
        right = (logits.argmax(-1) == ids[1:]).float()
        return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none"), right
