"""Palu's published kernel against ours inside its limits: scores alone, and a whole decode step.

    python -m bench.decode.palu_decode --out FOLDER [--minutes 1] [--dry] [--plot-only | --no-plot]

One sequence of Llama-2-7B's heads in groups of four. Scores: theirs, in both launches its code names, against our
turned queries and scores. Whole: theirs followed by softmax and values in PyTorch, as its code does, against
decode_attention. Each is checked, then timed as in bench.decode_latency. On a GPU; --dry tries it in the interpreter.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm import tqdm

from bench.decode import decode_providers as providers
from bench.decode import palu_scores, timing, ways
from bench.decode.decode_problem import Problem, attend, make
from bench.decode.decode_shapes import LLAMA_2, Shape
from bench.decode.gpu_decode import TIMED, Bench, Entry, ready
from bench.decode.gpu_plot import DRY_TITLE
from bench.support import report
from bench.support.curves import curve, label_places
from lrattn.kernels import launch, plan
from lrattn.kernels.absorb import absorb
from lrattn.kernels.arguments import Call, Rule, Span, Tokens
from lrattn.kernels.attend_rebuilt import attend_rebuilt

TOKENS = (32768, 4096, 131072, 16384, 65536, 1024)
KEEPS = (0.5, 0.25)  # ranks 256 and 128: what uniform ranks and what Fisher ranks leave the keys at keep 0.5
PALU = {"Palu's": palu_scores.PUBLISHED, "Palu's, launch for fours": palu_scores.FOR_FOURS}
OURS = "lrattn"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--dry", action="store_true")
    plots = parser.add_mutually_exclusive_group()
    plots.add_argument("--plot-only", action="store_true")
    plots.add_argument("--no-plot", action="store_true", help="the JSON alone: --plot-only draws it later")
    args = parser.parse_args()
    path = args.out / f"palu_decode_{'dry' if args.dry else 'gpu'}.json"
    if not args.plot_only:
        timing.check_device(parser, args.dry)
        run(path, args.minutes, Bench.of([], args.dry))
    results = report.load(path)
    if not args.no_plot:
        plot(results, path.with_suffix(".png"))
    faults = [
        f"{row['tokens']} tokens: {name}: {why}" for row in results["rows"] for name, why in row["faults"].items()
    ]
    print(*faults, f"{len(results['rows'])} cases measured, {len(faults)} faults", sep="\n")
    return 1 if faults else 0


def run(path: Path, minutes: float, bench: Bench) -> None:
    """Cases until the time is up, saved after each."""
    begin = time.monotonic()
    rows: list[dict[str, Any]] = []
    results = {"machine": report.machine(), "dry": bench.dry, "rows": rows, "left_out": []}
    todo = [
        (keep, tokens) for tokens in ((128,) if bench.dry else TOKENS) for keep in KEEPS[: 1 if bench.dry else None]
    ]
    for i, (keep, tokens) in enumerate(tqdm(todo, unit="case", disable=None)):
        if time.monotonic() - begin > 60 * minutes:
            results["left_out"] = [f"keep {keep}, {tokens} tokens" for keep, tokens in todo[i:]]
            break
        rows.append(measure(Shape(LLAMA_2, "Palu", 0.0625 if bench.dry else keep), tokens, bench))
        report.write(path, results)
        tqdm.write(lines(rows[-1]))


def measure(shape: Shape, tokens: int, bench: Bench) -> dict[str, Any]:
    """One length: times by "scores" and "whole", then by provider."""
    row: dict[str, Any] = {
        "keep": shape.keep, "key_rank": shape.key_ranks[0], "tokens": tokens,
        "times": {}, "must_read": {}, "errors": {}, "skipped": {}, "faults": {},
    }  # fmt: skip
    found = {
        entry.name: ready(entry, bench, row) for entry in entries(make(shape, tokens, 1, bench.dtype, bench.device))
    }
    runs = {name: run for name, run in found.items() if run is not None}
    row["times"] = timing.microseconds(bench.clock, runs, TIMED, bench.rounds)
    return row


def entries(x: Problem) -> Iterator[Entry]:
    """Scores by each, then whole steps by each. What the scores must read is the key side."""
    k, v = x.heads(0)
    rows = x.q[0].float().unflatten(0, (k.shape[1], -1))  # [Hkv, M, D]
    scores = {0: (rows @ k.float().permute(1, 2, 0)).flatten(0, 1)}
    whole = {0: attend(x.q[0], k, v)}
    keys = x.zk.numel() * x.zk.itemsize + x.layer.keys.up.numel() * x.zk.itemsize
    for name, how in PALU.items():
        yield Entry(f"scores, {name}", partial(providers.palu_scorer, x, how), keys, lambda: scores)
        yield Entry(f"whole, {name}", partial(providers.palu, x, how), x.must_read, lambda: whole)
    yield Entry(f"scores, {OURS}", partial(our_scores, x), keys, lambda: scores)
    yield Entry(f"whole, {OURS}", partial(providers.ours, x), x.must_read, lambda: whole)


def our_scores(x: Problem) -> providers.Run:
    """Our first two kernels as a decode call launches them, without values: scores [1, Hq, T], not scaled."""
    keys, values = x.layer.operands
    tokens, rule = Tokens(x.table, x.lens, None, None, x.tokens), Rule(1.0, 0.0, True, 0)
    q = x.q[:, None]
    call = Call(q, x.k_cache, x.v_cache, keys, values, tokens, rule)
    sizes = q.dtype, launch.name(q.device), launch.processors(q.device), keys.sizes, values.sizes
    with ways.rebuilt(), ways.two_passes():
        size = plan.cut(1, 1, q.shape[2], *sizes, False, x.tokens, 0, 0, 256 << 20)
    turned, s = q.new_empty(size.shapes.x), q.new_empty(size.shapes.s, dtype=torch.float32)
    span, way = Span(0, size.tiles, size.parts), size.way
    assert way is not None, "keys are rebuilt"

    def run() -> Tensor:
        absorb(call, turned, None, None, span, way)
        attend_rebuilt(call, turned, s, None, None, span, way)
        return s[:, :, : x.tokens]

    return run


def lines(row: dict[str, Any]) -> str:
    text = f"{row['tokens']} tokens, key rank {row['key_rank']}:"
    for name, t in row["times"].items():
        text += f"\n  {name:<34} {t['median_us']:9.1f} us  ({t['p10_us']:.1f} to {t['p90_us']:.1f})"
    return text + "".join(
        f"\n  {n:<34} not timed: {why}" for kind in ("skipped", "faults") for n, why in row[kind].items()
    )


def plot(results: dict[str, Any], path: Path) -> None:
    """Microseconds against context, a column for each key rank: scores above, whole steps below."""
    rows = results["rows"]
    ranks = list(dict.fromkeys(row["key_rank"] for row in rows))
    figure, axes = plt.subplots(
        2, len(ranks), figsize=(4.4 * len(ranks) + 1.6, 7.6), layout="constrained", squeeze=False
    )
    for rank, column in zip(ranks, axes.T, strict=True):
        own = sorted((row for row in rows if row["key_rank"] == rank), key=lambda row: row["tokens"])
        for kind, axis in zip(("scores", "whole"), column, strict=True):
            for name in (*PALU, OURS):
                at = [
                    (row["tokens"], row["times"][f"{kind}, {name}"]) for row in own if f"{kind}, {name}" in row["times"]
                ]
                if at:
                    x, times = zip(*at, strict=True)
                    curve(axis, x, times, "us", label=name)
            axis.set(xscale="log", yscale="log", xlabel="context, tokens", ylabel="microseconds, median with p10-p90")
            label_places(axis, [row["tokens"] for row in own])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.set_title(
                f"{'scores alone' if kind == 'scores' else 'the whole step'}, key rank {rank}", fontsize="small"
            )
    axes[0][0].legend(fontsize="small")
    title = f"Llama-2-7B's attention, one sequence, on {results['machine']['gpu']}"
    figure.suptitle(DRY_TITLE if results["dry"] else title, fontsize="small")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"wrote {path}")


if __name__ == "__main__":
    raise SystemExit(main())
