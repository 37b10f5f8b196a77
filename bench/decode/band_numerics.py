"""Errors of scores by a band, beside those of an engine's own rounding: computed in float64 on a CPU, by no kernel.

    python -m bench.decode.band_numerics

Latents of rank 160, a basis and a query, all numbers of bfloat16, make the scores of a block of 256 tokens against one
head of 128 dims. True scores are of exact angles and unrounded keys. Errors are root mean squares over the block, in
nats, and means of six seeds. All is float64 but for these roundings to bfloat16:

    engine   of keys, and of keys turned by float32 products of position and frequency
    rebuilt  of keys turned by their place in the tile, and of the query turned back by the tile: the kernels there are
    fma      of the slow pairs' absorbed queries, before the basis and after it; of fast pairs nothing
    rows     the same, and of the fast pairs' keys and query, as in rebuilt
    band     of nothing: the band alone, its functions in float16

fma and rows are ways that a kernel may take. results/band_numerics.json holds the errors, and the largest share of the
band's bound that its own error takes; the exit status is 1 if fma or rows err more than MOST times what the engine
does, or the band more than its bound.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from bench.support import report
from lrattn import Rope
from lrattn.factors.band import BLOCK, Band

PATH = report.RESULTS / "band_numerics.json"
HEAD_DIM, RANK, TILE, SEEDS = 128, 160, 64, 6
SCALE = HEAD_DIM**-0.5
NORM = 3.0  # root mean square of a query
WAYS = ("engine", "rebuilt", "fma", "rows", "band")
MOST = 1.25
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"original_max_position_embeddings": 32768}
ROPES = {  # pairs adjacent, as kernels have them
    "1e4": Rope(1e4, HEAD_DIM, 131072, interleaved=True),
    "5e5, llama3": Rope(5e5, HEAD_DIM, 131072, {"rope_type": "llama3", "factor": 8.0, **LLAMA3}, interleaved=True),
    "1e6": Rope(1e6, HEAD_DIM, 131072, interleaved=True),
    "1e6, yarn 4": Rope(1e6, HEAD_DIM, 131072, {"rope_type": "yarn", "factor": 4.0, **YARN}, interleaved=True),
}
KINDS = {
    "Gaussian": "keys and query",
    "aligned": "the query is a rotated key of the block",
    "slow": "the last 24 dims of keys ten times as large, and the query's as large as they",
    "edge": "the same of the first 8 dims of slow pairs",
    "constant": "one latent is 12 in every token, and the query's dims are as large as the keys' over the block",
}
POSITIONS = {32768: tuple(KINDS), 1_000_000: ("Gaussian", "aligned")}


class Row(NamedTuple):
    rope: str
    position: int  # in the block
    kind: str


ROWS = tuple(Row(rope, at, kind) for rope in ROPES for at, kinds in POSITIONS.items() for kind in kinds)


def band_of(rope: Rope) -> Band:
    band = rope.band(HEAD_DIM, torch.bfloat16)
    assert not isinstance(band, str), band
    return band


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().double()


def turned(rope: Rope, x: Tensor, positions: Tensor) -> Tensor:
    """x [n, D] turned by the rope's angles and multiplied by its attention factor, in float64."""
    frequencies, factor = rope.frequencies()
    angles = (positions.to(frequencies.dtype)[:, None] * frequencies).double()
    return rope.turned(x[:, None], torch.polar(torch.full_like(angles, factor), angles)[:, None])[:, 0]


def problem(row: Row, seed: int) -> tuple[Tensor, Tensor, Tensor, int]:
    """Latents [BLOCK, R], basis [R, D], query [D], all numbers of bfloat16, and the block's first position."""
    g, rope, first = torch.Generator().manual_seed(seed), ROPES[row.rope], row.position // BLOCK * BLOCK
    latents, basis, query = (
        torch.randn(*shape, generator=g, dtype=torch.float64)
        for shape in ((BLOCK, RANK), (RANK, HEAD_DIM), (HEAD_DIM,))
    )
    fast = band_of(rope).fast
    basis[:, {"slow": slice(-24, None), "edge": slice(fast, fast + 8)}.get(row.kind, slice(0))] *= 10
    if row.kind == "constant":
        latents[:, 0] = 12
    latents, basis = rounded(latents), rounded(basis * RANK**-0.5)
    keys = turned(rope, latents @ basis, first + torch.arange(BLOCK))
    if row.kind == "aligned":
        query = keys[int(torch.randint(BLOCK, (), generator=g))]
    elif row.kind != "Gaussian":
        query = query * keys.std(0)
    return latents, basis, rounded(query * NORM / query.square().mean().sqrt()), first


def errors(row: Row, seed: int) -> dict[str, float]:
    """Of each way, the score's own root mean square, and the largest share of the bound that the band's error takes."""
    rope, (latents, basis, query, first) = ROPES[row.rope], problem(row, seed)
    keys, place, factor, band = latents @ basis, torch.arange(BLOCK), rope.frequencies()[1], band_of(rope)
    engine = turned(replace(rope, fp32_angles=True), rounded(keys), first + place)
    tiled = turned(rope, keys, place % TILE) / factor
    queries = turned(rope, query.expand(BLOCK, -1), -(first + place // TILE * TILE))
    turned_back = turned(rope, query[None], torch.tensor([-first]))
    w = absorbed(band, turned_back[0])
    fast, phi = slice(band.fast), band.functions.double()
    slow = (phi * (latents @ rounded(rounded(w) @ basis.T).T)).sum(1)
    unrounded = (tiled * queries)[:, fast].sum(1)
    true = turned(rope, keys, first + place) @ query * SCALE
    scores = {
        "engine": rounded(engine) @ query,
        "rebuilt": (rounded(tiled) * rounded(queries)).sum(1),
        "fma": unrounded + slow,
        "rows": (rounded(tiled) * rounded(queries))[:, fast].sum(1) + slow,
        "band": unrounded + (phi * (keys @ w.T)).sum(1),
    }
    missed = {way: score * SCALE - true for way, score in scores.items()}
    norms = keys.unflatten(1, (-1, 2)).norm(dim=2) * query.unflatten(0, (-1, 2)).norm(dim=1)
    bound = band.error * SCALE * factor * norms[:, band.fast // 2 :].sum(1)
    found = {way: x.square().mean().sqrt() for way, x in missed.items()}
    found |= {"score": true.square().mean().sqrt(), "of_bound": (missed["band"].abs() / bound).max()}
    return {name: float(x) for name, x in found.items()}


def absorbed(band: Band, x: Tensor) -> Tensor:
    """w [T, D] of a query [D] turned back by the block's first position, pairs adjacent."""
    (low, high), (a, b) = x.view(-1, 2).T, band.coefficients.double()
    return torch.stack((a * low + b * high, a * high - b * low), -1).flatten(1)


def computed(row: Row) -> dict[str, Any]:
    found, band = [errors(row, seed) for seed in range(SEEDS)], band_of(ROPES[row.rope])
    means = {name: fmean(x[name] for x in found) for name in (*WAYS, "score")}
    own = {"fast": band.fast, "terms": band.terms, "error": band.error}
    return row._asdict() | own | means | {"of_bound": max(x["of_bound"] for x in found)}


def faults(results: dict[str, Any]) -> list[str]:
    """What errs more than it may."""
    told = []
    for r in results["rows"]:
        where = f"{r['rope']} at {r['position']}, {r['kind']}"
        told += [f"{where}: {way} {r[way]:.1e}" for way in ("fma", "rows") if r[way] > MOST * r["engine"]]
        told += [f"{where}: {r['of_bound']:.2f} of the bound"] if r["of_bound"] > 1 else []
    return told


def table(results: dict[str, Any]) -> str:
    """Errors in nats [computed], the score's root mean square, and what the band's largest is of its bound."""
    line = "{:12} {:>3} {:>2} {:>8} {:>8} {:>8}" + " {:>8}" * len(WAYS) + " {:>6} {:>8}"
    lines = [line.format("rope", "F", "T", "error", "position", "kind", *WAYS, "score", "of bound")]
    for r in results["rows"]:
        own = r["rope"], r["fast"], r["terms"], f"{r['error']:.1e}", r["position"], r["kind"]
        lines.append(line.format(*own, *(f"{r[way]:.1e}" for way in WAYS), f"{r['score']:.1f}", f"{r['of_bound']:.2f}"))
    return "\n".join(lines)


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = [computed(row) for row in tqdm(ROWS, desc="blocks of tokens", unit="row", disable=None)]
    results = {"kinds": KINDS, "seeds": SEEDS, "most": MOST, "rows": rows}
    report.save(PATH, results)
    print(table(results))
    for told in (found := faults(results)):
        print(f"TOO MUCH: {told}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
