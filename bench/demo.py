"""The demo: a real model compressed, evaluated on held-out articles, and generating from its latent cache.

python -m bench.demo [--keep 0.5 0.3] [--packed 0.125] [--method lrattn] [--out demo-output] [--plot-only]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import lrattn
from bench.support import models, report, texts
from lrattn.integrations.transformers.either import attending, held_bytes, new_cache
from lrattn.integrations.transformers.generate import read_prompt
from lrattn.integrations.transformers.load import read_windows
from lrattn.integrations.transformers.naming import as_argument
from lrattn.integrations.transformers.perplexity import perplexity

LENGTH = 1024
QUESTION = "What is a volcano? Answer in two sentences."
CONTEXTS = range(512, 4097, 512)
TIMED_TOKENS = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.3])
    parser.add_argument("--packed", type=float, nargs="*", default=[0.125], help="shares of bytes, spent as bits")
    parser.add_argument("--method", default=lrattn.methods.DEFAULT)
    parser.add_argument("--calibrate", type=int, default=16, help="windows of 1024 tokens")
    parser.add_argument("--evaluate", type=int, default=10, help="windows of 1024 tokens")
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    parser.add_argument("--plot-only", action="store_true")
    args = parser.parse_args()
    path = args.out / "demo.json"
    if not args.plot_only:
        report.save(path, measure(args))
    results = json.loads(path.read_text())
    print(table(results))
    plot(results, args.out / "demo.png")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    begin = time.perf_counter()
    torch.manual_seed(0)
    model, tokenizer = models.smollm2()
    evaluation = read_windows(tokenizer, texts.wikipedia("evaluation"), LENGTH, args.evaluate)
    calibration = read_windows(tokenizer, texts.wikipedia("calibration"), LENGTH, args.calibrate)
    recipe = lrattn.methods.METHODS[args.method]
    moments = lrattn.calibrate(model, calibration.split(1), gather=recipe.gather, far=recipe.near)
    rows = [run(model, tokenizer, evaluation, None)]
    for keep, bits in [*((keep, 16) for keep in args.keep), *((keep, "auto") for keep in args.packed)]:
        factors = lrattn.compress(model, method=args.method, keep=keep, bits=bits, moments=moments)
        rows.append(run(model, tokenizer, evaluation, factors))
    return {
        "model": "SmolLM2-135M-Instruct",
        "dtype": "float32",
        "text": texts.ABOUT,
        "calibration_tokens": moments.tokens,
        "evaluation_windows": list(evaluation.shape),
        "seconds": time.perf_counter() - begin,
        "rows": rows,
    }


def run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, evaluation: torch.Tensor, factors: lrattn.Factors | None
) -> dict[str, Any]:
    """One row of the table: the dense model, or the model on the latents of `factors`."""
    method, keep, rule = ("dense", 1.0, "") if factors is None else (factors.method, factors.keep, factors.rule)
    method += ", packed" if factors is not None and any(layer.packed for layer in factors.layers) else ""
    label = method if factors is None else f"{method} at keep {keep:.3f}"
    prompt = read_prompt(tokenizer, QUESTION, chat=True)
    start = prompt["input_ids"].shape[1]
    fixed = {"max_new_tokens": TIMED_TOKENS, "min_new_tokens": TIMED_TOKENS, "do_sample": False}
    with attending(model, factors):
        cache = new_cache(model, factors)
        answer = model.generate(**prompt, **as_argument(model, cache), max_new_tokens=64, do_sample=False)[0, start:]
        begin = time.perf_counter()
        model.generate(**prompt, **as_argument(model, new_cache(model, factors)), **fixed)
        seconds = time.perf_counter() - begin
        return {
            "method": method,
            "ranks": rule,
            "keep": keep,
            "half_bytes_per_token": None if factors is None else factors.bytes_per_token,
            "dense_half_bytes_per_token": None if factors is None else factors.dense_bytes_per_token,
            "dense_tokens": 0 if factors is None else sum(factors.near),
            "text": tokenizer.decode(answer, skip_special_tokens=True).strip(),
            "tokens_per_second": TIMED_TOKENS / seconds,
            "cache_bytes": cache_bytes(model, evaluation.flatten(), new_cache(model, factors), label),
            "perplexity": perplexity(model, evaluation, label),
        }


@torch.no_grad()
def cache_bytes(model: Any, ids: torch.Tensor, cache: Any, label: str) -> dict[str, int]:
    """Bytes of the tensors a cache really holds while one sequence grows, by context length."""
    found: dict[str, int] = {}
    for length in tqdm(CONTEXTS, desc=f"filling the cache, {label}", unit="step"):
        chunk = ids[cache.get_seq_length() : length]
        model(input_ids=chunk[None], **as_argument(model, cache), use_cache=True, logits_to_keep=1)
        found[str(length)] = held_bytes(cache)
    return found


def table(results: dict[str, Any]) -> str:
    rows = results["rows"]
    longest = max(rows[0]["cache_bytes"], key=int)
    dense = rows[0]["cache_bytes"][longest] / int(longest)
    lines = [
        "",
        f"{results['model']}, {results['dtype']}; perplexity on {results['evaluation_windows'][0]} windows of "
        f"{results['evaluation_windows'][1]} tokens of held-out articles; bytes measured at {longest} tokens",
        f"beside the latents, {rows[-1]['dense_tokens']} tokens dense",
        "",
        "method          keep   perplexity   cache bytes/token   dense bytes/token   measured share   tokens/s",
    ]
    for row in rows:
        held = row["cache_bytes"][longest] / int(longest)
        lines.append(
            f"{row['method']:<14} {row['keep']:.3f} {row['perplexity']:>12.2f} {held:>19,.0f} {dense:>19,.0f} "
            f"{held / dense:>16.3f} {row['tokens_per_second']:>10.1f}"
        )
    lines += ["", f"asked: {QUESTION}"]
    lines += [f"  {row['method']} {row['keep']:.3f}: {' '.join(row['text'].split())}" for row in rows]
    return "\n".join([*lines, "", f"measured in {results['seconds']:.0f} s", headline(rows)])


def headline(rows: list[dict[str, Any]]) -> str:
    """Bytes, perplexity and text of the row of fewest bytes, in numbers of 16 bits."""
    row = min(rows[1:], key=lambda row: row["keep"])
    held, dense = row["half_bytes_per_token"], row["dense_half_bytes_per_token"]
    return (
        f"{held:,} bytes a token where a dense 16-bit cache holds {dense:,}: perplexity {row['perplexity']:.2f}, "
        f"dense {rows[0]['perplexity']:.2f}; it writes: {' '.join(row['text'].split())}"
    )


def plot(results: dict[str, Any], path: Path) -> None:
    """Bytes the cache holds against context length."""
    figure, axis = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for row in results["rows"]:
        lengths = [int(n) for n in row["cache_bytes"]]
        mebibytes = [n / 2**20 for n in row["cache_bytes"].values()]
        label = "dense" if row["method"] == "dense" else f"{row['method']}, keep {row['keep']:.3f}"
        axis.plot(lengths, mebibytes, marker="o", label=f"{label} (perplexity {row['perplexity']:.1f})")
    axis.set(xlabel="context, tokens", ylabel="cache held, MiB", xlim=0, ylim=0)
    axis.set_title(f"{results['model']}, {results['dtype']}: bytes of the cache's tensors", fontsize="medium")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
