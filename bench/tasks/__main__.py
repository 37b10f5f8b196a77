"""Tasks with answers on compressed caches, beside a dense cache and quantised ones: Qwen2.5-Coder-0.5B-Instruct.

python -m bench.tasks [--task humaneval ...] [--row NAME ...] [--plot-only] [--out bench/results/tasks.json]

    humaneval      programs written on the cache, and whether their tests pass (humaneval.py)
    retrieval      pass keys, pairs and parameters of functions in 4K, 8K and 16K tokens of code (retrieval.py)
    turns          ten turns of a chat on one cache, and questions about each (turns.py)
    continuation   1,000 tokens that the dense model wrote, scored token by token (continuation.py)

A cell is a task on a row of rows.py. Cells are kept in the JSON and measured once; several processes may do so.
Programs, texts read and chats are by a bfloat16 model, what compares distributions by a float32 one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from bench.quality import PAGE, held_in, updated
from bench.support import report
from bench.tasks import continuation, humaneval, retrieval, tables, turns
from bench.tasks.rows import ROWS, Row, Subject
from lrattn.models.states import evaluating

PATH = report.RESULTS / "tasks.json"
KINDS = ("lrattn 1/8, calibrated on code", "lrattn 1/8, calibrated on Wikipedia")
FIRST = ("dense", "lrattn 1/8", "lrattn 1/16, one row", "kivi 2 bits")


def programs(subject: Subject, row: Row) -> dict[str, Any]:
    using = subject.using(row)
    with using.inside:
        return humaneval.measure(subject.model, subject.tokenizer, using.cache, row.name)


TASKS: dict[str, tuple[Callable[[Subject, Row], dict[str, Any]], torch.dtype, tuple[str, ...]]] = {
    "humaneval": (
        programs,
        torch.bfloat16,
        (*FIRST, "lrattn 1/8, one row", *KINDS, "rotated 3 bits", "kivi 4 bits", "rotated 4 bits"),
    ),
    "retrieval": (retrieval.measure, torch.bfloat16, FIRST),
    "turns": (turns.measure, torch.bfloat16, FIRST),
    "continuation": (
        continuation.measure,
        torch.float32,
        tuple(row.name for row in ROWS),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--row", nargs="+", choices=[row.name for row in ROWS], help="only these")
    parser.add_argument("--plot-only", action="store_true", help="measure nothing")
    parser.add_argument("--out", type=Path, default=PATH)
    args = parser.parse_args()
    if not args.plot_only:
        for task in args.task:
            measure(task, args.row, args.out)
    cells = held_in(args.out)
    print("\n\n".join(table(cells) for table in tables.TABLES.values()))
    tables.plot(cells, args.out.with_suffix(".png"))
    if args.out == PATH:
        PAGE.write_text(tables.pasted(PAGE.read_text(), cells))


def measure(task: str, only: list[str] | None, path: Path) -> None:
    """The cells of a task that are not in the file, the important ones first."""
    run, dtype, names = TASKS[task]
    by_name = {row.name: row for row in ROWS}
    wanted = [by_name[name] for name in names if only is None or name in only]
    commit, subject = report.commit(), None
    for row in wanted:
        named = {"task": task, "row": row.name}
        if any(named.items() <= cell.items() for cell in held_in(path)):
            continue
        subject = subject or Subject(dtype)
        begin = time.perf_counter()
        with evaluating(subject.model), torch.no_grad():
            found = run(subject, row)
        told = {"bytes": subject.bytes_per_token(row) / subject.dense_bytes, "commit": commit}
        cell = named | told | {"seconds": round(time.perf_counter() - begin, 1)} | found
        with updated(path) as held:
            held.append(cell)


if __name__ == "__main__":
    main()
