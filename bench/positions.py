"""Loss where a text lies far from position 0, where it is long, and where it looks far back: what windows of 1,024
tokens at position 0 do not show.

python -m bench.positions [--model smollm2 ...] [--row "lrattn, 2 bits" ...] [--kind 0 4096 65536 long probe]
                          [--minutes 60] [--again] [--plot-only] [--out bench/results/positions.json]

A cell is a model, a way to make factors and one of five kinds. 0, 4096 and 65536: the same windows of 1,024 tokens,
read as if the text began at that position; rotary attention knows relative positions alone, so that a dense model
predicts the same. long, of SmolLM2: windows of 8,192 tokens, their loss by the stretch of 512. probe: as
evaluation/probe.py.
All factors are calibrated on 24 windows of 1,024 tokens of Wikipedia from position 0 on, or on 6 windows of 4,096 (4K
text), and have a dense window of 64 + 4 tokens beside them. Every window is read by the dense model, too: excess is the
difference of their losses, KL the divergence of the predictions from the dense model's, both in nats a token.

Cells are kept in the JSON by what they are and measured once. Tables go to stdout and, with the JSON of the repository,
into docs/quality.md and bench/results/quality.md.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor
from tqdm import tqdm

import lrattn
from bench.evaluation import probe
from bench.evaluation.quality_plan import LENGTH, NEAR, PLANS, find
from bench.evaluation.quantised import attending_quantised
from bench.quality import PAGE, TABLES, held_in, updated
from bench.support import models, report, texts
from lrattn.compression.moments import GRADIENTS
from lrattn.integrations.transformers.either import attending
from lrattn.integrations.transformers.load import read_windows
from lrattn.models.interface import decoder_of
from lrattn.models.states import evaluating

PATH = report.RESULTS / "positions.json"
PLACES = (0, 4096, 65536)
KINDS = (*map(str, PLACES), "long", "probe")
CALIBRATED = 24  # windows
WINDOWS = {"0": 6, "4096": 3, "65536": 3, "long": 2}  # of each text
LESSONS = 16  # windows distilled on, two of them to judge by
LONG, STRETCH = 8192, 512
REACH = max(PLACES) + LENGTH  # positions that these cells read
DENSE = "dense"

Cell = dict[str, Any]


@dataclass(frozen=True)
class Way:
    """A way to make factors: a method, arguments of lrattn.compress, tokens a window of calibration, and steps of
    distillation on the windows after those. "kivi" quantises dense keys and values."""

    method: str
    more: dict[str, Any] = field(default_factory=dict)
    kinds: tuple[str, ...] = KINDS
    models: tuple[str, ...] = ("smollm2",)
    length: int = LENGTH
    refine: int = 0


def bits(n: float) -> dict[str, Any]:
    """So many bits for each number of the dense cache, spent as bits of latents."""
    return {"keep": n / 16, "bits": "auto"}


SHORT, FAR = ("0", "probe"), ("0", "65536", "probe")
BOTH = ("smollm2", "qwen2.5-coder")
WAYS: dict[str, Way] = {
    "lrattn, 2 bits": Way("lrattn", bits(2), models=BOTH),
    "lrattn shared, 2 bits": Way("lrattn", bits(2) | {"shared": True}, models=BOTH),
    "lrattn, 2 bits, 4K text": Way("lrattn", bits(2), SHORT, length=4096),
    "lrattn shared, 2 bits, 4K text": Way("lrattn", bits(2) | {"shared": True}, SHORT, length=4096),
    "lrattn, 2 bits, chunks of 256": Way("lrattn", bits(2) | {"chunk": 256}, SHORT),
    "lrattn, 2 bits, chunks of 128": Way("lrattn", bits(2) | {"chunk": 128}, SHORT),
    "lrattn-rebuilt, 2 bits": Way("lrattn-rebuilt", bits(2), models=BOTH),
    "lrattn-rotated, 2 bits": Way("lrattn-rotated", bits(2)),
    "palu, keep 0.5": Way("palu", {"keep": 0.5}),
    "kivi, 2 bits": Way("kivi"),
    "kq-svd, keep 0.5": Way("kq-svd", {"keep": 0.5}),
    "kv-heads, keep 0.5": Way("kv-heads", {"keep": 0.5}),
    "think, keep 0.7": Way("think", {"keep": 0.7}),
    "lrattn, 1.5 bits": Way("lrattn", bits(1.5), FAR),
    "lrattn shared, 1.5 bits": Way("lrattn", bits(1.5) | {"shared": True}, FAR),
    "lrattn shared, 1 bit": Way("lrattn", bits(1) | {"shared": True}, SHORT),
    "lrattn, 1 bit": Way("lrattn", bits(1), SHORT),
    "lrattn, 1 bit, refined 16": Way("lrattn", bits(1), SHORT, refine=16),
    "lrattn-rebuilt, 1.5 bits": Way("lrattn-rebuilt", bits(1.5), SHORT),
    "lrattn-rebuilt, 1 bit": Way("lrattn-rebuilt", bits(1), SHORT),
    "lrattn, keep 0.5": Way("lrattn", {"keep": 0.5, "bits": 16}, SHORT),
    "lrattn-rotated to 8K, 2 bits": Way(
        "lrattn-rotated", bits(2) | {"positions": LONG}, ("0", "4096", "long", "probe")
    ),
    "lrattn-rotated to 65K, 2 bits": Way("lrattn-rotated", bits(2) | {"positions": REACH}, ("0", "65536")),
    "kq-svd to 65K, keep 0.5": Way("kq-svd", {"keep": 0.5, "positions": REACH}, ("0", "65536")),
    "kv-heads to 65K, keep 0.5": Way("kv-heads", {"keep": 0.5, "positions": REACH}, ("0", "65536")),
    "lrattn-channels, 2 bits": Way("lrattn-channels", bits(2), FAR),
    "matryoshka, keep 0.5": Way("matryoshka", {"keep": 0.5}, FAR),
}
ROWS = {DENSE: Way(DENSE, kinds=("probe",), models=BOTH), **WAYS}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=BOTH, default=list(BOTH))
    parser.add_argument("--row", nargs="+", choices=ROWS, default=list(ROWS), help="only these")
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS), help="only these")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after so many")
    parser.add_argument("--again", action="store_true", help="measure the chosen cells anew")
    parser.add_argument("--plot-only", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=PATH)
    args = parser.parse_args()
    if not args.plot_only:
        chosen = [
            {"model": model, "row": name, "kind": kind}
            for model in args.model
            for name in args.row
            for kind in ROWS[name].kinds
            if model in ROWS[name].models and kind in args.kind and (model == BOTH[0] or kind != "long")
        ]
        measure(chosen, args.out, 60 * args.minutes, again=args.again)
    cells = held_in(args.out)
    print("\n\n".join(tables(cells).values()))
    plot(cells, args.out.with_suffix(".png"))
    if args.out == PATH:
        for page in (PAGE, TABLES):
            page.write_text(pasted(page.read_text(), cells))


def measure(chosen: Sequence[Cell], path: Path, seconds: float, *, again: bool = False) -> None:
    """Measures the cells that are not in the file, and saves after each."""
    begin, commit, subject = time.monotonic(), report.commit(), None
    for n, own in enumerate(chosen, 1):
        if not again and find(held_in(path), **own):
            continue
        if time.monotonic() - begin > seconds:
            print(f"stopped with {len(chosen) - n + 1} cells left", flush=True)
            return
        print(f"cell {n} of {len(chosen)}: {own['model']}, {own['row']}, {own['kind']}", flush=True)
        if subject is None or subject.name != own["model"]:
            subject = Subject(own["model"])
        started = time.perf_counter()
        found = subject.cell(own["row"], own["kind"])
        found |= {"seconds": round(time.perf_counter() - started, 1), "commit": commit}
        with updated(path) as held:
            held[:] = [*(c for c in held if find([c], **own) is None), own | found]


class Subject:
    """A model, and the factors of the way in use. Moments lie in a folder, by the version of lrattn's files."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.name, self.folder = name, models.kept()
        self.model, self.tokenizer = PLANS[name].load()
        self.model.config.max_position_embeddings = 2 * max(PLACES)  # of tables: no frequency depends on it here
        self.held: tuple[str, lrattn.Factors] | None = None
        self.dense: dict[tuple[str, int], Tensor] = {}  # by kind and text, and the window: what the head reads, [t, E]

    def lessons(self, length: int, after: int, count: int) -> tuple[Tensor, ...]:
        """Windows to calibrate or to distil on."""
        return read_windows(self.tokenizer, texts.wikipedia("calibration"), length, after + count).split(1)[after:]

    def factors(self, row: str) -> lrattn.Factors:
        if self.held is None or self.held[0] != row:
            way, self.held = WAYS[row], None
            calibration = self.lessons(way.length, 0, CALIBRATED * LENGTH // way.length)
            recipe = lrattn.methods.METHODS[way.method]
            gather = sorted(recipe.gathered(recipe.ranks))
            name = self.name if way.length == LENGTH else f"{self.name}-{way.length}"
            state = self.folder / f"positions-{name}-{'+'.join(gather)}.moments"
            far = NEAR if set(gather) & set(GRADIENTS) else (0, 0)
            moments = lrattn.calibrate(self.model, calibration, gather=gather, far=far, state=state)
            factors = lrattn.compress(self.model, calibration, way.method, moments=moments, **way.more)
            if way.refine:
                batches, (recent, sinks) = self.lessons(LENGTH, CALIBRATED, LESSONS), NEAR
                factors = lrattn.refine(self.model, factors, batches, steps=way.refine, recent=recent, sinks=sinks)
            self.held = row, factors
        return self.held[1]

    def reading(self, row: str) -> AbstractContextManager[Any]:
        """Inside, the model attends as a row says."""
        if row == DENSE:
            return attending(self.model, None)
        if WAYS[row].method == "kivi":
            return attending_quantised(self.model, "kivi-32", 2, *NEAR)
        return attending(self.model, self.factors(row), *NEAR)

    def cell(self, row: str, kind: str) -> Cell:
        found: Cell = {}
        if row != DENSE and WAYS[row].method != "kivi":
            factors = self.factors(row)
            found = {"keep": factors.keep, "predicted": sum(factors.predicted) if factors.predicted else None}
        if kind == "probe":
            planted = probe.sequences(probe.passages_text(self.tokenizer))
            with self.reading(row):
                rows = probe.measure(self.model, planted, row)
            return found | {"probe": [{name: round(x, 5) for name, x in r.items()} for r in rows]}
        length, place = (LONG, 0) if kind == "long" else (LENGTH, int(kind))
        windows = {
            text: read_windows(self.tokenizer, make("evaluation"), length, WINDOWS[kind])
            for text, make in texts.TEXTS.items()
        }
        found["texts"] = {text: self.compared(row, ids, place, f"{kind}, {text}") for text, ids in windows.items()}
        return found

    @torch.no_grad()
    def compared(self, row: str, windows: Tensor, place: int, label: str) -> Cell:
        """Of each window, by stretches: loss of the dense model, excess and KL."""
        found: Cell = {"dense": [], "excess": [], "kl": []}
        with evaluating(self.model):
            for n, ids in enumerate(tqdm(windows, desc=f"{row}, {label}", unit="window")):
                if (label, n) not in self.dense:
                    self.dense[label, n] = self.states(ids, place)
                dense = self.dense[label, n]
                with self.reading(row):
                    states = self.states(ids, place)
                for name, by_stretch in zip(found, self.losses(ids, dense, states), strict=True):
                    found[name].append([round(x, 6) for x in by_stretch])
        return found

    def states(self, ids: Tensor, place: int) -> Tensor:
        """What the head reads, [t, E], of tokens at positions from `place` on."""
        at = torch.arange(place, place + len(ids))[None]
        return decoder_of(self.model)(input_ids=ids[None], position_ids=at, use_cache=False).last_hidden_state[0]

    def losses(self, ids: Tensor, dense: Tensor, states: Tensor) -> tuple[list[float], list[float], list[float]]:
        head = self.model.get_output_embeddings()
        found: tuple[list[float], list[float], list[float]] = ([], [], [])
        for begin in range(0, len(ids) - 1, STRETCH):
            some, after = slice(begin, begin + STRETCH), ids[begin + 1 : begin + 1 + STRETCH, None]
            want, got = (head(x[some][: len(after)]).float().log_softmax(-1) for x in (dense, states))
            lost, own = (-x.gather(1, after).double().mean().item() for x in (want, got))
            divergence = (want.exp() * (want - got)).sum(1).double().mean().item()
            for numbers, x in zip(found, (lost, own - lost, divergence), strict=True):
                numbers.append(x)
        return found


def over_windows(cell: Cell, name: str, text: str, first: int | None = None) -> tuple[float, float]:
    """Mean over a text's windows, or the first of them, and its standard error."""
    windows = [fmean(by_stretch) for by_stretch in cell["texts"][text][name][:first]]
    return fmean(windows), stdev(windows) / math.sqrt(len(windows))


def tables(cells: Sequence[Cell]) -> dict[str, str]:
    """Markdown by name, for what is there."""
    found = {}
    for model in BOTH:
        own = [c for c in cells if c["model"] == model]
        made = {"places": places(own), "long": stretches(own), "probe": probes(own)}
        found |= {f"{model}-{name}": f"```text\n{text}\n```" for name, text in made.items() if text}
    return found


def pasted(page: str, cells: Sequence[Cell]) -> str:
    """The page with everything between its marks made anew: <!-- bench.positions: NAME --> .. <!-- end -->."""
    made = tables(cells) | {"plot": f"![loss by position](../bench/results/{PATH.stem}.png)"}
    return report.pasted(page, report.marks("bench.positions"), made)


def places(cells: Sequence[Cell]) -> str:
    """Excess and KL of each row, read from each position on; at 0 of all windows, and of those read elsewhere, too."""
    line = "{:<30} {:>9} {:>7} {:>16} {:>16} {:>9} {:>9}"
    lines, told = [line.format("", "begins at", "windows", "wikipedia", "news", "KL wiki", "KL news")], ""
    for row in WAYS:
        for kind, count in [("0", WINDOWS["0"]), *((str(place), WINDOWS[str(PLACES[-1])]) for place in PLACES)]:
            if cell := find(cells, row=row, kind=kind):
                gaps = ["{:.4f} ±{:.4f}".format(*over_windows(cell, "excess", text, count)) for text in texts.TEXTS]
                kls = [f"{over_windows(cell, 'kl', text, count)[0]:.5f}" for text in texts.TEXTS]
                lines.append(line.format("" if row == told else row, kind, count, *gaps, *kls))
                told = row
    return "\n".join(lines) if told else ""


def by_stretch(cell: Cell, count: int | None = None) -> list[float]:
    """Mean excess over all windows of both texts, or the first of each."""
    windows = [w for text in texts.TEXTS for w in cell["texts"][text]["excess"][:count]]
    return [fmean(numbers) for numbers in zip(*windows, strict=True)]


def stretches(cells: Sequence[Cell]) -> str:
    """Excess of each row in the 2,048-token quarters of long windows."""
    quarter = LONG // 4 // STRETCH
    heads = [f"{a * STRETCH // 1024}K-{(a + quarter) * STRETCH // 1024}K" for a in range(0, LONG // STRETCH, quarter)]
    lines = ["{:<30}".format("") + "".join(f"{head:>9}" for head in heads)]
    for row in WAYS:
        if cell := find(cells, row=row, kind="long"):
            gaps = by_stretch(cell)
            means = [fmean(gaps[a : a + quarter]) for a in range(0, len(gaps), quarter)]
            lines.append(f"{row:<30}" + "".join(f"{x:>9.4f}" for x in means))
    return "\n".join(lines) if len(lines) > 1 else ""


def probes(cells: Sequence[Cell]) -> str:
    """Gain of a passage read again, by the distance."""
    found = [(row, cell) for row in ROWS if (cell := find(cells, row=row, kind="probe"))]
    if not found:
        return ""
    lines = ["{:<30}".format("") + "".join(f"{p['distance']:>14}" for p in found[0][1]["probe"])]
    for row, cell in found:
        lines.append(f"{row:<30}" + "".join(f"{p['gain']:>8.2f} ±{p['error']:.2f}" for p in cell["probe"]))
    return "\n".join(lines)


def plot(cells: Sequence[Cell], path: Path) -> None:
    """Loss against position in long windows, and against where a short text begins, of rows measured at every place."""
    own = [c for c in cells if c["model"] == "smollm2"]
    rows = [row for row in WAYS if all(find(own, row=row, kind=str(place)) for place in PLACES)]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), layout="constrained", sharey=True)
    for i, row in enumerate(rows):
        style = {"color": f"C{i % 10}", "linestyle": ("-", "--")[i // 10], "marker": "o", "markersize": 3}
        long = find(own, row=row, kind="long")
        gaps = by_stretch(long) if long else []
        left.plot([(n + 0.5) * STRETCH for n in range(len(gaps))], gaps, label=row, **style)
        known = [find(own, row=row, kind=str(place)) for place in PLACES]
        right.plot(range(len(PLACES)), [fmean(by_stretch(c, WINDOWS[str(PLACES[-1])])) for c in known if c], **style)
    for axis in (left, right):
        axis.set_yscale("symlog", linthresh=0.01)
        axis.grid(alpha=0.3)
    left.set(xlabel=f"position in a window of {LONG:,} tokens", ylabel="loss over dense, nats a token")
    right.set(xlabel="position at which a window of 1,024 tokens begins")
    right.set_xticks(range(len(PLACES)), [f"{n:,}" for n in PLACES])
    figure.legend(loc="outside right upper", fontsize="small")
    figure.suptitle("SmolLM2-135M, calibrated at positions below 1,024, dense window of 64 + 4", fontsize="medium")
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
