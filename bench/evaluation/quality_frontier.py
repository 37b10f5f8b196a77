"""The frontier of bench.quality: loss against bytes, by fewer latents and by fewer bits."""

from __future__ import annotations

from dataclasses import replace
from math import hypot
from statistics import fmean
from typing import NamedTuple

from bench.evaluation.quality_plan import CONTEXTS, LENGTH, PLANS, Row, Settings, row_of

CONTEXT = CONTEXTS[-1]  # where the bytes of a dense window are counted
PLACES = {False: "without a dense window", True: f"with a dense window, its bytes counted at {CONTEXT // 1024}K tokens"}


class Point(NamedTuple):
    """A cell. share: its bytes over the dense cache's. excess: mean of the texts, in nats a token; error: of that mean,
    one standard error."""

    cell: Settings
    row: Row
    share: float
    excess: float
    error: float

    @property
    def told(self) -> str:
        return f"{self.row.label} {self.excess:.3f} ±{self.error:.3f}"


def family(row: Row) -> str:
    """What a curve is of: rows that differ in their bytes only."""
    return row.quantiser or replace(row, far=(0, 0)).label


def points(cells: list[Settings], name: str, near: bool) -> list[Point]:
    """Of a model, without or with a dense window, from the fewest bytes. Factors of lrattn's methods are made for one
    of the two, and left out of the other."""
    rows = {row for b in PLANS[name].frontier for row in b.rows}
    own = {"model": name, "length": LENGTH, "counted": False}
    found = []
    for cell in (c for c in cells if own.items() <= c.items() and "texts" in c and bool(c["recent"]) == near):
        row = row_of(cell)
        made_for = any(row.far) if row.method.startswith("lrattn") else near
        if cell["sample"] in ("", "0") and row in rows and made_for == near:
            held = cell["bytes_at"][str(CONTEXT)] if near else cell["bytes_per_token"]
            texts = cell["texts"].values()
            error = hypot(*(t["error"] for t in texts)) / len(texts)
            share = held / cell["dense_bytes_per_token"]
            found.append(Point(cell, row, share, fmean(t["excess"] for t in texts), error))
    return sorted(found, key=lambda p: p.share)


def is_frontier(cell: Settings) -> bool:
    """Measured, and of what the frontier adds to the other cells."""
    return "texts" in cell and row_of(cell).packed


def words(cells: list[Settings]) -> str:
    """A line for each model and window: from which bytes on quantised dense keys and values lose least."""
    lines = []
    for name, plan in PLANS.items():
        for near, place in PLACES.items():
            if said := verdict(points(cells, name, near)):
                lines.append(f"* {plan.title}, {place}: {said}")
    return "\n".join(lines)


def verdict(found: list[Point]) -> str:
    """Each quantised point that no other beats with fewer bytes, against the best low rank of no more bytes than it.
    They differ where their losses do by more than two standard errors, as if of different windows."""
    quantised = [p for p in found if p.row.quantiser and p.row.bits != 16]
    low_rank = [p for p in found if not p.row.quantiser]
    best = [p for i, p in enumerate(quantised) if all(p.excess < q.excess for q in quantised[:i])]
    pairs = [(p, rival(p, low_rank)) for p in best]
    if not pairs or not low_rank:
        return ""
    won = [least is None or less(p, least) for p, least in pairs]
    lost = [least is not None and less(least, p) for p, least in pairs]
    said = []
    if any(lost):
        p, least = pairs[max(i for i, x in enumerate(lost) if x)]
        said.append(f"up to {at(p)} low rank loses less ({least.told} against {p.told})")
    first = next((i for i in range(len(won)) if all(won[i:])), None)
    if first is None:
        said.append("plain quantisation wins at no bytes that were measured")
    else:
        p, least = pairs[first]
        other = least.told if least else "no low rank of so few bytes"
        said.append(f"from {at(p)} on plain quantisation loses less ({p.told} against {other})")
    return "; ".join(said) + "."


def less(p: Point, q: Point) -> bool:
    return q.excess - p.excess > 2 * hypot(p.error, q.error)


def rival(p: Point, low_rank: list[Point]) -> Point | None:
    """The least loss within a point's bytes."""
    return min((q for q in low_rank if q.share <= p.share), key=lambda q: q.excess, default=None)


def at(p: Point) -> str:
    return f"{p.share:.0%} of the dense bytes ({16 * p.share:.1f} bits a number)"
