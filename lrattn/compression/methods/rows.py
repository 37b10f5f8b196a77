"""One row for keys and values: both are linear in x, so that one latent can serve both.

Separate latents are a special case of a joint one, whose optimum is never worse at equal bytes. Keys are then rebuilt
from the whole row, or meet queries in all of it. Where keys are rebuilt and that costs too much time, values ride on
the key latent: they use it, too, and add columns of their own for what it leaves of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lrattn.compression.methods.weighted import METRIC_DAMPING, damped, factor, low_rank, roots
from lrattn.factors.shapes import RANK_STEP, pad_rank, round_up

# Of a row: False, keys and values apart; "ride", values ride on the key latent; True, one joint latent.
Form = bool | str
FORMS: tuple[Form, ...] = (False, "ride", True)

SPLITS = 24  # key ranks tried for a ride, about
SEEN = 1e-4  # of the largest pivot: below it are rounding, and columns too small for latents of 16 bits


@dataclass(frozen=True, eq=False)
class Side:
    """One side of a group: weight [C, D, E], its moment [E, E] and its metric [C * D, C * D], float64.

    The weights of the tokens in the moment add up to 1: so do those of both sides count alike in a common one.
    """

    weight: Tensor
    moment: Tensor
    metric: Tensor

    @property
    def flat(self) -> Tensor:
        return self.weight.flatten(0, 1)

    @cached_property
    def root(self) -> Tensor:
        """L with L L^T the damped moment, [E, E]."""
        return factor(self.moment)


def joint(keys: Side, values: Side) -> tuple[Tensor, Tensor, Tensor]:
    """The best row of every rank for keys and values stacked: energies [m], up [C, m, 2 D] (keys first), down [E, m].

    W = [Wk; Wv], G = blockdiag(Gk, Gv), each damped on its own, since keys may be far larger than values and their
    gradients smaller; and C the mean of both sides' moments: m = min(2 C D, E).
    """
    moment = (keys.moment + values.moment) / 2
    metric = torch.block_diag(*(damped(side.metric, METRIC_DAMPING) for side in (keys, values)))
    energies, up, down = low_rank(torch.cat((keys.flat, values.flat)), moment, metric, damping=0.0)
    heads = len(keys.weight)
    sides = [x.unflatten(1, (heads, -1)) for x in up.chunk(2, 1)]  # [m, C, D]
    return energies, torch.cat(sides, 2).transpose(0, 1), down


def splits(keys: Side, values: Side) -> tuple[Tensor, list[int]]:
    """How rows of a ride are split best between keys and values.

    Returns: what each latent of the widest row saves, [min(2 C D, E)], the latents of a step of 16 alike; and the key
    rank of a row of 16, 32, ... latents.
    """
    energies, _, down = low_rank(keys.flat, keys.moment, keys.metric)
    n, width = len(energies), min(2 * len(keys.flat), keys.weight.shape[2])
    step = max(RANK_STEP, round_up(n // SPLITS, RANK_STEP))
    known, _, seen = _seen(down, values)
    left = seen @ roots(values.metric)[0]
    tails: dict[int, Tensor] = {}  # key rank -> loss by the number of the values' own columns
    for rank in {*range(RANK_STEP, n, step), n}:
        rest = left[min(rank, known) :]
        own = torch.linalg.eigvalsh(rest.T @ rest).flip(0).clamp_min(0)
        left_over = own.flip(0).cumsum(0).flip(0)  # with 0, 1, ... of them
        tails[rank] = energies[rank:].sum() + torch.cat((left_over, own.new_zeros(1)))
    lost, ranks = [energies.sum() + left.square().sum()], []
    for row in range(RANK_STEP, round_up(width, RANK_STEP) + 1, RANK_STEP):
        fits = {rank: tail[min(row - rank, len(tail) - 1)].item() for rank, tail in tails.items() if rank <= row}
        ranks.append(min(fits, key=lambda rank: fits[rank]))
        lost.append(energies.new_tensor(fits[ranks[-1]]))
    gains = (torch.stack(lost[:-1]) - torch.stack(lost[1:])).clamp_min(0) / RANK_STEP
    return gains.repeat_interleave(RANK_STEP)[:width], ranks


def ride(keys: Side, values: Side, rank: int, row: int) -> tuple[float, Tensor, Tensor, Tensor]:
    """A row of `row` latents of which the keys use the first `rank`.

    With A the key's down side and zk = A x: B = Wv C A^T (A C A^T)^-1 is the best that values can make of zk, and
    Wv - B A, decomposed in the values' metric, gives the columns of their own.

    Returns: the loss, key up [C, rank, D], value up [C, row, D], down [E, row]; a row may come out shorter.
    """
    energies, key_up, down = low_rank(keys.flat, keys.moment, keys.metric)
    a = down[:, :rank]
    b, own, up, own_down = _riding(a, values)
    lost = energies[rank:].sum() + own[row - rank :].sum()
    up = torch.cat((b, up[: row - rank]))
    key_up, up = (x.unflatten(1, (len(keys.weight), -1)).transpose(0, 1) for x in (key_up[:rank], up))
    return lost.item(), key_up, up, torch.cat((a, own_down[:, : row - rank]), 1)


def noises(keys: Side, values: Side, rank: int) -> tuple[Tensor, Tensor]:
    """What an error as large as a latent costs, in a ride whose keys use `rank` of the row: of those latents, [rank],
    and of the values' own columns, [n].

    Errors of a key latent are errors of the values that ride on it, too. Falling, to share out bits in order: where a
    latent costs less than a later one, it counts as much.
    """
    energies, _, down = low_rank(keys.flat, keys.moment, keys.metric)
    b, own, _, _ = _riding(down[:, :rank], values)
    seen = (values.moment @ down[:, :rank] * down[:, :rank]).sum(0)
    riding = seen * (b @ values.metric * b).sum(1)
    costs = pad_rank(energies[:rank], 0, rank) + pad_rank(riding, 0, rank)
    return costs.flip(0).cummax(0).values.flip(0), own


def _riding(a: Tensor, values: Side) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the values make of key latents x A, A = `a` [E, m]: B [m, n]; and of what that leaves of them, the energies,
    up and down of columns of their own."""
    known, r, seen = _seen(a, values)
    b = a.new_zeros(a.shape[1], len(values.flat))
    b[:known] = torch.linalg.solve_triangular(r[:known, :known], seen[:known], upper=True)
    return b, *low_rank(values.flat - b.T @ a.T, values.moment, values.metric, deficient=True)


def _seen(down: Tensor, values: Side) -> tuple[int, Tensor, Tensor]:
    """The values as every key latent sees them: with L of the values' moment, L^T [A, Wv^T] = Q [R, S].

    For A_r, the first r columns of A, least squares is B_r^T = R[:r, :r]^-1 S[:r], and S[r:] is what it leaves. Where
    the keys lack rank the last columns of A are rounding, and no value is made of them.

    Args: down: A, [E, m], in the order of `low_rank`.
    Returns: how many columns of A come before the first that is next to nothing beside those before it; R [k, m];
    S [k, n], k = min(E, m + n).
    """
    both = torch.linalg.qr(values.root.T @ torch.cat((down, values.flat.T), 1), mode="r").R
    r, s = both.split((down.shape[1], len(values.flat)), 1)
    pivots = r.diagonal().abs()
    return int((pivots > SEEN * pivots.max()).cumprod(0).sum()), r, s
