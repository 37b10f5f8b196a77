"""Caches of published systems: bounds of their quantisers, bytes they hold, and the model where nothing is lost."""

import pytest
import tiny
import torch

from bench.evaluation import published
from bench.evaluation.published import DecoLayer, Packed, Prompt, ZipHeads, saliency, zero_point
from lrattn.compression.substitute import substituted
from lrattn.models.interface import cache_argument
from lrattn.models.layers import attention_layers

TOKENS = 150


def prompt_of(model, ids):
    """What attention is given of ids [1, T]."""
    layers = attention_layers(model)
    inputs, heads = {}, {}

    def take(i, *given):
        heads[i] = [x[0] for x in given]
        return given[1:]

    with torch.no_grad(), published.watched(layers, inputs), substituted(model, layers, take):
        model(ids, use_cache=False)
    return layers, Prompt(*zip(*[[*heads[i], inputs[i]] for i in range(len(layers))], strict=True))


@pytest.fixture(scope="module")
def given():
    model, ids = tiny.model("llama"), tiny.tokens(1, TOKENS + 20)
    return model, ids, *prompt_of(model, ids[:, :TOKENS])


def after(model, ids, cache):
    with torch.no_grad():
        return model(ids[:, TOKENS:], **cache_argument(cache)).logits


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_codes_are_packed_and_numbers_within_half_a_step(bits, axis):
    x = torch.randn(37, 19)
    packed = zero_point(x, axis, bits)
    assert packed.codes.dtype == torch.uint8 and packed.codes.shape == (37, -(-19 * bits // 8))
    assert packed.nbytes == packed.codes.numel() + 2 * 2 * (19 if axis == 0 else 37)
    assert ((packed.numbers() - x).abs() <= packed.scale * 0.5 + 4e-3).all()
    whole = Packed.of(torch.tensor([[-3.0, 0.0, 3.0]]), 4, -7, torch.tensor([[1.0]]))
    assert whole.numbers().tolist() == [[-3.0, 0.0, 3.0]]


def test_the_dense_cache_is_the_model_s(given):
    model, ids, layers, prompt = given
    cache = published.dense(layers, model, prompt)
    torch.testing.assert_close(after(model, ids, cache), model(ids).logits[:, TOKENS:], rtol=0, atol=1e-4)
    assert published.nbytes(cache) == 3 * 4 * 128 * (TOKENS + 20)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_decoquant_loses_what_its_codes_lose(bits, given):
    """X = U right, but for half a step of U in each number; bytes are of codes, a scale a row and the factor."""
    model, ids, layers, prompt = given
    layer = DecoLayer(bits)
    k, v = prompt.keys[0][None], prompt.values[0][None]
    layer.update(k, v)
    packed, right, _ = layer._quantized_keys
    u = k[0].transpose(0, 1).reshape(-1, 16) @ torch.linalg.inv(right)
    bound = packed.scale * 0.501 * right.abs().sum(0)
    lost = (layer._dequantize(layer._quantized_keys) - k)[0].transpose(0, 1).reshape(-1, 16).abs()
    assert (lost <= bound + 2e-3).all()
    torch.testing.assert_close(u.T @ u, torch.eye(16), rtol=0, atol=5e-3)
    assert layer.nbytes == 2 * (TOKENS * 128 * bits / 8 + TOKENS * 8 * 2 + 16 * 16 * 2)
    cache = published.decoquant(layers, model, prompt, bits)
    dense = model(ids).logits[:, TOKENS:]
    error = (after(model, ids, cache) - dense).norm() / dense.norm()
    assert error < {8: 0.05, 4: 0.7, 2: 2.0}[bits] and published.nbytes(cache) == 3 * (layer.nbytes + 4 * 128 * 20)


def test_zipcache_errors_are_within_half_a_step(given):
    """Of keys a channel's, of values a token's times its channel's; by twice the bits in salient tokens."""
    model, ids, layers, prompt = given
    q, k, v = prompt.queries[1], prompt.keys[1], prompt.values[1]
    made = ZipHeads.of(k[None], v[None], saliency(q, k))
    assert made.salient.sum() == TOKENS - int(0.4 * TOKENS)
    back = made.heads()
    for s, (got, x, packed) in enumerate(zip(back, (k, v), (made.keys, made.values), strict=True)):
        lost = (got[0] - x).transpose(0, 1).flatten(1).abs()
        for part, at in zip(packed, (made.salient, ~made.salient), strict=True):
            step = part.scale * (made.channels if s else 1.0)
            assert (lost[at] <= step * 0.501 + 5e-3).all()
        assert packed[0].bits == 4 and packed[1].bits == 2 and lost[made.salient].mean() < lost[~made.salient].mean()
    salient, rest = int(made.salient.sum()), int((~made.salient).sum())
    codes = 128 * (salient * 4 + rest * 2) / 8
    assert made.nbytes == 2 * codes + 2 * (4 * 128 + 2 * TOKENS) + 2 * 128 + TOKENS // 8
    cache = published.zipcache(layers, model, prompt)
    assert after(model, ids, cache).isfinite().all()


def test_saliency_is_what_a_token_is_given_over_how_many_see_it():
    """Of uniform attention the first token is given most, and none is more salient than another by standing early."""
    q, k = torch.zeros(2, 40, 8), torch.randn(1, 40, 8)
    found = saliency(q, k)
    rows = torch.cat((torch.randperm(38, generator=torch.Generator().manual_seed(40))[:2], torch.arange(38, 40)))
    want = torch.zeros(40)
    for i in rows.tolist():
        want[: i + 1] += 2 / (i + 1)
    seen = torch.tensor([(rows >= j).sum().item() for j in range(40)])
    torch.testing.assert_close(found, want / seen.clamp_min(1))


def test_commonkv_at_full_rank_is_the_model_where_nothing_is_merged(given):
    """Tokens are the first 4 and the last 128, but for those between, which layers with the same weights agree on."""
    model, ids, _, _ = given
    layers, prompt = prompt_of(model, ids[:, :132])
    cache = published.commonkv(layers, model, prompt, 2.0)
    with torch.no_grad():
        got = model(ids[:, 132:], **cache_argument(cache)).logits
        torch.testing.assert_close(got, model(ids).logits[:, 132:], rtol=0, atol=2e-3)
    assert published.nbytes(cache) == 3 * (2 * 96 * 132 + 4 * 128 * (ids.shape[1] - 132))  # rank E, no token merged
    whole = published.commonkv(layers, model, prompt_of(model, ids)[1], 2.0)
    assert published.nbytes(whole) == 3 * 2 * 96 * (132 + (ids.shape[1] - 132) / 3)  # a third of a row for each layer
