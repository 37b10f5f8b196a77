"""Which kv heads share a latent: HSR, head-wise similarity-aware reordering (ReCalKV, arXiv 2505.24357, section 3.2).

Heads are grouped by the Gram matrix S = W C W^T of all heads' outputs, [Hkv * D, Hkv * D], with C the second moment
of the inputs. A group of heads at rank r loses the eigenvalues of its block of S beyond the first r.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
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
    heads = len(cka)
    groups: list[list[int]] = [[] for _ in range(heads // size)]
    home: dict[int, list[int]] = {}

    def put(group: list[int] | None, *members: int) -> None:
        if group is not None and len(group) + len(members) <= size:
            group.extend(members)
            home.update(dict.fromkeys(members, group))

    for i, j in sorted(combinations(range(heads), 2), key=lambda pair: -cka[pair].item()):
        free = [h for h in (i, j) if h not in home]
        if len(free) == 2:
            put(next((g for g in groups if len(g) + 2 <= size), None), i, j)
        elif free:
            put(home[i if free[0] == j else j], free[0])
    for h in range(heads):
        if h not in home:
            put(next(g for g in groups if len(g) < size), h)
    return _sorted(groups)


def balanced(gram: Tensor, size: int, rank: int) -> Groups:
    """Groups of `size` heads that lose little at `rank`: the best simple start, refined by swaps.

    Starts from the model's order, from the greedy rule and from swaps that raise the overlaps within groups; then any
    swap of two heads that lowers the energy lost is taken, until none of those tried does. So it never loses more than
    the first two.
    """
    if size in (1, len(gram)):
        return contiguous(len(gram), size)
    loss = _Loss(gram, rank)
    within = overlaps(gram)
    starts = [contiguous(len(gram), size), greedy(gram, size)]
    starts += [_by_overlap(start, within) for start in starts]
    groups = [list(g) for g in min(starts, key=loss.of)]
    improved = True
    while improved:
        improved = False
        for _, a, i, b, j in sorted(_swaps(groups, within), reverse=True)[: TRIES * len(gram)]:
            new_a, new_b = _swapped(groups[a], i, groups[b][j]), _swapped(groups[b], j, groups[a][i])
            before, after = loss.of((groups[a], groups[b])), loss.of((new_a, new_b))
            if after < before * (1 - 1e-9):
                groups[a], groups[b], improved = new_a, new_b, True
    return _sorted(groups)


def lost(gram: Tensor, groups: Groups, rank: int) -> float:
    """Share of the outputs' energy that groups of heads lose at `rank`, in [0, 1]; gram [Hkv, D, Hkv, D]."""
    whole = gram.flatten(0, 1).flatten(1).trace().item()
    return _Loss(gram, rank).of(groups) / whole if whole else 0.0


class _Loss:
    """Energy beyond the first `rank` eigenvalues, each group of heads computed once."""

    def __init__(self, gram: Tensor, rank: int) -> None:
        self.gram, self.rank = gram, rank
        self.known: dict[frozenset[int], float] = {}

    def of(self, groups: Groups | tuple[list[int], ...]) -> float:
        return sum(self._group(frozenset(g)) for g in groups)

    def _group(self, heads: frozenset[int]) -> float:
        if heads not in self.known:
            index = sorted(heads)
            block = self.gram[index][:, :, index].flatten(0, 1).flatten(1)
            tail = torch.linalg.eigvalsh(block)[: max(len(block) - self.rank, 0)]
            self.known[heads] = tail.clamp_min(0).sum().item()
        return self.known[heads]


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
