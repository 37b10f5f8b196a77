"""Low-rank maps in a metric, and rows that keys and values share: optimal where optimality is known."""

import pytest
import torch

from lrattn.compression.methods.rows import Side, joint, ride, splits
from lrattn.compression.methods.weighted import damped, low_rank


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moment(size, seed, rank=None):
    x = random(rank or 3 * size, size, seed=seed) * torch.linspace(0.1, 3, size, dtype=torch.float64)
    return x.T @ x / len(x)


def cost(weight, got, c, g):
    d = weight - got
    return torch.trace(damped(g, 1e-3) @ d @ damped(c) @ d.T).item()


def cost_of_both(keys, values, got_keys, got_values):
    pairs = (keys, got_keys), (values, got_values)
    return sum(cost(side.flat, got, side.moment, side.metric) for side, got in pairs)


def side(seed, heads=2, head_dim=8, inputs=40):
    return Side(
        random(heads, head_dim, inputs, seed=seed), moment(inputs, seed + 1), moment(heads * head_dim, seed + 2)
    )


@pytest.mark.parametrize("inputs", [40, 12])
def test_the_map_of_a_rank_is_the_best_in_the_metric_and_loses_its_tail(inputs):
    """By Eckart and Young; latents are uncorrelated."""
    w, c, g = random(16, inputs), moment(inputs, 1), moment(16, 2)
    energies, up, down = low_rank(w, c, g)
    left, right = (torch.linalg.cholesky(x) for x in (damped(g, 1e-3), damped(c)))
    torch.testing.assert_close(energies, torch.linalg.svdvals(left.T @ w @ right).square())
    for rank in (0, 1, 5, 11):
        lost = cost(w, up[:rank].T @ down[:, :rank].T, c, g)
        assert lost == pytest.approx(energies[rank:].sum().item(), rel=1e-6)
    torch.testing.assert_close(up.T @ down.T, w)
    torch.testing.assert_close(up.norm(dim=1), torch.ones(len(up), dtype=torch.float64))
    scaled = down.T @ right
    scaled = scaled / scaled.norm(dim=1, keepdim=True)
    torch.testing.assert_close(scaled @ scaled.T, torch.eye(len(up), dtype=torch.float64), rtol=0, atol=1e-7)


def test_a_deficient_weight_is_exact_at_its_rank():
    w, c, g = random(16, 6) @ random(6, 40, seed=5), moment(40, 1, rank=20), moment(16, 2)
    _, up, down = low_rank(w, c, g, deficient=True)
    torch.testing.assert_close(up[:6].T @ down[:, :6].T, w)


def separate(keys, values, rank, row):
    """Loss of rank latents for the keys and row - rank for the values, apart."""
    lost = low_rank(keys.flat, keys.moment, keys.metric)[0][rank:].sum()
    return (lost + low_rank(values.flat, values.moment, values.metric)[0][row - rank :].sum()).item()


def of_rank(keys, rank):
    """The same, with weights that have so many directions and the rounding of float32."""
    heads, head_dim, inputs = keys.weight.shape
    weight = random(heads * head_dim, rank, seed=3) @ random(rank, inputs, seed=4)
    return Side(weight.float().double().view(keys.weight.shape), keys.moment, keys.metric)


@pytest.mark.parametrize("directions", [16, 5])
@pytest.mark.parametrize("row", [8, 16, 24])
def test_a_ride_loses_what_it_says_and_never_more_than_apart(row, directions):
    """Also where keys have fewer directions than latents; and no value is made of what is rounding then."""
    keys, values = of_rank(side(0), directions), side(10)
    for rank in (4, 8):
        lost, key_up, up, down = ride(keys, values, rank, row)
        got_keys = key_up.transpose(0, 1).flatten(1).T @ down[:, :rank].T
        got_values = up.transpose(0, 1).flatten(1).T @ down.T
        assert cost_of_both(keys, values, got_keys, got_values) == pytest.approx(lost, rel=1e-6)
        assert lost <= separate(keys, values, rank, row) * (1 + 1e-9)
        assert up.abs().max() < 100


@pytest.mark.parametrize("rank", [64, 20])
def test_splits_take_the_best_key_rank_and_their_gains_are_what_is_saved(rank):
    """Also where keys have no more than 20 directions: the latents beyond those are rounding."""
    keys, values = of_rank(side(0, 4, 16, 100), rank), side(10, 4, 16, 100)
    gains, ranks = splits(keys, values)
    assert len(gains) == 100 and len(ranks) == 7 and (gains >= 0).all()
    nothing = separate(keys, values, 0, 0)
    for step, rank in enumerate(ranks, 1):
        row = 16 * step
        found = {k: ride(keys, values, k, row)[0] for k in range(16, min(row, 64) + 1, 16)}
        assert rank in found and found[rank] == pytest.approx(min(found.values()), rel=1e-6, abs=1e-9 * nothing)
        if row <= 96:
            saved = nothing - gains[:row].sum().item()
            assert saved == pytest.approx(found[rank], rel=1e-6, abs=1e-9 * nothing)


@pytest.mark.parametrize("row", [8, 16, 24])
def test_a_joint_row_loses_no_more_than_keys_and_values_apart(row):
    """On its own objective: one moment for both sides."""
    keys, values = side(0), side(10)
    one = (keys.moment + values.moment) / 2
    scaled = one * 2 / (keys.moment + values.moment).trace()
    keys, values = (Side(s.weight, scaled, s.metric) for s in (keys, values))
    energies, up, down = joint(keys, values)
    got = up[:, :row].transpose(0, 1).flatten(1).T @ down[:, :row].T  # [C * 2 D, E], by head keys then values
    got_keys, got_values = (x.flatten(0, 1) for x in got.unflatten(0, (2, 16)).chunk(2, 1))
    measured = cost_of_both(keys, values, got_keys, got_values)
    assert measured == pytest.approx(energies[row:].sum().item(), rel=0.02)  # damped as one metric, not as two
    apart = min(separate(keys, values, rank, row) for rank in range(row + 1))
    assert measured <= apart * 1.01


def test_values_that_are_keys_ride_for_nothing():
    keys = side(0)
    values = Side(random(2, 8, 8, seed=7) @ keys.weight[0], keys.moment, moment(16, 3))
    lost, _, _, _ = ride(keys, values, 16, 16)
    assert lost < 1e-9 * separate(keys, values, 0, 0)
