"""Model and token batches -> Moments: what the attention inputs of each layer look like, and what its loss feels."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lrattn.compression.moments import GATHERED, GRADIENTS, Moments
from lrattn.compression.substitute import Window, substituted
from lrattn.factors import safefile
from lrattn.factors.parts import AttentionParts, attention_parts, decoder_of, evaluating, frozen

Batch = Tensor | Mapping[str, Any]
INTEGERS = (torch.int64, torch.int32, torch.int16)
SAVE_EVERY = 60.0  # seconds between two writes of the state


@torch.inference_mode(False)
def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    gather: Collection[str] = (),
    far: tuple[int, int] = (0, 0),
    state: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Moments:
    """Runs the model once over token batches and streams the moments of every layer.

    Args:
        batches: token ids [b, t], or mappings with input_ids and maybe attention_mask.
        gather: names of moments.GATHERED to sum beside the inputs' moments. "fisher" and the metrics take a
            backward pass for every batch: the loss is summed over the tokens of a sequence, however the batches are
            cut. Labels are the next tokens for "fisher", as published, and for a metric tokens drawn from the model's
            own predictions: then the mean of g g^T is the second derivative of its divergence from itself.
            "rotated-metric" takes its gradients by rotated keys, and is gathered without the other two.
        far: (recent, sinks): gradients pass only through attention to tokens that a cache with that window would not
            hold dense for the query: for factors of the default window, that of METHODS["lrattn"].near. Where a batch
            is padded its sequences run one by one then.
        state: a file that is written every minute and at the end. If it exists, sequences it has seen are skipped:
            an interrupted run goes on where it was, and more text can be added. What it has gathered goes on too.
        progress: show a bar on stderr.

    Products are float32 at least, sums of moments float64. Memory beside the model: E^2 float64 a layer and what is
    gathered, for gradients also the activations of one batch; nothing grows with the number of tokens.

    Raises: ValueError if there are no tokens, a layer sees numbers that are not finite, or the state is of another
    model, text or window, or lacks what is asked for.
    """
    unknown = sorted(set(gather) - set(GATHERED))
    if unknown:
        raise ValueError(f"gather: expected names out of {sorted(GATHERED)}, got {unknown}")
    _check_gradients(gather)
    window = Window.of(far)
    parts = attention_parts(model)
    held = _resume(model, parts, gather, window, state)
    window = Window(*held.far)  # what is held goes on growing in its own
    sums = _Sums(parts, held)
    if sums.differentiates and any(p.is_inference() for p in model.parameters()):
        raise ValueError("model: expected parameters that gradients can pass, got some made in torch.inference_mode()")
    run, device = model if sums.differentiates else decoder_of(model), next(model.parameters()).device
    saved = time.monotonic()
    with ExitStack() as stack, evaluating(model), torch.set_grad_enabled(sums.differentiates):
        for hook in sums.hooks():
            stack.callback(hook.remove)
        if sums.differentiates:
            stack.enter_context(substituted(model, sums.add_zeros, window, rotated=sums.rotated))
            stack.enter_context(frozen(model))
        shown = tqdm(batches, desc="calibrate", unit="batch", disable=not progress)
        for ids, live, text in _unseen(shown, held):
            passes: list[tuple[Tensor, Tensor | None]] = [(ids, live)]
            if (window or sums.rotated) and live is not None and not bool(live.all()):
                passes = [(row[None], None) for row in unpadded(ids, live)]
            for rows, own in passes:
                if not rows.numel():
                    held = replace(held, sequences=held.sequences + 1, text=text)
                    continue
                rows, own = rows.to(device), None if own is None else own.to(device)
                arguments = {} if own is None else {"attention_mask": own.long()}
                sums.begin(own)
                out = run(input_ids=rows, use_cache=False, **arguments)
                held = sums.end(held, rows, out.logits if sums.differentiates else None, text)
            if state is not None and time.monotonic() - saved >= SAVE_EVERY:
                held.save(state)
                saved = time.monotonic()
    if not held.tokens:
        raise ValueError("batches: expected at least one token to calibrate on, got none")
    if sums.differentiates and not any(
        bool(x.any()) for name in GRADIENTS for x in held.sums.get(f"{name}.values", ())
    ):
        raise ValueError(f"batches: expected tokens that attention sees beyond the window far={tuple(far)}, got none")
    if state is not None:
        held.save(state)
    return held


def _check_gradients(gather: Collection[str]) -> None:
    """Raises ValueError where gradients by rotated keys are asked for together with others."""
    asked = sorted(set(gather) & set(GRADIENTS))
    if "rotated-metric" in asked and len(asked) > 1:
        raise ValueError(f"gather: expected no other gradients beside 'rotated-metric', got {asked}")


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


def unpadded(ids: Tensor, live: Tensor | None) -> list[Tensor]:
    """Each sequence [t] of token ids [b, t] without its padding."""
    return list(ids) if live is None else [row[kept] for row, kept in zip(ids, live, strict=True)]


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
    model: nn.Module,
    parts: list[AttentionParts],
    gather: Collection[str],
    window: Window,
    state: str | os.PathLike[str] | None,
) -> Moments:
    """The moments in the state file, or zeros."""
    own, wanted = fingerprint(model), bool(set(gather) & set(GRADIENTS))
    far = astuple(window) if wanted else (0, 0)
    if state is not None:
        safefile.check_target("state", state)
    if state is not None and Path(state).exists():
        held = Moments.load(state)
        if held.model != own:
            raise ValueError(f"state: expected moments of this model in {state}, got another model's")
        if missing := sorted(set(gather) - set(held.gathered)):
            raise ValueError(f"state: expected moments with {missing} in {state}, got some without")
        if wanted and held.far != far:
            raise ValueError(f"state: expected gradients beyond a window (recent, sinks) of {far}, got {held.far}")
        return held
    zeros: dict[str, list[Tensor]] = {}
    for part in parts:
        for name, shape in _shapes(part, gather).items():
            kind = torch.float32 if name.startswith("fisher") else torch.float64
            zeros.setdefault(name, []).append(torch.zeros(shape, dtype=kind))
    found = {name: tuple(xs) for name, xs in zeros.items()}
    return Moments(inputs=found.pop("inputs"), tokens=0, sums=found, far=far, model=own)


def _shapes(part: AttentionParts, gather: Collection[str]) -> dict[str, tuple[int, ...]]:
    n, inputs = part.linear("k_proj").weight.shape
    heads, head_dim = part.num_kv_heads, part.head_dim
    of_name = {"fisher": (n, inputs), "metric": (n, n), "weighted": (inputs, inputs), "magnitudes": (inputs,)}
    of_name |= {"means": (inputs,), "rotated-metric": (n, n), "rotated-weighted": (inputs, inputs)}
    exact = {"rotated.keys": (n, n), "rotated.mean": (n,), "rotated.queries": (heads, head_dim, head_dim)}
    exact |= {"rotated-weighted.keys": (n, n)}
    names = [name for group in GATHERED if group in gather for name in GATHERED[group]]
    return {"inputs": (inputs, inputs)} | {name: exact.get(name) or of_name[name.split(".")[0]] for name in names}


def _unseen(batches: Iterable[Batch], held: Moments) -> Iterator[tuple[Tensor, Tensor | None, str]]:
    """Token ids, where they are live, and the digest of all text so far, of the sequences that are not in `held`."""
    text, passed = "", 0
    for batch in batches:
        ids, live = tokens_of(batch)
        for kept in unpadded(ids.cpu(), None if live is None else live.cpu()):
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
        self.parts, self.inputs, self.sums, self.gathered = parts, held.inputs, held.sums, held.gathered
        self.differentiates = any(name in GRADIENTS for name in self.gathered)
        self.rotated = "rotated-metric" in self.gathered  # gradients are by rotated keys
        self.begin(None)

    def hooks(self) -> Iterator[Any]:
        for i, part in enumerate(self.parts):
            yield part.linear("k_proj").register_forward_pre_hook(self._watch_inputs(i))
            for side in "qk" if "rotated" in self.gathered else "":
                yield part.linear(f"{side}_proj").register_forward_hook(self._watch_rotated(i, side))

    def _watch_inputs(self, i: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.inputs[i].add_(second_moment(args[0], self.live))
            rows = args[0].detach() if self.live is None else args[0].detach()[self.live]
            for name in {"magnitudes", "means"} & set(self.gathered):
                x = rows.abs() if name == "magnitudes" else rows
                self.sums[name][i].add_(x.flatten(0, -2).double().sum(0).cpu())

        return hook

    def _watch_rotated(self, i: int, side: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], raw: Tensor) -> None:
            b, t = raw.shape[:2]
            live = self.live if self.live is not None else torch.ones(b, t, dtype=torch.bool, device=raw.device)
            part, at = self.parts[i], (live.cumsum(1) - 1).clamp_min(0)
            heads = part.turned(side, raw.detach().unflatten(-1, (-1, part.head_dim)), at)[live].double()
            if side == "k":
                keys = heads.flatten(1)
                self.sums["rotated.keys"][i].add_((keys.T @ keys).cpu())
                self.sums["rotated.mean"][i].add_(keys.sum(0).cpu())
            else:
                groups = heads.unflatten(1, (part.num_kv_heads, -1)).permute(1, 0, 2, 3).flatten(1, 2)
                self.sums["rotated.queries"][i].add_((groups.mT @ groups).cpu())

        return hook

    def add_zeros(self, i: int, x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Zeros to differentiate by, added to a layer's keys and values: no parameter needs a gradient."""
        self.seen.append({"keys": k.detach() if self.rotated else x.detach(), "values": x.detach()})
        self.leaves += [torch.zeros_like(k, requires_grad=True), torch.zeros_like(v, requires_grad=True)]
        return k + self.leaves[-2], v + self.leaves[-1]

    def begin(self, live: Tensor | None) -> None:
        self.live = live
        self.seen: list[dict[str, Tensor]] = []  # what each layer's keys and values are maps of, for gradients
        self.leaves: list[Tensor] = []  # of keys, values, keys, ...

    def end(self, held: Moments, ids: Tensor, logits: Tensor | None, text: str) -> Moments:
        """The batch went through every layer: sum what its gradients tell, count it."""
        for part, total in zip(self.parts, self.inputs, strict=True):
            if not bool(total.isfinite().all()):
                raise ValueError(
                    f"batches: the inputs of {part.name} are not all finite; calibrate a model of a wider dtype"
                )
        if logits is not None:
            self._differentiate(logits, ids)
        tokens = ids.numel() if self.live is None else int(self.live.sum())
        return replace(held, tokens=held.tokens + tokens, sequences=held.sequences + len(ids), text=text)

    def _differentiate(self, logits: Tensor, ids: Tensor) -> None:
        wanted = [name for name in GRADIENTS if name in self.gathered]
        for name in wanted:
            labels = ids[:, 1:] if name == "fisher" else _drawn(logits, ids, self.live)
            loss = _nll(logits, labels, self.live)
            grads = iter(torch.autograd.grad(loss, self.leaves, retain_graph=name != wanted[-1]))
            for i, x in enumerate(self.seen):
                for side in ("keys", "values"):
                    self._add_gradients(name, i, side, x[side], next(grads))

    def _add_gradients(self, name: str, i: int, side: str, x: Tensor, g: Tensor) -> None:
        """x [b, t, inputs] and g [b, t, n], a sequence at a time."""
        weighted = name.replace("metric", "weighted")
        for b in range(len(x)):
            rows, grad = x[b].float(), g[b].float()
            if self.live is not None:
                rows, grad = rows[self.live[b]], grad[self.live[b]]
            if name == "fisher":
                self.sums[f"fisher.{side}"][i].add_((grad.T @ rows).square().cpu())
            else:
                rows, grad = rows.double(), grad.double()  # a sink outweighs a common token by more than float32 holds
                size = grad.norm(dim=1, keepdim=True)
                unit = grad[1:] / size[1:].clamp_min(torch.finfo(size.dtype).tiny)
                self.sums[f"{name}.{side}"][i].add_((grad[1:].T @ unit).cpu())
                self.sums[f"{weighted}.{side}"][i].add_(((rows * size).T @ rows).cpu())
        if not bool(self.sums[f"{name}.{side}"][i].isfinite().all()):
            raise ValueError("batches: a gradient is not finite; calibrate a model of a wider dtype")


def _nll(logits: Tensor, labels: Tensor, live: Tensor | None) -> Tensor:
    """Negative log-likelihood, summed: labels [b, t - 1] of the tokens after those of logits [b, t, V]."""
    losses = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), reduction="none")
    return losses.sum() if live is None else losses[(live[:, :-1] & live[:, 1:]).flatten()].sum()


@torch.no_grad()
def _drawn(logits: Tensor, ids: Tensor, live: Tensor | None) -> Tensor:
    """Labels [b, t - 1] drawn from the predictions, each sequence by a generator that its tokens seed."""
    labels = torch.zeros_like(ids)
    for b, row in enumerate(ids):
        kept = torch.ones_like(row, dtype=torch.bool) if live is None else live[b]
        seed = hashlib.sha256(row[kept].cpu().numpy().tobytes()).digest()[:7]
        generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
        totals = logits[b][kept].float().softmax(-1).cumsum(-1)
        at = torch.rand(len(totals), 1, generator=generator).to(totals) * totals[:, -1:]
        labels[b, kept] = torch.searchsorted(totals, at)[:, 0].clamp_max(logits.shape[-1] - 1)
    return labels[:, :-1]
