"""What a decode call costs the host: checks, plan, workspace and the arguments of each launch, without the kernels.

    python -m bench.host_cost [--batch 16] [--rounds 40] [--out bench/results] [--dry]

Launches are replaced by a function that does nothing: neither a kernel nor Triton's own launcher is in these times.
On a GPU the call with its launches is timed too, as the host sees it. "first" is a call of a kind that the layer has
not seen: other shapes, strides or dtypes. "operator" is torch.ops alone, as a compiled graph calls it.
--dry: a few rounds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from tqdm import tqdm
from triton.runtime.jit import KernelInterface

import lrattn
from bench import report, timing
from bench.decode_problem import make
from bench.decode_shapes import LLAMA_31, Shape
from lrattn import ops
from lrattn.kernels import launch, plan

KEEP, TOKENS = 0.25, 1024  # of a Llama-3.1-8B layer
CALLS = 50  # in a row, timed together
TARGET = 20.0  # microseconds


class Way(NamedTuple):
    """A layer whose calls run in one way."""

    name: str
    grouping: str = "Palu"
    rope: bool = True
    shared: bool = False


WAYS = (
    Way("one pass, absorbed keys", rope=False),
    Way("one pass, absorbed keys, one row for both", rope=False, shared=True),
    Way("one pass, rebuilt keys, one row for both", shared=True),
    Way("two passes, rebuilt keys"),
    Way("two passes, rebuilt keys, joint values", "ReCalKV"),
)


def call_of(way: Way, batch: int, device: torch.device) -> tuple[lrattn.LayerFactors, Callable[[], Any]]:
    """A layer of random numbers, and a decode call on it."""
    shape = Shape(LLAMA_31, way.grouping, KEEP)
    x = make(shape, TOKENS, batch, torch.bfloat16, device, shared=way.shared)
    x = x if way.rope else x.unrotated()
    arguments: dict[str, Any] = {
        "block_table": x.table,
        "seq_lens": x.lens,
        "out": torch.empty_like(x.q),
        "backend": "triton",
    }
    return x.layer, lambda: lrattn.decode_attention(x.q, x.k_cache, x.v_cache, x.layer, **arguments)


@contextmanager
def without_kernels(device: torch.device) -> Iterator[list[str]]:
    """Inside, kernels are named instead of launched; on a CPU as an H100 would be given them."""
    named: list[str] = []

    def launcher(kernel: Any, grid: Any) -> Callable[..., None]:
        named.append(kernel.__name__)
        return _nothing

    with ExitStack() as patches:
        patches.enter_context(patch.object(KernelInterface, "__getitem__", launcher))
        if device.type == "cpu":
            patches.enter_context(patch.object(launch, "name", lambda _: "sm90"))
            patches.enter_context(patch.object(launch, "processors", lambda _: 132))
        yield named


def _nothing(*arguments: Any, **constants: Any) -> None:
    pass


def microseconds(call: Callable[[], Any], rounds: int, before: Callable[[], None] = lambda: None) -> dict[str, float]:
    """Of one call: median and p10-p90 of rounds of CALLS; `before` is called before each and not timed."""
    taken = []
    for _ in range(3):
        before()
        call()
    for _ in range(rounds):
        total = 0.0
        for _ in range(CALLS):
            before()
            begin = time.perf_counter()
            call()
            total += time.perf_counter() - begin
        taken.append(total / CALLS * 1e6)
    return timing.summary(taken, "us")


def measure(way: Way, batch: int, rounds: int, device: torch.device) -> dict[str, Any]:
    layer, call = call_of(way, batch, device)

    def forget() -> None:
        layer.checked.clear()
        plan.cut.cache_clear()

    row: dict[str, Any] = {"way": way.name, "batch": batch}
    with without_kernels(device) as named:
        call()
        row["launches"] = list(named)
        row["call"] = microseconds(call, rounds)
        row["first"] = microseconds(call, max(3, rounds // 4), forget)
        with patch.object(ops, "attend", wraps=ops.attend) as attend:
            call()
        given = attend.call_args.args
        row["operator"] = microseconds(lambda: ops.dispatch(*given), max(3, rounds // 4))
    if device.type == "cuda":
        row["with_launches"] = microseconds(call, rounds)
        torch.cuda.synchronize()
    return row


def table(results: dict[str, Any]) -> str:
    columns = ["call", "first", "operator", *(["with_launches"] if "with_launches" in results["rows"][0] else [])]
    lines = [f"{'microseconds of the host, median':44}{'launches':>9}" + "".join(f"{c:>15}" for c in columns)]
    for row in results["rows"]:
        cells = "".join(f"{row[c]['median_us']:15.1f}" for c in columns)
        lines.append(f"{row['way']:44}{len(row['launches']):9}{cells}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument("--dry", action="store_true", help="a few rounds, never written to bench/results")
    args = parser.parse_args()
    if args.dry and args.out.resolve() == report.RESULTS.resolve():
        parser.error("--dry needs another --out")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    rounds = 3 if args.dry else args.rounds
    rows = [measure(way, args.batch, rounds, device) for way in tqdm(WAYS, unit="way", leave=False, disable=None)]
    path = args.out / "host_cost.json"
    report.save(path, {"dry": args.dry, "target_us": TARGET, "rows": rows})
    print(table(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
