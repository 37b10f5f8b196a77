"""What compressing a large model takes: peak memory and time a layer, on random models of real shapes.

python -m bench.scale [--again]

Each case runs in a process of its own, and is kept in the JSON: --again measures what is there anew. A 1B model is run
whole; a 7B model by its first 2 and its first 4 layers, from which 32 layers are extrapolated: those figures are
estimates, and are called so.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import lrattn
from bench.support import process, report

PATH = report.RESULTS / "scale.json"
SHAPES = {
    "1B": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
        "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128_256, "tie_word_embeddings": True,
    },
    "7B": {
        "hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "head_dim": 128, "vocab_size": 32_000, "tie_word_embeddings": False,
    },
}  # fmt: skip
WAYS = (("palu", "spectrum"), ("recalkv", "fisher"), ("lrattn-rebuilt", "spectrum"))
SETTINGS = ("shape", "layers", "method", "ranks")
SEQUENCES, LENGTH = 2, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true", help="measure every case anew")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        shape, layers, method, ranks = args.one
        print(json.dumps(one(shape, int(layers), method, ranks)))
        return
    cases = [(shape, layers, *way) for way in WAYS for shape, layers in (("1B", 16), ("7B", 2), ("7B", 4))]
    held = report.load(PATH)["rows"] if PATH.is_file() else []
    rows = {tuple(row[name] for name in SETTINGS): row for row in held}
    for n, case in enumerate(cases, 1):
        if case in rows and not args.again:
            continue
        print(f"case {n} of {len(cases)}: {case}", flush=True)
        rows[case] = {**process.apart("bench.scale", "--one", *map(str, case)), "commit": report.commit()}
        found = [rows[case] for case in cases if case in rows]
        report.save(PATH, {"dtype": "float32", "tokens": SEQUENCES * LENGTH, "rows": found})
    print(table(report.load(PATH)))


def one(shape: str, layers: int, method: str, ranks: str) -> dict[str, Any]:
    """Compresses a random model; seconds of each stage, resident memory before and at the peak."""
    torch.manual_seed(0)
    sizes = {**SHAPES[shape], "num_hidden_layers": layers}
    model = LlamaForCausalLM(LlamaConfig(**sizes, dtype="float32")).eval()
    batches = torch.randint(0, sizes["vocab_size"], (SEQUENCES, LENGTH)).split(1)
    before = process.resident()["now"]
    begin = time.perf_counter()
    moments = lrattn.calibrate(model, batches, gather=lrattn.methods.METHODS[method].gathered(ranks))
    calibrated = time.perf_counter()
    factors = lrattn.compress(model, batches, method, 0.5, ranks=ranks, moments=moments, bits=16)
    end = time.perf_counter()
    return {
        "shape": shape,
        "layers": layers,
        "method": method,
        "ranks": ranks,
        "keep": factors.keep,
        "model_bytes": sum(p.nbytes for p in model.parameters()),
        "moment_bytes": sum(x.nbytes for xs in moments.sums.values() for x in xs),
        "before": before,
        "peak": process.resident()["peak"],
        "calibrate_seconds": calibrated - begin,
        "factor_seconds": end - calibrated,
    }


def estimates(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of every method with both shortened 7B models."""
    of_7b = {(r["method"], r["layers"]): r for r in rows if r["shape"] == "7B"}
    return [estimate(of_7b[m, 2], of_7b[m, 4]) for m, _ in WAYS if {(m, 2), (m, 4)} <= of_7b.keys()]


def estimate(two: dict[str, Any], four: dict[str, Any]) -> dict[str, Any]:
    """A 7B model by the line through its 2 and its 4 layers. In bfloat16 only the model's own bytes are halved."""
    layers = SHAPES["7B"]["num_hidden_layers"]

    def at_full_depth(name: str) -> float:
        return two[name] + (layers - 2) * (four[name] - two[name]) / 2

    return {
        "method": two["method"],
        "layers": layers,
        "peak_float32": at_full_depth("peak"),
        "peak_bfloat16": at_full_depth("peak") - at_full_depth("model_bytes") / 2,
        "calibrate_seconds": at_full_depth("calibrate_seconds"),
        "factor_seconds": at_full_depth("factor_seconds"),
    }


def table(results: dict[str, Any]) -> str:
    gib = 2**30
    lines = [
        f"random Llama models, {results['dtype']}, {results['tokens']} calibration tokens, keep 0.5",
        "",
        "shape  layers method         ranks     model, GiB  moments, GiB  peak, GiB"
        "  calibrate, s/layer  factor, s/layer",
    ]
    for r in results["rows"]:
        sizes = f"{r['model_bytes'] / gib:>10.2f} {r['moment_bytes'] / gib:>13.2f} {r['peak'] / gib:>10.2f}"
        times = f"{r['calibrate_seconds'] / r['layers']:>19.2f} {r['factor_seconds'] / r['layers']:>16.2f}"
        lines.append(f"{r['shape']:<6} {r['layers']:>6} {r['method']:<14} {r['ranks']:<9} {sizes} {times}")
    lines.append("")
    for e in estimates(results["rows"]):
        peaks = f"{e['peak_float32'] / gib:.0f} GiB in float32, {e['peak_bfloat16'] / gib:.0f} GiB in bfloat16"
        times = f"{e['calibrate_seconds']:.0f} s to calibrate, {e['factor_seconds']:.0f} s to factor"
        lines.append(f"7B, {e['layers']} layers, {e['method']}, estimated from 2 and 4 layers: peak {peaks}; {times}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
