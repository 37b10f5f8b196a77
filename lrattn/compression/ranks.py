"""A byte budget -> the rank of every group of keys and values in every layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise
from typing import Any

from torch import Tensor

from lrattn.compression.arguments import check_count, check_share
from lrattn.factors.formats import STEPS, WORD
from lrattn.factors.shapes import RANK_STEP, cdiv, round_up

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
    parts: int = 1  # of a group's row, which have bits apart

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
    def rows(self) -> list[tuple[tuple[int, ...], int]]:
        """Of the rows of keys and of values, or of those that both share: the most latents of each part, and groups."""
        sides = zip(self.full_ranks, self.groups, strict=True)
        return [((round_up(cdiv(rank, self.parts), RANK_STEP),) * self.parts, n) for rank, n in sides if n]

    @property
    def step(self) -> int:
        """Latents in a step of ranks: 16, or as many as fill the 16 bytes that packed ones are padded to."""
        return STEPS[self.bits]

    @property
    def step_bytes(self) -> int:
        """What a step takes, also one that a full rank ends within."""
        return self.step * self.bits // 8

    @property
    def caps(self) -> list[int]:
        """Steps at which each group is full, keys before values."""
        sides = zip(self.full_ranks, self.groups, strict=True)
        return [cdiv(rank, self.step) for rank, n in sides for _ in range(n)]

    @property
    def leasts(self) -> list[int]:
        """Steps that each group has at least: one, or all of them."""
        keys, values = self.groups
        return [1] * keys + (self.caps[keys:] if self.whole_values else [1] * values)

    @property
    def overhead(self) -> int:
        """Bytes of a token that are not latents: scales, where latents are packed."""
        return 0 if self.bits == 16 else WORD * sum(self.groups)

    @property
    def dense(self) -> int:
        return 2 * self.heads * self.head_dim


def group_size_within(heads: int, at_most: int) -> int:
    """The largest divisor of Hkv not above `at_most`."""
    check_count("group_size", at_most, 1)
    return max(c for c in range(1, min(heads, at_most) + 1) if heads % c == 0)


def uniform(shapes: Sequence[LayerShape], keep: float) -> list[Ranks]:
    """The same share of every group's full rank; what rounding leaves over is spread evenly."""
    leasts, caps, total = _bounds(shapes, keep)
    return _ranks(shapes, _proportional(caps, leasts, caps, total))


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
    return _ranks(shapes, _proportional(weights, *_bounds(shapes, keep)))


def spectrum(
    shapes: Sequence[LayerShape],
    keep: float,
    energies: Sequence[tuple[Sequence[Tensor], Sequence[Tensor]]],
    *,
    in_nats: bool = False,
    level: float = 0.0,
) -> list[Ranks]:
    """Water-filling: every step of latents goes where it saves most.

    Args:
        energies: per layer, of the key groups and of the value groups (none and the rows, where rows are shared), each
            [n] descending.
        in_nats: they compare over layers, keys and values. Else they are divided by their projection's sum.
        level: share of every layer's budget that is the same for all layers; within a layer water-filling decides.
    """
    gains: list[list[float]] = []  # of each group's steps
    latents = shapes[0].step
    for pair in energies:
        for side in pair:
            whole = 1.0 if in_nats else max(sum(e.sum().item() for e in side), 1e-300)
            gains += [[step.sum().item() / whole for step in e.split(latents)] for e in side]
    leasts, caps, total = _bounds(shapes, keep)
    if [len(g) for g in gains] != caps:
        raise ValueError(f"energies: expected {caps} steps of {latents}, got {[len(g) for g in gains]}")
    steps = _filled(gains, leasts, total)
    if level:
        rate = (sum(steps) - sum(leasts)) / max(sum(caps) - sum(leasts), 1)
        wanted = []
        for shape, own in zip(shapes, _by_layer(shapes, steps), strict=True):
            least, cap = sum(shape.leasts), sum(shape.caps)
            wanted.append(level * (least + rate * (cap - least)) + (1 - level) * sum(own))
        layers = zip(_by_layer(shapes, gains), shapes, _rounded(wanted), strict=True)
        steps = [n for own, shape, part in layers for n in _filled(own, shape.leasts, part)]
    return _ranks(shapes, steps)


def proportional(caps: Sequence[int], total: int) -> list[int]:
    """Steps of 16 latents for runs of these many: the same share of each, one at least of any, `total` in all."""
    return _proportional(caps, [min(cap, 1) for cap in caps], caps, total)


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
    caps = [(score, cap) for shape, score in zip(shapes, scores, strict=True) for cap in shape.caps]

    def shares(at: float) -> list[float]:
        least, most = max(at - 1, 0.0), min(at, 1.0)
        return [(least + (most - least) * score) * cap for score, cap in caps]

    return _ranks(shapes, _met(shares, 2.0, *_bounds(shapes, keep)))


def _filled(gains: Sequence[Sequence[float]], leasts: Sequence[int], total: int) -> list[int]:
    """Steps of each group, at least these: `total` in all, each where it gains most."""
    steps = list(leasts)
    # Its worth is at most that of the steps before it, which have to be taken first.
    found = [
        (-worth, i)
        for i, (own, least) in enumerate(zip(gains, leasts, strict=True))
        for worth in accumulate(own[least:], min)
    ]
    for _, i in sorted(found)[: total - sum(leasts)]:
        steps[i] += 1
    return steps


def budget(shapes: Sequence[LayerShape], keep: float) -> int:
    """Steps of latents, of the same bits in all layers, that all groups may hold together.

    Latents of all layers, scales and padding included, take at most keep * (bytes of a dense cache), and less than one
    step below it unless every group is full. keep = 1 means full rank.

    Raises: ValueError if keep is outside (0, 1] or too small to give every group one step, or all of values that a
    method leaves whole.
    """
    check_share(keep)
    full = sum(sum(s.caps) for s in shapes)
    if keep == 1:
        return full
    what = f"one step of {shapes[0].step} a group"
    what = f"all of the values, {what}" if any(s.whole_values for s in shapes) else what
    overhead, dense = sum(s.overhead for s in shapes), 2 * sum(s.dense for s in shapes)
    least = sum(sum(s.leasts) for s in shapes)
    return min(affordable(keep, dense, overhead, least, what, shapes[0].step_bytes), full)


def affordable(keep: float, dense: int, overhead: int, least: int, what: str, step: int = 2 * RANK_STEP) -> int:
    """Steps of so many bytes within keep * dense bytes a token, beside so many bytes of overhead.

    Raises: ValueError if keep is outside (0, 1] or allows fewer than `least` steps: `what` says what those are.
    """
    check_share(keep)
    steps = int(keep * dense - overhead + 1e-6) // step
    if steps < least:
        need = (step * least + overhead) / dense
        raise ValueError(f"keep: expected at least {need:.3f}, {what}, got {keep}")
    return steps


def _bounds(shapes: Sequence[LayerShape], keep: float) -> tuple[list[int], list[int], int]:
    """Steps that each group has at least and at most, layer by layer, and all together."""
    leasts = [least for s in shapes for least in s.leasts]
    return leasts, [cap for s in shapes for cap in s.caps], budget(shapes, keep)


def _proportional(weights: Sequence[float], leasts: Sequence[int], caps: Sequence[int], total: int) -> list[int]:
    """Steps in proportion to `weights`, as `_met` has them."""
    floor = max(max(weights) * 1e-9, 1e-300)  # a weight of zero takes what the others cannot hold
    weights = [max(w, floor) for w in weights]
    return _met(lambda at: [at * w for w in weights], (max(caps) + 1) / min(weights), leasts, caps, total)


def _met(
    shares: Callable[[float], list[float]], high: float, leasts: Sequence[int], caps: Sequence[int], total: int
) -> list[int]:
    """Steps next to the shares at the argument in [0, high] where they, each held within bounds, add up to `total`."""
    if total == sum(caps):
        return list(caps)

    def held(at: float) -> list[float]:
        return [min(max(x, least), cap) for x, least, cap in zip(shares(at), leasts, caps, strict=True)]

    low = 0.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(held(middle)) < total else (low, middle)
    return _rounded(held(high))


def _rounded(shares: list[float]) -> list[int]:
    """Whole steps, each next to its share, with the same sum: the fractions are carried on from group to group."""
    ends = [int(passed + 1e-6) for passed in accumulate(shares)]
    return [end - begin for begin, end in pairwise((0, *ends))]


def _by_layer(shapes: Sequence[LayerShape], of_groups: Sequence[Any]) -> list[list[Any]]:
    """What is of all groups, one after the other, layer by layer."""
    rest = iter(of_groups)
    return [list(islice(rest, sum(shape.groups))) for shape in shapes]


def _ranks(shapes: Sequence[LayerShape], steps: Sequence[int]) -> list[Ranks]:
    found = []
    for shape, own in zip(shapes, _by_layer(shapes, steps), strict=True):
        sides = own[: shape.groups[0]], own[shape.groups[0] :]
        keys, values = (
            tuple(min(shape.step * n, full) for n in side) for side, full in zip(sides, shape.full_ranks, strict=True)
        )
        found.append((keys, values))
    return found
