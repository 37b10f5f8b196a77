"""The CPU path against the way of the released code: one layer's decode step, rotated q in, heads out.

    python -m bench.cpu_decode [--tokens 8192] [--repeats 9] [--out bench/results] [--plot-only]

The released ReCalKV and Palu code rebuilds all keys and values, then attends; "tuned" is the fastest form of that we
found. Ours rebuilds keys block by block in cache and keeps values in latent space. Same latents, same run, interleaved;
results are compared before timing.
CPU times say nothing about a kernel on a GPU.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import lrattn
from bench import baselines, report, timing

# name: query heads, kv heads, head dim, key groups, rank of each, value groups, rank of each
SHAPES = {
    "Llama-2-7B, Palu groups": (32, 32, 128, 8, 256, 8, 256),
    "Llama-3.1-8B, Palu groups": (32, 8, 128, 2, 256, 2, 256),
    "Llama-2-7B, ReCalKV groups": (32, 32, 128, 8, 256, 1, 2048),
    "Llama-3.1-8B, ReCalKV groups": (32, 8, 128, 2, 256, 1, 512),
}
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
OURS, RELEASED, TUNED, DENSE = "lrattn", "released way", "rebuild all, tuned", "dense cache, not compressed"


def problem(shape: tuple[int, ...], tokens: int, dtype: torch.dtype) -> dict[str, Any]:
    """A seeded layer at keep 0.5, its filled cache, and the dense cache it stands for."""
    query_heads, heads, head_dim, key_groups, key_rank, value_groups, value_rank = shape
    g = torch.Generator().manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*size, generator=g) * scale).to(dtype)

    layer = lrattn.LayerFactors(
        keys=lrattn.Projection(normal(heads, key_rank, head_dim, scale=key_rank**-0.5), (key_rank,) * key_groups),
        values=lrattn.Projection(
            normal(heads, value_rank, head_dim, scale=value_rank**-0.5), (value_rank,) * value_groups
        ),
        rope=lrattn.Rope(1e4, head_dim, tokens),
    )
    zk, zv = normal(tokens, layer.k_width), normal(tokens, layer.v_width)
    pages = tokens // 16
    table = torch.randperm(pages, generator=g).int()
    k_cache, v_cache = lrattn.allocate_cache(layer, pages, 16)
    t = torch.arange(tokens)
    lrattn.write_latents(layer, zk, zv, k_cache, v_cache, table[t // 16].long() * 16 + t % 16)
    k, v = layer.rebuild(zk, zv, t)
    return {
        "layer": layer,
        "q": normal(query_heads, head_dim),
        "zk": zk,
        "zv": zv,
        "k": k.transpose(0, 1).contiguous(),
        "v": v.transpose(0, 1).contiguous(),
        "caches": (k_cache, v_cache),
        "table": table[None],
        "lens": torch.tensor([tokens], dtype=torch.int32),
    }


def measure(name: str, tokens: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    x = problem(SHAPES[name], tokens, dtype)
    arguments = {"block_table": x["table"], "seq_lens": x["lens"]}
    runs = {
        OURS: lambda: lrattn.decode_attention(x["q"][None], *x["caches"], x["layer"], **arguments)[0],
        RELEASED: lambda: baselines.released_way(x["layer"], x["q"], x["zk"], x["zv"]),
        TUNED: lambda: baselines.rebuild_tuned(x["layer"], x["q"], x["zk"], x["zv"]),
        DENSE: lambda: baselines.dense(x["q"], x["k"], x["v"]),
    }
    for run in runs.values():
        timing.gate(run(), runs[RELEASED](), TOLERANCE[dtype])
    times = timing.milliseconds(runs, repeats)
    return {
        "shape": name,
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": tokens,
        "times": times,
        "speedup": times[RELEASED]["median_ms"] / times[OURS]["median_ms"],
        "speedup_over_tuned": times[TUNED]["median_ms"] / times[OURS]["median_ms"],
        "workspace_bytes": lrattn.workspace_bytes(x["layer"], query_heads=len(x["q"])),
    }


def plot(results: dict[str, Any], path: Path) -> None:
    figure, axis = plt.subplots(figsize=(12.0, 4.4), layout="constrained")
    rows = results["rows"]
    for i, name in enumerate((OURS, RELEASED, TUNED, DENSE)):
        found = [row["times"][name] for row in rows]
        medians = [t["median_ms"] for t in found]
        spread = [[t["median_ms"] - t["p10_ms"] for t in found], [t["p90_ms"] - t["median_ms"] for t in found]]
        places = [r + 0.22 * (i - 1.5) for r in range(len(rows))]
        bars = axis.bar(places, medians, 0.2, yerr=spread, label=name, capsize=2)
        axis.bar_label(bars, [f"{m:.0f}" for m in medians], padding=2, fontsize="x-small")
    names = ["\n".join([*r["shape"].split(", "), r["dtype"]]) for r in rows]
    axis.set_xticks(range(len(rows)), names, fontsize="small")
    highest = max(t["p90_ms"] for row in rows for t in row["times"].values())
    axis.set(ylabel="ms, median with p10-p90", yscale="log", ylim=(1, 10 * highest))
    machine = results["machine"]
    axis.set_title(
        f"One layer, one decode step at {rows[0]['tokens']} tokens, {machine['threads']} threads of {machine['cpu']}",
        fontsize="medium",
    )
    axis.legend(fontsize="small", ncols=4, loc="upper center")
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=report.RESULTS)
    parser.add_argument("--plot-only", action="store_true")
    args = parser.parse_args()
    path = args.out / "cpu_decode.json"
    if not args.plot_only:
        rows = [measure(name, args.tokens, dtype, args.repeats) for name in SHAPES for dtype in TOLERANCE]
        report.save(path, {"rows": rows})
    results = json.loads(path.read_text())
    for row in results["rows"]:
        medians = ", ".join(f"{name} {t['median_ms']:.1f} ms" for name, t in row["times"].items())
        print(f"{row['shape']}, {row['dtype']}, {row['tokens']} tokens: {medians}: {row['speedup']:.1f} times faster")
    plot(results, args.out / "cpu_decode.png")


if __name__ == "__main__":
    main()
