"""A model and some text -> Factors: calibrate, cluster heads, share out the ranks, factor every layer."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from dataclasses import astuple, replace
from functools import partial
from itertools import chain, islice

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lrattn.compression.arguments import check_count, check_flag, check_share
from lrattn.compression.batches import (
    Batch,
    check_batches,
    check_lengths,
    least_felt,
    tokens_of,
    unfelt,
    unpadded,
)
from lrattn.compression.bits import Bits, ladder_of, share_held, spend
from lrattn.compression.calibrate import calibrate, fingerprint
from lrattn.compression.methods import DEFAULT, METHODS, Method, kq_svd
from lrattn.compression.methods.lorc import log_condition
from lrattn.compression.moments import GRADIENTS, Moments
from lrattn.compression.problem import FORMS, Form, Problem
from lrattn.compression.propagate import propagate
from lrattn.compression.ranks import (
    RULES,
    LayerShape,
    budget,
    condition,
    fisher,
    group_size_within,
    spectrum,
    uniform,
)
from lrattn.compression.refine import digest_of, parted
from lrattn.compression.refine import refine as distil
from lrattn.compression.substitute import Window
from lrattn.factors import safefile
from lrattn.factors.layer import LayerFactors
from lrattn.factors.record import Factors
from lrattn.models.layers import AttentionLayer, attention_layers, sample
from lrattn.models.ropes import ropes_of
from lrattn.models.weights import check_readable, linear

JOINT_WITHIN = 256  # latents a row may have for keys to be rebuilt from all of it: see docs/decisions.md
KEEP = 0.5  # where the caller names no bytes
LEVEL = 0.5  # of the budget of joint rows that is the same for every layer


@torch.inference_mode(False)  # the factors outlive the caller's mode
@torch.no_grad()
def compress(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    method: str = DEFAULT,
    keep: float | None = None,
    group_size: int = 4,
    *,
    ranks: str | None = None,
    shared: Form | None = None,
    far: tuple[int, int] | None = None,
    refine: int = 0,
    nested: bool = False,
    moments: Moments | None = None,
    state: str | os.PathLike[str] | None = None,
    shards: int = 1,
    bits: Bits = 16,
    bytes_per_token: int | None = None,
    progress: bool = True,
) -> Factors:
    """Factors of a model's keys and values; the model itself is not changed.

    Args:
        model: of transformers, whose attention goes through its AttentionInterface. "svd", "lorc", "asvd", "kq-svd" and
            ranks "fisher" read weights too, of models whose projections are Linear layers.
        batches: token ids [b, t], or mappings with input_ids and maybe attention_mask, to calibrate on. "svd" and
            "lorc" need none, but for ranks "fisher".
        method: one of lrattn.methods.METHODS.
        keep: bytes of the latent cache / bytes of the dense 16-bit cache, in (0, 1]. 1 is full rank: exact. None: 0.5,
            or what bytes_per_token say.
        group_size: kv heads per group; the largest divisor of Hkv / shards not above it is used. Some methods give
            each head, or the whole layer, a latent of its own whatever it says.
        ranks: what shares them out: "spectrum", "fisher" (as Palu and ReCalKV do; takes a backward pass), "uniform" or
            "condition" (as LoRC does). None: "condition" for "lorc", "spectrum" for the others.
        shared: the form of a row, for method "lrattn": False, keys and values apart; "ride", values also use the keys'
            latent; True, one latent for both, which loses least and takes the longest to rebuild keys from. None: True
            where a group's row has at most 256 latents, else "ride". Other methods keep them apart.
        far: (recent, sinks) of the dense window that the cache will hold: gradients are taken beyond it, see
            `calibrate`, and it is the factors' `near`. (0, 0) for a cache without one. None: that of the gradients in
            the moments, where some are given and used, else the method's own, (64, 4) for "lrattn".
        refine: steps of distillation that follow, see lrattn.refine, on the same batches. The first of every eight
            sequences, which judges them, is not calibrated on, unless moments are given.
        nested: distil all prefixes of the latents together, for lrattn.narrowed.
        moments: of an earlier `calibrate` of this model, which is then not repeated.
        state: a file for the calibration to go on from, see `calibrate`: other methods and shares on the same text use
            it again, if neither or both are distilled. A distillation goes on from a file beside it,
            <state>.<run>.refine, where <run> is a hash of the model, the text and all choices made here: each run finds
            its own. Nothing is deleted. You may delete a .refine file when the factors of its run are saved, and the
            state when no more factors are to be made on this text.
        shards: tensor-parallel ranks that the heads will be divided over; no group of keys lies across them.
        bits: of a latent: 16, plain numbers; 8, 4 or 2 for all; or, for the methods of lrattn's own, what each block of
            16 latents may be given, "auto" for all of these. One reverse water-filling then spends the bytes
            (lrattn/compression/bits.py).
        bytes_per_token: of the latent cache, scales and padding included: instead of `keep`.
        progress: show bars on stderr.

    Returns: Factors in the model's dtype, on its device.
    Raises: ValueError naming the argument, what was expected and what came; OSError if a state cannot be written.
    """
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"method: expected one of {sorted(METHODS)}, got {method!r}")
    recipe = METHODS[method]
    ranks = recipe.ranks if ranks is None else ranks
    if ranks not in (rules := [rule for rule in RULES if recipe.ruled_by(rule)]):
        raise ValueError(f"ranks: expected one of {rules} with method {method!r}, got {ranks!r}")
    forms = FORMS if recipe.shares else (False,)
    if shared is not None and (not isinstance(shared, bool | str) or shared not in forms):  # 1 == True is not a form
        expected = f"None or one of {FORMS}" if recipe.shares else f"None or False with method {method!r}"
        raise ValueError(f"shared: expected {expected}, got {shared!r}")
    for name, count, least in (("group_size", group_size, 1), ("shards", shards, 1), ("refine", refine, 0)):
        check_count(name, count, least)
    check_flag("nested", nested)
    if moments is not None and not isinstance(moments, Moments):
        raise ValueError(f"moments: expected those of calibrate, got {type(moments).__name__}")
    gather = recipe.gathered(ranks)
    differentiates = bool(gather & set(GRADIENTS))
    if far is None:
        far = moments.far if moments is not None and differentiates else recipe.near
    window = Window.of(far)
    far = astuple(window)
    ladder, in_nats = ladder_of(bits), recipe.in_nats and ranks == "spectrum"
    if len(ladder) > 1 and not in_nats:
        raise ValueError(f"bits: expected one number with method {method!r} and ranks {ranks!r}, got {bits!r}")
    layers = attention_layers(model)
    if bytes_per_token is not None:
        if keep is not None:
            raise ValueError(f"bytes_per_token: expected None beside keep={keep}, got {bytes_per_token!r}")
        dense = sum(4 * layer.dense for layer in layers)
        check_count("bytes_per_token", bytes_per_token, 1, dense)
        keep = bytes_per_token / dense
    keep = KEEP if keep is None else keep
    check_share(keep)
    held, by_bits = share_held(keep, ladder), in_nats and ladder != (16,)
    shapes = [replace(_shape(layer, recipe, group_size, shards), bits=ladder[0]) for layer in layers]
    form = _form(shapes, held) if shared is None and recipe.shares else shared or False
    parts = 2 if by_bits and form == "ride" else 1  # of a row that have bits apart
    shapes = [replace(shape, shared=bool(form), parts=parts) for shape in shapes]
    try:
        budget(shapes, keep)  # refused before any work
    except ValueError as error:
        if bytes_per_token is None:
            raise
        raise ValueError(f"bytes_per_token: expected more, got {bytes_per_token} ({error})") from error
    _check_finite(layers)
    ropes = [None] * len(layers) if recipe.rotated else ropes_of(model, layers)
    if recipe.reads_weights or ranks in ("fisher", "condition"):
        check_readable(model, layers, ropes_of(model, layers) if recipe.rotated else ropes)
    if recipe.measure is kq_svd.measure:
        for layer in layers:
            linear(layer, "o_proj")
    if refine and batches is None:
        raise ValueError(f"refine: expected 0 without batches, got {refine}")
    if refine and ladder != (16,):
        raise ValueError(f"refine: expected 0 with bits={bits!r}: packed latents are not trained, got {refine}")
    if nested and not refine:
        raise ValueError(f"nested: expected False without refine=, got {nested}")
    if isinstance(batches, Moments):
        raise ValueError("batches: expected token batches, got Moments, which are given as moments=")
    calibrates = moments is None and batches is not None and bool(gather)
    given = () if batches is None else batches
    check_batches(given)
    given = list(given)
    judges, texts = parted(given) if refine else ([], [x for batch in given for x in unpadded(*tokens_of(batch))])
    lessons = [ids[None] for ids in texts] if refine else given
    check_lengths(model, map(len, (*judges, *texts)))
    if calibrates and differentiates and max(map(len, texts), default=0) < least_felt(window, gather):
        raise ValueError(unfelt(window, gather))
    beside = None
    if state is not None:
        if not calibrates and not refine:
            raise ValueError(f"state: expected None where nothing is calibrated or distilled, got {state}")
        safefile.check_target("state", state)
        if refine:
            choices = method, keep, group_size, ranks, shared, far, shards, ladder, refine, nested
            known = fingerprint(model), digest_of(judges, texts), "" if moments is None else moments.text
            run = hashlib.sha256(repr((*known, *choices)).encode()).hexdigest()[:8]
            beside = f"{os.fspath(state)}.{run}.refine"
            safefile.check_target("state", beside)
    if calibrates:
        moments = calibrate(model, lessons, gather=gather, far=far, state=state, progress=progress)
    elif moments is None and recipe.needs_data:
        raise ValueError(f"batches: method {method!r} needs calibration batches, got None")
    elif recipe.refit is not None and not any(map(len, texts)):
        raise ValueError(f"batches: method {method!r} runs the compressed model on batches, got no tokens")
    else:
        _check_moments(moments, model, layers, gather, far if differentiates else None)
    moments = Moments() if moments is None else moments

    shown = partial(tqdm, unit="layer", disable=not progress)
    problems = [
        Problem(layer, shape, recipe, form, moments, i, rope, shards)
        for i, (layer, shape, rope) in enumerate(zip(layers, shapes, ropes, strict=True))
    ]
    chosen = None
    if ranks == "uniform":
        chosen = uniform(shapes, keep)
    elif ranks == "condition":
        chosen = condition(shapes, keep, [log_condition(layer) for layer in layers])
    elif ranks == "fisher":
        chosen = fisher(shapes, keep, moments.fisher or [])
    for i, problem in enumerate(shown(problems, desc="group heads")):
        side = 1 if form else 0
        per_group = [int(held * problem.shape.full_ranks[side])] if chosen is None else chosen[i][side]
        problem.group(sum(per_group) // len(per_group))
    if by_bits:
        rows = [problem.bit_rows(held) for problem in shown(problems, desc="spectra")]
        spent = iter(spend(list(chain(*rows)), int(keep * sum(2 * shape.dense for shape in shapes) + 1e-6), ladder))
        pairs = zip(shown(problems, desc="factor"), rows, strict=True)
        made = [problem.spent(list(islice(spent, len(own)))) for problem, own in pairs]
    else:
        if chosen is None:
            found = [problem.energies() for problem in shown(problems, desc="spectra")]
            chosen = spectrum(shapes, keep, found, in_nats=in_nats, level=LEVEL if form is True else 0.0)
        pairs = zip(shown(problems, desc="factor"), chosen, strict=True)
        made = [problem.factor(pair, None) for problem, pair in pairs]
        if recipe.refit is not None and lessons:
            with shown(total=len(layers), desc="refit") as bar:

                def refitted(i: int, moment: Tensor) -> LayerFactors:
                    made[i] = problems[i].factor(chosen[i], moment)
                    bar.update()
                    return made[i]

                propagate(model, layers, lessons, refitted)
    samples = [x for layer in layers if (x := sample(layer.module)) is not None]
    factors = Factors(
        layers=tuple(made),
        method=method,
        model=str(getattr(model.config, "_name_or_path", "")),
        rule=ranks,
        predicted=tuple(problem.lost for problem in problems) if recipe.in_nats else (),
        near=far,
        samples=tuple(samples) if len(samples) == len(layers) else (),
    )
    if not refine:
        return factors
    return distil(model, factors, given, steps=refine, nested=nested, state=beside, progress=progress)


def _shape(layer: AttentionLayer, recipe: Method, group_size: int, shards: int) -> LayerShape:
    """With keys and values apart."""
    heads = layer.num_kv_heads
    if heads % shards and shards % heads:
        raise ValueError(f"shards: expected a divisor or a multiple of Hkv={heads}, got {shards}")
    within = max(heads // shards, 1)
    sizes = {"given": group_size_within(within, group_size), "head": 1, "layer": within}
    keys, values = (sizes[size] for size in recipe.groups)
    return LayerShape(heads, layer.head_dim, keys, values, whole_values=recipe.whole_values)


def _form(shapes: list[LayerShape], held: float) -> Form:
    """The form that loses least among those whose keys are rebuilt in time, with this share of the latents."""
    rows = sum(shape.groups[1] for shape in shapes)
    return True if held * sum(shape.dense for shape in shapes) / rows <= JOINT_WITHIN else "ride"


def _check_finite(layers: list[AttentionLayer]) -> None:
    """Raises ValueError if a weight of the model's attention is not."""
    for layer in layers:
        for name, x in layer.module.named_parameters():
            if x.is_floating_point() and not x.is_meta and not bool(x.isfinite().all()):
                raise ValueError(f"model: expected a finite {layer.name}.{name}, got one that is not")


def _check_moments(
    moments: Moments | None,
    model: nn.Module,
    layers: list[AttentionLayer],
    gather: set[str],
    far: tuple[int, ...] | None,
) -> None:
    """Raises ValueError for others than this model's, with all of these; far: None where no gradients are."""
    if missing := sorted(gather - set(() if moments is None else moments.gathered)):
        got = "none" if moments is None else f"moments with {list(moments.gathered)}"
        raise ValueError(f"moments: expected batches, or moments of calibrate(gather={missing}), got {got}")
    if moments is None:
        return
    if far is not None and moments.far != far:
        raise ValueError(f"moments: expected gradients beyond a window far={far}, got {moments.far}")
    if moments.layers != len(layers):
        raise ValueError(f"moments: expected those of {len(layers)} layers, got {moments.layers}")
    if moments.model not in ("", fingerprint(model)):
        raise ValueError("moments: expected those of this model, got another model's")
