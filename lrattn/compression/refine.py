"""Distillation: factors adjusted until the model on them predicts what the original model predicts."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Iterable
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lrattn.attention.cache import pack, unpack
from lrattn.compression.arguments import check_count, check_flag
from lrattn.compression.batches import Batch, check_batches, check_lengths, tokens_of, unpadded
from lrattn.compression.calibrate import fingerprint
from lrattn.compression.nested import first, shared_out
from lrattn.compression.substitute import Window, substituted
from lrattn.factors import safefile
from lrattn.factors.layer import LayerFactors
from lrattn.factors.projection import Projection
from lrattn.factors.record import Factors
from lrattn.factors.rope import rows_at
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
PARTS = ("now", "best", "first", "second")  # the tensors of a state
ALIKE = 1e-4  # two runs start from the same factors up to the signs and roundings that another machine makes

Tensors = dict[str, Tensor]  # "<layer>.<side>.<up or down>", float32


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
    may be the ones given. Ranks, bytes and all but their `near` window stay as they are. `down` reads heads: what it
    writes stays in their span. Packed latents are rounded as they are stored, and gradients pass as if they were not
    (straight through, arXiv 1308.3432).

    Args:
        model: the one the factors are of; it is not changed.
        batches: token ids [b, t], or mappings with input_ids and maybe attention_mask: two sequences at least. The
            first of every eight judges: the factors should not have been calibrated on it, see `parted`.
        steps: of Adam. A step costs about four forward passes of a sequence.
        recent, sinks: of the dense window that the cache will hold: what is near a query is exact in training, too.
            None: as the factors say (Factors.near).
        nested: a step trains the first quarter, half, three quarters or all of every group's latents, in turns, and the
            factors are judged by all of these: for `narrowed`, at any keep below their own. Of plain latents.
        state: a file written at every judgement, every eight steps, and when Ctrl-C or an error stops the run: of whole
            steps. If it exists, training goes on where it was.
        progress: show a bar on stderr, with the divergence on the held-back sequences in nats a token.

    Raises: ValueError for too few sequences or one with more tokens than the model has positions, factors in another
    dtype or on another device than the model, packed ones with nested, maps of attention inputs, or a state of other
    factors, steps, window or text; OSError if the state cannot be written.
    """
    check_count("steps", steps, 1)
    check_flag("nested", nested)
    if any(layer.values.of_inputs for layer in factors.layers):
        raise ValueError("factors: expected maps of heads, got those of a file before version 3: use in_kv_space")
    if name := factors.thinned:
        raise ValueError(
            f"factors: expected some without {name}, which a pass over whole texts does not show, got {factors}"
        )
    if nested and any(layer.packed for layer in factors.layers):
        raise ValueError("nested: expected False with packed latents, of which no prefixes can be taken, got True")
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
    about = [fingerprint(model), steps, *astuple(window), list(run.shares), digest_of(judges, lessons)]
    with evaluating(model), frozen(model):
        if state is not None and Path(state).exists():
            at = run.resumed(state, about)
            written = at.step
        else:
            at, written = run.begun(judges), -1
        shown = tqdm(total=steps, initial=at.step, desc="refine", unit="step", disable=not progress)
        try:
            while at.step < steps:
                shown.set_postfix_str(f"divergence {at.least:.4f}, was {at.origin:.4f}")
                reached = run.learned(at, lessons, _rate(at.step, steps, at.origin))
                shown.update()
                due = reached.step % CHECK_EVERY == 0 or reached.step == steps
                at = run.judged(reached, judges) if due else reached
                if due and state is not None:
                    run.save(state, about, at)
                    written = at.step
        except BaseException:
            if state is not None and at.step > written:
                run.save(state, about, at)
            raise
        finally:
            shown.close()
    return run.made(at.best)


def _rate(step: int, steps: int, origin: float) -> float:
    """In proportion to the distance to go, whose square the divergence at the start grows with."""
    longest = RATE * math.sqrt(min(max(origin, 0.0) / FAR, 1.0))
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
    """Where training is after a whole step. None of it changes: a step makes new ones.

    origin, least: divergence of the factors given, and of the best so far. first, second: Adam's means of the gradients
    by `now` and of their squares.
    """

    step: int
    origin: float
    least: float
    now: Tensors
    best: Tensors
    first: Tensors
    second: Tensors


class _Run:
    """What all steps have in common."""

    def __init__(
        self,
        model: nn.Module,
        layers: list[AttentionLayer],
        factors: Factors,
        window: Window,
        shares: tuple[float, ...],
    ) -> None:
        self.model, self.layers, self.factors, self.window, self.shares = model, layers, factors, window, shares
        self.device = device_of(model)
        self.wide = factors.to(dtype=torch.float32)
        self.given = _tensors(self.wide)
        self.sizes = [x.double().square().mean().sqrt().item() for x in self.given.values()]

    def begun(self, judges: list[Tensor]) -> _Point:
        """With the factors as they are."""
        zeros = {name: torch.zeros_like(x) for name, x in self.given.items()}
        at = self.judged(_Point(0, math.inf, math.inf, self.given, self.given, zeros, zeros), judges)
        return at._replace(origin=at.least)

    def resumed(self, state: str | os.PathLike[str], about: list[Any]) -> _Point:
        """Where the state is. Raises: ValueError if it is of another run."""
        record, held, _ = safefile.read(state, "refinement")
        sizes = record["sizes"]
        alike = len(sizes) == len(self.sizes) and all(map(partial(math.isclose, rel_tol=ALIKE), sizes, self.sizes))
        if record["about"] != about or not alike:
            raise ValueError(f"state: expected a run of these factors, steps and text in {state}, got another's")
        self.sizes = sizes  # to the last bit
        parts = {p: {name: held[f"{p}.{name}"].to(x.device) for name, x in self.given.items()} for p in PARTS}
        return _Point(record["step"], record["first"], record["best"], **parts)

    def save(self, state: str | os.PathLike[str], about: list[Any], at: _Point) -> None:
        """Writes all that training goes on from."""
        record = {"about": about, "sizes": self.sizes, "step": at.step, "first": at.origin, "best": at.least}
        held = {f"{part}.{name}": x for part in PARTS for name, x in getattr(at, part).items()}
        safefile.write(state, "refinement", record, held)

    def predicted(self, ids: Tensor) -> Tensor:
        """Log-probabilities [t, V] of the tokens after those of ids [t]."""
        logits: Tensor = self.model(input_ids=ids[None].to(self.device), use_cache=False).logits[0]
        return logits.float().log_softmax(-1)

    def divergence(self, ids: Tensor, expected: Tensor, tensors: Tensors, share: float) -> Tensor:
        """Kullback-Leibler divergence from the predictions expected, nats a token, with this share of every run."""
        at = torch.arange(len(ids), device=self.device)

        def replaced(i: int, _: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            layer, sides = self.wide.layers[i], _sides(self.wide.layers[i], i, tensors)
            if share < 1:
                sides = first(*sides, shared_out(layer, share), shared=layer.shared)
            return _mapped(self.factors.layers[i], sides, layer, k, v, at)

        with substituted(self.model, self.layers, replaced, self.window):
            got = self.predicted(ids)
        return nn.functional.kl_div(got, expected, reduction="batchmean", log_target=True)

    def learned(self, at: _Point, lessons: list[Tensor], rate: float) -> _Point:
        """A step of Adam on one sequence, which meets another share of the latents in every round."""
        rounds, i = divmod(at.step, len(lessons))
        ids, share = lessons[i], self.shares[(i + rounds) % len(self.shares)]
        now = {name: x.detach().requires_grad_() for name, x in at.now.items()}
        with torch.no_grad():
            expected = self.predicted(ids)
        loss = self.divergence(ids, expected, now, share)
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, list(now.values()), allow_unused=True, materialize_grads=True)
        else:  # every token of the text is near
            grads = tuple(map(torch.zeros_like, now.values()))
        after = at._replace(step=at.step + 1, now={}, first={}, second={})
        for name, size, grad in zip(now, self.sizes, grads, strict=True):
            mean = at.first[name].lerp(grad, 1 - BETAS[0])
            second = at.second[name].lerp(grad.square(), 1 - BETAS[1])
            corrected = (second / (1 - BETAS[1] ** after.step)).sqrt().add_(1e-12)
            moved = mean / (1 - BETAS[0] ** after.step) / corrected * (rate * max(size, 1e-30))
            after.now[name], after.first[name], after.second[name] = at.now[name] - moved, mean, second
        return after

    @torch.no_grad()
    def judged(self, at: _Point, judges: list[Tensor]) -> _Point:
        """With what is now as the best, if it is on the sequences held back."""
        found = 0.0
        for ids in judges:
            expected = self.predicted(ids)
            found += len(ids) * sum(self.divergence(ids, expected, at.now, share).item() for share in self.shares)
        found /= sum(map(len, judges)) * len(self.shares)
        return at._replace(least=found, best=at.now) if found < at.least else at

    def made(self, tensors: Tensors) -> Factors:
        """The factors of these tensors, in the dtype of those given."""
        kept, layers = {name: x.to(self.factors.layers[0].dtype) for name, x in tensors.items()}, []
        for i, layer in enumerate(self.factors.layers):
            keys, values = _sides(layer, i, kept)
            layers.append(replace(layer, keys=keys, values=values))
        method, near = f"{self.factors.method}, refined", astuple(self.window)
        return replace(self.factors, layers=tuple(layers), method=method, predicted=(), near=near, residual=None)


def _tensors(factors: Factors) -> Tensors:
    """What is trained: up and down of all sides."""
    found: Tensors = {}
    for i, layer in enumerate(factors.layers):
        for name, side in (("keys", layer.keys), ("values", layer.values)):
            if side.down is None and not (layer.shared and name == "keys"):
                raise ValueError(f"{name}.down: expected [Hkv * D, {side.width}] in layer {i}, got None")
            parts = {"up": side.up, "down": side.down}
            found |= {f"{i}.{name}.{part}": x.detach().clone() for part, x in parts.items() if x is not None}
    return found


def _sides(layer: LayerFactors, i: int, tensors: Tensors) -> tuple[Projection, Projection]:
    """Keys and values of layer i with these tensors."""
    keys, values = (
        replace(side, up=tensors[f"{i}.{name}.up"], down=tensors.get(f"{i}.{name}.down"))
        for name, side in (("keys", layer.keys), ("values", layer.values))
    )
    return keys, values


def _mapped(
    held: LayerFactors, sides: tuple[Projection, Projection], layer: LayerFactors, k: Tensor, v: Tensor, at: Tensor
) -> tuple[Tensor, Tensor]:
    """k, v [1, Hkv, T, D] at positions [T] -> what latents by these sides make of them.

    layer: in float32. held: as it is stored, which says how latents are rounded.
    """
    heads, turns = [x[0].transpose(0, 1) for x in (k, v)], None  # [T, Hkv, D]
    if layer.rope is not None and layer.turns is not None:
        turns = rows_at(layer.turns, at, layer.chunk)[:, None]
        heads[0] = layer.rope.turned(heads[0], turns.reciprocal())
    rows = [x.float() if side.offset is None else x.float() - side.offset for x, side in zip(heads, sides, strict=True)]
    (keys, values), inputs = sides, [row.flatten(1) for row in rows]
    if layer.shared:
        zk = zv = _written(values, torch.cat(inputs, 1), held.values)
    else:
        zk, zv = _written(keys, inputs[0], held.keys), _written(values, inputs[1], held.values)
    made = [_read(keys, zk, values if layer.shared else keys), _read(values, zv, values)]
    if layer.rope is not None and turns is not None:
        made[0] = layer.rope.turned(made[0], turns)
    return made[0].transpose(0, 1)[None].to(k.dtype), made[1].transpose(0, 1)[None].to(v.dtype)


def _written(side: Projection, x: Tensor, held: Projection) -> Tensor:
    """Latents of x [T, inputs] as a cache of `held` gives them back, with gradients as if it rounded nothing."""
    assert side.down is not None
    z = x @ side.down
    if not held.formats:
        return z
    given = unpack(held, pack(held, z.detach().to(held.up.dtype)))
    return z + (given - z.detach())


def _read(side: Projection, z: Tensor, row: Projection) -> Tensor:
    """Heads [T, Hkv, D] of a side from rows of latents [T, width], laid out as those of `row`."""
    made = z.new_empty(len(z), side.num_heads, side.head_dim)
    for g, (heads, columns, rank) in enumerate(zip(side.groups, row.columns, side.ranks, strict=True)):
        found = z[:, columns.start : columns.start + rank] @ side.block(g)
        made[:, list(heads)] = found.unflatten(1, (len(heads), -1))
    return made if side.offset is None else made + side.offset
