"""Wrong uses raise at once, in one line that says what to write; and what only looks wrong works."""

import warnings

import architectures
import pytest
import torch
import transformers
from architectures import padded, tokens
from uses import assert_equal, made

from lrattn.integrations.transformers import LatentCache, bind, latent_attention
from lrattn.models.interface import cache_argument
from lrattn.models.layers import attention_layers

IDS = tokens(2, 12)
(NAME,) = cache_argument(None)
A_CACHE = f"{NAME}: expected a LatentCache where a model attends on latents: pass {NAME}=LatentCache(factors), "
THE_ATTENTION = "call model.set_attn_implementation('lrattn') first"


def said_by(run):
    """What a wrong use raises: a line."""
    with torch.no_grad(), pytest.raises(ValueError) as raised:
        run()
    said = str(raised.value)
    assert "\n" not in said and 20 < len(said) < 300, said
    return said


CALLS = {
    "scoring": lambda model, **given: model(IDS, **given),
    "scoring without a cache": lambda model, **given: model(IDS, **given | {"use_cache": False}),
    "generate": lambda model, **given: model.generate(IDS, max_new_tokens=3, **given),
    "beams": lambda model, **given: model.generate(IDS, max_new_tokens=3, num_beams=2, **given),
}


@pytest.mark.parametrize("call", CALLS)
def test_no_cache_where_the_attention_needs_one(call):
    _, latent, _ = made()
    assert A_CACHE in said_by(lambda: CALLS[call](latent))


@pytest.mark.parametrize("call", ["generate", "beams"])
def test_no_cache_where_a_bound_attention_goes_on(call):
    _, latent, factors = made()
    latent.set_attn_implementation(bind(factors))
    assert A_CACHE in said_by(lambda: CALLS[call](latent))
    with latent_attention(latent, factors):
        assert A_CACHE in said_by(lambda: CALLS[call](latent))


@pytest.mark.parametrize("call", ["scoring", "generate"])
@pytest.mark.parametrize("kind", ["dynamic", "of the config", "static"])
def test_another_kind_of_cache(kind, call):
    """One that a pass is given, and that latents would never get into."""
    _, latent, _ = made()
    cache = {
        "dynamic": lambda: transformers.DynamicCache(),
        "of the config": lambda: transformers.DynamicCache(config=latent.config),
        "static": lambda: transformers.StaticCache(config=latent.config, max_cache_len=20),
    }[kind]()
    assert A_CACHE in said_by(lambda: CALLS[call](latent, **cache_argument(cache)))


@torch.no_grad()
def test_a_bound_attention_goes_on_from_no_other_cache():
    """Without a LatentCache a pass sees its own columns alone: another that follows on it is refused."""
    untouched, latent, factors = made()
    with latent_attention(latent, factors):
        cache = transformers.DynamicCache()
        latent(IDS, **cache_argument(cache))
        assert A_CACHE in said_by(lambda: latent(IDS[:, :1], **cache_argument(cache)))
        assert A_CACHE in said_by(lambda: latent(IDS, **cache_argument(cache)))
        new = LatentCache(factors)  # and with one it goes on
        got = [latent(part, **cache_argument(new)).logits for part in IDS.split((7, 1, 4), 1)]
    assert_equal(torch.cat(got, 1), untouched(IDS, use_cache=False).logits)


@pytest.mark.parametrize("call", ["scoring", "generate", "beams"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_latent_cache_under_another_attention(attention, call):
    untouched, _, factors = made()
    untouched.set_attn_implementation(attention)
    cache = LatentCache(factors)
    assert THE_ATTENTION in said_by(lambda: CALLS[call](untouched, **cache_argument(cache)))
    assert cache.get_seq_length() == 0


def test_something_that_is_no_factors():
    _, latent, factors = made()
    for wrong in (factors.layers[0], "factors.safetensors", None):
        for run in (LatentCache, bind, lambda x: latent_attention(latent, x).__enter__()):
            assert "factors: expected Factors" in said_by(lambda run=run, wrong=wrong: run(wrong))


@pytest.mark.parametrize("options", [{"recent": -1}, {"sinks": -1}, {"recent": 2.5}, {"sinks": True}], ids=str)
def test_windows_that_are_none(options):
    _, latent, factors = made()
    (name,) = options
    for run in (LatentCache, bind, lambda x, **o: latent_attention(latent, x, **o).__enter__()):
        assert said_by(lambda run=run: run(factors, **options)).startswith(f"{name}: expected ")


def test_a_second_question_on_a_full_cache():
    """generate counts what a cache holds as a part of its prompt: a shorter one is as wrong as with any cache."""
    untouched, latent, factors = made()
    found = []
    for model, cache in ((untouched, transformers.DynamicCache()), (latent, LatentCache(factors))):
        CALLS["generate"](model, **cache_argument(cache))
        with pytest.raises(Exception) as raised:  # whatever this release raises
            model.generate(tokens(2, 5), max_new_tokens=3, **cache_argument(cache))
        found.append(raised.type)
    assert found[0] is found[1]


@torch.no_grad()
@pytest.mark.parametrize("keys", ["as given", "before RoPE"])
def test_padding_where_attention_is_told_no_positions_warns(keys):
    """And nothing else does: texts without padding, and keys that are not turned back."""
    _, latent, factors = made("Llama-4", keys)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        latent.generate(IDS, max_new_tokens=10, **cache_argument(LatentCache(factors)))  # beyond a chunk
        assert not [x for x in found if "position_ids" in str(x.message)]
        ids, mask = padded((12, 5), "left")
        latent(ids, attention_mask=mask, **cache_argument(LatentCache(factors)))
    told = [str(x.message) for x in found if "position_ids: attention of this model is told none" in str(x.message)]
    assert bool(told) == (keys == "before RoPE") and all("'lrattn-rotated' turn none" in line for line in told)


OF_ANOTHER_KIND = {  # attention without transformers' interface, states beside keys and values
    "Bloom": {"vocab_size": 160, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    "Lfm2": architectures.SIZES | {"layer_types": ["conv", "full_attention", "conv"]},
}


@pytest.mark.parametrize("kind", OF_ANOTHER_KIND)
def test_models_that_cannot_attend_on_latents(kind):
    """They are refused before there are factors, and with the factors of another."""
    config = getattr(transformers, f"{kind}Config")(**OF_ANOTHER_KIND[kind], **architectures.TOKENS)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    assert said_by(lambda: attention_layers(model)).startswith("model: expected ")
    *_, factors = made()
    said_by(lambda: model(IDS, **cache_argument(LatentCache(factors))))


@torch.no_grad()
def test_scores_with_a_bias_of_their_own():
    """T5's, by position: refused, or left to T5 in releases where its attention is its own. Never left out."""
    config = transformers.T5Config(vocab_size=160, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config).eval()
    *_, factors = made(num_hidden_layers=2)
    given = {"input_ids": IDS, "decoder_input_ids": IDS, "use_cache": False}
    want = model(**given).logits
    try:
        with latent_attention(model, factors):
            assert_equal(model(**given).logits, want)
    except ValueError as error:
        assert "model: expected" in str(error) or "position_bias" in str(error)
