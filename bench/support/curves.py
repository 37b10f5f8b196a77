"""What every plot of measured times draws: medians with their spread, against lengths or batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes


def curve(axis: Axes, places: Sequence[int], times: Sequence[Mapping[str, float]], unit: str, **style: Any) -> None:
    """Medians of timing.summary, with p10 to p90. unit: of the times, as in their names."""
    medians, low, high = ([t[f"{name}_{unit}"] for t in times] for name in ("median", "p10", "p90"))
    spread = [[m - x for m, x in zip(medians, low, strict=True)], [x - m for m, x in zip(medians, high, strict=True)]]
    axis.errorbar(places, medians, spread, marker="o", markersize=3, capsize=2, **style)


def label_places(axis: Axes, places: Sequence[int]) -> None:
    """Ticks at these numbers and nowhere else, thousands of tokens as 1K."""
    axis.set_xticks(places, [f"{n // 1024}K" if n >= 1024 else str(n) for n in places])
