"""The ways decode_attention can run a call, for benchmarks and tests that compare them; it picks one itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from unittest.mock import patch


@contextmanager
def two_passes() -> Iterator[None]:
    """Inside, scores go to memory and a second kernel sums the values, also where one pass could do both."""
    from lrattn.kernels import plan

    def scores_alone(find: Any) -> Any:  # as where values have groups of their own
        return lambda *shape: find(*shape[:-1], shape[-1]._replace(paired=0))

    ways = {name: scores_alone(getattr(plan, name)) for name in ("rebuilt", "banded", "absorbed")}
    ways["cut"] = lru_cache(plan.cut.__wrapped__)
    with patch.multiple(plan, **ways), patch.object(plan.Planes, "one_pass", lambda *_: None):
        yield


@contextmanager
def rebuilt() -> Iterator[None]:
    """Inside, keys before RoPE are rebuilt whole, also where they could go by a band."""
    from lrattn.kernels import plan

    with patch.multiple(plan, banded=lambda *shape: None, cut=lru_cache(plan.cut.__wrapped__)):
        yield
