"""What a prefix hit costs beside a dense window: loss of the tokens behind it, by how much of the hit is computed anew.

python -m bench.evaluation.prefix_hits [--passages 12] [--table-only]

vLLM's pages hold the latents of a hit's tokens, and not the exact keys and values of its last ones. Here a passage is
read as `lrattn.integrations.vllm` has it: its first tokens come from a store, the last `replay` of the hit come again,
a window at a time, without changing their latents. SmolLM2, the default factors, 512 tokens of a hit, then 64 more.
"""

from __future__ import annotations

import argparse
import json
import sys
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import lrattn
from bench.support import models, report, texts
from lrattn.integrations.transformers import LatentCache
from lrattn.integrations.transformers.load import read_windows
from lrattn.models.interface import cache_argument

PATH = report.RESULTS / "prefix_hits.json"
HIT, NEXT = 512, 64  # tokens
REPLAYS = (0, 32, 64, 128, 256)
WAYS = ["none was hit", *(f"replay {n}" for n in REPLAYS), "replay 128, first tokens by latents"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=12)
    parser.add_argument("--table-only", action="store_true")
    args = parser.parse_args()
    if not args.table_only:
        report.save(PATH, measured(args.passages))
    results = json.loads(PATH.read_text())
    print(table(results))
    costs = {row["way"]: row["nats"] for row in results["rows"]}
    return 0 if costs["replay 64"] < costs["replay 0"] else 1


@torch.no_grad()
def measured(passages: int) -> dict[str, Any]:
    model, tokenizer = models.smollm2()
    calibration = read_windows(tokenizer, texts.wikipedia("calibration"), 1024, 8)
    factors = lrattn.compress(model, calibration.split(1))
    texts_read = read_windows(tokenizer, texts.wikipedia("evaluation"), HIT + NEXT, passages)
    dense = fmean(lost(model, ids, None) for ids in tqdm(texts_read, desc="dense", unit="passage"))
    model.set_attn_implementation("lrattn")
    rows = []
    for way in WAYS:
        found = [lost(model, ids, held(model, factors, ids, way)) for ids in tqdm(texts_read, desc=way, unit="passage")]
        rows.append({"way": way, "nats": fmean(found)})
    about = {"model": "SmolLM2-135M-Instruct", "dtype": "float32", "text": texts.ABOUT, "near": list(factors.near)}
    return about | {"hit": HIT, "next": NEXT, "passages": passages, "dense": dense, "rows": rows}


def lost(model: nn.Module, ids: Tensor, cache: Any) -> float:
    """Nats a token of those behind the hit; cache: holds the hit, but for its last token. None: dense, of all."""
    given = ids[None] if cache is None else ids[None, HIT - 1 :]
    more = {"use_cache": False} if cache is None else {**cache_argument(cache), "use_cache": True}
    logits = model(given, **more).logits[0, -NEXT - 1 : -1]
    return nn.functional.cross_entropy(logits.float(), ids[-NEXT:]).item()


def held(model: nn.Module, factors: lrattn.Factors, ids: Tensor, way: str) -> LatentCache:
    """A cache of all of the hit but its last token, which asks for what follows."""
    cache, (recent, sinks), end = LatentCache(factors), factors.near, HIT - 1

    def read(a: int, b: int) -> None:
        model(ids[None, a:b], **cache_argument(cache), use_cache=True, logits_to_keep=1)

    if way == "none was hit":
        read(0, end)
        return cache
    begin = end - int(way.split()[1].rstrip(","))
    read(0, end + recent)  # what is cropped is held no longer, and comes back from latents
    kept = [[x.clone() for x in layer.pages if x is not None] for layer in cache.layers]
    cache.crop(begin - end - recent)
    if way.endswith("latents"):
        for layer in cache.layers:
            k, v = layer._rebuilt(0, sinks)
            layer.window.keys[:, :sinks], layer.window.values[:, :sinks] = k.transpose(1, 2), v.transpose(1, 2)
    for a in range(begin, end, recent):
        read(a, min(a + recent, end))
        for layer, pages in zip(cache.layers, kept, strict=True):
            for x, old in zip((x for x in layer.pages if x is not None), pages, strict=True):
                x.copy_(old)
    return cache


def table(results: dict[str, Any]) -> str:
    """Over the loss where none was hit, nats a token."""
    rows, (recent, sinks) = results["rows"], results["near"]
    lines = [
        f"{results['model']} in {results['dtype']}, an eighth, a window of {recent} recent and {sinks} first tokens:",
        f"the {results['next']} tokens behind a hit of {results['hit']}, {results['passages']} passages; dense "
        f"{results['dense']:.4f} nats a token",
        "",
        f"{'':38} nats a token  added",
    ]
    lines += [f"{row['way']:38} {row['nats']:12.4f} {row['nats'] - rows[0]['nats']:+.4f}" for row in rows]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
