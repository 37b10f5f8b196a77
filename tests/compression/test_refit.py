"""A text through a model on factors, layer by layer: what reaches each, what is fitted to it, what errors leave."""

import sys
import threading

import architectures
import pytest
import tiny
import torch
from given import eager, served, watching
from heads import rebuilt
from latents import random_factors
from test_calibrate import near

import lrattn
from lrattn.compression import methods
from lrattn.compression.propagate import propagate
from lrattn.models.layers import attention_layers
from lrattn.models.ropes import ropes_of

NAMES = served(("Llama, yarn", "Gemma-2", "Gemma-3n", "GPT-2", "Phi-3"))


def compressed(model, *args, **kwargs):
    return lrattn.compress(model, *args, **{"far": (0, 0), "progress": False} | kwargs)


def with_one(rows):
    return torch.cat((rows, rows.new_ones(len(rows), 1)), 1)


@torch.no_grad()
def reached(model, factors, texts):
    """Values of every layer [tokens, n] by transformers' own attention, one text after the other: those before a layer
    run on factors."""
    modules, made = [layer.module for layer in attention_layers(model)], []
    found = [[] for _ in modules]

    def low_rank(module, q, k, v, mask):
        if module not in modules:  # attends on the keys of another
            return next(pair for pair in reversed(made) if pair[0] is k or pair[2] is k)[:2]
        i = modules.index(module)
        found[i].append(v[0].transpose(0, 1).flatten(1).double())
        new = [x.transpose(1, 2) for x in rebuilt(factors[i], k.transpose(1, 2), v.transpose(1, 2))]
        made.append((*new, k))
        return new

    with watching(model, low_rank):
        for ids in texts:
            model(input_ids=ids[None], use_cache=False)
    return [torch.cat(rows) for rows in found]


@pytest.mark.parametrize("name", NAMES)
def test_each_layer_is_reached_by_what_those_before_it_run_on(name):
    model, calls = eager(name, torch.float64), []
    layers = attention_layers(model)
    factors = random_factors(model, 0.5, ropes=ropes_of(model, layers)).layers
    ids = architectures.tokens(3, 30)
    sides = [architectures.padded((30, 17, 5), side) for side in ("left", "right")]
    batches = [ids[:2], *(dict(zip(("input_ids", "attention_mask"), x, strict=True)) for x in sides), ids[2:]]
    texts = [*ids, *(row[kept.bool()] for side in sides for row, kept in zip(*side, strict=True))]

    def factor(i, moment):
        calls.append((i, moment.clone()))
        return factors[i]

    propagate(model, layers, batches, factor)
    want = reached(model, factors, texts)
    assert [i for i, _ in calls] == list(range(len(layers)))
    for (_, moment), values in zip(calls, want, strict=True):
        assert moment[-1, -1] == len(values) == 3 * 30 + 2 * 52 and moment.dtype == torch.float64
        near(moment, with_one(values).T @ with_one(values), 1e-5)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("family, shards", [("gemma3", 1), ("llama", 2)])
def test_ovc_fits_the_values_to_those_that_reach_them(family, shards, monkeypatch):
    """In compress, of the very factors that it returns: they lose less on these values than what was made of the
    model's own; from layer 1 on they differ."""
    model, ids, told = tiny.model(family), tiny.tokens(4, 40), []
    problem = sys.modules["lrattn.compression.problem"].Problem
    factor = problem.factor

    def watched(own, ranks, moment):
        told.extend([] if moment is None else [moment])
        return factor(own, ranks, moment)

    monkeypatch.setattr(problem, "factor", watched)
    plain, made = (
        compressed(model, [ids], f"recalkv-{x}", 0.4, ranks="uniform", shards=shards).layers for x in ("neither", "ovc")
    )
    for i, (moment, values) in enumerate(zip(told, reached(model, made, ids), strict=True)):
        near(moment, with_one(values).T @ with_one(values), 1e-4)
        assert len(made[i].values.groups) == shards
        losses = [(values - values @ x[i].values.dense().double()).square().sum() for x in (plain, made)]
        assert losses[1] < losses[0] * (1 + 1e-4 if i == 0 else 0.999)


@pytest.mark.parametrize("side", ["left", "right"])
def test_ovc_leaves_padding_out(side):
    """A padded batch gives the factors of its sequences alone, and padding that is attended to would not."""
    model, ids, filler = tiny.model("llama"), tiny.tokens(2, 40), tiny.tokens(2, 9, seed=3)
    parts = [(filler, 0), (ids, 1)] if side == "left" else [(ids, 1), (filler, 0)]
    padded = torch.cat([x for x, _ in parts], 1)
    mask = torch.cat([torch.full_like(x, live) for x, live in parts], 1)
    alone, batch, seen = (
        compressed(model, [b], "recalkv", 0.4, 2, ranks="uniform").layers
        for b in (ids, {"input_ids": padded, "attention_mask": mask}, padded)
    )
    for a, b, c in zip(alone, batch, seen, strict=True):
        torch.testing.assert_close(a.values.dense(), b.values.dense(), rtol=0, atol=1e-3)
        assert (a.values.dense() - c.values.dense()).abs().max() > 1e-2


@pytest.mark.parametrize("method", ["recalkv", "recalkv-ovc", "recalkv-hsr", "palu", "svd", "kv-heads", "lrattn"])
def test_only_refits_run_the_compressed_model(method, monkeypatch):
    ran = []
    monkeypatch.setattr(sys.modules["lrattn.compression.compress"], "propagate", lambda *_: ran.append(1))
    compressed(tiny.model("llama"), [tiny.tokens(1, 9)], method, 0.6)
    assert len(ran) == (methods.METHODS[method].refit is not None) == (method in ("recalkv", "recalkv-ovc"))


def finished(run):
    """What `run` raised, in a thread that ends in time and leaves none behind; the test fails otherwise."""
    raised, before = [], set(threading.enumerate())

    def wait():
        try:
            run()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    thread.join(60.0)  # seconds: what waits longer waits for ever
    assert not thread.is_alive() and set(threading.enumerate()) <= before
    return raised[0] if raised else None


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("where", ["factor 0", "factor 2", "layer 0", "after", "one of them", "outside"])
def test_an_error_is_raised_and_nothing_waits(where, batches, monkeypatch):
    """Where factors are made; in a pass before the first layer or after the last; in the last of several passes; while
    all are waited for."""
    model, ids = tiny.model("llama"), [tiny.tokens(1, 9, seed=i) for i in range(batches)]
    layers, factors, calls = attention_layers(model), compressed(model, ids, "palu", 0.5).layers, []

    def fail(*_):
        calls.append(1)
        if where != "one of them" or len(calls) == batches:
            raise ZeroDivisionError(where)

    def factor(i, _):
        return fail() if where == f"factor {i}" else factors[i]

    places = {"layer 0": model.model.layers[0], "one of them": model.model.layers[1], "after": model.model.norm}
    hook = places[where].register_forward_pre_hook(fail) if where in places else None
    with monkeypatch.context() as patched:
        if where == "outside":
            patched.setattr(sys.modules["lrattn.compression.propagate"], "_finish", fail)
        error = finished(lambda: propagate(model, layers, ids, factor))
    assert type(error) is ZeroDivisionError and error.args == (where,)
    if hook is not None:
        hook.remove()
    assert finished(lambda: propagate(model, layers, ids, lambda i, _: factors[i])) is None


def test_an_error_in_compress_leaves_the_model_as_it_was():
    model, ids = tiny.model("llama").train(), [tiny.tokens(2, 20), tiny.tokens(1, 20, seed=3)]
    own = model.model.layers[1].forward
    model.model.layers[1].forward = own  # as wrappers such as accelerate's leave on a module
    moments, attention = lrattn.calibrate(model, ids, progress=False), model.config._attn_implementation
    hook = model.model.layers[2].register_forward_pre_hook(lambda _, args: 1 / 0 if args[0].shape[1] == 20 else None)
    error = finished(lambda: compressed(model, ids, "recalkv-ovc", moments=moments))
    hook.remove()
    assert type(error) is ZeroDivisionError
    assert model.training and model.config._attn_implementation == attention
    assert model.model.layers[1].__dict__["forward"] is own and "forward" not in model.model.layers[0].__dict__
    assert compressed(model, ids, "recalkv-ovc", moments=moments).method == "recalkv-ovc"
