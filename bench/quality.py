"""Perplexity against keep on real models, attending on latents: the published methods, their parts, and the rank rules.

python -m bench.quality [--model smollm2 ...] [--keep 0.5 ...] [--method recalkv ...] [--again] [--plot-only]

A cell is one model at one keep with one method and rank rule. Cells are kept in the JSON by their settings and measured
once, so the table can be built piece by piece; --again measures the chosen ones anew.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

import lrattn
from bench import models, report, texts
from lrattn.integrations.transformers import latent_attention
from lrattn.integrations.transformers.load import read_windows
from lrattn.integrations.transformers.perplexity import perplexity
from lrattn.summary import summarize

PATH = report.RESULTS / "quality.json"
LENGTH = 1024
PUBLISHED = (("svd", "uniform"), ("palu", "fisher"), ("recalkv", "fisher"))
ABLATION = (("recalkv-neither", "fisher"), ("recalkv-hsr", "fisher"), ("recalkv-ovc", "fisher"), ("recalkv", "fisher"))
RULES = (("palu", "uniform"), ("palu", "fisher"), ("palu", "spectrum"), ("recalkv-hsr", "spectrum"))


@dataclass(frozen=True)
class Plan:
    """What is measured on a model: windows of 1024 tokens, and the kept shares."""

    name: str
    load: Callable[[], Any]
    calibrate: int
    evaluate: int
    keeps: tuple[float, ...]
    group_size: int = 4
    choices: tuple[tuple[str, str], ...] = tuple(dict.fromkeys(PUBLISHED + ABLATION + RULES))


PLANS = {
    "smollm2": Plan("SmolLM2-135M-Instruct, 3 kv heads", models.smollm2, 16, 16, (0.7, 0.5, 0.4, 0.3)),
    "qwen2.5-coder": Plan(
        "Qwen2.5-Coder-0.5B-Instruct, 2 kv heads, biases",
        models.qwen25_coder,
        12,
        8,
        (0.5, 0.3),
        choices=(*PUBLISHED, ("recalkv-neither", "fisher"), ("palu", "spectrum"), ("recalkv-hsr", "spectrum")),
    ),
    "smollm2-mha": Plan(
        "SmolLM2 as 9 shuffled kv heads, groups of 3",
        models.smollm2_mha,
        16,
        8,
        (0.3, 0.2),
        3,
        tuple(
            dict.fromkeys((("palu", "fisher"), *ABLATION, ("recalkv-greedy", "fisher"), ("recalkv-hsr", "spectrum")))
        ),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--keep", type=float, nargs="+", help="only these of the plan")
    parser.add_argument("--method", nargs="+", choices=lrattn.methods.METHODS, help="only these of the plan")
    parser.add_argument("--again", action="store_true", help="measure cells anew")
    parser.add_argument("--plot-only", action="store_true")
    args = parser.parse_args()
    if not args.plot_only:
        for name in args.model:
            measure(name, args)
    results = json.loads(PATH.read_text())
    print("\n\n".join(table(results, name) for name in PLANS if any(c["model"] == name for c in results["cells"])))
    plot(results, PATH.with_suffix(".png"))


def cells(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Settings of the cells asked for; the dense model first."""
    plan = PLANS[name]
    common = {
        "model": name,
        "text": texts.ABOUT,
        "length": LENGTH,
        "calibrate": plan.calibrate,
        "evaluate": plan.evaluate,
        "group_size": plan.group_size,
    }
    yield {**common, "method": "dense", "ranks": "", "keep": 1.0}
    for keep in plan.keeps:
        for method, ranks in plan.choices:
            if (not args.keep or keep in args.keep) and (not args.method or method in args.method):
                yield {**common, "method": method, "ranks": ranks, "keep": keep}


def measure(name: str, args: argparse.Namespace) -> None:
    """Measures the cells that are not there yet, and saves after each."""
    held = json.loads(PATH.read_text())["cells"] if PATH.is_file() else []
    wanted = list(cells(name, args))
    keys = {key(c) for c in wanted}
    if args.again:
        held = [c for c in held if key(c) not in keys]
    missing = [c for c in wanted if key(c) not in {key(c) for c in held}]
    if not missing:
        return
    plan, commit = PLANS[name], report.commit()  # of the code that is loaded, however long this runs
    torch.manual_seed(0)
    model, tokenizer = plan.load()
    calibration = read_windows(tokenizer, texts.wikipedia("calibration"), LENGTH, plan.calibrate).split(1)
    evaluation = read_windows(tokenizer, texts.wikipedia("evaluation"), LENGTH, plan.evaluate)
    state = models.CACHE / f"{name}-{plan.calibrate}x{LENGTH}.moments"
    moments = lrattn.calibrate(model, calibration, gather=["fisher"], state=state)
    for n, settings in enumerate(missing, 1):
        label = "{method} {ranks} {keep}".format(**settings)
        print(f"{name}: cell {n} of {len(missing)}, {label}", flush=True)
        measured = run(model, calibration, evaluation, moments, settings, label, held)
        held.append({**settings, **measured, "commit": commit})
        report.save(PATH, {"cells": held})


def run(
    model: Any,
    calibration: Any,
    evaluation: torch.Tensor,
    moments: lrattn.Moments,
    settings: dict[str, Any],
    label: str,
    held: list[dict[str, Any]],
) -> dict[str, Any]:
    begin = time.perf_counter()
    if settings["method"] == "dense":
        return {"perplexity": perplexity(model, evaluation, label)}
    chosen = {name: settings[name] for name in ("method", "keep", "group_size", "ranks")}
    factors = lrattn.compress(model, calibration, **chosen, moments=moments, progress=False)
    seconds = time.perf_counter() - begin
    digest = digest_of(factors)
    same = [c for c in held if c["model"] == settings["model"] and c.get("factors") == digest]
    if same:  # the same factors under another name: with one key group HSR has nothing to do
        value = same[0]["perplexity"]
    else:
        with latent_attention(model, factors):
            value = perplexity(model, evaluation, label)
    summary = summarize(factors)
    return {
        "perplexity": value,
        "achieved_keep": factors.keep,
        "key_share": summary["key_share"],
        "key_groups": len(factors.layers[0].keys.ranks),
        "factors": digest,
        "compress_seconds": seconds,
    }


def key(cell: dict[str, Any]) -> str:
    names = ("model", "text", "length", "calibrate", "evaluate", "group_size", "method", "ranks", "keep")
    return json.dumps([cell[name] for name in names])


def digest_of(factors: lrattn.Factors) -> str:
    digest = hashlib.sha256()
    for layer in factors.layers:
        for side in (layer.keys, layer.values):
            digest.update(repr((side.ranks, side.head_order)).encode())
            for x in (side.up, side.down):
                digest.update(x.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


def dense_of(results: dict[str, Any], name: str) -> float:
    return next(c["perplexity"] for c in results["cells"] if c["model"] == name and c["method"] == "dense")


def found(results: dict[str, Any], name: str, method: str, ranks: str, keep: float) -> dict[str, Any] | None:
    wanted = {"model": name, "method": method, "ranks": ranks, "keep": keep}
    return next((c for c in results["cells"] if wanted.items() <= c.items()), None)


def table(results: dict[str, Any], name: str) -> str:
    """Perplexity by method and keep, and which rows are the same factors."""
    plan, dense = PLANS[name], dense_of(results, name)
    head = f"{'method':<17} {'ranks':<9}" + "".join(f"{f'keep {keep}':>12}" for keep in plan.keeps)
    lines = [f"{plan.name}: dense {dense:.2f}, {plan.evaluate} windows of {LENGTH} tokens", "", head]
    for method, ranks in plan.choices:
        row = [found(results, name, method, ranks, keep) for keep in plan.keeps]
        if any(row):
            numbers = "".join(f"{c['perplexity']:>12.2f}" if c else f"{'-':>12}" for c in row)
            alone = all(c is None or c["key_groups"] == 1 for c in row)
            note = "   one key group: HSR changes nothing" if alone and method in ("recalkv-hsr", "recalkv") else ""
            lines.append(f"{method:<17} {ranks:<9}{numbers}{note}")
    return "\n".join(lines)


def curves(results: dict[str, Any], plan: Plan, name: str) -> Iterator[tuple[tuple[str, str], str, list[Any]]]:
    """A method and its rank rule, all methods that made the same factors, and its points (keep, perplexity).

    svd is left out: it is off the scale by orders of magnitude. It is in the table.
    """
    same: dict[Any, list[tuple[str, str]]] = {}
    for method, ranks in plan.choices:
        row = [c for keep in plan.keeps if (c := found(results, name, method, ranks, keep))]
        if row and method != "svd":
            same.setdefault(tuple((c["keep"], c["factors"], c["perplexity"]) for c in row), []).append((method, ranks))
    for points, choices in same.items():
        yield choices[0], " = ".join(method for method, _ in choices), [(keep, p) for keep, _, p in points]


def plot(results: dict[str, Any], path: Path) -> None:
    """Loss over the dense model, in nats a token, against keep: one panel a model."""
    names = [name for name in PLANS if any(c["model"] == name for c in results["cells"])]
    figure, axes = plt.subplots(1, len(names), figsize=(5.2 * len(names), 4.4), layout="constrained", squeeze=False)
    for axis, name in zip(axes[0], names, strict=True):
        plan, dense = PLANS[name], dense_of(results, name)
        for n, ((_, ranks), together, points) in enumerate(curves(results, plan, name)):
            style = {"spectrum": "-", "fisher": "--", "uniform": ":"}[ranks]
            excess = [math.log(p / dense) for _, p in points]
            axis.plot(
                [k for k, _ in points], excess, style, marker="osv^D<>PX"[n % 9], label=f"{together}, {ranks} ranks"
            )
        axis.set(xlabel="keep: bytes of the latent cache / dense", ylim=0, xticks=plan.keeps)
        axis.set_title(f"{plan.name}\ndense perplexity {dense:.2f}", fontsize="medium")
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    axes[0][0].set_ylabel("loss over the dense model, nats a token")
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
