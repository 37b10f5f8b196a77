"""Model and token batches -> Moments: what the keys and values of each layer look like, and what its loss feels.

Everything is read where attention is called: no projection, norm or mask of the model is known here.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import astuple
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lrattn.compression.arguments import check_count
from lrattn.compression.batches import Batch, check_batches, least_felt, tokens_of, unfelt, unpadded
from lrattn.compression.moments import GATHERED, GRADIENTS, SYMMETRIC, WEIGHTS, Moments
from lrattn.compression.substitute import Window, substituted
from lrattn.compression.sums import Sums
from lrattn.factors import safefile
from lrattn.models.interface import decoder_of, device_of
from lrattn.models.layers import AttentionLayer, attention_layers, runs_of
from lrattn.models.states import evaluating, frozen
from lrattn.models.weights import linear

SAVE_EVERY = 60.0  # seconds between two writes of the state


@torch.inference_mode(False)
def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    gather: Collection[str] = ("before",),
    far: tuple[int, int] = (0, 0),
    state: str | os.PathLike[str] | None = None,
    span: int = 1,
    progress: bool = True,
) -> Moments:
    """Runs the model once over token batches and streams the moments of every layer.

    Args:
        batches: token ids [b, t], or mappings with input_ids and maybe attention_mask.
        gather: names of moments.GATHERED to sum: "before", keys before their rotation, which has to be one that the
            model's config tells; "rotated", keys as attention is given them; or more. "fisher" and the metrics take a
            backward pass for every batch: the loss is summed over the tokens of a sequence, however the batches are
            cut. Labels are the next tokens for "fisher", as published, and for a metric tokens drawn from the model's
            own predictions: then the mean of g g^T is the second derivative of its divergence from itself.
            "rotated-metric" takes its gradients by rotated keys, and is gathered without the other two. "fisher" and
            "magnitudes" read what k_proj reads, of models where that is a Linear layer.
        far: (recent, sinks): gradients pass only through attention to tokens that a cache with that window would not
            hold dense for the query: for factors of the default window, that of METHODS["lrattn"].near.
        state: a file that is written every minute, at the end, and when Ctrl-C or an error stops the run: of whole
            batches. If it exists, sequences it has seen are skipped: an interrupted run goes on where it was, and more
            text can be added. What it has gathered goes on too.
        span: neighbouring layers whose heads are summed side by side, for rows that they share: of what they hold
            together, span^2 times a layer's sums. Not with "fisher", "magnitudes" or what is rotated.
        progress: show a bar on stderr.

    Products are float32 at least, sums float64. Memory beside the model: what is gathered, twice that with a state, and
    for gradients the activations of one batch; nothing grows with the number of tokens. The model may lie on several
    devices, or be offloaded.

    Raises: ValueError if there are no tokens, or more in a sequence than the model has positions, the model's attention
    does not go through transformers' AttentionInterface, a layer sees numbers that are not finite, or the state is of
    another model, text or window, or lacks what is asked for; OSError if the state cannot be written.
    """
    check_batches(batches)
    _check_gathered(gather)
    check_count("span", span, 1)
    if span > 1 and (odd := sorted(set(gather) - {"before", "metric"})):
        raise ValueError(f"gather: expected 'before' and 'metric' with span={span}, got {odd}")
    window = Window.of(far)
    layers = attention_layers(model)
    held = _resume(model, runs_of(layers, span), gather, window, span, state)
    window = Window(*held.far)  # what is held goes on growing in its own
    sums = Sums(model, layers, held, apart=state is not None)
    if sums.differentiates and any(p.is_inference() for p in model.parameters()):
        raise ValueError("model: expected parameters that gradients can pass, got some made in torch.inference_mode()")
    run, device = model if sums.differentiates else decoder_of(model), device_of(model)
    saved, written = time.monotonic(), held.sequences
    with ExitStack() as stack, evaluating(model), torch.set_grad_enabled(sums.differentiates):
        for hook in sums.hooks():
            stack.callback(hook.remove)
        stack.enter_context(substituted(model, layers, sums.take, window if sums.differentiates else Window()))
        if sums.differentiates:
            stack.enter_context(frozen(model))
        shown = tqdm(batches, desc="calibrate", unit="batch", disable=not progress)
        try:
            for ids, live, text in _unseen(shown, held.sequences, held.text):
                held = sums.grown(held, run, ids.to(device), None if live is None else live.to(device), text)
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
        if held.longest < least_felt(window, held.gathered):
            raise ValueError(unfelt(window, held.gathered))
        kind = layers[0].dtype
        raise ValueError(
            f"model: expected gradients of attention, got none that {kind} holds: give it in another dtype"
        )
    if state is not None:
        held.save(state)
    return held


def _check_gathered(gather: Collection[str]) -> None:
    """Raises ValueError for unknown names, and where gradients by rotated keys are asked for together with others."""
    expected = f"gather: expected names out of {sorted(GATHERED)}, got"
    if isinstance(gather, str) or not isinstance(gather, Collection) or not gather:
        raise ValueError(f"{expected} {gather!r}")
    if unknown := [name for name in gather if name not in tuple(GATHERED)]:
        raise ValueError(f"{expected} {unknown}")
    asked = sorted(set(gather) & set(GRADIENTS))
    if "rotated-metric" in asked and len(asked) > 1:
        raise ValueError(f"gather: expected no other gradients beside 'rotated-metric', got {asked}")


def fingerprint(model: nn.Module) -> str:
    """sha256 of up to 64 numbers of every parameter, of offloaded ones of the name alone: tells models of one
    architecture apart."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            digest.update(name.encode())
            continue
        numbers = parameter.detach().reshape(-1)
        digest.update(numbers[:: max(len(numbers) // 64, 1)].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _resume(
    model: nn.Module,
    layers: list[AttentionLayer],
    gather: Collection[str],
    window: Window,
    span: int,
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
        if held.span != span:
            raise ValueError(
                f"state: expected sums over runs of {span} layers in {state}, as span={span} needs, got {held.span}"
            )
        if wanted and held.far != far:
            raise ValueError(f"state: expected gradients beyond a window (recent, sinks) of {far}, got {held.far}")
        return held
    zeros: dict[str, list[Tensor]] = {}
    for layer in layers:
        for name, shape in _shapes(layer, gather).items():
            kind = torch.float32 if name.startswith("fisher") else torch.float64
            zeros.setdefault(name, []).append(torch.zeros(shape, dtype=kind))
    return Moments({name: tuple(xs) for name, xs in zeros.items()}, far=far, model=own, span=span)


def _shapes(layer: AttentionLayer, gather: Collection[str]) -> dict[str, tuple[int, ...]]:
    n, heads, head_dim = layer.dense, layer.num_kv_heads, layer.head_dim
    sides = {"before": 2 * n + 1, "weighted": 2 * n + 1, "rotated": n + 1, "rotated-weighted": n + 1}
    sides |= {"metric": n, "rotated-metric": n}
    exact: dict[str, tuple[int, ...]] = {"rotated.queries": (heads, head_dim, head_dim)}
    if set(gather) & set(WEIGHTS):
        inputs = linear(layer, "k_proj").in_features
        exact |= {"fisher.keys": (n, inputs), "fisher.values": (n, inputs), "magnitudes": (inputs,)}
    names = [name for group in GATHERED if group in gather for name in GATHERED[group]]
    triangles = {name: (m * (m + 1) // 2,) for name in SYMMETRIC for m in (sides[name.split(".")[0]],)}
    return {name: (triangles | exact)[name] for name in names}


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


def check_moments(
    moments: Moments | None,
    model: nn.Module,
    layers: list[AttentionLayer],
    gather: set[str],
    far: tuple[int, ...] | None,
    span: int = 1,
) -> None:
    """Raises ValueError for others than this model's, with all of these; layers: its runs; far: None where no gradients
    are."""
    if missing := sorted(gather - set(() if moments is None else moments.gathered)):
        got = "none" if moments is None else f"moments with {list(moments.gathered)}"
        raise ValueError(f"moments: expected batches, or moments of calibrate(gather={missing}), got {got}")
    if moments is None:
        return
    if far is not None and moments.far != far:
        raise ValueError(f"moments: expected gradients beyond a window far={far}, got {moments.far}")
    if moments.span != span:
        raise ValueError(f"moments: expected those of calibrate(span={span}), got span={moments.span}")
    if moments.layers != len(layers):
        raise ValueError(f"moments: expected those of {len(layers)} layers, got {moments.layers}")
    if moments.model not in ("", fingerprint(model)):
        raise ValueError("moments: expected those of this model, got another model's")
