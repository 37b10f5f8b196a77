"""Other keys and values in a model's attention: the model's own change nothing, those of factors are the latents'."""

import pytest
import tiny
import torch

import lrattn
from lrattn.compression.substitute import Window, substituted
from lrattn.factors.parts import attention_parts
from lrattn.integrations.transformers import latent_attention

FAMILIES = tuple(tiny.CONFIGS)
WINDOWS = [Window(), Window(5, 1), Window(0, 3), Window(60, 0)]


@torch.no_grad()
def logits(model, ids):
    return model(ids, use_cache=False).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_the_model_s_own_change_nothing(family, window):
    model, ids = tiny.model(family), tiny.tokens(2, 30)
    expected = logits(model, ids)
    with substituted(model, lambda i, x, k, v: (k, v), window):
        torch.testing.assert_close(logits(model, ids), expected, rtol=0, atol=1e-4)
    assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("family", ["llama3", "qwen3", "qwen2-window"])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_the_maps_of_factors_give_what_attention_on_their_latents_gives(family, window):
    model, ids = tiny.model(family), tiny.tokens(2, 30)
    factors = lrattn.compress(model, [ids], keep=0.3, shared=False, far=(0, 0), progress=False)
    weights = [[side.dense().flatten(0, 1) for side in layer.sides] for layer in factors.layers]
    parts = attention_parts(model)

    def low_rank(i, x, k, v):
        k_bias, v_bias = (parts[i].linear(name).bias for name in ("k_proj", "v_proj"))
        return (torch.nn.functional.linear(x, w, b) for w, b in zip(weights[i], (k_bias, v_bias), strict=True))

    with substituted(model, low_rank, window):
        got = logits(model, ids)
    with latent_attention(model, factors, recent=window.recent, sinks=window.sinks):
        expected = logits(model, ids)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)
    changed = (got - logits(model, ids)).abs().max()
    assert changed < 1e-4 if window.recent >= 30 else changed > 1e-2


@pytest.mark.parametrize("numbers", [(-1, 0), (0, -2), (1.5, 0), (True, 0)])
def test_windows_are_numbers_of_tokens(numbers):
    with pytest.raises(ValueError, match="expected a number of tokens"):
        Window(*numbers)
