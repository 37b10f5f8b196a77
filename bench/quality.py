"""Quality against bytes on real models that attend on latents: every method, with and without a dense window.

python -m bench.quality [--model smollm2 ...] [--keep 0.5 ...] [--method palu ...] [--sample 0 ...] [--minutes 60]
                        [--again] [--plot-only] [--out bench/results/quality.json]

A cell is one model, calibration sample, way to make factors, kept share and dense window (bench/quality_plan.py). Cells
are kept in the JSON by their settings, measured once, the important ones first, and saved one by one: the table can be
built piece by piece. --minutes begins no cell after so many; --again measures the chosen ones anew; --plot-only
measures nothing. Tables go to stdout and, with the JSON of the repository, into docs/quality.md.

Losses of a cell and of the dense model are compared window by window: an error is the standard error of the mean
difference, of the windows at hand. It is what other windows of these texts would change, not other texts or samples.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import time
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch

import lrattn
from bench import models, probe, quality_plot, quality_table, report, texts
from bench.quality_plan import AFTER, LENGTH, PLANS, SAMPLES, Settings, cells, find, gathered, row_of
from lrattn.integrations.transformers.either import attending
from lrattn.integrations.transformers.load import read_windows
from lrattn.integrations.transformers.perplexity import losses

PATH = report.RESULTS / "quality.json"
PAGE = Path(__file__).parents[1] / "docs" / "quality.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--keep", type=float, nargs="+", help="only these of the plan")
    parser.add_argument("--method", nargs="+", choices=lrattn.methods.METHODS, help="only these of the plan")
    parser.add_argument("--sample", nargs="+", choices=SAMPLES, help="only these calibration samples of the plan")
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
        PAGE.write_text(quality_table.pasted(PAGE.read_text(), results))


def wanted(args: argparse.Namespace) -> list[Settings]:
    """The cells asked for, the important ones first; the dense model's always."""

    def asked(cell: Settings) -> bool:
        chosen = ((args.keep, "keep"), (args.method, "method"), (args.sample, "sample"))
        return cell["method"] == "dense" or all(not only or cell[name] in only for only, name in chosen)

    staged = [pair for name in args.model for pair in cells(name) if asked(pair[1])]
    changed = {} if args.windows is None else {"windows": args.windows}
    return [cell | changed for _, cell in sorted(staged, key=lambda pair: pair[0])]


def measure(wanted: Sequence[Settings], path: Path, seconds: float, *, again: bool = False) -> None:
    """Measures the cells that are not in the file, and saves after each."""
    held = report.load(path)["cells"] if path.is_file() else []
    if again:
        held = [c for c in held if all(find([c], **cell) is None for cell in wanted)]
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
            for path in subject.folder.glob(f"{subject.name}-*.factors") if again else ():
                path.unlink()
        started = time.perf_counter()
        measured = run(subject, settings, held)
        held.append({**settings, **measured, "seconds": round(time.perf_counter() - started, 1), "commit": commit})
        report.save(path, {"texts": texts.__doc__, "cells": held})


def told(cell: Settings) -> str:
    near = f", dense window {cell['recent']} + {cell['sinks']}" if cell["recent"] else ""
    sample = f", sample {cell['sample']}" if cell["sample"] else ""
    counted = " counted" if cell["counted"] else ""
    return f"{cell['model']}, {row_of(cell).label} at keep {cell['keep']}{sample}{near}{counted}"


class Subject:
    """A model, the texts as it reads them, and the moments of the sample in use. What takes long lies in a folder."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.name, self.folder = name, models.CACHE
        self.model, self.tokenizer = PLANS[name].load()
        self.held: tuple[Any, lrattn.Moments] | None = None

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
            moments=self.moments(cell["sample"], row.far),
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

    def moments(self, sample: str, far: tuple[int, int]) -> lrattn.Moments:
        """Kept by model, sample, window and what was gathered."""
        if self.held is None or self.held[0] != (sample, far):
            gather = ["metric"] if any(far) else gathered(self.name, sample)
            name = f"{self.name}-sample{sample}-far{far[0]}+{far[1]}-{'+'.join(gather)}.moments"
            self.held = None  # before the next: they are hundreds of megabytes
            moments = lrattn.calibrate(
                self.model, self.calibration(sample), gather=gather, far=far, state=self.folder / name
            )
            self.held = (sample, far), moments
        return self.held[1]


def run(subject: Subject, cell: Settings, held: list[Settings]) -> dict[str, Any]:
    """What a cell measures; or why there are no such factors."""
    if cell["method"] == "dense":
        return evaluated(subject, cell, None, None)
    dense = find(held, model=cell["model"], method="dense", windows=cell["windows"], length=cell["length"])
    subject.moments(cell["sample"], row_of(cell).far)  # what follows is timed without them
    begin = time.perf_counter()
    try:
        factors = subject.factors(cell)
    except ValueError as error:
        return {"impossible": str(error)}
    layers = factors.layers
    found = {
        "compress_seconds": round(time.perf_counter() - begin, 1),
        "factors": digest_of(factors),
        "achieved_keep": factors.keep,
        "whole_keep": factors.keep + window_share(cell),
        "key_share": sum(x.keys.width for x in layers)
        / (factors.bytes_per_token / 2),  # of the latents, what keys read
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
    return found | evaluated(subject, cell, factors, dense)


def window_share(cell: Settings) -> float:
    """Bytes of the dense window over the dense cache's, at the cell's length."""
    return (cell["recent"] + cell["sinks"]) / cell["length"]


def evaluated(
    subject: Subject, cell: Settings, factors: lrattn.Factors | None, dense: Settings | None
) -> dict[str, Any]:
    """Losses of both texts' windows, over the dense model's where there is one, and the probe."""
    label = row_of(cell).label
    found: dict[str, Any] = {"texts": {}}
    with attending(subject.model, factors, cell["recent"], cell["sinks"]):
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
        digest.update(repr((layer.shared, layer.rotated)).encode())
        for side in (layer.keys, layer.values):
            digest.update(repr((side.ranks, side.head_order)).encode())
            for x in (side.up, side.down):
                digest.update(b"none" if x is None else x.contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


if __name__ == "__main__":
    main()
