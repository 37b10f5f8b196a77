"""Quality against bytes on real models that attend on latents: every method, with and without a dense window.

python -m bench.quality [--model smollm2 ...] [--keep 0.5 ...] [--method palu ...] [--sample 0 ...] [--frontier]
                        [--part 0/2] [--minutes 60] [--again] [--plot-only] [--out bench/results/quality.json]

A cell is one model, calibration sample, way to make factors or to quantise, kept share and dense window
(evaluation/quality_plan.py). Cells are kept in the JSON by their settings, measured once, the important ones first, and
saved one by one: the table can be built piece by piece. --frontier chooses those of loss against bytes; --part 0/2 is
the first of two processes that share the cells and the JSON. --minutes begins no cell after so many; --again measures
the chosen ones anew, the dense model's only by --method dense; --plot-only measures nothing. Tables go to stdout and,
with the JSON of the repository, into docs/quality.md and, the long ones, bench/results/quality.md.

Losses of a cell and of the dense model are compared window by window: an error is the standard error of the mean
difference, of the windows at hand. It is what other windows of these texts would change, not other texts or samples.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

import lrattn
from bench.evaluation import probe, quality_plot, quality_table
from bench.evaluation.quality_plan import (
    AFTER,
    CONTEXTS,
    LENGTH,
    PLANS,
    SAMPLES,
    Row,
    Settings,
    cells,
    find,
    gathered,
    row_of,
)
from bench.evaluation.quantised import PEER, attending_quantised, bytes_held
from bench.support import models, report, texts
from lrattn.factors.formats import Format
from lrattn.integrations.transformers.either import attending
from lrattn.integrations.transformers.load import read_windows
from lrattn.integrations.transformers.perplexity import losses
from lrattn.models.layers import attention_layers

PATH = report.RESULTS / "quality.json"
PAGE, TABLES = (Path(__file__).parents[1] / name for name in ("docs/quality.md", "bench/results/quality.md"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--keep", type=float, nargs="+", help="only these of the plan")
    methods = [*lrattn.methods.METHODS, "quantised", "dense"]
    parser.add_argument("--method", nargs="+", choices=methods, help="only these of the plan")
    parser.add_argument("--sample", nargs="+", choices=SAMPLES, help="only these calibration samples of the plan")
    parser.add_argument("--frontier", action="store_true", help="only loss against bytes")
    parser.add_argument("--part", type=part, default=(0, 1), help="0/2: every second cell, from the first on")
    parser.add_argument("--windows", type=int, help="of each text, instead of the plan's: for a trial")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after so many")
    parser.add_argument("--again", action="store_true", help="measure cells anew")
    parser.add_argument("--plot-only", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=PATH)
    args = parser.parse_args()
    if not args.plot_only:
        measure(wanted(args), args.out, 60 * args.minutes, again=args.again)
    results = report.load(args.out)
    print("\n\n".join(quality_table.sections(results).values()))
    quality_plot.plot(results, args.out)
    if args.out == PATH:
        for page in (PAGE, TABLES):
            page.write_text(quality_table.pasted(page.read_text(), results))


def part(text: str) -> tuple[int, int]:
    """i and n of the text i/n. Raises: ValueError unless 0 <= i < n."""
    i, n = map(int, text.split("/"))
    if not 0 <= i < n:
        raise ValueError(f"part: expected one of 0/{n} .. {n - 1}/{n}, got {text}")
    return i, n


def wanted(args: argparse.Namespace) -> list[Settings]:
    """The cells asked for, the important ones first; the dense model's always."""

    def asked(cell: Settings) -> bool:
        chosen = ((args.keep, "keep"), (args.method, "method"), (args.sample, "sample"))
        return cell["method"] == "dense" or all(not only or cell[name] in only for only, name in chosen)

    staged = [pair for name in args.model for pair in cells(name, frontier=args.frontier) if asked(pair[1])]
    changed = {} if args.windows is None else {"windows": args.windows}
    chosen = [cell | changed for _, cell in sorted(staged, key=lambda pair: pair[0])]
    dense, others = ([c for c in chosen if (c["method"] == "dense") == own] for own in (True, False))
    first, step = args.part
    return [*dense, *others[first::step]]


def measure(wanted: Sequence[Settings], path: Path, seconds: float, *, again: bool = False) -> None:
    """Measures the cells that are not in the file, and saves after each; other processes may do so, too."""
    if again:
        anew = [cell for cell in wanted if cell["method"] != "dense"] or wanted
        with updated(path) as held:
            held[:] = [c for c in held if all(find([c], **cell) is None for cell in anew)]
    held = held_in(path)
    missing = [cell for cell in wanted if find(held, **cell) is None]
    begin, commit = time.monotonic(), report.commit()  # of the code that is loaded, however long this runs
    subject: Subject | None = None
    for n, settings in enumerate(missing, 1):
        if time.monotonic() - begin > seconds:
            print(f"stopped with {len(missing) - n + 1} of {len(missing)} cells left", flush=True)
            return
        print(f"cell {n} of {len(missing)}: {told(settings)}", flush=True)
        if subject is None or subject.name != settings["model"]:
            subject = Subject(settings["model"])
            for trained in subject.folder.glob(f"{subject.name}-*.factors") if again else ():
                trained.unlink()
        started = time.perf_counter()
        try:
            measured = run(subject, settings, held_in(path))
        except ImportError as error:
            if settings["quantiser"] != PEER:
                raise
            print(f"left out: {error}", flush=True)
            continue
        measured |= {"seconds": round(time.perf_counter() - started, 1), "commit": commit}
        with updated(path) as held:
            held.append(settings | measured)


def held_in(path: Path) -> list[Settings]:
    return report.load(path)["cells"] if path.is_file() else []


@contextmanager
def updated(path: Path) -> Iterator[list[Settings]]:
    """The cells in the file, to be changed and saved, while no other process does."""
    with report.alone(path):
        held = held_in(path)
        yield held
        report.save(path, {"texts": texts.__doc__, "cells": held})


def told(cell: Settings) -> str:
    near = f", dense window {cell['recent']} + {cell['sinks']}" if cell["recent"] else ""
    sample = f", sample {cell['sample']}" if cell["sample"] else ""
    counted = " counted" if cell["counted"] else ""
    return f"{cell['model']}, {row_of(cell).label} at keep {cell['keep']:.4g}{sample}{near}{counted}"


class Subject:
    """A model, the texts as it reads them, and the moments of the sample in use. What takes long lies in a folder, by
    the version of lrattn's files: others cannot be read."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.name, self.folder = name, models.kept()
        self.model, self.tokenizer = PLANS[name].load()
        self.held: tuple[str, lrattn.Moments] | None = None

    @cached_property
    def planted(self) -> torch.Tensor:
        return probe.sequences(probe.passages_text(self.tokenizer))

    def evaluation(self, text: str, length: int, count: int) -> torch.Tensor:
        return read_windows(self.tokenizer, texts.TEXTS[text]("evaluation"), length, count)

    def calibration(self, name: str) -> Sequence[torch.Tensor]:
        sample = SAMPLES[name]
        windows = read_windows(
            self.tokenizer, texts.TEXTS[sample.text]("calibration"), LENGTH, sample.first + sample.windows
        )[sample.first :]
        if len(windows) != sample.windows:
            raise ValueError(f"sample {name}: expected {sample.windows} windows, got {len(windows)}")
        return windows.split(1)

    def factors(self, cell: Settings) -> lrattn.Factors:
        """What the cell's row and keep say; those trained once for every keep are kept."""
        row = row_of(cell)
        keep = cell["keep"] - (window_share(cell) if cell["counted"] else 0)
        label = f"{row.label.replace(' ', '-')}-{cell['group_size']}"
        path = self.folder / f"{self.name}-sample{cell['sample']}-{label}.factors"
        if row.nested and path.is_file():  # `measure(again=True)` takes it away
            return lrattn.narrowed(lrattn.Factors.load(path), keep)
        factors = lrattn.compress(
            self.model,
            self.calibration(cell["sample"]),
            row.method,
            1.0 if row.nested else keep,
            cell["group_size"],
            ranks=row.ranks,
            shared=row.shared,
            far=row.far,
            moments=self.moments(cell["sample"], row),
            bits=row.bits,
            progress=False,
        )
        if row.refine:
            recent, sinks = row.far
            lessons = self.calibration(AFTER[cell["sample"]])
            factors = lrattn.refine(
                self.model, factors, lessons, steps=row.refine, recent=recent, sinks=sinks, nested=row.nested
            )
        if row.nested:
            factors.save(path)
            factors = lrattn.narrowed(factors, keep)
        return factors

    def moments(self, sample: str, row: Row) -> lrattn.Moments:
        """Kept by model, sample, window and what was gathered."""
        gather = gathered(self.name, sample, row)
        name = f"{self.name}-sample{sample}-far{row.far[0]}+{row.far[1]}-{'+'.join(gather)}.moments"
        if self.held is None or self.held[0] != name:
            self.held = None  # before the next: they are hundreds of megabytes
            moments = lrattn.calibrate(
                self.model, self.calibration(sample), gather=gather, far=row.far, state=self.folder / name
            )
            self.held = name, moments
        return self.held[1]


def run(subject: Subject, cell: Settings, held: list[Settings]) -> dict[str, Any]:
    """What a cell measures; or why there are no such factors."""
    near = cell["recent"], cell["sinks"]
    if cell["method"] == "dense":
        return evaluated(subject, cell, attending(subject.model, None), None)
    dense = find(held, model=cell["model"], method="dense", windows=cell["windows"], length=cell["length"])
    if cell["quantiser"]:
        given = subject.model, cell["quantiser"], cell["bits"], *near
        held_bytes = bytes_held(*given, (*CONTEXTS, cell["length"]))
        return sizes(subject, cell, *held_bytes) | evaluated(subject, cell, attending_quantised(*given), dense)
    subject.moments(cell["sample"], row_of(cell))  # what follows is timed without them
    begin = time.perf_counter()
    try:
        factors = subject.factors(cell)
    except ValueError as error:
        return {"impossible": str(error)}
    layers, window = factors.layers, sum(near) * factors.dense_bytes_per_token
    at = {n: factors.bytes_per_token + window / n for n in (*CONTEXTS, cell["length"])}
    found = {
        "compress_seconds": round(time.perf_counter() - begin, 1),
        "factors": digest_of(factors),
        **sizes(subject, cell, factors.bytes_per_token, at),
        "key_share": sum(map(key_bytes, layers)) / factors.bytes_per_token,  # of the latents' bytes, what keys read
        "widths": [[x.keys.width, x.values.width] for x in layers],  # of rows that are shared, the values read all
        "rows_shared": layers[0].shared,
        "key_groups": len(layers[0].keys.ranks),
        "predicted": sum(factors.predicted) if factors.predicted else None,
        "predicted_layers": [float(f"{x:.4g}") for x in factors.predicted],
    }
    names = ("model", "recent", "sinks", "length", "windows", "probe")
    same = find(held, factors=found["factors"], **{name: cell[name] for name in names})
    if same is not None:  # the same factors under another name: with one key group HSR has nothing to do
        return found | {name: same[name] for name in ("texts", "probe_at") if name in same}
    return found | evaluated(subject, cell, attending(subject.model, factors, *near), dense)


def sizes(subject: Subject, cell: Settings, per_token: float, at: Mapping[int, float]) -> dict[str, Any]:
    """Bytes a token of all layers, without end and at contexts that hold the dense window beside, and as shares of the
    dense cache's."""
    dense = sum(4 * layer.dense for layer in attention_layers(subject.model))
    return {
        "achieved_keep": per_token / dense,
        "whole_keep": at[cell["length"]] / dense,
        "bytes_per_token": per_token,
        "dense_bytes_per_token": dense,
        "bytes_at": {str(n): round(at[n], 1) for n in CONTEXTS},
    }


def key_bytes(layer: lrattn.LayerFactors) -> int:
    """Bytes of one token that keys are rebuilt from; of a shared row, its first segments."""
    if not layer.shared:
        return layer.keys.latent_bytes
    if not layer.row_side.formats:
        return 2 * layer.keys.width
    begun = (
        [s for s, end in zip(f.segments, accumulate(n for n, _ in f.segments), strict=True) if end <= rank]
        for f, rank in zip(layer.row_side.formats, layer.keys.ranks, strict=True)
    )
    return sum(Format(tuple(segments)).nbytes for segments in begun)


def window_share(cell: Settings) -> float:
    """Bytes of the dense window over the dense cache's, at the cell's length."""
    return (cell["recent"] + cell["sinks"]) / cell["length"]


def evaluated(
    subject: Subject, cell: Settings, attention: AbstractContextManager[object], dense: Settings | None
) -> dict[str, Any]:
    """Losses of both texts' windows, over the dense model's where there is one, and the probe; inside `attention`."""
    label = row_of(cell).label
    found: dict[str, Any] = {"texts": {}}
    with attention:
        for text in texts.TEXTS:
            nll = losses(subject.model, subject.evaluation(text, cell["length"], cell["windows"]), f"{label}, {text}")
            found["texts"][text] = compared(nll, None if dense is None else dense["texts"][text]["losses"])
        if cell["probe"]:
            rows = probe.measure(subject.model, subject.planted, label)
            found["probe_at"] = [{name: round(x, 5) for name, x in row.items()} for row in rows]
    return found


def compared(nll: Sequence[float], dense: Sequence[float] | None) -> dict[str, Any]:
    """Mean loss a token, and how far it is over another model's on the same windows, with the standard error."""
    mean = fmean(nll)
    found = {"losses": [round(x, 6) for x in nll], "nll": mean, "perplexity": math.exp(mean)}
    if dense is not None:
        gaps = [a - b for a, b in zip(nll, dense, strict=True)]
        found |= {"excess": fmean(gaps), "error": stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else math.inf}
    return found


def digest_of(factors: lrattn.Factors) -> str:
    """sha256 of what attention computes with: equal for the same factors under other names."""
    digest = hashlib.sha256()
    for layer in factors.layers:
        places = (n for n in (layer.chunk, layer.max_position) if n is not None)
        digest.update(repr((layer.shared, layer.rope is None, *places)).encode())
        for side in (layer.keys, layer.values):
            digest.update(repr((side.ranks, side.head_order)).encode())
            if side.formats:
                digest.update(repr(side.formats).encode())
            for x in (side.up, side.down):
                digest.update(b"none" if x is None else x.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    main()
