"""The GPU half of bench.decode_latency: one layer's decode step by every provider, gated, then timed interleaved.

Times are CUDA-graph replays with the L2 cache flushed. GB/s counts the bytes a way must read: the dense cache, one of
few bits, or the rows of latents and both bases, once. A result on packed latents or on few bits is gated by what their
codes stand for; what they cost a model is not asked here. The limit is dense bytes over latent bytes, what reading
alone would give: a ratio of sizes, not a time of anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from bench.decode import decode_providers as providers
from bench.decode import timing
from bench.decode.decode_problem import attend, make
from bench.decode.decode_providers import Unavailable
from bench.decode.decode_shapes import (
    GROUPINGS,
    ITEMSIZE,
    KEEPS,
    LLAMA_2,
    LLAMA_31,
    MODELS,
    PACKINGS,
    Model,
    Shape,
    all_shapes,
)
from bench.support import report

TOKENS = (1024, 4096, 16384, 32768, 65536, 131072)
BATCHES = (1, 4, 16, 64)
HEADLINE, FULL = (32768, 1), (32768, 16)  # tokens and sequences: what every shape is timed at, and packed ones first
TOLERANCE = 2e-2
TIMED = 0.6  # seconds of timing a case
SPARE = 1 << 30  # bytes left free beside what is counted
MEMORY = "does not fit into the device's memory beside the others"
COPIED = 1 << 30  # bytes, to measure what memory gives
DRY_MODELS = (
    Model("dry MHA", 2, 2, 1e4, head_dim=64),
    Model("dry GQA", 4, 2, 1e4, head_dim=64),
    Model("dry GQA with offset", 6, 2, 1e4, head_dim=64, offset=True),
)


class Case(NamedTuple):
    shape: Shape
    tokens: int
    batch: int

    @property
    def name(self) -> str:
        return f"{self.shape.name}, keep {self.shape.keep}, {self.tokens} tokens, batch {self.batch}"


class Bench(NamedTuple):
    """Where and how to measure."""

    device: torch.device
    dtype: torch.dtype
    clock: timing.Clock
    left_out: frozenset[str]  # providers
    dry: bool

    @classmethod
    def of(cls, left_out: list[str], dry: bool) -> Bench:
        if dry:
            return cls(torch.device("cpu"), torch.float16, timing.WallClock(), frozenset(left_out), True)
        device = torch.device("cuda")
        return cls(device, torch.bfloat16, timing.GraphClock(device), frozenset(left_out), False)

    @property
    def rounds(self) -> tuple[int, int]:
        """Fewest and most of them."""
        return (1, 1) if self.dry else timing.ROUNDS

    def free(self) -> int:
        """Bytes of device memory that may be taken."""
        if self.dry:
            return 1 << 34
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0] - SPARE


def cases(dry: bool = False) -> list[Case]:
    """All cases, the most valuable first."""
    if dry:
        plain, grouped, offset = (Shape(model, "Palu", 0.5) for model in DRY_MODELS)
        packed = plain._replace(bits=PACKINGS[1])
        return [Case(plain, 64, 1), Case(grouped, 64, 2), Case(offset, 64, 1), Case(packed, 64, 1), Case(plain, 128, 1)]
    shapes = list(all_shapes())
    first = [s for s in shapes if s.model in (LLAMA_31, LLAMA_2)]
    first.sort(key=lambda s: (KEEPS.index(s.keep), PACKINGS.index(s.bits), GROUPINGS.index(s.grouping),
                              MODELS.index(s.model)))  # fmt: skip
    order = [Case(s, *FULL) for s in first if s.bits]
    order += [Case(s, *HEADLINE) for s in first]
    swept = [*first[:2], *(s for s in first if s.bits == PACKINGS[1])]
    order += [Case(s, tokens, 1) for tokens in (4096, 131072, 16384, 1024, 65536) for s in swept]
    order += [Case(s, 32768, batch) for batch in BATCHES for s in swept]
    order += [Case(s, *HEADLINE) for s in shapes]
    order += [Case(s, tokens, 1) for s in (*first, *shapes) for tokens in TOKENS]
    order += [Case(s, tokens, batch) for tokens in (32768, 4096) for s in shapes for batch in BATCHES]
    order += [Case(s, tokens, batch) for batch in BATCHES for tokens in TOKENS for s in shapes]
    return list(dict.fromkeys(order))


def run(path: Path, minutes: float, bench: Bench, resume: bool) -> dict[str, Any]:
    """Measures cases, one at least, until the time is up, and saves after each.

    resume: keeps the cases that the JSON has already.
    """
    begin = time.monotonic()
    machine = report.machine()
    results: dict[str, Any] = {"machine": machine, "dry": bench.dry, "rows": []}
    if resume and path.exists():
        results = report.load(path)
        if results["machine"] != machine:
            raise SystemExit(f"{path}: measured on another machine or commit: move it away, or run without --resume")
    else:
        results |= {"peers": {name: report.version(name) for name in providers.PEERS}, **memory_rates(bench)}
    done = {(r["shape"], r["keep"], r["tokens"], r["batch"]) for r in results["rows"]}
    todo = [c for c in cases(bench.dry) if (c.shape.name, c.shape.keep, c.tokens, c.batch) not in done]
    longest = 0.0
    for i, case in enumerate(tqdm(todo, desc="cases", unit="case", disable=None)):
        left = begin + 60 * minutes - time.monotonic()
        results["left_out"] = [c.name for c in todo[i:]]
        if i and left < longest:
            break
        started = time.monotonic()
        row = measure(case, bench)
        longest = max(longest, time.monotonic() - started)
        results["rows"].append(row)
        results["left_out"] = [c.name for c in todo[i + 1 :]]
        report.write(path, results)
        tqdm.write(lines(row, results))
    report.write(path, results)
    return results


def memory_rates(bench: Bench) -> dict[str, float]:
    """GB/s of a copy, and the microseconds that a graph of one tiny kernel takes: no figure can be below them."""
    one = torch.zeros(1, device=bench.device)
    floor = timing.microseconds(bench.clock, {"floor": bench.clock.prepare(lambda: one.add_(1))}, 0.2)
    nbytes = COPIED >> (10 if bench.dry else 0)
    return {"copy_gb_s": timing.copy_rate(bench.clock, bench.device, nbytes), "floor_us": floor["floor"]["median_us"]}


def measure(case: Case, bench: Bench) -> dict[str, Any]:
    """One case: what each provider took, or why it was not timed."""
    shape, runs = case.shape, {}
    row: dict[str, Any] = {
        "model": shape.model.name, "shape": shape.name, "keep": shape.keep, "kept": shape.kept, "limit": 1 / shape.kept,
        "tokens": case.tokens, "batch": case.batch, "dtype": str(bench.dtype).removeprefix("torch."),
        "times": {}, "must_read": {}, "errors": {}, "skipped": {}, "faults": {},
    }  # fmt: skip
    try:
        for entry in entries(case, bench):
            if (run := ready(entry, bench, row)) is not None:
                runs[entry.name] = run
    except torch.OutOfMemoryError:
        rest = [name for name in providers.NAMES if all(name not in row[k] for k in ("errors", "skipped", "faults"))]
        row["skipped"] |= dict.fromkeys(rest, MEMORY)
    row["times"] = timing.microseconds(bench.clock, runs, TIMED, bench.rounds)
    medians = {name: t["median_us"] for name, t in row["times"].items()}
    dense = {name: us for name, us in medians.items() if name in providers.DENSE}
    row["best_dense"] = min(dense, key=lambda name: dense[name]) if dense else None
    row["gb_s"] = {name: row["must_read"][name] / us / 1e3 for name, us in medians.items()}
    row["speedup"] = {name: dense[row["best_dense"]] / us for name, us in medians.items()} if dense else {}
    return row


class Entry(NamedTuple):
    """A provider of a case. truth: results of some sequences, once it is built."""

    name: str
    build: Callable[[], providers.Run]
    must_read: int
    truth: Callable[[], dict[int, Tensor]]


def entries(case: Case, bench: Bench) -> Iterator[Entry]:
    """Every provider; those for which there is no memory with a build that says so."""
    shape, free = case.shape, bench.free()
    dense_bytes = 4 * shape.model.kv_heads * shape.model.head_dim * case.tokens * case.batch
    plain_bytes = ITEMSIZE * sum(shape.key_ranks + shape.value_ranks)
    latent_bytes = (shape.row_bytes + plain_bytes) * case.tokens * case.batch  # in pages, and in order
    truth_bytes = 4 * dense_bytes // case.batch  # one sequence rebuilt and attended to in float32

    def too_large(nbytes: int) -> Callable[[], providers.Run]:
        return partial(refuse, f"needs {gib(nbytes)}, {gib(free)} are free")

    if latent_bytes + truth_bytes > free:
        yield from (Entry(name, too_large(latent_bytes + truth_bytes), 0, dict) for name in providers.NAMES)
        return
    free -= latent_bytes + truth_bytes
    x = make(shape, case.tokens, case.batch, bench.dtype, bench.device)
    cache = x.dense() if dense_bytes <= free else None
    if cache is None:
        true = truths(x.q, x.heads)
    else:
        true = {b: attend(x.q[b], cache[0][b], cache[1][b]) for b in range(x.batch)}

    def truth() -> dict[int, Tensor]:
        return true

    for name, provider in providers.DENSE.items():
        build = too_large(dense_bytes) if cache is None else partial(provider, x.q, *cache)
        if name == "FlexAttention" and (case.tokens, case.batch) != HEADLINE and not bench.dry:
            build = partial(refuse, "compiled and timed at 32768 tokens, batch 1 only: each shape takes it long")
        yield Entry(name, build, dense_bytes, truth)
    free -= 0 if cache is None else dense_bytes
    for name, way in providers.OURS.items():
        yield Entry(name, partial(way, x), x.must_read, truth)
    chunked = x.chunked()
    yield Entry(providers.FREE, partial(providers.ours, chunked), x.must_read, partial(truths, x.q, chunked.heads))
    if len(shape.key_ranks) != len(shape.value_ranks):
        reason = "one row a group is the same with Palu's groups: timed there"
        yield Entry(providers.SHARED, partial(refuse, reason), 0, dict)
    elif latent_bytes > free:
        yield Entry(providers.SHARED, too_large(latent_bytes), 0, dict)
    else:
        joint = make(shape, case.tokens, case.batch, bench.dtype, bench.device, shared=True)
        yield Entry(
            providers.SHARED, partial(providers.ours, joint), joint.must_read, partial(truths, joint.q, joint.heads)
        )
        free -= latent_bytes
    for name, low_bit in providers.LOW_BIT.items():
        if cache is None:  # it is made of that
            yield Entry(name, too_large(dense_bytes), 0, dict)
            continue
        own = low_bit(x.q, *cache)
        fits = own.nbytes <= free
        build = own.build if fits else too_large(own.nbytes)
        yield Entry(name, build, own.nbytes, partial(truths, x.q, own.heads))
        free -= own.nbytes if fits else 0
    for name, way in providers.REBUILDING.items():  # last: their graphs hold what they rebuild
        build = partial(refuse, "reads plain latents") if shape.bits else partial(way, x)
        yield Entry(name, build, x.must_read, truth)


def ready(entry: Entry, bench: Bench, row: dict[str, Any]) -> timing.Prepared | None:
    """A provider that runs and is right, before and after it was captured; or None, with the reason in the row."""
    name, build, must_read, truth = entry
    try:
        if name in bench.left_out:
            raise Unavailable("left out by --without")
        run = build()
        true = truth()
        some, expected = list(true), torch.stack(list(true.values()))
        timing.gate(run()[some], expected, TOLERANCE)
        found = bench.clock.prepare(run)
        row["errors"][name] = timing.gate(found.result[some], expected, TOLERANCE)
        row["must_read"][name] = must_read
        return found
    except Unavailable as reason:
        row["skipped"][name] = str(reason)
    except torch.OutOfMemoryError:
        row["skipped"][name] = MEMORY
    except Exception as error:  # one provider's failure is a result, not the end
        row["faults"][name] = f"{type(error).__name__}: {error}"
    return None


def refuse(reason: str) -> providers.Run:
    raise Unavailable(reason)


def truths(q: Tensor, heads: Callable[[int], tuple[Tensor, Tensor]]) -> dict[int, Tensor]:
    """The true result of the first and the last sequence, whose keys and values are made for that."""
    return {b: attend(q[b], *heads(b)) for b in sorted({0, len(q) - 1})}


def compile_all(jobs: int, dry: bool) -> None:
    """Compiles the kernels of every shape beforehand, in parallel; lengths do not matter to them, so few tokens do."""
    shapes = list(dict.fromkeys(case.shape for case in cases(dry)))[: 1 if dry else None]
    begin = time.monotonic()
    compile_one = partial(compile_shape, dry=dry)
    if jobs == 1:
        found = [compile_one(shape) for shape in tqdm(shapes, unit="shape", disable=None)]
    else:
        with ProcessPoolExecutor(min(jobs, len(shapes)), mp_context=get_context("spawn")) as pool:
            found = list(tqdm(pool.map(compile_one, shapes), total=len(shapes), unit="shape", disable=None))
    faults = [fault for shape_faults in found for fault in shape_faults]
    print(*faults, sep="\n")
    print(f"kernels of {len(shapes)} shapes compiled in {time.monotonic() - begin:.0f} s, {len(faults)} faults")
    if faults:
        raise SystemExit(1)


def compile_shape(shape: Shape, dry: bool) -> list[str]:
    """Runs each of our ways once; the faults found."""
    others = [n for n in providers.NAMES if not n.startswith(("lrattn", "Palu"))]
    clock = timing.WallClock()
    device, dtype = (torch.device("cpu"), torch.float16) if dry else (torch.device("cuda"), torch.bfloat16)
    bench = Bench(device, dtype, clock, frozenset(others), dry)
    row = measure(Case(shape, 64, 1), bench)
    return [f"{shape.name}, keep {shape.keep}: {name}: {fault}" for name, fault in row["faults"].items()]


def lines(row: dict[str, Any], results: dict[str, Any]) -> str:
    """One case as text."""
    text = f"{row['shape']}, kept {row['kept']:.3f}, {row['tokens']} tokens, batch {row['batch']}:"
    for name, t in row["times"].items():
        rate = row["gb_s"][name]
        speed = f"{row['speedup'][name]:5.2f} x best dense" if row["speedup"] else ""
        text += (
            f"\n  {name:<27} {t['median_us']:9.1f} us  ({t['p10_us']:.1f} to {t['p90_us']:.1f})  {rate:7.0f} GB/s, "
            f"{100 * rate / results['copy_gb_s']:5.1f} % of a copy  {speed}"
        )
    for kind in ("skipped", "faults"):
        for name, reason in row[kind].items():
            text += f"\n  {name:<27} {'not timed' if kind == 'skipped' else 'FAULT'}: {reason.splitlines()[0]}"
    return text + (f"\n  {'limit, 1 / kept':<27} {row['limit']:.2f} x" if row["speedup"] else "")


def gib(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB"
