"""Latency of one layer's decode step against context length and batch, side by side with dense kernels.

    python -m bench.decode_latency [--minutes 30] [--out bench/results] [--plot-only]

On a GPU: FlashAttention-3, FlashInfer, PyTorch's attention, vLLM's caches of few bits, rebuilding everything, Palu's
kernel, and each way of ours, as far as they are installed; decode_latency_gpu.json and .png. Without one it says so
first; then the CPU path is measured (decode_latency_cpu.json and .png), and for GPUs it gives what is certain without:
bytes and flops (decode_counts.json) and what the kernels compile to. JSON first, the plot is drawn from it.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch

from bench.compiled import resources
from bench.decode import cpu_decode, decode_providers, decode_shapes, gpu_decode, gpu_plot
from bench.support import report

NO_GPU = "No GPU here: the times below are a CPU's and say nothing about a kernel."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument("--minutes", type=float, default=30.0, help="on a GPU; the most valuable cases come first")
    parser.add_argument("--resume", action="store_true", help="keep the cases that the GPU's JSON already has")
    parser.add_argument("--without", action="append", default=[], choices=decode_providers.NAMES, metavar="PROVIDER")
    parser.add_argument("--compile", action="store_true", help="only compile our kernels, for later runs")
    parser.add_argument("--cpu", action="store_true", help="measure the CPU path, also where there is a GPU")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(cpu_decode.TOKENS), help="of the CPU path")
    parser.add_argument("--repeats", type=int, default=9, help="of the CPU path")
    parser.add_argument("--dry", action="store_true", help="tiny cases in the interpreter, as on a GPU; not results")
    parser.add_argument("--plot-only", action="store_true")
    args = parser.parse_args()
    if args.plot_only:
        return plot(args.out)
    if args.dry and (args.out == report.RESULTS or os.environ.get("TRITON_INTERPRET") != "1"):
        parser.error("--dry: expected --out of its own and TRITON_INTERPRET=1 in the environment")
    if not args.dry and (args.cpu or not torch.cuda.is_available()):
        return on_cpu(args.out, args.tokens, args.repeats)
    if args.compile:
        gpu_decode.compile_all(1 if args.dry else len(os.sched_getaffinity(0)), args.dry)
        return 0
    bench = gpu_decode.Bench.of(args.without, args.dry)
    results = gpu_decode.run(gpu_path(args.out, args.dry), args.minutes, bench, args.resume)
    print(f"left out for time: {len(results['left_out'])} cases", *results["left_out"][:8], sep="\n  ")
    faults = [f"{row['shape']}: {name}: {why}" for row in results["rows"] for name, why in row["faults"].items()]
    print(*faults, f"{len(results['rows'])} cases measured, {len(faults)} faults", sep="\n")
    plot(args.out)
    return 1 if faults else 0


def on_cpu(out: Path, tokens: list[int], repeats: int) -> int:
    if not torch.cuda.is_available():
        print(NO_GPU, flush=True)
    results = cpu_decode.run(out / "decode_latency_cpu.json", tokens, repeats)
    print(cpu_decode.lines(results))
    rows = decode_shapes.count_rows()
    report.save(out / "decode_counts.json", {"rows": rows})
    print(f"\nCounted for any GPU, per token of context:\n{decode_shapes.table(rows)}")
    print(f"\nCompiled, from {resources.PATH.name}:\n{resources.table(report.load(resources.PATH))}")
    return plot(out)


def plot(out: Path) -> int:
    """Draws what JSONs there are; a CPU's and a GPU's never share one."""
    if (path := out / "decode_latency_cpu.json").exists():
        cpu_decode.plot(report.load(path), path.with_suffix(".png"))
    for path in (gpu_path(out, dry) for dry in (False, True)):
        if path.exists():
            gpu_plot.plot(report.load(path), path.with_suffix(".png"))
    return 0


def gpu_path(out: Path, dry: bool) -> Path:
    return out / f"decode_latency_{'dry' if dry else 'gpu'}.json"


if __name__ == "__main__":
    raise SystemExit(main())
