"""One decode step of a whole model on a CPU: on a dense cache by SDPA, and on latents.

python -m bench.decode.model_step [--tokens 8000] [--steps 12] [--out bench/results/model_step.json]

SmolLM2-135M in float32, one sequence, after so many tokens of text; the caches hold the same keys and values. Steps of
all caches are interleaved, so that what else the machine does meets them alike, and medians are compared. Exits with 1
if plain latents in chunks take longer than --bound times the dense step, or if a cache predicts another next token
than the dense one where both were sure of it.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from tqdm import tqdm
from transformers import DynamicCache

import lrattn
from bench.support import models, report, texts
from lrattn.integrations.transformers import LatentCache
from lrattn.integrations.transformers.load import read_windows
from lrattn.models.interface import cache_argument
from lrattn.models.layers import attention_layers
from lrattn.models.masks import said

PATH = report.RESULTS / "model_step.json"
WAYS: dict[str, dict[str, Any]] = {
    "chunks, plain": {"method": "lrattn", "keep": 0.5, "bits": 16, "ranks": "uniform"},
    "chunks, packed": {"method": "lrattn", "keep": 0.125},
    "chunks, packed, one row": {"method": "lrattn", "keep": 0.125, "shared": True},
    "before RoPE, plain": {"method": "lrattn-rebuilt", "keep": 0.5, "bits": 16, "shared": False, "ranks": "uniform"},
}
BOUNDED = "chunks, plain"
SURE = 1.0  # nats between the likeliest token and the next


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8000)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--bound", type=float, default=1.5, help="of the step on plain latents over the dense one")
    parser.add_argument("--out", type=Path, default=PATH)
    args = parser.parse_args()
    results = measure(args.tokens, args.steps)
    report.save(args.out, results | {"bound": args.bound})
    print(table(results))
    wrong = faults(results, args.bound)
    for fault in wrong:
        print(f"WRONG: {fault}", file=sys.stderr)
    return 1 if wrong else 0


@torch.no_grad()
def measure(tokens: int, steps: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model, tokenizer = models.smollm2()
    (ids,) = read_windows(tokenizer, texts.wikipedia("evaluation"), tokens + steps, 1)
    windows = read_windows(tokenizer, texts.wikipedia("calibration"), 512, 4)
    recipe = lrattn.methods.METHODS["lrattn"]
    moments = lrattn.calibrate(model, windows.split(1), gather=recipe.gather, far=recipe.near)
    dense = DynamicCache()
    model(input_ids=ids[None, :tokens], use_cache=True, logits_to_keep=1, **cache_argument(dense))
    caches: dict[str, Any] = {"dense": dense}
    for name, how in WAYS.items():
        factors = lrattn.compress(model, moments=moments, **how)
        caches[name] = filled(model, LatentCache(factors), dense)
    found: dict[str, dict[str, Any]] = {name: {"ms": [], "tops": [], "margins": []} for name in caches}
    for step in tqdm(range(steps), desc="decode", unit="step"):
        given = ids[None, tokens + step : tokens + step + 1]
        for name, cache in caches.items():
            model.set_attn_implementation("sdpa" if name == "dense" else "lrattn")
            begin = time.perf_counter()
            logits = model(input_ids=given, use_cache=True, **cache_argument(cache)).logits[0, -1]
            found[name]["ms"].append(1e3 * (time.perf_counter() - begin))
            first, second = logits.float().log_softmax(-1).topk(2).values.tolist()
            found[name]["tops"].append(int(logits.argmax()))
            found[name]["margins"].append(first - second)
    for name, own in found.items():
        own["median_ms"] = median(own["ms"])
        own["over_dense"] = own["median_ms"] / median(found["dense"]["ms"])
        own["keep"] = 1.0 if name == "dense" else caches[name].factors.keep
    return {"model": "SmolLM2-135M-Instruct", "dtype": "float32", "tokens": tokens, "rows": found}


def filled(model: Any, cache: LatentCache, dense: DynamicCache) -> LatentCache:
    """The cache with the keys and values of a dense one."""
    for layer, held, own in zip(cache.layers, dense.layers, attention_layers(model), strict=True):
        count = held.keys.shape[2]
        layer.write((held.keys, held.values), torch.arange(count)[None], said(None, None, 1, count), own.module)
    return cache


def faults(results: dict[str, Any], bound: float) -> list[str]:
    """What is wrong with a run, a sentence each."""
    rows, found = results["rows"], []
    if rows[BOUNDED]["over_dense"] > bound:
        found.append(f"{BOUNDED}: a step takes {rows[BOUNDED]['over_dense']:.2f} times the dense one, beyond {bound}")
    dense = rows["dense"]
    for name, own in rows.items():
        both = zip(dense["tops"], own["tops"], dense["margins"], own["margins"], strict=True)
        if any(a != b and min(sure, also) > SURE for a, b, sure, also in both):
            found.append(f"{name}: predicts {own['tops']}, where the dense cache predicts {dense['tops']}")
    return found


def table(results: dict[str, Any]) -> str:
    lines = [f"{results['model']}, {results['dtype']}: a decode step after {results['tokens']:,} tokens", ""]
    lines.append("{:<26} {:>6} {:>10} {:>11}".format("cache", "keep", "ms, median", "over dense"))
    for name, own in results["rows"].items():
        lines.append(f"{name:<26} {own['keep']:>6.3f} {own['median_ms']:>10.1f} {own['over_dense']:>11.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
