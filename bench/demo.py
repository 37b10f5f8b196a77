"""The demo: a real model compressed, evaluated on held-out articles, and generating from its latent cache.

python -m bench.demo [--out demo-output] [--plot-only]

It shows the default and its two alternatives, plain latents and the smallest, all of one calibration. It checks what it
shows and exits with 1 if anything is wrong: the bytes held are those that the factors say, perplexity is within 2 % of
the dense model's, and the answer from latents begins as the dense one does.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
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
from lrattn.integrations.transformers.perplexity import perplexity
from lrattn.models.interface import cache_argument

LENGTH = 1024  # tokens of a window
QUESTION = "What is a volcano? Answer in two sentences."
CONTEXTS = range(512, 4097, 512)  # a cache has no free room there: its pages grow by an eighth, at least
TOKENS = 48  # of the answer, at most
ALIKE = 12  # of them that a latent cache has to share with the dense one
BOUND = 0.025  # perplexity over dense, less one, at most
COLUMNS = 100

CHOICES: dict[str, dict[str, Any]] = {  # rows beside the dense one, and what compress is told for each
    "lrattn": {},
    "lrattn, 16 bits": {"keep": 0.5, "bits": 16},
    "lrattn-rebuilt": {"method": "lrattn-rebuilt", "keep": 0.0625},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibrate", type=int, default=8, help=f"windows of {LENGTH} tokens")
    parser.add_argument("--evaluate", type=int, default=6, help=f"windows of {LENGTH} tokens")
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    parser.add_argument("--plot-only", action="store_true", help="of the results in --out")
    args = parser.parse_args()
    path = args.out / "demo.json"
    if not args.plot_only:
        report.save(path, measure(args))
    results = json.loads(path.read_text())
    print(table(results))
    plot(results, args.out / "demo.png")
    wrong = faults(results)
    for fault in wrong:
        print(f"WRONG: {fault}", file=sys.stderr)
    return 1 if wrong else 0


def measure(args: argparse.Namespace) -> dict[str, Any]:
    begin = time.perf_counter()
    torch.manual_seed(0)
    model, tokenizer = models.smollm2()
    text = texts.wikipedia("evaluation")
    evaluation = read_windows(tokenizer, text, LENGTH, args.evaluate)
    (context,) = read_windows(tokenizer, text, max(CONTEXTS), 1)
    calibration = read_windows(tokenizer, texts.wikipedia("calibration"), LENGTH, args.calibrate)
    recipe = lrattn.methods.METHODS[lrattn.methods.DEFAULT]
    moments = lrattn.calibrate(model, calibration.split(1), gather=recipe.gather, far=recipe.near)
    rows = [run(model, tokenizer, evaluation, context, "dense", None)]
    for name, told in CHOICES.items():
        factors = lrattn.compress(model, moments=moments, **told)
        rows.append(run(model, tokenizer, evaluation, context, name, factors))
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
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    evaluation: torch.Tensor,
    context: torch.Tensor,
    name: str,
    factors: lrattn.Factors | None,
) -> dict[str, Any]:
    """One row of the table: the dense model, or the model on the latents of `factors`."""
    prompt = read_prompt(tokenizer, QUESTION, chat=True)
    with attending(model, factors):
        begin, cache = time.perf_counter(), new_cache(factors)
        answer = model.generate(**prompt, **cache_argument(cache), max_new_tokens=TOKENS, do_sample=False)
        seconds = time.perf_counter() - begin
        ids = answer[0, prompt["input_ids"].shape[1] :]
        return {
            "name": name,
            "keep": 1.0 if factors is None else factors.keep,
            "half_bytes_per_token": None if factors is None else factors.bytes_per_token,
            "dense_half_bytes_per_token": None if factors is None else factors.dense_bytes_per_token,
            "dense_tokens": 0 if factors is None else sum(factors.near),
            "text": tokenizer.decode(ids, skip_special_tokens=True).strip(),
            "ids": ids.tolist(),
            "tokens_cached": cache.get_seq_length(),
            "tokens_fed": answer.shape[1] - 1,  # the last one is never fed back
            "tokens_per_second": len(ids) / seconds,
            "cache_bytes": cache_bytes(model, context, new_cache(factors), name),
            "factors_say": {str(n): bytes_said(factors, n) for n in CONTEXTS} if factors is not None else None,
            "perplexity": perplexity(model, evaluation, name),
        }


def bytes_said(factors: lrattn.Factors, tokens: int, page: int = 16) -> int:
    """Bytes of a cache of one sequence of float32: the latents of whole pages, their table, and the dense window."""
    wide = 2  # a float32 takes two of the 16-bit numbers that `bytes_per_token` counts; packed rows are bytes
    latents = sum(layer.bytes_per_token * (1 if layer.packed else wide) for layer in factors.layers)
    (recent, sinks), pages = factors.near, -(-tokens // page)
    window = sinks + (min(recent + 1, pages * page) if recent else 0)  # with room for the next token
    return pages * (page * latents + 4) + window * wide * factors.dense_bytes_per_token


@torch.no_grad()
def cache_bytes(model: Any, ids: torch.Tensor, cache: Any, name: str) -> dict[str, int]:
    """Bytes of the tensors a cache really holds while one sequence grows, by context length."""
    found: dict[str, int] = {}
    for length in tqdm(CONTEXTS, desc=f"filling the cache, {name}", unit="step"):
        chunk = ids[cache.get_seq_length() : length]
        model(input_ids=chunk[None], **cache_argument(cache), use_cache=True, logits_to_keep=1)
        found[str(length)] = held_bytes(cache)
    return found


def faults(results: dict[str, Any]) -> list[str]:
    """What is wrong with a run, a sentence each."""
    dense, found = results["rows"][0], []
    for row in results["rows"]:
        name = row["name"]
        if row["tokens_cached"] != row["tokens_fed"]:
            found.append(f"{name}: {row['tokens_fed']} tokens were fed, the cache holds {row['tokens_cached']}")
        if row is dense:
            continue
        for tokens, held in row["cache_bytes"].items():
            if held != row["factors_say"][tokens]:
                said = row["factors_say"][tokens]
                found.append(f"{name}: the cache holds {held:,} bytes at {tokens} tokens, its factors say {said:,}")
        worse = row["perplexity"] / dense["perplexity"] - 1
        if not abs(worse) <= BOUND:
            found.append(f"{name}: perplexity is {worse:+.1%} from dense, beyond {BOUND:.1%}")
        if row["ids"][:ALIKE] != dense["ids"][:ALIKE]:
            found.append(f"{name}: the answer begins otherwise than the dense one: {row['text'][:60]!r}")
    return found


def table(results: dict[str, Any]) -> str:
    rows = results["rows"]
    longest = max(rows[0]["cache_bytes"], key=int)
    dense = rows[0]["cache_bytes"][longest] / int(longest)
    windows, length = results["evaluation_windows"]
    about = (
        f"{results['model']} in {results['dtype']}. Perplexity on {windows} windows of {length} tokens of held-out "
        f"articles. Bytes of the whole cache at {longest} tokens, the {rows[-1]['dense_tokens']} that are held dense "
        "beside the latents included."
    )
    lines = ["", *textwrap.wrap(about, COLUMNS), ""]
    line = "{:16} {:>6} {:>11} {:>18} {:>14} {:>9}"
    lines.append(line.format("cache", "keep", "perplexity", "bytes a token", "share of dense", "tokens/s"))
    for row in rows:
        held = row["cache_bytes"][longest] / int(longest)
        cells = (row["name"], f"{row['keep']:.3f}", f"{row['perplexity']:.2f}", f"{held:,.0f}")
        lines.append(line.format(*cells, f"{held / dense:.3f}", f"{row['tokens_per_second']:.1f}"))
    lines += ["", *(f"{name}: {call(told)}" for name, told in CHOICES.items()), "", f"asked: {QUESTION}"]
    for row in rows:
        answer = f"{row['name']}: {' '.join(row['text'].split())}"
        lines += textwrap.wrap(answer, COLUMNS, initial_indent="  ", subsequent_indent="    ")
    lines += ["", *textwrap.wrap(headline(rows), COLUMNS), f"measured in {results['seconds']:.0f} s"]
    return "\n".join(lines)


def call(told: dict[str, Any]) -> str:
    return ", ".join(("compress(model, batches", *(f"{name}={x!r}" for name, x in told.items()))) + ")"


def headline(rows: list[dict[str, Any]]) -> str:
    """Bytes and perplexity of the default, in numbers of 16 bits."""
    row = rows[1]
    held, dense = row["half_bytes_per_token"], row["dense_half_bytes_per_token"]
    return (
        f"{held:,} bytes a token where a dense 16-bit cache holds {dense:,}: perplexity {row['perplexity']:.2f}, "
        f"dense {rows[0]['perplexity']:.2f}."
    )


def plot(results: dict[str, Any], path: Path) -> None:
    """Bytes the cache holds against context length."""
    figure, axis = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    for row in results["rows"]:
        lengths = [int(n) for n in row["cache_bytes"]]
        mebibytes = [n / 2**20 for n in row["cache_bytes"].values()]
        label = f"{row['name']}, keep {row['keep']:.3f} (perplexity {row['perplexity']:.2f})"
        axis.plot(lengths, mebibytes, marker="o", label=label)
    axis.set(xlabel="context, tokens", ylabel="cache held, MiB", xlim=0, ylim=0)
    axis.set_title(f"{results['model']}, {results['dtype']}: bytes of the cache's tensors", fontsize="medium")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
