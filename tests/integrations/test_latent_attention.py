"""Passes without a cache, by `bind` and inside `latent_attention`: far columns as their latents say, gradients too."""

import copy

import pytest
import tiny
import torch
from latents import random_factors
from passes import attention, defined, exact_ropes, fed, left_padded, window
from torch import nn
from transformers import AttentionInterface, AutoModel, BertConfig

from lrattn.integrations.transformers import LatentCache, bind, latent_attention
from lrattn.integrations.transformers import attention as integration
from lrattn.models.interface import attending, cache_argument

FORMS = {"as given": {}, "before RoPE": {"ropes": True}, "packed row": {"bits": 2, "shared": True, "ropes": True}}


def made(family="llama3", form="before RoPE", near=(0, 0)):
    model = tiny.model(family, dtype=torch.float64)
    kind = dict(FORMS[form])
    kind |= {"ropes": exact_ropes(model)} if kind.pop("ropes", False) else {}
    return model, random_factors(model, 0.4, near, **kind)


def same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9 * want.abs().max().item())


@torch.no_grad()
@pytest.mark.parametrize("near", [(0, 0), (5, 2)], ids=str)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("family", ["llama3", "gemma3"])
def test_scoring_needs_no_cache(family, form, near):
    """Padded on the left or the right; use_cache as it likes: the cache that the model makes is not looked at."""
    model, factors = made(family, form, near)
    ids, mask, positions = left_padded((24, 9), 24, tiny.tokens(2, 24))
    want = defined(model, factors, ids, window(24, *near, begins=(0, 15)), mask, positions)
    with latent_attention(model, factors):
        got = [model(ids, attention_mask=mask, position_ids=positions, use_cache=use).logits for use in (True, False)]
        right = model(ids.flip(1), attention_mask=mask.flip(1)).logits
    model.set_attn_implementation(bind(factors))
    got.append(model(ids, attention_mask=mask, position_ids=positions).logits)
    for logits in got:
        same(logits[mask.bool()], want[mask.bool()])
    live = mask.flip(1)
    same(right[live.bool()], defined(model, factors, ids.flip(1), window(24, *near), live)[live.bool()])


@torch.no_grad()
def test_a_window_of_one_s_own():
    """recent and sinks take the place of the factors' own; a cache has its own."""
    model, factors = made(near=(5, 2))
    ids = tiny.tokens(2, 20)
    for given, near in (({}, (5, 2)), ({"recent": 3}, (3, 2)), ({"recent": 0, "sinks": 0}, (0, 0))):
        want = defined(model, factors, ids, window(20, *near))
        with latent_attention(model, factors, **given):
            same(model(ids).logits, want)
            same(model(ids, **cache_argument(LatentCache(factors, recent=1, sinks=1))).logits,
                 defined_beside(model, factors, ids, (1, 1)))  # fmt: skip
        model.set_attn_implementation(bind(factors, **given))
        same(model(ids).logits, want)
        model.set_attn_implementation("sdpa")


def defined_beside(model, factors, ids, near):
    """As `defined`, of a copy: the model is inside a block."""
    twin = copy.deepcopy(model)
    twin.set_attn_implementation("sdpa")
    return defined(twin, factors, ids, window(ids.shape[1], *near))


@torch.no_grad()
def test_generation_on_a_cache_is_that_of_scoring_passes():
    model, factors = made(near=(5, 2))
    ids, mask, _ = left_padded((14, 3, 9), 14, tiny.tokens(3, 14))
    choice = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    with latent_attention(model, factors):
        for more in ({}, {"num_beams": 3, "num_return_sequences": 2}):
            want = model.generate(ids, use_cache=False, **choice, **more)
            cache = LatentCache(factors)
            assert torch.equal(model.generate(ids, **choice, **more, **cache_argument(cache)), want)
            assert cache.get_seq_length() == 14 + 11
        without = LatentCache(factors, recent=0, sinks=0)
        want = model.generate(ids, use_cache=False, **choice)
        assert not torch.equal(model.generate(ids, **choice, **cache_argument(without)), want)  # the window does show


@pytest.mark.parametrize("near", [(0, 0), (5, 2), (40, 0)], ids=str)
@pytest.mark.parametrize("cached", [False, True])
def test_gradients_pass_through_far_columns(cached, near):
    """Of every weight, as through the definition written out; with a cache, of its first pass."""
    model, factors = made("gemma3", near=near)
    ids, weights = tiny.tokens(2, 20), dict(model.named_parameters())

    def gradients(run):
        loss = run().logits.square().mean()
        return torch.autograd.grad(loss, list(weights.values()), allow_unused=True)

    live = torch.ones(2, 20, dtype=torch.bool)
    with attending(model, attention(factors, window(20, *near), live)):
        want = gradients(lambda: model(ids, use_cache=False))
    with latent_attention(model, factors):
        got = gradients(
            lambda: model(ids, **(cache_argument(LatentCache(factors)) if cached else {"use_cache": False}))
        )
    for name, a, b in zip(weights, got, want):
        assert (a is None) == (b is None), name
        assert a is None or (a - b).norm() <= 1e-9 * b.norm(), name
    assert all(want[i].any() for i, name in enumerate(weights) if "k_proj" in name or "v_proj" in name)


def test_a_step_that_is_differentiated_is_dense(monkeypatch):
    """decode_attention passes no gradient: a few queries that need one go another way, to the same result."""
    model, factors = made(near=(5, 2))
    ids, weights = tiny.tokens(2, 21), [p for n, p in model.named_parameters() if "self_attn" in n]
    model.set_attn_implementation("lrattn")
    caches = [LatentCache(factors) for _ in range(3)]
    for cache in caches:
        fed(model, ids[:, :20], 20, cache)
    with torch.no_grad():
        want = model(ids[:, 20:], **cache_argument(caches[0])).logits
    gradients = []
    for cache, rows in zip(caches[1:], (64, 0)):
        monkeypatch.setattr(integration, "DECODE_ROWS", rows)
        got = model(ids[:, 20:], **cache_argument(cache)).logits
        same(got.detach(), want)
        gradients.append(torch.autograd.grad(got.square().sum(), weights))
    for a, b in zip(*gradients):
        assert b.any() and torch.equal(a, b)


def test_a_name_is_of_its_factors_and_window():
    model, factors = made(near=(5, 2))
    other = random_factors(model, 0.4)
    names = [
        bind(factors),
        bind(factors, recent=5),
        bind(factors, recent=4),
        bind(factors, backend="reference"),
        bind(other),
    ]
    assert names[0] == names[1] and len(set(names)) == 4 and all(name.startswith("lrattn-") for name in names)


@torch.no_grad()
def test_towers_and_encoders_attend_as_they_do():
    """Modules that are not causal have no latents: an encoder under "lrattn" is as under sdpa."""
    config = BertConfig(
        vocab_size=160, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    encoder = AutoModel.from_config(config).eval()
    ids, mask, _ = left_padded((12, 5), 12, tiny.tokens(2, 12))
    found = []
    for name in ("sdpa", "lrattn", bind(made()[1])):
        encoder.set_attn_implementation(name)
        found.append(encoder(ids, attention_mask=mask).last_hidden_state[mask.bool()])
    for got in found[1:]:
        torch.testing.assert_close(got, found[0], rtol=0, atol=1e-6)


@torch.no_grad()
def test_what_attention_cannot_do_is_refused():
    model, factors = made()
    with latent_attention(model, factors):
        with pytest.raises(ValueError, match="output_attentions: expected False where a model attends on latents"):
            model(tiny.tokens(1, 5), output_attentions=True)
        module = model.model.layers[0].self_attn
        q, k = torch.randn(1, 8, 5, 32), torch.randn(1, 4, 5, 32)
        attend = AttentionInterface()["lrattn"]
        keys, values = LatentCache(factors).update(k.double(), k.double(), 0)
        with pytest.raises(ValueError, match="position_bias: expected none in LlamaAttention"):
            attend(module, q, keys, values, None, position_bias=q)
        with pytest.raises(ValueError, match="values: expected those that the cache returned in LlamaAttention"):
            attend(module, q, keys, values * 2, None)
    with pytest.raises(ValueError, match="model: expected a model of transformers"):
        latent_attention(nn.Linear(2, 2), factors).__enter__()
    for run in (bind, LatentCache, lambda *_, **more: latent_attention(model, factors, **more).__enter__()):
        with pytest.raises(ValueError, match="backend: expected None or one of"):
            run(factors, backend="cuda")


@torch.no_grad()
@pytest.mark.parametrize("near", [(0, 0), (5, 2)], ids=str)
def test_autocast(near):
    """Weights and factors in float32, keys in bfloat16: no further from float64 than twice sdpa's error."""
    exact = tiny.model("llama").double()
    model = tiny.model("llama")
    factors = random_factors(model, 1.0, near, ropes=exact_ropes(model))
    ids = tiny.tokens(2, 24)
    want = exact(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        allowed = (model(ids).logits.double() - want).norm()
        with latent_attention(model, factors):
            got = [model(ids).logits, fed(model, ids, (14, 1, 1, 8), LatentCache(factors))]
    for logits in got:
        assert (logits.double() - want).norm() <= 2 * allowed
