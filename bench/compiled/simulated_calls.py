"""Microseconds of whole decode calls whose keys are rebuilt, by a simulator: no GPU is used, nothing is measured.

    python -m bench.compiled.simulated_calls --simulator FILE [--model NAME ..] [--rank N ..] [--batch N ..]
        [--tokens N ..] [--page N ..] [--report N]

FILE is as for bench.compiled.simulated. A call of the library is made on tensors without memory, cut as for an H100,
and each launch of it compiled for sm_90 and simulated [simulated]: as many programs as its grid has, of as many tiles
as the call's span gives one. A call [estimated] is their sum and what is not simulated:

* combination and the gaps between launches, as an H100 had them for the same layer in results/launches_gpu.json
  [measured]: merge and combine, two kernels then and one now; a step less its kernels, where batch 1 has both;
* what a kernel reads of temporaries that no cache can hold, once, at the rate of memory.

It goes to results/simulated_calls.json, beside the time of a dense 16-bit cache's bytes at 92 % of that rate
[estimated]. With a choice of rows nothing is written: to see what an edit of a kernel does. --report lists where the
clocks of each kernel go, by its N slowest instructions.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from tqdm import tqdm
from triton.runtime.jit import JITFunction

import lrattn
from bench.compiled import resources
from bench.compiled.resources import META, compiling, empty, fp32
from bench.compiled.simulated import BATCHES, LENGTHS, LIMIT, MEMORY, PROCESSORS, SHARE, loaded, parsed
from bench.decode import launches
from bench.decode.decode_shapes import ITEMSIZE, LLAMA_2, LLAMA_31, Shape
from bench.support import report
from lrattn.factors.shapes import cdiv
from lrattn.kernels import decode, launch
from lrattn.kernels.arguments import Call, Rule, Tokens

PATH = report.RESULTS / "simulated_calls.json"
BEFORE = "b398a1b"  # the commit whose steps and kernels were measured
KEEPS = (0.5, 0.3)  # ranks 256 and 160 of four heads
PAGE = 64
CACHED = 30 << 20  # bytes of temporaries that stay in an H100's L2 cache
COMBINE = "combine_kernel"  # the one that is not simulated


class Case(NamedTuple):
    """A decode call of one token a sequence."""

    shape: Shape
    batch: int
    tokens: int
    page: int = PAGE

    @property
    def layer(self) -> str:
        """As launches.LAYERS names it."""
        return f"{self.shape.model.name}, keep {self.shape.keep}"

    def told(self) -> dict[str, Any]:
        rank = self.shape.key_ranks[0]
        return {"model": self.shape.model.name, "rank": rank, "batch": self.batch, "tokens": self.tokens,
                "page": self.page}  # fmt: skip


SHAPES = [Shape(model, "Palu", keep) for model in (LLAMA_2, LLAMA_31) for keep in KEEPS]
CASES = [
    *(Case(shape, batch, tokens) for shape in SHAPES for batch in BATCHES for tokens in LENGTHS),
    Case(SHAPES[0], 1, 32768, 16),
]


class Launched(NamedTuple):
    """A launch that was compiled and did not run."""

    kernel: str
    binary: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    @property
    def programs(self) -> int:
        count = 1
        for axis in self.grid:
            count *= axis
        return count

    @property
    def tiles(self) -> int:
        """Of a sequence, that the programs share; 0 where none goes through several."""
        return self.arguments["tiles"] if "splits" in self.arguments else 0

    @property
    def trips(self) -> float:
        """Tiles of a program, on average."""
        return self.tiles / self.arguments["splits"] if self.tiles else 1

    def reads(self, cached: Tensor | None) -> bool:
        return any(x is cached for x in self.arguments.values())


@contextmanager
def recording() -> Iterator[list[Launched]]:
    """Inside, launches compile for an H100 and do not run; yields them."""
    found: list[Launched] = []
    with compiling("sm90") as compiled:
        inside = JITFunction.run

        def run(self: Any, *args: Any, grid: Any, **kwargs: Any) -> None:
            inside(self, *args, grid=grid, **kwargs)
            found.append(Launched(*compiled[-1], tuple(grid), dict(zip(self.arg_names, args, strict=False)) | kwargs))

        with patch.object(JITFunction, "run", run), patch.object(launch, "processors", lambda _: PROCESSORS):
            yield found


@cache
def layer(shape: Shape) -> lrattn.LayerFactors:
    """No numbers, only shapes."""
    model = shape.model
    keys, values = (
        lrattn.Projection(torch.zeros(model.kv_heads, ranks[0], model.head_dim, dtype=torch.bfloat16), ranks)
        for ranks in (shape.key_ranks, shape.value_ranks)
    )
    rope = lrattn.Rope(model.theta, model.head_dim, max(LENGTHS), scaling=dict(model.scaling))
    return lrattn.LayerFactors(keys, values, rope).to(META)


def call_of(case: Case) -> Call:
    keys, values = layer(case.shape).operands
    pages = cdiv(case.tokens, case.page)
    ck, cv = (
        empty(case.batch * pages, case.page, sum(ranks), dtype=torch.bfloat16)
        for ranks in (case.shape.key_ranks, case.shape.value_ranks)
    )
    q = empty(case.batch, 1, case.shape.model.query_heads, case.shape.model.head_dim, dtype=torch.bfloat16)
    tokens = Tokens(empty(case.batch, pages), empty(case.batch), None, None, case.tokens)
    return Call(q, ck, cv, keys, values, tokens, Rule(case.shape.model.head_dim**-0.5, 0.0, True, 0))


def launched(call: Call) -> list[Launched]:
    """The launches of one call."""
    with recording() as found:
        decode.decode_attention(call, None, None, "heads", 0, LIMIT, torch.empty_like(call.q), fp32(*call.q.shape[:3]))
    return found


def own(call: Call) -> list[Tensor]:
    """The tensors that a call comes with."""
    parts = call.keys, call.values, tuple(vars(call.tokens).values()), tuple(vars(call).values())
    return [x for part in parts for x in part if isinstance(x, Tensor)]


class Simulated:
    """What a simulator says of launches. Those that are alike are simulated once."""

    def __init__(self, simulator: Any, sites: int = 0) -> None:
        self.simulator, self.sites = simulator, sites
        self.code: dict[str, Any] = {}
        self.seen: dict[tuple[Any, ...], Any] = {}

    def __call__(self, x: Launched, nbytes: int, groups: int, page: int) -> dict[str, Any]:
        """Of one launch. nbytes: that it moves through memory. groups: of heads that share latents."""
        found = self.code.get(x.binary.hash)
        if found is None:
            found = self.code[x.binary.hash] = parsed(self.simulator, x.binary.asm["cubin"])
        code, usage = found
        block_t = x.arguments.get("BLOCK_T", launch.BLOCK_T)
        given = {
            "warps": x.binary.metadata.num_warps, "reg": usage["REG"], "shared": x.binary.metadata.shared,
            "programs": x.programs, "dram_bytes": nbytes, "stages": x.binary.metadata.num_stages,
            "lookup_lines": max(1, 8 * page // block_t),  # trips that 32 bytes of the page table are for
        }  # fmt: skip
        if x.tiles:
            pieces = x.arguments.get("PIECES", 1)  # of latents, each read by other programs
            given["unique"] = min(1.0, groups * pieces / x.grid[0])  # of the bytes of programs side by side
        trips = cdiv(x.tiles, x.arguments["splits"]) if x.tiles else 1
        key = (x.binary.hash, trips, *given.values())
        if key not in self.seen:
            result = self.simulator.predict(code, self.simulator.Machine(), trips=trips, **given)
            if result.waves > 1 and round(x.trips) < trips:  # a program with fewer tiles makes room for another
                trips = round(x.trips)
                result = self.simulator.predict(code, self.simulator.Machine(), trips=trips, **given)
            self.seen[key] = result, trips
            if self.sites:
                print(f"{x.kernel}: {x.programs} programs of {trips} trips, {given['warps']} warps, "
                      f"{given['shared']} bytes of shared memory")  # fmt: skip
                print(self.simulator.report(result, code, block_t, self.sites))
        result, trips = self.seen[key]
        return {"kernel": x.kernel.removesuffix("_kernel"), "us": round(result.us, 1), "programs": x.programs,
                "trips": trips, "bytes": nbytes, "registers": usage["REG"], "spilled": usage["STACK"]}  # fmt: skip


def simulate(simulated: Simulated, case: Case) -> dict[str, Any]:
    """A row of the results: of a call, kernel by kernel in the order of their launches."""
    call = call_of(case)
    caches, given, done = (call.ck, call.cv), own(call), []
    kernels, combined, again = [], 0, 0
    for x in launched(call):
        if x.kernel == COMBINE:
            combined += 1
            continue
        temporary = [a for a in x.arguments.values() if isinstance(a, Tensor) and not any(a is b for b in given)]
        temporary = [a for a in temporary if a.dim() > 2]
        read = [cached for cached in caches if x.reads(cached)]
        if x.tiles:
            tokens = min(x.tiles * x.arguments["BLOCK_T"], case.tokens) * x.grid[-1]
            nbytes = tokens * sum(cached.shape[2] * cached.itemsize for cached in read)
        else:
            nbytes = sum(a.nbytes for a in temporary)
        reread = [a.nbytes for a in temporary if any(a is b for b in done)]
        again += sum(n for n in reread if n > CACHED)
        done += temporary
        part = "prepare" if not read else "values" if read == [call.cv] else "attend"
        kernels.append({"part": part, **simulated(x, nbytes, call.keys.sizes.groups, case.page)})
    model = case.shape.model
    dense = case.batch * case.tokens * 2 * model.kv_heads * model.head_dim * ITEMSIZE
    constants = {name: round(us, 1) for name, us in unsimulated(case, combined).items()}
    constants["temporaries_us"] = round(again / MEMORY * 1e6, 1)
    total = sum(kernel["us"] for kernel in kernels)
    return {
        **case.told(), "kernels": kernels, "simulated_us": round(total, 1), **constants,
        "call_us": round(total + sum(constants.values()), 1), "dense_us": round(dense / (SHARE * MEMORY) * 1e6, 1),
    }  # fmt: skip


@cache
def measured() -> dict[tuple[str, int], dict[str, Any]]:
    """Rows of bench.decode.launches, by layer and batch."""
    rows = report.load(launches.PATH)["rows"]
    return {(row["layer"], row["batch"]): row for row in rows if row["commit"] == BEFORE}


def unsimulated(case: Case, combined: int) -> dict[str, float]:
    """Microseconds of `combined` times merge and combine, and of the gaps between launches, of the same layer."""
    kernels, alone = measured()[case.layer, case.batch]["kernels"], measured()[case.layer, 1]
    gaps = alone["us"][launches.TABLE] - sum(alone["kernels"].values())
    return {"combine_us": combined * (kernels["merge"] + kernels["combine"]), "gaps_us": gaps}


def step(row: dict[str, Any]) -> float:
    """Microseconds that the same step took by the kernels there were before [measured]: where only its kernels were
    timed, their sum."""
    return row["us"][launches.TABLE] if row["us"] else sum(row["kernels"].values())


def table(results: dict[str, Any]) -> str:
    """Microseconds of a call's kernels [simulated], of what is not simulated [measured], and of the call and a dense
    cache's bytes [estimated]; of a step by the kernels there were before [measured], - where it was not measured.
    prepare: of the queries. attend: scores, or one pass over both. rest: combination, gaps, and temporaries."""
    line = "{:14} {:>4} {:>4} {:>5} {:>6} {:>8} {:>8} {:>8} {:>8} {:>6} {:>8} {:>8} {:>10} {:>9} {:>7} {:>7}"
    names = ("model", "rank", "page", "batch", "tokens", "prepare", "attend", "values", "sum", "rest", "call us",
             "dense us", "dense / it", "registers", "spilled", "old us")  # fmt: skip
    lines = [line.format(*names)]
    old = {(case.told()["model"], case.told()["rank"], case.batch, case.tokens): case.layer for case in CASES}
    timed = report.load(launches.PATH)["tokens"]
    for r in results["rows"]:
        parts = [sum(k["us"] for k in r["kernels"] if k["part"] == name) for name in ("prepare", "attend", "values")]
        main = max(r["kernels"], key=lambda kernel: kernel["us"])
        before = measured().get((old[r["model"], r["rank"], r["batch"], r["tokens"]], r["batch"]))
        us = f"{step(before):.1f}" if before and r["tokens"] == timed and r["page"] == PAGE else "-"
        lines.append(line.format(
            r["model"], r["rank"], r["page"], r["batch"], r["tokens"], *(f"{part:.1f}" if part else "-" for part in parts),
            f"{r['simulated_us']:.1f}", f"{r['call_us'] - r['simulated_us']:.1f}", f"{r['call_us']:.1f}",
            f"{r['dense_us']:.1f}", f"{r['dense_us'] / r['call_us']:.2f}", main["registers"], main["spilled"], us,
        ))  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = CASES[0].told()
    for name, value in names.items():
        parser.add_argument(f"--{name}", nargs="+", type=type(value), help="rows to simulate; nothing is written")
    parser.add_argument("--report", type=int, default=0, metavar="N", help="instructions to list of each kernel")
    simulator, args = loaded(parser)
    wanted = {name: getattr(args, name) for name in names if getattr(args, name)}
    chosen = [case for case in CASES if all(case.told()[name] in wanted[name] for name in wanted)]
    if not chosen:
        parser.error(f"expected rows that there are, got {wanted}")
    simulated = Simulated(simulator, args.report)
    rows = [simulate(simulated, case) for case in tqdm(chosen, unit="call", disable=None)]
    results = {"sources": resources.sources_hash(), "triton": triton.__version__, "rows": rows}
    if not wanted:
        report.save(PATH, results)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
