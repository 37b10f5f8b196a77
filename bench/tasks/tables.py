"""Tables and a plot of the cells: each row beside the dense cache, pair by pair."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench.support import report
from bench.tasks.continuation import BIN, NEW
from bench.tasks.rows import DENSE, ROWS

Cell = dict[str, Any]
PROBLEMS = 164
SHORT = {"lrattn 1/8, calibrated on Wikipedia": "lrattn 1/8, Wikipedia"}
COLOURS = {"lrattn": "C0", "kivi": "C1", "rotated": "C2", "dense": "0.3"}


def of_task(cells: Sequence[Cell], task: str) -> dict[str, Cell]:
    """By row, the dense cache's first; none without it."""
    found = {cell["row"]: cell for cell in cells if cell["task"] == task}
    return {row.name: found[row.name] for row in ROWS if row.name in found} if DENSE.name in found else {}


def pairs(own: Sequence[bool], dense: Sequence[bool]) -> tuple[int, int]:
    """How many the dense cache has right and the other not, and the other way round."""
    both = list(zip(own, dense, strict=True))
    return sum(d and not o for o, d in both), sum(o and not d for o, d in both)


def net_error(lost: int, won: int, count: int) -> float:
    """Standard error of lost - won among `count` pairs, of other questions like these."""
    return math.sqrt(max(lost + won - (lost - won) ** 2 / count, 0.0))


def net(own: Sequence[bool], dense: Sequence[bool]) -> list[str]:
    """Lost, won, and what is lost in all with an interval of 95 %."""
    lost, won = pairs(own, dense)
    spread = 1.96 * net_error(lost, won, len(dense))
    return [str(lost), str(won), f"{lost - won:+d} ({lost - won - spread:+.0f} .. {lost - won + spread:+.0f})"]


def lined(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns, the first flush left."""
    if not rows:
        return report.NONE
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = []
    for row in (head, *rows):
        first, *others = (
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join((first, *others)).rstrip())
    return "\n".join(lines)


def share(cell: Cell) -> str:
    return f"{cell['bytes']:.4f}".rstrip("0").rstrip(".")


def programs(cells: Sequence[Cell]) -> str:
    found = of_task(cells, "humaneval")
    if not found:
        return report.NONE
    dense, rows = solved(found[DENSE.name]), []
    for name, cell in found.items():
        more = ["", "", ""] if name == DENSE.name else net(solved(cell), dense)
        rows.append([name, share(cell), f"{len(cell['solved'])}", *more])
    return lined(["HumanEval, of 164", "bytes", "solved", "lost", "won", "net lost (95 %)"], rows)


def solved(cell: Cell) -> list[bool]:
    return [f"HumanEval/{i}" in cell["solved"] for i in range(PROBLEMS)]


def retrieval(cells: Sequence[Cell]) -> str:
    """By length: right of each kind, and of all beside the dense cache."""
    found = of_task(cells, "retrieval")
    if not found:
        return report.NONE
    rows, lengths = [], [n for n in found[DENSE.name]["answers"] if n.isdigit()]
    for name, cell in found.items():
        for length in lengths:
            own, dense = (x["answers"][length] for x in (cell, found[DENSE.name]))
            kinds = [f"{sum(right_of(own, kind))}/{len(right_of(own, kind))}" for kind in KINDS]
            whole, other = right_of(own), right_of(dense)
            more = ["", "", ""] if name == DENSE.name else net(whole, other)
            rows.append([name, share(cell), f"{int(length):,}", *kinds, f"{fmean(whole):.1%}", *more])
    head = ["retrieval", "bytes", "tokens", *KINDS, "all", "lost", "won", "net lost (95 %)"]
    return lined(head, rows)


KINDS = ("keys", "pairs", "functions")


def right_of(answers: Sequence[Mapping[str, Any]], kind: str | None = None) -> list[bool]:
    return [q["right"] for q in answers if kind is None or q["kind"] == kind]


def turns(cells: Sequence[Cell]) -> str:
    """Right of the numbers said in each turn, over the chats."""
    found = of_task(cells, "turns")
    if not found:
        return report.NONE
    rows, count = [], len(found[DENSE.name]["right"][0])
    dense = [x for chat in found[DENSE.name]["right"] for x in chat]
    for name, cell in found.items():
        own = [x for chat in cell["right"] for x in chat]
        by_turn = [f"{sum(chat[i] for chat in cell['right'])}" for i in range(count)]
        more = ["", "", ""] if name == DENSE.name else net(own, dense)
        rows.append([name, share(cell), *by_turn, f"{fmean(own):.0%}", *more])
    head = ["said in turn, of 10", "bytes", *(str(i + 1) for i in range(count)), "all", "lost", "won"]
    return lined([*head, "net lost (95 %)"], rows)


def continuation(cells: Sequence[Cell]) -> str:
    """Divergence and agreement by position, means over the texts; the first place where a greedy text would leave."""
    found = of_task(cells, "continuation")
    if not found:
        return report.NONE
    shown = (0, NEW // BIN // 2 - 1, NEW // BIN - 1)
    head = ["KL(dense || cache), nats", "bytes", *(f"to {BIN * (i + 1)}" for i in shown), "mean", "of max", "agree"]
    rows = []
    for name, cell in found.items():
        if name == DENSE.name:
            continue
        by_text = [fmean(row) for row in cell["divergence"]]
        kl = [f"{fmean(row[i] for row in cell['divergence']):.4f}" for i in shown]
        agree = fmean(fmean(row) for row in cell["agreement"])
        first = median(cell["first"][: len(cell["first"]) // 2])
        rows.append(
            [name, share(cell), *kl, f"{fmean(by_text):.4f}", f"{max(by_text):.4f}", f"{agree:.1%}", f"{first:.0f}"]
        )
    return lined([*head, "leaves at"], rows)


TABLES: dict[str, Callable[[Sequence[Cell]], str]] = {
    "humaneval": programs,
    "retrieval": retrieval,
    "turns": turns,
    "continuation": continuation,
}


def pasted(page: str, cells: Sequence[Cell]) -> str:
    """The page with everything between its marks made anew: <!-- bench.tasks: NAME --> .. <!-- end -->."""
    made = {name: f"```text\n{table(cells)}\n```" for name, table in TABLES.items()}
    return report.pasted(page, report.marks("bench.tasks"), made)


def colour(name: str) -> str:
    return COLOURS[name.split()[0]]


def plot(cells: Sequence[Cell], path: Path) -> None:
    """Problems lost against bytes; retrieval at the longest text by distance; divergence by position."""
    draws = {"humaneval": _programs, "retrieval": _retrieval, "continuation": _continuation}
    draws = {task: draw for task, draw in draws.items() if len(of_task(cells, task)) > 1}
    if not draws:
        return
    figure, axes = plt.subplots(1, len(draws), figsize=(4.7 * len(draws), 4.2), squeeze=False)
    for axis, draw in zip(axes[0], draws.values(), strict=True):
        draw(axis, cells)
        axis.grid(lw=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _programs(axis: Any, cells: Sequence[Cell]) -> None:
    found, taken = of_task(cells, "humaneval"), list[float]()
    for name, cell in found.items():
        if name == DENSE.name:
            continue
        lost, won = pairs(solved(cell), solved(found[DENSE.name]))
        spread = 1.96 * net_error(lost, won, PROBLEMS)
        at = cell["bytes"] + 0.012 * sum(abs(x - cell["bytes"]) < 1e-3 for x in taken)  # side by side
        taken.append(cell["bytes"])
        axis.errorbar(at, lost - won, spread, fmt="o", color=colour(name), capsize=3, ms=6)
        label = SHORT.get(name, name)
        axis.annotate(label, (at, lost - won), xytext=(6, 4), textcoords="offset points", fontsize=8)
    axis.axhline(0, color="0.4", lw=0.8)
    axis.set(xlabel="bytes of a token over a dense cache's", ylabel="problems lost, won ones taken off", xlim=(0, 0.4))
    axis.set_title("HumanEval, 164 problems", fontsize=10)


def _retrieval(axis: Any, cells: Sequence[Cell], parts: int = 4) -> None:
    found = of_task(cells, "retrieval")
    for name, cell in found.items():
        length = max((n for n in cell["answers"] if n.isdigit()), key=int)
        answers = sorted(cell["answers"][length], key=lambda q: q["distance"])
        step = -(-len(answers) // parts)
        groups = [answers[i : i + step] for i in range(0, len(answers), step)]
        at = [fmean(q["distance"] for q in group) for group in groups]
        style = {"color": colour(name), "ls": "--" if name.startswith("lrattn 1/16") else "-"}
        axis.plot(at, [fmean(right_of(group)) for group in groups], "o", label=name, ms=5, **style)
    axis.set(ylim=(0, 1), xlabel="tokens between what is asked for and the question", ylabel="answers that are right")
    axis.set_title("retrieval in 16,384 tokens of code", fontsize=10)
    axis.legend(fontsize=8, frameon=False)


def _continuation(axis: Any, cells: Sequence[Cell]) -> None:
    found = {name: cell for name, cell in of_task(cells, "continuation").items() if name != DENSE.name}
    for name, cell in found.items():
        if "no window" not in name:
            means = [fmean(row[i] for row in cell["divergence"]) for i in range(NEW // BIN)]
            at = [BIN * (i + 0.5) for i in range(NEW // BIN)]
            style = {"1/8": "-", "1/4": "-.", "1/16,": "--", "2": ":", "3": "--", "4": "-"}.get(name.split()[1], "-")
            axis.plot(at, means, style, color=colour(name), label=SHORT.get(name, name))
    if found:
        axis.set_yscale("log")
        axis.legend(fontsize=7, frameon=False)
    axis.set(xlabel="tokens written", ylabel="KL(dense || cache), nats")
    axis.set_title("1,000 tokens of the dense model's own", fontsize=10)
