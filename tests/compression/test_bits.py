"""Bits of latents: the best there are for the bytes, exactly spent."""

from itertools import product, zip_longest

import pytest
import torch

from lrattn.compression.bits import Row, ladder_of, share_held, spend
from lrattn.factors.formats import ERRORS, WIDTHS


def falling(n, seed, decay=0.02):
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(n, generator=g, dtype=torch.float64) * 0.2 + 1) * torch.exp(-decay * torch.arange(n))


def rows_of(*sizes, groups=1):
    return [Row((falling(n, i).sort(descending=True).values * 4.0**-i,), groups) for i, n in enumerate(sizes)]


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("nbytes", [100, 333, 500, 1000])
def test_the_bytes_are_spent_to_a_block(nbytes, groups):
    rows = rows_of(128, 192, 64, groups=groups)
    found, whole = (spend(rows, most, (2, 4, 8)) for most in (nbytes * groups, 10**9))
    used, most = (groups * sum(spent.format.nbytes for spent in own) for own in (found, whole))
    assert nbytes * groups - 2 * 16 * groups < used <= nbytes * groups or used == most
    # What is left pays for no step of any block.
    assert nbytes * groups - used < 4 * groups or found[0].format.segments == ((128, 8),)


@pytest.mark.parametrize("nbytes", [40, 60, 92, 140])
def test_no_other_bits_lose_less(nbytes):
    """Against every choice for two small rows."""
    rows = rows_of(64, 48)
    blocks = [row.parts[0].view(-1, 16).sum(1).tolist() for row in rows]
    best = {0: 0.0}  # bytes -> least loss, row by row
    for sums in blocks:
        grown = {}
        for bits in product((0, 2, 4, 8), repeat=len(sums)):
            if not bits[0] or list(bits) != sorted(bits, reverse=True):
                continue
            loss = sum(e * ERRORS[b] for e, b in zip(sums, bits, strict=True)) / 2
            for used, before in best.items():
                at = used + 2 * sum(bits)
                grown[at] = min(grown.get(at, torch.inf), before + loss)
        best = grown
    budget, got = nbytes - 8, sum(spent.lost for spent in spend(rows, nbytes, (2, 4, 8)))  # less two scales
    least, finer = (min(loss for used, loss in best.items() if used <= most) for most in (budget, budget - 16))
    assert least <= got <= least + max(map(max, blocks)) * (ERRORS[0] - ERRORS[2]) / 2
    assert got <= finer  # a block fewer loses no less


def test_what_is_foreseen_is_the_sum_over_latents():
    """Half of what the row's energies cost at the bits of its format, which fall along it."""
    rows = rows_of(128, 64, 256)
    for row, spent in zip(rows, spend(rows, 250, WIDTHS[::-1]), strict=True):
        widths = [b for _, b in spent.format.segments]
        assert widths == sorted(set(widths), reverse=True) and spent.ranks == (spent.format.rank,)
        bits = [b for rank, b in spent.format.segments for _ in range(rank)]
        lost = zip_longest(row.parts[0].tolist(), bits, fillvalue=0)
        assert spent.lost == pytest.approx(sum(e * ERRORS[b] for e, b in lost) / 2)


@pytest.mark.parametrize(
    ("energies", "groups", "nbytes", "ladder", "segments", "used"),
    [
        (torch.ones(128, dtype=torch.float64), 1, 68, (2, 4, 8), ((128, 4),), 68),  # all of one size
        (falling(256, 0), 2, 136, (8,), ((64, 8),), 68),  # the rest is left out
        (falling(64, 0), 1, 96, (16,), ((48, 16),), 96),  # no scale
    ],
)
def test_what_a_row_alone_is_given(energies, groups, nbytes, ladder, segments, used):
    (spent,) = spend([Row((energies,), groups)], nbytes, ladder)
    assert spent.format.segments == segments and spent.format.nbytes == used


def test_two_parts_of_a_row_each_have_a_block():
    parts = falling(64, 0), falling(64, 1) * 1e-9
    (spent,) = spend([Row(parts, 1)], 60, (2, 4, 8))
    assert spent.ranks[0] >= 16 and spent.ranks[1] == 16 and sum(spent.ranks) == spent.format.rank
    assert spent.format.segments[-1] == (16, 2)


def test_too_few_bytes_are_refused():
    with pytest.raises(ValueError, match=r"keep: expected 16 bytes a token or more, a block of 16 a row, got 15"):
        spend(rows_of(64, 64), 15, (2, 4))


def test_ladders():
    assert ladder_of("auto") == (2, 4, 8, 16) and ladder_of(4) == (4,) and ladder_of((8, 2, 8)) == (2, 8)
    for bad in (3, True, (), "4", (4, 5), (True,)):
        with pytest.raises(ValueError, match=r"bits: expected 'auto', one of \(16, 8, 4, 2\) or some of them, got"):
            ladder_of(bad)


@pytest.mark.parametrize(
    ("keep", "ladder", "share"),
    [(0.25, (16,), 0.25), (0.125, (2, 4, 8, 16), 0.5), (0.5, (2, 4, 8), 1.0), (0.25, (8,), 0.5), (0.1, (2,), 0.8)],
)
def test_the_share_that_has_bits(keep, ladder, share):
    assert share_held(keep, ladder) == pytest.approx(share)
