"""Keys that need no rebuild, in lrattn's metric: gradients by keys as attention is given them, and their factors."""

import architectures
import pytest
import tiny
import torch
from slowly import slow_unless
from test_calibrate import near

import lrattn
from lrattn.compression.substitute import substituted
from lrattn.models.layers import attention_layers

METHODS = ("lrattn-channels", "lrattn-rotated")
GATHER = ("rotated", "rotated-metric")


def compressed(model, method, keep=0.3, **given):
    return lrattn.compress(model, [tiny.tokens(4, 40)], method, keep, far=(0, 0), progress=False, **given)


def moments_of(model, **given):
    return lrattn.calibrate(model, [tiny.tokens(4, 40)], gather=GATHER, progress=False, **given)


def test_the_metric_of_values_is_that_beside_keys_before_rope():
    """How keys are kept is nothing to the values: their gradients and their own moments are the same."""
    model = tiny.model("llama3", dtype=torch.float64)
    plain = lrattn.calibrate(model, [tiny.tokens(4, 40)], gather=["before", "metric"], progress=False)
    rotated = moments_of(model)
    for i in range(3):
        (g, c), (other, both) = rotated.metric(i, "values", rotated=True), plain.metric(i, "values")
        near(g, other, 1e-9)
        near(c, both[128:, 128:], 1e-6)
        assert (rotated.metric(i, "keys", rotated=True)[0] - plain.metric(i, "keys")[0]).norm() > 0.1 * g.norm()


def test_a_metric_foretells_what_small_errors_of_keys_cost():
    """In nats a token: half of tr(G dW C dW^T), against the divergence of the model's own predictions."""
    model, texts = architectures.model("Phi-3", torch.float64), architectures.tokens(24, 40)
    moments = lrattn.calibrate(model, [texts], gather=GATHER, progress=False)
    layers, g = attention_layers(model), torch.Generator().manual_seed(0)
    foretold, found = [], []
    for i in range(3):
        error = 0.02 * torch.randn(32, 32, generator=g, dtype=torch.float64)
        metric, moment = moments.metric(i, "keys", rotated=True)
        foretold.append((metric @ error @ moment[:-1, :-1] @ error.T).trace().item() / 2)
        found.append(divergence(model, layers, texts, i, error))
    for a, b in zip(foretold, found, strict=True):
        assert 0.4 < a / b < 2.5
    assert sorted(range(3), key=lambda i: foretold[i]) == sorted(range(3), key=lambda i: found[i])


@torch.no_grad()
def divergence(model, layers, texts, layer, error):
    """Nats a token, where the keys of a layer are off by a map of themselves."""

    def off(i, q, k, v):
        rows = k.transpose(1, 2)
        return k + (rows.flatten(2) @ error.T).view(rows.shape).transpose(1, 2) * (i == layer), v

    want = model(input_ids=texts, use_cache=False).logits.double().log_softmax(-1)
    with substituted(model, layers, off):
        got = model(input_ids=texts, use_cache=False).logits.double().log_softmax(-1)
    return torch.nn.functional.kl_div(got, want, log_target=True, reduction="none").sum(-1).mean().item()


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


@pytest.mark.parametrize("family", slow_unless(["llama3"], ["llama", "llama3", "qwen3", "gemma3"]))
def test_channels_are_those_whose_cut_costs_most_and_nothing_is_mixed(family):
    model = tiny.model(family)
    moments = moments_of(model)
    factors = lrattn.compress(model, moments=moments, method="lrattn-channels", keep=0.3, group_size=2, progress=False)
    for i, layer in enumerate(factors.layers):
        metric, moment = moments.metric(i, "keys", rotated=True)
        about = torch.zeros(128) if layer.keys.offset is None else layer.keys.offset.flatten().double()
        first, weight = moment[:-1, -1], moment[-1, -1]
        own = moment.diagonal()[:-1] - 2 * first * about + weight * about**2  # of keys without their offset
        cost = (metric.diagonal() * own).unflatten(0, (4, 32))
        kept = layer.keys.dense()
        assert torch.equal(kept, kept.diagonal().diag()) and set(kept.unique().tolist()) == {0.0, 1.0}
        kept = kept.diagonal().bool().unflatten(0, (4, 32))
        for heads, rank in zip(layer.keys.groups, layer.keys.ranks, strict=True):
            of_group, chosen = cost[list(heads)], kept[list(heads)]
            assert chosen.sum() == rank and of_group[chosen].min() >= of_group[~chosen].max()


def test_more_bytes_foresee_less_loss_and_a_basis_less_than_channels():
    model = tiny.model("llama")
    given = {"model": model, "moments": moments_of(model), "bits": (2, 4, 8), "progress": False}
    for method in METHODS:
        lost = [sum(lrattn.compress(method=method, keep=keep, **given).predicted) for keep in (0.1, 0.2, 0.3, 0.5)]
        assert lost == sorted(lost, reverse=True) and lost[-1] < 0.01 * lost[0]
    channels, rotated = (sum(lrattn.compress(method=m, keep=0.2, **given).predicted) for m in METHODS)
    assert rotated < channels  # a channel is one of the bases that latents are chosen from


@pytest.mark.parametrize("family", ["llama3", "mqa"])
@pytest.mark.parametrize("method", METHODS)
def test_bits_are_spent_to_the_last_block(method, family):
    """Bytes met from below, formats that every group shares, and rows of their sizes."""
    model = tiny.model(family)
    factors, fine = compressed(model, method, bits="auto"), compressed(model, method, 1.0, bits=8)
    least = 0.3 * factors.dense_bytes_per_token - 2 * 16 * max(len(factors.layers[0].keys.ranks), 2)
    assert least < factors.bytes_per_token <= 0.3 * factors.dense_bytes_per_token
    for layer in (*factors.layers, *fine.layers):
        assert layer.packed and layer.rope is None and layer.k_dtype == layer.v_dtype == torch.uint8
        assert layer.bytes_per_token == layer.k_width + layer.v_width
    assert sum(fine.predicted) < 0.5 * sum(factors.predicted)
