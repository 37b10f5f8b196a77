"""The methods as they are now against the cells of bench/results/quality.json: one of each, on the same windows.

python -m bench.evaluation.method_check [--method palu ...] [--minutes 60] [--again] [--table-only]

What a cell measured by its own commit is measured again by this one: the same calibration text and kept share, on its
first windows of each text. Losses are compared window by window. A method is as before if its mean loss of each text
differs by no more than two standard errors: of that difference over the windows, or of the cell, as docs/quality.md has
it behind ±. Where latents are packed, any change of the last bits of factors draws their rounding anew, and all of the
cell's windows are compared. Cells are kept in the JSON one by one.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import lrattn
from bench import quality
from bench.evaluation.quality_plan import (
    APART,
    JOINT,
    LENGTH,
    PALU,
    PLANS,
    RECALKV,
    RIDE,
    UNTRAINED,
    Row,
    Settings,
    at_bits,
    find,
    row_of,
    settings_of,
)
from bench.support import report, texts
from lrattn.integrations.transformers.either import attending

PATH = report.RESULTS / "method_check.json"
WINDOWS = 3  # of each text, of the cell's six, where latents are plain
CELLS: tuple[tuple[str, Row, float], ...] = (
    *(("smollm2", row, 0.5) for row in (PALU, JOINT, APART, RIDE, RECALKV)),
    *(("smollm2", Row(name, "uniform"), 0.5) for name in ("svd", "kq-svd")),
    *(("smollm2", Row(name), 0.5) for name in ("svd-llm", "recalkv-hsr", "cskv", "eigen", "asvd")),
    *(("smollm2", row, 0.5) for row in (Row("lorc", "condition"), Row("kv-heads"), UNTRAINED, Row("matryoshka-pca"))),
    ("smollm2", Row("think"), 0.7),
    *(("smollm2", row, 0.25) for row in at_bits("auto", Row("lrattn-rotated"), Row("lrattn-channels"))),
    *(("smollm2", row, 0.125) for row in at_bits("auto", JOINT)),
    *(("smollm2-mha", Row(f"recalkv-{name}", "fisher"), 0.3) for name in ("neither", "hsr", "ovc", "greedy")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", nargs="+", choices=lrattn.methods.METHODS, help="only these")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no cell after so many")
    parser.add_argument("--again", action="store_true", help="measure the chosen ones anew")
    parser.add_argument("--table-only", action="store_true", help="measure nothing")
    args = parser.parse_args()
    if not args.table_only:
        chosen = [cell for cell in CELLS if args.method is None or cell[1].method in args.method]
        measure(chosen, PATH, 60 * args.minutes, again=args.again)
    print(table(report.load(PATH)))


def before(name: str, row: Row, keep: float, held: list[Settings]) -> Settings:
    """The cell in the JSON of bench.quality. Raises: LookupError without one."""
    plain = {"model": name, "sample": "0", "recent": 0, "length": LENGTH, "keep": keep}
    cell = find(held, **plain, **settings_of(row))
    if cell is None or "texts" not in cell:
        raise LookupError(f"cells: expected {row.label} at keep {keep} of {name} in {quality.PATH}, got none")
    return cell


def measure(chosen: Sequence[tuple[str, Row, float]], path: Path, seconds: float, *, again: bool = False) -> None:
    held, begin, commit = quality.held_in(quality.PATH), time.monotonic(), report.commit()
    rows = report.load(path)["rows"] if path.is_file() else []
    subject: quality.Subject | None = None
    for n, (name, row, keep) in enumerate(chosen, 1):
        own = {"model": name, **settings_of(row), "keep": keep}
        found, cell = find(rows, **own), before(name, row, keep, held)
        if found is not None and not again and len(found["texts"]["news"]["losses"]) == windows(cell):
            continue
        if time.monotonic() - begin > seconds:
            print(f"stopped with {len(chosen) - n + 1} cells left", flush=True)
            return
        print(f"cell {n} of {len(chosen)}: {name}, {row.label} at keep {keep}", flush=True)
        if subject is None or subject.name != name:
            subject = quality.Subject(name)
        rows = [r for r in rows if r is not found]
        rows.append(own | once(subject, cell, rows) | {"commit": commit})
        report.save(path, {"texts": texts.__doc__, "rows": rows})


def windows(cell: Settings) -> int:
    return cell["windows"] if row_of(cell).packed else WINDOWS


def once(subject: quality.Subject, cell: Settings, rows: list[Settings]) -> dict[str, Any]:
    """A cell measured again, beside what it says itself; equal factors under another name are not scored twice."""
    subject.moments(cell["sample"], row_of(cell))  # what follows is timed without them
    begin = time.perf_counter()
    factors = subject.factors(cell)
    found = {"factors": quality.digest_of(factors), "keep_before": cell["achieved_keep"], "keep_now": factors.keep}
    same = find(rows, model=cell["model"], factors=found["factors"])
    if same is None:
        few = cell | {"windows": windows(cell), "probe": False}
        same = quality.evaluated(subject, few, attending(subject.model, factors, 0, 0), None)
    return found | {
        "texts": {text: compared(same["texts"][text]["losses"], cell["texts"][text]) for text in texts.TEXTS},
        "commit_before": cell["commit"],
        "seconds": round(time.perf_counter() - begin, 1),
    }


def compared(losses: Sequence[float], old: dict[str, Any]) -> dict[str, Any]:
    """Perplexities of a text, and nats a token that it loses more than before; noise: the cell's own error."""
    before = old["losses"][: len(losses)]
    gaps = [now - then for now, then in zip(losses, before, strict=True)]
    return {
        "losses": list(losses),
        "before": math.exp(fmean(before)),
        "now": math.exp(fmean(losses)),
        "difference": fmean(gaps),
        "error": stdev(gaps) / math.sqrt(len(gaps)),
        "noise": old["error"],
    }


def as_before(row: Settings) -> bool:
    return all(abs(t["difference"]) <= 2 * max(t["error"], t["noise"]) for t in row["texts"].values())


def table(results: dict[str, Any]) -> str:
    """A line for each cell, in the order of CELLS."""
    lines = [
        f"perplexity before and now, on {WINDOWS} windows of a text, packed on 6; difference: nats a token more",
        "that are lost now, ± its standard error over these; noise: the standard error of the cell, as ± in its table",
        "",
        f"{'':<27}{'keep':>6}" + "".join(f"{text:>11}{'now':>9}{'difference':>17}{'noise':>7}" for text in texts.TEXTS),
    ]
    rows = [find(results["rows"], model=name, **settings_of(row), keep=keep) for name, row, keep in CELLS]
    for row in (row for row in rows if row is not None):
        cells = "".join(
            f"{number(t['before']):>11}{number(t['now']):>9}{t['difference']:z9.4f} ±{t['error']:.4f}{t['noise']:>7.3f}"
            for t in row["texts"].values()
        )
        lines.append(f"{row_of(row).label:<27}{row['keep']:>6}{cells}{'' if as_before(row) else '  beyond'}")
    own = {row["model"] for row in rows if row} - {"smollm2"}
    notes = [f"{row_of(r).label}: of {PLANS[r['model']].title}" for r in rows if r and r["model"] in own]
    return "\n".join([*lines, *([""] if notes else []), *notes])


def number(x: float) -> str:
    return f"{x:.2f}" if x < 1e4 else f"{x:.0f}"


if __name__ == "__main__":
    main()
