"""A byte budget -> the rank of every group of keys and values in every layer."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from torch import Tensor

from lrattn.compression.arguments import check_count, check_share
from lrattn.factors.formats import ALIGNMENT
from lrattn.factors.shapes import RANK_STEP, round_up

Ranks = tuple[tuple[int, ...], tuple[int, ...]]  # of the key groups, of the value groups
RULES = ("spectrum", "fisher", "uniform", "condition")


@dataclass(frozen=True)
class LayerShape:
    """What a layer's budget depends on: Hkv kv heads of D dims, heads in a key and in a value group."""

    heads: int
    head_dim: int
    key_group: int
    value_group: int
    shared: bool = False
    whole_values: bool = False  # only keys are compressed
    bits: int = 16  # of a latent, the fewest there may be
    parts: int = 1  # of a group's row, each with a step and a scale of its own at least

    @property
    def groups(self) -> tuple[int, int]:
        """Groups of keys, groups of values; no keys, and the rows, where rows are shared."""
        return 0 if self.shared else self.heads // self.key_group, self.heads // self.value_group

    @property
    def full_ranks(self) -> tuple[int, int]:
        """Rank at which a group of keys, and one of values, is exact: its C * D numbers, up to a step of 16; 2 C D of a
        shared row."""
        sizes = self.key_group, self.value_group * (2 if self.shared else 1)
        key, value = (round_up(size * self.head_dim, RANK_STEP) for size in sizes)
        return key, value

    @property
    def overhead(self) -> int:
        """Bytes of a token that are not latents: scales, where latents are packed."""
        return 0 if self.bits == 16 else ALIGNMENT * self.parts * sum(self.groups)

    @property
    def dense(self) -> int:
        return 2 * self.heads * self.head_dim


def group_size_within(heads: int, at_most: int) -> int:
    """The largest divisor of Hkv not above `at_most`."""
    check_count("group_size", at_most, 1)
    return max(c for c in range(1, min(heads, at_most) + 1) if heads % c == 0)


def uniform(shapes: Sequence[LayerShape], keep: float) -> list[Ranks]:
    """The same share of every group's full rank; what rounding leaves over is spread evenly."""
    return _ranks(shapes, _rounded(_shares([float(cap) for cap in _caps(shapes)], shapes, keep)))


def fisher(shapes: Sequence[LayerShape], keep: float, scores: Sequence[tuple[float, float]]) -> list[Ranks]:
    """Palu's and ReCalKV's rule: in proportion to Fisher scores, keys and values of all layers in one pool.

    scores: per layer, of the key and of the value projection (Moments.fisher). A projection's share goes to its groups
    in equal parts. What a group cannot hold goes to the others in proportion. The papers round to multiples of 32 and
    let the budget drift; here it is met.
    """
    if len(scores) != len(shapes):
        raise ValueError(f"scores: expected one pair for each of {len(shapes)} layers, got {len(scores)}")
    if not all(0 <= score < float("inf") for pair in scores for score in pair):
        raise ValueError(f"scores: expected finite numbers, none below 0, got {list(scores)}")
    weights = [
        score / groups
        for shape, pair in zip(shapes, scores, strict=True)
        for score, groups in zip((0.0, sum(pair)) if shape.shared else pair, shape.groups, strict=True)
        for _ in range(groups)
    ]
    return _ranks(shapes, _rounded(_shares(weights, shapes, keep)))


def spectrum(
    shapes: Sequence[LayerShape],
    keep: float,
    energies: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]],
    *,
    in_nats: bool = False,
    level: float = 0.0,
) -> list[Ranks]:
    """Water-filling: every step of 16 latents goes where it saves most.

    Args:
        energies: per layer, of the key groups and of the value groups (none and the rows, where rows are shared), each
            [n] descending.
        in_nats: they compare over layers, keys and values. Else they are divided by their projection's sum.
        level: share of every layer's budget that is the same for all layers; within a layer water-filling decides.
    """
    gains: list[list[float]] = []  # of each group's steps
    for pair in energies:
        for side in pair:
            total = 1.0 if in_nats else max(sum(e.sum().item() for e in side), 1e-300)
            gains += [[step.sum().item() / total for step in e.split(RANK_STEP)] for e in side]
    leasts, caps = _leasts(shapes), _caps(shapes)
    if [len(g) for g in gains] != caps:
        raise ValueError(f"energies: expected {caps} steps of {RANK_STEP}, got {[len(g) for g in gains]}")
    steps = _filled(gains, leasts, budget(shapes, keep))
    if level:
        counts = [sum(s.groups) for s in shapes]
        by_layer = ([sum(part) for part in _split(numbers, counts)] for numbers in (steps, leasts, caps))
        totals, layer_leasts, layer_caps = by_layer
        rate = (sum(steps) - sum(leasts)) / max(sum(caps) - sum(leasts), 1)
        even = [least + rate * (cap - least) for least, cap in zip(layer_leasts, layer_caps, strict=True)]
        wanted = _rounded([level * e + (1 - level) * t for e, t in zip(even, totals, strict=True)])
        layers = zip(_split(gains, counts), _split(leasts, counts), wanted, strict=True)
        steps = [n for layer in layers for n in _filled(*layer)]
    return _ranks(shapes, steps)


def proportional(caps: Sequence[int], total: int) -> list[int]:
    """Steps of 16 latents for runs of these many: the same share of each, one at least of any, `total` in all."""
    shares = _adding_up(lambda at: [at * cap for cap in caps], 1.0, [min(cap, 1) for cap in caps], caps, total)
    return _rounded(shares)


def condition(shapes: Sequence[LayerShape], keep: float, logs: Sequence[float]) -> list[Ranks]:
    """LoRC's rule (arXiv 2410.03111): early layers, whose errors all later ones multiply, keep more.

    logs: per layer, log of the condition number of its key weight plus that of its value weight. With c_l their sum
    over layer l and all later ones, and s_l = (c_l - min c) / (max c - min c), a group of layer l gets the share
    least + s_l (most - least) of its full rank. The paper has two settings for these; here most = 1 and `least` meets
    the budget, or least = 0 and `most` does.
    """
    if len(logs) != len(shapes) or not all(0 <= x < float("inf") for x in logs):
        raise ValueError(f"logs: expected {len(shapes)} finite numbers, none below 0, got {list(logs)}")
    products = list(accumulate(reversed(logs)))[::-1]
    spread = products[0] - products[-1]
    scores = [(c - products[-1]) / spread if spread else 1.0 for c in products]
    scores = [score for shape, score in zip(shapes, scores, strict=True) for _ in range(sum(shape.groups))]

    def shares(at: float) -> list[float]:
        least, most = max(at - 1, 0.0), min(at, 1.0)
        return [(least + (most - least) * score) * cap for score, cap in zip(scores, _caps(shapes), strict=True)]

    return _ranks(shapes, _rounded(_met(shares, 2.0, shapes, keep)))


def _filled(gains: Sequence[Sequence[float]], leasts: Sequence[int], total: int) -> list[int]:
    """Steps of each group, at least these: `total` in all, each where it gains most."""
    steps = list(leasts)
    heap = [(-g[least], i) for i, (g, least) in enumerate(zip(gains, leasts, strict=True)) if len(g) > least]
    heapq.heapify(heap)
    for _ in range(min(total, sum(map(len, gains))) - sum(leasts)):
        _, i = heapq.heappop(heap)
        steps[i] += 1
        if steps[i] < len(gains[i]):
            heapq.heappush(heap, (-gains[i][steps[i]], i))
    return steps


def _split(items: Sequence[Any], counts: Sequence[int]) -> list[Sequence[Any]]:
    """Consecutive runs of these lengths."""
    ends = list(accumulate(counts))
    return [items[end - count : end] for end, count in zip(ends, counts, strict=True)]


def budget(shapes: Sequence[LayerShape], keep: float) -> int:
    """Steps of 16 latents, of the same bits in all layers, that all groups may hold together.

    Latents of all layers, scales included, take at most keep * (numbers of a dense cache), and less than one step below
    it unless every group is full. keep = 1 means full rank.

    Raises: ValueError if keep is outside (0, 1] or too small to give every group one step, or all of values that a
    method leaves whole.
    """
    check_share(keep)
    full = sum(_caps(shapes))
    if keep == 1:
        return full
    what = f"{'one step' if shapes[0].parts == 1 else f'{shapes[0].parts} steps'} of 16 a group"
    what = f"all of the values, {what}" if any(s.whole_values for s in shapes) else what
    overhead, dense = sum(s.overhead for s in shapes), 2 * sum(s.dense for s in shapes)
    return min(affordable(keep, dense, overhead, sum(_leasts(shapes)), what, shapes[0].bits), full)


def affordable(keep: float, dense: int, overhead: int, least: int, what: str, bits: int = 16) -> int:
    """Steps of 16 latents of these bits within keep * dense bytes a token, beside so many bytes of overhead.

    Raises: ValueError if keep is outside (0, 1] or allows fewer than `least` steps: `what` says what those are.
    """
    check_share(keep)
    step = RANK_STEP * bits // 8
    steps = int(keep * dense - overhead + 1e-6) // step
    if steps < least:
        need = (step * least + overhead) / dense
        raise ValueError(f"keep: expected at least {need:.3f}, {what}, got {keep}")
    return steps


def _caps(shapes: Sequence[LayerShape]) -> list[int]:
    """Steps at which each group is full: layer by layer, keys before values."""
    return [
        rank // RANK_STEP
        for s in shapes
        for rank, groups in zip(s.full_ranks, s.groups, strict=True)
        for _ in range(groups)
    ]


def _leasts(shapes: Sequence[LayerShape]) -> list[int]:
    """Steps that each group has at least, in the order of `_caps`: one for each part of its row, or all of them."""
    return [
        rank // RANK_STEP if whole else s.parts
        for s in shapes
        for rank, groups, whole in zip(s.full_ranks, s.groups, (False, s.whole_values), strict=True)
        for _ in range(groups)
    ]


def _shares(weights: list[float], shapes: Sequence[LayerShape], keep: float) -> list[float]:
    """Reals in proportion to `weights` that add up to the budget, held within what each group may have."""
    least = max(max(weights) * 1e-9, 1e-300)  # a score of zero takes what the others cannot hold
    weights = [max(w, least) for w in weights]
    return _met(lambda at: [at * w for w in weights], (max(_caps(shapes)) + 1) / min(weights), shapes, keep)


def _met(shares: Callable[[float], list[float]], high: float, shapes: Sequence[LayerShape], keep: float) -> list[float]:
    """Shares at the argument in [0, high] where they add up to the budget, each held within what its group may have."""
    return _adding_up(shares, high, _leasts(shapes), _caps(shapes), budget(shapes, keep))


def _adding_up(
    shares: Callable[[float], list[float]], high: float, leasts: Sequence[int], caps: Sequence[int], total: int
) -> list[float]:
    if total == sum(caps):
        return [float(cap) for cap in caps]

    def held(at: float) -> list[float]:
        return [min(max(x, least), cap) for x, least, cap in zip(shares(at), leasts, caps, strict=True)]

    low = 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(held(middle)) < total else (low, middle)
    return held(high)


def _rounded(shares: list[float]) -> list[int]:
    """Whole steps, each next to its share, with the same sum: the fractions are carried on from group to group."""
    steps, passed, given = [], 0.0, 0
    for share in shares:
        passed += share
        upto = int(passed + 1e-6)
        steps.append(upto - given)
        given = upto
    return steps


def _ranks(shapes: Sequence[LayerShape], steps: Sequence[int]) -> list[Ranks]:
    ranks = iter(RANK_STEP * n for n in steps)
    return [
        (tuple(next(ranks) for _ in range(k)), tuple(next(ranks) for _ in range(v)))
        for k, v in (s.groups for s in shapes)
    ]
