"""Rows as kernels load them: in pieces of so many latents, or of so many halfwords of a packed segment."""

from functools import cache
from itertools import accumulate

import triton
from torch import Tensor

from lrattn.factors.formats import ALIGNMENT, words_of
from lrattn.factors.operands import Keys, KeySizes, Values, ValueSizes
from lrattn.factors.shapes import round_up

Pieces = tuple[tuple[int, ...], ...]  # of a row, what kernels/packed.py names
next_power_of_2 = cache(triton.next_power_of_2)
ANY = 1 << 30
PLANES = 64  # halfwords of a piece whose planes are operands
MOST_COLUMNS = 256  # of values in one pass: sums for 16 rows are half of a thread's registers
MOST_SCALES = 7  # of values in one pass: with the sum of p they are the columns of one product


@cache
def segments(side: KeySizes | ValueSizes) -> tuple[tuple[int, int], ...]:
    """Bits and latents of each segment of a row, the most of any group; a plain row is one of 0 bits. Those that no key
    of a shared row reads are left out."""
    found = tuple(zip(side.packed[::2], side.packed[1::2], strict=True)) or ((0, side.rank),)
    if not side.even:
        return found
    begins = accumulate((rank for _, rank in found), initial=0)
    return tuple(own for own, begin in zip(found, begins, strict=False) if begin < side.rank)


@cache
def powers(n: int, widest: int, least: int = 16) -> tuple[int, ...]:
    """n in powers of two of `least` to `widest`, the largest first; together they are at least n."""
    whole, rest = (widest,) * (n // widest), n % widest
    if not rest:
        return whole
    first = max(1 << (rest.bit_length() - 1), least)
    return *whole, first, *(() if rest <= first else (max(least, next_power_of_2(rest - first)),))


@cache
def pieces(side: KeySizes | ValueSizes, widest: int, joined: bool = False) -> Pieces:
    """All of a row, in pieces of at most `widest` columns or halfwords. joined: of columns, of packed rows too, whose
    planes are side by side in one operand."""
    found, column, start, latent, scale, count = list[tuple[int, ...]](), 0, 0, 0, 0, max(len(side.packed) // 2, 1)
    for n, (bits, rank) in enumerate(segments(side)):
        held, first = rank * bits // 16 if bits else rank, 0
        if joined and bits:
            sizes = powers(held, widest * bits // 16, least=bits)
        else:
            sizes = powers(held, min(widest, 16 * bits or widest))  # of 256 columns at most
        for i, size in enumerate(sizes):
            ends = int(i == 0), int(i == len(sizes) - 1)
            found.append((n, bits, first, size, column, scale, start, latent, held, *ends, count))
            first, column = first + size, column + size * (16 // bits if bits else 1)
        start, latent, scale = start + round_up(2 * held, ALIGNMENT), latent + rank, scale + (0 < bits < 16)
    return tuple(found)


@cache
def streamed(side: KeySizes | ValueSizes, size: int) -> Pieces:
    """One piece of each segment of a row, to go along it."""
    return tuple((*p[:3], size, *p[4:]) for p in pieces(side, ANY) if p[2] == 0)


@cache
def parts(side: ValueSizes) -> tuple[Pieces, ...]:
    """Packed values in runs of pieces that one pass takes; of whole segments where one fits."""
    found = list[list[tuple[int, ...]]]()
    for piece in pieces(side, PLANES):
        own = (*(found[-1] if found else ()), piece)
        if not found or width(own) > MOST_COLUMNS or len({p[5] for p in own if p[1] < 16}) > MOST_SCALES:
            found.append([])
        found[-1].append(piece)
    return tuple(tuple((*p[:9], int(i == 0 or p[0] != own[i - 1][0]), *p[10:]) for i, p in enumerate(own))
                 for own in found)  # fmt: skip


@cache
def width(row: Pieces) -> int:
    """Columns of all operands of a row."""
    return sum(size * (16 // bits if bits else 1) for _, bits, _, size, *_ in row)


@cache
def columns(side: KeySizes | ValueSizes) -> int:
    """Columns of all operands of a packed row, or the rank of a plain one: what a launch is chosen by."""
    return width(pieces(side, PLANES)) if side.packed else side.rank


@cache
def words(side: KeySizes | ValueSizes) -> int:
    """Bytes of a token's words of scales, of all groups."""
    return side.groups * words_of(sum(bits < 16 for bits in side.packed[::2]))


def strides(cache: Tensor, side: Keys | Values) -> tuple[int, ...]:
    """Of a cache: from page to page, row to row and, in packed pages, from words to words behind all their rows."""
    sizes = side.sizes
    return (cache.stride(0), sizes.runs, words(sizes)) if sizes.packed else cache.stride()
