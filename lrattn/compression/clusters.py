"""Which kv heads share a latent: HSR, head-wise similarity-aware reordering (ReCalKV, arXiv 2505.24357, section 3.2).

Heads are grouped by the Gram matrix S = W C W^T of all heads' outputs, [Hkv * D, Hkv * D], with C the second moment
of the inputs. A group of heads at rank r loses the eigenvalues of its block of S beyond the first r.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import combinations

import torch
from torch import Tensor

Groups = tuple[tuple[int, ...], ...]
Cluster = Callable[[Tensor, int, int], Groups]

TRIES = 4  # swaps tried on the true objective in a round, per head: the most promising ones by `overlaps`


def outputs_gram(weight: Tensor, moment: Tensor) -> Tensor:
    """Gram matrix of the heads' outputs: weight [Hkv, D, E], moment [E, E] -> [Hkv, D, Hkv, D]."""
    w = weight.flatten(0, 1)
    return (w @ moment @ w.T).view(*weight.shape[:2], *weight.shape[:2])


def contiguous(heads: int, size: int) -> Groups:
    """Groups of `size` heads in the model's order."""
    return tuple(tuple(range(i, i + size)) for i in range(0, heads, size))


def overlaps(gram: Tensor) -> Tensor:
    """Squared Frobenius norm of the block of every pair of heads: [Hkv, Hkv]."""
    return gram.square().sum((1, 3))


def similarity(gram: Tensor) -> Tensor:
    """Linear CKA between heads, [Hkv, Hkv] in [0, 1]: ||S_ij||^2 / (||S_ii|| ||S_jj||) in Frobenius norms.

    With S_ij = W_i C W_j^T it is the CKA of the heads' outputs on the calibration tokens, uncentred. The released code
    centres over the eigen-coordinates of C, which has no meaning for the outputs.
    """
    blocks = overlaps(gram)
    own = blocks.diagonal().sqrt().clamp_min(torch.finfo(gram.dtype).tiny)
    return blocks / own[:, None] / own


def greedy(gram: Tensor, size: int, rank: int = 0) -> Groups:
    """The paper's rule: pairs of heads in order of falling CKA.

    A pair of free heads goes to the first group with room for both; a free head joins the group of its partner if
    there is room; heads that are left over fill the holes. (The released code puts a pair into a group with room for
    one, too, and moves what spills; for groups of an even size that is the same.) The rank is not used.
    """
    cka = similarity(gram)
    groups: list[list[int]] = [[] for _ in range(len(cka) // size)]
    home: dict[int, list[int]] = {}

    def put(group: list[int], *members: int) -> None:
        if len(group) + len(members) <= size:
            group.extend(members)
            home.update(dict.fromkeys(members, group))

    for i, j in sorted(combinations(range(len(cka)), 2), key=lambda pair: -cka[pair].item()):
        if i not in home and j not in home:
            put(min(groups, key=lambda group: len(group) + 2 > size), i, j)  # the first with room, if there is one
        elif i not in home:
            put(home[j], i)
        elif j not in home:
            put(home[i], j)
    for h in range(len(cka)):
        if h not in home:
            put(next(group for group in groups if len(group) < size), h)
    return _sorted(groups)


def balanced(gram: Tensor, size: int, rank: int) -> Groups:
    """Groups of `size` heads that lose little at `rank`: the best simple start, refined by swaps.

    Starts from the model's order, from the greedy rule and from swaps that raise the overlaps within groups; then any
    swap of two heads that lowers the energy lost is taken, until none of those tried does. So it never loses more than
    the first two.
    """
    if size in (1, len(gram)):
        return contiguous(len(gram), size)
    loss = _loss(gram, rank)
    within = overlaps(gram)
    starts = [contiguous(len(gram), size), greedy(gram, size)]
    starts += [_by_overlap(start, within) for start in starts]
    groups = [list(g) for g in min(starts, key=loss)]
    improved = True
    while improved:
        improved = False
        for _, a, i, b, j in sorted(_swaps(groups, within), reverse=True)[: TRIES * len(gram)]:
            new_a, new_b = _swapped(groups[a], i, groups[b][j]), _swapped(groups[b], j, groups[a][i])
            before, after = loss((groups[a], groups[b])), loss((new_a, new_b))
            if after < before * (1 - 1e-9):
                groups[a], groups[b], improved = new_a, new_b, True
    return _sorted(groups)


def lost(gram: Tensor, groups: Groups, rank: int) -> float:
    """Share of the outputs' energy that groups of heads lose at `rank`, in [0, 1]; gram [Hkv, D, Hkv, D]."""
    whole = gram.flatten(0, 1).flatten(1).trace().item()
    return _loss(gram, rank)(groups) / whole if whole else 0.0


def _loss(gram: Tensor, rank: int) -> Callable[[Iterable[Iterable[int]]], float]:
    """(groups) -> energy beyond the first `rank` eigenvalues; each group of heads is computed once."""

    @cache
    def of(heads: frozenset[int]) -> float:
        block = gram[sorted(heads)][:, :, sorted(heads)].flatten(0, 1).flatten(1)
        tail = torch.linalg.eigvalsh(block)[: max(len(block) - rank, 0)]
        return tail.clamp_min(0).sum().item()

    return lambda groups: sum(of(frozenset(group)) for group in groups)


def _by_overlap(start: Groups, within: Tensor) -> Groups:
    """Best swap after best swap, as long as the overlaps within groups rise."""
    groups = [list(g) for g in start]
    while True:
        gain, a, i, b, j = max(_swaps(groups, within))
        if gain <= 1e-9 * within.sum().item():
            return _sorted(groups)
        groups[a], groups[b] = _swapped(groups[a], i, groups[b][j]), _swapped(groups[b], j, groups[a][i])


def _swaps(groups: list[list[int]], within: Tensor) -> Iterator[tuple[float, int, int, int, int]]:
    """Every swap of member i of group a with member j of group b, and by how much it raises the overlaps within."""
    to_group = torch.stack([within[:, g].sum(1) for g in groups], 1).tolist()  # [Hkv, G]
    pair = within.tolist()
    for a, b in combinations(range(len(groups)), 2):
        for i, h in enumerate(groups[a]):
            for j, k in enumerate(groups[b]):
                stay = to_group[h][a] - pair[h][h] + to_group[k][b] - pair[k][k]
                move = to_group[h][b] + to_group[k][a] - 2 * pair[h][k]
                yield move - stay, a, i, b, j


def _swapped(group: list[int], i: int, head: int) -> list[int]:
    return [head if n == i else h for n, h in enumerate(group)]


def _sorted(groups: list[list[int]]) -> Groups:
    """One way to write a grouping: heads in order within groups, groups in order of their first head."""
    return tuple(sorted(tuple(sorted(g)) for g in groups))
