"""The first minutes of keys before RoPE by a band on a GPU: each kernel alone, beside what a simulator said of it.

    python -m bench.decode.band_minutes --out FOLDER [--minutes 3] [--resume] [--dry]

Llama-2-7B's and Llama-3.1-8B's layers at half and 0.3 of the bytes, 32K tokens, batch 1 and 16: the kernels of a decode
call, each in a CUDA graph of its own on what the call left it, and the whole call, timed as in bench.decode_latency:
events around a replay, the L2 cache flushed. So a kernel's figure has the launch of a graph in it, which is floor_us
for the smallest there is, and it finds nothing in L2 of what the one before it wrote. Beside it are the figures of
results/simulated_calls.json for an H100 [simulated], and measured over simulated. Then the same with other launches of
`attend` and other numbers of splits, and with the band switched off, beside results/launches_gpu.json [measured].

A figure is kept only where the call, and what its kernels alone leave, are right. attend at Llama-2-7B, keep 0.3,
batch 1 above 80 us falsifies the design: that is said, and no error. The most valuable cases come first, and it ends
within its minutes. band_gpu.json; the exit status is 1 if a result is wrong. --dry: tiny, in the interpreter.

Bytes from DRAM are not counted: that takes a profiler from outside, ncu.
"""

from __future__ import annotations

import argparse
import inspect
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from tqdm import tqdm

from bench.decode import launches, timing, ways
from bench.decode.decode_providers import Run, ours
from bench.decode.decode_shapes import Model, Shape
from bench.decode.gpu_decode import TOLERANCE, Bench, memory_rates, truths
from bench.decode.launches import Layer, Variant
from bench.support import report
from lrattn.kernels import decode
from lrattn.kernels.arguments import Span
from lrattn.kernels.launch import Launch

SIMULATED = report.RESULTS / "simulated_calls.json"
TOKENS, BATCHES, PAGE = 32768, (1, 16), 64
LIMIT_US = 80.0  # of attend at the first case: above it the design is wrong
SECONDS = 0.4  # of timing a case
NAMES = tuple(f"{model}, keep {keep}" for model in ("Llama-2-7B", "Llama-3.1-8B") for keep in (0.3, 0.5))
DRY_TOKENS = 300
DRY = {
    "dry MHA": Layer(Shape(Model("dry MHA", 4, 4, 5e6, head_dim=64), "Palu", 0.25)),
    "dry GQA": Layer(Shape(Model("dry GQA", 8, 4, 5e6, head_dim=64), "Palu", 0.25)),
}
WRITTEN = {  # by each kernel of a call: what it gives, the first that is there
    "absorb": ("x",), "attend": ("y", "s"), "attend_rebuilt": ("y", "s"),
    "latent_values": ("y",), "combine": ("out",),
}  # fmt: skip
BEFORE = {  # names of kernels there were, of which one now does the work
    "absorb": ("turn_queries",), "attend_rebuilt": ("latent_scores",), "latent_values": ("latent_values",),
    "combine": ("merge", "combine"),
}  # fmt: skip
CALL = "call"


class Change(NamedTuple):
    """Of a call. launch: of attend, in the place of the table's. splits: times the number it would take."""

    launch: Launch | None = None
    splits: float = 1.0
    band: bool = True

    @contextmanager
    def made(self) -> Iterator[None]:
        """Inside, calls are run so, but for splits."""
        with launches.used(Variant("attend", self.launch)) if self.band else ways.rebuilt():
            yield


TABLE, REBUILT = "table", "rebuilt whole"
SHORT, SHORT_4, LONG = "tiles of 64, 8 warps", "tiles of 64, 4 warps", "tiles of 128, 8 warps"
CHANGES = {
    TABLE: Change(),
    REBUILT: Change(band=False),
    SHORT: Change(Launch(8, 1, block_r=128)),
    SHORT_4: Change(Launch(4, 1, block_r=128)),
    LONG: Change(Launch(8, 1, block_r=128, block_t=128)),
    "half the splits": Change(splits=0.5),
    "twice the splits": Change(splits=2.0),
}


class Case(NamedTuple):
    layer: str
    batch: int
    change: str = TABLE

    def __str__(self) -> str:
        return f"{self.layer}, batch {self.batch}, {self.change}"


FIRST = Case(NAMES[0], BATCHES[0])


def stages(dry: bool) -> list[list[Case]]:
    """By value. What a stage launches is compiled before its first case is timed."""
    if dry:
        mha, gqa = DRY
        return [[Case(mha, 1), Case(gqa, 2)], [Case(mha, 1, name) for name in (LONG, "twice the splits", REBUILT)]]
    wide = [Case(name, batch, SHORT) for batch in BATCHES for name in NAMES if "0.5" in name]
    wide += [Case(name, batch, REBUILT) for batch in BATCHES for name in NAMES]
    wide += [Case(name, BATCHES[0], change) for change in CHANGES if "splits" in change for name in NAMES[:2]]
    wide += [Case(c.layer, c.batch, SHORT_4) for c in wide if c.change == SHORT]
    wide += [Case(name, batch, LONG) for batch in BATCHES for name in NAMES if "0.3" in name]
    return [[Case(name, batch) for batch in BATCHES for name in NAMES], wide]


def layer_of(case: Case, dry: bool) -> Layer:
    return DRY[case.layer] if dry else launches.LAYERS[case.layer]


def launched(step: Run) -> dict[str, list[tuple[Any, ...]]]:
    """What each kernel of a step is given, at each of its launches; the step is run."""
    found: dict[str, list[tuple[Any, ...]]] = {}

    def record(name: str, own: Any, *given: Any) -> None:
        found.setdefault(name, []).append(given)
        own(*given)

    with patch.multiple(decode, **{name: partial(record, name, getattr(decode, name)) for name in WRITTEN}):
        step()
    return found


def alone(found: dict[str, list[tuple[Any, ...]]]) -> dict[str, Run]:
    """A run for each kernel of a step: its launches, on what the step left, to where they were. Returns what the last
    of them wrote."""

    def again(name: str, calls: list[tuple[Any, ...]]) -> Run:
        own = getattr(decode, name)
        given = inspect.signature(own).bind(*calls[-1]).arguments
        result = next(given[n] for n in WRITTEN[name] if given.get(n) is not None)

        def run() -> Tensor:
            for call in calls:
                own(*call)
            return result

        return run

    return {name: again(name, calls) for name, calls in found.items()}


def parts(given: tuple[Any, ...]) -> int:
    """In how many a sequence is cut by a launch."""
    return next(x for x in given if isinstance(x, Span)).parts


def measure(case: Case, bench: Bench) -> dict[str, Any]:
    """Times of the kernels and of the call.

    Raises: timing.WrongResult where the call is wrong, or the last sequence of what its kernels leave one by one.
    """
    change, tokens = CHANGES[case.change], DRY_TOKENS if bench.dry else TOKENS
    x = layer_of(case, bench.dry).problem(tokens, case.batch, bench)
    true = truths(x.q, x.heads)
    expected = torch.stack(list(true.values()))
    with change.made():
        call = {}
        if change.splits != 1:
            call["num_splits"] = max(1, round(change.splits * parts(launched(ours(x))["attend"][0])))
        whole = bench.clock.prepare(ours(x, **call))
        if not whole.result.isfinite().all():
            raise timing.WrongResult("results are not all finite: not timed")
        error = timing.gate(whole.result[list(true)], expected, TOLERANCE)
        found = launched(ours(x, **call))
        kernels = {name: bench.clock.prepare(run) for name, run in alone(found).items()}
        timing.gate(kernels["combine"].result.flatten(0, 1)[-1:], expected[-1:], TOLERANCE)
        inside = {} if bench.dry or call else launches.kernels(x)
    times = timing.microseconds(bench.clock, {**kernels, CALL: whole}, SECONDS, bench.rounds)
    read = case.batch * tokens * x.layer.bytes_per_token
    cut = {name: parts(calls[0]) for name, calls in found.items() if name.startswith("attend")}
    return {"times": times, "parts": cut, "latent_bytes": read, "error": error, "profiled_us": inside,
            **beside(case, {name: t["median_us"] for name, t in times.items()})}  # fmt: skip


def beside(case: Case, us: dict[str, float]) -> dict[str, dict[str, float]]:
    """What was said of each kernel, and how often that its time is: "simulated_us" of an H100 where keys go by a band,
    the call's estimated, or "before_us" of whole keys, measured before, by a profiler."""
    told = predicted(case) if CHANGES[case.change].band else before(case)
    name = "simulated_us" if CHANGES[case.change].band else "before_us"
    return {name: told, "ratio": {kernel: us[kernel] / t for kernel, t in told.items() if kernel in us}}


def predicted(case: Case) -> dict[str, float]:
    """Microseconds of the table's kernels, all their launches [simulated], and of the call [estimated]."""
    for row in report.load(SIMULATED)["rows"]:
        if (row["layer"], row["batch"], row["tokens"], row["page"]) == (case.layer, case.batch, TOKENS, PAGE):
            found = {CALL: row["call_us"]}
            for kernel in row["kernels"]:
                found[kernel["kernel"]] = found.get(kernel["kernel"], 0.0) + kernel["us"]
            return found
    return {}


def before(case: Case) -> dict[str, float]:
    """Microseconds of the kernels that did the same before [measured], and of the step where it was timed."""
    for row in report.load(launches.PATH)["rows"]:
        if (row["layer"], row["batch"]) == (case.layer, case.batch) and (kernels := row["kernels"]):
            found = {name: sum(kernels[old] for old in olds) for name, olds in BEFORE.items()}
            return found | ({CALL: row["us"][launches.TABLE]} if row["us"] else {})
    return {}


def compile_all(cases: list[Case]) -> dict[Case, str]:
    """Compiles what cases launch, on all cores, in other processes; the reasons of those that cannot be run."""
    jobs = list(dict.fromkeys(case._replace(batch=1) for case in cases))
    workers = min(len(os.sched_getaffinity(0)), len(jobs))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        reasons = list(tqdm(pool.map(reason, jobs), total=len(jobs), desc="compiling", unit="launch", disable=None))
    found = dict(zip(jobs, reasons, strict=True))
    return {case: why for case in cases if (why := found[case._replace(batch=1)])}


def reason(case: Case) -> str:
    """Why a case cannot be run; "" if it can. Few splits and many are combined by two kernels: both are compiled."""
    x = layer_of(case, False).problem(TOKENS, case.batch, Bench.of([], False))
    true = torch.stack(list(truths(x.q, x.heads).values()))
    try:
        with CHANGES[case.change].made():
            for splits in (0, 1):
                timing.gate(ours(x, num_splits=splits)(), true, TOLERANCE)
    except Exception as error:  # it is a result
        return told(error)
    return ""


def told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def run(path: Path, minutes: float, bench: Bench, resume: bool) -> dict[str, Any]:
    """Cases, one at least, until the time is up, saved after each. resume: keeps those that the JSON has already."""
    begin, machine = time.monotonic(), report.machine()
    results: dict[str, Any] = {"machine": machine, "dry": bench.dry, "tokens": DRY_TOKENS if bench.dry else TOKENS}
    if resume and path.exists():
        results = report.load(path)
        if results["machine"] != machine:
            raise SystemExit(f"{path}: measured on another machine or commit: move it away, or run without --resume")
    else:
        results |= {**memory_rates(bench), "rows": [], "verdict": {}, "left_out": []}
    rows, longest, compiling = results["rows"], 0.0, 0.0
    done = {Case(row["layer"], row["batch"], row["change"]) for row in rows}
    todo = [[case for case in stage if case not in done] for stage in stages(bench.dry)]
    waiting = [case for stage in todo for case in stage]

    def left() -> float:
        return begin + 60 * minutes - time.monotonic()

    for stage in filter(None, todo):
        if rows and left() < compiling + longest:
            break
        started = time.monotonic()
        reasons = {} if bench.dry else compile_all(stage)
        compiling = time.monotonic() - started
        for case in stage:
            if rows and left() < longest:
                break
            started = time.monotonic()
            rows.append({**case._asdict(), **tried(case, reasons.get(case, ""), bench)})
            longest = max(longest, time.monotonic() - started)
            waiting.remove(case)
            results |= {"verdict": verdict(results), "left_out": list(map(str, waiting))}
            report.write(path, results)
            print(lines(rows[-1]), flush=True)
    return results


def tried(case: Case, why: str, bench: Bench) -> dict[str, Any]:
    """What is measured, or a fault; of a launch that is not the table's, `unfit` where it does not run at all."""
    if not why:
        try:
            return measure(case, bench)
        except Exception as error:  # the others are measured too
            why = told(error)
    other = CHANGES[case.change].launch is not None and not why.startswith(timing.WrongResult.__name__)
    return {"times": {}, "unfit" if other else "fault": why}


def verdict(results: dict[str, Any]) -> dict[str, Any]:
    """What the first case says of the design: "holds", "falsified", or "undecided" between, where the launch of a graph
    is what is too much; "not measured"."""
    found = {"case": str(FIRST), "limit_us": LIMIT_US, "floor_us": results["floor_us"]}
    for row in results["rows"]:
        if (row["layer"], row["batch"], row["change"]) == FIRST and "attend" in row["times"]:
            us = row["times"]["attend"]["median_us"]
            said = "falsified" if us - results["floor_us"] > LIMIT_US else "holds" if us <= LIMIT_US else "undecided"
            return {"design": said, "attend_us": us, **found}
    return {"design": "not measured", **found}


def lines(row: dict[str, Any]) -> str:
    """A case as text."""
    text = str(Case(row["layer"], row["batch"], row["change"]))
    for kind in ("fault", "unfit"):
        if kind in row:
            return f"{text}: {kind.upper()}: {row[kind]}"
    said = "simulated_us" if "simulated_us" in row else "before_us"
    for name, t in row["times"].items():
        text += f"\n  {name:<14} {t['median_us']:9.1f} us  ({t['p10_us']:.1f} to {t['p90_us']:.1f})"
        if name in row["ratio"]:
            kind = "before, measured" if said == "before_us" else "estimated" if name == CALL else "simulated"
            text += f"  {row['ratio'][name]:6.2f} x {row[said][name]:.1f} [{kind}]"
        if name == "attend":
            text += f"  {row['latent_bytes'] / t['median_us'] / 1e3:.0f} GB/s"
    return text


def conclusion(results: dict[str, Any]) -> str:
    """The verdict as text."""
    found, gpu = results["verdict"], results["machine"]["gpu"]
    text = f"VERDICT on keys by a band: {found['design']}"
    if "attend_us" not in found:
        return text
    return (
        f"{text}: attend took {found['attend_us']:.1f} us at {found['case']}, on {gpu}; the limit is "
        f"{found['limit_us']:.0f} us. The launch of a graph is in it: the smallest takes {found['floor_us']:.1f} us"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--resume", action="store_true", help="keep the cases that the JSON already has")
    parser.add_argument("--dry", action="store_true")
    args = parser.parse_args()
    timing.check_device(parser, args.dry)
    path = args.out / f"band_{'dry' if args.dry else 'gpu'}.json"
    results = run(path, args.minutes, Bench.of([], args.dry), args.resume)
    faults = [lines(row) for row in results["rows"] if "fault" in row]
    print(f"left out for time: {len(results['left_out'])} cases", *faults, sep="\n")
    print(f"{len(results['rows'])} cases measured, {len(faults)} faults", conclusion(results), sep="\n")
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
