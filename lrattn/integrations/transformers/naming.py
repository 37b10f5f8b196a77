"""The name under which transformers takes a cache: `cache` from release 5.24 on, `past_key_values` before."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from lrattn.factors.parts import decoder_of

NAMES = ("cache", "past_key_values")


def cache_name(call: Callable[..., Any]) -> str:
    """The name that a callable takes its cache by, such as the `forward` of a model.

    Raises: ValueError if its signature has neither.
    """
    names = [name for name in NAMES if name in inspect.signature(call).parameters]
    if not names:
        what = getattr(call, "__qualname__", type(call).__name__)
        raise ValueError(f"model: expected {what} to take a cache as one of {NAMES}, got none of these arguments")
    return names[0]


def as_argument(model: nn.Module, cache: Any) -> dict[str, Any]:
    """A cache as the keyword argument of a model's `forward` and `generate`. Raises: ValueError as `cache_name`."""
    return {cache_name(decoder_of(model).forward): cache}


def cache_in(kwargs: Mapping[str, Any]) -> Any:
    """The cache among keyword arguments, by either name; None if there is none.

    Raises: ValueError for two.
    """
    found = [kwargs[name] for name in NAMES if kwargs.get(name) is not None]
    if len(found) > 1 and found[0] is not found[1]:
        raise ValueError(f"{NAMES[0]}: expected one cache, got another one as {NAMES[1]}")
    return found[0] if found else None


def with_cache(kwargs: Mapping[str, Any], name: str, cache: Any) -> dict[str, Any]:
    """The same arguments with this cache under this name alone; under none where it is None."""
    others = {key: value for key, value in kwargs.items() if key not in NAMES}
    return others if cache is None else {**others, name: cache}
