"""Moments averaged over offsets: against a loop over them."""

import pytest
import torch

from lrattn.compression.averages import Turns
from lrattn.factors.rope import Rope

HEADS, HEAD_DIM = 3, 16
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
ROPES = {
    "default": Rope(1e4, HEAD_DIM, 4096),
    "yarn": Rope(1e4, HEAD_DIM, 4096, scaling=YARN),
    "partial": Rope(1e4, HEAD_DIM, 4096, scaling=YARN, partial_rotary_factor=0.5),
    "interleaved": Rope(5e5, HEAD_DIM, 4096, interleaved=True, fp32_angles=True),
}


def moment(behind, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(40, HEADS * HEAD_DIM + behind, generator=g, dtype=torch.float64)
    return x, x.T @ x / len(x)


def turned(rope, x, o):
    """Rows x [n, ..] with their keys rotated to o, as attention is given them."""
    n = HEADS * HEAD_DIM
    keys = x[:, :n].unflatten(1, (HEADS, HEAD_DIM))
    return torch.cat((rope.rotate(keys, torch.full((len(x),), o)).flatten(1), x[:, n:]), 1)


@pytest.mark.every(3)
@pytest.mark.parametrize("behind", [0, HEADS * HEAD_DIM + 1])
@pytest.mark.parametrize("count", [1, 7, 512])
@pytest.mark.parametrize("kind", ROPES)
def test_the_mean_over_offsets_is_that_of_a_loop(kind, count, behind):
    """Keys become those that attention is given, factor included; what stands behind them stays."""
    rope = ROPES[kind]
    x, own = moment(behind)
    got = Turns.in_chunks(rope, count).moment(own, HEADS, HEAD_DIM)
    rows = [turned(rope, x, o) for o in range(count)]
    torch.testing.assert_close(got, sum(y.T @ y for y in rows) / count / len(x), rtol=0, atol=1e-5)
    assert torch.equal(got, got.T)
    n = HEADS * HEAD_DIM
    assert torch.equal(got[n:, n:], own[n:, n:])


@pytest.mark.parametrize("kind", ROPES)
def test_a_metric_turns_as_gradients_do(kind):
    """What an error of stored keys costs is what the same error before the rotation does: g . u is what it was."""
    rope, count = ROPES[kind], 64
    g, metric = moment(0, seed=1)
    got = Turns.in_chunks(rope, count).metric(metric, HEADS, HEAD_DIM)
    total = torch.zeros_like(metric)
    for o in range(count):
        at = torch.full((len(g),), o)
        stored = torch.zeros(len(g), HEADS, HEAD_DIM, dtype=torch.float64, requires_grad=True)
        before = rope.turn_back(stored, at)
        (own,) = torch.autograd.grad(before, stored, g.unflatten(1, (HEADS, HEAD_DIM)))
        total += own.flatten(1).T @ own.flatten(1)
    torch.testing.assert_close(got, total / count / len(g), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["default", "interleaved"])
def test_turning_keeps_the_energy(kind):
    x = moment(5)[1]
    for count in (1, 3, 10**6):
        assert Turns(ROPES[kind], count).moment(x, HEADS, HEAD_DIM).trace().item() == pytest.approx(x.trace().item())
