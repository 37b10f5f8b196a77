"""The CPU half of bench.decode_latency: our path against dense attention and against the released code's way.

The released ReCalKV and Palu code rebuilds all keys and values, then attends; "tuned" is the fastest form of that we
found. Ours rebuilds keys block by block in cache and keeps values in latent space. Same latents, same run, interleaved;
results are compared before timing.
CPU times say nothing about a kernel on a GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

import lrattn
from bench.decode import baselines, timing
from bench.decode.decode_problem import make
from bench.decode.decode_shapes import GROUPINGS, LLAMA_2, LLAMA_31, Shape
from bench.support import report
from bench.support.curves import curve, label_places

KEEP = 0.5
SHAPES = [Shape(model, grouping, KEEP) for grouping in reversed(GROUPINGS) for model in (LLAMA_2, LLAMA_31)]
TOKENS = (1024, 2048, 4096, 8192, 16384, 32768)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
OURS, RELEASED, TUNED, DENSE = "lrattn", "released way", "rebuild all, tuned", "dense cache, not compressed"


def run(path: Path, tokens: list[int], repeats: int) -> dict[str, Any]:
    """Every shape, dtype and length, saved after each."""
    rows: list[dict[str, Any]] = []
    results = {"machine": report.machine(), "rows": rows}
    todo = [(shape, n, dtype) for shape in SHAPES for dtype in TOLERANCE for n in tokens]
    for shape, n, dtype in tqdm(todo, desc="cases", unit="case", disable=None):
        rows.append(measure(shape, n, dtype, repeats))
        report.write(path, results)
    return results


def measure(shape: Shape, tokens: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    x = make(shape, tokens, 1, dtype, page=16)
    assert x.zv is not None
    q, zk, zv = x.q[0], x.zk[0], x.zv[0]
    k, v = (side[0].transpose(0, 1).contiguous() for side in x.dense())
    runs = {
        OURS: lambda: lrattn.decode_attention(x.q, x.k_cache, x.v_cache, x.layer, block_table=x.table, seq_lens=x.lens)[
            0
        ],
        RELEASED: lambda: baselines.released_way(x.layer, q, zk, zv),
        TUNED: lambda: baselines.rebuild_tuned(x.layer, q, zk, zv),
        DENSE: lambda: baselines.dense(q, k, v),
    }
    expected = runs[RELEASED]()
    for provider in runs.values():
        timing.gate(provider(), expected, TOLERANCE[dtype])
    times = timing.milliseconds(runs, repeats)
    return {
        "shape": shape.name,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "times": times,
        "speedup": times[RELEASED]["median_ms"] / times[OURS]["median_ms"],
        "speedup_over_tuned": times[TUNED]["median_ms"] / times[OURS]["median_ms"],
        "workspace_bytes": lrattn.workspace_bytes(x.layer, query_heads=len(q)),
    }


def lines(results: dict[str, Any]) -> str:
    return "\n".join(
        f"{row['shape']}, {row['dtype']}, {row['tokens']} tokens: "
        + ", ".join(f"{name} {t['median_ms']:.1f} ms" for name, t in row["times"].items())
        + f": {row['speedup']:.1f} x the released way"
        for row in results["rows"]
    )


def plot(results: dict[str, Any], path: Path) -> None:
    """Milliseconds against context, a panel for each shape and dtype."""
    rows = results["rows"]
    shapes, dtypes = (list(dict.fromkeys(row[name] for row in rows)) for name in ("shape", "dtype"))
    figure, axes = plt.subplots(
        len(dtypes), len(shapes), figsize=(3.4 * len(shapes), 3.1 * len(dtypes) + 0.8), layout="constrained",
        squeeze=False, sharex=True, sharey=True,
    )  # fmt: skip
    for dtype, line in zip(dtypes, axes, strict=True):
        for shape, axis in zip(shapes, line, strict=True):
            own = [row for row in rows if (row["shape"], row["dtype"]) == (shape, dtype)]
            for name in (OURS, RELEASED, TUNED, DENSE):
                found = [row["times"][name] for row in own]
                curve(axis, [r["tokens"] for r in own], found, "ms", label=name)
            lengths = sorted({row["tokens"] for row in rows})
            axis.set(xscale="log", yscale="log")
            label_places(axis, lengths)
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.set_title(f"{shape}\n{dtype}", fontsize="small")
    figure.supylabel("ms, median with p10-p90", fontsize="medium")
    for axis in axes[-1]:
        axis.set_xlabel("context, tokens")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    machine = results["machine"]
    figure.suptitle(
        f"One layer, one decode step on a CPU, keep {KEEP}: {machine['threads']} threads of {machine['cpu']}",
        fontsize="medium",
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"wrote {path}")
