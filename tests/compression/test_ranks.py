"""Ranks: every rule meets the byte budget from below by less than a step, and shares by what it claims to share by."""

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_calibrate import refused

from lrattn.compression import ranks
from lrattn.factors.formats import uniform

SHAPES = [
    [ranks.LayerShape(3, 64, 3, 3)] * 30,
    [ranks.LayerShape(8, 128, 4, 8)] * 3,
    [ranks.LayerShape(4, 64, 2, 2, bits=8)] * 5,
    [ranks.LayerShape(8, 128, 4, 4), ranks.LayerShape(4, 256, 4, 1)],
    [ranks.LayerShape(32, 128, 4, 32)] * 2,
    [ranks.LayerShape(8, 72, 1, 4)] * 2,  # 72 numbers fill 80 latents
    [ranks.LayerShape(4, 80, 1, 2, bits=2)] * 3,  # 80 latents of 20 bytes take 32
    [ranks.LayerShape(8, 72, 1, 4, bits=4)] * 2,
]
STEPS = {16: 16, 8: 16, 4: 32, 2: 64}  # latents of 32 bytes, or of 16 where they are packed
SHARED = [ranks.LayerShape(8, 64, 4, 4, shared=True)] * 4
KEEPS = [0.16, 0.3, 1 / 3, 0.5, 0.7, 0.95]
SERVED = pytest.mark.parametrize("shapes, keep", list(product(SHAPES, KEEPS)))


def scores_for(shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [tuple(torch.rand(2, generator=g).pow(3).tolist()) for _ in shapes]


def energies_for(shapes, seed=0):
    g = torch.Generator().manual_seed(seed)

    def group(full):
        return torch.rand(full, generator=g, dtype=torch.float64).pow(8).sort(descending=True).values

    return [tuple([group(full) for _ in range(n)] for full, n in zip(s.full_ranks, s.groups)) for s in shapes]


def by_rule(rule, shapes, keep):
    if rule == "uniform":
        return ranks.uniform(shapes, keep)
    if rule == "fisher":
        return ranks.fisher(shapes, keep, scores_for(shapes))
    if rule == "condition":
        return ranks.condition(shapes, keep, [sum(pair) for pair in scores_for(shapes)])
    return ranks.spectrum(shapes, keep, energies_for(shapes))


@pytest.mark.parametrize("rule", ranks.RULES)
@pytest.mark.parametrize("keep", [*KEEPS, 1.0])
@pytest.mark.parametrize("shapes", [*SHAPES, SHARED])
def test_the_budget_is_met_from_below_by_less_than_a_step(rule, shapes, keep):
    """Padding and scales included. Of a keep of 1 every rank is full, up to the step that it ends with."""
    chosen, bits = by_rule(rule, shapes, keep), shapes[0].bits
    left = keep * 2 * sum(s.dense for s in shapes)
    full = []
    for pair, s in zip(chosen, shapes, strict=True):
        for side, cap, groups in zip(pair, s.full_ranks, s.groups, strict=True):
            assert len(side) == groups and all(16 <= r <= cap for r in side)
            assert all(r % STEPS[bits] == 0 or r == cap for r in side)  # nothing else is padded
            full += [r == cap for r in side]
            left -= sum(uniform(r, bits).nbytes for r in side)
    assert all(full) if keep == 1.0 else left >= -1e-6 and (all(full) or left < STEPS[bits] * bits // 8)


@SERVED
def test_uniform_gives_every_group_the_same_share(shapes, keep):
    chosen = ranks.uniform(shapes, keep)
    pairs = [(r, full) for (k, v), s in zip(chosen, shapes) for side, full in zip((k, v), s.full_ranks) for r in side]
    step = STEPS[shapes[0].bits]
    shares = [r / full for r, full in pairs if r > step]
    assert max(shares, default=0) - min(shares, default=0) <= 2 * step / min(full for _, full in pairs)


@SERVED
def test_fisher_shares_in_proportion_within_one_step(shapes, keep):
    """Projections that are neither full nor at one step a group hold ranks in proportion to their scores."""
    scores, step = scores_for(shapes), STEPS[shapes[0].bits]
    chosen = ranks.fisher(shapes, keep, scores)
    rates = []
    for (k, v), s, pair in zip(chosen, shapes, scores, strict=True):
        for side, full, score in zip((k, v), s.full_ranks, pair, strict=True):
            assert max(side) - min(side) <= step  # equal parts
            if all(step < r < full for r in side):
                least, most = sum(side) - step * len(side), sum(side) + step * len(side)
                rates.append((least / score, most / score))
    assert max((low for low, _ in rates), default=0) <= min((high for _, high in rates), default=0)


def test_fisher_pools_keys_and_values():
    shapes = [ranks.LayerShape(8, 128, 4, 8)] * 2
    (k, v), _ = ranks.fisher(shapes, 0.5, [(1.0, 3.0)] * 2)
    assert (k, v) == ((128, 128), (768,))  # a quarter and three quarters of 1024, as on Llama-2-7B
    (k, v), _ = ranks.fisher(shapes, 0.5, [(1.0, 30.0)] * 2)
    assert (k, v) == ((16, 16), (992,))  # 1024 in all, at least a step a group
    (k, v), (k2, v2) = ranks.fisher(shapes, 0.75, [(0.0, 1.0)] * 2)
    assert v == v2 == (1024,) and (sum(k), sum(k2)) == (512, 512)  # what values cannot hold goes to the keys


@SERVED
def test_spectrum_has_no_better_exchange(shapes, keep):
    """No step of latents saves more where it is not given than the least useful one saves where it is."""
    energies, size = energies_for(shapes), STEPS[shapes[0].bits]
    chosen = ranks.spectrum(shapes, keep, energies)
    given, withheld = [], []
    for pair, sides_ in zip(chosen, energies, strict=True):
        for side, groups in zip(pair, sides_, strict=True):
            total = sum(e.sum().item() for e in groups)
            for rank, e in zip(side, groups, strict=True):
                steps = [x.sum().item() / total for x in e.split(size)]
                given += steps[1 : -(-rank // size)]
                withheld += steps[-(-rank // size) :]
    assert not given or not withheld or min(given) >= max(withheld) - 1e-12


@pytest.mark.parametrize("keep", KEEPS)
def test_condition_falls_with_the_layers_in_a_line_of_their_running_products(keep):
    """Published: d_min + (log k_l - min) / (max - min) * (d_max - d_min), k_l the product from layer l to the last."""
    shapes, logs = [ranks.LayerShape(8, 128, 8, 8)] * 6, [2.0, 3.0, 1.0, 5.0, 2.0, 4.0]
    found = [k[0] / 1024 for k, _ in ranks.condition(shapes, keep, logs)]
    products = torch.tensor(logs).flip(0).cumsum(0).flip(0)
    scores = ((products - products.min()) / (products.max() - products.min())).tolist()
    assert found == sorted(found, reverse=True)
    for share, score in zip(found, scores, strict=True):
        assert share == pytest.approx(found[-1] + score * (found[0] - found[-1]), abs=2 / 64)
    assert found[0] == 1.0 if keep > 0.52 else found[-1] <= 2 / 64  # d_max is full rank, or d_min nothing


@pytest.mark.parametrize("rule", ranks.RULES)
def test_values_left_whole_are_not_cut_by_any_rule(rule):
    shapes = [ranks.LayerShape(4, 64, 1, 1, whole_values=True), ranks.LayerShape(4, 64, 2, 1)] * 2
    for keep in (0.5, 0.7):
        chosen = by_rule(rule, shapes, keep)
        assert all(v == (64,) * 4 for (_, v), s in zip(chosen, shapes, strict=True) if s.whole_values)
        assert 0 <= keep * 4 * 512 - sum(sum(k) + sum(v) for k, v in chosen) < 16
    need = ((64 * 4 + 16 * 4) + (16 * 2 + 16 * 4)) / 1024
    refused(rf"keep: expected at least {need:.3f}, all of the values, one step of 16", by_rule, rule, shapes, 0.4)


def test_a_group_is_full_at_the_numbers_of_its_heads():
    """Up to a step of 16; of a row that keys and values share, of both."""
    assert ranks.LayerShape(8, 128, 4, 8).full_ranks == (512, 1024)
    assert ranks.LayerShape(6, 24, 1, 3).full_ranks == (32, 80)
    assert ranks.LayerShape(8, 60, 4, 4, shared=True).full_ranks[1] == 480


def test_what_does_not_fit_is_refused():
    for rule in ranks.RULES:
        for keep in (0.0, -0.5, 1.01, float("nan")):
            refused(r"keep: expected a share in \(0, 1\]", by_rule, rule, SHAPES[0], keep)
        refused(r"keep: expected at least 0\.083, one step of 16 a group", by_rule, rule, SHAPES[0], 0.05)
    told = "scores: expected one pair for each of 30 layers, got 3"
    refused(told, ranks.fisher, SHAPES[0], 0.5, [(1.0, 1.0)] * 3)
    for score in (float("nan"), float("inf"), -1.0):
        refused("scores: expected finite numbers", ranks.fisher, SHAPES[1], 0.5, [(1.0, score)] * 3)
    for wrong in ([1.0], [1.0, -1.0], [1.0, float("nan")]):
        refused("logs: expected 2 finite numbers", ranks.condition, SHAPES[4], 0.5, wrong)
    refused("energies: expected", ranks.spectrum, SHAPES[1], 0.5, energies_for(SHAPES[2]))
    refused(r"keep: expected at least 0\.094, one step of 64 a group", by_rule, "uniform", SHAPES[-2], 0.05)


def test_group_size_is_the_largest_divisor_not_above():
    assert [ranks.group_size_within(h, 4) for h in (1, 2, 3, 8, 12, 7, 6)] == [1, 2, 3, 4, 4, 1, 3]
    refused("group_size", ranks.group_size_within, 8, 0)


@pytest.mark.parametrize("shapes", [SHAPES[1] * 2, SHARED], ids=["apart", "shared"])
@pytest.mark.parametrize("keep", [0.2, 0.5, 0.8])
def test_a_level_moves_layers_towards_equal_parts_and_keeps_the_budget(shapes, keep):
    """Half of the way halfway; within a layer no exchange is better."""
    energies = energies_for(shapes)
    energies = [tuple([e * 10.0**i for e in side] for side in pair) for i, pair in enumerate(energies)]
    free, half, even = (
        [sum(k) + sum(v) for k, v in ranks.spectrum(shapes, keep, energies, in_nats=True, level=level)]
        for level in (0.0, 0.5, 1.0)
    )
    assert sum(free) == sum(half) == sum(even) and max(even) - min(even) <= 16 * len(shapes)
    assert max(free) - min(free) > 32
    assert all(abs(h - (f + e) / 2) <= 32 for f, h, e in zip(free, half, even, strict=True))


@pytest.mark.parametrize("in_nats", [False, True])
def test_energies_in_nats_compare_as_they_are(in_nats):
    """Scaling a projection moves the ranks there; of shares of its energy it does not."""
    shapes, energies = SHAPES[1], energies_for(SHAPES[1])
    scaled = [([e * 1e3 for e in energies[0][0]], energies[0][1]), *energies[1:]]
    plain, more = (ranks.spectrum(shapes, 0.5, e, in_nats=in_nats) for e in (energies, scaled))
    assert sum(more[0][0]) > sum(plain[0][0]) if in_nats else more == plain


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12), st.floats(0, 1))
def test_runs_are_cut_in_proportion_and_none_away(caps, share):
    least, most = sum(cap > 0 for cap in caps), sum(caps)
    total = least + round(share * (most - least))
    steps = ranks.proportional(caps, total)
    assert sum(steps) == total
    assert all(min(cap, 1) <= n <= cap for n, cap in zip(steps, caps, strict=True))
    of_most = [n for n, cap in zip(steps, caps, strict=True) if cap == max(caps)]
    assert max(of_most) - min(of_most) <= 1
