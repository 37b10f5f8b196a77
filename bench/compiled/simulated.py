"""Microseconds of the pass over position-free latents, by a simulator: no GPU is used, nothing is measured.

    python -m bench.compiled.simulated --simulator FILE

FILE is a Python module that runs machine code by the timing rules of an H100's multiprocessor: parse(cubin),
usage(cubin) and predict(code, Machine(), ..). It is no part of this project. Kernels are compiled for sm_90 as they
would be launched, cut as for an H100. For models and formats, at batch 1 and 16 and several lengths, its prediction
[simulated] goes to results/simulated.json, beside the time of the rows' bytes at the rate of memory and of a dense
16-bit cache's at 92 % of that [estimated], and instructions of the loop a token. The table joins them with what an H100
took by the kernels there were before [measured], of results/launches_gpu.json. The simulator knows no bank conflicts,
and was 23 to 31 % off the packed kernels there were before.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from tqdm import tqdm

from bench.compiled import resources
from bench.compiled.resources import Problem, compiling
from bench.compiled.sass import loop
from bench.decode import launches
from bench.decode.decode_shapes import CHUNK
from bench.support import report
from lrattn.kernels import plan
from lrattn.kernels.attend import attend
from lrattn.kernels.attend_packed import attend_packed

PATH = report.RESULTS / "simulated.json"
PROCESSORS, MEMORY, SHARE = 132, 3.08e12, 0.92  # of an H100; bytes a second; of it that a dense kernel reaches
BATCHES, LENGTHS = (1, 16), (8192, 32768, 131072)
FORMATS: tuple[tuple[int, ...], ...] = ((8, 4, 2), (4,), (8,), ())
BEFORE = ("b398a1b", "93348e8")  # commits that were measured: packed rows were unpacked, and keys in no chunks
RANK, HEAD_DIM, GROUP, LIMIT = 256, 128, 4, 256 << 20


class Model(NamedTuple):
    name: str
    query_heads: int  # M, of a kv head
    groups: int


MODELS = (Model("Llama-3.1-8B", 4, 2), Model("Llama-2-7B", 1, 8))


def compiled(model: Model, bits: tuple[int, ...]) -> Any:
    """The binary of the pass over keys and values."""
    problem = Problem(RANK, HEAD_DIM, model.query_heads, 1, GROUP, chunk=CHUNK, bits=bits)
    with compiling("sm90") as found:
        if bits:
            codes, a, terms = problem.codes()
            attend_packed(problem.call(), a, terms, None, *problem.partial(), resources.SPAN, codes.keys)
        else:
            way, queries = problem.way()
            attend(problem.call(), *queries, None, *problem.partial(), resources.SPAN, way)
    ((_, binary),) = found
    return binary


def sizes(model: Model, bits: tuple[int, ...]) -> tuple[Any, Any]:
    """Keys and values of the model's layer, as plans take them."""
    keys, values = Problem(RANK, HEAD_DIM, model.query_heads, 1, GROUP, chunk=CHUNK, bits=bits).sides()
    heads = {"num_heads": model.groups * GROUP, "groups": model.groups}
    heads["runs"] = keys.sizes.runs * model.groups // 2  # Problem has two groups
    return keys.sizes._replace(**heads), values.sizes._replace(**heads)


def parsed(simulator: Any, cubin: bytes) -> tuple[Any, dict[str, int]]:
    """Machine code as a simulator takes it, and the registers and the bytes of stack that it says it uses."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return simulator.parse(file.name), simulator.usage(file.name)


def simulate(simulator: Any, model: Model, bits: tuple[int, ...]) -> list[dict[str, Any]]:
    binary, (keys, values) = compiled(model, bits), sizes(model, bits)
    cubin, warps = binary.asm["cubin"], binary.metadata.num_warps
    token = 2 * model.groups * (Problem(bits=bits).format(RANK).nbytes if bits else 2 * RANK)  # type: ignore[union-attr]
    dense = 4 * model.groups * GROUP * HEAD_DIM
    rows = []
    code, usage = parsed(simulator, cubin)
    registers = usage["REG"]
    query_heads = model.groups * GROUP * model.query_heads
    for batch in BATCHES:
        for length in LENGTHS:
            cut = plan.cut(
                batch, 1, query_heads, torch.bfloat16, "sm90", PROCESSORS, keys, values, False, length, 0, 0, LIMIT
            )  # fmt: skip
            choice = cut.fused
            assert choice is not None and cut.tiles == cut.total and cut.batch == batch, "one launch"
            step = 4 * choice.block_n if bits else choice.block_t
            trips = -(-cut.total // cut.splits) * cut.block_t // step
            nbytes = batch * length * token
            found = simulator.predict(
                code, simulator.Machine(), warps=warps, reg=registers, shared=binary.metadata.shared,
                programs=cut.splits * batch * model.groups, trips=trips, dram_bytes=nbytes, stages=choice.stages,
            )  # fmt: skip
            rows.append({
                "model": model.name, "bits": list(bits), "batch": batch, "tokens": length, "splits": cut.splits,
                "simulated_us": round(found.us, 1), "bytes": nbytes, "bytes_us": round(nbytes / MEMORY * 1e6, 1),
                "dense_us": round(batch * length * dense / (SHARE * MEMORY) * 1e6, 1),
                "loop_a_token": round(loop(cubin).total() * warps / step, 1),
                "registers": registers,
            })  # fmt: skip
    return rows


def before(results: dict[str, Any]) -> dict[tuple[str, tuple[int, ...], int, int], float]:
    """Microseconds of whole steps on position-free latents, by model, bits, batch and tokens [measured].

    results: of bench.decode.launches. Of each step the fastest launch tried, and of commits the last that has it.
    """
    found = {}
    for row in (row for row in results["rows"] if row["us"] and row["commit"] in BEFORE):
        layer = launches.LAYERS[row["layer"]]
        if not layer.rope and layer.shape.key_ranks[0] == RANK:
            key = layer.shape.model.name, layer.shape.bits, row["batch"], results["tokens"]
            found[key] = min(row["us"].values())
    return found


def table(results: dict[str, Any]) -> str:
    """Microseconds of the pass over latents [simulated], beside those of its bytes and a dense cache's [estimated], and
    of a whole step by the kernels there were before [measured]; - where it was not measured."""
    line = "{:14} {:>6} {:>6} {:>8} {:>12} {:>10} {:>10} {:>10} {:>12} {:>8}"
    names = ("model", "bits", "batch", "tokens", "simulated us", "its bytes", "over them", "dense us", "dense / it")
    lines, old = [line.format(*names, "old us")], before(report.load(launches.PATH))
    for r in results["rows"]:
        bits = "/".join(map(str, r["bits"])) or "16"
        over, gain = r["simulated_us"] / r["bytes_us"], r["dense_us"] / r["simulated_us"]
        us = old.get((r["model"], tuple(r["bits"]), r["batch"], r["tokens"]))
        cells = (r["simulated_us"], r["bytes_us"], f"{over:.2f}", r["dense_us"], f"{gain:.1f}")
        lines.append(line.format(r["model"], bits, r["batch"], r["tokens"], *cells, f"{us:.1f}" if us else "-"))
    return "\n".join(lines)


def loaded(parser: argparse.ArgumentParser) -> tuple[Any, argparse.Namespace]:
    """The simulator that --simulator names, and the arguments of the command line."""
    parser.add_argument("--simulator", type=Path, required=True, help="a Python module, see above")
    args = parser.parse_args()
    spec = importlib.util.spec_from_file_location("simulator", args.simulator)
    if not args.simulator.is_file() or spec is None or spec.loader is None:
        parser.error(f"--simulator: expected a Python file, got {args.simulator}")
    simulator = importlib.util.module_from_spec(spec)
    sys.modules["simulator"] = simulator  # its dataclasses look themselves up
    spec.loader.exec_module(simulator)
    return simulator, args


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    simulator, _ = loaded(parser)
    rows: list[dict[str, Any]] = []
    for model in MODELS:
        for bits in tqdm(FORMATS, desc=model.name, unit="format", disable=None):
            rows += simulate(simulator, model, bits)
    results = {"sources": resources.sources_hash(), "triton": triton.__version__, "rows": rows}
    report.save(PATH, results)
    print(table(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
