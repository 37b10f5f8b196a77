"""What the compiled kernels use, for devices that need not be here: `make resources`.

Every row of the launch table is compiled for every device it names, at the largest shapes it is for, plain and with
every option. Registers, bytes spilled, shared memory and tensor-core instructions go to results/resources.json with a
hash of the kernel sources. A spill (but for fp32, and what `spills` allows), too much shared memory, or a product that
should be wgmma and is not fails the run. `--quick` compiles a few and writes nothing. `--by-plane` compiles packed rows
for sm_90 alone, to resources_by_plane.json: by the Triton that they were written against.

No GPU is used and nothing is executed: these figures say what fits, not how fast it is.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import lrattn
from bench.compiled.sass import TOOLS, loop, mix
from bench.decode.decode_shapes import CHUNK, packing
from bench.support import report
from lrattn.factors.operands import Operands
from lrattn.factors.shapes import round_up
from lrattn.kernels import combine, decode, launch, near, plan, project, rebuild, values, write
from lrattn.kernels.absorb import absorb
from lrattn.kernels.absorb_packed import absorb_packed
from lrattn.kernels.arguments import Call, Near, Rule, Span, Tokens
from lrattn.kernels.attend import attend
from lrattn.kernels.attend_packed import attend_packed
from lrattn.kernels.attend_rebuilt import attend_rebuilt

PATH, BY_PLANE_PATH = report.RESULTS / "resources.json", report.RESULTS / "resources_by_plane.json"
SOURCES = sorted((Path(lrattn.__file__).parent / "kernels").glob("*.py"))
META = torch.device("meta")
SPAN = Span(0, 2, 2)
PAGE, BATCH = 16, 2
ALL = "bias rule"
MANY = 66  # splits, of several blocks
WIDE = 1024  # values of which scores are asked for alone
COUNTED = ("attend_packed_kernel",)  # whose loop's instructions are told
PACKED = (8, 4, 2)  # widths of packed rows
BY_PLANE = (PACKED, (8,), (4,), (2,), (4, 2), (16, 4))  # of rows by plane
FORMATS = ((), (8,), (4,), (2,), PACKED, (16, 8, 2))  # of which each kernel is shown at one shape; () is plain


class Device(NamedTuple):
    """A device to compile for. shared: bytes of shared memory a program may have."""

    target: GPUTarget
    shared: int
    product: str  # what a large product must compile to


DEVICES = {
    "sm80": Device(GPUTarget("cuda", 80, 32), 163 << 10, "mma.sync"),
    "sm90": Device(GPUTarget("cuda", 90, 32), 227 << 10, "wgmma.mma_async"),
    "sm100": Device(GPUTarget("cuda", 100, 32), 227 << 10, "tcgen05.mma"),
    "gfx9": Device(GPUTarget("hip", "gfx942", 64), 64 << 10, "v_mfma"),
}


def sources_hash() -> str:
    """Of the kernels and the launch table: results for other sources are stale."""
    return hashlib.sha256("\0".join(f"{p.name}\0{code(p.read_text())}" for p in SOURCES).encode()).hexdigest()


def code(text: str) -> str:
    """The lines of a module that something is compiled from: no docstrings, comments or imports."""
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node = node.body[0]
        elif not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        lines[node.lineno - 1 : node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
    return "\n".join(line for line in (re.sub(r"(^|\s+)# .*$", "", line) for line in lines) if line.strip())


class Problem(NamedTuple):
    """Shapes of a compilation. options: words of ALL, "positions", "offsets", "near"; rule: softcap, window, starts."""

    rank: int = 128
    head: int = 128
    heads: int = 1  # M, query heads per kv head
    steps: int = 1  # S, query tokens
    group: int = 1  # C, kv heads per group
    dtype: torch.dtype = torch.bfloat16
    options: str = ""
    rope: bool = True
    chunk: int = 0  # of positions, whose keys are turned to their places in it; 0: none
    shared: bool = False  # one row serves keys and values
    values: int = 0  # the rank of values, where it is not the keys'
    bits: tuple[int, ...] = ()  # widths of packed latents, see decode_shapes.packing; (): plain
    uneven: bool = False  # the groups of packed rows have formats of their own
    theta: float = 1e4  # of the rope: terms of a band are fewer with a larger one

    def has(self, word: str) -> bool:
        return word in self.options.split()

    def sides(self) -> Operands:
        """The records the kernels take, of a layer with two groups; no numbers, only shapes."""
        heads = 2 * self.group
        offset = torch.zeros(heads, self.head, dtype=self.dtype) if self.has("bias") else None
        keys, values = (
            lrattn.Projection(
                up=torch.zeros(heads, rank, self.head, dtype=self.dtype),
                ranks=(rank,) * 2 if found is None else tuple(own.rank for own in found),
                offset=offset,
                format=found,
            )
            for rank, found in ((rank, self.formats(rank)) for rank in (self.rank, self.value_rank()))
        )
        if self.shared:
            keys = replace(keys, format=None)
        layer = lrattn.LayerFactors(
            keys=keys,
            values=values,
            rope=lrattn.Rope(self.theta, self.head, 256) if self.rope else None,
            shared=self.shared,
            chunk=self.chunk or None,
        ).to(META)
        return layer.operands

    def value_rank(self) -> int:
        return self.values or self.rank

    def format(self, rank: int) -> lrattn.Format | None:
        return packing(rank, self.bits) if self.bits else None

    def formats(self, rank: int) -> tuple[lrattn.Format, ...] | None:
        """Of the two groups; where they are uneven one has half of the first segment."""
        whole = self.format(rank)
        if whole is None:
            return None
        (first, bits), *rest = whole.segments
        return whole, lrattn.Format(((first // 2, bits), *rest)) if self.uneven else whole

    def rows(self) -> int:
        """Hq S, query rows of a sequence."""
        return 2 * self.group * self.heads * self.steps

    def query(self) -> torch.Tensor:
        return empty(BATCH, self.steps, 2 * self.group * self.heads, self.head, dtype=self.dtype)

    def cache(self) -> torch.Tensor:
        return empty(8, PAGE, 2 * max(self.rank, self.value_rank()), dtype=torch.uint8 if self.bits else self.dtype)

    def partial(self) -> tuple[torch.Tensor, torch.Tensor]:
        return fp32(BATCH, 2, self.rows(), self.value_rank()), fp32(BATCH, 2, self.rows())

    def call(self) -> Call:
        starts = empty(BATCH) if self.has("rule") else None
        positions = empty(8, PAGE) if self.has("positions") else None
        offsets = empty(BATCH) if self.has("offsets") else None
        near = self.near() if self.has("near") else None
        tokens = Tokens(empty(BATCH, 8), empty(BATCH), starts, positions, 8 * PAGE, offsets, near)
        rule = Rule(1.0, 30.0, True, 64) if self.has("rule") else Rule(1.0, 0.0, True, 0)
        return Call(self.query(), self.cache(), None if self.shared else self.cache(), *self.sides(), tokens, rule)

    def near(self) -> Near:
        """A dense window of 64 recent tokens and 4 first ones, in slices of one tensor."""
        told = (empty(BATCH), empty(BATCH)) if self.has("rule") else (None, None)
        pool = empty(BATCH, 4 + 64 + self.steps, 2, 2 * self.group, self.head, dtype=self.dtype)
        return Near(pool[:, :, 0], pool[:, :, 1], 4, 64, *told)

    def codes(self) -> tuple[plan.Planes, torch.Tensor, torch.Tensor]:
        """How packed rows go by plane; absorbed queries for them, and what goes with these."""
        keys, side = self.sides()
        codes = plan.planes(self.dtype, launch.name(META), keys.sizes, side.sizes)
        assert codes.keys is not None and codes.values is not None, "the launch table has rows for them"
        width, count = plan.plane_queries(keys.sizes)
        lead, padded = (BATCH, 4 if self.chunk else 1), round_up(self.rows(), 16)
        dtype = torch.float32 if self.dtype == torch.float32 else torch.float16
        return codes, empty(*lead, self.rows(), width, dtype=dtype), fp32(*lead, count, padded)

    def way(self, rebuilt: bool = False, scores: bool = False) -> tuple[plan.Way, list[torch.Tensor | None]]:
        """How rows are taken, keys before RoPE by a band or rebuilt; queries for some blocks of tokens, x, a and
        terms. scores: alone, also where one pass could do both."""
        keys, side = self.sides()
        values = side.sizes._replace(paired=0) if scores else side.sizes
        sizes = self.heads * self.steps, self.dtype, launch.name(META), keys.sizes, values
        if rebuilt:
            way: plan.Way | None = plan.rebuilt(not self.has("positions"), *sizes)
        else:
            way = (plan.absorbed if keys.sizes.absorbed else plan.banded)(*sizes)
        assert way is not None, "the launch table has a row for it"
        kinds = torch.float32 if way.by_lane else self.dtype, self.dtype, torch.float32
        ready, blocks = plan.way_ready(self.rows(), self.dtype, keys.sizes, way), 2 if way.block else 1
        shapes = [shape and (BATCH, blocks * shape[0], *shape[1:]) for shape in ready.shapes]
        return way, [shape and empty(*shape, dtype=kind) for shape, kind in zip(shapes, kinds, strict=True)]

    def scores(self) -> torch.Tensor:
        return fp32(BATCH, self.rows(), 4 * launch.BLOCK_T)


def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def fp32(*shape: int) -> torch.Tensor:
    return empty(*shape, dtype=torch.float32)


# One function per kernel: what the library would launch for a problem.


def latent_scores(p: Problem) -> None:
    way, (x, _, _) = p.way(rebuilt=True, scores=True)
    attend_rebuilt(p.call(), x, p.scores(), None, None, SPAN, way)  # type: ignore[arg-type]


def turn_queries(p: Problem) -> None:
    way, queries = p.way(rebuilt=True)
    absorb(p.call(), *queries, SPAN, way)  # type: ignore[arg-type]


def absorb_queries(p: Problem) -> None:
    way, queries = p.way()
    absorb(p.call(), *queries, SPAN, way)  # type: ignore[arg-type]


def grouped_pass(p: Problem) -> None:
    way, queries = p.way()
    assert way.one_pass, "the launch table has a row for it"
    attend(p.call(), *queries, None, *p.partial(), SPAN, way)  # type: ignore[arg-type]


def grouped_scores(p: Problem) -> None:
    way, queries = p.way()
    assert not way.one_pass, "values are too wide for one pass"
    attend(p.call(), *queries, p.scores(), None, None, SPAN, way)  # type: ignore[arg-type]


def latent_values(p: Problem) -> None:
    y, lse = fp32(BATCH, 2, p.rows(), p.rank), fp32(BATCH, 2, p.rows())
    values.latent_values(p.call(), p.scores(), y, lse, SPAN, launch.BLOCK_T)


def absorb_planes(p: Problem) -> None:
    codes, a, terms = p.codes()
    assert codes.keys is not None, "the launch table has a row for it"
    absorb_packed(p.call(), a, terms, SPAN, codes.keys)


def packed_pass(p: Problem) -> None:
    codes, a, terms = p.codes()
    attend_packed(p.call(), a, terms, None, *p.partial(), SPAN, codes.keys)


def packed_scores(p: Problem) -> None:
    codes, a, terms = p.codes()
    attend_packed(p.call(), a, terms, p.scores(), None, None, SPAN, codes.keys)


def packed_values(p: Problem) -> None:
    codes, _, _ = p.codes()
    attend_packed(p.call(), None, None, p.scores(), *p.partial(), SPAN, codes.values)


def values_alone(p: Problem) -> None:
    """Of packed rows whose keys are rebuilt."""
    keys, side = p.sides()
    choice = plan.planes(p.dtype, launch.name(META), keys.sizes, side.sizes).values
    attend_packed(p.call(), None, None, p.scores(), *p.partial(), SPAN, choice)


def rebuilt_pass(p: Problem) -> None:
    way, (x, _, _) = p.way(rebuilt=True)
    assert way.one_pass, "the launch table has a row for it"
    attend_rebuilt(p.call(), x, None, *p.partial(), SPAN, way)  # type: ignore[arg-type]


def combine_heads(p: Problem, splits: int = plan.COMBINED) -> None:
    _, side = p.sides()
    lse = fp32(BATCH, *p.query().shape[1:3])
    sinks = fp32(p.query().shape[2]) if p.has("rule") else None
    near = (fp32(BATCH, p.rows(), p.head), fp32(BATCH, p.rows())) if p.has("near") else ()
    combine.combine(*p.partial(), range(splits), side, p.query(), lse, sinks, True, *near)


def combine_latents(p: Problem, splits: int = plan.COMBINED) -> None:
    _, side = p.sides()
    y, part, lse = fp32(BATCH, 2, p.rows(), p.rank), fp32(BATCH, 2, p.rows()), fp32(BATCH, *p.query().shape[1:3])
    combine.combine(y, part, range(splits), side, fp32(*lse.shape, p.rank), lse)


def combine_many(p: Problem) -> None:
    combine_heads(p, MANY)


def combine_many_latents(p: Problem) -> None:
    combine_latents(p, MANY)


def project_heads(p: Problem) -> None:
    wo = empty(p.query().shape[2], p.head, 64, dtype=p.dtype)
    project.project(p.query(), wo, empty(BATCH, p.steps, 64, dtype=p.dtype))


def attend_near(p: Problem) -> None:
    near.attend_near(p.call(), p.near(), fp32(BATCH, p.rows(), p.head), fp32(BATCH, p.rows()))


def write_near(p: Problem) -> None:
    k = empty(BATCH, p.steps, 2 * p.group, p.head, dtype=p.dtype)
    near.write_near(p.near(), k, k, empty(BATCH))


def write_latents(p: Problem) -> None:
    keys, side = p.sides()
    z, slots = empty(4, 2 * p.rank, dtype=p.dtype), empty(4, dtype=torch.int64)
    write.write_latents(z, z, p.cache(), p.cache(), slots, keys, side)


def rebuild_keys(p: Problem) -> None:
    keys, _ = p.sides()
    x = empty(4, keys.sizes.num_heads, p.head, dtype=p.dtype)
    rebuild.rebuild_keys(p.cache(), keys, p.call().tokens, empty(BATCH, dtype=torch.int64), x)


def rebuild_values(p: Problem) -> None:
    keys, side = p.sides()
    x = empty(4, keys.sizes.num_heads, p.head, dtype=p.dtype)
    rebuild.rebuild_values(p.cache(), side, p.call().tokens, empty(BATCH, dtype=torch.int64), x)


class Compilation(NamedTuple):
    """One launch to compile. product: the large product must run as the device's asynchronous instruction."""

    kernel: Callable[[Problem], None]
    device: str
    problem: Problem
    product: bool = False


def compilations() -> Iterator[Compilation]:
    """Every row of the table, on each of its devices, at its largest shapes; 16, 32 and 64 query rows a program."""
    few, many = ((1, 1), (7, 2)), ((7, 3), (16, 4))  # M, S
    for device in DEVICES:
        for row in rows_for(launch.LATENT_SCORES, device):
            rank, head = (528 if row.rank == launch.ANY else row.rank), (256 if row.head == launch.ANY else row.head)
            for heads, steps in few if row.queries == 16 else few[:1] + many:
                for options in ("", ALL, f"{ALL} positions")[: 3 if row.table else 2]:
                    problem = Problem(rank, head, heads, steps, 1, dtype_of(row), options, bits=bits_of(row))
                    yield Compilation(latent_scores, device, problem, row.itemsize == 2)
        for row in rows_for(launch.ABSORBED_SCORES, device):
            rank = 528 if row.rank == launch.ANY else row.rank
            for heads, steps in few if row.queries == 16 else few[:1] + many:
                problem = Problem(rank, 128, heads, steps, 1, dtype_of(row), values=WIDE)
                for absorbed in absorbed_problems(problem, ALL, row):
                    yield Compilation(grouped_scores, device, absorbed, row.itemsize == 2)
        yield from banded(device)
        for row in rows_for(launch.LATENT_VALUES, device):
            rank = 528 if row.rank == launch.ANY else row.rank
            for heads, steps in few if row.queries == 16 else few[:1] + many:
                problem = Problem(rank, 128, heads, steps, 1, dtype_of(row), bits=bits_of(row))
                for given in (problem, problem._replace(chunk=CHUNK, options="rule offsets")):
                    yield Compilation(latent_values, device, given, row.itemsize == 2 and heads * steps == 64)
        for row in rows_for(launch.FUSED_ABSORBED, device):
            for problem in fused_problems(row):
                for absorbed in absorbed_problems(problem, most(row), row):
                    yield Compilation(grouped_pass, device, absorbed, row.itemsize == 2)
        yield from by_plane(device)
        for row in rows_for(launch.FUSED_REBUILT, device):
            for problem in fused_problems(row):
                for options in ("", most(row), f"{most(row)} positions")[: 3 if row.table else 2]:
                    yield Compilation(rebuilt_pass, device, problem._replace(options=options), row.itemsize == 2)
        for row in rows_for(launch.ATTEND_NEAR, device):
            head = 256 if row.head == launch.ANY else row.head
            for heads, steps in few if row.queries == 16 else few[:1] + many:
                for options in ("", "rule"):
                    yield Compilation(attend_near, device, Problem(96, head, heads, steps, 1, dtype_of(row), options))
        for dtype in (torch.bfloat16, torch.float32):  # float16 compiles as bfloat16 does
            for options in ("", f"{ALL} positions"):
                large = Problem(96, 256, 16, 3, 1, dtype, options)
                yield Compilation(turn_queries, device, large._replace(options=options.removesuffix(" positions")))
                yield Compilation(absorb_queries, device, large._replace(rope=False))
                chunked = large._replace(chunk=CHUNK, options=options.replace("positions", "offsets"))
                yield Compilation(absorb_queries, device, chunked)
                for rank in (96, 512):
                    combined = large._replace(rank=rank)
                    yield Compilation(combine_heads, device, combined)
                    yield Compilation(combine_heads, device, combined._replace(options=f"{options} near".strip()))
                yield Compilation(write_near, device, large)
                yield Compilation(project_heads, device, large)
                for bits in ((), PACKED):
                    yield Compilation(write_latents, device, large._replace(bits=bits))
                    for head in (128, 256):
                        yield Compilation(rebuild_keys, device, large._replace(head=head, bits=bits))
                        yield Compilation(rebuild_keys, device, chunked._replace(head=head, bits=bits))
                        yield Compilation(rebuild_values, device, large._replace(head=head, bits=bits))
            for options in ("", f"{ALL} near"):
                for rank in (256, 512):
                    yield Compilation(combine_many, device, Problem(rank, 256, 16, 3, 1, dtype, options))
            for latents in (combine_latents, combine_many_latents):
                yield Compilation(latents, device, Problem(96, 256, 16, 3, 1, dtype, "latents"))
    yield from formats()


def banded(device: str) -> Iterator[Compilation]:
    """Keys by a band: of two groups of four heads, one query row a head or four; of smaller and larger heads."""
    for table, kernel in ((launch.ATTEND, grouped_pass), (launch.ATTEND_SCORES, grouped_scores)):
        for row in rows_for(table, device):
            wide = kernel is grouped_scores
            columns = 512 if wide else row.values
            lanes = Problem(row.rank, 128, 1, 1, 4, dtype_of(row), values=columns, bits=bits_of(row))
            theta = 1e9 if row.itemsize == 4 else 1e4 if row.queries > 64 else 5e5
            rows = lanes._replace(heads=4, theta=theta)
            for problem in (lanes, rows):
                for options in ("", f"{ALL} near" if row.biased else "rule near"):
                    yield Compilation(kernel, device, problem._replace(options=options), row.itemsize == 2)
            if row.itemsize == 2:
                yield Compilation(kernel, device, rows._replace(head=64, theta=5e5), True)
                yield Compilation(kernel, device, rows._replace(head=256, group=2, theta=5e5), True)
                for bits in BY_PLANE if row.packed else [()]:
                    yield Compilation(kernel, device, lanes._replace(dtype=torch.float16, bits=bits), True)
                yield Compilation(absorb_queries, device, rows._replace(options="bias" if row.biased else ""))
            yield Compilation(absorb_queries, device, lanes)


def by_plane(device: str) -> Iterator[Compilation]:
    """Packed rows whose codes are operands: of two groups of four heads with four query heads each, or with twice seven
    queries; of half the rank, without a rope, in chunks of one tile, in one row."""
    single = Problem(256, 128, 4, 1, 4, torch.float32, chunk=CHUNK, bits=PACKED)
    for kernel in (packed_pass, packed_scores, packed_values, absorb_planes):
        yield Compilation(kernel, device, single)
    for bits in BY_PLANE if device == "sm90" else BY_PLANE[:3]:
        packed = Problem(256, 128, 4, 1, 4, chunk=CHUNK, bits=bits)
        most = packed._replace(heads=7, steps=2, options=f"{ALL} offsets near")
        for problem in (packed, packed._replace(options="offsets near"), most):
            yield Compilation(packed_pass, device, problem)
        for problem in (packed, most):
            yield Compilation(packed_scores, device, problem)
            yield Compilation(packed_values, device, problem)
            yield Compilation(absorb_planes, device, problem)
        for problem in (packed._replace(rank=128), packed._replace(rope=False, chunk=0)):
            yield Compilation(packed_pass, device, problem)
        for problem in (packed, most):
            yield Compilation(packed_pass, device, problem._replace(chunk=launch.BLOCK_T))
        yield Compilation(packed_scores, device, packed._replace(rank=512, shared=True))
        rebuilt, many = packed._replace(chunk=0), most._replace(chunk=0, options=f"{ALL} near")
        for problem in (rebuilt, many):
            yield Compilation(values_alone, device, problem)
    packed = Problem(256, 128, 4, 1, 4, chunk=CHUNK, bits=PACKED)
    for problem in (packed._replace(uneven=True), packed._replace(shared=True), packed._replace(options="bias offsets"),
                    packed._replace(bits=(16, 8))):  # fmt: skip
        yield Compilation(packed_pass, device, problem)
    yield Compilation(packed_values, device, packed._replace(rank=512))  # several times 256 columns
    yield Compilation(absorb_planes, device, packed._replace(rope=False, chunk=0))


def formats() -> Iterator[Compilation]:
    """Kernels that read latents, in every format: a group of four heads with four query heads each, half the rank."""
    for bits in FORMATS:
        rebuilt = Problem(256, 128, 4, 1, 4, bits=bits)
        absorbed = rebuilt._replace(rope=False)
        for kernel in (latent_scores, rebuild_keys, write_latents):
            yield Compilation(kernel, "sm90", rebuilt)
        for kernel in (packed_scores, packed_values, packed_pass) if bits else ():
            yield Compilation(kernel, "sm90", absorbed)
        if not bits:
            yield Compilation(grouped_scores, "sm90", absorbed._replace(values=WIDE), True)
            yield Compilation(grouped_pass, "sm90", absorbed, True)


def fused_problems(row: launch.Row) -> Iterator[Problem]:
    """The largest shapes of a row of a fused table, with rows apart (unless it has none) and with one row for both."""
    heads = row.queries if row.queries < launch.ANY else 64
    head = 128 if row.head == launch.ANY else row.head
    if row.rank:  # else it is for shared rows alone
        yield Problem(row.rank, head, heads, dtype=dtype_of(row), values=row.values, bits=bits_of(row))
    if row.shared:
        yield Problem(row.values, head, heads, dtype=dtype_of(row), shared=True, bits=bits_of(row))


def absorbed_problems(problem: Problem, options: str, row: launch.Row) -> Iterator[Problem]:
    """Of keys without a rope and of keys in chunks, as a row is for both or one: bare and with every option."""
    for form in (problem._replace(rope=False), problem._replace(chunk=CHUNK)):
        if row.chunked in (None, form.chunk > 0):
            yield form
            yield form._replace(options=f"{options} offsets" if form.chunk else options)


def rows_for(table: tuple[launch.Row, ...], device: str) -> list[launch.Row]:
    return [row for row in table if not row.devices or device in row.devices]


def most(row: launch.Row) -> str:
    """The most options there can be."""
    return ALL if row.biased else "rule"


def bits_of(row: launch.Row) -> tuple[int, ...]:
    return PACKED if row.packed else ()


def dtype_of(row: launch.Row) -> torch.dtype:
    return torch.float32 if row.itemsize == 4 else torch.bfloat16


QUICK = [
    Compilation(latent_scores, "sm90", Problem(256, 128), True),
    Compilation(latent_scores, "sm90", Problem(160, 128, 16, 4, options=f"{ALL} positions"), True),
    Compilation(latent_scores, "sm80", Problem(528, 128, 7, 2, options=ALL), True),
    Compilation(latent_scores, "sm100", Problem(128, 64), True),
    Compilation(latent_scores, "gfx9", Problem(128, 128), True),
    Compilation(grouped_scores, "sm90", Problem(256, 128, group=4, rope=False, values=WIDE), True),
    Compilation(grouped_pass, "sm90", Problem(160, 128, 1, 1, 4), True),
    Compilation(grouped_pass, "sm90", Problem(256, 128, 4, 1, 4, theta=5e5), True),
    Compilation(grouped_scores, "sm90", Problem(256, 128, 4, 1, 4, values=512, options=f"{ALL} near", theta=5e5), True),
    Compilation(absorb_queries, "sm90", Problem(160, 128, 4, 1, 4, options="bias", theta=5e5)),
    Compilation(latent_values, "sm90", Problem(256, 128, group=4)),
    Compilation(grouped_pass, "sm90", Problem(256, 128, group=4, rope=False), True),
    Compilation(grouped_pass, "sm90", Problem(256, 128, group=4, rope=False, shared=True), True),
    Compilation(grouped_pass, "sm90", Problem(512, 128, group=4, chunk=CHUNK, shared=True, options="offsets"), True),
    Compilation(absorb_queries, "sm90", Problem(256, 128, group=4, chunk=CHUNK, options="bias offsets")),
    Compilation(rebuilt_pass, "sm90", Problem(128, 128), True),
    Compilation(attend_near, "sm90", Problem(head=128, heads=4)),
    Compilation(combine_heads, "sm90", Problem(256, 128)),
    Compilation(project_heads, "sm90", Problem()),
    Compilation(write_latents, "sm90", Problem(options=ALL)),
    Compilation(rebuild_keys, "sm90", Problem(), True),
    Compilation(latent_scores, "sm90", Problem(528, 128, options=ALL, bits=PACKED), True),
    Compilation(packed_pass, "gfx9", Problem(256, 128, 4, group=4, chunk=CHUNK, bits=PACKED)),
    Compilation(packed_pass, "sm90", Problem(256, 128, 4, group=4, chunk=CHUNK, bits=PACKED)),
    Compilation(packed_scores, "sm90", Problem(256, 128, 4, group=4, rope=False, bits=(4,))),
    Compilation(packed_values, "sm90", Problem(256, 128, 4, group=4, chunk=CHUNK, bits=PACKED)),
    Compilation(absorb_planes, "sm90", Problem(256, 128, 4, group=4, chunk=CHUNK, options="bias offsets", bits=PACKED)),
    Compilation(combine_many, "sm90", Problem(256, 128)),
    Compilation(write_latents, "sm90", Problem(options=ALL, bits=PACKED)),
]


class _Driver:
    """Stands for the driver of a device that is not here, so that a launch compiles and does not run."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


@contextmanager
def compiling(device: str) -> Iterator[list[tuple[str, Any]]]:
    """Inside, launches compile for a device and do not run; yields the kernels' names and binaries."""
    compiled: list[tuple[str, Any]] = []
    original, name, assembles, chained = JITFunction.run, launch.name, launch.assembles, launch.chained

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        self.device_caches.clear()  # kept by device number, which is 0 for all of ours
        compiled.append((self.__name__, original(self, *args, grid=grid, warmup=True, **kwargs)))

    triton.runtime.driver.set_active(_Driver(DEVICES[device].target))
    JITFunction.run, launch.name, launch.assembles = run, lambda _: device, lambda _: device != "gfx9"
    launch.chained = chained.__wrapped__
    try:
        yield compiled
    finally:
        JITFunction.run, launch.name, launch.assembles, launch.chained = original, name, assembles, chained


def compile_for(c: Compilation) -> list[dict[str, Any]]:
    """Resources of each kernel that a launch compiles."""
    told: dict[str, Any] = {}
    with compiling(c.device) as compiled:
        c.kernel(c.problem)
        if c.kernel in (packed_pass, packed_scores, packed_values):
            codes, _, _ = c.problem.codes()
            choice = codes.values if c.kernel is packed_values else codes.keys
            told = {"pass": c.kernel.__name__, "tokens": choice.block_n}  # of a warp
        elif c.kernel is turn_queries:
            told = {"pass": c.kernel.__name__}
    told |= {"device": c.device, **describe(c)}
    return [{"kernel": kernel, **told, **resources(binary)} for kernel, binary in compiled]


def recompiled() -> list[str]:
    """Kernels of a decode step that other lengths, splits or table widths would compile anew."""
    several = []
    for problem in (Problem(), Problem(chunk=CHUNK, options="bias offsets near"), Problem(group=4)):
        with compiling("sm90") as compiled:
            for pages, bound, splits in ((8, 128, 1), (1, 1, 3), (7, 100, 4), (9, 100, 6), (64, 1024, 16)):
                call = problem.call()
                call = replace(call, tokens=replace(call.tokens, pages=empty(BATCH, pages), bound=bound))
                out, lse = torch.empty_like(call.q), fp32(*call.q.shape[:3])
                decode.decode_attention(call, None, None, "heads", splits, 1 << 28, out, lse)
        kinds = [((kernel, b.metadata.num_warps), b.hash) for kernel, b in compiled]  # few and many splits differ
        binaries = {kind: {found for own, found in kinds if own == kind} for kind, _ in kinds}
        several += [f"{kernel}: {len(found)} compilations" for (kernel, _), found in binaries.items() if len(found) > 1]
    return several


def describe(c: Compilation) -> dict[str, Any]:
    p = c.problem
    dtype = str(p.dtype).split(".")[-1]
    names = {"rank": p.rank, "values": p.value_rank(), "one_row": p.shared, "head": p.head, "M": p.heads, "S": p.steps}
    told = {"dtype": dtype, "options": p.options or "none", "bits": " ".join(map(str, p.bits)), "chunk": p.chunk}
    return {**names, **told, "uneven": p.uneven, "theta": p.theta}


def resources(binary: Any) -> dict[str, Any]:
    """Registers a thread, bytes of them spilled to memory, bytes of shared memory, tensor-core instructions."""
    meta = binary.metadata
    found = {"warps": meta.num_warps, "stages": meta.num_stages, "shared": meta.shared}
    if "amdgcn" in binary.asm:
        text = binary.asm["amdgcn"]
        count = {n: int(m[1]) for n in ("vgpr_count", "private_segment_fixed_size")
                 if (m := re.search(rf"\.{n}:\s+(\d+)", text))}  # fmt: skip
        found |= {"registers": count["vgpr_count"], "spilled": count["private_segment_fixed_size"]}
        return found | {"products": sorted(set(re.findall(r"v_mfma\w+", text)))}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        command = [str(TOOLS / "cuobjdump"), "-res-usage", file.name]
        usage = dict(re.findall(r"(REG|STACK):(\d+)", subprocess.check_output(command, text=True)))
    products = set(re.findall(r"(wgmma\.mma_async[\w.]*\.m\d+n\d+k\d+|mma\.sync[\w.]*\.m\d+n\d+k\d+|tcgen05\.mma)",
                              binary.asm["ptx"]))  # fmt: skip
    short = sorted({re.sub(r"\.(?:sp|al)\w+|\.(?:sync|aligned)", "", x) for x in products})
    counted = {"instructions": mix(loop(binary.asm["cubin"]))} if binary.name in COUNTED else {}
    return found | {"registers": int(usage["REG"]), "spilled": int(usage["STACK"]), "products": short} | counted


def spills(c: Compilation) -> int:
    """Bytes that a launch may spill: none, but for packed rows and for bands where ptxas is not the one they were
    written against; there, by lane at the largest ranks in one pass or of packed rows, a few of what the loop does not
    touch."""
    if c.kernel in (grouped_pass, grouped_scores) and c.problem.rope and not c.problem.chunk:
        whole = c.kernel is grouped_pass or c.problem.bits != ()
        by_lane = whole and c.problem.heads == 1 and c.problem.rank > 160
        return (48 if by_lane else 0) if triton.__version__.startswith(("3.6.", "3.7.")) else 256
    own = c.device == "sm90" and triton.__version__.startswith("3.6.")
    return 0 if not c.problem.bits or own else 48


def faults(c: Compilation, row: dict[str, Any]) -> list[str]:
    """Why a row may not stand."""
    device, found = DEVICES[c.device], []
    if row["registers"] < 8:
        found.append(f"{row['registers']} registers: it was compiled to nothing")
    if row["spilled"] > spills(c) and row["dtype"] != "float32":
        found.append(f"{row['spilled']} bytes spilled")
    if row["shared"] > device.shared:
        found.append(f"{row['shared']} bytes of shared memory, the device has {device.shared}")
    if c.product and not any(p.startswith(device.product.replace(".sync", "")) for p in row["products"]):
        found.append(f"expected {device.product}, got {row['products'] or 'no tensor-core product'}")
    return found


def table(results: dict[str, Any]) -> str:
    """Kernel by device: the most that any of its launches uses, 16-bit ones for registers and spills; - without any."""
    line = "{:24} {:6} {:>8} {:>9} {:>7} {:>10}  {}"
    lines = [line.format("kernel", "device", "launches", "registers", "spilled", "shared KiB", "products")]
    for kernel in dict.fromkeys(row["kernel"] for row in results["rows"]):
        for device in DEVICES:
            rows = [row for row in results["rows"] if (row["kernel"], row["device"]) == (kernel, device)]
            if not rows:
                continue
            half = [row for row in rows if row["dtype"] != "float32"]
            kinds = sorted({p.split(".")[0] if "." in p else "mfma" for row in half for p in row["products"]})
            most = [max((row[n] for row in half), default="-") for n in ("registers", "spilled")]
            shared = -(-max(row["shared"] for row in rows) // 1024)
            cells = (kernel.removesuffix("_kernel"), device, len(rows), *most, shared, ", ".join(kinds))
            lines.append(line.format(*cells).rstrip())
    return "\n".join(lines)


def format_table(results: dict[str, Any]) -> str:
    """Kernel by format, on sm90 at one shape: registers, bytes spilled, and bytes of a token's run."""
    line = "{:24} {:>8} {:>13} {:>9} {:>7}"
    lines = [line.format("kernel", "bits", "bytes a token", "registers", "spilled")]
    shapes = [{"device": c.device, **describe(c)} for c in formats()]
    found = [row for row in results["rows"] if any(shape.items() <= row.items() for shape in shapes)]
    for kernel in dict.fromkeys(row["kernel"] for row in found):
        for bits in FORMATS:
            words = " ".join(map(str, bits))
            rows = [row for row in found if (row["kernel"], row["bits"]) == (kernel, words)]
            if rows:
                held = packing(rows[0]["rank"], bits).nbytes if bits else 2 * rows[0]["rank"]
                most = [max(row[n] for row in rows) for n in ("registers", "spilled")]
                lines.append(line.format(kernel.removesuffix("_kernel"), "/".join(words.split()) or "16", held, *most))
    return "\n".join(lines)


def plane_table(results: dict[str, Any]) -> str:
    """One pass over packed rows in chunks, on sm90: instructions of its loop a token and group, for 16 query rows."""
    line = "{:>5} {:>2}  {:22} {:>15} {:>9} {:>7} {:>12}"
    lines = [line.format("bits", "S", "options", "tokens of a warp", "registers", "spilled", "instructions")]
    shown = {"pass": "packed_pass", "rank": 256, "chunk": CHUNK, "dtype": "bfloat16", "uneven": False, "one_row": False}
    for row in results["rows"]:
        if shown.items() <= row.items():
            bits = row["bits"].replace(" ", "/")
            cells = (row["S"], row["options"], row["tokens"], row["registers"], row["spilled"])
            lines.append(line.format(bits, *cells, f"{a_token(row):.1f}"))
    return "\n".join(lines)


def a_token(row: dict[str, Any]) -> float:
    """Instructions of a loop's trip, over the tokens that a warp takes in it."""
    return sum(row["instructions"].values()) / row["tokens"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few launches, nothing written")
    parser.add_argument("--by-plane", action="store_true", help="packed rows for sm_90 alone")
    args = parser.parse_args()
    rows, bad = [], []
    chosen = QUICK if args.quick else list(dict.fromkeys(by_plane("sm90") if args.by_plane else compilations()))
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        made = tqdm(pool.map(compile_for, chosen), total=len(chosen), unit="kernel", disable=None)
        for c, compiled in zip(chosen, made, strict=True):
            for row in compiled:
                rows.append(row)
                if found := faults(c, row):
                    bad.append(f"{row['kernel']} {describe(c)} on {c.device}: {'; '.join(found)}")
    if not args.by_plane:
        bad += [f"compiled anew for other lengths: {kernel}" for kernel in recompiled()]
    print(*bad, sep="\n")
    print(f"{len(rows)} kernels compiled, {len(bad)} unfit")
    if not args.quick:
        path = BY_PLANE_PATH if args.by_plane else PATH
        report.save(path, {"sources": sources_hash(), "triton": triton.__version__, "rows": rows})
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
