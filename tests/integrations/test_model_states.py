"""Models as people have them: adapted, quantised, offloaded, in other dtypes, trained, wrapped. At full rank each gives
on latents what it gives without, for weights are never read."""

import copy
from contextlib import nullcontext

import architectures
import pytest
import tiny
import torch
import transformers
import uses
from architectures import padded, tokens
from latents import random_factors
from torch import nn
from uses import Reader, assert_equal, check_filled, made

from lrattn.integrations.transformers import LatentCache, latent_attention
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


class Adapted(nn.Module):
    """A Linear layer with an adapter of low rank beside it: neither is named as a model's own."""

    def __init__(self, base, rank=4):
        super().__init__()
        self.base, self.a, self.b = base, nn.Linear(base.in_features, rank), nn.Linear(rank, base.out_features)

    def forward(self, x):
        return self.base(x) + self.b(self.a(x))


class Quantised(nn.Module):
    """A Linear layer in 8 bits with a scale for each output: no floating-point weight to read."""

    def __init__(self, base):
        super().__init__()
        scale = base.weight.detach().abs().amax(1, keepdim=True) / 127
        self.register_buffer("scale", scale)
        self.register_buffer("codes", (base.weight.detach() / scale).round().to(torch.int8))
        self.bias = base.bias

    def forward(self, x):
        return nn.functional.linear(x, self.codes * self.scale, self.bias)


def replaced(model, kind, names=("q_proj", "k_proj", "v_proj", "o_proj", "up_proj")):
    for module in list(model.modules()):
        for name in names:
            if isinstance(getattr(module, name, None), nn.Linear):
                setattr(module, name, kind(getattr(module, name)))
    return model


@pytest.mark.parametrize("architecture", ["Qwen2", "Qwen3"])
@pytest.mark.parametrize("kind", [Adapted, Quantised])
def test_layers_put_in_the_place_of_linear_ones(kind, architecture):
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


def assert_no_worse_than(plain, got, exact):
    """Of 16-bit logits: latents are one more product of the same width."""
    errors = [((x.double() - exact).norm() / exact.norm()).item() for x in (got, plain)]
    assert errors[0] < 2 * errors[1] < 0.2


@torch.no_grad()
@pytest.mark.parametrize("before_rope", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_other_dtypes_are_no_worse_than_sdpa_s(dtype, before_rope):
    wide = architectures.model("Llama", torch.float64)
    model = copy.deepcopy(wide).to(dtype)
    exact = Reader(wide.double()).score(uses.TEXT)
    ropes = uses.ropes(model) if before_rope else None
    factors = random_factors(model, near=(6, 3), ropes=ropes)
    model.set_attn_implementation("sdpa")
    plain = model(uses.TEXT, use_cache=False).logits.flatten(0, 1)
    for cached, chunks in ((False, None), (True, None), (True, uses.CHUNKS)):
        got = Reader(model, factors).score(uses.TEXT, cached=cached, chunks=chunks)
        if dtype == torch.float64:
            assert_equal(got, exact, 1e-6)  # angles of ropes are of float32
        else:
            assert_no_worse_than(plain, got, exact)
    Reader(model, factors).generate(uses.TEXT)


@pytest.mark.parametrize("mode", ["eval", "train", "checkpoints"])
@pytest.mark.parametrize("architecture", ["Qwen2", "Gemma-2"])
def test_gradients_of_every_weight_are_the_untouched_model_s(architecture, mode):
    """Without a cache; k_proj and v_proj have theirs through latents."""
    untouched, latent, factors = made(architecture)
    ids = uses.TEXT
    with latent_attention(latent, factors):
        for model in (untouched, latent):
            model.train(mode != "eval")
            if mode == "checkpoints":
                name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
                getattr(model, f"{name}_checkpointing_enable")()
            model(ids, labels=ids, use_cache=False).loss.backward()
    for (name, want), got in zip(untouched.named_parameters(), latent.parameters()):
        if want.grad is not None:
            assert got.grad is not None, name
            assert (got.grad - want.grad).norm() <= 1e-4 * want.grad.norm(), name
    assert latent.model.layers[0].self_attn.k_proj.weight.grad.norm() > 0


def test_what_a_context_changed_is_as_before_it():
    """Modes, the attention of every part, and which weights cost gradients; after a failure, too."""
    model = architectures.model("Gemma-3, images").train()
    model.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})
    model.get_input_embeddings().weight.requires_grad_(False)
    factors = random_factors(model, near=(6, 3))

    def state():
        configs = [c._attn_implementation for c in (model.config, model.config.text_config, model.config.vision_config)]
        return configs, [m.training for m in model.modules()], [p.requires_grad for p in model.parameters()]

    before = state()
    for stops in (nullcontext(), pytest.raises(ZeroDivisionError)):
        with stops, latent_attention(model, factors):
            model(tokens(1, 8), token_type_ids=torch.zeros(1, 8, dtype=torch.int64))
            assert isinstance(stops, nullcontext) or 1 / 0
        assert state() == before and before[0] == ["sdpa", "eager", "sdpa"]


# ------------------------------------------------------------------------------- classes, and what calls models


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["Qwen2-MoE", "Gemma-3n"])
def test_windows_and_shared_keys_of_models_as_they_are_shipped(architecture):
    """Without windows; none of whose layers slides or all of whose keys are their own."""
    changes = {"Qwen2-MoE": {"use_sliding_window": False}, "Gemma-3n": {"num_kv_shared_layers": 0}}[architecture]
    model = architectures.model(architecture, **changes)
    assert_used_alike(model, random_factors(model, near=(6, 3)))


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
