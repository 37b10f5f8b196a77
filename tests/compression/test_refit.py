"""Values fitted anew to what reaches them in the compressed model; and what an error on the way leaves behind."""

import sys
import threading

import pytest
import tiny
import torch
from given import watching
from heads import rebuilt

import lrattn
from lrattn.compression import methods
from lrattn.compression.propagate import propagate
from lrattn.compression.sums import second_moment, with_one
from lrattn.models.layers import attention_layers

IN_TIME = 60.0  # seconds: what waits longer waits for ever


def compressed(model, *args, **kwargs):
    return lrattn.compress(model, *args, **{"far": (0, 0), "progress": False} | kwargs)


def reached(model, factors, texts):
    """Moments of [v, 1] of each layer's values where those before it attend to what factors make of theirs: by
    transformers' eager attention, one text at a time."""
    index = {layer.module: i for i, layer in enumerate(attention_layers(model))}
    found = [0.0] * len(index)

    def watch(module, q, k, v, mask):
        i, heads = index[module], [x.transpose(1, 2) for x in (k, v)]
        found[i] = found[i] + second_moment(with_one(heads[1].flatten(0, 1).flatten(1)))
        return [x.transpose(1, 2) for x in rebuilt(factors.layers[i], *heads)]

    with torch.no_grad(), watching(model, watch):
        for text in texts:
            model(input_ids=text[None], use_cache=False)
    return found


@pytest.mark.parametrize("family, shards", [("gemma3", 1), ("llama", 2)])
def test_ovc_fits_the_values_to_those_that_reach_them(family, shards):
    """What it makes of them loses less on them than what was made of the model's own; from layer 1 on they differ."""
    model, ids = tiny.model(family), tiny.tokens(4, 40)
    plain, made = (
        compressed(model, [ids], f"recalkv-{x}", 0.4, ranks="uniform", shards=shards) for x in ("neither", "ovc")
    )
    for i, moment in enumerate(reached(model, made, ids)):
        assert len(made.layers[i].values.groups) == shards
        losses = []
        for factors in (plain, made):
            off = torch.eye(len(moment) - 1, dtype=torch.float64) - factors.layers[i].values.dense().double()
            losses.append(torch.trace(off.T @ moment[:-1, :-1] @ off).item())
        assert losses[1] < losses[0] * (1 + 1e-4)
        assert i == 0 or losses[1] < 0.999 * losses[0]


def test_ovc_is_told_of_the_values_that_reach_it(monkeypatch):
    """In compress, of the very factors that it returns."""
    model, ids, told = tiny.model("gemma3"), tiny.tokens(4, 40), []
    problem = sys.modules["lrattn.compression.problem"].Problem
    factor = problem.factor

    def watched(own, ranks, moment):
        told.extend([] if moment is None else [moment])
        return factor(own, ranks, moment)

    monkeypatch.setattr(problem, "factor", watched)
    made = compressed(model, [ids], "recalkv", 0.4)
    for got, expected in zip(told, reached(model, made, ids), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4 * expected.diagonal().mean().item())


@pytest.mark.parametrize("side", ["left", "right"])
def test_ovc_leaves_padding_out(side):
    """A padded batch gives the factors of its sequences alone, and padding that is attended to would not."""
    model, ids, filler = tiny.model("llama"), tiny.tokens(2, 40), tiny.tokens(2, 9, seed=3)
    mask = torch.ones(2, 49, dtype=torch.int64)
    mask[:, slice(0, 9) if side == "left" else slice(40, 49)] = 0
    padded = torch.cat((filler, ids) if side == "left" else (ids, filler), 1)
    alone, batch, seen = (
        compressed(model, [b], "recalkv", 0.4, 2, ranks="uniform").layers
        for b in (ids, {"input_ids": padded, "attention_mask": mask}, padded)
    )
    for a, b, c in zip(alone, batch, seen, strict=True):
        torch.testing.assert_close(a.values.dense(), b.values.dense(), rtol=0, atol=1e-3)
        assert (a.values.dense() - c.values.dense()).abs().max() > 1e-2


def test_only_refits_run_the_compressed_model(monkeypatch):
    ran = []
    monkeypatch.setattr(sys.modules["lrattn.compression.compress"], "propagate", lambda *_: ran.append(1))
    model, ids = tiny.model("llama"), [tiny.tokens(1, 9)]
    for method in ("recalkv", "recalkv-ovc", "recalkv-hsr", "palu", "svd", "kv-heads", "lrattn"):
        ran.clear()
        compressed(model, ids, method, 0.6)
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
    thread.join(IN_TIME)
    assert not thread.is_alive(), "it waits for ever"
    assert set(threading.enumerate()) <= before
    return raised[0] if raised else None


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("where", ["factor 0", "factor 2", "layer 0", "after", "one of them"])
def test_an_error_is_raised_and_nothing_waits(where, batches):
    """Where factors are made; in a pass before the first layer or after the last; in the last of several passes."""
    model, ids = tiny.model("llama"), [tiny.tokens(1, 9, seed=i) for i in range(batches)]
    layers, factors, calls = attention_layers(model), compressed(model, ids, "palu", 0.5), []

    def fail(*_):
        calls.append(1)
        if where != "one of them" or len(calls) == batches:
            raise ZeroDivisionError(where)

    def factor(i, _):
        return fail() if where == f"factor {i}" else factors.layers[i]

    places = {"layer 0": model.model.layers[0], "one of them": model.model.layers[1], "after": model.model.norm}
    hook = places[where].register_forward_pre_hook(fail) if where in places else None
    error = finished(lambda: propagate(model, layers, ids, factor))
    assert type(error) is ZeroDivisionError and error.args == (where,)
    if hook is not None:
        hook.remove()
    assert finished(lambda: propagate(model, layers, ids, lambda i, _: factors.layers[i])) is None


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
