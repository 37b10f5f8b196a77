"""A byte budget -> the bits of every latent: one reverse water-filling over layers, keys, values and widths.

The latents of a row are sorted and uncorrelated: a transform coder's. Latent i of energy lam_i costs lam_i c(b) at b
bits, c the quantiser's mean squared error at a variance of 1 (formats.ERRORS; c(0) = 1), so that a cut is the case
b = 0. Blocks of 16 latents climb the ladder of widths, each time the block whose next width saves most a byte: c is
convex in b, so that no other choice of the same bytes loses less, to one block. Classical reverse water-filling
(Cover and Thomas, Elements of Information Theory, 10.3.3) with the quantiser's own curve for the ideal one.

This is for rows whose keys are rebuilt. Those that queries meet are of longer segments: segments.py.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby, pairwise
from typing import Any, NamedTuple

from torch import Tensor

from lrattn.factors.formats import ERRORS, WIDTHS, Format
from lrattn.factors.shapes import RANK_STEP

Bits = int | str | Sequence[int]
TYPICAL = 4  # bits of the latents that have any, about: what ranks are estimated from before spectra are known


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

    @cached_property
    def blocks(self) -> list[list[float]]:
        """Energies of blocks of 16 latents, part by part."""
        return [part.view(-1, RANK_STEP).sum(1).tolist() for part in self.parts]


class Spent(NamedTuple):
    """What a row was given."""

    format: Format
    ranks: tuple[int, ...]  # latents of each part that have bits
    lost: float  # half of what the energies cost at these bits: nats a token, where energies are twice that


def ladder_of(bits: Bits) -> tuple[int, ...]:
    """Widths to choose from, ascending: "auto" is all of them, a number that one.

    Raises: ValueError for anything else.
    """
    given: Any = WIDTHS if bits == "auto" else bits
    chosen = tuple(given) if isinstance(given, Collection) and not isinstance(given, str) else (given,)
    if not chosen or any(not isinstance(b, int) or b not in WIDTHS for b in chosen):  # True is none of them
        raise ValueError(f"bits: expected 'auto', one of {WIDTHS} or some of them, got {bits!r}")
    return tuple(sorted(set(chosen)))


def share_held(keep: float, ladder: Sequence[int]) -> float:
    """Of all latents, those that have bits, about."""
    return min(1.0, keep * 16 / min(max(TYPICAL, ladder[0]), ladder[-1]))


def spend(rows: Sequence[Row], nbytes: int, ladder: Sequence[int]) -> list[Spent]:
    """A format for each row: all runs of all groups take at most `nbytes` a token, and less than a block below it.

    Every part of a row has one block at least. A row of two parts is charged for scales of all widths of both, which
    it may not need.
    Raises: ValueError if that is too much.
    """
    scale = 0 if ladder[0] == 16 else Format(((RANK_STEP, ladder[0]),)).nbytes - RANK_STEP * ladder[0] // 8
    levels = (0, *ladder)

    def cost(i: int, n: int) -> int:
        """Bytes of a block's step to level n, in row i."""
        return rows[i].groups * RANK_STEP * (levels[n] - levels[n - 1]) // 8

    left = nbytes - sum(len(row.parts) * (row.groups * scale + cost(i, 1)) for i, row in enumerate(rows))
    if left < 0:
        raise ValueError(f"keep: expected {nbytes - left} bytes a token or more, a block of 16 a row, got {nbytes}")
    at: dict[tuple[int, int, int], int] = {}  # level of each block
    steps = []  # what each saves a byte: of one block ever less
    for i, row in enumerate(rows):
        for p, part in enumerate(row.blocks):
            for j, energy in enumerate(part):
                at[i, p, j] = 0 if j else 1
                for n, (low, high) in enumerate(pairwise(levels), 1):
                    steps.append((-energy * (ERRORS[low] - ERRORS[high]) / cost(i, n), (i, p, j), n))
    for _, block, n in sorted(steps):
        if n == at[block] + 1 and cost(block[0], n) <= left:
            left -= cost(block[0], n)
            at[block] = n
    found = iter(at.values())
    return [_spent(row, [[levels[next(found)] for _ in part] for part in row.blocks]) for row in rows]


def _spent(row: Row, widths: list[list[int]]) -> Spent:
    """With blocks of these widths: those of no bits are left out."""
    segments = [(RANK_STEP * len(list(run)), bits) for part in widths for bits, run in groupby(filter(None, part))]
    ranks = tuple(RANK_STEP * sum(map(bool, part)) for part in widths)
    blocks = zip(chain(*widths), chain(*row.blocks), strict=True)
    return Spent(Format(tuple(segments)), ranks, sum(energy * ERRORS[bits] for bits, energy in blocks) / 2)
