"""A byte budget -> the rank of every group of keys and values in every layer."""

from __future__ import annotations

from dataclasses import dataclass

from lrattn.shapes import RANK_STEP, norm_width, round_up


@dataclass(frozen=True)
class LayerShape:
    """What a layer's budget depends on: Hkv kv heads of D dims in groups of C, E inputs, key norm or not."""

    heads: int
    head_dim: int
    group_size: int
    inputs: int
    key_norm: bool = False

    @property
    def groups(self) -> int:
        return self.heads // self.group_size

    @property
    def full_rank(self) -> int:
        """Rank at which a group's map is exact: C * D outputs or E inputs, whichever is fewer, up to a step of 16."""
        return round_up(min(self.group_size * self.head_dim, self.inputs), RANK_STEP)

    @property
    def norm_width(self) -> int:
        return norm_width(self.heads) if self.key_norm else 0

    @property
    def dense(self) -> int:
        return 2 * self.heads * self.head_dim


Ranks = tuple[tuple[int, ...], tuple[int, ...]]  # of the key groups, of the value groups


def group_size_within(heads: int, at_most: int) -> int:
    """The largest divisor of Hkv not above `at_most`."""
    if at_most < 1:
        raise ValueError(f"group_size: expected at least 1, got {at_most}")
    return max(c for c in range(1, min(heads, at_most) + 1) if heads % c == 0)


def uniform(shapes: list[LayerShape], keep: float) -> list[Ranks]:
    """The same share of every group's full rank, in steps of 16; what rounding leaves over is spread evenly.

    The latents and norm columns of all layers together take at most keep * (numbers of a dense cache), and less
    than one step of 16 below it unless every group is full. keep = 1 means full rank, whatever norm columns add.

    Raises: ValueError if keep is outside (0, 1] or too small to give every group one step.
    """
    if not 0 < keep <= 1:
        raise ValueError(f"keep: expected a share in (0, 1], got {keep}")
    sides = [shape.full_rank // RANK_STEP for shape in shapes for _ in range(2 * shape.groups)]  # steps, keys first
    if keep == 1:
        steps = sides
    else:
        norms = sum(shape.norm_width for shape in shapes)
        budget = int(keep * sum(shape.dense for shape in shapes) + 1e-6) - norms
        if budget // RANK_STEP < len(sides):
            need = (RANK_STEP * len(sides) + norms) / sum(shape.dense for shape in shapes)
            raise ValueError(
                f"keep: expected at least {need:.3f}, one step of 16 a group and the norm columns, got {keep}"
            )
        steps = [1 + n for n in _spread(budget // RANK_STEP - len(sides), [side - 1 for side in sides])]
    ranks = iter(RANK_STEP * n for n in steps)
    return [(tuple(next(ranks) for _ in range(s.groups)), tuple(next(ranks) for _ in range(s.groups))) for s in shapes]


def _spread(budget: int, caps: list[int]) -> list[int]:
    """Whole steps in proportion to `caps`, never above them, that add up to min(budget, sum of caps)."""
    total, given, passed = max(sum(caps), 1), 0, 0
    budget = min(budget, sum(caps))
    steps = []
    for cap in caps:
        passed += cap
        upto = budget * passed // total
        steps.append(upto - given)
        given = upto
    return steps
