"""How small a cache can be before it stops reading far: bits, rows of several layers, tokens left out, salient tokens.

python -m bench.combinations [--row NAME ...] [--model smollm2] [--plot-only] [--out bench/results/combinations.json]

A row is a family, a way to hold less, at a share of the dense cache's bytes. Of every row:

    loss    of 256 tokens after prompts of 1,024 to 7,680 tokens of a window of Wikipedia, and after 4,096 of news, over
            the dense model's of the same tokens, in nats a token
    gain    as evaluation/probe.py, up to 4,096 tokens far: how much better a passage is predicted that stood so many
            tokens earlier. far: over all distances, as a share of the dense model's
    bytes   of the cache's tensors after 4,096 tokens over a dense cache's, dense window included
    read    what a layer reads of the latents of a token over what it would of a dense cache: rows of several layers are
            read by each. time: a dense cache's decode step over this one's on an H100, batch 16, 32K tokens
            [estimated], where `lrattn info --plan` knows of it

Prompts are read once, by the model as it is, and every cache is filled with the keys and values of that, 16-bit
numbers, but for the last 64 tokens, whose queries policies look at. A query sees its last 64 tokens exactly, where a
cache has a dense window: what several layers share is scored in passes of 64. Published systems are those of
evaluation/published.py. Factors are calibrated on 24 windows of 1,024 tokens of Wikipedia, of other models than SmolLM2
on 6. Cells are kept in the JSON by row and model and measured once; several processes may do so.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm import tqdm

import lrattn
from bench.evaluation import probe, published
from bench.evaluation.published import Prompt, watched
from bench.evaluation.quality_plan import LENGTH, PLANS
from bench.evaluation.reader import Reader
from bench.quality import PAGE, held_in, updated
from bench.selection import nbytes
from bench.support import models, report, texts
from lrattn import Factors, Selection
from lrattn.attention.outlook import outlook
from lrattn.compression.substitute import substituted
from lrattn.integrations.transformers import LatentCache
from lrattn.integrations.transformers.load import read_windows
from lrattn.models.interface import attention_set
from lrattn.models.layers import attention_layers
from lrattn.models.masks import Said
from lrattn.models.states import evaluating

PATH = report.RESULTS / "combinations.json"
DOCS = PAGE.with_name("methods.md")
PROMPTS = (1024, 2048, 4096, 7680)
SECOND = (4096,)  # of other texts than the first
SCORED, STEP, LAST = 256, 64, 64  # tokens scored, of a pass of rows of several layers, and at the end of a prompt
DISTANCES = (128, 512, 1024, 2048, 4096)
CALIBRATED = {"smollm2": 24, "qwen2.5-coder": 6}
FULL = "smollm2"  # the model of all rows
FIRST = "wikipedia"
DENSE = "dense"
SALIENT = 0.2  # share of tokens with twice the bytes of their kind

Cell = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """keep: bytes of a token over a dense cache's. more: of lrattn.compress. select: which tokens are kept. published:
    of evaluation/published.py, with its arguments. windows: of the calibration, where not those of the model."""

    family: str
    keep: float
    more: dict[str, Any] = field(default_factory=dict)
    select: str | None = None
    published: tuple[Any, ...] = ()
    windows: int | None = None

    @property
    def name(self) -> str:
        if self.family == DENSE:
            return DENSE
        share = f"1/{1 / self.keep:.0f}" if self.keep < 0.2 else f"{self.keep:g}"
        return f"{self.family}, {share}"


ROW, APART = {"shared": True}, {"shared": False}
FOUR, EIGHT = ROW | {"span": 4}, ROW | {"span": 8}
REBUILT = {"method": "lrattn-rebuilt", "shared": True}

ROWS = [
    Row(DENSE, 1.0, published=("dense",)),
    *(Row("bits: keys and values apart", keep, APART) for keep in (1 / 8, 1 / 16)),
    *(Row("bits: one row", keep, ROW) for keep in (1 / 8, 1 / 16, 1 / 32)),
    *(Row("rows of 4 layers x bits", keep, FOUR) for keep in (1 / 16, 1 / 32)),
    Row("rows of 8 layers x bits", 1 / 32, EIGHT),
    Row("rows of 8 layers x bits, chunks of 128", 1 / 32, EIGHT | {"chunk": 128}),
    Row("rows of 8 layers x bits, 72 windows", 1 / 32, EIGHT, windows=72),
    Row("rows of 8 layers x bits, rebuilt", 1 / 32, REBUILT | {"span": 8}),
    *(Row("salient tokens x bits", keep, ROW | {"salient": SALIENT}) for keep in (1 / 8, 1 / 16, 1 / 32)),
    Row("salient x rows of 4 layers x bits", 1 / 16, FOUR | {"salient": SALIENT}),
    Row("salient x rows of 8 layers x bits", 1 / 32, EIGHT | {"salient": SALIENT}),
    *(
        Row("half of the tokens (curdkv) x bits", k, ROW | {"keep": 2 * k}, "curdkv:0.5")
        for k in (1 / 8, 1 / 16, 1 / 32)
    ),
    Row("zipcache", 0.25, published=("zipcache",)),
    *(Row("decoquant", keep, published=("decoquant", bits)) for keep, bits in ((0.33, 4), (0.2, 2))),
    *(Row("commonkv", keep, published=("commonkv", keep)) for keep in (0.5, 0.3)),
    *(Row("commonkv, in lrattn", keep, {"method": "commonkv"}) for keep in (0.5, 0.3)),
]
CURVES = {  # of the plot: families that a line stands for
    "rows of 4 or 8 layers, more bits for salient tokens": (
        "salient x rows of 4 layers x bits",
        "salient x rows of 8 layers x bits",
    ),
    "rows of 8 layers": ("rows of 8 layers x bits",),
    "rows of 4 layers": ("rows of 4 layers x bits",),
    "one row, more bits for salient tokens": ("salient tokens x bits",),
    "one row for keys and values": ("bits: one row",),
    "keys and values apart, the default": ("bits: keys and values apart",),
    "half of the tokens (curdkv), twice the bits": ("half of the tokens (curdkv) x bits",),
}
PUBLISHED = ("zipcache", "decoquant", "commonkv")
OTHER = ("dense", "bits: one row, 1/16", "rows of 4 layers x bits, 1/32")  # on other models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [row.name for row in ROWS]
    parser.add_argument("--row", nargs="+", choices=names, default=names, help="only these")
    parser.add_argument("--model", choices=CALIBRATED, default=FULL)
    parser.add_argument("--plot-only", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=PATH)
    args = parser.parse_args()
    if not args.plot_only:
        subject = Subject(args.model)
        for row in sorted(ROWS, key=lambda row: (args.row + names).index(row.name)):
            if row.name in args.row and (args.model == FULL or row.name in OTHER):
                subject.measure(row, args.out)
    cells = held_in(args.out)
    print(table(cells))
    plot(cells, args.out.with_suffix(".png"))
    if args.out == PATH:
        DOCS.write_text(pasted(DOCS.read_text(), cells))


class Subject(Reader):
    """A model, and texts as it reads them."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.name, (self.model, self.tokenizer) = name, PLANS[name].load()
        self.layers = attention_layers(self.model)
        self.folder = models.kept()
        self.lengths, pairs = (PROMPTS, probe.PAIRS) if name == FULL else (PROMPTS[:2], 1)
        whole = self.lengths[-1] + SCORED
        self.texts = {
            n: read_windows(self.tokenizer, read("evaluation"), whole, 1)[0] for n, read in texts.TEXTS.items()
        }
        needed = probe.SKIP + probe.BLOCK * pairs * (1 + 2 * len(DISTANCES))
        planted = read_windows(self.tokenizer, texts.wikipedia("evaluation"), needed, 1)[0]
        self.planted = probe.sequences(planted, DISTANCES, pairs)
        self.tail = 2 * len(DISTANCES) * probe.PASSAGE

    def factors(self, row: Row) -> Factors:
        count = row.windows or CALIBRATED[self.name]
        ids = read_windows(self.tokenizer, texts.wikipedia("calibration"), LENGTH, count)
        more = {"keep": row.keep} | row.more
        if more.get("method") == "commonkv":
            return lrattn.compress(self.model, **more)
        span, gather = more.get("span", 1), lrattn.methods.METHODS["lrattn"].gather
        state = self.folder / f"combinations-{self.name}-{span}-{count}.moments"
        moments = lrattn.calibrate(self.model, ids.split(1), gather=gather, far=(64, 4), state=state, span=span)
        factors = lrattn.compress(self.model, moments=moments, **more)
        return factors if row.select is None else replace(factors, select=Selection.of(row.select))

    def read(self, name: str, ids: Tensor) -> Prompt:
        """What attention was given of a text's tokens [t], in a pass of the model as it is; kept in a file."""
        path = self.folder / f"combinations-{self.name}-{name}.prompt"
        if not path.is_file():
            found: dict[int, list[Tensor]] = {}

            def take(i: int, *heads: Tensor) -> tuple[Tensor, Tensor]:
                found[i] = [x[0].half() for x in heads]
                return heads[1], heads[2]

            inputs: dict[int, Tensor] = {}
            with evaluating(self.model), watched(self.layers, inputs), substituted(self.model, self.layers, take):
                self.model(input_ids=ids[None], use_cache=False, logits_to_keep=1)
            given = [[*found[i], inputs[i].half()] for i in range(len(self.layers))]
            with models.written_once(path) as partial:
                torch.save(given, partial)
        return Prompt(*zip(*torch.load(path, mmap=True), strict=True))

    @torch.no_grad()
    def measure(self, row: Row, path: Path) -> None:
        named = {"row": row.name, "model": self.name}
        if any(named.items() <= cell.items() for cell in held_in(path)):
            return
        cell: Cell = named | {"family": row.family, "keep": row.keep, "commit": report.commit()}
        try:
            new, inside = self.caches(row, cell)
        except ValueError as error:
            cell["impossible"] = str(error)
        else:
            with evaluating(self.model), inside:
                self.losses(row, new, cell)
                self.probes(row, new, cell)
        with updated(path) as held:
            held.append(cell)

    def caches(self, row: Row, cell: Cell) -> tuple[Callable[[Prompt], Any], AbstractContextManager[object]]:
        """What makes the cache of a prompt, without its last tokens; and what it is used in."""
        if row.published:
            name, *more = row.published
            make = getattr(published, name)
            return lambda prompt: make(self.layers, self.model, prompt, *more), nullcontext()
        factors = self.factors(row)
        select, rest = factors.select, factors.rest
        cell["latents"] = factors.keep
        if select is None:
            cell["read"] = sum(x.bytes_per_token for x in factors.layers) / factors.dense_bytes_per_token
            heads = self.model.config.num_attention_heads
            cell["dense_over_it"] = outlook(factors.to(dtype=torch.bfloat16), heads, "h100", 32768, 16)["dense_over_it"]
        else:
            cell["latents"] = select.keep * factors.keep + (0 if rest is None else (1 - select.keep) * rest.keep)

        def latent(prompt: Prompt) -> LatentCache:
            cache = LatentCache(factors)
            for i, pair in enumerate(zip(prompt.keys, prompt.values, strict=True)):
                keys, _ = cache.update(*(x[None].float() for x in pair), i)
                own = keys.plain_keys, keys.plain_values
                keys.layer.write(own, None, Said(None), self.layers[i].module, few=False)
            cache.selection = select and replace(select, every=0)  # once, in the pass that comes
            return cache

        return latent, attention_set(self.model, "lrattn")

    def losses(self, row: Row, new: Callable[[Prompt], Any], cell: Cell) -> None:
        places = [(name, n) for name in self.texts for n in self.lengths if name == FIRST or n in SECOND]
        for name, n in tqdm(places, desc=row.name):
            ids = self.texts[name]
            cache = self.filled(new, self.read(name, ids), ids[:n], cell)
            lost, _ = self.scored(cache, ids[n - 1 : n + SCORED], step_of(cache))
            cell.setdefault("losses", {}).setdefault(str(n), {})[name] = round(lost.double().mean().item(), 6)

    def filled(self, new: Callable[[Prompt], Any], prompt: Prompt, ids: Tensor, cell: Cell) -> Any:
        """A cache that has read ids [n] but for the last one; its bytes over a dense one's go to the cell."""
        n = len(ids) - 1
        cache = new(prompt.first(n - LAST))
        self.passed(cache, ids[n - LAST : n])
        if isinstance(cache, LatentCache):
            cache.settle()
            held: float = nbytes(cache)
        else:
            held = published.nbytes(cache)
        cell.setdefault("held", {})[str(n + 1)] = round(held / (n * sum(4 * x.dense for x in self.layers)), 5)
        return cache

    def probes(self, row: Row, new: Callable[[Prompt], Any], cell: Cell) -> None:
        count, n = 2 * len(DISTANCES), self.planted.shape[1] - self.tail
        nll, right = (torch.empty(len(self.planted), count, probe.PASSAGE - 1) for _ in "ab")
        for s, ids in enumerate(tqdm(self.planted, desc=f"{row.name}, probe", unit="sequence")):
            cache = self.filled(new, self.read(f"probe{s}", ids), ids[:n], {})
            lost, hit = self.scored(cache, ids[n - 1 :], step_of(cache))
            nll[s], right[s] = (x.view(count, -1)[:, 1:] for x in (lost, hit))
        rows = probe.gains_of(nll, right, DISTANCES)
        cell["probe"] = [{key: round(x, 5) for key, x in found.items()} for found in rows]


def step_of(cache: Any) -> int | None:
    """Tokens of a pass that is scored; None: all."""
    return STEP if isinstance(cache, LatentCache) and cache.factors.span > 1 else None


def far(cell: Cell, dense: Cell) -> float:
    """Mean gain over all distances, as a share of the dense model's."""
    return fmean(p["gain"] for p in cell["probe"]) / fmean(p["gain"] for p in dense["probe"])


def excess(cell: Cell, dense: Cell, length: int) -> float:
    """Loss after a prompt over the dense model's, nats a token, over both texts."""
    own, other = (fmean(c["losses"][str(length)].values()) for c in (cell, dense))
    return own - other


def of_model(cells: Sequence[Cell], model: str) -> tuple[Cell | None, list[Cell]]:
    """The dense model's cell, and all of a model in the order of ROWS."""
    by_row = {cell["row"]: cell for cell in cells if cell["model"] == model}
    return by_row.get(DENSE), [by_row[row.name] for row in ROWS if row.name in by_row]


def table(cells: Sequence[Cell]) -> str:
    line = "{:<44} {:>6} {:>6}  {:>8} {:>8} {:>8} {:>8}  {:>5} {:>5} {:>5} {:>5} {:>5} {:>6}  {:>6} {:>5}"
    lines = [line.format("", "bytes", "at 4K", *["loss"] * 4, *["gain"] * 5, "far", "read", "time")]
    lines.append(line.format("", "", "", *map(str, PROMPTS), *map(str, DISTANCES), "", "", ""))
    for model in CALIBRATED:
        dense, rows = of_model(cells, model)
        if dense is None:
            continue
        if model != FULL:
            lines.append(model)
        for cell in rows:
            if "impossible" in cell:
                lines.append(f"{cell['row']:<44} {cell['impossible']}")
                continue
            lost = [
                f"{excess(cell, dense, n):+.4f}" if str(n) in cell["losses"] and cell is not dense else ""
                for n in PROMPTS
            ]
            gained = [f"{p['gain']:.2f}" for p in cell["probe"]]
            bytes_ = f"{cell['latents']:.4f}" if "latents" in cell else ""
            at = f"{cell['held']['4096']:.3f}" if "4096" in cell.get("held", {}) else ""
            read = f"{cell['read']:.3f}" if "read" in cell else "-"
            time = f"{cell['dense_over_it']:.1f}" if "dense_over_it" in cell else "-"
            lines.append(line.format(cell["row"], bytes_, at, *lost, *gained, f"{far(cell, dense):.1%}", read, time))
    return "\n".join(lines) if len(lines) > 2 else report.NONE


def pasted(page: str, cells: Sequence[Cell]) -> str:
    """The page with everything between its marks made anew: <!-- bench.combinations: NAME --> .. <!-- end -->."""
    return report.shown(page, "bench.combinations", table(cells), PATH, "far reading against bytes")


def plot(cells: Sequence[Cell], path: Path) -> None:
    """Far reading against the bytes of a token, a line a family."""
    dense, rows = of_model(cells, FULL)
    rows = [cell for cell in rows if "probe" in cell and cell is not dense]
    if dense is None or not rows:
        return
    figure, axis = plt.subplots(figsize=(8.6, 5))
    for i, (name, families) in enumerate(CURVES.items()):
        own = sorted((share_of(cell), far(cell, dense)) for cell in rows if cell["family"] in families)
        axis.plot(*zip(*own, strict=True), "o-", label=name, color=f"C{i}", ms=5.5, lw=2)
    for name in PUBLISHED:
        own = sorted((share_of(cell), far(cell, dense)) for cell in rows if cell["family"] == name)
        axis.plot(*zip(*own, strict=True), "x:", color="0.35", ms=6, lw=0.8)
        axis.annotate(name, own[-1], xytext=(7, 0), textcoords="offset points", fontsize=8, color="0.35", va="center")
    axis.axhline(1, color="0.4", lw=0.8)
    axis.axhline(0.95, color="0.6", lw=0.8, ls="--")
    axis.annotate("dense", (0.72, 1.008), fontsize=8, color="0.3", ha="right")
    axis.annotate("within 5 %", (0.72, 0.958), fontsize=8, color="0.5", ha="right")
    places = [1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2]
    axis.set(xscale="log", xlim=(0.026, 0.75), ylim=(-0.05, 1.06))
    axis.set_xlabel("bytes of a token over a dense cache's, the dense window aside")
    axis.set_xticks(places, [f"1/{1 / x:.0f}" for x in places])
    axis.minorticks_off()
    axis.set_ylabel("what a passage gains when it comes again,\n128 to 4,096 tokens later, over the dense model's")
    axis.grid(lw=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0.02, 0.02))
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def share_of(cell: Cell) -> float:
    """Bytes of a token over a dense cache's: of its latents, or as a published cache holds them after 4,096."""
    return cell["latents"] if "latents" in cell else cell["held"]["4096"]


if __name__ == "__main__":
    main()
