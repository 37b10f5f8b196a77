"""Arguments as users give them: what is refused before any work."""

from __future__ import annotations

import argparse
import re
from numbers import Real
from typing import Any


def check_count(name: str, value: Any, least: int, most: int | None = None) -> None:
    """Raises ValueError for what is no integer within its bounds."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least or (most is not None and value > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name}: expected an integer {bounds}, got {value!r}")


def check_flag(name: str, value: Any) -> None:
    """Raises ValueError for what is neither True nor False."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: expected True or False, got {value!r}")


def check_share(keep: Any) -> None:
    """Raises ValueError for what is no number in (0, 1]."""
    if not isinstance(keep, Real) or isinstance(keep, bool) or not 0 < float(keep) <= 1:
        raise ValueError(f"keep: expected a share in (0, 1], got {keep!r}")


def read_share(text: str) -> float:
    """Of a command line. Raises: argparse.ArgumentTypeError for anything but a share in (0, 1]."""
    if not re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)(e-?[0-9]+)?", text) or not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"expected a share in (0, 1], got {text}")
    return float(text)
