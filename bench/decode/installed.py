"""Peers' kernels that may not be here."""

from __future__ import annotations

import importlib
from types import ModuleType


class Unavailable(Exception):
    """Why a provider is left out."""


def need(name: str) -> ModuleType:
    """A module that may not be here."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise Unavailable(f"{error.name} is not installed") from error
    except (ImportError, OSError) as error:
        raise Unavailable(f"{name} cannot be loaded: {error}") from error
