"""Fewer tokens and fewer layers: what is lost, what is held, and how long choosing takes.

python -m bench.selection [--base exact lrattn ...] [--times] [--plot-only] [--out bench/results/selection.json]

A base is what is held of a token: its keys and values as they are, latents, or those of some layers alone. A row is a
base and a policy that keeps some tokens, or none. Of every row:

    loss    of the last 256 tokens of windows of 1,024 and of 4,096 tokens, once all before them is in the cache and
            tokens are chosen: over the dense model's of the same windows, in nats a token, and its standard error
    gain    as evaluation/probe.py: how much better a passage is predicted that stood in what the cache has read
    bytes   of the cache's tensors once tokens are chosen, dense window and tables included, over those of a dense
            cache; the model is in float32, whose numbers count as 16 bits on both sides
    time    to choose tokens, and of a decode step after it, at 3,840 tokens, medians of some; on one thread of a CPU
            (--times measures these alone anew, of rows that are there: on a quiet machine)

A prompt is read in two parts, of which the last is 64 tokens: its last queries are what policies look at, as in the
papers, and bases read the first part once for all policies. Factors are calibrated on 24 windows of 1,024 tokens of
Wikipedia. Cells are kept in the JSON by their row and measured once; several processes may do so.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm import tqdm

import lrattn
from bench.evaluation import probe
from bench.evaluation.quality_plan import LENGTH, PLANS
from bench.evaluation.reader import Reader
from bench.quality import PAGE, held_in, updated
from bench.support import models, report, texts
from lrattn import Factors, Selection
from lrattn.integrations.transformers import LatentCache
from lrattn.integrations.transformers.load import read_windows
from lrattn.models.interface import attention_set
from lrattn.models.states import evaluating
from lrattn.selection import POLICIES

PATH = report.RESULTS / "selection.json"
DOCS = PAGE.with_name("methods.md")
LENGTHS = {1024: 8, 4096: 4}  # tokens of a window, windows of each text
SCORED, LAST = 256, 64  # tokens that are scored, and of the last part of a prompt
SHARES = (0.5, 0.3, 0.125)
CALIBRATED = 24
TIMES, STEPS = 3, 8  # for times: choices, and steps decoded
DENSE = "exact"

Cell = dict[str, Any]


@dataclass(frozen=True)
class Base:
    """more: of lrattn.compress with the default method; None: keys and values as they are. layers: share of them that
    hold their own. tokens: whether policies choose on it."""

    more: dict[str, Any] | None
    layers: float = 1.0
    tokens: bool = False

    @property
    def selections(self) -> list[Selection | None]:
        found: list[Selection | None] = [None]
        if self.tokens:
            for name, policy in POLICIES.items():
                if name not in lrattn.methods.METHODS:  # of other uses
                    continue
                found += [Selection(name, share) for share in (SHARES if policy.counted else (None,))]
        return found


BASES = {
    DENSE: Base(None, tokens=True),
    "lrattn 0.125": Base({}, tokens=True),
    "lrattn 0.5": Base({"keep": 0.5, "bits": 16}),
    "lrattn 0.3": Base({"keep": 0.3}),
    "lrattn 0.0625": Base({"keep": 0.0625}),
    "kvsharer 0.75": Base(None, 0.75),
    "kvsharer 0.5": Base(None, 0.5),
    "kvsharer 0.3": Base(None, 0.3),
    "kvsharer 0.125": Base(None, 0.125),
    "kvsharer 0.75 on lrattn 0.125": Base({}, 0.75),
    "kvsharer 0.5 on lrattn 0.125": Base({}, 0.5),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", nargs="+", choices=BASES, default=list(BASES), help="only these")
    parser.add_argument("--times", action="store_true", help="only times, of rows that are there")
    parser.add_argument("--plot-only", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=PATH)
    args = parser.parse_args()
    if not args.plot_only:
        subject = Subject()
        for name in args.base:
            subject.measure(name, args.out, only_times=args.times)
    cells = held_in(args.out)
    print(table(cells))
    plot(cells, args.out.with_suffix(".png"))
    if args.out == PATH:
        DOCS.write_text(pasted(DOCS.read_text(), cells))


class Subject(Reader):
    """SmolLM2, and texts as it reads them."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.model, self.tokenizer = PLANS["smollm2"].load()
        self.folder = models.kept()

    def windows(self, text: str, length: int, count: int, half: str = "evaluation") -> Tensor:
        return read_windows(self.tokenizer, texts.TEXTS[text](half), length, count)

    def factors(self, base: Base) -> Factors:
        batches = self.windows("wikipedia", LENGTH, CALIBRATED, "calibration").split(1)
        if base.more is None:
            factors = replace(lrattn.compress(self.model, method="curdkv"), select=None)
        else:
            gather = lrattn.methods.METHODS["lrattn"].gather
            state = self.folder / "selection.moments"
            moments = lrattn.calibrate(self.model, batches, gather=gather, far=(64, 4), state=state)
            factors = lrattn.compress(self.model, batches, moments=moments, **base.more)
        if base.layers < 1:
            layers = len(factors.layers)
            shared = lrattn.donors(self.model, batches, layers - int(base.layers * layers))
            factors = replace(factors, donors=shared)
        return factors

    @torch.no_grad()
    def measure(self, name: str, path: Path, *, only_times: bool = False) -> None:
        base, commit, wanted = BASES[name], report.commit(), BASES[name].selections
        rows = [row_of(name, s) for s in wanted]
        known = {cell["row"]: cell for cell in held_in(path)}
        if only_times and all(row in known and "losses" in known[row] for row in rows):
            times = self.times(name, self.factors(base), wanted)
            with updated(path) as held:
                for cell in held:
                    cell |= times.get(cell["row"], {})
            return
        if only_times or set(rows) <= set(known):
            return
        found: list[Cell] = [{"row": row, "base": name, "commit": commit} for row in rows]
        for cell, selection in zip(found, wanted, strict=True):
            cell |= {"policy": selection and selection.policy, "share": selection and selection.keep}
        try:
            factors = self.factors(base)
        except ValueError as error:
            found[0] |= {"impossible": str(error)}
            factors = None
        if factors is not None:
            with evaluating(self.model), attention_set(self.model, "lrattn"):
                self.read(name, factors, wanted, found)
            times = self.times(name, factors, wanted)
            found = [cell | times[cell["row"]] for cell in found]
        with updated(path) as held:
            held[:] = [cell for cell in held if cell["base"] != name] + found

    def read(self, name: str, factors: Factors, wanted: list[Selection | None], found: list[Cell]) -> None:
        """Fills the cells of all rows of a base."""
        for length, count in LENGTHS.items():
            for text in texts.TEXTS:
                losses: list[list[float]] = [[] for _ in wanted]
                for ids in tqdm(self.windows(text, length, count), desc=f"{name}, {length}, {text}", unit="window"):
                    for i, cache in enumerate(self.prompted(factors, ids[:-SCORED], wanted, found, length)):
                        nll, _ = self.scored(cache, ids[-SCORED - 1 :])
                        losses[i].append(nll.double().mean().item())
                for cell, nll in zip(found, losses, strict=True):
                    own = cell.setdefault("losses", {}).setdefault(str(length), {})
                    own[text] = [round(x, 6) for x in nll]
        planted = probe.sequences(probe.passages_text(self.tokenizer))
        count = 2 * len(probe.DISTANCES)
        shape = len(wanted), len(planted), count, probe.PASSAGE - 1
        nll, right = torch.empty(shape), torch.empty(shape)
        for s, ids in enumerate(tqdm(planted, desc=f"{name}, probe", unit="sequence")):
            tail = count * probe.PASSAGE
            for i, cache in enumerate(self.prompted(factors, ids[:-tail], wanted)):
                lost, hit = self.scored(cache, ids[-tail - 1 :])
                nll[i, s], right[i, s] = (x.view(count, -1)[:, 1:] for x in (lost, hit))
        for i, cell in enumerate(found):
            rows = probe.gains_of(nll[i], right[i])
            cell["probe"] = [{key: round(x, 5) for key, x in row.items()} for row in rows]
            for key in ("held", "tokens"):
                cell[key] = {n: round(sum(x) / len(x), 5) for n, x in cell[key].items()}

    def prompted(
        self,
        factors: Factors,
        ids: Tensor,
        wanted: list[Selection | None],
        found: list[Cell] | None = None,
        length: int = 0,
    ) -> Iterator[LatentCache]:
        """Of each row the cache that has read a prompt [t], but for its last token, and then chosen; what is left is
        written to `found`."""
        before = LatentCache(factors)
        self.passed(before, ids[: -LAST - 1])
        for i, selection in enumerate(wanted):
            cache = copy.deepcopy(before)
            cache.selection = selection
            self.passed(cache, ids[-LAST - 1 : -1])
            cache.settle()
            if found is not None:
                cell = found[i]
                dense = len(factors.layers) * (len(ids) - 1)
                share = sum(int(x.sum()) for x in cache.tokens) / dense
                cell.setdefault("tokens", {}).setdefault(str(length), []).append(share)
                own = cell.setdefault("held", {}).setdefault(str(length), [])
                if selection is not None or not own:
                    own.append(nbytes(self.whole(factors, ids) if selection is None else cache))
                    own[-1] /= factors.dense_bytes_per_token * (len(ids) - 1)
            yield cache

    @torch.no_grad()
    def times(self, name: str, factors: Factors, wanted: list[Selection | None]) -> dict[str, Cell]:
        """Of each row: milliseconds that choosing adds to the last part of a prompt, and those of a step."""
        ids, found = self.windows("wikipedia", max(LENGTHS), 1)[0][:-SCORED], dict[str, Cell]()
        choosing: list[list[float]] = [[] for _ in wanted]
        with evaluating(self.model), attention_set(self.model, "lrattn"):
            before = LatentCache(factors)
            self.passed(before, ids[: -LAST - 1])
            for _ in tqdm(range(TIMES), desc=f"{name}, times"):
                plain = 0.0
                for i, selection in enumerate(wanted):
                    cache = copy.deepcopy(before)
                    cache.selection = selection
                    begin = time.perf_counter()
                    self.passed(cache, ids[-LAST - 1 : -1])
                    cache.settle()
                    took = time.perf_counter() - begin
                    plain = took if selection is None else plain
                    choosing[i].append(took - plain)
                    step = self.step(cache)
                    own = found.setdefault(row_of(name, selection), {"choose_ms": 0.0, "step_ms": step})
                    own["step_ms"] = min(own["step_ms"], step)
        for own, took in zip(found.values(), choosing, strict=True):
            own["choose_ms"], own["step_ms"] = round(1e3 * median(took), 1), round(1e3 * own["step_ms"], 1)
        return found

    def whole(self, factors: Factors, ids: Tensor) -> LatentCache:
        """Of a prompt but its last token, read at once: without free room."""
        cache = LatentCache(factors)
        self.passed(cache, ids[:-1])
        return cache

    def step(self, cache: LatentCache) -> float:
        """Median seconds of a decode step on a copy of a cache."""
        cache, token = copy.deepcopy(cache), torch.zeros(1, dtype=torch.int64)
        took = list[float]()
        for _ in range(STEPS):
            begin = time.perf_counter()
            self.passed(cache, token)
            took.append(time.perf_counter() - begin)
        return median(took)


def row_of(base: str, selection: Selection | None) -> str:
    if selection is None:
        return base
    share = "" if selection.keep is None else f" {selection.keep}"
    return f"{selection.policy}{share}" + ("" if base == DENSE else f" on {base}")


def nbytes(cache: LatentCache) -> int:
    """Of the tensors that a cache holds, wide numbers counted as 16 bits."""
    return sum(x.numel() * (2 if x.is_floating_point() else x.itemsize) for x in cache.tensors)


def excess(cell: Cell, dense: Cell, length: int) -> tuple[float, float]:
    """Loss over the dense model's, mean over the windows of both texts, and its standard error."""
    pairs = zip(*(x["losses"][str(length)].values() for x in (cell, dense)), strict=True)
    gaps = [a - b for ours, own in pairs for a, b in zip(ours, own, strict=True)]
    return fmean(gaps), stdev(gaps) / math.sqrt(len(gaps))


def found_in(cells: Sequence[Cell]) -> tuple[Cell | None, list[Cell]]:
    """The dense model's cell, and all in the order of BASES."""
    order = [row_of(name, s) for name, base in BASES.items() for s in base.selections]
    by_row = {cell["row"]: cell for cell in cells}
    return by_row.get(DENSE), [by_row[row] for row in order if row in by_row]


def table(cells: Sequence[Cell]) -> str:
    dense, rows = found_in(cells)
    if dense is None:
        return report.NONE
    line = "{:<29} {:>6} {:>6} {:>7} {:>15} {:>15} {:>5} {:>5} {:>5} {:>5} {:>7} {:>6}"
    gains = [str(row["distance"]) for row in dense["probe"]]
    lines = [line.format("", "bytes", "bytes", "tokens", *["loss"] * 2, *["gain"] * len(gains), "choose", "step")]
    lines += [line.format("", *map(str, LENGTHS), max(LENGTHS), *map(str, LENGTHS), *gains, "ms", "ms")]
    for cell in rows:
        if "impossible" in cell:
            lines.append(f"{cell['row']:<29} {cell['impossible']}")
            continue
        held = [f"{cell['held'][str(n)]:.3f}" for n in LENGTHS]
        lost = ["{:+.4f} ±{:.4f}".format(*excess(cell, dense, n)) if cell is not dense else "" for n in LENGTHS]
        gained = [f"{row['gain']:.2f}" for row in cell["probe"]]
        choose = "" if cell["policy"] is None else f"{cell['choose_ms']:.0f}"
        step = f"{cell['step_ms']:.0f}" if "step_ms" in cell else "-"
        kept = f"{cell['tokens'][str(max(LENGTHS))]:.3f}"
        lines.append(line.format(cell["row"], *held, kept, *lost, *gained, choose, step))
    return "\n".join(lines)


def pasted(page: str, cells: Sequence[Cell]) -> str:
    """The page with everything between its marks made anew: <!-- bench.selection: NAME --> .. <!-- end -->."""
    return report.shown(page, "bench.selection", table(cells), PATH, "loss against bytes")


def plot(cells: Sequence[Cell], path: Path) -> None:
    """Loss against bytes at both lengths, and what is gained from far away."""
    dense, rows = found_in(cells)
    rows = [cell for cell in rows if "impossible" not in cell and cell is not dense]
    if dense is None or not rows:
        return
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2))
    names = list(dict.fromkeys(_curve(cell) for cell in rows))
    colours = {
        name.split(" on ")[0]: f"C{i}" for i, name in enumerate(dict.fromkeys(n.split(" on ")[0] for n in names))
    }
    for name in names:
        own = sorted((cell for cell in rows if _curve(cell) == name), key=lambda cell: cell["held"]["4096"])
        on = " on " in name
        style = {"color": colours[name.split(" on ")[0]], "ls": "--" if on else "-", "marker": "s" if on else "o"}
        style |= {"mfc": "white"} if on else {}
        for ax, n in zip(axes, LENGTHS, strict=False):
            points = [(cell["held"][str(n)], *excess(cell, dense, n)) for cell in own]
            ax.errorbar(*zip(*[(x, max(y, 1e-4)) for x, y, _ in points], strict=True), yerr=[e for *_, e in points],
                        label=name, lw=1.2, ms=4.5, elinewidth=0.6, **style)  # fmt: skip
        points = [(cell["held"]["4096"], fmean(row["gain"] for row in cell["probe"][-2:])) for cell in own]
        axes[2].plot(*zip(*points, strict=True), lw=1.2, ms=4.5, **style)
    whole = fmean(row["gain"] for row in dense["probe"][-2:])
    axes[2].axhline(whole, color="0.5", lw=0.8, ls=":")
    axes[2].annotate("dense", (0.02, whole), color="0.4", fontsize=8, va="bottom")
    for ax, n in zip(axes, LENGTHS, strict=False):
        ax.set(xscale="log", yscale="log", xlabel=f"bytes over a dense cache's, {n:,} tokens")
        ax.set_ylabel("loss added, nats a token (from 0.0001)")
    axes[2].set(xscale="log", xlabel="bytes over a dense cache's, 4,096 tokens")
    axes[2].set_ylabel("gain of a passage read 1,024 and 2,048\ntokens earlier, nats a token")
    for ax in axes:
        ax.set_xticks([0.02, 0.05, 0.1, 0.2, 0.5, 1], ["0.02", "0.05", "0.1", "0.2", "0.5", "1"], minor=False)
        ax.minorticks_off()
        ax.grid(lw=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncol=5, fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.12, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _curve(cell: Cell) -> str:
    """What rows of several shares have in common."""
    base = cell["base"].split()[0]
    if cell["policy"] is None:
        return base + (" on lrattn 0.125" if " on " in cell["base"] else "")
    return cell["policy"] + ("" if cell["base"] == DENSE else f" on {cell['base']}")


if __name__ == "__main__":
    main()
