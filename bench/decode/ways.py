"""The ways decode_attention can run a call, for benchmarks and tests that compare them; it picks one itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from unittest.mock import patch


@contextmanager
def two_passes() -> Iterator[None]:
    """Inside, scores go to memory and a second kernel sums the values, also where one pass could do both."""
    from lrattn.kernels import plan

    with patch.object(plan, "fused", lambda *shape: None), patch.object(plan, "cut", lru_cache(plan.cut.__wrapped__)):
        yield
