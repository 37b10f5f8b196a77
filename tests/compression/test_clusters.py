"""Head clustering: the similarity is what it says, and planted groups are found again."""

import itertools

import pytest
import torch
from slowly import slow_unless

from lrattn.compression import clusters


def planted(groups, size, head_dim=16, inputs=96, noise=0.0, seed=0):
    """Heads of a group share a subspace of the inputs; the heads are shuffled. Weights [Hkv, D, E] and their groups."""
    g = torch.Generator().manual_seed(seed)
    bases = torch.randn(groups, head_dim, inputs, generator=g, dtype=torch.float64)
    order, heads = torch.randperm(groups * size, generator=g).tolist(), []
    for h in order:
        mixed = torch.randn(head_dim, head_dim, generator=g, dtype=torch.float64) @ bases[h // size]
        heads.append(mixed + noise * torch.randn(head_dim, inputs, generator=g, dtype=torch.float64))
    members = [tuple(sorted(i for i, h in enumerate(order) if h // size == k)) for k in range(groups)]
    return torch.stack(heads), tuple(sorted(members))


def moment_of(inputs=96, seed=1):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(400, inputs, generator=g, dtype=torch.float64) @ torch.randn(inputs, inputs, generator=g).double()
    return x, x.T @ x


def ways(heads, size):
    """All ways to group heads."""
    if not heads:
        yield ()
    for rest in itertools.combinations(heads[1:], size - 1) if heads else ():
        group = (heads[0], *rest)
        for others in ways([h for h in heads if h not in group], size):
            yield (group, *others)


def test_similarity_is_the_linear_cka_of_the_outputs_and_energy_lost_what_they_lose():
    weight, members = planted(2, 3, noise=0.5)
    x, moment = moment_of()
    gram, outputs = clusters.outputs_gram(weight, moment), [x @ w.T for w in weight]
    for i, j in itertools.product(range(6), repeat=2):
        a, b = outputs[i], outputs[j]
        expected = (a.T @ b).norm() ** 2 / ((a.T @ a).norm() * (b.T @ b).norm())
        torch.testing.assert_close(clusters.similarity(gram)[i, j], expected)
    tails = [torch.linalg.svdvals(torch.cat([outputs[h] for h in group], 1))[16:] for group in members]
    left, whole = (sum(y.square().sum() for y in ys) for ys in (tails, outputs))
    assert clusters.lost(gram, members, 16) == pytest.approx((left / whole).item(), rel=1e-6)


@pytest.mark.parametrize("rule", [clusters.greedy, clusters.balanced])
@pytest.mark.parametrize("groups, size", [(3, 3), (2, 3), (4, 2), (8, 2)])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_planted_groups_are_found(rule, groups, size, noise):
    weight, members = planted(groups, size, noise=noise)
    gram = clusters.outputs_gram(weight, moment_of()[1])
    assert rule(gram, size, 16) == members


def test_the_paper_s_rule_mixes_pairs_where_balanced_does_not():
    """Two clean groups of four: greedy puts the second pair, of the other group, beside the first."""
    weight, members = planted(2, 4, noise=0.3, seed=5)
    gram = clusters.outputs_gram(weight, moment_of()[1])
    assert clusters.balanced(gram, 4, 16) == members
    mixed = clusters.greedy(gram, 4, 16)
    assert mixed != members and clusters.lost(gram, mixed, 16) > 1.5 * clusters.lost(gram, members, 16)


@pytest.mark.parametrize("seed", slow_unless(range(2), range(6)))
@pytest.mark.parametrize("heads, size", [(8, 4), (9, 3), (8, 2), (6, 3)])
def test_balanced_loses_no_more_than_the_others_and_little_more_than_the_best(heads, size, seed):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(heads, 16, 48, generator=g, dtype=torch.float64) @ torch.randn(48, 48, generator=g).double()
    gram = clusters.outputs_gram(weight, torch.eye(48, dtype=torch.float64))
    rank = 8 * size
    found = clusters.balanced(gram, size, rank)
    assert sorted(h for group in found for h in group) == list(range(heads)) and {len(x) for x in found} == {size}
    lost = clusters.lost(gram, found, rank)
    for other in (clusters.contiguous(heads, size), clusters.greedy(gram, size)):
        assert lost <= clusters.lost(gram, other, rank) * (1 + 1e-9)
    assert lost <= 1.03 * min(clusters.lost(gram, way, rank) for way in ways(list(range(heads)), size))


def test_balanced_is_not_caught_in_poor_groups():
    """Four noisy groups of four: swaps alone end in worse groups than those planted, from other starts than its own."""
    for seed in range(15):
        weight, members = planted(4, 4, noise=1.0, seed=seed)
        gram = clusters.outputs_gram(weight, moment_of()[1])
        assert clusters.lost(gram, clusters.balanced(gram, 4, 32), 32) <= clusters.lost(gram, members, 32) * (1 + 1e-9)


@pytest.mark.parametrize("rule", [clusters.greedy, clusters.balanced])
def test_groups_of_one_and_of_all_are_as_they_must_be_and_a_head_of_zeros_is_no_obstacle(rule):
    weight, _ = planted(2, 2)
    weight[1] = 0
    gram = clusters.outputs_gram(weight, moment_of()[1])
    assert rule(gram, 1, 16) == ((0,), (1,), (2,), (3,)) and rule(gram, 4, 16) == ((0, 1, 2, 3),)
    assert sorted(h for g in rule(gram, 2, 16) for h in g) == [0, 1, 2, 3]
    assert clusters.lost(gram * 0, ((0, 1), (2, 3)), 16) == 0
