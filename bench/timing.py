"""How everything here is timed: a correctness gate, then providers interleaved, median and p10-p90."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch
from tqdm import tqdm


def gate(got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """A wrong result has no latency: root mean square error relative to the expected result."""
    error = ((got.double() - expected.double()).square().mean() / expected.double().square().mean()).sqrt().item()
    if not error <= tolerance:
        raise RuntimeError(f"results differ by {error:.2e} of their size, more than {tolerance:.0e}: not timed")


def milliseconds(runs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Wall-clock times on the CPU after one warm-up each, one run of every provider a round."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in tqdm(range(repeats), desc="timing", unit="round", leave=False):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            taken[name].append((time.perf_counter() - begin) * 1e3)
    return {name: summary(times) for name, times in taken.items()}


def summary(times: list[float]) -> dict[str, float]:
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return {"median_ms": statistics.median(times), "p10_ms": deciles[0], "p90_ms": deciles[-1]}
