"""Bytes a cache holds, and the memory of the process around it, against context: dense and latent, measured.

python -m bench.memory [--plot-only]

Each cache grows in a process of its own: SmolLM2 is fed one text in steps of 512 tokens.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from tqdm import tqdm

import lrattn
from bench.support import models, process, report, texts
from lrattn.integrations.transformers.either import attending, held_bytes, new_cache
from lrattn.integrations.transformers.load import read_windows
from lrattn.models.interface import cache_argument

PATH = report.RESULTS / "memory.json"
KEEPS = (0.5, 0.3)
METHOD, DENSE = "lrattn-rebuilt", "dense"
STEP, LONGEST = 512, 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--plot-only", action="store_true")
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(one(args.one)))
        return
    if not args.plot_only:
        with tempfile.TemporaryDirectory() as folder:
            rows = [process.apart("bench.memory", "--one", str(path)) for path in factor_files(Path(folder))]
        report.save(PATH, {"model": "SmolLM2-135M-Instruct", "dtype": "float32", "step": STEP, "rows": rows})
    results = json.loads(PATH.read_text())
    print(table(results))
    plot(results, PATH.with_suffix(".png"))


def factor_files(folder: Path) -> list[Path]:
    """Factors at each kept share, made here: calibration is no part of what is measured. None for the dense cache."""
    model, tokenizer = models.smollm2()
    calibration = read_windows(tokenizer, texts.wikipedia("calibration"), 512, 4)
    gather = lrattn.methods.METHODS[METHOD].gather
    moments = lrattn.calibrate(model, calibration.split(1), gather=gather)
    paths = [folder / f"{keep}.safetensors" for keep in KEEPS]
    for keep, path in zip(KEEPS, paths, strict=True):
        lrattn.compress(model, None, METHOD, keep, moments=moments, bits=16).save(path)
    return [folder / DENSE, *paths]


@torch.no_grad()
def one(path: Path) -> dict[str, Any]:
    """One cache, from empty to the longest context."""
    torch.manual_seed(0)
    model, tokenizer = models.smollm2()
    ids = read_windows(tokenizer, texts.wikipedia("evaluation"), LONGEST, 1)
    factors = None if path.name == DENSE else lrattn.Factors.load(path)
    label = "dense" if factors is None else f"{factors.method}, keep {factors.keep:.1f}"
    with attending(model, factors):
        cache = new_cache(factors)
        before, points = process.resident(), []
        for chunk in tqdm(ids.split(STEP, 1), desc=label, unit="step"):
            model(input_ids=chunk, **cache_argument(cache), use_cache=True, logits_to_keep=1)
            points.append({"tokens": cache.get_seq_length(), "held": held_bytes(cache), **process.resident()})
    return {"label": label, "keep": 1.0 if factors is None else factors.keep, "before": before, "points": points}


def table(results: dict[str, Any]) -> str:
    lines = [
        f"{results['model']}, {results['dtype']}, grown in steps of {results['step']} tokens",
        "",
        f"{'cache':<24} {'tokens':>7} {'held, MiB':>10} {'bytes/token':>12} {'process at its peak, MiB':>25}",
    ]
    for row in results["rows"]:
        for point in row["points"][1::2]:
            held, peak = (point[name] / 2**20 for name in ("held", "peak"))
            each = point["held"] / point["tokens"]
            lines.append(f"{row['label']:<24} {point['tokens']:>7} {held:>10.1f} {each:>12,.0f} {peak:>25.0f}")
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Left: bytes of the cache's tensors. Right: peak memory of the process."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 4.0), layout="constrained")
    for row in results["rows"]:
        tokens = [point["tokens"] for point in row["points"]]
        left.plot(tokens, [p["held"] / 2**20 for p in row["points"]], marker="o", markersize=4, label=row["label"])
        right.plot(tokens, [p["peak"] / 2**20 for p in row["points"]], marker="o", markersize=4, label=row["label"])
    left.set(xlabel="context, tokens", ylabel="MiB", xlim=0, ylim=0, title="held by the cache's tensors")
    right.set(xlabel="context, tokens", ylabel="MiB", xlim=0, ylim=0, title="peak resident memory of the process")
    left.legend()
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.suptitle(f"{results['model']}, {results['dtype']}, on a CPU", fontsize="medium")
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
