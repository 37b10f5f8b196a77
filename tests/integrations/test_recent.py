"""A dense window beside the latents: near tokens as the original model sees them, by every way to attend alike."""

from dataclasses import replace

import pytest
import tiny
import torch
from slowly import slow_unless
from transformers import AutoModelForCausalLM

import lrattn
from lrattn.factors.parts import attention_parts
from lrattn.integrations.transformers import LatentCache, latent_attention
from lrattn.integrations.transformers import attention as integration

FAMILIES = tuple(tiny.CONFIGS)
LEAST = {"qwen3": 0.4, "gemma3": 0.4, "mqa": 0.5}  # norm columns, and 16 latents of 32, leave no less
WINDOWS = [(0, 0), (1, 0), (5, 0), (16, 0), (0, 1), (0, 4), (1, 1), (1, 4), (5, 1), (5, 4), (16, 1), (16, 4)]


def compressed(family, keep=None, model=None):
    model = tiny.model(family) if model is None else model
    keep = LEAST.get(family, 0.3) if keep is None else keep
    return model, lrattn.compress(model, [tiny.tokens(4, 40)], "palu", keep, 2, progress=False)


def joint(factors):
    """One row for keys and values: the values' latents ride behind the keys' of their group. The maps are the same."""
    layers = []
    for layer in factors.layers:
        k, v = layer.keys, layer.values
        assert k.groups == v.groups
        ranks = tuple(a + b for a, b in zip(k.ranks, v.ranks, strict=True))
        up = v.up.new_zeros(v.num_heads, max(ranks), v.head_dim)
        for heads, rank, own in zip(v.groups, k.ranks, v.ranks, strict=True):
            up[list(heads), rank : rank + own] = v.up[list(heads), :own]
        down = [x for a, b in zip(k.columns, v.columns, strict=True) for x in (k.down[:, a], v.down[:, b])]
        values = replace(v, up=up, ranks=ranks, down=torch.cat(down, 1))
        layers.append(replace(layer, keys=replace(k, down=None), values=values, shared=True))
    return lrattn.Factors(layers)


def generate(model, ids, **kwargs):
    mask = kwargs.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, attention_mask=mask, do_sample=False, **{"max_new_tokens": 16, **kwargs})


def left_padded(lengths, width):
    ids = tiny.tokens(len(lengths), width)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


@torch.no_grad()
def scored(model, factors, ids, recent, sinks, mask=None):
    with latent_attention(model, factors, recent=recent, sinks=sinks):
        return model(ids, attention_mask=mask, use_cache=False).logits


@torch.no_grad()
def fed(model, factors, ids, chunks, cache, mask=None, backend=None):
    """Logits of chunks run one after the other on a cache."""
    out, end = [], 0
    with latent_attention(model, factors, backend):
        for part in ids.split(chunks, 1):
            end += part.shape[1]
            here = None if mask is None else mask[:, :end]
            out.append(model(part, attention_mask=here, past_key_values=cache).logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_window_over_all_tokens_is_the_original_model(family):
    model, factors = compressed(family)
    ids = tiny.tokens(2, 40)
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(scored(model, factors, ids, 40, 0), expected, rtol=0, atol=1e-4)
    torch.testing.assert_close(scored(model, factors, ids, 0, 40), expected, rtol=0, atol=1e-4)
    assert (scored(model, factors, ids, 0, 0) - expected).abs().max() > 0.3
    tokens = generate(model, ids[:, :20])
    with latent_attention(model, factors, recent=64):
        assert torch.equal(generate(model, ids[:, :20]), tokens)


@pytest.mark.every(3)
@pytest.mark.parametrize("recent, sinks", WINDOWS)
@pytest.mark.parametrize("family", ["llama3", "qwen2-window", "gemma3"])
def test_every_way_to_extend_is_the_scoring_pass(family, recent, sinks, monkeypatch):
    """Token by token, a few at once and, where DECODE_ROWS is small, densely; the second sequence is shorter."""
    model, factors = compressed(family)
    ids, mask = left_padded((36, 33), 36)
    expected = scored(model, factors, ids, recent, sinks, mask)
    live = mask.bool()
    for chunks, rows in (((6, 3, *[1] * 27), 64), ((9, 4, 1, 1, 13, 1, 7), 64), ((6, 9, 1, 2, 18), 4)):
        monkeypatch.setattr(integration, "DECODE_ROWS", rows)
        cache = LatentCache(model, factors, recent=recent, sinks=sinks)
        got = fed(model, factors, ids, chunks, cache, mask)
        torch.testing.assert_close(got[live], expected[live], rtol=0, atol=1e-4)
        assert cache.lengths == [36, 33]
        for b, length in enumerate(cache.lengths):
            held = [t for t in range(length) if t < sinks or t >= length - recent]
            assert cache.window.tokens(0, b)[2].tolist() == held


@pytest.mark.parametrize("family", FAMILIES)
def test_generation_is_that_of_the_scoring_pass(family):
    model, factors = compressed(family)
    ids, mask = left_padded((14, 3, 9), 14)
    with latent_attention(model, factors, recent=5, sinks=2):
        expected = generate(model, ids, attention_mask=mask, use_cache=False)
        got = generate(model, ids, attention_mask=mask, return_dict_in_generate=True)
    assert torch.equal(got.sequences, expected)
    cache = got.past_key_values
    assert (cache.recent, cache.sinks) == (5, 2) and ", recent=5, sinks=2)" in repr(cache)
    with latent_attention(model, factors):
        assert not torch.equal(generate(model, ids, attention_mask=mask), expected)  # the window does show


def test_one_row_for_keys_and_values_has_a_window_too():
    model, factors = compressed("qwen2")
    shared, ids = joint(factors), tiny.tokens(2, 30)
    expected = scored(model, factors, ids, 5, 2)
    torch.testing.assert_close(scored(model, shared, ids, 5, 2), expected, rtol=0, atol=1e-4)
    got = fed(model, shared, ids, (9, 1, 1, 4, 15), LatentCache(model, shared, recent=5, sinks=2))
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "family, recent, sinks",
    slow_unless([("gemma3", 5, 2)], [("gemma3", 5, 2), ("gemma3", 16, 0), ("qwen2-window", 5, 2)]),
)
def test_the_kernels_attend_to_the_far_part(family, recent, sinks, request):
    if request.config.getoption("--gpu"):
        pytest.skip("the model is on the CPU, where kernels are interpreted only")
    model, factors = compressed(family)
    ids, mask = left_padded((14, 3), 14)
    expected, got = (
        fed(model, factors, ids, (9, 3, 1, 1), LatentCache(model, factors, recent=recent, sinks=sinks), mask, backend)
        for backend in ("reference", "triton")
    )
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_beams_take_their_windows_along(family):
    model, factors = compressed(family)
    ids, mask = left_padded((12, 4), 12)
    choice = {"attention_mask": mask, "num_beams": 3, "num_return_sequences": 2}
    with latent_attention(model, factors, recent=5, sinks=2):
        assert torch.equal(generate(model, ids, **choice), generate(model, ids, use_cache=False, **choice))


def test_sampling_is_that_of_the_scoring_pass():
    model, factors = compressed("llama")
    ids, mask = left_padded((9, 4), 9)
    choice = {"attention_mask": mask, "do_sample": True, "max_new_tokens": 12, "num_return_sequences": 2}
    drawn = []
    with latent_attention(model, factors, recent=4, sinks=1):
        for use_cache in (True, False):
            torch.manual_seed(3)
            drawn.append(model.generate(ids, use_cache=use_cache, **choice))
    assert torch.equal(*drawn)


def test_repeated_and_selected_sequences_go_on_with_their_windows():
    model, factors = compressed("llama")
    ids = tiny.tokens(2, 21)
    expected = scored(model, factors, ids, 5, 2)[:, -1:]
    cache = LatentCache(model, factors, recent=5, sinks=2)
    fed(model, factors, ids[:, :-1], 7, cache)
    cache.batch_repeat_interleave(2)
    got = fed(model, factors, ids[:, -1:].repeat_interleave(2, 0), 1, cache)
    torch.testing.assert_close(got, expected.repeat_interleave(2, 0), rtol=0, atol=1e-4)
    cache.crop(-1)
    cache.batch_select_indices(torch.tensor([3, 0]))
    got = fed(model, factors, ids[[1, 0], -1:], 1, cache)
    torch.testing.assert_close(got, expected[[1, 0]], rtol=0, atol=1e-4)
    cache.reset()
    assert cache.nbytes == 0
    got = fed(model, factors, ids[:1], 7, cache)[:, -1:]
    torch.testing.assert_close(got, expected[:1], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family, rows", [("llama", 1), ("qwen3", 1), ("qwen2", 2)])
def test_after_a_crop_the_window_refills_as_tokens_come(family, rows):
    """In a model of one layer, keys depend on their token alone: with r of n tokens forgotten, the window begins where
    it began, and is as long as it was r - 1 tokens later (what is near is its own token, too)."""
    torch.manual_seed(0)
    config = tiny.CONFIGS[family].to_dict() | {"num_hidden_layers": 1, "layer_types": None}
    model = AutoModelForCausalLM.from_config(type(tiny.CONFIGS[family])(**config)).eval()
    with torch.no_grad():
        for part in attention_parts(model):
            for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
                part.linear(name).weight.normal_(std=0.25)
    model, factors = compressed(family, model=model)
    factors = joint(factors) if rows == 2 else factors
    ids, recent, sinks = tiny.tokens(2, 40), 8, 2
    by_length = {n: scored(model, factors, ids, n, sinks) for n in range(1, recent + 1)}
    for removed in (1, 2, 5, 12):
        cache = LatentCache(model, factors, recent=recent, sinks=sinks)
        fed(model, factors, torch.cat((ids[:, : 30 - removed], tiny.tokens(2, removed, seed=9)), 1), 11, cache)
        for part in filter(None, (removed // 2, removed - removed // 2)):  # crop(0) is of a length in release 5.5
            cache.crop(-part)
        start = cache.lengths[0]
        got = fed(model, factors, ids[:, start:], 1, cache)
        for k in range(40 - start):
            near = min(recent, max(recent - removed + 1, 1) + k)
            torch.testing.assert_close(got[:, k], by_length[near][:, start + k], rtol=0, atol=1e-4)
        assert not torch.allclose(by_length[8][:, start], by_length[4][:, start], atol=1e-2)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_what_a_crop_leaves_in_the_window_is_exact(family):
    model, factors = compressed(family)
    ids = tiny.tokens(2, 40)
    with torch.no_grad():
        expected = model(ids).logits[:, 20:]
    cache = LatentCache(model, factors, recent=64)
    fed(model, factors, torch.cat((ids[:, :20], ids[:, :12]), 1), (20, 4, 8), cache)
    cache.crop(-12)
    torch.testing.assert_close(fed(model, factors, ids[:, 20:], (3, 17), cache), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("keep, recent", [(1.0, 4), (0.3, 64)])
def test_prompt_lookup_crops_and_goes_on(keep, recent):
    """Where far tokens are exact too, or none is far, refilled windows leave the original model's tokens."""
    model, factors = compressed("llama", keep)
    ids = tiny.tokens(1, 6).repeat(1, 5)
    never = model.config.vocab_size  # release 5.5 looks prompts up for models with an end of text only
    expected = generate(model, ids, eos_token_id=never)
    with latent_attention(model, factors, recent=recent, sinks=2):
        assert torch.equal(generate(model, ids, prompt_lookup_num_tokens=3, eos_token_id=never), expected)


def test_bytes_are_those_of_the_latents_and_the_window():
    model, factors = compressed("qwen3")
    plain, cache = LatentCache(model, factors), LatentCache(model, factors, recent=20, sinks=3)
    for held in (plain, cache):
        fed(model, factors, tiny.tokens(2, 64), 16, held)
    dense = 3 * 2 * 4 * 32 * 4  # 3 layers, keys and values, 4 heads of 32 numbers of 4 bytes
    assert cache.nbytes - plain.nbytes == 2 * 23 * (dense + 4)  # and which token is in a slot


def test_a_growing_window_moves_seldom_and_holds_little_more_than_needed():
    model, factors = compressed("llama")
    ids = tiny.tokens(1, 200)
    cache = LatentCache(model, factors, recent=10_000)
    places = set()
    with torch.no_grad(), latent_attention(model, factors):
        for t in range(200):
            model(ids[:, t : t + 1], past_key_values=cache)
            places.add(cache.window.at.shape[1])
    assert 200 <= max(places) <= 225 and len(places) < 60


def test_a_pass_that_fails_leaves_the_window_as_it_was():
    model, factors = compressed("llama")
    ids = tiny.tokens(1, 30)
    cache = LatentCache(model, factors, recent=4, sinks=1)
    expected = scored(model, factors, ids, 4, 1)
    got = [fed(model, factors, ids[:, :20], 10, cache)]
    handle = attention_parts(model)[1].linear("o_proj").register_forward_pre_hook(lambda *_: 1 / 0)
    for failing in (ids[:, :7], ids[:, :1]):
        with pytest.raises(ZeroDivisionError):
            fed(model, factors, failing, 7, cache)
    handle.remove()
    with torch.inference_mode():
        got.append(fed(model, factors, ids[:, 20:25], 1, cache))
    with latent_attention(model, factors):
        got.append(model(ids[:, 25:], past_key_values=cache).logits)  # gradients on: none are held
    assert not any(x.requires_grad or x.is_inference() for x in cache.window.tensors)
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=0, atol=1e-4)


def test_a_cache_that_is_given_has_its_own_window():
    model, factors = compressed("llama")
    ids = tiny.tokens(1, 20)
    with torch.no_grad():
        original = model(ids).logits
        with latent_attention(model, factors, recent=20):
            plain = model(ids, past_key_values=LatentCache(model, factors)).logits
        with latent_attention(model, factors):
            exact = model(ids, past_key_values=LatentCache(model, factors, recent=20)).logits
    torch.testing.assert_close(exact, original, rtol=0, atol=1e-4)
    torch.testing.assert_close(plain, scored(model, factors, ids, 0, 0), rtol=0, atol=1e-5)


def test_the_window_has_the_model_s_dtype():
    model, factors = compressed("llama", model=tiny.model("llama", dtype=torch.bfloat16))
    ids = tiny.tokens(1, 24)
    cache = LatentCache(model, factors, recent=6, sinks=1)
    got = fed(model, factors, ids, (8, *[1] * 16), cache)
    assert {x.dtype for x in (*cache.window.k, *cache.window.v)} == {torch.bfloat16}
    exact = scored(tiny.model("llama").double(), factors.to(dtype=torch.float64), ids, 6, 1)
    rounded = scored(model, factors, ids, 6, 1)
    error, allowed = ((x.double() - exact).square().mean().sqrt() for x in (got, rounded))
    assert error <= 2 * allowed


@pytest.mark.parametrize("name", ["recent", "sinks"])
@pytest.mark.parametrize("value", [-1, 1.5, "4"])
def test_what_is_no_number_of_tokens_is_refused(name, value):
    model, factors = compressed("llama")
    with pytest.raises(ValueError, match=f"{name}: expected an integer from 0"):
        LatentCache(model, factors, **{name: value})
    with (
        pytest.raises(ValueError, match=f"{name}: expected an integer from 0"),
        latent_attention(model, factors, **{name: value}),
    ):
        pass
