"""What lrattn gains and costs beside the caches that one would pick instead: a table and a plot from committed JSON.

python -m bench.peers    into README.md, docs/index.md and bench/results/peers.png; nothing is measured

    bytes       of a token over a dense 16-bit cache's, the dense window of 64 + 4 tokens aside, which all rows have
    loss        nats a token over the dense model's, SmolLM2-135M, Wikipedia and news (quality.json, positions.json)
    HumanEval   problems solved, of 164, and what is lost in all beside the dense cache (tasks.json), Qwen2.5-Coder-0.5B
    retrieval   answers that are right in 16,384 tokens of code (tasks.json), the same model
    decode      a dense cache's time of a step over this one's, by the longest kernel, on an H100, Llama-3.1-8B's heads,
                batch 16, 32,768 tokens [simulated] (simulated.json)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from bench import architectures, positions
from bench.compiled import simulated
from bench.evaluation.quality_plan import NEAR, find
from bench.evaluation.quantisers import QUANTISERS
from bench.quality import PAGE
from bench.quality import PATH as QUALITY
from bench.support import report
from bench.tasks.__main__ import PATH as TASKS
from bench.tasks.retrieval import LENGTHS
from bench.tasks.rows import ROWS
from bench.tasks.tables import PROBLEMS, of_task, pairs, right_of, solved

PLOT = report.RESULTS / "peers.png"
PAGES = (PAGE.parents[1] / "README.md", PAGE.with_name("index.md"))
MODEL = "smollm2"  # of the losses
HEAD_DIM = 64  # of both models
LEAST = 0.0005  # nats that the plot tells from nothing
Cell = dict[str, Any]


@dataclass(frozen=True)
class Peer:
    """task: its row of bench.tasks. position: its row of bench.positions, or quality: its method or quantiser and bits
    in quality.json. bits: of its packed rows in simulated.json. keep: where no cell says it."""

    name: str
    engines: str
    architectures: str
    task: str = ""
    position: str = ""
    quality: tuple[str, int | None] | None = None
    bits: list[int] | None = None
    keep: float | None = None


OURS = "transformers, vLLM"
KIVI = "transformers, dequantised at every step"
TURBO = "vLLM, Hadamard for random"
PEERS = (
    Peer("dense, 16 bits", "all", "all", "dense", keep=1.0),
    Peer("**lrattn**, default", OURS, "OWN", "lrattn 1/8", "lrattn, 2 bits", bits=[8, 4, 2]),
    Peer("**lrattn**, one row, 1/8", OURS, "OWN", "lrattn 1/8, one row", "lrattn shared, 2 bits"),
    Peer("**lrattn**, one row, 1/16", OURS, "OWN", "lrattn 1/16, one row", "lrattn shared, 1 bit"),
    Peer("KIVI-like, 4 bits", KIVI, "those of transformers", "kivi 4 bits", quality=("kivi-32", 4)),
    Peer("KIVI-like, 2 bits", KIVI, "those of transformers", "kivi 2 bits", quality=("kivi-32", 2)),
    Peer("TurboQuant-like, 4 bits", TURBO, "those of vLLM", "rotated 4 bits", quality=("rotated", 4)),
    Peer("TurboQuant-like, 3 bits", TURBO, "those of vLLM", "rotated 3 bits", quality=("rotated", 3)),
    Peer("Palu, as published", "its own code", "Llama, Mistral", quality=("palu", None), keep=0.5),
    Peer("ReCalKV, as published", "its own code, simulated", "Llama, Mistral", quality=("recalkv", None), keep=0.5),
)
HEAD = ("cache", "bytes", "loss", "HumanEval", "retrieval, 16K", "decode", "runs in", "architectures")


def main() -> None:
    made = table()
    print(made)
    plot()
    for page in PAGES:
        page.write_text(pasted(page))


def pasted(page: Path) -> str:
    """The page with what is between its marks made anew: <!-- bench.peers: table --> .. <!-- end -->."""
    return report.pasted(page.read_text(), report.marks("bench.peers"), {"table": table()})


def loss_of(peer: Peer) -> float | None:
    """Mean of both texts, nats a token over the dense model's."""
    if peer.position:
        cell = positions.find(report.load(positions.PATH)["cells"], model=MODEL, row=peer.position, kind="0")
        return fmean(positions.over_windows(cell, "excess", text)[0] for text in ("wikipedia", "news"))
    if peer.quality is None:
        return None
    name, bits = peer.quality
    near = {"model": MODEL, "recent": NEAR[0], "sinks": NEAR[1], "counted": False, "length": 1024}
    own = {"method": name, "ranks": "fisher", "keep": peer.keep, "bits": 16, "refine": 0}
    cell = find(
        report.load(QUALITY)["cells"],
        **near,
        **(own if bits is None else {"quantiser": name, "bits": bits, "keep": 1.0}),
    )
    return None if cell is None else fmean(x["excess"] for x in cell["texts"].values())


def task_of(peer: Peer, task: str) -> tuple[Cell | None, Cell | None]:
    """Its cell and the dense cache's."""
    found = of_task(report.load(TASKS)["cells"], task)
    return found.get(peer.task), found.get("dense")


def share_of(peer: Peer) -> float:
    if peer.keep is not None:
        return peer.keep
    (row,) = (row for row in ROWS if row.name == peer.task)
    return row.keep or QUANTISERS[row.quantiser].bits_per_number(row.bits, HEAD_DIM) / 16


def programs(peer: Peer) -> str:
    cell, dense = task_of(peer, "humaneval")
    if cell is None or dense is None:
        return "-"
    lost, won = pairs(solved(cell), solved(dense))
    return f"{len(cell['solved'])}" if cell is dense else f"{len(cell['solved'])} ({won - lost:+d})"


def retrieval(peer: Peer) -> str:
    cell, _ = task_of(peer, "retrieval")
    return "-" if cell is None else f"{fmean(right_of(cell['answers'][str(LENGTHS[-1])])):.0%}"


def decode(peer: Peer) -> str:
    if peer.keep == 1.0:
        return "1"
    rows = report.load(simulated.PATH)["rows"]
    own = {"model": "Llama-3.1-8B", "bits": peer.bits, "batch": 16, "tokens": 32768}
    found = [r for r in rows if own.items() <= r.items()]
    return f"{found[0]['dense_us'] / found[0]['simulated_us']:.1f} [simulated]" if found else "-"


def lines() -> list[tuple[str, ...]]:
    tried = {row["architecture"] for row in report.load(architectures.PATH)["rows"]}
    found = []
    for peer in PEERS:
        share, loss = share_of(peer), loss_of(peer)
        shown = f"{share:.3f}".rstrip("0").rstrip(".")
        what = f"{len(tried)} tried" if peer.architectures == "OWN" else peer.architectures
        lost = "" if peer.keep == 1.0 else "-" if loss is None else f"{loss:.3f}"
        found.append((peer.name, shown, lost, programs(peer), retrieval(peer), decode(peer), peer.engines, what))
    return found


def table() -> str:
    rows: Sequence[Sequence[str]] = (HEAD, ["---"] * len(HEAD), *lines())
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot() -> None:
    """The loss, and problems of HumanEval that are left where more than one row has them, against bytes."""
    given = [(peer, peer.name.replace("*", ""), share_of(peer)) for peer in PEERS[1:]]
    dense = task_of(PEERS[0], "humaneval")[0]
    counts = {peer.name: len(cell["solved"]) for peer, *_ in given if (cell := task_of(peer, "humaneval")[0])}
    panels = 2 if dense is not None and len(counts) > 1 else 1
    figure, axes = plt.subplots(1, panels, figsize=(5.6 * panels + 1, 4.2), squeeze=False)
    for peer, name, share in given:
        colour = {"l": "C0", "K": "C1", "T": "C2"}.get(name[0], "0.5")
        below = name.startswith("Palu")
        for axis, y in zip(axes[0], (loss_of(peer), counts.get(peer.name)), strict=False):
            if y is not None:
                y = y if axis is not axes[0][0] else max(y, LEAST)
                axis.plot(share, y, "o", color=colour, ms=7)
                axis.annotate(name, (share, y), xytext=(7, -9 if below else 4), textcoords="offset points", fontsize=8)
    if panels > 1:
        axes[0][1].axhline(len(dense["solved"]), color="0.4", lw=0.8)
        axes[0][1].annotate("dense", (0.66, len(dense["solved"])), fontsize=8, va="bottom", ha="right")
        axes[0][1].set(ylabel=f"HumanEval, solved of {PROBLEMS}, Qwen2.5-Coder-0.5B", ylim=(0, None))
    axes[0][0].set(ylabel=f"loss, nats a token, SmolLM2-135M\n({LEAST:g} and less at the bottom)", yscale="log")
    axes[0][0].set_ylim(LEAST * 0.8, 0.15)
    for axis in axes[0]:
        axis.set(xlabel="bytes of a token over a dense cache's", xlim=(0, 0.7))
        axis.grid(lw=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(PLOT, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
