"""Wrong uses raise at once, in one line that says what to write; and what only looks wrong works."""

import warnings

import architectures
import pytest
import torch
import transformers
from architectures import padded, tokens
from uses import KEYS, assert_equal, made

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


CACHES = {  # of which latents get into none
    "none": lambda config: None,
    "dynamic": lambda config: transformers.DynamicCache(),
    "of the config": lambda config: transformers.DynamicCache(config=config),
    "static": lambda config: transformers.StaticCache(config=config, max_cache_len=20),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("cache", CACHES)
def test_no_latent_cache_where_the_attention_needs_one(cache, call):
    """ "lrattn" always does; an attention of given factors where one pass follows another."""
    _, latent, factors = made()

    def refused():
        given = {} if cache == "none" else cache_argument(CACHES[cache](latent.config))
        return A_CACHE in said_by(lambda: CALLS[call](latent, **given))

    assert refused()
    if call in ("generate", "beams"):
        latent.set_attn_implementation(bind(factors))
        assert refused()
        with latent_attention(latent, factors):
            assert refused()


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


def test_what_attention_on_latents_cannot_do():
    _, latent, factors = made()
    attend, module = transformers.AttentionInterface()["lrattn"], latent.model.layers[0].self_attn
    q, k = torch.randn(1, 4, 5, 16), torch.randn(1, 2, 5, 16)
    keys, values = LatentCache(factors).update(k, k, 0)
    given = {"output_attentions": True, **cache_argument(LatentCache(factors))}
    for told, run in {
        "position_bias: expected none in": lambda: attend(module, q, keys, values, None, position_bias=q),
        "values: expected those that the cache returned": lambda: attend(module, q, keys, values * 2, None),
        "output_attentions: expected False where": lambda: latent(IDS, **given),
    }.items():
        assert told in said_by(run)


def test_something_that_is_no_factors():
    _, latent, factors = made()
    for wrong in (factors.layers[0], "factors.safetensors", None):
        for run in (LatentCache, bind, lambda x: latent_attention(latent, x).__enter__()):
            assert "factors: expected Factors" in said_by(lambda run=run, wrong=wrong: run(wrong))


@pytest.mark.parametrize(
    "options", [{"recent": -1}, {"sinks": -1}, {"recent": 2.5}, {"sinks": True}, {"backend": "cuda"}], ids=str
)
def test_windows_and_backends_that_are_none(options):
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
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize("name, untold", [("Llama", False), ("Llama-4", True), ("Qwen2.5-VL", True)])
def test_attention_that_is_not_told_every_position_warns_once(name, untold, keys):
    """Where keys are turned back from them: that of Llama-4 is told none, that of Qwen2.5-VL none or one of four."""
    _, latent, factors = made(name, keys)
    ids, mask = padded((12, 5), "left")
    for expected, run in (
        (untold and keys != "as given", lambda given: latent.generate(IDS, max_new_tokens=10, **given)),  # > a chunk
        (0, lambda given: latent(ids, attention_mask=mask, **given)),
    ):
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            run(cache_argument(LatentCache(factors)))
        told = [str(x.message) for x in found if "position_ids" in str(x.message)]
        assert len(told) == expected
        assert all(line.endswith("factors of method 'lrattn-rotated' turn none") for line in told)


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
