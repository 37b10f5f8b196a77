"""A cache is given as `cache` or `past_key_values`, whatever the release of transformers calls it; and it is filled."""

import inspect
import logging
import warnings

import pytest
import tiny
import torch
from torch import nn
from transformers import DynamicCache

import lrattn
from lrattn.integrations.transformers import LatentCache, latent_attention
from lrattn.integrations.transformers.naming import NAMES, as_argument, cache_name


@pytest.fixture(scope="module")
def exact():
    """A model and factors of full rank: what is done on latents is what the model does."""
    model = tiny.model("llama")
    return model, lrattn.compress(model, [tiny.tokens(4, 40)], "palu", 1.0, far=(0, 0), progress=False)


@pytest.fixture
def native(exact):
    return cache_name(exact[0].model.forward)


@pytest.mark.parametrize("name", NAMES)
def test_either_name_fills_the_cache_that_is_given(exact, name, caplog):
    model, factors = exact
    ids = tiny.tokens(2, 20)
    expected = model.generate(ids, max_new_tokens=6, do_sample=False)
    cache, second = LatentCache(model, factors), LatentCache(model, factors)
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING), latent_attention(model, factors):
        warnings.simplefilter("error")
        got = model.generate(ids, max_new_tokens=6, do_sample=False, **{name: cache})
        with torch.no_grad():
            whole = model(ids, use_cache=False).logits
            parts = [model(part, **{name: second}).logits for part in ids.split(10, 1)]
            model.model(ids[:, :3], **{name: second})
    assert torch.equal(got, expected) and cache.lengths == [25, 25]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=0, atol=1e-4)
    assert second.lengths == [23, 23]
    assert not [r for r in caplog.records if "deprecated" in r.getMessage()]


@pytest.mark.parametrize("name", NAMES)
def test_another_kind_of_cache_is_refused_by_either_name(exact, name, native):
    model, factors = exact
    with latent_attention(model, factors):
        for call in (model, model.generate, model.model):
            with pytest.raises(ValueError, match=f"{native}: expected a LatentCache inside latent_attention"):
                call(tiny.tokens(1, 5), **{name: DynamicCache()})


def test_two_caches_are_refused(exact):
    model, factors = exact
    two = {name: LatentCache(model, factors) for name in NAMES}
    with latent_attention(model, factors):
        for call in (model, model.generate, model.model):
            with pytest.raises(ValueError, match="cache: expected one cache, got another one as past_key_values"):
                call(tiny.tokens(1, 5), **two)


def test_a_cache_that_its_model_drops_is_missed(exact, monkeypatch, native):
    """As release 5.24 did to those who gave it the old name: no later release does it unnoticed."""
    model, factors = exact
    original = type(model).forward

    def forward(self, *args, **kwargs):
        return original(self, *args, **{key: x for key, x in kwargs.items() if key not in NAMES})

    monkeypatch.setattr(type(model), "forward", forward)
    cache = LatentCache(model, factors)
    with latent_attention(model, factors), pytest.raises(RuntimeError, match=f"{native}: expected the LatentCache of"):
        model(tiny.tokens(1, 5), **{native: cache})
    assert not cache.lengths


@pytest.mark.parametrize("given", [True, False])
def test_a_cache_that_generate_does_not_hand_on_is_missed(exact, monkeypatch, native, given):
    model, factors = exact
    original = type(model).prepare_inputs_for_generation

    def prepare(self, *args, **kwargs):
        made = original(self, *args, **kwargs)
        made["renamed"] = made.pop(native)
        return made

    monkeypatch.setattr(type(model), "prepare_inputs_for_generation", prepare)
    cache = LatentCache(model, factors)
    with latent_attention(model, factors):
        with pytest.raises(RuntimeError, match=f"{native}: expected the LatentCache of this call in its decoder"):
            model.generate(tiny.tokens(1, 5), max_new_tokens=3, **({native: cache} if given else {}))
        monkeypatch.setattr(type(model), "prepare_inputs_for_generation", original)
        model.generate(tiny.tokens(1, 5), max_new_tokens=3, **{native: cache})  # the failure is not remembered
    assert cache.lengths == [7]


class Wrapped(nn.Module):
    """A model around another, as adapters make them: what it does not have is the other's."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.base, name)

    def forward(self, *args, **kwargs):
        return self.base(*args, **kwargs)


def test_a_model_that_is_wrapped_generates_on_latents(exact):
    model, factors = exact
    ids = tiny.tokens(1, 9)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    wrapped = Wrapped(model)
    with latent_attention(wrapped, factors):
        got = [run.generate(ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
               for run in (wrapped, model)]  # fmt: skip
    for out in got:
        assert torch.equal(out.sequences, expected) and isinstance(out.past_key_values, LatentCache)
    assert "generate" not in vars(model) and "generate" not in vars(wrapped)


def test_another_cache_that_comes_back_is_an_error(exact, monkeypatch, native):
    model, factors = exact
    original = type(model.model).forward

    def forward(self, *args, **kwargs):
        out = original(self, *args, **kwargs)
        setattr(out, native, DynamicCache())
        return out

    forward.__signature__ = inspect.signature(original)
    monkeypatch.setattr(type(model.model), "forward", forward)
    cache = LatentCache(model, factors)
    with latent_attention(model, factors), pytest.raises(RuntimeError, match="got another one back"):
        model(tiny.tokens(1, 5), **{native: cache})
    assert not cache.lengths


def test_a_dense_model_is_given_its_cache_by_the_name_it_knows(exact, native):
    model, _ = exact
    cache = DynamicCache()
    assert as_argument(model, cache) == {native: cache}
    with torch.no_grad():
        model(tiny.tokens(1, 5), **as_argument(model, cache))
    assert cache.get_seq_length() == 5
    with pytest.raises(ValueError, match=r"expected Linear\.forward to take a cache"):
        cache_name(nn.Linear(2, 2).forward)
