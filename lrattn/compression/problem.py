"""One layer to factor: its weights, what errors of them cost, and the groups of its heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean

import torch
from torch import Tensor

from lrattn.compression.bits import Row, Spent
from lrattn.compression.clusters import Groups, contiguous, outputs_gram
from lrattn.compression.methods import Method, rows
from lrattn.compression.methods.weighted import deviations, roots
from lrattn.compression.moments import Moments
from lrattn.compression.ranks import LayerShape, Ranks
from lrattn.factors.formats import ERRORS, Format, uniform
from lrattn.factors.layer import LayerFactors
from lrattn.factors.parts import AttentionParts
from lrattn.factors.projection import Projection
from lrattn.factors.shapes import RANK_STEP, pad_rank, round_up

WEIGHTS = {"keys": "k_proj", "values": "v_proj"}
# Of a row: False, keys and values apart; "ride", values ride on the key latent; True, one joint latent.
Form = bool | str
FORMS: tuple[Form, ...] = (False, "ride", True)


class Problem:
    """A layer, and what a method needs to factor it.

    Args:
        shape: of its budget. form: of its rows. index: of the layer in the moments.
        shards: tensor-parallel ranks that no group of heads may lie across.
    """

    def __init__(
        self,
        part: AttentionParts,
        shape: LayerShape,
        method: Method,
        form: Form,
        moments: Moments | None,
        index: int,
        shards: int = 1,
    ) -> None:
        self.part, self.shape, self.method, self.form = part, shape, method, form
        self.moments, self.index, self.shards = moments, index, min(shards, shape.heads)
        self.groups: dict[str, Groups] = {
            "keys": contiguous(shape.heads, shape.key_group),
            "values": contiguous(shape.heads, shape.value_group),
        }
        self.splits: list[list[int]] = []  # of a ride: each group's key rank by row width, in steps of 16
        # Of the sides that are packed; a number is the bits of all latents.
        self.formats: dict[str, Format | int] = {}
        if shape.bits < 16:
            self.formats = dict.fromkeys(self.written, shape.bits)
        self.lost = 0.0  # by the factors made: nats a token, where the method's energies are

    @property
    def written(self) -> tuple[str, ...]:
        """The sides that rows are written by."""
        return ("values",) if self.form else ("keys", "values")

    def weight(self, side: str) -> Tensor:
        """[Hkv, D, inputs] float64; of rotated keys the identity."""
        if side == "keys" and self.method.rotated:
            heads, head_dim = self.shape.heads, self.shape.head_dim
            return torch.eye(heads * head_dim, dtype=torch.float64).unflatten(0, (heads, head_dim))
        return self.part.weight(WEIGHTS[side]).double().cpu()

    def measured(self, side: str) -> tuple[Tensor | None, Tensor | None]:
        """C and G of a side."""
        moment, metric = self.method.measure(self.part, self.moments, self.index, side)
        if moment is not None and self.moments is not None and (mean := self._mean(side)) is not None:
            moment = moment - self.moments.tokens * torch.outer(mean, mean)
        return moment, metric

    def _mean(self, side: str) -> Tensor | None:
        """Of the inputs of a side, [inputs]; None where the method is not centred."""
        if not self.method.centred or self.moments is None:
            return None
        name = "rotated.mean" if side == "keys" and self.method.rotated else "means"
        return self.moments.sums[name][self.index] / self.moments.tokens

    def _inputs(self, side: str) -> Tensor | None:
        """Second moment of what a side's latents are written from, [inputs, inputs]; None where no text was read."""
        if self.moments is None:
            return None
        rotated = side == "keys" and self.method.rotated
        sums = self.moments.sums["rotated.keys"] if rotated else self.moments.inputs
        return sums[self.index] / self.moments.tokens

    def group(self, rank: int) -> None:
        """Clusters the heads, each shard's among themselves, for groups of about this rank."""
        sides = ["keys", *(["values"] if self.method.cluster_values else [])]
        for side in sides[:1] if self.form else sides:
            size = self.shape.key_group if side == "keys" else self.shape.value_group
            if self.method.cluster is None or not self.method.needs_data or size in (1, self.shape.heads):
                continue
            gram, found = self._gram(side), list[tuple[int, ...]]()
            per_shard = self.shape.heads // self.shards
            for first in range(0, self.shape.heads, per_shard):
                own = slice(first, first + per_shard)
                groups = self.method.cluster(gram[own, :, own], size, rank)
                found += [tuple(first + h for h in heads) for heads in groups]
            self.groups[side] = tuple(found)
        if self.form:
            self.groups["values"] = self.groups["keys"]

    def _gram(self, side: str) -> Tensor:
        """Of the heads' outputs, each in its own metric; of keys and values side by side where they share rows."""
        grams = []
        for name in ("keys", "values") if self.form else (side,):
            weight, (moment, metric) = self.weight(name), self.measured(name)
            if moment is None:
                raise ValueError(f"{name}: expected a moment to cluster heads by, got None")
            if metric is not None:
                size = self.shape.head_dim
                own = [roots(metric[h : h + size, h : h + size])[0] for h in range(0, len(metric), size)]
                weight = torch.stack(own) @ weight
            grams.append((weight, moment))
        if len(grams) == 1:
            return outputs_gram(*grams[0])
        (keys, c), (values, d) = grams
        moment, k, v = rows.common_moment(c, d)
        return outputs_gram(torch.cat((keys * k.sqrt(), values * v.sqrt()), 1), moment)

    def energies(self) -> tuple[list[Tensor], list[Tensor]]:
        """Of the key groups and of the value groups, or none and of the rows, each [n] descending."""
        if not self.form:
            keys, values = ([found[1] for found in self._decomposed(side)] for side in WEIGHTS)
            return keys, values
        if self.form == "ride":
            found = [rows.splits(keys, values) for keys, values in self._sides()]
            self.splits = [ranks for _, ranks in found]
            return [], [gains for gains, _ in found]
        return [], [rows.joint(keys, values)[0] for keys, values in self._sides()]

    def bit_rows(self, held: float) -> list[Row]:
        """What bits are spent on: the row of keys and that of values, or the one they share.

        held: share of the latents that will have bits, about; it says how the row of a ride is divided.
        """

        def pooled(groups: Sequence[Tensor]) -> Tensor:
            total = torch.stack(list(groups)).sum(0)
            return pad_rank(total, 0, round_up(len(total), RANK_STEP))

        if self.form != "ride":
            return [Row((pooled(side),), len(side)) for side in self.energies() if side]
        found = list(self._sides())
        step = max(int(held * self.shape.full_ranks[1]) // RANK_STEP, 1)
        rank = round_up(int(fmean(rows.splits(*sides)[1][step - 1] for sides in found)), RANK_STEP)
        parts = zip(*(rows.noises(*sides, rank) for sides in found), strict=True)
        return [Row(tuple(pooled(part) for part in parts), len(found))]

    def spent(self, found: Sequence[Spent]) -> LayerFactors:
        """Factors whose rows have the bits found for them, in the order of `bit_rows`."""
        self.formats = {side: row.format for side, row in zip(self.written, found, strict=True)}
        keys = () if self.form is True else found[0].ranks[:1]
        key_ranks = keys * (self.shape.groups[1] if self.form else self.shape.groups[0])
        layer = self.factor((key_ranks, (found[-1].format.rank,) * self.shape.groups[1]), None)
        self.lost = sum(row.lost for row in found)
        return layer

    def factor(self, ranks: Ranks, reached: Tensor | None) -> LayerFactors:
        """Factors at the ranks given; reached: [E, E], second moment of the compressed model's inputs, for a refit."""
        self.lost = 0.0
        if self.form:
            keys, values = self._shared(ranks[1], ranks[0])
        else:
            keys = self._projection("keys", ranks[0], None)
            values = self._projection("values", ranks[1], reached)
        rotated = self.method.rotated
        return LayerFactors(
            keys,
            values,
            None if rotated else self.part.rope,
            shared=bool(self.form),
            key_norm=None if rotated else self.part.key_norm,
            rotated=rotated,
        )

    def _decomposed(self, side: str) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Weight, energies, up, down of each group."""
        weight, (moment, metric) = self.weight(side), self.measured(side)
        if side == "keys" and self.method.decompose_keys is not None:
            for w, found in zip(weight, self.method.decompose_keys(weight, moment), strict=True):
                yield w[None], *found
            return
        own = self.method.key_decompose if side == "keys" else None
        decompose = own or self.method.decompose
        for heads in self.groups[side]:
            group = weight[list(heads)]
            yield group, *decompose(group, moment, None if metric is None else self._block(metric, heads))

    def _block(self, metric: Tensor, heads: tuple[int, ...]) -> Tensor:
        """The rows and columns of these heads, [C * D, C * D]."""
        size = self.shape.head_dim
        index = torch.cat([torch.arange(h * size, (h + 1) * size) for h in heads])
        return metric[index][:, index]

    def _sides(self) -> Iterator[tuple[rows.Side, rows.Side]]:
        """Keys and values of each group that shares rows."""
        both = []
        for side in WEIGHTS:
            moment, metric = self.measured(side)
            if moment is None or metric is None:
                raise ValueError(f"shared: expected a method with a metric for keys and values, got none for {side}")
            both.append((self.weight(side), moment, metric))
        for heads in self.groups["values"]:
            keys, values = (rows.Side(w[list(heads)], c, self._block(g, heads)) for w, c, g in both)
            yield keys, values

    def _shared(self, widths: tuple[int, ...], given: tuple[int, ...]) -> tuple[Projection, Projection]:
        """given: key ranks of a ride; () for the best ones."""
        key_ranks, key_ups, ups, downs = [], [], [], []
        for g, (row, (keys, values)) in enumerate(zip(widths, self._sides(), strict=True)):
            if self.form == "ride":
                splits = self.splits[g] if self.splits else rows.splits(keys, values)[1]
                rank = given[g] if given else splits[row // RANK_STEP - 1]
                lost, key_up, up, down = rows.ride(keys, values, rank, row)
            else:
                rank = row
                energies, both, down = rows.joint(keys, values)
                lost, down = 2 * _lost(energies, row, self.shape.bits), down[:, :row]
                key_up, up = both[:, :row].chunk(2, 2)
            self.lost += lost / 2
            key_up, up, down = pad_rank(key_up, 1, rank), pad_rank(up, 1, row), pad_rank(down, 1, row)
            if self.formats:
                size = deviations(down, self._inputs("values"))
                key_up, up, down = key_up * size[:rank, None], up * size[:, None], down / size
            key_ranks.append(rank)
            key_ups.append(key_up)
            ups.append(up)
            downs.append(down)
        order = self._order("values")
        keys_side = self._record("keys", key_ups, tuple(key_ranks), None, order)
        return keys_side, self._record("values", ups, widths, torch.cat(downs, 1), order)

    def _projection(self, side: str, ranks: tuple[int, ...], reached: Tensor | None) -> Projection:
        ups, downs, mean = [], [], self._mean(side)
        lost_mean = torch.zeros(self.shape.heads, self.shape.head_dim, dtype=torch.float64)
        decomposed = zip(self.groups[side], ranks, self._decomposed(side), strict=True)
        for heads, rank, (weight, energies, group_up, down) in decomposed:
            self.lost += _lost(energies, rank, self.shape.bits)
            group_up, down = pad_rank(group_up[:, :rank], 1, rank), pad_rank(down[:, :rank], 1, rank)
            if reached is not None and self.method.refit is not None:
                group_up, down = self.method.refit(weight, down, reached)
            if side in self.formats:
                size = deviations(down, self._inputs(side))
                group_up, down = group_up * size[:, None], down / size
            ups.append(group_up)
            downs.append(down)
            if mean is not None:
                lost_mean[list(heads)] = weight @ mean - mean @ down @ group_up
        made = self._record(side, ups, ranks, torch.cat(downs, 1), self._order(side))
        if mean is None:
            return made
        bias = lost_mean if made.bias is None else made.bias.to(lost_mean) + lost_mean
        return replace(made, bias=bias.to(made.up))

    def _order(self, side: str) -> tuple[int, ...] | None:
        order = tuple(h for heads in self.groups[side] for h in heads)
        return None if order == tuple(range(len(order))) else order

    def _record(
        self, side: str, ups: list[Tensor], ranks: tuple[int, ...], down: Tensor | None, order: tuple[int, ...] | None
    ) -> Projection:
        like = self.part.weight(WEIGHTS[side])
        up = torch.zeros(*like.shape[:1], max(ranks), like.shape[1], dtype=torch.float64)
        for heads, rank, block in zip(self.groups[side], ranks, ups, strict=True):
            up[list(heads), :rank] = block
        rotated, made = side == "keys" and self.method.rotated, self.formats.get(side)
        return Projection(
            up=up.to(like),
            down=None if down is None else down.to(like).contiguous(),
            bias=None if rotated else self.part.bias(WEIGHTS[side]),
            ranks=ranks,
            head_order=order,
            format=made if not isinstance(made, int) else tuple(uniform(rank, made) for rank in ranks),
        )


def _lost(energies: Tensor, rank: int, bits: int) -> float:
    """Half of what the energies of one group cost with these latents, and bits for each of them."""
    held = energies[:rank].sum().item() * (ERRORS[bits] if bits < 16 else 0.0)
    return (held + energies[rank:].sum().item()) / 2
