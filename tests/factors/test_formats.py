"""Packed latents: bytes, round trips, the quantiser's rule, and what a format refuses."""

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


@pytest.mark.parametrize("bits", WIDTHS)
def test_a_uniform_run_has_its_bytes(bits):
    for rank in (16, 48, 256):
        assert uniform(rank, bits).nbytes == rank * bits // 8 + (0 if bits == 16 else 4)


def test_bytes_are_codes_scales_and_padding():
    assert MIXED.rank == 160
    assert MIXED.nbytes == 32 + 32 + 24 + 16 + 4  # three scales and a zero
    six = Format(((16, 8), (16, 4), (16, 2), (16, 8), (16, 4), (16, 2)))
    assert six.nbytes == 2 * (16 + 8 + 4) + 8
    assert Format(((16, 16),)).nbytes == 32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_errors_are_within_half_a_step(dtype):
    z = latents(5, 7, MIXED.rank, dtype=dtype) * 3
    runs = MIXED.encode(z)
    assert runs.shape == (5, 7, MIXED.nbytes) and runs.dtype == torch.uint8
    back = MIXED.decode(runs, dtype)
    at = 0
    for segment in MIXED.segments:
        part = slice(at, at + segment[0])
        error, exact = (back[..., part] - z[..., part].to(back)).abs(), z[..., part].to(back)
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


@pytest.mark.parametrize("bits", [8, 4])
def test_outliers_are_not_cut(bits):
    z = latents(3, 64)
    z[:, 5] = 40.0
    back = uniform(64, bits).decode(uniform(64, bits).encode(z), torch.float32)
    assert ((back - z).abs()[:, 5] <= 40 / 2 ** (bits - 1) * 1.125 / 2 + 1e-6).all()


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_error_of_gaussian_latents_is_what_allocation_counts_with(bits):
    z = latents(4000, 64, dtype=torch.float64)
    error = (uniform(64, bits).decode(uniform(64, bits).encode(z), torch.float64) - z).square().mean().item()
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
    back = uniform(64, 8).decode(uniform(64, 8).encode(z), torch.float32)
    assert ((back - z).abs() <= torch.maximum(0.01 * z.abs().amax(), torch.tensor(2.0**-16))).all()


def test_zeros_stay_next_to_nothing():
    for bits in (8, 4, 2):
        assert uniform(32, bits).decode(uniform(32, bits).encode(torch.zeros(1, 32)), torch.float32).abs().max() < 1e-4


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_visible_in_its_segment_alone(bad):
    z = latents(3, MIXED.rank)
    z[1, 60] = bad  # in the segment of 4 bits
    back = MIXED.decode(MIXED.encode(z), torch.float32)
    assert back[1, 48:96].isnan().all()
    assert back[[0, 2]].isfinite().all() and back[1, :48].isfinite().all() and back[1, 96:].isfinite().all()


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
