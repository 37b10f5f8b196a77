"""Palu's kernel, written anew for comparison: right inside its limits, refused outside them."""

import pytest
import torch

import lrattn
from bench.decode import decode_problem, palu_decode, palu_scores
from bench.decode.decode_providers import Unavailable, palu, palu_scorer
from bench.decode.decode_shapes import LLAMA_2, LLAMA_31, Shape

SMALL = Shape(LLAMA_2, "Palu", 1 / 16)  # ranks of 32


def operands(tokens=128, rank=64, groups=8, dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    q, ck, uk = (torch.randn(*size, generator=g) for size in ((32, 128), (groups, tokens, rank), (32, rank, 128)))
    return q.to(dtype), ck.to(dtype), (uk * rank**-0.5).to(dtype)


def assert_near(got, true):
    assert got.shape == true.shape and (got - true).norm() <= 5e-3 * true.norm()


@pytest.mark.parametrize("launch", [palu_scores.PUBLISHED, palu_scores.FOR_FOURS], ids=["published", "for fours"])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-3)], ids=["float32", "float16"])
def test_scores_are_those_of_keys_rebuilt_and_rotated(launch, dtype, tolerance):
    q, ck, uk = operands(dtype=dtype)
    k = ck.double().repeat_interleave(4, 0) @ uk.double()  # [32, T, D]
    k = lrattn.Rope(1e4, 128, 128).rotate(k.transpose(0, 1), torch.arange(128)).transpose(0, 1)
    exact = (k @ q.double()[..., None])[..., 0]
    got = palu_scores.palu_scores(q, ck, uk, launch)
    assert got.dtype == dtype and (got - exact).abs().max() <= tolerance * exact.abs().max()


Q, CK, UK = operands()


@pytest.mark.parametrize(
    "limit, given",
    {
        "a multiple of 64 tokens": operands(tokens=96),
        "ranks that are multiples of 32": operands(rank=48),
        "a number of groups that divides 32": operands(groups=5),
        "32 query heads": (Q[:16], CK, UK),
        "contiguous tensors": (Q, CK[:, ::2], UK),
    }.items(),
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_the_published_kernel_would_compute_wrongly_is_refused(limit, given):
    with pytest.raises(palu_scores.Unfit, match=limit):
        palu_scores.palu_scores(*given)


@pytest.mark.parametrize(
    "shape, batch, limit", [(SMALL, 2, "one sequence"), (Shape(LLAMA_31, "Palu", 1 / 16), 1, "theta 10000")], ids=str
)
def test_a_problem_outside_its_limits_is_unavailable_with_the_reason(shape, batch, limit):
    with pytest.raises(Unavailable, match=limit):
        palu_scorer(decode_problem.make(shape, 64, batch, torch.float16))


def test_a_whole_step_is_attention_and_our_scores_alone_are_those_of_a_decode_call():
    x = decode_problem.make(SMALL, 128, 1, torch.float16)
    k, v = x.heads(0)
    true = decode_problem.attend(x.q[0], k, v)
    assert_near(palu(x)()[0], true)
    scores = torch.softmax(palu_decode.our_scores(x)()[0] * 128**-0.5, -1)
    assert_near((scores[:, None] @ v.float().transpose(0, 1))[:, 0], true)
