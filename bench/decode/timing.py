"""How everything here is timed: a correctness gate, then providers interleaved, median and p10-p90."""

from __future__ import annotations

import os
import statistics
import time
from argparse import ArgumentParser
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

FLUSH = 2  # times the L2 cache is read between two runs
ROUNDS = (7, 40)  # fewest and most of them


class WrongResult(RuntimeError):
    """A provider computes something else than the others."""


class Prepared(NamedTuple):
    """A run that can be repeated. result: the tensor it writes each time. run: kept, for a graph reads its tensors."""

    replay: Callable[[], object]
    result: Tensor
    run: Callable[[], Tensor]


class Clock(Protocol):
    """How runs are made repeatable and timed."""

    def prepare(self, run: Callable[[], Tensor]) -> Prepared: ...

    def microseconds(self, replays: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]: ...


def check_device(parser: ArgumentParser, dry: bool) -> None:
    """Ends a command that finds no GPU or, of a dry run, no interpreter."""
    if not dry and not torch.cuda.is_available():
        parser.error("no GPU here: --dry tries it in the interpreter")
    if dry and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error("--dry: expected TRITON_INTERPRET=1 in the environment")


def gate(got: Tensor, expected: Tensor, tolerance: float) -> float:
    """A wrong result has no latency. Returns the root mean square error relative to the expected result.

    Raises: WrongResult if it is above the tolerance or not a number.
    """
    error = ((got.double() - expected.double()).square().mean() / expected.double().square().mean()).sqrt().item()
    if not error <= tolerance:
        raise WrongResult(f"results differ by {error:.2e} of their size, more than {tolerance:.0e}: not timed")
    return error


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
    return {name: summary(times, "ms") for name, times in taken.items()}


def microseconds(
    clock: Clock, runs: Mapping[str, Prepared], seconds: float, rounds: tuple[int, int] = ROUNDS
) -> dict[str, dict[str, float]]:
    """Times by a clock, as many rounds as fit into `seconds` within `rounds`, as one round before them tells."""
    replays = {name: run.replay for name, run in runs.items()}
    if not replays:
        return {}
    fewest, most = rounds
    if fewest < most:
        begin = time.perf_counter()
        clock.microseconds(replays, 1)
        fewest = round(min(max(seconds / (time.perf_counter() - begin), fewest), most))
    taken = clock.microseconds(replays, fewest)
    return {name: summary(times, "us") for name, times in taken.items()}


class WallClock:
    """Runs anything, anywhere, and times it from outside: for trying a benchmark, not for a kernel's latency."""

    def prepare(self, run: Callable[[], Tensor]) -> Prepared:
        return Prepared(run, run(), run)

    def microseconds(self, replays: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
        taken: dict[str, list[float]] = {name: [] for name in replays}
        for names in rotations(list(replays), rounds):
            for name in names:
                begin = time.perf_counter()
                replays[name]()
                taken[name].append((time.perf_counter() - begin) * 1e6)
        return taken


class GraphClock:
    """Times on a GPU: each run a captured CUDA graph, between two events, the L2 cache read full of other data before.

    Reading leaves nothing to be written back during the run, as zeroing a buffer would. It also keeps the GPU busy
    while the host queues the graph, so that no gap of the host's is measured.

    cuda: torch.cuda, or what stands for it in a test.
    """

    def __init__(self, device: torch.device | str = "cuda", cuda: Any = torch.cuda) -> None:
        self.cuda = cuda
        cache = cuda.get_device_properties(device).L2_cache_size
        self.other = torch.zeros(FLUSH * cache // 4, dtype=torch.float32, device=device)

    def prepare(self, run: Callable[[], Tensor]) -> Prepared:
        """Warms a run up on a stream of its own, captures it, and replays it once."""
        stream = self.cuda.Stream()
        stream.wait_stream(self.cuda.current_stream())
        with self.cuda.stream(stream):
            for _ in range(2):
                run()
        self.cuda.current_stream().wait_stream(stream)
        self.cuda.empty_cache()  # a capture takes new memory
        graph = self.cuda.CUDAGraph()
        with self.cuda.graph(graph):
            result = run()
        result.fill_(torch.nan)  # what is checked is what the replay wrote
        graph.replay()
        return Prepared(graph.replay, result, run)

    def microseconds(self, replays: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
        marks: dict[str, list[tuple[Any, Any]]] = {name: [] for name in replays}
        for names in rotations(list(replays), rounds):
            for name in names:
                begin, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
                self.other.amax()
                begin.record()
                replays[name]()
                end.record()
                marks[name].append((begin, end))
        self.cuda.synchronize()
        return {name: [begin.elapsed_time(end) * 1e3 for begin, end in pairs] for name, pairs in marks.items()}


def rotations(names: list[str], rounds: int) -> list[list[str]]:
    """The order of each round, begun one provider later each time: none always follows the same."""
    starts = [i % max(len(names), 1) for i in range(rounds)]
    return [names[start:] + names[:start] for start in starts]


def copy_rate(clock: Clock, device: torch.device, nbytes: int) -> float:
    """GB/s of copying nbytes, read and written bytes counted: what the device's memory gives."""
    source = torch.zeros(nbytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = microseconds(clock, {"copy": clock.prepare(lambda: target.copy_(source).view(torch.float32))}, 0.5)
    return 2 * nbytes / times["copy"]["median_us"] / 1e3


def summary(times: list[float], unit: str) -> dict[str, float]:
    """Median, p10 and p90."""
    deciles = statistics.quantiles(times, n=10, method="inclusive") if len(times) > 1 else times
    return {f"median_{unit}": statistics.median(times), f"p10_{unit}": deciles[0], f"p90_{unit}": deciles[-1]}
