"""KVSharer: which layers read another's keys and values, and that attention is to those and nothing else is held."""

import math
from dataclasses import replace
from itertools import combinations

import architectures
import pytest
import tiny
import torch
from latents import random_factors
from passes import exact_ropes, fed, same

import lrattn
from lrattn.compression import sharing
from lrattn.factors.summary import headline, summarize
from lrattn.integrations.transformers import LatentCache, bind, latent_attention
from lrattn.models.interface import attending, cache_argument, exact_attention
from lrattn.models.layers import attention_layers


def model_of(layers=6, dtype=torch.float32):
    config = tiny.copy.deepcopy(tiny.CONFIGS["llama"])
    config.num_hidden_layers = layers
    model = tiny.built(config, 0)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    return model


def texts(count=4, length=70):
    return list(tiny.tokens(count, length).split(2))


def reading(model, donors, ids):
    """Logits [B, T, V] of a pass in which each layer attends to the keys and values of the one it reads."""
    held = {}

    def attend(module, query, key, value, mask, **kwargs):
        held[module.layer_idx] = key, value
        return exact_attention(module, query, *held[donors[module.layer_idx]], mask, **kwargs)

    with torch.no_grad(), attending(model, attend):
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("count", range(6))
def test_a_map_is_resolved_and_as_large_as_asked(count, monkeypatch):
    """Each layer reads itself or one before it that reads itself: reading the map twice is reading it once."""
    monkeypatch.setattr(sharing, "ALIKE", -2.0)
    found = lrattn.donors(model_of(), texts(), count, progress=False)
    assert sum(i != d for i, d in enumerate(found)) == count
    assert all(d <= i and found[d] == d for i, d in enumerate(found))
    assert tuple(sharing.resolved(found)) == found and (count or found == tuple(range(6)))


def test_chains_lead_to_their_first_layer():
    assert sharing.resolved([0, 0, 1, 2, 4, 4]) == [0, 0, 0, 0, 4, 4]


def test_the_most_unlike_layers_are_tried_first(monkeypatch):
    """By mean distances of the mean keys and values of the texts, at each head and place."""
    monkeypatch.setattr(sharing, "ALIKE", -2.0)
    model, ids = model_of(), torch.cat(texts())[:, : sharing.TOKENS]
    layers = attention_layers(model)
    sides = {}

    def keep(module, query, key, value, mask, **kwargs):
        sides[module] = key, value
        return exact_attention(module, query, key, value, mask, **kwargs)

    with torch.no_grad(), attending(model, keep):
        model(ids, use_cache=False)
    means = [[x.mean(0) for x in sides[layer.module]] for layer in layers]
    apart = {
        (j, i): sum((a - b).norm(dim=-1).mean().item() for a, b in zip(means[i], means[j])) / 2
        for i, j in combinations(range(6), 2)
    }
    later, earlier = max(apart, key=apart.get)
    found = lrattn.donors(model, texts(), 1, progress=False)
    assert found[later] == earlier


def test_pairs_that_turn_the_last_hidden_states_are_not_taken(monkeypatch):
    model = model_of()
    monkeypatch.setattr(sharing, "ALIKE", 1.1)
    with pytest.raises(ValueError, match="count: expected at most 0 layers, which can read another's here, got 2"):
        lrattn.donors(model, texts(), 2, progress=False)
    asked = []
    monkeypatch.setattr(sharing, "ALIKE", 0.5)
    monkeypatch.setattr(sharing, "_alike", lambda *_: asked.append(0) or (0.6 if len(asked) > 3 else 0.4))
    refused = lrattn.donors(model, texts(), 1, progress=False)
    assert len(asked) == 4 and refused != tuple(range(6))


@pytest.mark.parametrize("batches", [[], [torch.ones(2, 20, dtype=torch.int64)]], ids=["none", "short"])
def test_texts_that_are_too_short(batches):
    with pytest.raises(ValueError, match="batches: expected a text of 64 tokens or more, got none"):
        lrattn.donors(model_of(), batches, 1)


DONORS = (0, 1, 0, 3, 1, 1)


@pytest.mark.parametrize("keep", [1.0, 0.4])
@pytest.mark.parametrize("form", ["as given", "in chunks"])
def test_layers_read_what_their_donors_hold(form, keep):
    """By passes of all kinds and without a cache; at full rank as the model itself with those keys and values."""
    model = model_of(dtype=torch.float64)
    kind = {"ropes": exact_ropes(model), "chunk": 64} if form == "in chunks" else {}
    factors = replace(random_factors(model, keep, (5, 2), 0, **kind), donors=DONORS)
    ids = tiny.tokens(2, 40)
    want = reading(model, DONORS, ids)
    model.set_attn_implementation("lrattn")
    cache = LatentCache(factors)
    got = fed(model, ids, (20, 3, *[1] * 9, 8), cache)
    with torch.no_grad(), latent_attention(model, factors):
        same(model(ids, use_cache=False).logits, got)
    model.set_attn_implementation(bind(factors))
    with torch.no_grad():
        same(model(ids, use_cache=False).logits, got)
    if keep == 1.0:
        same(got, want)
    else:
        assert (got - want).abs().max() > 1e-3
    assert len(cache.columns.layers) == 3 and all(not cache.layers[i].tensors[0].numel() for i in (2, 4, 5))


def test_triton_and_reference_agree():
    """A layer that reads another's latents, by decode_attention of both backends."""
    model, donors = model_of(3), (0, 1, 0)
    factors, ids = replace(random_factors(model, 0.4, (5, 2)), donors=donors), tiny.tokens(1, 43)
    model.set_attn_implementation("lrattn")
    a, b = (fed(model, ids, (40, 1, 2), LatentCache(factors, backend=backend)) for backend in ("reference", "triton"))
    torch.testing.assert_close(a, b, rtol=0, atol=2e-4 * a.abs().max().item())


def test_nothing_is_held_for_a_layer_that_reads_another(tmp_path):
    model = model_of()
    plain = random_factors(model, 0.4)
    shared = replace(plain, donors=DONORS)
    assert shared.bytes_per_token * 2 == plain.bytes_per_token and shared.keep * 2 == plain.keep
    assert all(shared.layers[i] is shared.layers[d] for i, d in enumerate(DONORS)) and len(shared.held) == 3
    shared.save(tmp_path / "s.safetensors")
    plain.save(tmp_path / "p.safetensors")
    assert (tmp_path / "s.safetensors").stat().st_size < 0.6 * (tmp_path / "p.safetensors").stat().st_size
    loaded = lrattn.Factors.load(tmp_path / "s.safetensors").to(dtype=torch.float64)
    assert loaded.donors == DONORS and all(loaded.layers[i] is loaded.layers[d] for i, d in enumerate(DONORS))
    model.set_attn_implementation("lrattn")
    caches = [LatentCache(factors, recent=0, sinks=0) for factors in (plain, shared)]
    for cache in caches:
        fed(model, tiny.tokens(1, 64), 64, cache)
    tables = 4 * 4
    assert (caches[1].nbytes - tables) * 2 == caches[0].nbytes - tables
    assert "layers that read another's: 2 of 0, 4 of 1, 5 of 1" in headline(summarize(shared))


def test_what_a_cache_goes_through_with_layers_that_are_shared():
    """Rows, copies, crops, beams, and a pass that fails, with tokens selected, too."""
    model = model_of(dtype=torch.float64)
    factors = replace(random_factors(model, 0.4, (0, 2), ropes=exact_ropes(model), chunk=64), donors=DONORS)
    model.set_attn_implementation("lrattn")
    ids = tiny.tokens(2, 110)
    for select in (None, lrattn.Selection("curdkv", 0.4, 4, recent=8)):
        cache, other = LatentCache(factors, select=select), LatentCache(factors, select=select)
        fed(model, ids[:, :90], (80, 10), cache)
        fed(model, ids[[1, 0], :90], (80, 10), other)
        other.reorder_cache(torch.tensor([1, 0]))
        same(fed(model, ids[:, 90:], (3, 1, 16), tiny.copy.deepcopy(cache)), fed(model, ids[:, 90:], (3, 1, 16), other))
        assert len(cache.tokens) == 3
    cache = LatentCache(factors)
    fed(model, ids[:, :90], 90, cache)
    want = fed(model, ids[:, 90:], (1, 19), tiny.copy.deepcopy(cache))
    fed(model, ids[:, :20], 20, cache)
    cache.crop(-20)
    same(fed(model, ids[:, 90:], (1, 19), cache), want)
    out = model.generate(
        ids[:1], max_new_tokens=4, num_beams=2, do_sample=False, **cache_argument(LatentCache(factors))
    )
    assert out.shape == (1, 114)


def test_a_pass_that_fails_counts_for_nothing_whoever_fails():
    """Also where only layers that read another's are left, whose keys are not held on to."""
    model = model_of(dtype=torch.float64)
    factors, ids = replace(random_factors(model, 0.4, (5, 2)), donors=DONORS), tiny.tokens(1, 60)
    model.set_attn_implementation("lrattn")

    def fails(*_):
        raise RuntimeError("out of memory")

    for at in (1, 3, 4):
        cache = LatentCache(factors)
        fed(model, ids[:, :50], 50, cache)
        hook = model.model.layers[at].mlp.register_forward_pre_hook(fails)
        with pytest.raises(RuntimeError, match="out of memory"):
            fed(model, ids[:, 50:55], 5, cache)
        hook.remove()
        assert cache.get_seq_length() == 50
        cache.reorder_cache(torch.tensor([0]))
        assert all(layer.latest is None for layer in cache.layers)
        twin = tiny.copy.deepcopy(cache)
        want = fed(model, ids, (50, 5, 1, 4), LatentCache(factors))[:, 50:]
        same(fed(model, ids[:, 50:], (5, 1, 4), cache), want)
        same(fed(model, ids[:, 50:], (5, 1, 4), twin), want)
        assert all(layer.latest is None for layer in cache.layers)


@pytest.mark.parametrize("donors", [(0, 1, 2, 2), (0, 1, 1, 0), (0, 1, 0, 0), (0, 0, 2, 2)], ids=str)
def test_models_whose_layers_share_keys_by_themselves(donors):
    """Gemma-3n's last layers read keys of earlier ones, which may read another's: with a cache and without one."""
    kinds = ["full_attention", "sliding_attention", "full_attention"] * 2
    more = {
        name: [0.0] * 6 if name.startswith("act") else [96] * 6
        for name in ("intermediate_size", "activation_sparsity_pattern")
    }
    model = architectures.model("Gemma-3n", torch.float64, num_hidden_layers=6, layer_types=kinds, **more)
    factors, ids = replace(random_factors(model, 0.4), donors=donors), architectures.tokens(1, 30)
    model.set_attn_implementation(bind(factors))
    with torch.no_grad():
        want = model(ids, use_cache=False).logits
    model.set_attn_implementation("lrattn")
    same(fed(model, ids, (20, 1, 9), LatentCache(factors)), want)


@pytest.mark.parametrize("donors", [(0, 1), (0, 1, 3, 3, 4, 5), (0, 0, 1, 3, 4, 5), (0, -1, 2, 3, 4, 5)], ids=str)
def test_maps_that_are_none_are_refused(donors):
    with pytest.raises(ValueError, match="donors: expected for each of 6 layers itself or one before it"):
        replace(random_factors(model_of()), donors=donors)


@pytest.mark.parametrize("keep, sharers", [(None, 2), (0.5, 3), (0.99, 1), (1.0, 0)])
def test_the_method_is_one_name(keep, sharers):
    factors = lrattn.compress(model_of(), texts(), "kvsharer", keep, progress=False)
    assert len(factors.held) == 6 - sharers and math.isclose(factors.keep, 1 - sharers / 6)
    with pytest.raises(ValueError, match="batches: method 'kvsharer' needs some text"):
        lrattn.compress(model_of(), None, "kvsharer", 0.5)
    with pytest.raises(ValueError, match=r"keep: expected one of 6 layers at least, got 0.1"):
        lrattn.compress(model_of(), texts(), "kvsharer", 0.1)


def test_what_does_not_know_of_them_refuses_them():
    model = model_of()
    factors = random_factors(model)
    for own in (replace(factors, donors=DONORS), replace(factors, select=lrattn.Selection("curdkv"))):
        with pytest.raises(ValueError, match="factors: expected some without"):
            lrattn.refine(model, own, texts(), steps=1, progress=False)
        with pytest.raises(ValueError, match="factors: expected some of a row for every token and layer"):
            lrattn.narrowed(own, 0.3)
