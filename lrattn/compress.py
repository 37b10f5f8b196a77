"""A model and some text -> Factors: calibrate, cluster heads, share out the ranks, factor every layer."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lrattn import methods
from lrattn.calibrate import Batch, Moments, calibrate, fingerprint
from lrattn.clusters import Groups, contiguous, outputs_gram
from lrattn.factors import Factors
from lrattn.layer import LayerFactors
from lrattn.methods import METHODS, Method
from lrattn.parts import AttentionParts, attention_parts
from lrattn.projection import Projection
from lrattn.propagate import Propagation
from lrattn.ranks import RULES, LayerShape, Ranks, budget, fisher, group_size_within, spectrum, uniform
from lrattn.shapes import pad_rank


@torch.inference_mode(False)  # the factors outlive the caller's mode
@torch.no_grad()
def compress(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    method: str = methods.DEFAULT,
    keep: float = 0.5,
    group_size: int = 4,
    *,
    ranks: str = "spectrum",
    moments: Moments | None = None,
    state: str | os.PathLike[str] | None = None,
    shards: int = 1,
    progress: bool = True,
) -> Factors:
    """Factors of a model's key and value projections; the model itself is not changed.

    Args:
        model: a transformers causal language model (see attention_parts for what is needed of it).
        batches: token ids [b, t], or mappings with input_ids and maybe attention_mask, to calibrate on. "svd" needs
            none, but for ranks "fisher".
        method: one of lrattn.methods.METHODS.
        keep: bytes of the latent cache / bytes of the dense 16-bit cache, in (0, 1]. 1 is full rank: exact.
        group_size: kv heads per group; the largest divisor of Hkv / shards not above it is used.
        ranks: what shares them out: "spectrum", "fisher" (as Palu and ReCalKV do; takes a backward pass) or "uniform".
        moments: of an earlier `calibrate` of this model, which is then not repeated.
        state: a file for the calibration to go on from, see `calibrate`.
        shards: tensor-parallel ranks that the heads will be divided over; no group of keys lies across them.
        progress: show bars on stderr.

    Returns: Factors in the model's dtype, on its device.
    Raises: ValueError naming the argument, what was expected and what came.
    """
    if method not in METHODS:
        raise ValueError(f"method: expected one of {sorted(METHODS)}, got {method!r}")
    recipe = METHODS[method]
    if ranks not in RULES:
        raise ValueError(f"ranks: expected one of {sorted(RULES)}, got {ranks!r}")
    parts = attention_parts(model)
    shapes = [_shape(part, recipe, group_size, shards) for part in parts]
    budget(shapes, keep)  # refused before any work
    if isinstance(batches, Moments):
        raise ValueError("batches: expected token batches, got Moments, which are given as moments=")
    batches = None if batches is None else list(batches)
    if moments is None and batches is not None and (recipe.needs_data or ranks == "fisher"):
        moments = calibrate(model, batches, fisher=ranks == "fisher", state=state, progress=progress)
    elif state is not None:
        raise ValueError(f"state: expected None where nothing is calibrated, got {state}")
    _check_data(model, method, recipe, ranks, batches, moments, parts)

    problems = [
        _Problem(part, shape, recipe, shards, None if moments is None else moments.inputs[i])
        for i, (part, shape) in enumerate(zip(parts, shapes, strict=True))
    ]
    chosen = None
    if ranks == "uniform":
        chosen = uniform(shapes, keep)
    elif moments is not None and moments.fisher is not None and ranks == "fisher":
        chosen = fisher(shapes, keep, moments.fisher)
    for i, problem in enumerate(tqdm(problems, desc="group heads", unit="layer", disable=not progress)):
        key_ranks = [int(keep * problem.shape.full_ranks[0])] if chosen is None else chosen[i][0]
        problem.group(sum(key_ranks) // len(key_ranks))
    if chosen is None:
        shown = tqdm(problems, desc="spectra", unit="layer", disable=not progress)
        chosen = spectrum(shapes, keep, [problem.energies() for problem in shown])

    stream = Propagation(model, batches) if recipe.refit is not None and batches else None
    layers = []
    for problem, pair in zip(tqdm(problems, desc="factor", unit="layer", disable=not progress), chosen, strict=True):
        layers.append(problem.factor(pair, None if stream is None else stream.moment()))
        if stream is not None:
            stream.advance(layers[-1])
    return Factors(tuple(layers), method, str(getattr(model.config, "_name_or_path", "")), ranks)


def _shape(part: AttentionParts, recipe: Method, group_size: int, shards: int) -> LayerShape:
    heads = part.num_kv_heads
    if shards < 1 or (heads % shards and shards % heads):
        raise ValueError(f"shards: expected a divisor or a multiple of Hkv={heads}, got {shards}")
    size = group_size_within(max(heads // shards, 1), group_size)
    return LayerShape(
        heads=heads,
        head_dim=part.head_dim,
        key_group=size,
        value_group=heads if recipe.joint_values else size,
        inputs=part.linear("k_proj").in_features,
        key_norm=part.key_norm is not None,
    )


def _check_data(
    model: nn.Module,
    method: str,
    recipe: Method,
    ranks: str,
    batches: list[Batch] | None,
    moments: Moments | None,
    parts: list[AttentionParts],
) -> None:
    if moments is None and recipe.needs_data:
        raise ValueError(f"batches: method {method!r} needs calibration batches, got None")
    if recipe.refit is not None and not batches:
        raise ValueError(f"batches: method {method!r} runs the compressed model on batches, got {batches}")
    if ranks == "fisher" and (moments is None or moments.fisher is None):
        got = "none" if moments is None else "moments without gradients"
        raise ValueError(f"moments: ranks 'fisher' need batches, or moments of calibrate(fisher=True), got {got}")
    expected = [p.linear("k_proj").in_features for p in parts]
    if moments is not None and [len(x) for x in moments.inputs] != expected:
        raise ValueError(
            f"moments: expected {len(parts)} layers of {expected[0]} inputs, got {len(moments.inputs)} of "
            f"{[len(x) for x in moments.inputs[:1]]}"
        )
    if moments is not None and moments.model not in ("", fingerprint(model)):
        raise ValueError("moments: expected those of this model, got another model's")


class _Problem:
    """One layer to factor: its weights, the second moment of its inputs, and the groups of its heads."""

    def __init__(
        self, part: AttentionParts, shape: LayerShape, recipe: Method, shards: int, moment: Tensor | None
    ) -> None:
        self.part, self.shape, self.recipe, self.moment = part, shape, recipe, moment
        self.shards = min(shards, shape.heads)
        self.groups: tuple[Groups, Groups] = (
            contiguous(shape.heads, shape.key_group),
            contiguous(shape.heads, shape.value_group),
        )

    def group(self, rank: int) -> None:
        """Clusters the key heads, each shard's among themselves, for groups of about this rank."""
        if self.recipe.cluster is None or self.moment is None or self.shape.key_group in (1, self.shape.heads):
            return
        found: list[tuple[int, ...]] = []
        for weight in self.part.weight("k_proj").double().cpu().chunk(self.shards):
            groups = self.recipe.cluster(outputs_gram(weight, self.moment), self.shape.key_group, rank)
            first = len(found) * self.shape.key_group
            found += [tuple(first + h for h in heads) for heads in groups]
        self.groups = (tuple(found), self.groups[1])

    def _decomposed(self, name: str, groups: Groups) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """Weight, energies, up, down of each group."""
        weight = self.part.weight(name).double().cpu()
        for heads in groups:
            group = weight[list(heads)]
            yield group, *self.recipe.decompose(group, self.moment)

    def energies(self) -> tuple[list[Tensor], list[Tensor]]:
        """Of the key groups and of the value groups, each [n] descending."""
        keys, values = (
            [found[1] for found in self._decomposed(name, groups)]
            for name, groups in zip(("k_proj", "v_proj"), self.groups, strict=True)
        )
        return keys, values

    def factor(self, ranks: Ranks, reached: Tensor | None) -> LayerFactors:
        """Factors at the ranks given; reached: [E, E], second moment of the compressed model's inputs, for a refit."""
        keys = self._projection("k_proj", self.groups[0], ranks[0], None)
        values = self._projection("v_proj", self.groups[1], ranks[1], reached)
        return LayerFactors(keys, values, self.part.rope, key_norm=self.part.key_norm)

    def _projection(self, name: str, groups: Groups, ranks: tuple[int, ...], reached: Tensor | None) -> Projection:
        like = self.part.weight(name)
        up = torch.zeros(*like.shape[:1], max(ranks), like.shape[1], dtype=torch.float64)
        downs = []
        for heads, rank, (weight, _, group_up, down) in zip(groups, ranks, self._decomposed(name, groups), strict=True):
            group_up, down = pad_rank(group_up[:, :rank], 1, rank), pad_rank(down[:, :rank], 1, rank)
            if reached is not None and self.recipe.refit is not None:
                group_up, down = self.recipe.refit(weight, down, reached)
            up[list(heads), :rank] = group_up
            downs.append(down)
        order = tuple(h for heads in groups for h in heads)
        return Projection(
            up=up.to(like),
            ranks=ranks,
            down=torch.cat(downs, 1).to(like).contiguous(),
            bias=self.part.bias(name),
            head_order=None if order == tuple(range(len(order))) else order,
        )
