"""Keys that need no rebuild, in lrattn's metric: gradients by rotated keys, and what is made of them."""

import pytest
import tiny
import torch
from test_calibrate import calibration
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import lrattn
from lrattn.factors.parts import attention_parts
from lrattn.integrations.transformers import LatentCache, latent_attention

METHODS = ("lrattn-channels", "lrattn-rotated")
GATHER = ("rotated", "rotated-metric")


def compressed(model, method, keep=0.3, **given):
    return lrattn.compress(model, [tiny.tokens(4, 40)], method, keep, far=(0, 0), progress=False, **given)


def token_gradients(model, ids, monkeypatch):
    """Keys and values [t, Hkv * D] as the model's attention function gets them, and the loss's gradients by each."""
    seen, attend = [], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def watched(module, query, key, value, *args, **kwargs):
        seen.append([x.detach().requires_grad_() for x in (key, value)])
        key, value = (x + leaf - leaf.detach() for x, leaf in zip((key, value), seen[-1], strict=True))
        return attend(module, query, key, value, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", watched)
        found = model(input_ids=ids[None], use_cache=False).logits
    labels = calibration._drawn(found, ids[None], None)[0]
    nn.functional.cross_entropy(found[0, :-1], labels, reduction="sum").backward()

    def flat(x):
        return x[0].transpose(0, 1).flatten(1).double()

    return [[(flat(x.detach()), flat(x.grad)) for x in pair] for pair in seen]


@pytest.mark.parametrize("family", ["llama", "llama3", "qwen3", "gemma3", "qwen2-window"])
def test_the_metric_is_of_the_keys_as_attention_gets_them(family, monkeypatch):
    model, ids = tiny.model(family), tiny.tokens(3, 20)
    moments = lrattn.calibrate(model, [ids[:2], ids[2:]], gather=GATHER, progress=False)
    rows = [token_gradients(model, row, monkeypatch) for row in ids]
    plain = lrattn.calibrate(model, [ids], gather=["metric"], progress=False)
    for i in range(3):
        keys, grads = zip(*(row[i][0] for row in rows), strict=True)
        sizes = [g.norm(dim=1, keepdim=True) for g in grads]
        mean = sum(s[1:].sum() for s in sizes) / 57
        metric = mean * sum(g[1:].T @ (g / s.clamp_min(1e-30))[1:] for g, s in zip(grads, sizes, strict=True)) / 57
        moment = sum((k * s).T @ k for k, s in zip(keys, sizes, strict=True)) / 60 / mean
        got_metric, got_moment = moments.metric(i, "keys", rotated=True)
        torch.testing.assert_close(got_metric, metric, rtol=1e-3, atol=1e-5 * metric.abs().max().item())
        torch.testing.assert_close(got_moment, moment, rtol=1e-3, atol=1e-5 * moment.abs().max().item())
        for got, expected in zip(moments.metric(i, "values", rotated=True), plain.metric(i, "values"), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item())


def test_gradients_by_rotated_keys_are_gathered_alone():
    model, ids = tiny.model("llama"), tiny.tokens(2, 20)
    for other in ("fisher", "metric"):
        with pytest.raises(ValueError, match="gather: expected no other gradients beside 'rotated-metric', got"):
            lrattn.calibrate(model, [ids], gather=["rotated-metric", other], progress=False)
    with pytest.raises(ValueError, match=r"ranks: expected one of \['spectrum', 'uniform', 'condition'\] with method"):
        compressed(model, "lrattn-channels", ranks="fisher")
    for form in ("ride", True):
        with pytest.raises(ValueError, match="shared: expected None or False with method 'lrattn-rotated', got"):
            compressed(model, "lrattn-rotated", shared=form)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3"])
def test_channels_are_those_whose_cut_costs_most_and_nothing_is_mixed(family):
    model = tiny.model(family)
    moments = lrattn.calibrate(model, [tiny.tokens(4, 40)], gather=GATHER, progress=False)
    factors = lrattn.compress(model, moments=moments, method="lrattn-channels", keep=0.3, group_size=2, progress=False)
    for i, layer in enumerate(factors.layers):
        metric, moment = moments.metric(i, "keys", rotated=True)
        cost = (metric.diagonal() * moment.diagonal()).unflatten(0, (4, 32))
        kept = layer.keys.dense().flatten(0, 1)
        assert torch.equal(kept, kept.diagonal().diag()) and set(kept.unique().tolist()) == {0.0, 1.0}
        kept = kept.diagonal().bool().unflatten(0, (4, 32))
        for heads, rank in zip(layer.keys.groups, layer.keys.ranks, strict=True):
            own, chosen = cost[list(heads)], kept[list(heads)]
            assert chosen.sum() == rank and own[chosen].min() >= own[~chosen].max()


def test_more_bytes_foresee_less_loss_and_a_basis_less_than_channels():
    model = tiny.model("llama")
    moments = lrattn.calibrate(model, [tiny.tokens(4, 40)], gather=GATHER, progress=False)
    given = {"model": model, "moments": moments, "bits": (2, 4, 8), "progress": False}
    for method in METHODS:
        lost = [sum(lrattn.compress(method=method, keep=keep, **given).predicted) for keep in (0.1, 0.2, 0.3, 0.5)]
        assert lost == sorted(lost, reverse=True) and lost[-1] < 0.01 * lost[0]
    channels, rotated = (sum(lrattn.compress(method=m, keep=0.2, **given).predicted) for m in METHODS)
    assert rotated < channels  # a channel is one of the bases that latents are chosen from


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mqa", "mha"])
@pytest.mark.parametrize("method", METHODS)
def test_packed_latents_of_rotated_keys(method, family):
    """Bytes met from below; every way to extend a sequence is the scoring pass; 8 bits come nearer."""
    model, ids = tiny.model(family), tiny.tokens(2, 40)
    factors, fine = compressed(model, method, bits="auto"), compressed(model, method, 1.0, bits=8)
    assert all(layer.rotated and layer.packed and not layer.norm_bytes for layer in factors.layers)
    least = 0.3 * factors.dense_bytes_per_token - 2 * 16 * max(len(factors.layers[0].keys.ranks), 2)
    assert least < factors.bytes_per_token <= 0.3 * factors.dense_bytes_per_token
    with torch.no_grad():
        dense = model(ids).logits
        with latent_attention(model, factors):
            once = model(ids, use_cache=False).logits
            cache = LatentCache(model, factors)
            split = [model(part, past_key_values=cache).logits for part in ids.split((23, 1, 9, 7), 1)]
        with latent_attention(model, fine):
            near = model(ids, use_cache=False).logits
    error = (once - dense).norm()
    assert (torch.cat(split, 1) - once).norm() < 0.1 * error  # a sum rounded another way may be another code
    assert (near - dense).norm() < 0.5 * error


@pytest.mark.parametrize("method", METHODS)
def test_shards_hold_the_runs_of_their_heads(method):
    model = tiny.model("mha")
    layer = compressed(model, method, bits="auto", shards=2).layers[0]
    x, keys = torch.randn(5, 96), torch.randn(5, 8, 32)
    whole = layer.rebuild(*layer.project(x, keys))
    for rank in range(2):
        part, own = layer.shard(rank, 2), slice(4 * rank, 4 * rank + 4)
        assert part.keys.formats == layer.keys.formats[rank : rank + 1]
        for got, expected in zip(part.rebuild(*part.project(x, keys[:, own])), whole, strict=True):
            torch.testing.assert_close(got, expected[:, own], rtol=0, atol=1e-3)


@pytest.mark.slow
def test_the_kernels_attend_to_the_packed_rows(request):
    if request.config.getoption("--gpu"):
        pytest.skip("the model is on the CPU, where kernels are interpreted only")
    model = tiny.model("qwen3")
    factors, ids, logits = compressed(model, "lrattn-channels", bits="auto"), tiny.tokens(2, 10), []
    for backend in ("reference", "triton"):
        cache = LatentCache(model, factors)
        with torch.no_grad(), latent_attention(model, factors, backend):
            logits.append(torch.cat([model(x, past_key_values=cache).logits for x in ids.split((9, 1), 1)], 1))
    torch.testing.assert_close(*logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_layers_whose_sliding_window_is_dense_anyway_get_least(method):
    model = tiny.model("gemma3")  # every second layer sees 12 tokens
    factors = lrattn.compress(model, [tiny.tokens(4, 40)], method, 0.3, bits="auto", far=(16, 2), progress=False)
    felt = [part.window is None for part in attention_parts(model)]
    assert {True, False} == set(felt) and factors.near == (16, 2)
    for layer, own, lost in zip(factors.layers, felt, factors.predicted, strict=True):
        assert (lost > 1e-12) == own and (layer.keys.width > 32) == own
