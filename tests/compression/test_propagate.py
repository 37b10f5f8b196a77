"""All of a text through a model on factors, layer by layer: what reaches each layer, and how a run ends."""

import sys
import threading

import architectures
import pytest
import torch
from given import eager, served, watching
from latents import random_factors
from test_calibrate import near

from lrattn.compression.moments import about, mean_of
from lrattn.compression.propagate import propagate
from lrattn.models.layers import attention_layers
from lrattn.models.ropes import ropes_of

NAMES = served(("Llama, yarn", "Gemma-2", "Gemma-3n", "GPT-2", "Phi-3"))
propagation = sys.modules["lrattn.compression.propagate"]


def padded(side):
    return dict(zip(("input_ids", "attention_mask"), architectures.padded((30, 17, 5), side), strict=True))


def half(model):
    """Factors of half the rank, before RoPE where there is one."""
    found = attention_layers(model)
    return found, random_factors(model, 0.5, ropes=ropes_of(model, found))


@torch.no_grad()
def reached(model, layers, factors, texts):
    """Values of every layer [tokens, n] by transformers' own attention, one text after the other: those before a layer
    run on factors."""
    modules, found = [layer.module for layer in layers], [[] for _ in layers]
    made = []

    def low_rank(module, q, k, v, mask):
        if module not in modules:  # attends on the keys of another
            return next(pair for pair in reversed(made) if pair[0] is k or pair[2] is k)[:2]
        i = modules.index(module)
        layer, at = factors.layers[i], torch.arange(k.shape[2])[None]
        found[i].append(v[0].transpose(0, 1).flatten(1).double())
        sides, heads = (layer.keys, layer.values), [x.transpose(1, 2) for x in (k, v)]
        heads[0] = heads[0] if layer.rope is None else layer.rope.turn_back(heads[0], at)
        rebuilt = [((x - s.offset).flatten(2) @ s.dense()).view(x.shape) + s.offset for x, s in zip(heads, sides)]
        rebuilt[0] = rebuilt[0] if layer.rope is None else layer.rope.rotate(rebuilt[0], at)
        new = [x.transpose(1, 2) for x in rebuilt]
        made.append((*new, k))
        return new

    with watching(model, low_rank):
        for ids in texts:
            model(input_ids=ids[None], use_cache=False)
    return [torch.cat(rows) for rows in found]


@pytest.mark.parametrize("name", NAMES)
def test_each_layer_is_reached_by_what_those_before_it_run_on(name):
    model, calls = eager(name, torch.float64), []
    layers, factors = half(model)
    ids = architectures.tokens(3, 30)
    batches = [ids[:2], padded("left"), padded("right"), ids[2:]]
    texts = list(ids) + [row[kept.bool()] for batch in batches[1:3] for row, kept in zip(*batch.values(), strict=True)]

    def factor(i, moment):
        calls.append((i, moment.clone()))
        return factors.layers[i]

    propagate(model, layers, batches, factor)
    want = reached(model, layers, factors, texts)
    assert [i for i, _ in calls] == list(range(len(layers)))
    for (_, moment), values in zip(calls, want, strict=True):
        assert moment[-1, -1] == len(values) == 3 * 30 + 2 * 52 and moment.dtype == torch.float64
        near(about(moment, None), values.T @ values, 1e-5)
        near(mean_of(moment), values.mean(0), 1e-5)
    assert model.config._attn_implementation == "eager"


def test_batches_are_no_difference():
    model, found = architectures.model("Llama", torch.float64), []
    layers, factors = half(model)
    ids = architectures.tokens(8, 20)
    for n in (8, 1, 3):
        moments = []
        propagate(model, layers, ids.split(n), lambda i, moment, to=moments: (to.append(moment), factors.layers[i])[1])
        found.append(moments)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            near(a, b, 1e-6)


class Broken(Exception):
    pass


@pytest.mark.parametrize("where", ["in factor", "in a pass", "from outside"])
def test_an_error_ends_all_passes_and_is_the_one_that_is_raised(where, monkeypatch):
    """Not that the others waited in vain; no thread is left, and the model is what it was."""
    model, threads = architectures.model("Llama"), threading.active_count()
    layers, factors = half(model)
    ids, error = architectures.tokens(5, 20), KeyboardInterrupt if where == "from outside" else Broken

    def factor(i, moment):
        if i == 1 and where == "in factor":
            raise Broken
        return factors.layers[i]

    def hook(_, args, kwargs):
        if where == "in a pass" and args[0].shape[1] == 11:
            raise Broken

    def stop(passes):
        raise KeyboardInterrupt

    if where == "from outside":
        monkeypatch.setattr(propagation, "_finish", stop)
    handle = model.model.layers[2].register_forward_pre_hook(hook, with_kwargs=True)
    with pytest.raises(error):
        propagate(model, layers, [*ids.split(1), ids[:1, :11]], factor)
    handle.remove()
    monkeypatch.undo()
    assert threading.active_count() == threads and model.config._attn_implementation == "sdpa"
    propagate(model, layers, ids.split(1), lambda i, moment: factors.layers[i])
