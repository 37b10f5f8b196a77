"""Distillation: factors adjusted until the model on them predicts what the original model predicts."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import astuple, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lrattn.compression.arguments import check_count, check_flag
from lrattn.compression.batches import Batch, check_batches, check_lengths, tokens_of, unpadded
from lrattn.compression.calibrate import fingerprint
from lrattn.compression.nested import first, shared_out
from lrattn.compression.substitute import Window, substituted
from lrattn.factors import safefile
from lrattn.factors.layer import LayerFactors, sides_of
from lrattn.factors.projection import Projection
from lrattn.factors.record import Factors
from lrattn.factors.rope import Rope
from lrattn.models.interface import device_of
from lrattn.models.layers import AttentionLayer, attention_layers
from lrattn.models.states import evaluating, frozen

RATE = 5e-3  # of a tensor's root mean square, a step, at most
FAR = 0.25  # nats a token: factors that start nearer to the model take shorter steps
WARM = 4  # steps until the full rate; then it falls to zero along a cosine
HELD_BACK = 8  # one sequence in so many is not trained on, and judges
CHECK_EVERY = 8  # steps between two judgements
SHARES = (1.0, 0.25, 0.75, 0.5)  # of nested latents, step by step
BETAS = (0.9, 0.98)
ALIKE = 1e-4  # two runs start from the same factors up to the signs and roundings that another machine makes


@torch.inference_mode(False)
@torch.enable_grad()
def refine(
    model: nn.Module,
    factors: Factors,
    batches: Iterable[Batch],
    *,
    steps: int = 32,
    recent: int | None = None,
    sinks: int | None = None,
    nested: bool = False,
    state: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Factors:
    """Factors that lose less: Adam on `up` and `down` alone, on the divergence from the original model's predictions.

    A step takes one sequence. One sequence in eight is held back: the factors that do best on those are returned, which
    may be the ones given. Ranks, bytes and all but their `near` window stay as they are.

    Args:
        model: the one the factors are of; it is not changed.
        batches: token ids [b, t], or mappings with input_ids and maybe attention_mask: two sequences at least. The
            first of every eight judges: the factors should not have been calibrated on it, see `parted`.
        steps: of Adam. A step costs about four forward passes of a sequence.
        recent, sinks: of the dense window that the cache will hold: what is near a query is exact in training, too.
            None: as the factors say (Factors.near).
        nested: a step trains the first quarter, half, three quarters or all of every group's latents, in turns, and the
            factors are judged by all of these: for `narrowed`, at any keep below their own.
        state: a file written at every judgement, every eight steps, and when Ctrl-C or an error stops the run: of whole
            steps. If it exists, training goes on where it was.
        progress: show a bar on stderr, with the divergence on the held-back sequences in nats a token.

    Raises: ValueError for too few sequences or one with more tokens than the model has positions, factors in another
    dtype or on another device than the model, packed ones, maps of attention inputs, or a state of other factors,
    steps, window or text; OSError if the state cannot be written.
    """
    check_count("steps", steps, 1)
    check_flag("nested", nested)
    if any(layer.values.of_inputs for layer in factors.layers):
        raise ValueError("factors: expected maps of heads, got those of a file before version 3: use in_kv_space")
    if any(layer.packed for layer in factors.layers):
        raise ValueError("factors: expected plain latents, which can be trained, got packed ones")
    if state is not None:
        safefile.check_target("state", state)
    window = Window(*factors.near_or(recent, sinks))
    layers = attention_layers(model)
    if len(layers) != len(factors.layers):
        raise ValueError(f"factors: expected {len(layers)} layers as in the model, got {len(factors.layers)}")
    for own, kind in zip(layers, factors.layers, strict=True):
        if (own.dtype, own.device) != (kind.dtype, kind.device):
            raise ValueError(
                f"factors: expected {own.dtype} on {own.device} as in the model, got {kind.dtype} on {kind.device}"
            )
    judges, lessons = parted(batches)
    check_lengths(model, map(len, (*judges, *lessons)))
    run = _Run(model, layers, factors, window, SHARES if nested else (1.0,))
    run.begin(steps, judges, lessons, state)
    shown = tqdm(total=steps, initial=run.step, desc="refine", unit="step", disable=not progress)
    written = run.step if run.resumed else -1
    with evaluating(model), frozen(model), shown as bar:
        try:
            while run.step < steps:
                bar.set_postfix_str(f"divergence {run.best:.4f}, was {run.first:.4f}")
                run.learn(lessons, _rate(run.step, steps, run.first))
                bar.update()
                due = run.step % CHECK_EVERY == 0 or run.step == steps
                if due:
                    run.judge(judges)
                run.whole = run.now()
                if due and state is not None:
                    run.save(state)
                    written = run.step
        except BaseException:
            if state is not None and run.whole.step > written:
                run.save(state)
            raise
    return run.result()


def _rate(step: int, steps: int, first: float) -> float:
    """In proportion to the distance to go, whose square the divergence at the start grows with."""
    longest = RATE * math.sqrt(min(max(first, 0.0) / FAR, 1.0))
    return longest * min(1.0, (step + 1) / WARM) * (1 + math.cos(math.pi * step / steps)) / 2


def parted(batches: Iterable[Batch]) -> tuple[list[Tensor], list[Tensor]]:
    """Sequences that judge and sequences to train on, each [t] without its padding.

    Raises: ValueError if there are fewer than two of two tokens or more.
    """
    check_batches(batches)
    found = [row for batch in batches for row in unpadded(*tokens_of(batch)) if len(row) > 1]
    if len(found) < 2:
        raise ValueError(f"batches: expected two sequences of two tokens or more, got {len(found)}")
    return found[::HELD_BACK], [row for i, row in enumerate(found) if i % HELD_BACK]


def digest_of(judges: list[Tensor], lessons: list[Tensor]) -> str:
    """sha256 of the token ids of sequences, and of where each ends."""
    text = hashlib.sha256()
    for ids in (*judges, *lessons):
        text.update(len(ids).to_bytes(8, "little") + ids.cpu().numpy().tobytes())
    return text.hexdigest()


class _Point(NamedTuple):
    """Where training is after a whole step: tensors, Adam's two means of each, and the best so far. None of them
    changes: a step makes new ones."""

    step: int
    best: float
    tensors: dict[str, Tensor]
    means: dict[str, tuple[Tensor, Tensor]]
    kept: dict[str, Tensor]


class _Map(NamedTuple):
    """Low-rank keys and values of a layer, all in float32: maps [n or 2n, n], offsets [Hkv, D]."""

    keys: Tensor
    values: Tensor
    key_offset: Tensor | None
    value_offset: Tensor | None
    rope: Rope | None

    def mapped(self, k: Tensor, v: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """k, v [1, Hkv, T, D] -> what the latents make of them."""
        heads = [x.transpose(1, 2) for x in (k, v)]  # [1, T, Hkv, D]
        if self.rope is not None:
            heads[0] = self.rope.turn_back(heads[0], positions)
        offsets = self.key_offset, self.value_offset
        rows = [(x.float() if o is None else x.float() - o).flatten(2) for x, o in zip(heads, offsets, strict=True)]
        both, made = torch.cat(rows, 2), []
        for row, weight, o, x in zip(rows, (self.keys, self.values), offsets, heads, strict=True):
            y = ((row if len(weight) == row.shape[2] else both) @ weight).view(x.shape)
            made.append(y if o is None else y + o)
        if self.rope is not None:
            made[0] = self.rope.rotate(made[0], positions)
        return made[0].transpose(1, 2).to(k.dtype), made[1].transpose(1, 2).to(v.dtype)


class _Run:
    """The factors in training: tensors "<layer>.<side>.<up or down>", and all that a `_Point` holds."""

    def __init__(
        self,
        model: nn.Module,
        layers: list[AttentionLayer],
        factors: Factors,
        window: Window,
        shares: tuple[float, ...],
    ) -> None:
        self.model, self.attention, self.factors, self.window, self.shares = model, layers, factors, window, shares
        self.device = device_of(model)
        self.tensors = {name: x.detach().float().clone() for name, x in _tensors(factors)}
        self.means = {name: (torch.zeros_like(x), torch.zeros_like(x)) for name, x in self.tensors.items()}
        self.sizes = [x.double().square().mean().sqrt().item() for x in self.tensors.values()]
        self.kept = self.tensors
        self.step, self.first, self.best = 0, math.inf, math.inf
        self.resumed, self.whole = False, self.now()

    def now(self) -> _Point:
        return _Point(self.step, self.best, self.tensors, self.means, self.kept)

    def begin(
        self, steps: int, judges: list[Tensor], lessons: list[Tensor], state: str | os.PathLike[str] | None
    ) -> None:
        """Goes on from the state, or judges the factors as they are."""
        self.about = [
            fingerprint(self.model),
            steps,
            *astuple(self.window),
            list(self.shares),
            digest_of(judges, lessons),
        ]
        if state is None or not Path(state).exists():
            self.judge(judges)
            self.first, self.whole = self.best, self.now()
            return
        record, tensors, _ = safefile.read(state, "refinement")
        sizes = zip(record["sizes"], self.sizes, strict=False)
        alike = len(record["sizes"]) == len(self.sizes) and all(math.isclose(a, b, rel_tol=ALIKE) for a, b in sizes)
        if record["about"] != self.about or not alike:
            raise ValueError(f"state: expected a run of these factors, steps and text in {state}, got another's")
        held = {name: x.to(self.tensors[name.partition(".")[2]].device) for name, x in tensors.items()}
        self.step, self.first, self.best = record["step"], record["first"], record["best"]
        self.sizes = record["sizes"]  # to the last bit
        names = list(self.tensors)
        self.tensors, self.kept = ({name: held[f"{part}.{name}"] for name in names} for part in ("now", "best"))
        self.means = {name: (held[f"first.{name}"], held[f"second.{name}"]) for name in names}
        self.resumed, self.whole = True, self.now()

    def save(self, state: str | os.PathLike[str]) -> None:
        """Writes everything training goes on from: the last whole step."""
        held: dict[str, Tensor] = {}
        for name, x in self.whole.tensors.items():
            first, second = self.whole.means[name]
            parts = {"now": x, "best": self.whole.kept[name], "first": first, "second": second}
            held |= {f"{part}.{name}": tensor for part, tensor in parts.items()}
        record = {
            "about": self.about,
            "sizes": self.sizes,
            "step": self.whole.step,
            "first": self.first,
            "best": self.whole.best,
        }
        safefile.write(state, "refinement", record, held)

    @torch.no_grad()
    def expected(self, ids: Tensor) -> Tensor:
        """The original model's predictions, [t, V] log-probabilities."""
        logits: Tensor = self.model(input_ids=ids[None].to(self.device), use_cache=False).logits[0]
        return logits.float().log_softmax(-1)

    def divergence(self, ids: Tensor, expected: Tensor, share: float) -> Tensor:
        """Kullback-Leibler divergence from the predictions expected, nats a token, with this share of every run."""
        maps, at = self._maps(share), torch.arange(len(ids), device=self.device)[None]

        def replaced(i: int, _: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            return maps[i].mapped(k, v, at)

        with substituted(self.model, self.attention, replaced, self.window):
            got = self.model(input_ids=ids[None].to(self.device), use_cache=False).logits[0].float().log_softmax(-1)
        return nn.functional.kl_div(got, expected, reduction="batchmean", log_target=True)

    def learn(self, lessons: list[Tensor], rate: float) -> None:
        """One step of Adam on one sequence, which meets another share of the latents in every round."""
        self.tensors = {name: x.detach().requires_grad_() for name, x in self.tensors.items()}
        rounds, at = divmod(self.step, len(lessons))
        share = self.shares[(at + rounds) % len(self.shares)]
        loss = self.divergence(lessons[at], self.expected(lessons[at]), share)
        trained = list(self.tensors.values())
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
        else:  # every token of the text is near
            grads = tuple(torch.zeros_like(x) for x in trained)
        step, tensors, means = self.step + 1, {}, {}
        for (name, x), size, grad in zip(self.tensors.items(), self.sizes, grads, strict=True):
            mean = self.means[name][0].lerp(grad, 1 - BETAS[0])
            second = self.means[name][1].lerp(grad.square(), 1 - BETAS[1])
            corrected = (second / (1 - BETAS[1] ** step)).sqrt().add_(1e-12)
            taken = mean / (1 - BETAS[0] ** step) / corrected * (rate * max(size, 1e-30))
            tensors[name], means[name] = x.detach() - taken, (mean, second)
        self.step, self.tensors, self.means = step, tensors, means

    @torch.no_grad()
    def judge(self, judges: list[Tensor]) -> None:
        """Keeps the factors if they are the best on the sequences held back."""
        found = 0.0
        for ids in judges:
            expected = self.expected(ids)
            found += len(ids) * sum(self.divergence(ids, expected, share).item() for share in self.shares)
        found /= sum(map(len, judges)) * len(self.shares)
        if found < self.best:
            self.best, self.kept = found, self.tensors

    def _maps(self, share: float) -> list[_Map]:
        """What the tensors make of every layer's keys and values, with this share of their latents."""
        found = []
        for i, layer in enumerate(self.factors.layers):
            cut = first(*_projections(layer, i, self.tensors), shared_out(layer, share), shared=layer.shared)
            keys, values = (side.dense() for side in sides_of(*cut))
            offsets = [None if x is None else x.float() for x in (layer.keys.offset, layer.values.offset)]
            found.append(_Map(keys, values, offsets[0], offsets[1], layer.rope))
        return found

    def result(self) -> Factors:
        """The factors kept, in the dtype of those given."""
        kept = {name: x.to(self.factors.layers[0].dtype) for name, x in self.kept.items()}
        layers = []
        for i, layer in enumerate(self.factors.layers):
            keys, values = _projections(layer, i, kept)
            keys, values = replace(keys, offset=layer.keys.offset), replace(values, offset=layer.values.offset)
            layers.append(replace(layer, keys=keys, values=values))
        return replace(
            self.factors,
            layers=tuple(layers),
            method=f"{self.factors.method}, refined",
            predicted=(),
            near=astuple(self.window),
        )


def _tensors(factors: Factors) -> Iterator[tuple[str, Tensor]]:
    for i, layer in enumerate(factors.layers):
        for name, side in (("keys", layer.keys), ("values", layer.values)):
            if side.down is None and not layer.shared:
                raise ValueError(f"{name}.down: expected [Hkv * D, {side.width}] in layer {i}, got None")
            for part, x in (("up", side.up), ("down", side.down)):
                if x is not None:
                    yield f"{i}.{name}.{part}", x


def _projections(layer: LayerFactors, i: int, tensors: Mapping[str, Tensor]) -> tuple[Projection, Projection]:
    keys, values = (
        replace(side, up=tensors[f"{i}.{name}.up"], down=tensors.get(f"{i}.{name}.down"), offset=None)
        for name, side in (("keys", layer.keys), ("values", layer.values))
    )
    return keys, values
