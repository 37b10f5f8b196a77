"""A byte budget -> the bits of every latent: the segments of every row, over layers, keys and values at once.

The latents of a row are sorted and uncorrelated: a transform coder's. Latent i of energy lam_i costs lam_i c(b) at b
bits, c the quantiser's mean squared error at a variance of 1 (formats.ERRORS; c(0) = 1), so that a cut is the case
b = 0. With c free to change at every latent the best is reverse water-filling (Cover and Thomas, Elements of
Information Theory, 10.3.3). Here a part of a row has one segment of a width at most, the widest first, in whole steps:
what fills the 16 bytes that a run is loaded by, or several times that. All choices of a row that lose less than any
smaller one are few, and the best for all rows together is found exactly, row by row, for every number of bytes (dynamic
programming).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import gcd, inf
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrattn.compression.ranks import LayerShape
from lrattn.factors.formats import ERRORS, STEPS, WIDTHS, WORD, Format, words_of

Bits = int | str | Sequence[int]
AUTO = (2, 4, 8)  # widths of bits="auto": 16 bits are never the best for a latent
TYPICAL = 4  # bits of the latents that have any, about: what ranks are estimated from before spectra are known
WIDE = 512  # latents: from here on steps are twice as long, and longer yet from 2048 on


@dataclass(frozen=True, eq=False)
class Row:
    """Latents that one format is for.

    Args:
        parts: energies of consecutive stretches of latents, [n] descending each, summed over the groups; n are
            multiples of 16. A shared row of which keys read a part only has two, others one.
        groups: how many share the format.
    """

    parts: tuple[Tensor, ...]
    groups: int


class Spent(NamedTuple):
    """What a row was given."""

    format: Format
    ranks: tuple[int, ...]  # latents of each part that have bits
    lost: float  # half of what the energies cost at these bits: nats a token, where energies are twice that


def ladder_of(bits: Bits) -> tuple[int, ...]:
    """Widths to choose from, ascending: "auto" is 8, 4 and 2, a number that one.

    Raises: ValueError for anything else.
    """
    given: Any = AUTO if bits == "auto" else bits
    chosen = tuple(given) if isinstance(given, Collection) and not isinstance(given, str) else (given,)
    if not chosen or any(not isinstance(b, int) or b not in WIDTHS for b in chosen):  # True is none of them
        raise ValueError(f"bits: expected 'auto', one of {WIDTHS} or some of them, got {bits!r}")
    return tuple(sorted(set(chosen)))


def share_held(keep: float, ladder: Sequence[int]) -> float:
    """Of all latents, those that have bits, about."""
    return min(1.0, keep * 16 / min(max(TYPICAL, ladder[0]), ladder[-1]))


@cache
def formats_of(rank: int, ladder: tuple[int, ...]) -> tuple[Format, ...]:
    """What a part of this full rank, a multiple of 16, can be: the fewest bytes of codes first, then of scales.

    Segments are of whole steps. Where the full rank is not, the last one may also be all that is left of the part.
    """
    times = 1 if rank < WIDE else max(2, 2 ** (rank // WIDE).bit_length() // 2)  # 32 to 64 steps of 8 bits at most
    steps = [(bits, step, rank % step > 0) for bits in sorted(ladder, reverse=True) for step in (STEPS[bits] * times,)]
    return tuple(sorted(map(Format, filter(None, _segments(rank, steps))), key=lambda made: (made.run, made.scales)))


def _segments(left: int, steps: Sequence[tuple[int, int, bool]]) -> Iterator[tuple[tuple[int, int], ...]]:
    """Ways to give none, some or all of the latents left to segments, in turn.

    steps: of each, its bits, latents in a step, and whether it may also take all that are left.
    """
    if not steps:
        yield ()
        return
    (bits, step, ends), *others = steps
    for rank in range(0, left + 1, step):
        own = ((rank, bits),) if rank else ()
        yield from (own + behind for behind in _segments(left - rank, others))
    if ends and left % step:
        yield ((left, bits),)


def least_bytes(rows: Iterable[tuple[Sequence[int], int]], ladder: tuple[int, ...]) -> int:
    """What the least segments of all rows take, each of (full ranks of its parts, groups)."""
    total = 0
    for ranks, groups in rows:
        parts = [formats_of(rank, ladder)[0] for rank in ranks]
        total += groups * (sum(part.run for part in parts) + words_of(sum(part.scales for part in parts)))
    return total


def check_least(shapes: Sequence[LayerShape], keep: float, nbytes: int, ladder: tuple[int, ...]) -> None:
    """Raises ValueError if there are too few bytes for the least segment of every row."""
    if nbytes < (least := least_bytes((row for shape in shapes for row in shape.rows), ladder)):
        need = least / sum(2 * shape.dense for shape in shapes)
        raise ValueError(f"keep: expected at least {need:.3f}, a step of latents a row, got {keep}")


def share_out(rows: Sequence[Row], nbytes: int, ladder: tuple[int, ...]) -> list[Spent]:
    """The formats that lose least of all whose bytes, of all groups, are at most `nbytes` a token.

    Every part of a row has a step at least. ladder: widths to choose from.
    Raises: ValueError if a step in each takes more.
    """
    choices = [_choices(row, ladder) for row in rows]
    sizes = [[spent.format.nbytes * row.groups for spent in own] for own, row in zip(choices, rows, strict=True)]
    unit = gcd(*(WORD * row.groups for row in rows))
    room = min(nbytes, sum(own[-1] for own in sizes)) // unit
    best, taken = torch.zeros(max(room, 0) + 1, dtype=torch.float64), list[Tensor]()  # with at most so many units
    for own, size in zip(choices, sizes, strict=True):
        lost, chosen = torch.full_like(best, inf), torch.zeros(len(best), dtype=torch.int32)
        for i, (spent, begin) in enumerate(zip(own, size, strict=True)):
            enough = slice(begin // unit, None)
            after = best[: max(len(best) - begin // unit, 0)] + spent.lost
            better = after < lost[enough]
            lost[enough], chosen[enough] = after.where(better, lost[enough]), chosen[enough].masked_fill(better, i)
        best = lost
        taken.append(chosen)
    if best[-1] == inf:
        least = least_bytes([([len(part) for part in row.parts], row.groups) for row in rows], ladder)
        raise ValueError(f"keep: expected {least} bytes a token or more, a step of latents a row, got {nbytes}")
    left, found = len(best) - 1, []
    for own, size, chosen in reversed(list(zip(choices, sizes, taken, strict=True))):
        i = int(chosen[left])
        found.append(own[i])
        left -= size[i] // unit
    return found[::-1]


def _choices(row: Row, ladder: tuple[int, ...]) -> list[Spent]:
    """Of a row, those formats that lose less than all that are smaller; the fewest bytes first."""
    made = []
    for parts in product(*(_worthwhile(part, ladder) for part in row.parts)):
        run, scales = sum(own.run for own, _ in parts), sum(own.scales for own, _ in parts)
        made.append((run + words_of(scales), sum(lost for _, lost in parts), parts))
    found, least = [], inf
    for _, lost, parts in sorted(made, key=lambda choice: choice[:2]):
        if lost < least:
            segments = sum((own.segments for own, _ in parts), ())
            found.append(Spent(Format(segments), tuple(own.rank for own, _ in parts), lost))
            least = lost
    return found


def _worthwhile(energies: Tensor, ladder: tuple[int, ...]) -> list[tuple[Format, float]]:
    """Of a part, the formats that lose less than all with fewer bytes of codes, or as many and fewer scales, and what
    they lose: words of scales never differ by what a step of codes takes."""
    beyond = [*energies.flip(0).cumsum(0).flip(0).tolist(), 0.0]  # of the latents from each on
    found, least = [], inf
    for made in formats_of(len(energies), ladder):
        at, lost = 0, 0.0
        for rank, bits in made.segments:
            lost += (beyond[at] - beyond[at + rank]) * ERRORS[bits]
            at += rank
        lost = (lost + beyond[at]) / 2
        if lost < least:
            found.append((made, lost))
            least = lost
    return found
