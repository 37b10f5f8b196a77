"""Bits of latents: the best segments there are for the bytes."""

from itertools import product
from time import process_time

import pytest
import torch

from lrattn.compression.bits import (
    AUTO,
    WIDE,
    Row,
    check_least,
    formats_of,
    ladder_of,
    least_bytes,
    share_held,
    share_out,
)
from lrattn.compression.ranks import LayerShape
from lrattn.factors.formats import ERRORS, STEPS, WIDTHS, Format

LADDERS = [(2, 4, 8), (2, 8), (4,), (2, 4, 8, 16)]


def falling(n, seed, decay=0.02):
    g = torch.Generator().manual_seed(seed)
    drawn = (torch.rand(n, generator=g, dtype=torch.float64) * 0.2 + 1) * torch.exp(-decay * torch.arange(n))
    return drawn.sort(descending=True).values


def rows_of(*sizes, groups=(1,)):
    """Each smaller than the one before; of two parts where two sizes are given."""
    return [
        Row(tuple(falling(n, 10 * i + j) * 4.0 ** -(i + j) for j, n in enumerate(parts)), groups[i % len(groups)])
        for i, parts in enumerate((size,) if isinstance(size, int) else size for size in sizes)
    ]


def lost_by(row, parts):
    """Half of what the row's energies cost at a format of each part."""
    lost = 0.0
    for energies, made in zip(row.parts, parts, strict=True):
        bits = [b for rank, b in made.segments for _ in range(rank)]
        bits += [0] * (len(energies) - len(bits))
        lost += sum(e * ERRORS[b] for e, b in zip(energies.tolist(), bits, strict=True)) / 2
    return lost


def joined(parts):
    return Format(sum((made.segments for made in parts), ()))


def parts_of(row, spent, ladder):
    """The formats that its parts were given: what its ranks say."""
    found, left = [], list(spent.format.segments)
    for energies, rank in zip(row.parts, spent.ranks, strict=True):
        own = []
        while sum(n for n, _ in own) < rank:
            own.append(left.pop(0))
        found.append(Format(own))
        assert found[-1].rank == rank and found[-1] in formats_of(len(energies), ladder)
    assert not left
    return found


@pytest.mark.parametrize("ladder", LADDERS)
@pytest.mark.parametrize("rank", [16, 80, 192, 496, 512, 608])
def test_a_part_is_of_whole_steps(rank, ladder):
    """One segment of a width, the widest first, within the part; none is left out, by hand for short ones."""
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


@pytest.mark.parametrize("rank", [16, 192, 608, 1024, 4096])
def test_segments_of_whole_steps_have_no_padding(rank):
    for made in formats_of(rank, WIDTHS):
        whole = all(n % STEPS[bits] == 0 for n, bits in made.segments)
        assert not whole or made.run == sum(n * bits for n, bits in made.segments) // 8


@pytest.mark.parametrize("sizes", [(80, 112), ((48, 64), 80), ((32, 80), (64, 16))])
@pytest.mark.parametrize("ladder", LADDERS)
@pytest.mark.parametrize("groups", [(1, 1), (2, 1)])
@pytest.mark.parametrize("nbytes", [82, 100, 134, 250])
def test_no_other_segments_lose_less(nbytes, groups, ladder, sizes):
    """Of all that parts of rows can be, on their own: whatever number of scales they have together."""
    rows = rows_of(*sizes, groups=groups)
    least = least_bytes([([len(part) for part in row.parts], row.groups) for row in rows], ladder)
    if nbytes < least:
        with pytest.raises(ValueError, match="a step of latents a row"):
            share_out(rows, nbytes, ladder)
        return
    sized = []  # of each row: bytes -> the least that is lost
    for row in rows:
        own = {}
        for parts in product(*(formats_of(len(part), ladder) for part in row.parts)):
            size = joined(parts).nbytes * row.groups
            own[size] = min(own.get(size, torch.inf), lost_by(row, parts))
        sized.append(own)
    best = min(a + b for (n, a), (m, b) in product(sized[0].items(), sized[1].items()) if n + m <= nbytes)
    found = share_out(rows, nbytes, ladder)
    assert sum(spent.format.nbytes * row.groups for spent, row in zip(found, rows, strict=True)) <= nbytes
    assert sum(spent.lost for spent in found) == pytest.approx(best)
    for row, spent in zip(rows, found, strict=True):
        assert spent.lost == pytest.approx(lost_by(row, parts_of(row, spent, ladder)))


@pytest.mark.parametrize("decays", [(0.02, 0.02), (0.1, 0.01), (0.005, 0.15)])
def test_no_other_segments_of_two_parts_lose_less_to_a_word(decays):
    """Four scales take a word more than three."""
    row = Row(tuple(falling(n, n, decay) for n, decay in zip((96, 128), decays)), 1)
    known = [
        (joined(parts).nbytes, lost_by(row, parts)) for parts in product(*(formats_of(len(x), AUTO) for x in row.parts))
    ]
    for nbytes in range(36, 240, 4):
        (spent,) = share_out([row], nbytes, AUTO)
        assert spent.format.nbytes <= nbytes and spent.lost == pytest.approx(min(x for n, x in known if n <= nbytes))


@pytest.mark.parametrize("sizes", [(192, 192, 64, 128), (1024, 512), ((128, 128), (96, 160)), ((512, 640), 64)])
def test_more_bytes_lose_less_and_none_are_left(sizes):
    """To the least step of any row: 16 bytes, twice that in wide parts, and two words of scales."""
    rows, before = rows_of(*sizes, groups=(2, 1)), torch.inf
    longest = max(len(part) for row in rows for part in row.parts)
    step = (16 if longest < WIDE else 32) * 2 + 16
    most = sum(8 * -(-sum(map(len, row.parts)) // 8) * row.groups for row in rows)
    for nbytes in range(200, 3000, 90):
        found = share_out(rows, nbytes, AUTO)
        used = sum(spent.format.nbytes * row.groups for spent, row in zip(found, rows, strict=True))
        full = used >= most
        assert nbytes - step < used <= nbytes or full
        lost = sum(spent.lost for spent in found)
        assert lost < before or full
        before = lost
        for row, spent in zip(rows, found, strict=True):
            assert len(row.parts) > 1 or sum(bits < 16 for _, bits in spent.format.segments) <= 3


def test_wide_rows_lose_little_by_steps_twice_as_long():
    """As much as steps of 16, 32 and 64 do in rows half as long."""
    rows = [Row((falling(n, 3, 20 / n),), 1) for n in (256, 512)]
    halves, wide = (share_out([row], size, AUTO)[0] for row, size in zip(rows, (68, 132), strict=True))
    assert [(2 * n, b) for n, b in halves.format.segments] == list(wide.format.segments)


def test_the_widest_rows_are_shared_out_in_seconds():
    """Of all four widths, in one part and in two."""
    begin = process_time()
    rows = rows_of(4096, (2048, 2048), 4096)
    found = share_out(rows, 6000, WIDTHS[::-1])
    assert sum(spent.format.nbytes for spent in found) <= 6000 and process_time() - begin < 20


def test_each_part_of_a_row_has_a_step():
    """However little it is worth, and none of what the other part is not worth."""
    (spent,) = share_out([Row((falling(64, 0), falling(64, 1) * 1e-9), 1)], 68, AUTO)
    assert spent.ranks[0] > 16 and spent.ranks[1] == 64 and spent.format.segments[-1] == (64, 2)  # one step of 2 bits
    (spent,) = share_out([Row((falling(64, 0) * 1e-9, falling(64, 1)), 1)], 68, AUTO)
    assert spent.format.segments[0] == (64, 2) and spent.ranks[0] == 64


@pytest.mark.parametrize(
    ("energies", "groups", "nbytes", "ladder", "segments", "used"),
    [
        (torch.ones(128, dtype=torch.float64), 1, 68, (2, 4, 8), ((128, 4),), 68),  # all of one size
        (falling(256, 0), 2, 136, (8,), ((64, 8),), 68),  # the rest is left out
        (falling(64, 0), 1, 96, (16,), ((48, 16),), 96),  # no scale
        (falling(48, 0), 1, 30, (4,), ((32, 4),), 20),  # 16 more would take 16 bytes more
    ],
)
def test_what_a_row_alone_is_given(energies, groups, nbytes, ladder, segments, used):
    (spent,) = share_out([Row((energies,), groups)], nbytes, ladder)
    assert spent.format.segments == segments and spent.format.nbytes == used


def test_too_few_bytes_are_refused():
    rows = rows_of(64, 512, (32, 64))
    least = least_bytes([((64,), 1), ((512,), 1), ((32, 64), 1)], AUTO)
    assert least == 20 + 36 + 36 and share_out(rows, least, AUTO)
    with pytest.raises(ValueError, match=f"keep: expected {least} bytes a token or more, a step of latents a row, got"):
        share_out(rows, least - 1, AUTO)


@pytest.mark.parametrize("ladder", [*LADDERS, (8, 16)])
@pytest.mark.parametrize(
    "shape, steps",
    [
        (LayerShape(4, 32, 4, 4), 2),
        (LayerShape(8, 128, 4, 4, shared=True), 2 * 2),
        (LayerShape(8, 128, 4, 4, shared=True, parts=2), 2 * 2 * 2),
        (LayerShape(2, 128, 2, 2, shared=True, parts=2), 2),
        (LayerShape(1, 72, 1, 1, shared=True, parts=2), 2),
    ],
)
def test_what_is_too_little_is_told_before_any_work(shape, steps, ladder):
    """The share it names is enough, for parts of a row that are as long as can be, too; a byte less is refused.

    steps: of 16 bytes, one a part, two where a part has 512 latents or more."""
    dense = 2 * shape.dense
    least = least_bytes(shape.rows, ladder)
    assert least == 16 * steps + 4 * sum(groups for _, groups in shape.rows)
    with pytest.raises(ValueError, match=rf"keep: expected at least {least / dense:.3f}, a step of latents a row, got"):
        check_least([shape], 0.01, least - 1, ladder)
    check_least([shape], 0.01, least, ladder)
    for shorter in (0, 16):
        ranks = [([max(rank - shorter, 16) for rank in parts], groups) for parts, groups in shape.rows]
        share_out([Row(tuple(falling(n, n) for n in parts), groups) for parts, groups in ranks], least, ladder)


def test_ladders():
    assert ladder_of("auto") == (2, 4, 8) and ladder_of(4) == (4,) and ladder_of((8, 2, 8)) == (2, 8)
    for bad in (3, True, (), "4", (4, 5), (True,)):
        with pytest.raises(ValueError, match=r"bits: expected 'auto', one of \(16, 8, 4, 2\) or some of them, got"):
            ladder_of(bad)


@pytest.mark.parametrize(
    ("keep", "ladder", "share"),
    [(0.25, (16,), 0.25), (0.125, (2, 4, 8, 16), 0.5), (0.5, (2, 4, 8), 1.0), (0.25, (8,), 0.5), (0.1, (2,), 0.8)],
)
def test_the_share_that_has_bits(keep, ladder, share):
    assert share_held(keep, ladder) == pytest.approx(share)
