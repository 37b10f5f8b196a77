"""Model and token batches -> Moments: what the attention inputs of each layer look like, and what its loss feels."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lrattn import safefile
from lrattn.parts import AttentionParts, attention_parts, decoder_of, evaluating

Batch = Tensor | Mapping[str, Any]
INTEGERS = (torch.int64, torch.int32, torch.int16)
SAVE_EVERY = 60.0  # seconds between two writes of the state


@dataclass(frozen=True, eq=False)
class Moments:
    """Sums over calibration tokens; those of padding are left out.

    Args:
        inputs: per layer [E, E] float64 on the CPU, sum of x x^T over the attention inputs x; uncentred, no biases.
        tokens, sequences: how many were summed.
        gradients: per layer, of k_proj and of v_proj, [Hkv * D, E] float32: sum over sequences of the squared
            gradient of the sequence's negative log-likelihood. None if `calibrate` was not asked for it.
        text: chained sha256 of the token ids. model: sha256 of numbers from every parameter.
    """

    inputs: tuple[Tensor, ...]
    tokens: int
    sequences: int = 0
    gradients: tuple[tuple[Tensor, Tensor], ...] | None = None
    text: str = ""
    model: str = ""

    @cached_property
    def fisher(self) -> list[tuple[float, float]] | None:
        """Per layer, of the key and the value projection: mean over the weights of their root mean square gradient.

        The score by which Palu and ReCalKV share out ranks.
        """
        if self.gradients is None:
            return None

        def score(squares: Tensor) -> float:
            return (squares / max(self.sequences, 1)).sqrt().mean(dtype=torch.float64).item()

        return [(score(k), score(v)) for k, v in self.gradients]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes one safetensors file; the file at `path` is replaced only when the new one is whole."""
        tensors = {f"{i}.inputs": x for i, x in enumerate(self.inputs)}
        for i, pair in enumerate(self.gradients or ()):
            tensors |= {f"{i}.gradients.{name}": x for name, x in zip(("keys", "values"), pair, strict=True)}
        names = ("tokens", "sequences", "text", "model")
        safefile.write(path, "moments", {name: getattr(self, name) for name in names}, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Moments:
        """Reads a file that `save`, or `calibrate` with a state, wrote.

        Raises: FileNotFoundError; ValueError if it is damaged, truncated, foreign or newer.
        """
        record, tensors = safefile.read(path, "moments")
        layers = range(sum(name.endswith(".inputs") for name in tensors))
        gradients = None
        if "0.gradients.keys" in tensors:
            gradients = tuple((tensors[f"{i}.gradients.keys"], tensors[f"{i}.gradients.values"]) for i in layers)
        return cls(inputs=tuple(tensors[f"{i}.inputs"] for i in layers), gradients=gradients, **record)


@torch.inference_mode(False)
def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    fisher: bool = False,
    state: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Moments:
    """Runs the model once over token batches and streams the moments of every layer.

    Args:
        batches: token ids [b, t], or mappings with input_ids and maybe attention_mask.
        fisher: also sum squared gradients of the key and value projections: a backward pass for every batch. Labels
            are the next tokens; every sequence has a gradient of its own, however the batches are cut.
        state: a file that is written every minute and at the end. If it exists, sequences it has seen are skipped:
            an interrupted run goes on where it was, and more text can be added. If it holds gradients, they go on too.
        progress: show a bar on stderr.

    Products are float32 at least, sums of moments float64. Memory beside the model: E^2 float64 a layer, for `fisher`
    also 2 * Hkv * D * E float32 a layer and the activations of one batch; nothing grows with the number of tokens.

    Raises: ValueError if there are no tokens, a layer sees numbers that are not finite, or the state is of another
    model or text, or holds no gradients where they are asked for.
    """
    parts = attention_parts(model)
    held = _resume(model, parts, fisher, state)
    fisher = held.gradients is not None
    sums = _Sums(parts, held)
    if fisher and any(p.is_inference() for p in model.parameters()):
        raise ValueError("model: expected parameters that gradients can pass, got some made in torch.inference_mode()")
    run, device = model if fisher else decoder_of(model), next(model.parameters()).device
    saved = time.monotonic()
    with ExitStack() as stack, evaluating(model), torch.set_grad_enabled(fisher):
        for hook in sums.hooks():
            stack.callback(hook.remove)
        for weight in [p for p in model.parameters() if fisher and p.requires_grad]:  # none of them costs a gradient
            stack.callback(weight.requires_grad_, True)
            weight.requires_grad_(False)
        shown = tqdm(batches, desc="calibrate", unit="batch", disable=not progress)
        for ids, live, text in _unseen(shown, held):
            ids, live = ids.to(device), None if live is None else live.to(device)
            arguments = {} if live is None else {"attention_mask": live.long()}
            sums.begin(live)
            out = run(input_ids=ids, use_cache=False, **arguments)
            held = sums.end(held, ids, out.logits if fisher else None, text)
            if state is not None and time.monotonic() - saved >= SAVE_EVERY:
                held.save(state)
                saved = time.monotonic()
    if not held.tokens:
        raise ValueError("batches: expected at least one token to calibrate on, got none")
    if held.fisher is not None and not any(max(pair) > 0 for pair in held.fisher):
        raise ValueError("batches: expected sequences of two tokens or more, whose loss has a gradient, got none")
    if state is not None:
        held.save(state)
    return held


def tokens_of(batch: Batch) -> tuple[Tensor, Tensor | None]:
    """Token ids [b, t] int64, and where they are live [b, t] bool; None without padding.

    Raises: ValueError for anything else.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2 or not ids.shape[1] or ids.dtype not in INTEGERS:
        raise ValueError(f"batches: expected integer token ids [b, t], got {_told(ids)}")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != ids.shape):
        raise ValueError(f"batches: expected an attention_mask {list(ids.shape)}, got {_told(mask)}")
    return ids.long().clone(), None if mask is None else mask.bool()  # backward keeps them: not the caller's


def _told(x: Any) -> str:
    return f"{list(x.shape)} {x.dtype}" if isinstance(x, Tensor) else type(x).__name__


def second_moment(x: Tensor, live: Tensor | None) -> Tensor:
    """Sum of x x^T over the live tokens of x [b, t, E]: [E, E] float64 on the CPU, one product a sequence."""
    x = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    total = torch.zeros(x.shape[-1], x.shape[-1], dtype=torch.float64)
    for b, row in enumerate(x):
        rows = row if live is None else row[live[b]]
        total += (rows.T @ rows).cpu()
    return total


def fingerprint(model: nn.Module) -> str:
    """sha256 of up to 64 numbers of every parameter: tells models of one architecture apart."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        numbers = parameter.detach().reshape(-1)
        digest.update(numbers[:: max(len(numbers) // 64, 1)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _resume(
    model: nn.Module, parts: list[AttentionParts], fisher: bool, state: str | os.PathLike[str] | None
) -> Moments:
    """The moments in the state file, or zeros."""
    own = fingerprint(model)
    if state is not None:
        safefile.check_target("state", state)
    if state is not None and Path(state).exists():
        held = Moments.load(state)
        if held.model != own:
            raise ValueError(f"state: expected moments of this model in {state}, got another model's")
        if fisher and held.gradients is None:
            raise ValueError(f"state: expected moments with gradients in {state}, got some without")
        return held
    shapes = [p.linear("k_proj").weight.shape for p in parts]
    return Moments(
        inputs=tuple(torch.zeros(inputs, inputs, dtype=torch.float64) for _, inputs in shapes),
        tokens=0,
        gradients=tuple((torch.zeros(shape), torch.zeros(shape)) for shape in shapes) if fisher else None,
        model=own,
    )


def _unseen(batches: Iterable[Batch], held: Moments) -> Iterator[tuple[Tensor, Tensor | None, str]]:
    """Token ids, where they are live, and the digest of all text so far, of the sequences that are not in `held`."""
    text, passed = "", 0
    for batch in batches:
        ids, live = tokens_of(batch)
        for b, row in enumerate(ids.cpu()):
            kept = row if live is None else row[live[b].cpu()]
            text = hashlib.sha256(text.encode() + kept.numpy().tobytes()).hexdigest()
            passed += 1
            if passed == held.sequences and text != held.text:
                raise ValueError("state: expected batches to begin with the text it has seen, got another text")
        new = min(passed - held.sequences, len(ids))
        if new > 0:
            yield ids[-new:], None if live is None else live[-new:], text
    if passed < held.sequences:
        raise ValueError(
            f"state: expected batches to begin with the {held.sequences} sequences it has seen, got {passed}"
        )


class _Sums:
    """The sums of `held` while they grow, and the hooks that feed them."""

    def __init__(self, parts: list[AttentionParts], held: Moments) -> None:
        self.parts, self.inputs, self.gradients = parts, held.inputs, held.gradients
        self.begin(None)

    def hooks(self) -> Iterator[Any]:
        for part, total in zip(self.parts, self.inputs, strict=True):
            yield part.linear("k_proj").register_forward_pre_hook(self._watch_inputs(total))
            for name in ("k_proj", "v_proj") if self.gradients else ():
                yield part.linear(name).register_forward_hook(self._watch_outputs)

    def _watch_inputs(self, total: Tensor) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            total.add_(second_moment(args[0], self.live))
            if self.gradients:
                self.seen.append(args[0].detach())

        return hook

    def _watch_outputs(self, _: nn.Module, __: tuple[Tensor, ...], out: Tensor) -> Tensor:
        """Adds a zero to differentiate by: no parameter needs a gradient."""
        self.leaves.append(torch.zeros_like(out, requires_grad=True))
        return out + self.leaves[-1]

    def begin(self, live: Tensor | None) -> None:
        self.live = live
        self.seen: list[Tensor] = []  # inputs of each layer, where gradients are taken
        self.leaves: list[Tensor] = []  # of k_proj, v_proj, k_proj, ...

    def end(self, held: Moments, ids: Tensor, logits: Tensor | None, text: str) -> Moments:
        """The batch went through every layer: square its gradients, count it."""
        for part, total in zip(self.parts, self.inputs, strict=True):
            if not bool(total.isfinite().all()):
                raise ValueError(
                    f"batches: the inputs of {part.name} are not all finite; calibrate a model of a wider dtype"
                )
        if self.gradients is not None and logits is not None:
            grads = iter(torch.autograd.grad(_nll(logits, ids, self.live), self.leaves))
            for pair, x in zip(self.gradients, self.seen, strict=True):
                for squares in pair:
                    g = next(grads) if self.live is None else next(grads) * self.live[..., None]
                    for x_row, g_row in zip(x, g, strict=True):
                        squares.add_((g_row.float().T @ x_row.float()).square().cpu())
                    if not bool(squares.isfinite().all()):
                        raise ValueError("batches: a gradient is not finite; calibrate a model of a wider dtype")
        tokens = ids.numel() if self.live is None else int(self.live.sum())
        return replace(held, tokens=held.tokens + tokens, sequences=held.sequences + len(ids), text=text)


def _nll(logits: Tensor, ids: Tensor, live: Tensor | None) -> Tensor:
    """Negative log-likelihood, summed: the token at t + 1 given those up to t."""
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return losses.sum() if live is None else losses[(live[:, :-1] & live[:, 1:]).flatten()].sum()
