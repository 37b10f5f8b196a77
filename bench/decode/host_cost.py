"""What a decode call costs the host: checks, plan, workspace and the arguments of each launch, without the kernels.

    python -m bench.decode.host_cost [--batch 16] [--rounds 200] [--out bench/results] [--dry]

Launches are replaced by a function that does nothing: neither a kernel nor Triton's own launcher is in these times.
On a GPU the call with its launches is timed too, as the host sees it. "first" is a call of a kind that the layer has
not seen: other shapes, strides or dtypes. "unchecked" is a call past its checks, and "operator" the same through
torch.ops, as a compiled graph makes it.
--dry: a few rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from tqdm import tqdm
from triton.runtime.jit import KernelInterface

import lrattn
from bench.decode import timing
from bench.decode.decode_problem import make
from bench.decode.decode_shapes import CHUNK, LLAMA_31, PACKINGS, Shape
from bench.support import report
from lrattn.attention import operators
from lrattn.kernels import launch

TOKENS, BITS, SINKS, RECENT = 1024, PACKINGS[1], 4, 64  # of a Llama-3.1-8B layer
CALLS = 50  # in a row, timed together
TARGET = 20.0  # microseconds


class Way(NamedTuple):
    """A layer whose calls run in one way. keep: of the numbers. near: beside a dense window."""

    name: str
    grouping: str = "Palu"
    keep: float = 0.25
    bits: tuple[int, ...] = ()
    rope: bool = True
    chunk: int | None = None
    shared: bool = False
    near: bool = False


WAYS = (
    Way("one pass, packed rows, keys in chunks", keep=0.5, bits=BITS, chunk=CHUNK),
    Way("the same with a dense window", keep=0.5, bits=BITS, chunk=CHUNK, near=True),
    Way("one pass, absorbed keys", rope=False),
    Way("one pass, absorbed keys, one row for both", rope=False, shared=True),
    Way("one pass, rebuilt keys, one row for both", shared=True),
    Way("two passes, rebuilt keys"),
    Way("two passes, rebuilt keys, joint values", "ReCalKV"),
    Way("two passes, rebuilt keys, packed rows", bits=BITS),
)


def call_of(way: Way, batch: int, device: torch.device) -> tuple[lrattn.LayerFactors, Callable[[], Any]]:
    """A layer of random numbers, and a decode call on it."""
    shape = Shape(LLAMA_31, way.grouping, way.keep, way.bits)
    x = make(shape, TOKENS, batch, torch.bfloat16, device, shared=way.shared)
    layer = replace(x.layer, chunk=way.chunk) if way.rope else x.unrotated().layer
    held = x.q.new_empty(2, batch, SINKS + RECENT, layer.num_kv_heads, layer.head_dim)
    arguments: dict[str, Any] = {
        "block_table": x.table,
        "seq_lens": x.lens,
        "out": torch.empty_like(x.q),
        "near": lrattn.Near(*held, SINKS, RECENT) if way.near else None,
        "backend": "triton",
    }
    return layer, lambda: lrattn.decode_attention(x.q, x.k_cache, x.v_cache, layer, **arguments)


@contextmanager
def without_kernels(device: torch.device) -> Iterator[None]:
    """Inside, nothing is launched; on a CPU as an H100 would be given it."""
    with ExitStack() as patches:
        patches.enter_context(patch.object(KernelInterface, "__getitem__", lambda kernel, grid: _nothing))
        if device.type == "cpu":
            patches.enter_context(patch.object(launch, "name", lambda _: "sm90"))
            patches.enter_context(patch.object(launch, "processors", lambda _: 132))
        yield


def launches(call: Callable[[], Any]) -> list[str]:
    """Names of the kernels that a call would launch."""
    named: list[str] = []
    with patch.object(KernelInterface, "__getitem__", lambda kernel, grid: named.append(kernel.__name__) or _nothing):
        call()
    return named


def _nothing(*arguments: Any, **constants: Any) -> None:
    pass


class Timed(NamedTuple):
    """One cell of the table. before: called before each call, and not timed."""

    way: str
    column: str
    call: Callable[[], Any]
    before: Callable[[], Any] = _nothing

    def round(self) -> float:
        """Microseconds of one call, the mean of CALLS."""
        self.call()  # which may be a first one: others have forgotten
        total = 0.0
        for _ in range(CALLS):
            self.before()
            begin = time.perf_counter()
            self.call()
            total += time.perf_counter() - begin
        return total / CALLS * 1e6


def interleaved(cells: list[Timed], rounds: int) -> dict[tuple[str, str], dict[str, float]]:
    """Median and p10-p90 of each, taken in turns: a host has slow seconds, and they are shared."""
    taken: list[list[float]] = [[] for _ in cells]
    for _ in tqdm(range(rounds + 1), unit="round", leave=False, disable=None):
        for own, cell in zip(taken, cells, strict=True):
            own.append(cell.round())
    return {(c.way, c.column): timing.summary(own[1:], "us") for c, own in zip(cells, taken, strict=True)}


def measure(batch: int, rounds: int, device: torch.device) -> list[dict[str, Any]]:
    """A row for each way, its launches by name."""
    rows, cells, whole = [], [], []
    with without_kernels(device):
        for way in WAYS:
            layer, call = call_of(way, batch, device)
            with patch.object(operators, "attend", wraps=operators.attend) as attend:
                call()
            rows.append({"way": way.name, "batch": batch, "launches": launches(call)})
            cells += [
                Timed(way.name, "call", call),
                Timed(way.name, "first", call, partial(forget, layer)),
                Timed(way.name, "unchecked", partial(operators.attend, *attend.call_args.args)),
                Timed(way.name, "operator", partial(operators.dispatch, *attend.call_args.args)),
            ]
            whole.append(Timed(way.name, "with_launches", call))
        times = interleaved(cells, rounds)
    if device.type == "cuda":
        times |= interleaved(whole, rounds)
        torch.cuda.synchronize()
    return [row | {column: t for (way, column), t in times.items() if way == row["way"]} for row in rows]


def forget(layer: lrattn.LayerFactors) -> None:
    """What a first call works out, of this layer or another."""
    layer.checked.clear()
    kernels = [module for name, module in sys.modules.items() if name.startswith("lrattn.kernels.")]
    for known in [known for module in kernels for known in vars(module).values() if hasattr(known, "cache_clear")]:
        known.cache_clear()


def table(results: dict[str, Any]) -> str:
    columns = [
        "call",
        "first",
        "unchecked",
        "operator",
        *(["with_launches"] if "with_launches" in results["rows"][0] else []),
    ]
    lines = [f"{'microseconds of the host, median':44}{'launches':>9}" + "".join(f"{c:>15}" for c in columns)]
    for row in results["rows"]:
        cells = "".join(f"{row[c]['median_us']:15.1f}" for c in columns)
        lines.append(f"{row['way']:44}{len(row['launches']):9}{cells}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument("--dry", action="store_true", help="a few rounds, never written to bench/results")
    args = parser.parse_args()
    if args.dry and args.out.resolve() == report.RESULTS.resolve():
        parser.error("--dry needs another --out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    rounds = 3 if args.dry else args.rounds
    path = args.out / "host_cost.json"
    report.save(path, {"dry": args.dry, "target_us": TARGET, "rows": measure(args.batch, rounds, device)})
    print(table(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
