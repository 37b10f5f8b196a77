"""How much text a calibration needs, and of which kind: the default at an eighth of the bytes, on three kinds of text.

python -m bench.calibration [--model smollm2 ...] [--out bench/results/calibration.json]

A cell is a model and what its factors were calibrated on: windows of 1,024 tokens of Wikipedia, of news, of Python code
(support/texts.py), or of the last and the first in turn. Of each text's other half: `excess`, the loss over the dense
model's on the same WINDOWS windows, in nats a token, with its standard error; and `residual`, what the latents lose of
its keys and values (lrattn.residual), beside what they lose of the text they were calibrated on. Cells are kept in the
JSON and measured once.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from torch import Tensor

import lrattn
from bench.evaluation.quality_plan import LENGTH, PLANS
from bench.quality import PAGE, held_in, updated
from bench.support import models, report, texts
from lrattn.integrations.transformers.either import attending
from lrattn.integrations.transformers.load import read_windows
from lrattn.integrations.transformers.perplexity import losses

PATH = report.RESULTS / "calibration.json"
TEXTS = texts.TEXTS | {"code": texts.code}
WINDOWS = 4
MIXED = "wikipedia and code"
ROWS: dict[str, tuple[tuple[str, int], ...]] = {  # of each model: a text and how many windows of it
    "smollm2": (
        *(("wikipedia", n) for n in (16, 4, 1)),
        ("code", 16),
        (MIXED, 16),
        *(("wikipedia", n) for n in (2, 8, 24)),
        ("news", 16),
    ),
    "qwen2.5-coder": (("wikipedia", 6), ("code", 12)),
}

Cell = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--out", type=Path, default=PATH)
    args = parser.parse_args()
    for name in args.model:
        measure(name, args.out)
    cells = held_in(args.out)
    print(table(cells))
    if args.out == PATH:
        PAGE.write_text(pasted(PAGE.read_text(), cells))


def calibration(tokenizer: Any, text: str, count: int) -> Tensor:
    """[count, LENGTH]"""
    if text != MIXED:
        return read_windows(tokenizer, TEXTS[text]("calibration"), LENGTH, count)
    halves = (calibration(tokenizer, name, count // 2) for name in ("wikipedia", "code"))
    return torch.stack(list(chain(*zip(*halves, strict=True))))


def measure(name: str, path: Path) -> None:
    """The cells of a model that are not in the file."""
    held = [(cell["model"], cell["text"], cell["windows"]) for cell in held_in(path)]
    missing = [row for row in ROWS[name] if (name, *row) not in held]
    if not missing:
        return
    torch.manual_seed(0)
    model, tokenizer = PLANS[name].load()
    folder, commit = models.kept(), report.commit()
    read = {text: read_windows(tokenizer, TEXTS[text]("evaluation"), LENGTH, WINDOWS) for text in TEXTS}
    dense = {text: losses(model, windows, f"dense, {text}") for text, windows in read.items()}
    for text, count in missing:
        batches = calibration(tokenizer, text, count).split(1)
        state = folder / f"calibration-{name}-{text.replace(' ', '-')}-{count}.moments"
        factors = lrattn.compress(model, batches, state=state)
        cell: Cell = {"model": name, "text": text, "windows": count, "tokens": count * LENGTH, "keep": factors.keep}
        cell |= {"residual": factors.residual, "texts": {}, "commit": commit}
        for other, windows in read.items():
            with attending(model, factors):
                own = losses(model, windows, f"{text} x {count}, {other}")
            more = [a - b for a, b in zip(own, dense[other], strict=True)]
            cell["texts"][other] = {
                "dense": round(fmean(dense[other]), 5),
                "excess": round(fmean(more), 5),
                "error": round(stdev(more) / math.sqrt(len(more)), 5),
                "residual": lrattn.residual(model, factors, windows.split(1)),
            }
        with updated(path) as cells:
            cells.append(cell)


def table(cells: Sequence[Cell]) -> str:
    """A line a cell: of each text the excess, and the residual over the calibration's own."""
    line = "{:<14} {:<20} {:>8}  " + "  ".join(["{:>15} {:>6}"] * len(TEXTS))
    lines = [line.format("", "calibrated on", "tokens", *chain(*((text, "times") for text in TEXTS)))]
    for name, rows in ROWS.items():
        for row in sorted(rows):
            cell = next((c for c in cells if (c["model"], c["text"], c["windows"]) == (name, *row)), None)
            if cell is not None:
                found = (
                    (f"{x['excess']:.4f} ±{x['error']:.4f}", f"{x['residual'] / cell['residual']:.2f}")
                    for x in (cell["texts"][text] for text in TEXTS)
                )
                lines.append(line.format(name, cell["text"], f"{cell['tokens']:,}", *chain(*found)))
    return "\n".join(lines) if len(lines) > 1 else report.NONE


def pasted(page: str, cells: Sequence[Cell]) -> str:
    """The page with what is between its marks made anew: <!-- bench.calibration: table --> .. <!-- end -->."""
    return report.pasted(page, report.marks("bench.calibration"), {"table": f"```text\n{table(cells)}\n```"})


if __name__ == "__main__":
    main()
