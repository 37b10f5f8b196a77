"""Models as people have them: adapted, quantised, offloaded, in other dtypes, trained, wrapped. At full rank each gives
on latents what it gives without, for weights are never read."""

import copy

import architectures
import pytest
import tiny
import torch
import transformers
import uses
from architectures import padded, tokens
from latents import random_factors
from projections import Adapted, Quantised, merged, replaced
from torch import nn
from uses import Reader, assert_equal, check_filled, made

from lrattn.integrations.transformers import LatentCache, bind, latent_attention
from lrattn.models.interface import cache_argument


def assert_used_alike(model, factors, of_untouched=None):
    """Scoring with padding, without a cache and with one, and generation; of_untouched: a model to compare with."""
    ids, mask = padded((20, 7), "left")
    found = []
    for reader in (Reader(of_untouched or model), Reader(model, factors)):
        found.append([reader.score(ids, mask), reader.score(ids, mask, cached=True), reader.generate(ids, mask)])
    for got, want in zip(found[1], found[0]):
        assert_equal(got, want)


# ------------------------------------------------------------------------------ weights that are not nn.Linear's


@pytest.mark.every(3)
@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3"])
@pytest.mark.parametrize("kind", [Adapted, merged, Quantised])
def test_weights_that_were_adapted_or_quantised(kind, architecture):
    """As by LoRA and by every library of quantised weights; factors made before, and after."""
    model = architectures.model(architecture)
    before = random_factors(model, near=(6, 3))
    replaced(model, kind)
    assert_used_alike(model, before)
    assert_used_alike(model, random_factors(model, near=(6, 3)))


@pytest.mark.parametrize("to", ["memory", "a folder"])
def test_offloaded_weights(to, tmp_path):
    """Parameters are on the meta device between the passes of a layer."""
    accelerate = pytest.importorskip("accelerate")
    untouched, latent, factors = made()
    if to == "memory":
        accelerate.cpu_offload(latent, execution_device="cpu")
    else:
        accelerate.disk_offload(latent, str(tmp_path), execution_device="cpu")
    assert all(p.is_meta for p in latent.parameters())
    assert_used_alike(latent, factors, untouched)


def test_a_model_that_was_copied_or_saved_under_lrattn(tmp_path):
    untouched, latent, factors = made()
    assert_used_alike(copy.deepcopy(latent), factors, untouched)
    latent.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="lrattn")
    ids, cache = tokens(2, 20), LatentCache(factors)
    with torch.no_grad():
        got = loaded(ids, **cache_argument(cache)).logits
    assert_equal(got.flatten(0, 1), Reader(untouched).score(ids))
    check_filled(cache, 20)


# ------------------------------------------------------------------------------------------ dtypes and gradients


@pytest.mark.every(3)
@torch.no_grad()
@pytest.mark.parametrize("keys", uses.KEYS)
@pytest.mark.parametrize("dtype", ["autocast", torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_no_worse_than_sdpa_s(dtype, keys):
    wide = architectures.model("Llama", torch.float64)
    exact = Reader(wide).score(uses.TEXT)
    model = copy.deepcopy(wide).to(torch.float32 if dtype == "autocast" else dtype)
    ropes = uses.ropes(wide)  # whose frequencies no cast has rounded
    factors = random_factors(model, near=(6, 3), **uses.form(keys, ropes))
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"):
        model.set_attn_implementation("sdpa")
        plain = model(uses.TEXT, use_cache=False).logits.flatten(0, 1)
        allowed = 2 * (plain - exact).norm() + 1e-6 * exact.norm()  # angles of ropes are of float32
        assert allowed < 0.2 * exact.norm()
        for cached, chunks in ((False, None), (True, None), (True, uses.CHUNKS)):
            got = Reader(model, factors).score(uses.TEXT, cached=cached, chunks=chunks)
            assert got.dtype == plain.dtype and (got - exact).norm() < allowed
        Reader(model, factors).generate(uses.TEXT)


@pytest.mark.parametrize("mode", ["eval", "a first pass on a cache", "train", "checkpoints"])
@pytest.mark.parametrize("architecture", ["Qwen2", "Gemma-2"])
def test_gradients_of_every_weight_are_the_untouched_model_s(architecture, mode):
    """k_proj and v_proj have theirs through latents."""
    untouched, latent, factors = made(architecture)
    ids = uses.TEXT
    with latent_attention(latent, factors):
        for model in (untouched, latent):
            model.train(mode in ("train", "checkpoints"))
            if mode == "checkpoints":
                name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
                getattr(model, f"{name}_checkpointing_enable")()
            cached = model is latent and "cache" in mode
            given = cache_argument(LatentCache(factors)) if cached else {"use_cache": False}
            model(ids, labels=ids, **given).loss.backward()
    for (name, want), got in zip(untouched.named_parameters(), latent.parameters()):
        if want.grad is not None:
            assert got.grad is not None, name
            assert (got.grad - want.grad).norm() <= 1e-4 * want.grad.norm(), name
    assert latent.model.layers[0].self_attn.k_proj.weight.grad.norm() > 0


# ------------------------------------------------------------------------------- classes, and what calls models


@torch.no_grad()
@pytest.mark.parametrize("near", uses.NEARS, ids=str)
def test_texts_with_images(near):
    """Of the class that AutoModelForCausalLM makes of a Gemma-3: tokens of an image see one another."""
    untouched, latent, factors = made("Gemma-3, images", near=near)
    assert type(transformers.AutoModelForCausalLM.from_config(untouched.config)) is type(untouched)
    inputs = architectures.with_image()
    want = untouched(**inputs, use_cache=False).logits
    blind = untouched(**inputs | {"token_type_ids": inputs["token_type_ids"] * 0}, use_cache=False).logits
    assert (blind - want).norm() > 0.02 * want.norm()
    assert_equal(latent(**inputs, **cache_argument(LatentCache(factors))).logits, want)
    with latent_attention(latent, factors):
        assert_equal(latent(**inputs).logits, want)
    cache = LatentCache(factors)
    got = latent.generate(**inputs, max_new_tokens=8, **cache_argument(cache))
    assert_equal(got, untouched.generate(**inputs, max_new_tokens=8))
    check_filled(cache, 31)


def test_a_rope_that_changes_with_the_length():
    """LongRoPE, of Phi-3: it throws its cache away where a text outgrows the first range, and says so; a longer prompt
    is served as any other."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
    lengths = {"original_max_position_embeddings": 32, "factor": 16.0}
    untouched, latent, factors = made("Phi-3", rope_parameters=rope | lengths, original_max_position_embeddings=32)
    assert_used_alike(latent, factors, untouched)
    for length in (12, 40):
        ids = tokens(2, length)
        assert_equal(Reader(latent, factors).generate(ids), Reader(untouched).generate(ids))
    with pytest.raises(ValueError, match="LatentCache"):
        Reader(latent, factors).generate(tokens(2, 28))


@torch.no_grad()
def test_bare_models_heads_and_wrappers():
    """A model without a head, a reward model, and DataParallel where there is no GPU."""
    untouched, latent, factors = made("Llama")
    ids, bare = tokens(2, 20), untouched.model
    want = bare(ids, use_cache=False).last_hidden_state
    assert_equal(latent.model(ids, **cache_argument(LatentCache(factors))).last_hidden_state, want)
    with latent_attention(bare, factors):
        assert_equal(bare(ids).last_hidden_state, want)
    reward = transformers.AutoModelForSequenceClassification.from_config(untouched.config).eval()
    reward.model.load_state_dict(untouched.model.state_dict())
    reward.set_attn_implementation("eager")
    want = reward(ids, use_cache=False).logits
    with latent_attention(reward, factors):
        assert_equal(reward(ids).logits, want)
        assert_equal(nn.DataParallel(reward)(input_ids=ids).logits, want)
    reward.set_attn_implementation("lrattn")
    assert_equal(reward(ids, **cache_argument(LatentCache(factors))).logits, want)


@torch.no_grad()
def test_encoders_attend_as_they_do():
    """Modules that are not causal have no latents."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    encoder = transformers.AutoModel.from_config(transformers.BertConfig(vocab_size=160, **sizes)).eval()
    (ids, mask), found = padded((12, 5), "left"), []
    for name in ("sdpa", "lrattn", bind(made()[2])):
        encoder.set_attn_implementation(name)
        found.append(encoder(ids, attention_mask=mask).last_hidden_state[mask.bool()])
    assert_equal(found[1], found[0])
    assert_equal(found[2], found[0])


@torch.no_grad()
def test_embeddings_given_in_the_place_of_tokens():
    """As prompt tuning does."""
    untouched, latent, factors = made()
    given = {"inputs_embeds": torch.cat((torch.randn(2, 5, 64), untouched.get_input_embeddings()(tokens(2, 15))), 1)}
    want = untouched(**given, use_cache=False).logits
    assert_equal(latent(**given, **cache_argument(LatentCache(factors))).logits, want)
    options = {"attention_mask": torch.ones(2, 20, dtype=torch.int64), "max_new_tokens": 8}
    got = latent.generate(**given, **options, **cache_argument(LatentCache(factors)))
    assert_equal(got, untouched.generate(**given, **options))


def test_the_pipeline_of_transformers(tmp_path):
    """Its generate is given the cache, one for each text."""
    tiny.save(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    factors = random_factors(model, near=(6, 3))
    ask = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
    chat = [{"role": "user", "content": "Of what is a window made?"}]
    found = {}
    for name in ("eager", "lrattn"):
        model.set_attn_implementation(name)
        for i, text in enumerate(("Once upon a time", chat)):
            cache = LatentCache(factors)
            more = cache_argument(cache) if name == "lrattn" else {}
            found[name, i] = ask(text, max_new_tokens=12, do_sample=False, **more)
            assert name == "eager" or cache.get_seq_length() > 20
    assert found["lrattn", 0] == found["eager", 0] and found["lrattn", 1] == found["eager", 1]


@pytest.mark.parametrize("architecture", ["Qwen2", "Gemma-3"])
def test_the_calls_of_an_evaluation_harness(architecture):
    """Those of lm-eval's HFLM: texts padded on the right without a mask; and generation on options that are copied."""
    untouched, latent, factors = made(architecture)
    rows = [tokens(1, n, seed=n)[0] for n in (25, 10, 30, 12)]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)
    with torch.no_grad(), latent_attention(latent, factors):
        for row, got, want in zip(rows, latent(ids).logits, untouched(ids).logits, strict=True):
            assert_equal(got[: len(row)], want[: len(row)])
    (ids, mask), cache = padded((30, 11, 4), "left"), cache_argument(LatentCache(factors))
    for _ in range(2):
        want, got = (
            model.generate(ids, attention_mask=mask, max_length=40, use_cache=True, **options)
            for model, options in ((untouched, {}), (latent, copy.deepcopy(cache)))
        )
        assert_equal(got, want)
