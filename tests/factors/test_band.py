"""Bands against the rotation itself, in float64 and far from position 0: the bound holds, and it is reached."""

import re

import pytest
import torch

from lrattn import Rope
from lrattn.factors import band as bands

FAR = 1_000_000 // bands.BLOCK * bands.BLOCK  # a block far out
LINEAR = {"rope_type": "linear", "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
STRETCHES = [1.0 + 0.5 * (i % 3) + 0.5 * i for i in range(48)]  # frequencies rise now and then
LONGROPE = {
    "rope_type": "longrope", "short_factor": STRETCHES, "long_factor": STRETCHES, "factor": 32.0,
    "original_max_position_embeddings": 4096,
}  # fmt: skip
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


def rope(theta, dim, scaling=None, **more):
    return Rope(theta, dim, 131072, scaling, **more)


# Rope, head dimension, fast dims, and by dtype the terms and what they leave, where other code has found it.
ROPES = {
    "1e4": (rope(1e4, 128), 128, 48, {BF16: (8, 4.1e-4), FP16: (16, None), FP32: (16, None)}),
    "5e5": (rope(5e5, 128), 128, 48, {BF16: (4, 1.4e-3), FP16: (8, None), FP32: (8, None)}),
    "1e6": (rope(1e6, 128), 128, 48, {BF16: (4, 4.8e-4), FP16: (8, None), FP32: (8, None)}),
    "linear": (rope(1e4, 128, LINEAR), 128, 48, {BF16: (8, None)}),
    "llama3": (rope(5e5, 128, LLAMA3), 128, 48, {BF16: (4, 1.4e-3), FP16: (8, None)}),
    "yarn": (rope(1e6, 128, YARN), 128, 48, {BF16: (4, 3.6e-4), FP16: (8, None)}),
    "longrope": (rope(1e4, 96, LONGROPE), 96, 48, {}),
    "partial": (rope(1e4, 128, partial_rotary_factor=0.25), 128, 16, {BF16: (8, None)}),
    "partial, interleaved": (rope(1e4, 64, partial_rotary_factor=0.5, interleaved=True), 64, 16, {}),
    "partial, yarn": (rope(1e6, 128, YARN, partial_rotary_factor=0.5), 128, 32, {BF16: (4, None)}),
    "wider head": (rope(1e4, 64), 192, 32, {}),
    "all rotated dims fast": (rope(1e4, 16), 64, 16, {BF16: (4, None), FP32: (4, None)}),
    "interleaved": (rope(1e4, 128, interleaved=True), 128, 48, {BF16: (8, 4.1e-4)}),
    "float32 angles": (rope(1e4, 128, fp32_angles=True), 128, 48, {BF16: (8, 4.1e-4)}),
    "head of 64": (rope(1e4, 64), 64, 32, {}),
    "head of 80": (rope(1e4, 80), 80, 32, {}),
    "head of 96": (rope(1e4, 96), 96, 48, {}),
    "head of 256": (rope(1e4, 256), 256, 96, {BF16: (8, None), FP16: (16, None)}),
}
BANDS = [(n, d) for n in ROPES for d in (BF16, FP16, FP32) if n != "float32 angles" or d != FP32]
every_band = pytest.mark.parametrize(("name", "dtype"), BANDS, ids=str)
every_turning_band = pytest.mark.parametrize(
    ("name", "dtype"), [own for own in BANDS if own[0] != "all rotated dims fast"], ids=str
)


def made(name, dtype):
    own, head_dim, *_ = ROPES[name]
    found = own.band(head_dim, dtype)
    assert not isinstance(found, str), found
    return own, head_dim, found


def turned(own, x, positions):
    """x [n, D] by the rope's own angles, in float64, and its attention factor."""
    frequencies, factor = own.frequencies()
    angles = positions.double()[:, None] * frequencies.double()
    return own.turned(x[:, None], torch.polar(torch.full_like(angles, factor), angles)[:, None])[:, 0]


def scores(own, q, k, first):
    """q . Rot(t) k of the block's tokens, q [D] or [n, D], k [n, D] before the rotation."""
    return (q * turned(own, k, first + torch.arange(len(k)))).sum(-1)


def banded(own, found, q, k, first):
    """The same by the band: fast dims exactly, slow ones by functions of the place in the block alone."""
    order, place = own.pair_order(k.shape[-1]), torch.arange(len(k))
    x = turned(own, q.expand(len(k), -1), torch.full((len(k),), -first))
    factor = own.frequencies()[1]
    fast = (x * turned(own, k, place) / factor)[:, order[: found.fast]].sum(-1)
    (low, high), (a, b) = x[:, order].unflatten(1, (-1, 2)).unbind(2), found.coefficients.double()[:, None]
    low, high = low[:, None], high[:, None]  # [n, 1, D / 2] by a, b [1, T, D / 2]
    w = torch.stack((a * low + b * high, a * high - b * low), -1).flatten(2)
    return fast + (found.functions.double() * torch.einsum("npd,nd->np", w, k[:, order])).sum(1)


def bound(own, found, q, k):
    """Without the scale of scores."""
    norms = [x[..., own.pair_order(k.shape[-1])].unflatten(-1, (-1, 2)).norm(dim=-1) for x in (q, k)]
    return found.error * own.frequencies()[1] * (norms[0] * norms[1])[..., found.fast // 2 :].sum(-1)


def worst(own, found, head_dim, first):
    """Query and key of the block's worst token and pair, in the phase of its error; and which token that is."""
    frequencies = torch.zeros(head_dim // 2, dtype=torch.float64)
    frequencies[: own.rotary_dim // 2] = own.frequencies()[0]
    angles = torch.arange(found.block)[:, None] * frequencies
    a, b = found.coefficients.double()
    phi = found.functions.double()
    error = torch.complex(phi @ a, phi @ b) - torch.polar(torch.ones_like(angles), angles)
    error[:, : found.fast // 2] = 0
    token, pair = divmod(int(error.abs().argmax()), head_dim // 2)
    low, high = own.pair_order(head_dim)[2 * pair :][:2]
    q, k = torch.zeros(2, found.block, head_dim, dtype=torch.float64).unbind(0)
    k[token, low] = 1
    phase = error[token, pair].angle() + first * frequencies[pair]
    q[token, low], q[token, high] = phase.cos(), phase.sin()
    return q, k, token


@every_band
@pytest.mark.parametrize("first", [0, bands.BLOCK, FAR])
@pytest.mark.parametrize("kind", ["random", "aligned", "edge"])
def test_the_bound_holds(name, dtype, kind, first):
    """A query like any other, one along a rotated key, and keys whose norm is in the fastest of the slow pairs."""
    own, head_dim, found = made(name, dtype)
    g = torch.Generator().manual_seed(first % 7)
    k = torch.randn(found.block, head_dim, generator=g, dtype=torch.float64)
    if kind == "edge":
        k[:, own.pair_order(head_dim)[found.fast : found.fast + 4]] *= 100
    q = torch.randn(head_dim, generator=g, dtype=torch.float64)
    if kind == "aligned":
        q = turned(own, k, first + torch.arange(len(k)))[found.block // 3]
    missed = banded(own, found, q, k, first) - scores(own, q, k, first)
    far = 1e-15 * max(first, 1) * q.norm() * k.norm(dim=1)  # of angles in float64
    assert bool((missed.abs() <= bound(own, found, q, k) + far + 1e-12).all())
    assert found.error < 1e-12 or missed.abs().max() > 0.01 * bound(own, found, q, k).max()


@every_turning_band
@pytest.mark.parametrize("first", [0, FAR])
def test_the_bound_is_reached(name, dtype, first):
    own, head_dim, found = made(name, dtype)
    q, k, token = worst(own, found, head_dim, first)
    missed = (banded(own, found, q, k, first) - scores(own, q, k, first)).abs()
    limit = bound(own, found, q, k)
    assert 0.99 * limit[token] < missed[token] < 1.01 * limit[token]


@every_band
def test_a_band_is_the_first_within_the_tolerance(name, dtype, monkeypatch):
    """Fewer terms leave more, and rounding is told apart from what they leave."""
    own, head_dim, found = made(name, dtype)
    fast, known = ROPES[name][2:]
    assert found.fast == fast and found.block == 256
    if dtype in known:
        terms, left = known[dtype]
        assert found.terms == terms and (left is None or found.truncation == pytest.approx(left, rel=0.03))
    assert found.truncation <= (tolerance := bands.TOLERANCE[dtype])
    rounding = 6e-4 if dtype.itemsize == 2 else 1.2e-7
    assert found.error <= found.truncation + rounding
    if found.terms > 4:
        monkeypatch.setattr(bands, "TERMS", (found.terms // 2,))
        told = bands.find.__wrapped__(tuple(own.frequencies()[0].tolist()), head_dim, dtype)
        assert told.startswith(f"{found.terms // 2} terms leave ") and told.endswith(f" {tolerance:.0e} wanted")


@every_band
def test_tensors_are_as_kernels_hold_them(name, dtype):
    _, head_dim, found = made(name, dtype)
    functions, coefficients = found.functions, found.coefficients
    assert functions.shape == (256, found.terms) and coefficients.shape == (2, found.terms, head_dim // 2)
    assert functions.dtype == coefficients.dtype == torch.float32
    assert functions.is_contiguous() and coefficients.is_contiguous()
    assert functions.abs().max() <= 1 and not coefficients[..., : found.fast // 2].any()
    assert dtype == FP32 or torch.equal(functions, functions.half().float())
    assert functions.abs().amax(0).eq(1).all(), "float16 keeps as many digits of each as it can"


def test_equal_ropes_share_a_band_of_any_mode():
    bands.find.cache_clear()
    with torch.inference_mode():
        held = rope(1e4, 128, dict(LINEAR)).band(128, BF16)
    assert held is rope(1e4, 128, dict(LINEAR)).band(128, BF16)
    assert held is not rope(1e4, 128).band(128, BF16) and held is not rope(1e4, 128, LINEAR).band(128, FP16)
    assert not held.functions.is_inference() and not held.coefficients.is_inference()
    with torch.device("meta"):
        assert bands.find((1.0, 0.1), 32, BF16).functions.device.type == "cpu"


@pytest.mark.parametrize(
    ("own", "head_dim", "dtype", "told"),
    [
        (rope(100.0, 256), 256, BF16, "16 terms leave 1e+00 of the slow pairs' turns, 2e-03 wanted"),
        (rope(300.0, 128), 128, FP32, r"16 terms leave \d.* 1e-07 wanted"),
        (rope(1e4, 16), 16, BF16, "all 16 dims are among the 16 that are rebuilt"),
        (rope(1e4, 128), 128, torch.float64, "float64 has no tolerance"),
        (rope(1e4, 128, fp32_angles=True), 128, FP32, "each token's own rounded angle is part of the result"),
    ],
)
def test_where_there_is_none_the_reason_is_told(own, head_dim, dtype, told):
    assert re.fullmatch(told.replace("+", r"\+"), own.band(head_dim, dtype))


def test_fast_pairs_are_the_first_whatever_their_frequencies():
    """Among the first it does not matter where one stands; among the others each takes terms, until none are left."""
    falling = rope(1e6, 128).frequencies()[0].tolist()
    held, turned = (bands.find((*first, *falling[24:]), 128, BF16) for first in (falling[:24], falling[23::-1]))
    assert held.terms == 4 and torch.equal(held.coefficients, turned.coefficients) and held.error == turned.error
    assert bands.find((*falling[1:25], falling[0], *falling[25:]), 128, BF16).terms == 8
    assert "of the slow pairs' turns" in bands.find(tuple(reversed(falling)), 128, BF16)
