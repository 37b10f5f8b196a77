"""Packed latents: bytes, round trips, the quantiser's rule, and what a format refuses."""

from itertools import product

import packing
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrattn.factors.formats import ERRORS, LAYOUT, WIDTHS, Format, table, uniform, widest

MIXED = Format(((16, 16), (32, 8), (48, 4), (64, 2)))
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
FORMATS = st.lists(st.tuples(st.integers(1, 9).map(lambda n: 16 * n), st.sampled_from(WIDTHS)), min_size=1, max_size=7)
SMALLEST, LARGEST = 2.0**-22, 240.0  # scales


def latents(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def through(own, z, dtype=torch.float32):
    """What a format gives back."""
    return own.decode(*own.encode(z), dtype)


def back(z, bits, dtype=torch.float32):
    return through(uniform(z.shape[-1], bits), z, dtype)


def parts_of(own):
    """Of each segment: bits and its latents."""
    at, found = 0, []
    for rank, bits in own.segments:
        found.append((bits, slice(at, at + rank)))
        at += rank
    return found


def test_bytes_are_codes_scales_and_padding():
    assert MIXED.rank == 160 and MIXED.run == 32 + 32 + 32 + 16  # 24 bytes at 4 bits take 32
    assert MIXED.words == 4 and MIXED.nbytes == MIXED.run + 4  # three scales and a zero
    six = Format(((16, 8), (16, 4), (16, 2), (16, 8), (16, 4), (16, 2)))
    assert six.run == 6 * 16 and six.words == 8
    assert Format((*six.segments, (16, 2))).words == 12 and Format((*six.segments, (16, 16))).words == 8
    for bits, rank in product(WIDTHS, (16, 48, 256)):
        assert uniform(rank, bits).nbytes == -(-rank * bits // 128) * 16 + (0 if bits == 16 else 4)


@given(FORMATS, st.integers(0, 2**31), st.sampled_from(DTYPES), st.integers(-14, 6))
def test_what_comes_back_is_within_half_a_step(segments, seed, dtype, power):
    """Of the scale that the words hold, which is the least that cuts nothing, or at 2 bits the root mean square, to an
    eighth. What is beyond the second step at 2 bits is cut to it."""
    own = Format(tuple(segments))
    z = latents(2, 3, own.rank, seed=seed, dtype=dtype) * 2.0**power
    runs, words = own.encode(z)
    assert (runs.shape, words.shape) == ((2, 3, own.run), (2, 3, own.words))
    assert runs.dtype == words.dtype == torch.uint8
    found = own.decode(runs, words, dtype).double()
    exact = z.double()
    for (bits, part), (*_, scale_at) in zip(parts_of(own), packing.places(own), strict=True):
        x = exact[..., part]
        if bits == 16:
            assert ((found[..., part] - x).abs() <= 2.0**-11 * x.abs() + 2.0**-25).all()
            continue
        step = words[..., scale_at].double().apply_(packing.scale)[..., None]
        if bits == 2:
            assert ((step / x.square().mean(-1, True).sqrt() - 1).abs() <= 1 / 15).all()
        else:
            over = step / (x.abs().amax(-1, True) / 2 ** (bits - 1))
            assert ((over >= 1 - 1e-7) & (over <= 9 / 8)).all()
        cut = x.clamp(-2 * step, 2 * step) if bits == 2 else x
        assert ((found[..., part] - cut).abs() <= step / 2 * (1 + 1e-6)).all()


@given(FORMATS, st.integers(0, 2**31), st.sampled_from(DTYPES[:2]))
def test_latents_lie_as_documented(segments, seed, dtype):
    """Any bytes are what the reader of bits in tests/support/packing.py makes of them, to the last bit."""
    own = Format(tuple(segments))
    g = torch.Generator().manual_seed(seed)
    runs, words = (torch.randint(256, (3, n), generator=g, dtype=torch.uint8) for n in (own.run, own.words))
    for _, bits, _, at in packing.places(own):
        if bits != 16:
            words[:, at].clamp_(8)  # no scale is less
    expected = [packing.read_group(*pair, own) for pair in zip(runs.tolist(), words.tolist())]
    torch.testing.assert_close(
        own.decode(runs, words, dtype), torch.tensor(expected, dtype=dtype), rtol=0, atol=0, equal_nan=True
    )


def test_a_segment_by_hand():
    """A scale of one at 4 bits: halfword h has latents h, 8 + h, 16 + h and 24 + h, the first in its lowest bits."""
    z = torch.full((1, 32), 1.0)
    z[0, 9], z[0, 3] = -8.0, 7.5  # codes 0 and 15
    runs, words = uniform(32, 4).encode(z)
    assert runs[0].tolist() == [0x99, 0x99, 0x09, 0x99, 0x99, 0x99, 0x9F, 0x99, *[0x99] * 8]
    assert words.tolist() == [[(15 + 8) * 8, 0, 0, 0]]  # 2^-8 times 2^8


@given(FORMATS, st.integers(0, 2**31), st.data())
def test_what_is_not_finite_stays_visible_in_its_segment_alone(segments, seed, data):
    own = Format(tuple(segments))
    z = latents(3, own.rank, seed=seed)
    whole = through(own, z)
    bits, part = data.draw(st.sampled_from(parts_of(own)))
    at = data.draw(st.integers(part.start, part.stop - 1))
    z[1, at] = data.draw(st.sampled_from([torch.nan, torch.inf, -torch.inf]))
    broken = torch.zeros_like(whole, dtype=torch.bool)
    broken[1, at if bits == 16 else part] = True
    found = through(own, z)
    assert torch.equal(~found.isfinite(), broken) and torch.equal(found[~broken], whole[~broken])
    assert bits == 16 or found[broken].isnan().all()


@given(FORMATS, st.integers(0, 2**31), st.booleans())
def test_what_no_latent_has_is_zero(segments, seed, broken):
    """Segments begin at multiples of 16 bytes, and what is between them, and in words beside scales, is zero."""
    own = Format(tuple(segments))
    z = latents(4, own.rank, seed=seed) + (torch.nan if broken else 0.0)
    runs, words = own.encode(z)
    used, held = torch.zeros(own.run, dtype=torch.bool), torch.zeros(own.words, dtype=torch.bool)
    for (_, part), (rank, bits, at, scale_at), row in zip(
        parts_of(own), packing.places(own), torch.tensor(table((own,))).view(-1, 3).tolist(), strict=True
    ):
        assert at % 16 == 0 and row == [at, rank, part.start]
        used[at : at + rank * bits // 8] = True
        if scale_at is not None:
            assert not held[scale_at]
            held[scale_at] = True
    assert own.run % 16 == 0 and own.words % 4 == 0
    assert not runs[:, ~used].any() and not words[:, ~held].any() and words[:, held].all()


def test_groups_follow_one_another():
    """In a row's runs each begins where the one before ends, padding included."""
    formats = (Format(((16, 8), (48, 4))), Format(((32, 8), (16, 4))))
    assert table(formats) == [[0, 16, 0, 16, 48, 16], [48, 32, 0, 80, 16, 32]] and widest(formats) == (8, 32, 4, 48)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_was_decoded_encodes_to_the_same_latents(dtype):
    """Not at 2 bits, whose scale is not the largest latent's: the root mean square of four levels differs."""
    whole = Format(((16, 16), (32, 8), (32, 4)))
    once = through(whole, latents(9, whole.rank, dtype=dtype), dtype)
    again = through(whole, once.to(dtype), dtype)
    scale = once.abs().amax(-1, keepdim=True)
    assert ((again - once).abs() <= 0.1 * scale).all() and (again - once).abs().mean() < 0.02 * scale.mean()


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_error_of_gaussian_latents_is_what_allocation_counts_with(bits):
    z = latents(4000, 64, dtype=torch.float64)
    error = (back(z, bits, torch.float64) - z).square().mean().item()
    assert error == pytest.approx(ERRORS[bits], rel=0.08)


def test_a_latent_s_size_moves_no_other_token_or_segment():
    z = latents(4, MIXED.rank)
    louder = z.clone()
    louder[1, 20] *= 100  # in the segment of 8 bits
    a, b = (through(MIXED, x) for x in (z, louder))
    assert torch.equal(a[[0, 2, 3]], b[[0, 2, 3]])
    assert torch.equal(a[1, 48:], b[1, 48:]) and torch.equal(a[1, :16], b[1, :16])
    assert not torch.equal(a[1, 16:48], b[1, 16:48])


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_latents_of_any_size_that_scales_reach(bits):
    """From 2^-22 to 240 what comes back grows with the latents; smaller ones are next to nothing, larger ones cut."""
    z = latents(64, 64, seed=bits)
    found = back(z, bits)
    for power in (-14, -3, 6):
        assert torch.equal(back(z * 2.0**power, bits), found * 2.0**power)
    assert back(z * 1e-30, bits).abs().max() <= SMALLEST * 2
    largest = LARGEST * (2**bits - 1) / 2
    for size in (1e6, 1e30):
        cut = back(z * size, bits)
        assert torch.equal(cut.sign(), z.sign()) and cut.abs().max() == largest


def test_zeros_stay_next_to_nothing():
    for bits in (8, 4, 2):
        assert back(torch.zeros(1, 32), bits).abs().max() == SMALLEST / 2


def test_bytes_of_ones_are_nan():
    """What tests fill slots with that must not be read."""
    runs, words = (torch.full((2, n), 255, dtype=torch.uint8) for n in (MIXED.run, MIXED.words))
    assert MIXED.decode(runs, words, torch.bfloat16).isnan().all()


@pytest.mark.parametrize("layout", [1, 3, "2", None])
def test_another_layout_is_refused(layout):
    with pytest.raises(
        ValueError, match=rf"layout: expected {LAYOUT}, the one that rows are written in, got {layout!r}"
    ):
        Format(((16, 8),), layout)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ((), "segments: expected one or more"),
        ((16, 8), "segments: expected (rank, bits) of each"),
        (((16, 8, 1),), "segments: expected (rank, bits) of each"),
        (((24, 8),), "positive multiples of 16, got 24"),
        (((0, 8),), "positive multiples of 16, got 0"),
        (((16.0, 8),), "positive multiples of 16, got 16.0"),
        (((16, 3),), "segments: expected bits out of (16, 8, 4, 2), got 3"),
        (((16, True),), "segments: expected bits out of (16, 8, 4, 2), got True"),
    ],
)
def test_bad_segments_are_refused(segments, message):
    with pytest.raises(ValueError) as error:
        Format(segments)
    assert message in str(error.value)
