"""SmolLM2-135M on Wikipedia text: the claims of the README on a real model. Files come from installed packages."""

import copy

import pytest
import torch

import lrattn
from bench.support import models, texts
from lrattn.factors.layer import sides_of
from lrattn.integrations.transformers import LatentCache, latent_attention
from lrattn.integrations.transformers.load import read_windows
from lrattn.models.interface import cache_argument
from lrattn.models.layers import attention_layers
from lrattn.models.weights import linear

PROMPTS = ["The capital of France is", "Once upon a time, in a small village by the sea,"]


@pytest.fixture(scope="module")
def real():
    return models.smollm2()


@pytest.fixture(scope="module")
def moments(real):
    windows = read_windows(real[1], texts.wikipedia("calibration")[:10_000], 256, 2)
    return lrattn.calibrate(real[0], windows.split(1), gather=["before", "metric"], progress=False)


def generate(model, inputs, **kwargs):
    return model.generate(
        **inputs, do_sample=False, max_new_tokens=24, output_logits=True, return_dict_in_generate=True, **kwargs
    )


def simulated(model, factors, dtype):
    """A copy whose key and value weights are multiplied by the maps that the factors stand for, and run in a dtype."""
    twin = copy.deepcopy(model).to(dtype)
    with torch.no_grad():
        for own, layer in zip(attention_layers(twin), factors.to(dtype=dtype).layers, strict=True):
            weights = [linear(own, name).weight for name in ("k_proj", "v_proj")]
            read = [torch.cat(weights)] * 2 if layer.shared else [w.clone() for w in weights]
            for weight, side, x in zip(weights, sides_of(layer.keys, layer.values), read, strict=True):
                weight.copy_(side.dense().T @ x)
    return twin


@pytest.mark.slow
@pytest.mark.parametrize("method, keep", [("palu", 0.7), ("lrattn-rebuilt", 0.5)])
def test_latents_generate_what_the_simulated_model_generates(real, moments, method, keep):
    """Batched with left padding; half the bytes, the same tokens, no further from float64 than twice the simulation."""
    model, tokenizer = real
    factors = lrattn.compress(model, method=method, moments=moments, keep=keep, far=(0, 0), progress=False)
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    expected, exact = (generate(simulated(model, factors, t), inputs) for t in (torch.float32, torch.float64))
    cache = LatentCache(factors)
    with latent_attention(model, factors):
        got = generate(model, inputs, **cache_argument(cache))
    assert torch.equal(got.sequences, expected.sequences) and torch.equal(got.sequences, exact.sequences)
    errors = [(torch.stack(x.logits) - torch.stack(exact.logits)).abs() for x in (got, expected)]
    ours, theirs = (e.max().item() for e in errors)
    assert theirs < 5e-4 and ours < 1e-3
    # The largest of two such roundings differs twofold from run to run, with equal factors; their mean squares do not.
    ours, theirs = (e.square().mean().sqrt().item() for e in errors)
    assert ours <= 2 * theirs
    dense = 30 * 2 * 3 * 64
    assert factors.dense_bytes_per_token == 2 * dense and keep - 16 / dense < factors.keep <= keep
    pages = [x for layer in cache.layers for x in layer.pages if x is not None]
    assert sum(x.shape[-1] for x in pages) <= keep * dense + 1e-6


@pytest.mark.slow
def test_shuffled_copies_of_heads_are_put_together_again(real):
    """SmolLM2 as 9 shuffled kv heads, 3 of each: with copies in one group, a third of the bytes is exact."""
    wide, tokenizer = models.smollm2_mha()
    ids = read_windows(tokenizer, texts.wikipedia("evaluation")[:10_000], 128, 1)
    windows = read_windows(tokenizer, texts.wikipedia("calibration")[:10_000], 256, 2)
    factors = lrattn.compress(
        wide, windows.split(1), "recalkv-hsr", keep=1 / 3, group_size=3, ranks="uniform", far=(0, 0), progress=False
    )
    order = models.mha_order()
    for layer in factors.layers:
        assert all(len({order[h] // 3 for h in heads}) == 1 for heads in layer.keys.groups)
        assert layer.keys.ranks == (64, 64, 64) and layer.values.ranks == (192,)
    with torch.no_grad():
        expected = real[0](ids).logits
        torch.testing.assert_close(wide(ids).logits, expected, rtol=0, atol=1e-3)
        with latent_attention(wide, factors):
            torch.testing.assert_close(wide(ids).logits, expected, rtol=0, atol=2e-3)


def test_calibration_text_and_evaluation_text_are_apart():
    parts = [texts.wikipedia(half) for half in ("calibration", "evaluation")]
    assert all(len(p) > 1_000_000 for p in parts)
    paragraphs = [{line for line in p.splitlines() if len(line) > 200} for p in parts]
    assert len(paragraphs[0] & paragraphs[1]) <= 2
