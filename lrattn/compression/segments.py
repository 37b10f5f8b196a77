"""A byte budget -> the segments of every row whose latents queries meet: as many latents at each width as kernels read
in one step, or several times as many.

A row has one segment of a width at most, the widest first: its latents fall in energy. All choices of a row that lose
less than any smaller one are few, and the best for all rows together is found exactly, row by row, for every number of
bytes (dynamic programming). Energies and errors are those of bits.py, where blocks of 16 latents choose alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from math import gcd, inf

import torch
from torch import Tensor

from lrattn.compression.bits import Row, Spent
from lrattn.compression.ranks import LayerShape
from lrattn.factors.formats import ALIGNMENT, ERRORS, Format

STEPS = {16: 16, 8: 16, 4: 32, 2: 64}  # latents of a width that kernels read at once, in rows below WIDE
WIDE = 512  # latents of a row, at full rank: from here on steps are twice as long
POSITION_FREE = (2, 4, 8)  # widths of bits="auto": 16 bits are never the best for a latent


@cache
def formats_of(rank: int, ladder: tuple[int, ...]) -> tuple[Format, ...]:
    """What a row of this full rank, a multiple of 16, can be: the fewest bytes first.

    Segments are of whole steps. Where the full rank is not, the last one may also be all that is left of the row.
    """
    wide = 1 if rank < WIDE else 2
    steps = [(bits, step, rank % step > 0) for bits in sorted(ladder, reverse=True) for step in (STEPS[bits] * wide,)]
    return tuple(sorted(map(Format, filter(None, _segments(rank, steps))), key=lambda made: made.nbytes))


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


def least_bytes(rows: Iterable[tuple[int, int]], ladder: tuple[int, ...]) -> int:
    """What the least segments of all rows take, each of (full rank, groups)."""
    return sum(formats_of(rank, ladder)[0].nbytes * groups for rank, groups in rows)


def check_least(shapes: Sequence[LayerShape], keep: float, nbytes: int, ladder: tuple[int, ...]) -> None:
    """Raises ValueError if there are too few bytes for the least segment of every row."""
    rows = [(rank, n) for shape in shapes for rank, n in zip(shape.full_ranks, shape.groups, strict=True) if n]
    if nbytes < (least := least_bytes(rows, ladder)):
        need = least / sum(2 * shape.dense for shape in shapes)
        raise ValueError(f"keep: expected at least {need:.3f}, a step of latents a row, got {keep}")


def share_out(rows: Sequence[Row], nbytes: int, ladder: tuple[int, ...]) -> list[Spent]:
    """The formats that lose least of all whose runs, of all groups, take at most `nbytes` a token.

    Args:
        rows: of one part each. ladder: widths to choose from.

    Raises: ValueError if a step in each row takes more.
    """
    choices = [_choices(row, ladder) for row in rows]
    unit = gcd(*(ALIGNMENT * row.groups for row in rows))
    best, taken = torch.zeros(max(nbytes // unit, 0) + 1, dtype=torch.float64), list[Tensor]()
    for own, row in zip(choices, rows, strict=True):
        lost = torch.full((len(own), len(best)), inf, dtype=torch.float64)  # with at most so many bytes
        for i, spent in enumerate(own):
            size = spent.format.nbytes * row.groups // unit
            lost[i, size:] = best[: max(len(best) - size, 0)] + spent.lost
        best, chosen = lost.min(0)
        taken.append(chosen)
    if best[-1] == inf:
        least = least_bytes([(len(row.parts[0]), row.groups) for row in rows], ladder)
        raise ValueError(f"keep: expected {least} bytes a token or more, a step of latents a row, got {nbytes}")
    left, found = len(best) - 1, []
    for own, row, chosen in reversed(list(zip(choices, rows, taken, strict=True))):
        found.append(own[int(chosen[left])])
        left -= found[-1].format.nbytes * row.groups // unit
    return found[::-1]


def _choices(row: Row, ladder: tuple[int, ...]) -> list[Spent]:
    """Of a row, those formats that lose less than all that are smaller; the fewest bytes first."""
    (energies,) = row.parts
    beyond = [*energies.flip(0).cumsum(0).flip(0).tolist(), 0.0]  # of the latents from each on
    found: list[Spent] = []
    for made in formats_of(len(energies), ladder):
        at, lost = 0, 0.0
        for rank, bits in made.segments:
            lost += (beyond[at] - beyond[at + rank]) * ERRORS[bits]
            at += rank
        spent = Spent(made, (at,), (lost + beyond[at]) / 2)
        if found and found[-1].format.nbytes == made.nbytes and spent.lost < found[-1].lost:
            found.pop()
        if not found or spent.lost < found[-1].lost:
            found.append(spent)
    return found
