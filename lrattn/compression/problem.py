"""One layer to factor: its keys and values, what errors of them cost, and the groups of its heads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

import torch
from torch import Tensor

from lrattn.compression.averages import Turns
from lrattn.compression.bits import Row, Spent
from lrattn.compression.clusters import Groups, contiguous, outputs_gram
from lrattn.compression.methods import Method, rows
from lrattn.compression.methods.rows import Form
from lrattn.compression.methods.weighted import deviations, roots
from lrattn.compression.moments import SIDES, Moments, about, mean_of
from lrattn.compression.ranks import LayerShape, Ranks
from lrattn.factors.formats import ERRORS, Format, uniform
from lrattn.factors.layer import LayerFactors
from lrattn.factors.projection import Projection
from lrattn.factors.rope import Rope
from lrattn.factors.shapes import RANK_STEP, pad_rank, round_up
from lrattn.models.layers import AttentionLayer
from lrattn.models.weights import bias


@dataclass(eq=False)
class Problem:
    """A layer, or a run of layers that share rows, and what a method needs to factor it.

    Args:
        shape: of its budget. form: of its rows. index: of the layer in the moments. rope, chunk, max_position: of the
            record, which says how keys are stored: see LayerFactors.
        turns: from keys as they were summed to those that are stored; None: they are the same.
        shards: tensor-parallel ranks that no group of heads may lie across.
    """

    layer: AttentionLayer
    shape: LayerShape
    method: Method
    form: Form
    moments: Moments
    index: int
    rope: Rope | None
    chunk: int | None = None
    max_position: int | None = None
    turns: Turns | None = None
    shards: int = 1

    def __post_init__(self) -> None:
        shape, n = self.shape, self.layer.dense
        self.part = {"keys": slice(n), "values": slice(-n, None)}  # a side's, of what is of both or of the side alone
        self.groups: dict[str, Groups] = {
            "keys": self._grouped(shape.key_group),
            "values": self._grouped(shape.value_group),
        }
        self.offsets = {side: self._offset(side) for side in SIDES}
        self.splits: list[list[int]] = []  # of a ride: each group's key rank by row width, in steps of 16
        # Of the sides that are packed; a number is the bits of all latents.
        self.formats: dict[str, Format | int] = dict.fromkeys(self.written, shape.bits) if shape.bits < 16 else {}
        self.lost = 0.0  # by the factors made: nats a token, where the method's energies are

    def _grouped(self, size: int) -> Groups:
        """Groups of so many heads, in the model's order: of each layer of a run equally many."""
        parts = len(self.layer.members)
        own = contiguous(self.shape.heads // parts, size // parts)
        begins = range(0, self.shape.heads, self.shape.heads // parts)
        return tuple(tuple(begin + h for begin in begins for h in heads) for heads in own)

    @property
    def written(self) -> tuple[str, ...]:
        """The sides that rows are written by."""
        return ("values",) if self.form else SIDES

    def _offset(self, side: str) -> Tensor | None:
        """What is taken from the heads of a side before they are mapped, [n] float64: the bias, where weights are read;
        the mean, where the method centres the side or the model has biases, which it stands for; else nothing."""
        if self.method.reads_weights:
            found = [x for part in self.layer.members if (x := bias(part, side)) is not None]
            return torch.cat(found).flatten().double().cpu() if found else None
        modules = [part.module for part in self.layer.members]
        biased = any(name.split(".")[-1] == "bias" for module in modules for name, _ in module.named_parameters())
        return mean_of(self._seen(side))[self.part[side]] if side in self.method.centred or biased else None

    def _seen(self, side: str) -> Tensor:
        return self._turned(self.moments.seen(self.index, side, rotated=self.method.rotated), side)

    def _measure(self, side: str) -> tuple[Tensor, Tensor | None]:
        """C and G of the method, of keys as they are stored."""
        moment, metric = self.method.measure(self.layer, self.moments, self.index, side)
        if metric is not None and side == "keys" and self.turns is not None:
            metric = self.turns.metric(metric, self.shape.heads, self.shape.head_dim)
        return self._turned(moment, side), metric

    def _turned(self, moment: Tensor, side: str) -> Tensor:
        """A moment of a side or of both, of keys as they are stored; nothing of values alone is turned."""
        of_both = len(moment) > self.layer.dense + 1
        if self.turns is None or (side == "values" and not (of_both and self.form)):
            return moment
        return self.turns.moment(moment, self.shape.heads, self.shape.head_dim)

    def _about(self, moment: Tensor, side: str) -> Tensor:
        """A moment of [x, 1], x of a side or of both, about the offsets; of weights, which is about them, as it is."""
        if self.method.reads_weights:
            return moment
        n = self.layer.dense
        offsets = [self.offsets[name] for name in (SIDES if len(moment) > n + 1 else (side,))]
        if all(x is None for x in offsets):
            return about(moment, None)
        return about(moment, torch.cat([moment.new_zeros(n) if x is None else x for x in offsets]))

    def _measured(self, side: str) -> tuple[Tensor, Tensor | None]:
        """C [n, n] of a side about its offset, and G."""
        moment, metric = self._measure(side)
        return self._about(moment, side)[self.part[side], self.part[side]], metric

    def _inputs(self, side: str) -> Tensor | None:
        """Second moment of what packed rows are written from: of a side, or of both where they share rows."""
        if side not in self.formats:
            return None
        found = self._about(self._measure(side)[0] if self.method.reads_weights else self._seen(side), side)
        return found if self.form else found[self.part[side], self.part[side]]

    def group(self, rank: int) -> None:
        """Clusters the heads, each shard's among themselves, for groups of about this rank."""
        cluster, per_shard = self.method.cluster, max(self.shape.heads // self.shards, 1)
        for side in self.written:
            size = len(self.groups[side][0])
            if cluster is None or size in (1, per_shard) or self.layer.parts:
                continue
            gram, found = self._gram(side), list[tuple[int, ...]]()
            for first in range(0, self.shape.heads, per_shard):
                own = slice(first, first + per_shard)
                found += [tuple(first + h for h in heads) for heads in cluster(gram[own, :, own], size, rank)]
            self.groups[side] = tuple(found)
        if self.form:
            self.groups["keys"] = self.groups["values"]

    def _gram(self, side: str) -> Tensor:
        """Of the heads, each in its own metric; of keys and values side by side where they share rows."""
        whole = tuple(range(self.shape.heads))
        if not self.form:
            moment, metric = self._measured(side)
            return outputs_gram(self._rooted(self._weight(whole), metric), moment)
        ((keys, values),) = self._sides((whole,))
        weights = [self._rooted(x.weight, x.metric) for x in (keys, values)]
        return outputs_gram(torch.cat(weights, 1), (keys.moment + values.moment) / 2)

    def _rooted(self, weight: Tensor, metric: Tensor | None) -> Tensor:
        """Each head [D, inputs] by the root of its own block of the metric."""
        if metric is None:
            return weight
        blocks = metric.unflatten(0, (self.shape.heads, -1)).unflatten(2, (self.shape.heads, -1))
        return torch.stack([roots(blocks[h, :, h])[0] for h in range(self.shape.heads)]) @ weight

    def energies(self) -> tuple[list[Tensor], list[Tensor]]:
        """Of the key groups and of the value groups, or none and of the rows, each [n] descending."""
        if not self.form:
            keys, values = ([found[1] for found in self._decomposed(side)] for side in SIDES)
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
        """Factors at the ranks given; reached: [n + 1, n + 1], moment of the compressed model's values, for a refit."""
        self.lost = 0.0
        if self.form:
            keys, values = self._shared(ranks[1], ranks[0])
        else:
            keys = self._projection("keys", ranks[0], None)
            values = self._projection("values", ranks[1], reached)
        return LayerFactors(
            keys, values, self.rope, shared=bool(self.form), chunk=self.chunk, max_position=self.max_position
        )

    def _weight(self, heads: tuple[int, ...]) -> Tensor:
        """Which of the inputs of a group each of its heads is: the identity, [C, D, C * D] float64."""
        size = self.shape.head_dim
        return torch.eye(len(heads) * size, dtype=torch.float64).unflatten(0, (len(heads), size))

    def _dims(self, heads: tuple[int, ...]) -> Tensor:
        """Where the heads of a group lie in a side, [C * D]."""
        size = self.shape.head_dim
        return torch.cat([torch.arange(h * size, (h + 1) * size) for h in heads])

    def _decomposed(self, side: str) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Of each group: which inputs of down its rows are, [inputs]; energies, up, down."""
        moment, metric = self._measured(side)
        whole = tuple(range(self.shape.heads))
        if side == "keys" and self.method.decompose_keys is not None:
            for found in self.method.decompose_keys(self._weight(whole), moment):
                yield self._dims(whole), *found
            return
        own = self.method.key_decompose if side == "keys" else None
        decompose = own or self.method.decompose
        for heads in self.groups[side]:
            at = self._dims(heads)
            block = None if metric is None else metric[at][:, at]
            yield at, *decompose(self._weight(heads), moment[at][:, at], block)

    def _sides(self, groups: Groups | None = None) -> Iterator[tuple[rows.Side, rows.Side]]:
        """Keys and values of groups that share rows: inputs are a group's keys and values, each side brought to size 1.

        What is measured is of all heads, and large: it is taken about the offsets once for all groups.
        """
        n, sizes, known = self.layer.dense, self._sizes, []
        for side in SIDES:
            moment, metric = self._measure(side)
            if self.method.reads_weights:  # of equal weight, and without the 1
                known.append((moment, torch.eye(n, dtype=moment.dtype), moment.new_ones(())))
            elif metric is None or len(moment) != 2 * n + 1:
                raise ValueError(f"shared: expected a method with a metric for keys and values, got none for {side}")
            else:
                known.append((self._about(moment, side), metric, moment[-1, -1]))
        for heads in self.groups["values"] if groups is None else groups:
            at, found = self._dims(heads), []
            both, size = torch.cat((at, at + n)), sizes.repeat_interleave(len(at))
            for i, (moment, metric, total) in enumerate(known):
                weight = (torch.eye(2 * len(at), dtype=torch.float64) * size).chunk(2)[i]
                scaled = moment[both][:, both] / size / size[:, None] / total
                found.append(rows.Side(weight.unflatten(0, (len(heads), -1)), scaled, metric[at][:, at] * total))
            yield found[0], found[1]

    @cached_property
    def _sizes(self) -> Tensor:
        """Root mean squares of the keys and of the values, [2]; 1 where weights are read."""
        if self.method.reads_weights:
            return torch.ones(2, dtype=torch.float64)
        size = self._about(self._seen("values"), "values").diagonal().unflatten(0, (2, -1)).mean(1).sqrt()
        return torch.where(size > 0, size, 1.0)

    def _shared(self, widths: tuple[int, ...], given: tuple[int, ...]) -> tuple[Projection, Projection]:
        """given: key ranks of a ride; () for the best ones."""
        key_ranks, key_ups, ups, downs = [], [], [], []
        inputs, sizes, n = self._inputs("values"), self._sizes, self.layer.dense
        for g, (row, (keys, values)) in enumerate(zip(widths, self._sides(), strict=True)):
            if self.form == "ride":
                splits = self.splits[g] if self.splits else rows.splits(keys, values)[1]
                rank = given[g] if given else splits[row // RANK_STEP - 1]
                lost, key_up, up, down = rows.ride(keys, values, rank, row)
                self.lost += lost / 2
            else:
                rank = row
                energies, both, down = rows.joint(keys, values)
                self.lost += _lost(energies, row, self.shape.bits)
                (key_up, up), down = both[:, :row].chunk(2, 2), down[:, :row]
            at = self._dims(self.groups["values"][g])
            down = down / sizes.repeat_interleave(len(at))[:, None]
            down, size = self._placed(torch.cat((at, at + n)), pad_rank(down, 1, row), inputs)
            key_ranks.append(rank)
            key_ups.append(pad_rank(key_up, 1, rank) * size[:rank, None])
            ups.append(pad_rank(up, 1, row) * size[:, None])
            downs.append(down)
        keys_side = self._record("keys", key_ups, tuple(key_ranks), None)
        return keys_side, self._record("values", ups, widths, torch.cat(downs, 1))

    def _projection(self, side: str, ranks: tuple[int, ...], reached: Tensor | None) -> Projection:
        ups, downs, inputs = [], [], self._inputs(side)
        for rank, (at, energies, up, down) in zip(ranks, self._decomposed(side), strict=True):
            self.lost += _lost(energies, rank, self.shape.bits)
            up, down = pad_rank(up[:, :rank], 1, rank), pad_rank(down[:, :rank], 1, rank)
            if reached is not None and self.method.refit is not None:
                own = self._about(reached, side)[at][:, at]
                up, down = self.method.refit(self._weight(self.groups[side][0]), down, own)
            down, size = self._placed(at, down, inputs)
            ups.append(up * size[:, None])
            downs.append(down)
        return self._record(side, ups, ranks, torch.cat(downs, 1))

    def _placed(self, at: Tensor, down: Tensor, inputs: Tensor | None) -> tuple[Tensor, Tensor]:
        """down of a group, which reads the inputs `at`, as a map of all of them; and what its latents were divided by,
        to be of one size where they are packed."""
        placed = down.new_zeros(self.layer.dense * (2 if self.form else 1), down.shape[1])
        placed[at] = down
        if inputs is None:
            return placed, down.new_ones(down.shape[1])
        scale = self._sizes.repeat_interleave(self.layer.dense) if self.form else placed.new_ones(len(placed))
        size = deviations(placed * scale[:, None], inputs / scale / scale[:, None])  # a side's share of the damping
        return placed / size, size

    def _record(self, side: str, ups: list[Tensor], ranks: tuple[int, ...], down: Tensor | None) -> Projection:
        shape, groups = self.shape, self.groups[side]
        place, kind = self.layer.device, self.layer.dtype
        up = torch.zeros(shape.heads, max(ranks), shape.head_dim, dtype=torch.float64)
        for heads, rank, block in zip(groups, ranks, ups, strict=True):
            up[list(heads), :rank] = block
        order, made, offset = tuple(h for heads in groups for h in heads), self.formats.get(side), self.offsets[side]
        return Projection(
            up=up.to(place, kind),
            down=None if down is None else down.to(place, kind).contiguous(),
            offset=None if offset is None else offset.view(shape.heads, shape.head_dim).to(place, kind),
            ranks=ranks,
            head_order=None if order == tuple(range(len(order))) else order,
            format=made if not isinstance(made, int) else tuple(uniform(rank, made) for rank in ranks),
        )


def _lost(energies: Tensor, rank: int, bits: int) -> float:
    """Half of what the energies of one group cost with these latents, and bits for each of them."""
    held = energies[:rank].sum().item() * (ERRORS[bits] if bits < 16 else 0.0)
    return (held + energies[rank:].sum().item()) / 2
