"""Packed latents: bytes, round trips, the quantiser's rule, and what a format refuses."""

from itertools import product

import pytest
import torch

from lrattn.factors.formats import ERRORS, WIDTHS, Format, uniform

MIXED = Format(((16, 16), (32, 8), (48, 4), (64, 2)))
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def latents(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def step(segment, z):
    """The largest step that a segment's scale may have: what `z` [.., r] asks for, rounded up to an eighth."""
    _, bits = segment
    own = z.square().mean(-1).sqrt() if bits == 2 else z.abs().amax(-1) / 2 ** (bits - 1)
    return own[..., None] * 1.125


def back(z, bits, dtype=torch.float32):
    own = uniform(z.shape[-1], bits)
    return own.decode(own.encode(z), dtype)


def test_bytes_are_codes_scales_and_padding():
    assert MIXED.rank == 160
    assert MIXED.nbytes == 32 + 32 + 24 + 16 + 4  # three scales and a zero
    six = Format(((16, 8), (16, 4), (16, 2), (16, 8), (16, 4), (16, 2)))
    assert six.nbytes == 2 * (16 + 8 + 4) + 8
    for bits, rank in product(WIDTHS, (16, 48, 256)):
        assert uniform(rank, bits).nbytes == rank * bits // 8 + (0 if bits == 16 else 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_are_within_half_a_step(dtype):
    z = latents(5, 7, MIXED.rank, dtype=dtype) * 3
    runs = MIXED.encode(z)
    assert runs.shape == (5, 7, MIXED.nbytes) and runs.dtype == torch.uint8
    found = MIXED.decode(runs, dtype)
    at = 0
    for segment in MIXED.segments:
        part = slice(at, at + segment[0])
        error, exact = (found[..., part] - z[..., part].to(found)).abs(), z[..., part].to(found)
        if segment[1] == 16:
            assert error.max() <= 2**-10 * exact.abs().max()
        elif segment[1] == 2:  # what is beyond the second step is cut
            inner = exact.abs() <= 2 * step(segment, exact) / 1.2
            assert (error <= step(segment, exact) / 2)[inner].all()
        else:
            assert (error <= step(segment, exact) / 2).all()
        at = part.stop


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_was_decoded_encodes_to_the_same_latents(dtype):
    """Not at 2 bits, whose scale is not the largest latent's: the root mean square of four levels differs."""
    whole = Format(((16, 16), (32, 8), (32, 4)))
    once = whole.decode(whole.encode(latents(9, whole.rank, dtype=dtype)), dtype)
    again = whole.decode(whole.encode(once.to(dtype)), dtype)
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
    a, b = (MIXED.decode(MIXED.encode(x), torch.float32) for x in (z, louder))
    assert torch.equal(a[[0, 2, 3]], b[[0, 2, 3]])
    assert torch.equal(a[1, 48:], b[1, 48:]) and torch.equal(a[1, :16], b[1, :16])
    assert not torch.equal(a[1, 16:48], b[1, 16:48])


@pytest.mark.parametrize("size", [1e-30, 1e-4, 1.0, 1e4])
def test_latents_of_any_size_a_scale_reaches(size):
    z = latents(3, 64) * size
    assert ((back(z, 8) - z).abs() <= torch.maximum(0.01 * z.abs().amax(), torch.tensor(2.0**-16))).all()


def test_zeros_stay_next_to_nothing():
    for bits in (8, 4, 2):
        assert back(torch.zeros(1, 32), bits).abs().max() < 1e-4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_visible_in_its_segment_alone(bad):
    z = latents(3, MIXED.rank)
    z[1, 60] = bad  # in the segment of 4 bits
    finite = MIXED.decode(MIXED.encode(z), torch.float32).isfinite()
    assert not finite[1, 48:96].any()
    assert finite[[0, 2]].all() and finite[1, :48].all() and finite[1, 96:].all()


def test_a_run_of_ones_is_nan():
    """What tests fill slots with that must not be read."""
    assert MIXED.decode(torch.full((2, MIXED.nbytes), 255, dtype=torch.uint8), torch.bfloat16).isnan().all()


def test_latents_lie_as_documented():
    z = torch.full((1, 32), 1.0)
    z[0, 9], z[0, 3] = -8.0, 7.5  # a scale of one at 4 bits: codes 0 and 15
    run = uniform(32, 4).encode(z)[0]
    codes = run[:16].tolist()
    assert codes[4] == 0 << 4 | 9 and codes[1] == 15 << 4 | 9 and codes[0] == 9 << 4 | 9
    assert run[16:].tolist() == [128, 0, 0, 0]


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
