"""Microseconds of whole decode calls whose keys are rebuilt, by a simulator: no GPU is used, nothing is measured.

    python -m bench.compiled.simulated_calls --simulator FILE [--model NAME ..] [--rank N ..] [--batch N ..]
        [--tokens N ..] [--page N ..] [--report N]

FILE is as for bench.compiled.simulated. A call of the library is made on tensors without memory, cut as for an H100,
and each launch of it compiled for sm_90 and simulated [simulated]: as many programs as its grid has, of as many tiles
as the second axis leaves each where it reads a cache, of all blocks of ranks and splits where these are combined, else
of one trip. A loop inside that of the tiles is run once. Of the kernel that makes queries ready both kinds of programs
are simulated, as if all were such, and count by their shares. A call [estimated] is the sum of its kernels, and what is
not simulated:

* gaps, as an H100 had them in results/launches_gpu.json for the same ranks, plain [measured]: a graph's step less its
  kernels, of batch 1, where both were timed;
* what a kernel reads of temporaries that are too large for the L2 cache, once, at the rate of memory.

It goes to results/simulated_calls.json, beside the time of a dense 16-bit cache's bytes at 92 % of that rate
[estimated]. With chosen rows nothing is written: to see what an edit of a kernel does. --report lists where the clocks
of each kernel go, by its N slowest instructions.

What the simulator does not know is named there. The kernel that turned queries took 2 to 3 times as long on the H100 as
it gives the present one, those that merged and combined splits 1.2 to 2.2 times (batch 1).
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from itertools import product
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
ABSORB = "absorb_kernel"
BEFORE = "b398a1b"  # the commit whose steps and kernels were measured
SHAPES = [Shape(model, "Palu", keep) for model in (LLAMA_2, LLAMA_31) for keep in (0.5, 0.3)]  # ranks 256 and 160
PACKED = [shape._replace(bits=resources.PACKED) for shape in SHAPES[::2]]
DTYPE, PAGE = torch.bfloat16, 64
CACHED = 30 << 20  # bytes of a temporary that stay in an H100's L2 cache of 50 MiB, through which latents go
# Of a call; attend reads keys, or both sides, and values those alone.
QUERIES, ATTEND, VALUES, COMBINE = PARTS = ("queries", "attend", "values", "combine")


class Case(NamedTuple):
    """A decode call of one token a sequence."""

    shape: Shape
    batch: int
    tokens: int
    page: int = PAGE

    @property
    def layer(self) -> str:
        """As launches.LAYERS names it."""
        kind = f"{self.widths} bits" if self.shape.bits else f"keep {self.shape.keep}"
        return f"{self.shape.model.name}, {kind}"

    @property
    def widths(self) -> str:
        return "/".join(map(str, self.shape.bits)) or "16"

    def told(self) -> dict[str, Any]:
        row = {"model": self.shape.model.name, "rank": self.shape.key_ranks[0], "bits": self.widths}
        return {"layer": self.layer, **row, "batch": self.batch, "tokens": self.tokens, "page": self.page}

    def call(self) -> Call:
        """On tensors without memory."""
        layer, model, pages = layer_of(self.shape), self.shape.model, cdiv(self.tokens, self.page)
        keys, values = layer.operands
        ck, cv = lrattn.allocate_cache(layer, self.batch * pages, self.page)
        q = empty(self.batch, 1, model.query_heads, model.head_dim, dtype=DTYPE)
        tokens = Tokens(empty(self.batch, pages), empty(self.batch), None, None, self.tokens)
        return Call(q, ck, cv, keys, values, tokens, Rule(model.head_dim**-0.5, 0.0, True, 0))


CASES = [
    *map(Case._make, product(SHAPES, BATCHES, LENGTHS, [PAGE])),
    Case(SHAPES[0], 1, 32768, 16),
    *map(Case._make, product(PACKED, BATCHES, LENGTHS, [PAGE])),
]


@cache
def layer_of(shape: Shape) -> lrattn.LayerFactors:
    """No numbers of the bases, only shapes; the rope is the model's."""
    model = shape.model
    keys, values = (
        lrattn.Projection(
            torch.zeros(model.kv_heads, ranks[0], model.head_dim, dtype=DTYPE), ranks, format=shape.formats(ranks)
        )
        for ranks in (shape.key_ranks, shape.value_ranks)
    )
    rope = lrattn.Rope(model.theta, model.head_dim, max(LENGTHS), scaling=dict(model.scaling))
    return lrattn.LayerFactors(keys, values, rope).to(META)


class Launched(NamedTuple):
    """A launch that was compiled and did not run."""

    kernel: str
    binary: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]

    def tensors(self) -> list[Tensor]:
        """Those that its code does not only name as arguments."""
        code = self.binary.asm["ttir"]
        given = {name: x for name, x in self.arguments.items() if isinstance(x, Tensor)}
        return [x for name, x in given.items() if len(re.findall(rf"%{name}\b", code)) > 1]

    def reads(self, cached: Tensor) -> bool:
        return any(x is cached for x in self.tensors())


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


def launched(call: Call) -> list[Launched]:
    """The launches of one call, in order: of all its sequences, or of some after others."""
    with recording() as found:
        decode.decode_attention(call, None, None, "heads", 0, LIMIT, torch.empty_like(call.q), fp32(*call.q.shape[:3]))
    return found


class Work(NamedTuple):
    """What a launch does, as far as it is not in its code. tiles: that the programs of a sequence share, or 0."""

    tiles: int
    nbytes: int  # through memory
    unique: float  # share of the latents' bytes that no program beside has read, too
    page: int

    @classmethod
    def of(cls, x: Launched, call: Call, temporaries: list[Tensor]) -> Work:
        """Of latents the bytes that are read, once; of queries those that are written."""
        read = [cached for cached in (call.ck, call.cv) if cached is not None and x.reads(cached)]
        page = call.ck.shape[1]
        if not read:
            return cls(0, sum(t.nbytes for t in temporaries), 1.0, page)
        tokens = min(x.arguments["tiles"] * x.arguments["BLOCK_T"], call.tokens.bound) * x.grid[2]
        nbytes = tokens * sum(cached.shape[2] * cached.itemsize for cached in read)
        owners = call.keys.sizes.groups * x.arguments.get("BLOCKS_R", 1)  # whose programs read what is theirs
        return cls(x.arguments["tiles"], nbytes, min(1.0, owners / x.grid[0]), page)


class Simulation:
    """What a simulator says of launches; of those that are alike, once. sites: instructions to list, or 0."""

    def __init__(self, simulator: Any, sites: int = 0) -> None:
        self.simulator, self.sites = simulator, sites
        self.code: dict[str, Any] = {}
        self.found: dict[tuple[Any, ...], tuple[Any, int]] = {}

    def __call__(self, x: Launched, work: Work) -> dict[str, Any]:
        code, usage = self.code.get(x.binary.hash) or parsed(self.simulator, x.binary.asm["cubin"])
        self.code[x.binary.hash] = code, usage
        key = x.binary.hash, x.grid, work
        if key not in self.found:
            if x.kernel == ABSORB and x.arguments["FAST"] and x.arguments["T"]:
                self.found[key] = self.both(x, work, code, usage["REG"]), 1
            else:
                result, trips = self.predict(x, work, code, usage["REG"])
                self.found[key] = result.us, trips
        us, trips = self.found[key]
        return {
            "kernel": x.kernel.removesuffix("_kernel"), "us": round(us, 1), "programs": math.prod(x.grid),
            "trips": trips, "bytes": work.nbytes, "registers": usage["REG"], "spilled": usage["STACK"],
        }  # fmt: skip

    def both(self, x: Launched, work: Work, code: Any, registers: int) -> float:
        """Microseconds of a kernel whose programs either turn pairs back or absorb them: what all would take that go
        one way or the other, each by its share of the programs."""
        absorb = (x.grid[1] - 1) / x.grid[1]
        times = ((products(way), self.predict(x, work, way, registers)[0].us) for way in ways(code))
        return sum(us * (absorb if absorbs else 1 - absorb) for absorbs, us in times)

    def predict(self, x: Launched, work: Work, code: Any, registers: int) -> tuple[Any, int]:
        """The simulator's result, and the tiles of a program that it is of."""
        meta, block_t = x.binary.metadata, x.arguments.get("BLOCK_T", launch.BLOCK_T)
        given = {
            "warps": meta.num_warps, "reg": registers, "shared": meta.shared, "programs": math.prod(x.grid),
            "dram_bytes": work.nbytes, "unique": work.unique, "stages": meta.num_stages,
            "lookup_lines": max(1, 8 * work.page // block_t),  # trips that 32 bytes of the page table are for
        }  # fmt: skip
        machine, trips = self.simulator.Machine(), cdiv(work.tiles, x.grid[1]) if work.tiles else 1
        if "BLOCK_S" in x.arguments:  # splits, inside ranks, of which there is no loop where it has one trip
            ranks, splits = x.arguments["RANK"], x.arguments["last"] - x.arguments["first"]
            loops = cdiv(ranks, x.arguments["BLOCK_R"]), cdiv(splits, x.arguments["BLOCK_S"])
            trips, *given["inner"] = loops if loops[0] > 1 else loops[1:]
        result = self.simulator.predict(code, machine, trips=trips, **given)
        if work.tiles and result.waves > 1 and (mean := round(work.tiles / x.grid[1])) < trips:
            trips = mean  # where programs follow each other, those of fewer tiles make up for the others
            result = self.simulator.predict(code, machine, trips=trips, **given)
        if self.sites:
            print(f"\n{x.kernel}, grid {x.grid}, {trips} trips, {meta.num_warps} warps, {meta.shared} bytes shared")
            print(self.simulator.report(result, code, block_t if work.tiles else 0, self.sites))
        return result, trips


def ways(code: list[Any]) -> list[list[Any]]:
    """The code of programs that do not take the first branch that skips some of it, and of those that do."""
    at = next(i for i, own in enumerate(code) if own.op == "BRA" and own.pred and own.target > i)
    found = [code, [*code[:at], replace(code[at], pred=""), *code[at + 1 :]]]
    if sum(map(products, found)) != 1:
        raise RuntimeError("expected programs that absorb on one side of the first branch alone")
    return found


def products(code: list[Any]) -> bool:
    """Whether code has a tensor core's products on its way to the first exit, branches with a predicate not taken."""
    at = 0
    while code[at].op != "EXIT" or code[at].pred:
        if "MMA" in code[at].op:
            return True
        at = code[at].target if code[at].op == "BRA" and not code[at].pred else at + 1
    return False


def simulate(simulation: Simulation, case: Case) -> dict[str, Any]:
    """A row of the results: of a call, kernel by kernel in the order of the launches."""
    call, kernels, again = case.call(), list[dict[str, Any]](), 0
    records = *call.keys, *call.values, *vars(call.tokens).values(), *vars(call).values()
    given = [x for x in records if isinstance(x, Tensor)]
    written: list[Tensor] = []
    for x in launched(call):
        temporaries = [t for t in x.tensors() if not any(t is own or t._base is own for own in given)]
        old = [t for t in temporaries if any(t is own for own in written)]
        new = [t for t in temporaries if not any(t is own for own in old)]
        again += sum(t.nbytes for t in old if t.nbytes > CACHED)
        written += new
        others = COMBINE if x.kernel == "combine_kernel" else QUERIES
        part = ATTEND if x.reads(call.ck) else VALUES if x.reads(call.cv) else others
        kernels.append({"part": part, **simulation(x, Work.of(x, call, new))})
    total = sum(kernel["us"] for kernel in kernels)
    rest = {
        "gaps_us": gaps(case) * sum(kernel["part"] == QUERIES for kernel in kernels),
        "temporaries_us": again / MEMORY * 1e6,
    }
    model = case.shape.model
    dense = case.batch * case.tokens * 2 * model.kv_heads * model.head_dim * ITEMSIZE
    times = {"sum_us": total, **rest, "call_us": total + sum(rest.values()), "dense_us": dense / (SHARE * MEMORY) * 1e6}
    return {**case.told(), "kernels": kernels, **{name: round(us, 1) for name, us in times.items()}}


@cache
def measured() -> dict[tuple[str, int], dict[str, Any]]:
    """Rows of bench.decode.launches, by layer and batch [measured]."""
    rows = report.load(launches.PATH)["rows"]
    return {(row["layer"], row["batch"]): row for row in rows if row["commit"] == BEFORE}


def gaps(case: Case) -> float:
    """Microseconds of a step on plain rows less those of its kernels [measured], of batch 1."""
    plain = case._replace(shape=case.shape._replace(bits=()))
    alone = measured()[plain.layer, min(BATCHES)]
    return alone["us"][launches.TABLE] - sum(alone["kernels"].values())


def step(layer: str, batch: int) -> float | None:
    """Microseconds that the step took by the kernels there were before [measured], or None; of the kernels alone where
    nothing else was timed."""
    row = measured().get((layer, batch))
    return row and (row["us"][launches.TABLE] if row["us"] else sum(row["kernels"].values()))


def table(results: dict[str, Any]) -> str:
    """Microseconds of a call: of its kernels and their sum [simulated]; with the rest, gaps and what is read
    again, the whole, and a dense cache's bytes [estimated]; a step by kernels there were before [measured], - where it
    was not measured. Registers and bytes spilled are those of the kernel that takes longest."""
    line = "{:14} {:>4} {:>5} {:>5} {:>7} {:>4}" + " {:>8}" * 5 + " {:>7} {:>8} {:>8} {:>10} {:>9} {:>7} {:>7}"
    names = ("model", "rank", "bits", "batch", "tokens", "page", *PARTS, "sum us", "rest", "call us", "dense us",
             "dense / it", "registers", "spilled", "old us")  # fmt: skip
    lines, timed = [line.format(*names)], report.load(launches.PATH)["tokens"]
    for r in results["rows"]:
        parts = [[k["us"] for k in r["kernels"] if k["part"] == part] for part in PARTS]
        main = max(r["kernels"], key=lambda kernel: kernel["us"])
        us = step(r["layer"], r["batch"]) if (r["tokens"], r["page"]) == (timed, PAGE) else None
        times = (*(sum(part) if part else None for part in parts), r["sum_us"], r["call_us"] - r["sum_us"])
        cells = ["-" if x is None else f"{x:.1f}" for x in (*times, r["call_us"], r["dense_us"], us)]
        cells[-1:-1] = [f"{r['dense_us'] / r['call_us']:.2f}", main["registers"], main["spilled"]]
        lines.append(line.format(*(r[name] for name in names[:6]), *cells))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=sorted({shape.model.name for shape in SHAPES}))
    parser.add_argument("--rank", nargs="+", type=int, choices=sorted({shape.key_ranks[0] for shape in SHAPES}))
    for name in ("batch", "tokens", "page"):
        parser.add_argument(f"--{name}", nargs="+", type=int)
    parser.add_argument("--report", type=int, default=0, metavar="N", help="list the N slowest instructions, too")
    simulator, args = loaded(parser)
    shapes = [s for s in SHAPES if s.model.name in (args.model or [s.model.name])]
    shapes = [s for s in shapes if s.key_ranks[0] in (args.rank or s.key_ranks)]
    sizes = args.batch or BATCHES, args.tokens or LENGTHS, args.page or [PAGE]
    chosen = any((args.model, args.rank, args.batch, args.tokens, args.page))
    cases = [*map(Case._make, product(shapes, *sizes))] if chosen else CASES
    simulation = Simulation(simulator, args.report)
    rows = [simulate(simulation, case) for case in tqdm(cases, unit="call", disable=None)]
    of = {"file": launches.PATH.name, "commit": BEFORE, "gaps_us": "step - kernels"}
    results = {"sources": resources.sources_hash(), "triton": triton.__version__, "unsimulated": of, "rows": rows}
    if not chosen:
        report.save(PATH, results)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
