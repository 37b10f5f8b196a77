"""The plot of decode_latency_gpu.json: microseconds and speed-up against context length, and against batch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from bench.decode.decode_providers import DENSE, NAMES
from bench.support.curves import curve, label_places

Row = dict[str, Any]
DRY_TITLE = "DRY RUN in Triton's interpreter on a CPU: these times say nothing about any kernel"
COLOURS = dict(zip(NAMES, (*plt.get_cmap("tab10").colors, "gold", "navy", "tan"), strict=True)) | {"lrattn": "black"}
STYLES = {("ReCalKV", 0): "-", ("ReCalKV", 1): "--", ("Palu", 0): "-.", ("Palu", 1): ":"}
PACKED = {"8/4/2 bits": "s", "4 bits": "^"}  # markers


def plot(results: dict[str, Any], path: Path) -> None:
    """A column for each model with several lengths, at its smallest batch; one for the shape at the most batches."""
    rows = [row for row in results["rows"] if row["times"]]
    columns = []
    for model in dict.fromkeys(row["model"] for row in rows):
        own = [row for row in rows if row["model"] == model]
        least = min(row["batch"] for row in own)
        columns.append(("tokens", [row for row in own if row["batch"] == least]))
    columns = [c for c in columns if len({row["tokens"] for row in c[1]}) > 1] or columns
    (name, keep, tokens), most = Counter((r["shape"], r["keep"], r["tokens"]) for r in rows).most_common(1)[0]
    if most > 1:
        same = (name, keep, tokens)
        columns.append(("batch", [row for row in rows if (row["shape"], row["keep"], row["tokens"]) == same]))
    width = max(9.0, 4.4 * len(columns) + 0.6)  # of the legend, at least
    figure, axes = plt.subplots(2, len(columns), figsize=(width, 8.2), layout="constrained", squeeze=False)
    for (against, chosen), upper, lower in zip(columns, *axes, strict=True):
        latencies(upper, chosen, against)
        speedups(lower, chosen, against)
    axes[0][0].set_ylabel("microseconds, median with p10-p90")
    axes[1][0].set_ylabel("speed-up over the best dense kernel")
    found = {label: handle for a in figure.axes for handle, label in zip(*a.get_legend_handles_labels(), strict=True)}
    figure.legend(found.values(), found.keys(), loc="outside lower center", ncols=4, fontsize="small")
    machine = results["machine"]
    title = f"One layer, one decode step, on {machine['gpu']}, torch {machine['torch']}, Triton {machine['triton']}"
    figure.suptitle(DRY_TITLE if results["dry"] else title, fontsize="medium")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"wrote {path}")


def latencies(axis: Axes, rows: list[Row], against: str) -> None:
    """Every provider of the shape that was measured most often."""
    (shape, keep), _ = Counter((row["shape"], row["keep"]) for row in rows).most_common(1)[0]
    own = sorted((r for r in rows if (r["shape"], r["keep"]) == (shape, keep)), key=lambda row: row[against])
    for name in NAMES:
        found = [(row[against], row["times"][name]) for row in own if name in row["times"]]
        if found:
            x, times = zip(*found, strict=True)
            curve(axis, x, times, "us", label=name, color=COLOURS[name], linestyle="--" if name in DENSE else "-")
    at = "" if against == "batch" else f", batch {own[0]['batch']}"
    at = f", {own[0]['tokens']} tokens" if against == "batch" else at
    axis.set_title(f"{shape}\nkept {own[0]['kept']:.3f}{at}", fontsize="small")
    scale(axis, against, {row[against] for row in own})
    axis.set_yscale("log")


def speedups(axis: Axes, rows: list[Row], against: str) -> None:
    """Ours, for every grouping and share kept; the limit of each as a thin grey line of its kind."""
    kinds = list(dict.fromkeys((row["shape"], row["keep"]) for row in rows))
    keeps = sorted({row["keep"] for row in rows}, reverse=True)
    named: list[float] = []  # limits with a label: near ones share it
    for shape, keep in kinds:
        own = sorted((r for r in rows if (r["shape"], r["keep"]) == (shape, keep)), key=lambda row: row[against])
        found = [(row[against], row["speedup"]["lrattn"]) for row in own if "lrattn" in row["speedup"]]
        if found:
            grouping = "Palu" if "Palu" in shape else "ReCalKV"
            style = STYLES[grouping, min(keeps.index(keep), 1)]
            packed = next((bits for bits in PACKED if shape.endswith(f", {bits}")), "")
            axis.plot(*zip(*found, strict=True), style, color="tab:green" if packed else "black",
                      marker=PACKED.get(packed, "o"), markersize=3,
                      label=f"lrattn, {grouping} groups, keep {keep}{f', {packed}' if packed else ''}")  # fmt: skip
            axis.axhline(own[0]["limit"], color="grey", linewidth=0.8, linestyle=style)
            if all(abs(own[0]["limit"] - other) > 0.2 for other in named):
                named.append(own[0]["limit"])
                axis.annotate("limit, 1 / kept", (0.01, named[-1]), xycoords=("axes fraction", "data"), fontsize=6,
                              color="grey", va="bottom")  # fmt: skip
    axis.axhline(1.0, color="tab:red", linewidth=0.8)
    axis.set_ylim(0, 1.06 * axis.get_ylim()[1])
    scale(axis, against, {row[against] for row in rows})


def scale(axis: Axes, against: str, places: set[int]) -> None:
    axis.set_xscale("log", base=2)
    label_places(axis, sorted(places))
    axis.set_xlabel("context, tokens" if against == "tokens" else "sequences in the batch")
    axis.grid(alpha=0.3)
