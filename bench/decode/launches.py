"""Launches beside those of the launch table, timed on a GPU: what its rows are chosen by.

    python -m bench.decode.launches --out FOLDER [--minutes 5] [--layer NAME ...] [--batch 1 16] [--dry]

A decode step of a layer is timed once with the table's launches and once for each alternative of one kernel, as in
bench.decode_latency: CUDA-graph replays, the L2 cache flushed. Everything is compiled on all cores first; a launch that
does not compile, does not fit or is wrong is named with the reason. JSON: launches_gpu.json. --dry: tiny, in the
interpreter.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import lru_cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from tqdm import tqdm

from bench.decode import timing
from bench.decode.decode_problem import Problem, attend, make
from bench.decode.decode_providers import ours
from bench.decode.decode_shapes import CHUNK, LLAMA_2, LLAMA_31, Shape
from bench.decode.gpu_decode import DRY_MODELS, TOLERANCE, Bench
from bench.support import report
from lrattn.kernels import launch, plan
from lrattn.kernels.launch import Launch

PATH = report.RESULTS / "launches_gpu.json"
TOKENS, FEW = 32768, 256  # timed; compiled and checked
SECONDS = 1.5  # of timing a layer
PROFILED = 5  # steps


class Layer(NamedTuple):
    """shared: one row a group serves keys and values. rope: keys are rotated, and so rebuilt, but in chunks."""

    shape: Shape
    shared: bool = False
    rope: bool = True
    chunk: int | None = None

    def problem(self, tokens: int, batch: int, bench: Bench) -> Problem:
        x = make(self.shape, tokens, batch, bench.dtype, bench.device, shared=self.shared)
        return replace(x, layer=replace(x.layer, chunk=self.chunk)) if self.rope else x.unrotated()

    @property
    def kernels(self) -> tuple[str, ...]:
        """Whose launches are varied."""
        packed = bool(self.shape.bits)
        if not self.rope or self.chunk:
            return ("attend_packed",) if packed else ("fused_absorbed",)
        if self.shared:
            return ("fused_rebuilt",)
        return ("latent_scores", "packed_values" if packed else "latent_values")


LAYERS = {
    f"{model.name}, {name}": layer
    for model in (LLAMA_31, LLAMA_2)
    for name, layer in {
        "keep 0.5": Layer(Shape(model, "Palu", 0.5)),
        "keep 0.3": Layer(Shape(model, "Palu", 0.3)),
        "keep 0.5, joint values": Layer(Shape(model, "ReCalKV", 0.5)),
        "8/4/2 bits": Layer(Shape(model, "Palu", 0.5, (8, 4, 2))),
        "4 bits": Layer(Shape(model, "Palu", 0.5, (4,))),
        "position-free": Layer(Shape(model, "Palu", 0.5), rope=False),
        "position-free, 8/4/2 bits": Layer(Shape(model, "Palu", 0.5, (8, 4, 2)), rope=False),
        "position-free, 4 bits": Layer(Shape(model, "Palu", 0.5, (4,)), rope=False),
        "chunks": Layer(Shape(model, "Palu", 0.5), chunk=CHUNK),
        "chunks, 8/4/2 bits": Layer(Shape(model, "Palu", 0.5, (8, 4, 2)), chunk=CHUNK),
        "chunks, one row, keep 0.25": Layer(Shape(model, "Palu", 0.25), shared=True, chunk=CHUNK),
        "one row, keep 0.25": Layer(Shape(model, "Palu", 0.25), shared=True),
        "one row, keep 0.125": Layer(Shape(model, "Palu", 0.125), shared=True),
    }.items()
}
DRY = {"dry": Layer(Shape(DRY_MODELS[0], "Palu", 0.5, (8, 4, 2)))}
BOTH = [Launch(warps, stages) for warps in (4, 8) for stages in (1, 2, 3)]
ALTERNATIVES = {
    "latent_scores": [x._replace(block_d=128, resident=True) for x in BOTH]
    + [x._replace(block_d=128, block_r=r) for x in BOTH for r in (64, 128)],
    "latent_values": [x._replace(block_r=r) for x in BOTH for r in (64, 128, 256)],
    "fused_absorbed": [x._replace(block_r=r) for x in BOTH for r in (64, 128)],
    "fused_rebuilt": [x._replace(block_r=r) for x in BOTH for r in (64, 128)],
    "attend_packed": [Launch(4, n, block_t=128, block_n=t) for n in (1, 2, 3) for t in (16, 32)],
    "packed_values": [Launch(4, n, block_t=64, block_n=16) for n in (1, 2, 3)],  # of keys that are rebuilt
}
TABLE = "table"


class Variant(NamedTuple):
    """A kernel with a launch of its own; none is the table."""

    kernel: str = ""
    launch: Launch | None = None

    def __str__(self) -> str:
        if self.launch is None:
            return TABLE
        blocks = "resident" if self.launch.resident else f"block_r {self.launch.block_r}"
        if self.launch.block_n:
            blocks = f"{self.launch.block_n} tokens a warp"
        return f"{self.kernel}: {self.launch.warps} warps, {self.launch.stages} stages, {blocks}"


def variants(layer: Layer) -> list[Variant]:
    return [Variant(), *(Variant(kernel, x) for kernel in layer.kernels for x in ALTERNATIVES[kernel])]


@contextmanager
def used(variant: Variant) -> Iterator[None]:
    """Inside, calls are launched so."""
    with ExitStack() as patches:
        for name in ("cut", "planes", "banded", "absorbed", "rebuilt"):
            patches.enter_context(patch.object(plan, name, lru_cache(getattr(plan, name).__wrapped__)))
        if variant.launch is not None:
            patches.enter_context(patch.object(launch, variant.kernel, partial(choose, variant)))
        yield


def choose(
    variant: Variant, device: str, itemsize: int, *tile: Any, rows: int = 0, head: int = 0, **shape: Any
) -> Launch:
    """In the place of launch.latent_scores and its like, which take the shapes of a call, or of launch.attend_packed
    and its like, whose programs have one number of query rows."""
    found = variant.launch
    assert found is not None
    if tile:
        return found
    return found._replace(block_q=launch.block_q(rows), block_d=min(found.block_d, launch.block_d(head)))


def fault(layer: Layer, variant: Variant, dry: bool) -> str:
    """Why a variant cannot be timed; "" if it can."""
    x = layer.problem(FEW, 1, Bench.of([], dry))
    try:
        with used(variant):
            timing.gate(ours(x)(), attend(x.q[0], *x.heads(0))[None], TOLERANCE)
    except Exception as error:  # it is a result
        return f"{type(error).__name__}: {error}"[:300]
    return ""


def run(path: Path, layers: dict[str, Layer], batches: list[int], minutes: float, dry: bool) -> dict[str, Any]:
    """Times until the time is up, and saves after each layer."""
    begin, tokens, bench = time.monotonic(), FEW if dry else TOKENS, Bench.of([], dry)
    jobs = [(layer, variant) for layer in layers.values() for variant in variants(layer)][: 3 if dry else None]
    check = partial(_fault, dry=dry)
    if dry:
        reasons = [check(job) for job in jobs]
    else:
        with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
            reasons = list(tqdm(pool.map(check, jobs), total=len(jobs), desc="compiling", unit="launch", disable=None))
    found = dict(zip(jobs, reasons, strict=True))
    results: dict[str, Any] = {"machine": report.machine(), "dry": dry, "tokens": tokens, "rows": []}
    for name, batch in tqdm([(n, b) for n in layers for b in batches], desc="layers", unit="layer", disable=None):
        if results["rows"] and time.monotonic() - begin > 60 * minutes:
            break
        layer = layers[name]
        x, good = (
            layer.problem(tokens, batch, bench),
            [v for (own, v), why in found.items() if own == layer and not why],
        )
        prepared = {}
        for variant in good:
            with used(variant):
                prepared[str(variant)] = bench.clock.prepare(ours(x))
        times = timing.microseconds(bench.clock, prepared, SECONDS, bench.rounds)
        faults = {str(v): why for (own, v), why in found.items() if own == layer and why}
        results["rows"].append({"layer": name, "batch": batch, "must_read": x.must_read, "faults": faults,
                                "kernels": {} if dry else kernels(x),
                                "us": {n: round(t["median_us"], 2) for n, t in times.items()}})  # fmt: skip
        report.write(path, results)
        tqdm.write(lines(results["rows"][-1]))
    return results


def kernels(x: Problem) -> dict[str, float]:
    """Microseconds of each kernel of a step by the table, as the profiler sees them: the cache is not flushed."""
    step = ours(x)
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(PROFILED):
            step()
        torch.cuda.synchronize()
    found = ((e.key.removesuffix("_kernel"), e.device_time_total / PROFILED) for e in profiler.key_averages())
    return {name: round(us, 1) for name, us in found if us}


def _fault(job: tuple[Layer, Variant], dry: bool) -> str:
    return fault(*job, dry)


def lines(row: dict[str, Any], best: int = 3) -> str:
    """The table's launches, and the fastest alternatives of each kernel."""
    text = f"{row['layer']}, batch {row['batch']}: {row['us'].get(TABLE, float('nan')):.1f} us by the table"
    order = sorted((us, name) for name, us in row["us"].items() if name != TABLE)
    for kernel in dict.fromkeys(name.split(":")[0] for _, name in order):
        for us, name in [pair for pair in order if pair[1].startswith(kernel)][:best]:
            text += f"\n  {us:9.1f} us  {name}"
    return text


def table(results: dict[str, Any]) -> str:
    """Each timed step by the table, its fastest alternative, and its largest kernels where they were profiled."""
    line = "{:<40} {:>8} {:>5} {:>8} {:>8} {:>6} {:>8}  {}"
    text = [line.format("layer", "commit", "batch", "reads MB", "step us", "GB/s", "best us", "kernels, us")]
    for row in (row for row in results["rows"] if row["us"]):
        us, best, read = row["us"][TABLE], min(row["us"].values()), row["must_read"]
        largest = sorted(row["kernels"].items(), key=lambda pair: -pair[1])[:2]
        told = ", ".join(f"{name} {t:.0f}" for name, t in largest)
        commit = row.get("commit") or results["machine"]["commit"]
        numbers = (f"{read / 1e6:.1f}", f"{us:.1f}", f"{read / us / 1e3:.0f}", f"{best:.1f}")
        text.append(line.format(row["layer"], commit, row["batch"], *numbers, told).rstrip())
    return "\n".join(text)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--layer", nargs="+", choices=LAYERS, default=list(LAYERS), metavar="NAME")
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    timing.check_device(parser, args.dry)
    layers = DRY if args.dry else {name: LAYERS[name] for name in args.layer}
    run(args.out / f"launches_{'dry' if args.dry else 'gpu'}.json", layers, args.batch, args.minutes, args.dry)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
