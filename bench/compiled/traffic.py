"""Bytes that a decode step asks for, way by way, counted in Triton's interpreter: `make traffic`.

    python -m bench.compiled.traffic

One decode step over a sequence at realistic shapes, cut as for an H100. Each way's loads and stores are counted by
kernel and argument (counting.py) and go to results/traffic.json with a hash of the kernel sources. The numbers in the
caches are zeros: only addresses are looked at. Nothing is timed.
"""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from typing import Any, NamedTuple
from unittest.mock import patch

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch
from tqdm import tqdm

import lrattn
from bench.compiled.counting import counting
from bench.compiled.resources import PACKED, sources_hash
from bench.decode.decode_shapes import packing
from bench.decode.ways import two_passes
from bench.support import report
from lrattn.kernels import launch

PATH = report.RESULTS / "traffic.json"
HEADS, HEAD_DIM, GROUP, PAGE, TOKENS = 8, 128, 4, 16, 4096  # kv heads and tokens that are run; heads a group
PROCESSORS = 132  # of an H100
DTYPE = torch.float16

# What the arguments of the kernels hold; what is not named is small: tables, lengths, results.
CONTENTS = {
    "latents": ("ck", "cv"),
    "bases": ("uk", "uv"),
    "queries": ("q", "x", "a", "constant", "terms"),
    "turns": ("turns", "offset_turns", "positions", "functions", "coefficients"),
    "scores": ("s",),
    "partial": ("y", "lse", "part_lse"),
}
REST, ALL = "rest", "all"


class Shape(NamedTuple):
    """A model's attention. share: of a layer that is run, on as large a share of the multiprocessors."""

    name: str
    query_heads: int  # M, of a kv head
    share: int = 1
    theta: float = 1e4  # a band of float16 then has as many terms as the model's of bfloat16


LLAMA_2 = Shape("Llama-2-7B, a quarter", 1, 4, 5e5)
LLAMA_3 = Shape("Llama-3.1-8B", 4, 1, 5e6)


class Way(NamedTuple):
    """A way to run a call, the ranks of its groups, and how many passes it takes. forced: two where one would do."""

    shape: Shape
    name: str
    key_rank: int
    value_ranks: tuple[int, ...]
    passes: int = 2
    rope: bool = True
    chunk: int | None = None
    shared: bool = False
    positions: bool = False
    forced: bool = False
    group: int = GROUP
    bits: tuple[int, ...] = ()  # of packed latents: a quarter, a quarter and half of them


WAYS = [
    Way(LLAMA_2, "band", 256, (256, 256), 1),
    Way(LLAMA_2, "band", 128, (128, 128), 1),
    Way(LLAMA_2, "riding row", 256, (384, 384), shared=True),
    Way(LLAMA_2, "joint row", 256, (256, 256), shared=True),
    Way(LLAMA_2, "absorbed", 256, (256, 256), 1, rope=False),
    Way(LLAMA_2, "absorbed", 128, (128, 128), 1, rope=False),
    Way(LLAMA_3, "band", 256, (256, 256), 1),
    Way(LLAMA_3, "band", 256, (256, 256), forced=True),
    Way(LLAMA_3, "band", 128, (128, 128), 1),
    Way(LLAMA_3, "rebuilt, positions", 256, (256, 256), positions=True),
    Way(LLAMA_3, "band, joint values", 256, (512,)),
    Way(LLAMA_3, "rebuilt, no groups", 64, (64,) * 8, 1, group=1),
    Way(LLAMA_3, "rebuilt, no groups", 64, (64,) * 8, group=1, forced=True),
    Way(LLAMA_3, "joint row", 256, (256, 256), shared=True),
    Way(LLAMA_3, "absorbed", 256, (256, 256), 1, rope=False),
    Way(LLAMA_3, "absorbed", 256, (256, 256), rope=False, forced=True),
    Way(LLAMA_3, "absorbed", 128, (128, 128), 1, rope=False),
    Way(LLAMA_3, "joint row, absorbed", 256, (256, 256), 1, rope=False, shared=True),
    Way(LLAMA_3, "joint row, absorbed", 512, (512, 512), 1, rope=False, shared=True),
    Way(LLAMA_3, "chunks", 256, (256, 256), 1, chunk=512),
    Way(LLAMA_3, "chunks", 256, (256, 256), chunk=512, forced=True),
    Way(LLAMA_3, "joint row, chunks", 512, (512, 512), 1, chunk=512, shared=True),
    Way(LLAMA_2, "chunks", 256, (256, 256), 1, chunk=512),
    Way(LLAMA_2, "packed, band", 256, (256, 256), bits=PACKED),
    Way(LLAMA_3, "packed, band", 256, (256, 256), bits=PACKED),
    Way(LLAMA_3, "packed, joint row", 256, (256, 256), shared=True, bits=PACKED),
    Way(LLAMA_3, "packed, absorbed", 256, (256, 256), 1, rope=False, bits=PACKED),
    Way(LLAMA_3, "packed, chunks", 256, (256, 256), 1, chunk=512, bits=PACKED),
    Way(LLAMA_3, "packed, joint, chunks", 256, (256, 256), 1, chunk=512, shared=True, bits=PACKED),
    Way(LLAMA_3, "packed, joint, abs.", 256, (256, 256), 1, rope=False, shared=True, bits=PACKED),
]


def layer_of(way: Way) -> lrattn.LayerFactors:
    def side(ranks: tuple[int, ...], written: bool = True) -> lrattn.Projection:
        formats = tuple(packing(rank, way.bits) for rank in ranks) if way.bits and written else None
        return lrattn.Projection(torch.zeros(HEADS, max(ranks), HEAD_DIM, dtype=DTYPE), ranks, format=formats)

    return lrattn.LayerFactors(
        keys=side((way.key_rank,) * (HEADS // way.group), not way.shared),
        values=side(way.value_ranks),
        rope=lrattn.Rope(way.shape.theta, HEAD_DIM, TOKENS) if way.rope else None,
        shared=way.shared,
        chunk=way.chunk,
    )


def measure(way: Way) -> dict[str, Any]:
    """Bytes by kernel and argument of one decode step, and of the latents it attends on."""
    layer, pages = layer_of(way), TOKENS // PAGE
    k_cache, v_cache = (None if cache is None else cache.zero_() for cache in lrattn.allocate_cache(layer, pages, PAGE))
    assert k_cache is not None
    table = torch.randperm(pages, generator=torch.Generator().manual_seed(0)).int()
    positions = torch.arange(TOKENS, dtype=torch.int32).view(pages, PAGE)[table.argsort()] if way.positions else None
    forced = two_passes() if way.forced else nullcontext()
    with counting() as seen, forced, patch.object(launch, "processors", lambda _: PROCESSORS // way.shape.share):
        lrattn.decode_attention(
            torch.zeros(1, HEADS * way.shape.query_heads, HEAD_DIM, dtype=DTYPE),
            k_cache,
            v_cache,
            layer,
            block_table=table[None],
            seq_lens=torch.tensor([TOKENS], dtype=torch.int32),
            positions=positions,
            backend="triton",
        )
    passes = 2 if any(part["argument"] == "s" for part in seen.rows()) else 1  # scores go to memory between two
    if passes != way.passes:
        raise RuntimeError(f"{way.name}: expected {way.passes} passes, got {passes}")
    return {
        "shape": way.shape.name,
        "way": way.name,
        "passes": passes,
        "shared": way.shared,
        "ranks": [way.key_rank, max(way.value_ranks)],
        "tokens": TOKENS,
        "latent_bytes": sum(cache.nbytes for cache in (k_cache, v_cache) if cache is not None),
        "dense_bytes": 2 * TOKENS * HEADS * HEAD_DIM * DTYPE.itemsize,
        "traffic": seen.rows(),
    }


def shares(row: dict[str, Any], count: str) -> dict[str, float]:
    """Bytes by what they hold, over the latents' own. count: "requested" or "unique"."""
    held = dict.fromkeys((*CONTENTS, REST), 0)
    for part in row["traffic"]:
        held[next((n for n, names in CONTENTS.items() if part["argument"] in names), REST)] += part[count]
    return {n: nbytes / row["latent_bytes"] for n, nbytes in {**held, ALL: sum(held.values())}.items()}


def table(results: dict[str, Any]) -> str:
    """Way by way: bytes over the latents' own, requested (u: unique, as sectors) and what a dense cache holds."""
    line = "{:21} {:20} {:>6} {:>7}  {:1}" + " {:>7}" * (len(CONTENTS) + 2) + " {:>5}"
    lines = [line.format("shape", "way", "passes", "ranks", "", *CONTENTS, REST, ALL, "dense")]
    for row in results["rows"]:
        names = (row["shape"], row["way"], row["passes"], "{}/{}".format(*row["ranks"]))
        dense = f"{row['dense_bytes'] / row['latent_bytes']:.2f}"
        cells = [[f"{share:.2f}" for share in shares(row, count).values()] for count in ("requested", "unique")]
        lines += [line.format(*names, "r", *cells[0], dense), line.format("", "", "", "", "u", *cells[1], "").rstrip()]
    return "\n".join(lines)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = {"sources": sources_hash(), "rows": [measure(way) for way in tqdm(WAYS, unit="way", disable=None)]}
    report.save(PATH, results)
    print(table(results))


if __name__ == "__main__":
    main()
