"""Model and token batches -> Moments: what the attention inputs of each layer look like, and what its loss feels."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lrattn.compression.batches import Batch, check_batches, check_lengths, tokens_of, unfelt, unpadded
from lrattn.compression.moments import GATHERED, GRADIENTS, Moments
from lrattn.compression.substitute import Window, substituted
from lrattn.factors import safefile
from lrattn.factors.parts import AttentionParts, attention_parts, decoder_of, evaluating, frozen

HALVES = (torch.float16, torch.bfloat16)
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
        state: a file that is written every minute, at the end, and when Ctrl-C or an error stops the run: of whole
            batches. If it exists, sequences it has seen are skipped: an interrupted run goes on where it was, and more
            text can be added. What it has gathered goes on too.
        progress: show a bar on stderr.

    Products are float32 at least, sums of moments float64. Memory beside the model: E^2 float64 a layer and what is
    gathered, twice that with a state, and for gradients the activations of one batch; nothing grows with the number of
    tokens.

    Raises: ValueError if there are no tokens, or more in a sequence than the model has positions, a layer sees numbers
    that are not finite, or the state is of another model, text or window, or lacks what is asked for; OSError if the
    state cannot be written.
    """
    check_batches(batches)
    _check_gathered(gather)
    window = Window.of(far)
    parts = attention_parts(model)
    held = _resume(model, parts, gather, window, state)
    window = Window(*held.far)  # what is held goes on growing in its own
    sums = _Sums(model, parts, held, apart=state is not None)
    if sums.differentiates and any(p.is_inference() for p in model.parameters()):
        raise ValueError("model: expected parameters that gradients can pass, got some made in torch.inference_mode()")
    run, device = model if sums.differentiates else decoder_of(model), next(model.parameters()).device
    saved, written = time.monotonic(), held.sequences
    with ExitStack() as stack, evaluating(model), torch.set_grad_enabled(sums.differentiates):
        for hook in sums.hooks():
            stack.callback(hook.remove)
        if sums.differentiates:
            stack.enter_context(substituted(model, sums.add_zeros, window, rotated=sums.rotated))
            stack.enter_context(frozen(model))
        shown = tqdm(batches, desc="calibrate", unit="batch", disable=not progress)
        try:
            for ids, live, text in _unseen(shown, held.sequences, held.text):
                grown = held
                for rows, own in _passes(ids, live, alone=bool(window) or sums.rotated):
                    grown = sums.grown(grown, run, rows.to(device), None if own is None else own.to(device), text)
                held = grown  # at once, so that whatever stops the run finds whole batches
                if state is not None and time.monotonic() - saved >= SAVE_EVERY:
                    held.save(state)
                    saved, written = time.monotonic(), held.sequences
        except BaseException:
            if state is not None and held.sequences > written:
                held.save(state)
            raise
    if not held.tokens:
        raise ValueError("batches: expected at least one token to calibrate on, got none")
    if sums.differentiates and not any(
        bool(x.any()) for name in GRADIENTS for x in held.sums.get(f"{name}.values", ())
    ):
        raise ValueError(unfelt(window, held.gathered))
    if state is not None:
        held.save(state)
    return held


def _check_gathered(gather: Collection[str]) -> None:
    """Raises ValueError for unknown names, and where gradients by rotated keys are asked for together with others."""
    expected = f"gather: expected names out of {sorted(GATHERED)}, got"
    if isinstance(gather, str) or not isinstance(gather, Collection):
        raise ValueError(f"{expected} {gather!r}")
    if unknown := [name for name in gather if name not in tuple(GATHERED)]:
        raise ValueError(f"{expected} {unknown}")
    asked = sorted(set(gather) & set(GRADIENTS))
    if "rotated-metric" in asked and len(asked) > 1:
        raise ValueError(f"gather: expected no other gradients beside 'rotated-metric', got {asked}")


def _passes(ids: Tensor, live: Tensor | None, *, alone: bool) -> list[tuple[Tensor, Tensor | None]]:
    """A batch in one pass of the model; or each sequence without its padding in one, where it has to be alone."""
    padded = live is not None and not bool(live.all())
    return [(row[None], None) for row in unpadded(ids, live)] if alone and padded else [(ids, live)]


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


def _unseen(batches: Iterable[Batch], seen: int, seen_text: str) -> Iterator[tuple[Tensor, Tensor | None, str]]:
    """Token ids, where they are live, and the digest of all text so far, of the sequences not yet seen."""
    text, passed = "", 0
    for batch in batches:
        ids, live = tokens_of(batch)
        for kept in unpadded(ids.cpu(), None if live is None else live.cpu()):
            text = hashlib.sha256(text.encode() + kept.numpy().tobytes()).hexdigest()
            passed += 1
            if passed == seen and text != seen_text:
                raise ValueError("state: expected batches to begin with the text it has seen, got another text")
        new = min(passed - seen, len(ids))
        if new > 0:
            yield ids[-new:], None if live is None else live[-new:], text
    if passed < seen:
        raise ValueError(f"state: expected batches to begin with the {seen} sequences it has seen, got {passed}")


class _Sums:
    """The sums of a batch while it passes the model, and the hooks that feed them.

    apart: `held` keeps its own, so that it is whole whatever happens; else they grow in its place.
    """

    def __init__(self, model: nn.Module, parts: list[AttentionParts], held: Moments, *, apart: bool) -> None:
        self.model, self.parts, self.gathered, self.apart = model, parts, held.gathered, apart
        self.differentiates = any(name in GRADIENTS for name in self.gathered)
        self.rotated = "rotated-metric" in self.gathered  # gradients are by rotated keys
        self.begin(held, None)

    def hooks(self) -> Iterator[Any]:
        for i, part in enumerate(self.parts):
            yield part.linear("k_proj").register_forward_pre_hook(self._watch_inputs(i))
            for side in "qk" if "rotated" in self.gathered else "":
                yield part.linear(f"{side}_proj").register_forward_hook(self._watch_rotated(i, side))

    def _watch_inputs(self, i: int) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.add("inputs", i, second_moment(args[0], self.live))
            rows = args[0].detach() if self.live is None else args[0].detach()[self.live]
            for name in {"magnitudes", "means"} & set(self.gathered):
                x = rows.abs() if name == "magnitudes" else rows
                self.add(name, i, x.flatten(0, -2).double().sum(0).cpu())

        return hook

    def _watch_rotated(self, i: int, side: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...], raw: Tensor) -> None:
            b, t = raw.shape[:2]
            live = self.live if self.live is not None else torch.ones(b, t, dtype=torch.bool, device=raw.device)
            part, at = self.parts[i], (live.cumsum(1) - 1).clamp_min(0)
            heads = part.turned(side, raw.detach().unflatten(-1, (-1, part.head_dim)), at)[live].double()
            if side == "k":
                keys = heads.flatten(1)
                self.add("rotated.keys", i, (keys.T @ keys).cpu())
                self.add("rotated.mean", i, keys.sum(0).cpu())
            else:
                groups = heads.unflatten(1, (part.num_kv_heads, -1)).permute(1, 0, 2, 3).flatten(1, 2)
                self.add("rotated.queries", i, (groups.mT @ groups).cpu())

        return hook

    def add_zeros(self, i: int, x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Zeros to differentiate by, added to a layer's keys and values: no parameter needs a gradient."""
        self.seen.append({"keys": k.detach() if self.rotated else x.detach(), "values": x.detach()})
        self.leaves += [torch.zeros_like(k, requires_grad=True), torch.zeros_like(v, requires_grad=True)]
        return k + self.leaves[-2], v + self.leaves[-1]

    def begin(self, held: Moments, live: Tensor | None) -> None:
        self.live = live
        self.sums = {name: list(xs) for name, xs in {"inputs": held.inputs, **held.sums}.items()}
        self.seen: list[dict[str, Tensor]] = []  # what each layer's keys and values are maps of, for gradients
        self.leaves: list[Tensor] = []  # of keys, values, keys, ...

    def add(self, name: str, i: int, x: Tensor) -> None:
        """To layer i's sum. Nothing else may hold x."""
        sums = self.sums[name]
        sums[i] = x.add_(sums[i]) if self.apart else sums[i].add_(x)

    def grown(self, held: Moments, run: nn.Module, ids: Tensor, live: Tensor | None, text: str) -> Moments:
        """`held` and one pass of the model more."""
        held = replace(held, sequences=held.sequences + len(ids), text=text)
        if not ids.numel():
            return held
        check_lengths(self.parts, [ids.shape[1]])
        self.begin(held, live)
        arguments = {} if live is None else {"attention_mask": live.long()}
        out = run(input_ids=ids, use_cache=False, **arguments)
        for part, total in zip(self.parts, self.sums["inputs"], strict=True):
            self._check_finite(f"inputs of {part.name}", total)
        if self.differentiates:
            self._differentiate(out.logits, ids)
        tokens = ids.numel() if live is None else int(live.sum())
        sums = {name: tuple(xs) for name, xs in self.sums.items()}
        return replace(held, inputs=sums.pop("inputs"), sums=sums, tokens=held.tokens + tokens)

    def _check_finite(self, what: str, total: Tensor) -> None:
        """Raises ValueError if they are not, with what is to blame."""
        if bool(total.isfinite().all()):
            return
        broken = next((name for name, p in self.model.named_parameters() if not bool(p.isfinite().all())), None)
        if broken is not None:
            look = f"the weight {broken} is not finite"
        elif next(self.model.parameters()).dtype in HALVES:
            look = "calibrate a model of a wider dtype"
        else:
            look = "all weights are finite: look at what the model's layers make of these tokens"
        raise ValueError(f"batches: expected finite {what}, got some that are not; {look}")

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
                self.add(f"fisher.{side}", i, (grad.T @ rows).square().cpu())
            else:
                rows, grad = rows.double(), grad.double()  # a sink outweighs a common token by more than float32 holds
                size = grad.norm(dim=1, keepdim=True)
                unit = grad[1:] / size[1:].clamp_min(torch.finfo(size.dtype).tiny)
                self.add(f"{name}.{side}", i, (grad[1:].T @ unit).cpu())
                self.add(f"{weighted}.{side}", i, ((rows * size).T @ rows).cpu())
        self._check_finite(f"gradients of the {side} of {self.parts[i].name}", self.sums[f"{name}.{side}"][i])


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
