"""A model and some text -> Factors: calibrate, cluster heads, share out the ranks, factor every layer."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import astuple, replace
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lrattn.compression.arguments import check_count, check_flag, check_share
from lrattn.compression.batches import Batch, check_batches, check_lengths, least_felt, tokens_of, unfelt, unpadded
from lrattn.compression.bits import Bits, check_least, ladder_of, share_held, share_out
from lrattn.compression.calibrate import calibrate, check_moments, fingerprint
from lrattn.compression.methods import DEFAULT, METHODS, kq_svd
from lrattn.compression.methods.lorc import log_condition
from lrattn.compression.methods.rows import Form
from lrattn.compression.moments import GRADIENTS, Moments
from lrattn.compression.problem import Problem
from lrattn.compression.propagate import propagate
from lrattn.compression.ranks import budget, condition, fisher, spectrum, uniform
from lrattn.compression.recipe import (
    SMALL_SPAN,
    alike,
    check_alone,
    form_of,
    is_small,
    recipe_of,
    shape_of,
    stored_as,
)
from lrattn.compression.refine import digest_of, parted
from lrattn.compression.refine import refine as distil
from lrattn.compression.residual import residual
from lrattn.compression.runs import divided, run_ropes
from lrattn.compression.substitute import Window
from lrattn.compression.whole import whole
from lrattn.factors import safefile
from lrattn.factors.layer import LayerFactors
from lrattn.factors.record import Factors
from lrattn.factors.selection import Selection
from lrattn.models.interface import name_of
from lrattn.models.layers import attention_layers, runs_of, samples_of
from lrattn.models.ropes import ropes_of
from lrattn.models.weights import check_finite, check_readable, linear
from lrattn.selection import selection_of, shares

KEEP, PLAIN = 0.125, 0.5  # where the caller names no bytes, of packed latents and of plain ones
EVERY = 512  # tokens after which salient ones are looked for again
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
    bits: Bits | None = None,
    chunk: int | None = None,
    positions: int | None = None,
    bytes_per_token: int | None = None,
    span: int | None = None,
    select: Selection | str | None = None,
    salient: float | None = None,
    progress: bool = True,
) -> Factors:
    """Factors of a model's keys and values; the model itself is not changed.

    Args:
        model: of transformers, whose attention goes through its AttentionInterface. "svd", "lorc", "asvd", "kq-svd" and
            ranks "fisher" read weights too, of models whose projections are Linear layers.
        batches: token ids [b, t], or mappings with input_ids and maybe attention_mask, to calibrate on: of sequences as
            long as the contexts to be read, more of what is far back is kept. Some methods need none.
        method: one of lrattn.methods.METHODS. "lrattn", the default, stores keys turned to their place in a chunk of
            positions: queries meet latents. "lrattn-rebuilt" is smaller yet: keys before their rotation, rebuilt.
        keep: bytes of the latent cache / bytes of the dense 16-bit cache, in (0, 1]. 1 is full rank, and exact at 16
            bits. None: what bytes_per_token say, or 0.125; 0.5 where `bits` are 16 or cannot be "auto". Below 0.05, as
            1/32, "lrattn" takes span=8, which still reads far there (docs/methods.md), where all layers are alike and
            nothing is given of how rows or ranks are made.
        group_size: kv heads per group; the largest divisor of Hkv / shards not above it is used. Some methods give
            each head, or the whole layer, a latent of its own whatever it says.
        ranks: what shares them out: "spectrum", "fisher" (as Palu does), "uniform" or "condition"; None: the method's.
        shared: the form of a row, for "lrattn" and "lrattn-rebuilt": False, keys and values apart; True, one latent for
            both, which loses least at equal bytes, and of which both read all; "ride", of keys that are rebuilt: values
            also use the keys' latent. None: False for "lrattn"; for "lrattn-rebuilt" True where a group's row has at
            most 256 latents, else "ride". Other methods keep them apart.
        far: (recent, sinks) of the dense window that the cache will hold: gradients are taken beyond it, see
            `calibrate`, and it is the factors' `near`. (0, 0) for a cache without one. None: that of the gradients in
            the moments, where some are given and used, else the method's own, (64, 4) for lrattn's.
        refine: steps of distillation that follow, see lrattn.refine, on the same batches. The first of every eight
            sequences, which judges them, is not calibrated on, unless moments are given.
        nested: distil all prefixes of the latents together, for lrattn.narrowed.
        moments: of an earlier `calibrate` of this model, which is then not repeated.
        state: a file for the calibration to go on from, see `calibrate`: other methods and shares on the same text use
            it again, of one span and if neither or both are distilled. A distillation goes on from a file beside it,
            <state>.<run>.refine, where <run> is a hash of the model, the text and all choices made here: each run finds
            its own. Nothing is deleted. You may delete a .refine file when the factors of its run are saved, and the
            state when no more factors are to be made on this text.
        shards: tensor-parallel ranks that the heads will be divided over; no group of keys lies across them.
        bits: of a latent: 16, plain numbers; 8, 4 or 2 for all; or, for lrattn's own methods and ranks "spectrum",
            several to choose from, or "auto": 8, 4 and 2. The bytes then go where they save most, over all layers, keys
            and values, in segments of multiples of 16, 32 and 64 latents at 8, 4 and 2 bits, of twice as many in rows
            of 512 or more (lrattn/compression/bits.py). None: "auto" where it can be, for a keep below 0.5 without
            `nested`; else 16.
        chunk: positions in a chunk, for "lrattn": a multiple of 64, None for 512. Shorter ones lose less, and queries
            are absorbed for each. Layers without a rotation have none.
        positions: for "lrattn-rotated" and other methods of rotated keys: factors are made for positions 0 ..
            positions - 1, by averages over rotations, which the model's config has to tell. None: as published, from
            the positions of the calibration; they are wrong beyond its longest sequence.
        bytes_per_token: of the latent cache, scales and padding included: instead of `keep`.
        span: neighbouring layers that share one row of keys and values of all, for "lrattn" and "lrattn-rebuilt": fewer
            bytes for the same loss, and all of them are read by each of the layers. None: 1, of "commonkv" 4.
        select: which tokens a cache of them keeps, a lrattn.Selection or its words; None: all. Methods that
            are a policy take `keep` as the share of the tokens, "kvsharer" of the layers, and no other choice.
        salient: share of the tokens, below one half, that a cache of them holds with twice the bytes, the others with
            the fewer, once it has read a prompt, and again every 512 tokens: by what the last queries give them, as
            "zipcache" says. Not with `select`, `refine` or `bytes_per_token`. None: all have as many.
        progress: show bars on stderr.

    Returns: Factors in the model's dtype, on its device; where they are not refined, with what they lose of batches
        that are given (lrattn.residual).
    Raises: ValueError naming the argument, what was expected and what came; OSError if a state cannot be written.
    """
    select = selection_of(select)
    if isinstance(method, str) and method in METHODS and METHODS[method].exact:
        others: dict[str, Any] = {"ranks": ranks, "shared": shared, "far": far, "moments": moments, "state": state}
        others |= {"chunk": chunk, "positions": positions, "select": select, "bytes_per_token": bytes_per_token}
        others |= {"refine": refine or None, "nested": nested or None, "bits": None if bits == 16 else bits}
        return whole(model, batches, method, keep, others | {"span": span, "salient": salient}, progress)
    said = ranks, shared, far, moments, bits, chunk, positions, span, bytes_per_token, refine or None, nested or None
    if method == DEFAULT and is_small(keep) and all(x is None for x in said) and alike(model):
        span = SMALL_SPAN
    recipe, ranks, chunk, span = recipe_of(method, ranks, shared, chunk, positions, span)
    if salient is not None:
        check_alone(salient, {"select": select, "refine": refine or None, "bytes_per_token": bytes_per_token})
        choice: dict[str, Any] = {"ranks": ranks, "shared": shared, "far": far, "moments": moments, "chunk": chunk}
        choice |= {"shards": shards, "positions": positions, "span": span, "nested": nested, "progress": progress}
        if bits is None and recipe.in_nats and ranks == "spectrum" and (keep is None or keep < PLAIN):
            bits = "auto"
        calibrates = moments is None and batches is not None and bool(recipe.gathered(ranks))
        make = partial(compress, model, method=method, group_size=group_size, bits=bits, **choice)
        return _tiered(make, batches, salient, KEEP if keep is None else keep, state, calibrates)
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
    layers = attention_layers(model)
    runs = runs_of(layers, span)
    if span > 1 and (refine or ranks in ("fisher", "condition")):
        raise ValueError(f"span: expected 1 with refine= or ranks {ranks!r}, got {span}")
    if select is not None:
        shares(select, len(runs))
    if bytes_per_token is not None:
        if keep is not None:
            raise ValueError(f"bytes_per_token: expected None beside keep={keep}, got {bytes_per_token!r}")
        dense = sum(4 * layer.dense for layer in layers)
        check_count("bytes_per_token", bytes_per_token, 1, dense)
        keep = bytes_per_token / dense
    in_nats = recipe.in_nats and ranks == "spectrum"
    ladder = None if bits is None else ladder_of(bits)
    packs = in_nats and not nested if ladder is None else in_nats and ladder != (16,)
    keep = (KEEP if packs else PLAIN) if keep is None else keep
    check_share(keep)
    if ladder is None:
        bits = "auto" if packs and keep < PLAIN else 16
        ladder = ladder_of(bits)
    if len(ladder) > 1 and not in_nats:
        raise ValueError(f"bits: expected one number with method {method!r} and ranks {ranks!r}, got {bits!r}")
    held, by_bits = share_held(keep, ladder), in_nats and ladder != (16,)
    shapes = [replace(shape_of(run, recipe, group_size, shards), bits=ladder[0]) for run in runs]
    form = form_of(shapes, held) if shared is None and "ride" in recipe.forms and span == 1 else shared or span > 1
    parts = 2 if by_bits and form == "ride" else 1  # of a row that have bits apart
    shapes = [replace(shape, shared=bool(form), parts=parts) for shape in shapes]
    nbytes = int(keep * sum(2 * shape.dense for shape in shapes) + 1e-6)
    try:  # refused before any work
        if by_bits:
            check_least(shapes, keep, nbytes, ladder)
        else:
            budget(shapes, keep)
    except ValueError as error:
        if bytes_per_token is None:
            raise
        raise ValueError(f"bytes_per_token: expected more, got {bytes_per_token} ({error})") from error
    check_finite(layers)
    reads = recipe.reads_weights or ranks in ("fisher", "condition")
    asked = reads or not recipe.rotated or positions is not None
    ropes = ropes_of(model, layers) if asked else [None] * len(layers)
    if reads:
        check_readable(model, layers, ropes)
    ropes = run_ropes(ropes, span)
    if recipe.measure is kq_svd.measure:
        for layer in layers:
            linear(layer, "o_proj")
    if refine and batches is None:
        raise ValueError(f"refine: expected 0 without batches, got {refine}")
    if nested and not refine:
        raise ValueError(f"nested: expected False without refine=, got {nested}")
    if nested and ladder != (16,):
        raise ValueError(f"nested: expected False with bits={bits!r}: prefixes are of plain latents, got {nested}")
    if isinstance(batches, Moments):
        raise ValueError("batches: expected token batches, got Moments, which are given as moments=")
    calibrates = moments is None and batches is not None and bool(gather)
    given = () if batches is None else batches
    check_batches(given)
    given = list(given)
    judges, texts = parted(given) if refine else ([], [x for batch in given for x in unpadded(*tokens_of(batch))])
    lessons = [ids[None] for ids in texts] if refine else given
    check_lengths(model, map(len, (*judges, *texts)))
    longest = max(map(len, texts), default=0) if moments is None else moments.longest
    if positions is not None and not 0 < longest <= positions:
        enough = f"as many as the calibration's longest sequence, {longest}, or more"
        told = enough if longest else "None, the moments do not know their longest sequence"
        raise ValueError(f"positions: expected {told}, got {positions}")
    if calibrates and differentiates and max(map(len, texts), default=0) < least_felt(window, gather):
        raise ValueError(unfelt(window, gather))
    beside = None
    if state is not None:
        if not calibrates and not refine:
            raise ValueError(f"state: expected None where nothing is calibrated or distilled, got {state}")
        safefile.check_target("state", state)
        if refine:
            choices = method, keep, group_size, ranks, shared, far, shards, ladder, refine, nested, chunk, positions
            known = fingerprint(model), digest_of(judges, texts), "" if moments is None else moments.text
            run = hashlib.sha256(repr((*known, *choices)).encode()).hexdigest()[:8]
            beside = f"{os.fspath(state)}.{run}.refine"
            safefile.check_target("state", beside)
    if calibrates:
        how: dict[str, Any] = {"gather": gather, "far": far, "span": span, "state": state, "progress": progress}
        moments = calibrate(model, lessons, **how)
    elif moments is None and recipe.needs_data:
        raise ValueError(f"batches: method {method!r} needs calibration batches, got None")
    elif recipe.refit is not None and not any(map(len, texts)):
        raise ValueError(f"batches: method {method!r} runs the compressed model on batches, got no tokens")
    else:
        check_moments(moments, model, runs, gather, far if differentiates else None, span)
    moments = Moments() if moments is None else moments

    shown = partial(tqdm, unit="layer", disable=not progress)
    problems = [
        Problem(
            run, shape, recipe, form, moments, i, shards=shards, **stored_as(recipe, rope, chunk, positions, longest)
        )
        for i, (run, shape, rope) in enumerate(zip(runs, shapes, ropes, strict=True))
    ]
    chosen = None
    if ranks == "uniform":
        chosen = uniform(shapes, keep)
    elif ranks == "condition":
        chosen = condition(shapes, keep, [log_condition(run) for run in runs])
    elif ranks == "fisher":
        chosen = fisher(shapes, keep, moments.fisher or [])
    for i, problem in enumerate(shown(problems, desc="group heads")):
        side = 1 if form else 0
        per_group = [int(held * problem.shape.full_ranks[side])] if chosen is None else chosen[i][side]
        problem.group(sum(per_group) // len(per_group))
    if by_bits:
        rows = [problem.bit_rows(held) for problem in shown(problems, desc="spectra")]
        spent = iter(share_out(list(chain(*rows)), nbytes, ladder))
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
    lost = [problem.lost / len(run.members) for problem, run in zip(problems, runs, strict=True)]
    factors = Factors(
        layers=tuple(divided(made, runs)),
        method=method,
        model=name_of(model),
        rule=ranks,
        predicted=tuple(lost[i // span] for i in range(len(layers))) if recipe.in_nats else (),
        near=far,
        samples=samples_of(layers),
        select=select,
        span=span,
    )
    if refine:
        return distil(model, factors, given, steps=refine, nested=nested, state=beside, progress=progress)
    return replace(factors, residual=residual(model, factors, given)) if any(map(len, texts)) else factors


def _tiered(
    make: Callable[..., Factors],
    batches: Iterable[Batch] | None,
    share: float,
    keep: float,
    state: str | os.PathLike[str] | None,
    calibrates: bool,
) -> Factors:
    """Factors of twice the bytes for a share of the tokens, and of fewer for the others, by one calibration: its state
    is the second one's, in a file of its own where none is named. Those of fewer bytes come first: they may be too few.
    """
    check_share(keep)
    more = min(2 * keep, 1.0)
    fewer = (keep - share * more) / (1 - share)
    if isinstance(batches, Iterable) and not isinstance(batches, str):
        batches = list(batches)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "moments") if calibrates and state is None else state
        try:
            rest = make(batches=batches, keep=fewer, state=path)
        except ValueError as error:
            if not str(error).startswith("keep:"):
                raise
            raise ValueError(f"salient: expected a share that leaves more for the others than {error}") from error
        found = make(batches=batches, keep=more, state=path)
    return replace(found, select=Selection("zipcache", float(share), every=EVERY), rest=rest)
