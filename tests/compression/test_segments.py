"""Segments in the kernels' steps: the best there are for the bytes."""

from itertools import product

import pytest
import torch
from test_bits import falling

from lrattn.compression.bits import Row
from lrattn.compression.segments import POSITION_FREE, STEPS, WIDE, formats_of, least_bytes, share_out
from lrattn.factors.formats import ERRORS, Format

LADDERS = [(2, 4, 8), (2, 8), (4,), (2, 4, 8, 16)]


def rows_of(*sizes, groups=(1,)):
    parts = [falling(n, i).sort(descending=True).values * 4.0**-i for i, n in enumerate(sizes)]
    return [Row((part,), groups[i % len(groups)]) for i, part in enumerate(parts)]


def lost_by(row, made):
    """Half of what the row's energies cost at a format."""
    (energies,) = row.parts
    bits = [b for rank, b in made.segments for _ in range(rank)]
    bits += [0] * (len(energies) - len(bits))
    return sum(e * ERRORS[b] for e, b in zip(energies.tolist(), bits, strict=True)) / 2


@pytest.mark.parametrize("ladder", LADDERS)
@pytest.mark.parametrize("rank", [16, 80, 192, 496, 512, 608])
def test_a_row_is_of_whole_steps(rank, ladder):
    """One segment of a width, the widest first, within the row; none is left out, by hand for short rows."""
    found = {made.segments for made in formats_of(rank, ladder)}
    assert len(found) == len(formats_of(rank, ladder))
    for segments in found:
        widths, ranks = [b for _, b in segments], [n for n, _ in segments]
        assert widths == sorted(set(widths), reverse=True) and set(widths) <= set(ladder) and sum(ranks) <= rank
        steps = [STEPS[b] * (2 if rank >= WIDE else 1) for b in widths]
        assert not any(n % step for n, step in zip(ranks[:-1], steps[:-1], strict=True))
        assert ranks[-1] % steps[-1] == 0 or (rank % steps[-1] and sum(ranks) == rank)
    if rank <= 192:
        for ranks in product(*(range(0, rank + 1, STEPS[b]) for b in ladder)):
            segments = tuple((n, b) for n, b in zip(ranks[::-1], ladder[::-1], strict=True) if n)
            assert (segments in found) == (0 < sum(ranks) <= rank)


@pytest.mark.parametrize("ladder", LADDERS)
@pytest.mark.parametrize("groups", [(1, 1), (2, 1)])
@pytest.mark.parametrize("nbytes", [60, 76, 100, 134, 250])
def test_no_other_segments_lose_less(nbytes, groups, ladder):
    rows = rows_of(80, 112, groups=groups)
    found = share_out(rows, nbytes, ladder)

    def size(formats):
        return sum(made.nbytes * row.groups for made, row in zip(formats, rows, strict=True))

    pairs = product(*(formats_of(len(row.parts[0]), ladder) for row in rows))
    fitting = [pair for pair in pairs if size(pair) <= nbytes]
    best = min(sum(lost_by(row, made) for row, made in zip(rows, pair, strict=True)) for pair in fitting)
    chosen = [spent.format for spent in found]
    assert size(chosen) <= nbytes and sum(spent.lost for spent in found) == pytest.approx(best)
    for row, spent in zip(rows, found, strict=True):
        assert spent.lost == pytest.approx(lost_by(row, spent.format)) and spent.ranks == (spent.format.rank,)


@pytest.mark.parametrize("sizes", [(192, 192, 64, 128), (1024, 512)])
def test_more_bytes_lose_less_and_none_are_left(sizes):
    """To the least step of any row: 16 bytes, twice that in wide rows, and a word of scales."""
    rows, before = rows_of(*sizes, groups=(2, 1)), torch.inf
    step = 20 * 2 if max(sizes) < WIDE else 36 * 2
    for nbytes in range(150, 3000, 90):
        found = share_out(rows, nbytes, POSITION_FREE)
        used = sum(spent.format.nbytes * row.groups for spent, row in zip(found, rows, strict=True))
        full = all(spent.format == Format(((n, 8),)) for spent, n in zip(found, sizes, strict=True))
        assert nbytes - step < used <= nbytes or full
        lost = sum(spent.lost for spent in found)
        assert lost < before or full
        before = lost


def test_wide_rows_lose_little_by_steps_twice_as_long():
    """As much as steps of 16, 32 and 64 do in rows half as long."""
    rows = [Row((falling(n, 3, 20 / n).sort(descending=True).values,), 1) for n in (256, 512)]
    halves, wide = (share_out([row], size, POSITION_FREE)[0] for row, size in zip(rows, (68, 132), strict=True))
    assert [(2 * n, b) for n, b in halves.format.segments] == list(wide.format.segments)


def test_too_few_bytes_are_refused():
    rows = rows_of(64, 512)
    least = least_bytes([(64, 1), (512, 1)], POSITION_FREE)
    assert least == 20 + 36 and share_out(rows, least, POSITION_FREE)
    with pytest.raises(ValueError, match=f"keep: expected {least} bytes a token or more, a step of latents a row, got"):
        share_out(rows, least - 1, POSITION_FREE)
