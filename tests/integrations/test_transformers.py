"""A model on latents against the simulated model: its weights replaced by their low-rank product, ordinary cache."""

import copy
from dataclasses import replace

import pytest
import tiny
import torch
import transformers
from transformers import DynamicCache, GenerationConfig

import lrattn
from lrattn.factors.parts import attention_parts
from lrattn.integrations.transformers import LatentCache, latent_attention
from lrattn.integrations.transformers import attention as integration
from lrattn.integrations.transformers import cache as latent_cache
from lrattn.integrations.transformers.naming import as_argument

FAMILIES = tuple(tiny.CONFIGS)


def compressed(family, keep=0.5, seed=0, dtype=torch.float32, method="palu", shared=None):
    model = tiny.model(family, seed, dtype)
    return model, lrattn.compress(
        model, [tiny.tokens(4, 40)], method, keep, 2, shared=shared, far=(0, 0), progress=False
    )


@torch.no_grad()
def simulated(model, factors):
    twin = copy.deepcopy(model)
    for part, layer in zip(attention_parts(twin), factors.layers, strict=True):
        for name, side in zip(("k_proj", "v_proj"), layer.sides, strict=True):
            part.linear(name).weight.copy_(side.dense().flatten(0, 1))
    return twin


def generate(model, ids, **kwargs):
    mask = kwargs.pop("attention_mask", torch.ones_like(ids))
    return model.generate(ids, **{"attention_mask": mask, "do_sample": False, "max_new_tokens": 24, **kwargs})


def left_padded(lengths, width=20):
    ids = tiny.tokens(len(lengths), width)
    mask = (torch.arange(width) >= width - torch.tensor(lengths)[:, None]).long()
    return ids * mask, mask


@pytest.mark.parametrize("shared", [None, False, "ride", True])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_those_of_the_simulated_model(family, shared):
    choice = {} if shared is None else {"method": "lrattn", "shared": shared, "keep": 0.5}
    model, factors = compressed(family, **choice)
    twin, ids = simulated(model, factors), tiny.tokens(1, 20)
    expected = generate(twin, ids, output_logits=True, return_dict_in_generate=True)
    with latent_attention(model, factors):
        got = generate(model, ids, output_logits=True, return_dict_in_generate=True)
    assert torch.equal(got.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(expected.logits), rtol=0, atol=1e-4)
    if shared is None:
        assert not torch.equal(got.sequences, generate(model, ids)) or family == "gemma3"  # half the bytes do show
    assert isinstance(got.past_key_values, LatentCache)


@pytest.mark.parametrize("family", ["qwen2", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_the_kernels_generate_the_same_tokens(family, request):
    """Interpreted: writing, decoding and, in the second half, rebuilding cached tokens for a long run."""
    if request.config.getoption("--gpu"):
        pytest.skip("the model is on the CPU, where kernels are interpreted only")
    model, factors = compressed(family)
    ids, longer = tiny.tokens(2, 12), tiny.tokens(1, 30, seed=5)
    runs, options = {}, {"max_new_tokens": 6, "output_logits": True, "return_dict_in_generate": True}
    for backend in ("reference", "triton"):
        cache = LatentCache(model, factors)
        with latent_attention(model, factors, backend=backend):
            out = generate(model, ids, past_key_values=cache, **options)
            with torch.no_grad():
                model(longer[:, :3], past_key_values=(single := LatentCache(model, factors)))
                appended = model(longer[:, 3:].repeat(1, 3), past_key_values=single).logits
        runs[backend] = out.sequences, torch.stack(out.logits), appended
    (tokens, *rest), (expected, *others) = runs["triton"], runs["reference"]
    assert torch.equal(tokens, expected) and tokens.shape == (2, 18)
    for got, want in zip(rest, others):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_with_left_padding_give_the_same_tokens(family):
    model, factors = compressed(family)
    twin = simulated(model, factors)
    ids, mask = left_padded((20, 3, 11))
    expected = generate(twin, ids, attention_mask=mask)
    cache = LatentCache(model, factors)
    with latent_attention(model, factors):
        got = generate(model, ids, attention_mask=mask, past_key_values=cache)
        alone = [generate(model, row[-n:][None])[0, n:] for row, n in zip(ids, (20, 3, 11))]
    assert torch.equal(got, expected)
    assert torch.equal(got[:, 20:], torch.stack(alone))
    assert cache.lengths == [20 + 23, 3 + 23, 11 + 23]  # no padding; the last token is never fed back


@pytest.mark.parametrize("family", FAMILIES)
def test_full_rank_is_the_original_model(family):
    model, factors = compressed(family, keep=1.0)
    ids = tiny.tokens(2, 30)
    with torch.no_grad():
        expected = model(ids).logits
    tokens = generate(model, ids)
    with torch.no_grad(), latent_attention(model, factors):
        for use_cache in (True, False):
            torch.testing.assert_close(model(ids, use_cache=use_cache).logits, expected, rtol=0, atol=1e-3)
        assert torch.equal(generate(model, ids), tokens)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_a_saved_record_generates_the_same(family, tmp_path):
    model, factors = compressed(family)
    factors.save(tmp_path / "f.safetensors")
    with latent_attention(model, factors):
        expected = generate(model, tiny.tokens(1, 9))
    with latent_attention(model, lrattn.Factors.load(tmp_path / "f.safetensors")):
        assert torch.equal(generate(model, tiny.tokens(1, 9)), expected)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3", "gemma3"])
@pytest.mark.parametrize("chunks", [(30, 1, 9), (1, 39), (20, 20), (5, 5, 30)])
def test_chunks_of_any_size_give_one_result(family, chunks, monkeypatch):
    """Decode, dense extension and prefill are the same attention; both ways of extending are taken."""
    model, factors = compressed(family)
    ids = tiny.tokens(2, 40)
    ways = set()
    for name in ("_decode", "_extend"):
        original = getattr(integration._Forward, name)
        monkeypatch.setattr(integration._Forward, name, lambda *given, o=original, n=name: ways.add(n) or o(*given))
    monkeypatch.setattr(integration, "DECODE_ROWS", 16)
    cache = LatentCache(model, factors)
    with torch.no_grad(), latent_attention(model, factors):
        expected = model(ids, use_cache=False).logits
        assert not ways
        got = [model(part, past_key_values=cache).logits for part in ids.split(chunks, 1)]
    torch.testing.assert_close(torch.cat(got, 1), expected, rtol=0, atol=1e-4)
    assert ways == {"_decode" if n * 2 <= 16 else "_extend" for n in chunks[1:]}


def test_cache_bytes_are_those_of_its_tensors():
    model, factors = compressed("qwen3")
    cache = LatentCache(model, factors)
    assert cache.nbytes == 0
    with torch.no_grad(), latent_attention(model, factors):
        model(tiny.tokens(2, 64), past_key_values=cache)
    per_token = 2 * factors.bytes_per_token
    assert factors.bytes_per_token == 2 * sum(k.shape[-1] + v.shape[-1] for k, v in cache.caches)
    assert cache.nbytes == 128 * per_token + 2 * 4 * 4  # 64 tokens fill 4 pages of 16; and the block table
    assert cache.nbytes / 128 / (2 * factors.dense_bytes_per_token) <= 0.5 + 0.01
    assert cache.num_tokens == 128 and "lengths=[64, 64]" in repr(cache)


def test_growing_token_by_token_holds_little_more_than_needed():
    model, factors = compressed("llama")
    cache = LatentCache(model, factors)
    ids = tiny.tokens(1, 300)
    with torch.no_grad(), latent_attention(model, factors):
        for t in range(300):
            model(ids[:, t : t + 1], past_key_values=cache)
    needed = -(-300 // 16) * 16 * 2 * factors.bytes_per_token
    assert needed <= cache.nbytes <= 1.25 * needed


def snapshot(model):
    return {m: {k: v for k, v in m.__dict__.items() if not k.startswith("_")} for m in model.modules()}


def hook_counts(model):
    return [(len(m._forward_pre_hooks), len(m._forward_hooks)) for m in model.modules()]


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_the_original_afterwards(fails):
    model, factors = compressed("qwen2")
    ids = tiny.tokens(2, 12)
    weights = {name: x.clone() for name, x in model.state_dict().items()}
    with torch.no_grad():
        logits, attributes, hooks = model(ids).logits, snapshot(model), hook_counts(model)
    forwards = [p.module.forward for p in attention_parts(model)]
    if fails:
        with pytest.raises(ValueError, match="expected a LatentCache"), latent_attention(model, factors):
            model(ids, past_key_values=DynamicCache())
    else:
        with latent_attention(model, factors) as inside:
            assert inside is model
            generate(model, ids)
    assert snapshot(model) == attributes and hook_counts(model) == hooks
    assert [p.module.forward for p in attention_parts(model)] == forwards
    assert all(torch.equal(x, weights[name]) for name, x in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, logits)


def test_every_module_keeps_its_mode():
    model, factors = compressed("llama")
    model.train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    with latent_attention(model, factors):
        pass
    assert [m.training for m in model.modules()] == modes


def test_inference_mode_leaves_nothing_behind():
    with torch.inference_mode():
        model, factors = compressed("llama")
        model = tiny.model("llama")
    model = tiny.model("llama")
    ids = tiny.tokens(1, 20)
    with latent_attention(model, factors):
        with torch.inference_mode():
            cache = model(ids[:, :10]).past_key_values
        with torch.no_grad():
            got = model(ids[:, 10:], past_key_values=cache).logits
        expected = model(ids, use_cache=False).logits
        expected.sum().backward()
    torch.testing.assert_close(got, expected[:, 10:], rtol=0, atol=1e-4)


def test_what_was_on_the_instance_comes_back():
    model, factors = compressed("llama")
    module = attention_parts(model)[0].module
    own = module.forward
    module.forward = own  # as libraries that wrap modules leave it
    with latent_attention(model, factors):
        pass
    assert module.__dict__["forward"] is own


def test_an_exception_inside_a_forward_leaves_the_cache_as_it_was():
    model, factors = compressed("llama")
    cache, ids = LatentCache(model, factors), tiny.tokens(1, 30)
    with torch.no_grad(), latent_attention(model, factors):
        expected = model(ids, use_cache=False).logits[:, 20:]
        model(ids[:, :20], past_key_values=cache)
        handle = attention_parts(model)[1].linear("o_proj").register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids[:, 20:] + 1, past_key_values=cache)
        handle.remove()
        assert cache.lengths == [20] and cache.get_seq_length() == 20
        got = model(ids[:, 20:], past_key_values=cache).logits
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-4)


def test_crop_and_second_turn(monkeypatch):
    """A positive number is the length to keep where the release of transformers says so."""
    model, factors = compressed("qwen3")
    ids = tiny.tokens(2, 50)
    cache = LatentCache(model, factors)
    with torch.no_grad(), latent_attention(model, factors):
        expected = model(ids, use_cache=False).logits
        model(torch.cat((ids[:, :30], ids[:, :15]), 1), past_key_values=cache)
        cache.crop(-5)
        assert cache.get_seq_length() == 40 and cache.lengths == [40, 40]
        monkeypatch.setattr(latent_cache, "KEEPS_LENGTH", False)
        with pytest.raises(ValueError, match="expected 0 or a negative number"):
            cache.crop(20)
        monkeypatch.setattr(latent_cache, "KEEPS_LENGTH", True)
        cache.crop(99)
        single = LatentCache(model, factors)
        model(ids[:1], past_key_values=single)
        single.crop(0)
        assert single.lengths == [0]
        assert cache.lengths == [40, 40]
        cache.crop(30)
        assert cache.get_seq_length() == 30 and cache.lengths == [30, 30]
        got = model(ids[:, 30:], past_key_values=cache).logits
    torch.testing.assert_close(got, expected[:, 30:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3"])
def test_a_second_turn_goes_on_from_the_first(family):
    """The conversation so far is in the cache: only the new turn is run."""
    model, factors = compressed(family)
    cache, turn = LatentCache(model, factors), tiny.tokens(2, 9, seed=5)
    with latent_attention(model, factors):
        first = generate(model, tiny.tokens(2, 20), past_key_values=cache)
        both = torch.cat((first, turn), 1)
        ran = []
        hook = model.model.register_forward_pre_hook(
            lambda _, __, kwargs: ran.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        second = generate(model, both, past_key_values=cache)
        hook.remove()
        assert ran[0] == 9 + 1 and set(ran[1:]) == {1}  # the last token of the first turn was not in the cache
        assert torch.equal(second, generate(model, both))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_beam_search_reorders_latents(family):
    model, factors = compressed(family)
    twin = simulated(model, factors)
    ids, mask = left_padded((20, 7))
    expected = generate(twin, ids, attention_mask=mask, num_beams=3, num_return_sequences=2)
    with latent_attention(model, factors):
        assert torch.equal(generate(model, ids, attention_mask=mask, num_beams=3, num_return_sequences=2), expected)


@pytest.mark.parametrize("arguments", [{"num_beams": 1}, {"num_beams": 3}, {"num_return_sequences": 2}])
def test_sampling_draws_what_the_simulated_model_draws(arguments):
    model, factors = compressed("llama")
    twin = simulated(model, factors)
    ids, mask = left_padded((9, 4))
    choice = {"do_sample": True, "temperature": 1.3, "top_p": 0.9, "max_new_tokens": 16, **arguments}
    torch.manual_seed(7)
    expected = twin.generate(ids, attention_mask=mask, **choice)
    with latent_attention(model, factors):
        torch.manual_seed(7)
        got = model.generate(ids, attention_mask=mask, **choice)
        other = model.generate(ids, attention_mask=mask, **choice)
    assert torch.equal(got, expected) and not torch.equal(got, other)


def test_repeat_and_select_copy_sequences():
    model, factors = compressed("llama")
    ids = tiny.tokens(2, 21)
    cache = LatentCache(model, factors)
    with torch.no_grad(), latent_attention(model, factors):
        expected = model(ids, use_cache=False).logits[:, -1:]
        model(ids[:, :-1], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        assert cache.batch_size == 4
        got = model(ids[:, -1:].repeat_interleave(2, 0), past_key_values=cache).logits
        torch.testing.assert_close(got, expected.repeat_interleave(2, 0), rtol=0, atol=1e-4)
        cache.batch_select_indices(torch.tensor([3]))
        assert cache.lengths == [21] and cache.nbytes < 25 * 16 * 2 * factors.bytes_per_token
        cache.reset()
        assert cache.nbytes == 0 and cache.get_seq_length() == 0


def test_a_cache_filled_with_gradients_on_holds_no_graph():
    model, factors = compressed("llama")
    ids = tiny.tokens(1, 20)
    with latent_attention(model, factors):
        cache = model(ids[:, :15]).past_key_values
        got = model(ids[:, 15:], past_key_values=cache).logits
        assert not any(x.requires_grad for pair in cache.caches for x in pair)
        expected = model(ids, use_cache=False).logits
        expected.sum().backward()  # scoring without a cache stays differentiable
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0
    torch.testing.assert_close(got, expected[:, 15:], rtol=0, atol=1e-4)


def test_use_cache_false_makes_no_cache():
    model, factors = compressed("llama")
    with torch.no_grad(), latent_attention(model, factors):
        assert model(tiny.tokens(1, 5), use_cache=False).past_key_values is None
        assert isinstance(model(tiny.tokens(1, 5)).past_key_values, LatentCache)
        expected = generate(model, tiny.tokens(1, 5))
        assert torch.equal(generate(model, tiny.tokens(1, 5), use_cache=False), expected)
        uncached = GenerationConfig(use_cache=False, do_sample=False, max_new_tokens=24)
        assert torch.equal(model.generate(tiny.tokens(1, 5), generation_config=uncached), expected)
        assert torch.equal(model.generate(tiny.tokens(1, 5), uncached), expected)
        for kind in ("dynamic", "static"):  # the kind of cache transformers was told to make
            got = generate(model, tiny.tokens(1, 5), cache_implementation=kind, return_dict_in_generate=True)
            assert torch.equal(got.sequences, expected) and isinstance(got.past_key_values, LatentCache)


def test_right_padding_is_scored_without_a_cache():
    model, factors = compressed("llama")
    ids, mask = tiny.tokens(2, 12), torch.ones(2, 12, dtype=torch.int64)
    mask[0, 7:] = 0
    with torch.no_grad(), latent_attention(model, factors):
        padded = model(ids, attention_mask=mask, use_cache=False).logits
        alone = model(ids[:1, :7], use_cache=False).logits
    torch.testing.assert_close(padded[:1, :7], alone, rtol=0, atol=1e-5)


def refused_calls(model, factors, other):
    ids = tiny.tokens(2, 8)
    holes = torch.ones(2, 8)
    holes[0, 3] = 0
    right = torch.ones(2, 8)
    right[1, 6:] = 0
    return {
        "expected a LatentCache of the factors given": {"past_key_values": LatentCache(model, other)},
        "expected a LatentCache inside latent_attention, got DynamicCache": {"past_key_values": DynamicCache()},
        "one run of live tokens a sequence, got holes": {"attention_mask": holes},
        "padding on the left": {"attention_mask": right},
        r"attention_mask: expected shape \[2, 8\]": {"attention_mask": torch.ones(2, 9)},
        "attention_mask: expected shape": {"attention_mask": torch.ones(2, 1, 8, 8)},
        "output_attentions: expected False": {"output_attentions": True},
        "position_ids: expected 8 consecutive positions": {"position_ids": torch.arange(8)[None] * 2},
    }, ids


def test_what_cannot_be_cached_is_refused_with_the_reason():
    model, factors = compressed("llama")
    calls, ids = refused_calls(model, factors, lrattn.Factors(factors.layers))
    with torch.no_grad(), latent_attention(model, factors):
        for message, arguments in calls.items():
            with pytest.raises(ValueError, match=message):
                model(ids, **arguments)
        with pytest.raises(ValueError, match="cache: it holds 8 tokens; expected positions to go on from 8, got"):
            cache = model(ids, position_ids=torch.arange(8)[None]).past_key_values
            model(ids[:, :1], past_key_values=cache, position_ids=torch.tensor([[9]]))
        with pytest.raises(ValueError, match=r"(cache|past_key_values): expected a batch of 2, got 3"):
            model(tiny.tokens(3, 1), past_key_values=cache)
        with pytest.raises(ValueError, match="input_ids: expected at most max_position=512 tokens, got 513"):
            model(tiny.tokens(1, 513))
        with pytest.raises(ValueError, match="already inside latent_attention"), latent_attention(model, factors):
            pass
    with pytest.raises(RuntimeError, match="use it inside latent_attention"):
        model(ids, **as_argument(model, LatentCache(model, factors)))


@pytest.mark.parametrize("family", ["llama", "mha"])
def test_factors_that_hardly_point_where_the_weights_do_are_told_from_others(family):
    """A projection in a metric of three decades is rank 16 of its weight, and of no other layer's."""
    model, factors = compressed(family)
    weights = [part.weight("v_proj").double().flatten(0, 1) for part in attention_parts(model)]
    values = []
    for i, weight in enumerate(weights):
        generator = torch.Generator().manual_seed(i)
        basis = torch.linalg.qr(torch.randn(len(weight), len(weight), generator=generator, dtype=torch.float64))[0]
        roots = torch.logspace(0, 1.5, len(weight), dtype=torch.float64)
        q = torch.linalg.qr(torch.randn(len(weight), 16, generator=generator, dtype=torch.float64))[0]
        up = (basis @ (basis.T @ q / roots[:, None])).T.float()  # [16, Hkv D]
        down = weight.T @ (basis @ (roots[:, None] * (basis.T @ q)))
        heads = up.unflatten(1, (-1, 32)).transpose(0, 1).contiguous()
        values.append(lrattn.Projection(heads, (16,), down=down.float().contiguous()))
    own = [replace(layer, shared=False, keys=layer.sides[0], values=v) for layer, v in zip(factors.layers, values)]
    cosines = [
        torch.nn.functional.cosine_similarity(v.dense().flatten(), w.float().flatten(), 0)
        for v, w in zip(values, weights)
    ]
    assert min(cosines) < 0.1
    LatentCache(model, lrattn.Factors(own))
    other = replace(own[1], values=values[2])
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.v_proj, got that of other weights"):
        LatentCache(model, lrattn.Factors((own[0], other, own[2])))


def test_factors_of_another_model_are_refused():
    model, factors = compressed("llama")
    with pytest.raises(ValueError, match=r"factors: expected \(Hkv, D, E\) = \(4, 32, 96\) in layer 0"):
        LatentCache(model, compressed("mha")[1])
    layer = factors.layers[0]
    for message, changed in {
        "the rotation of": replace(layer, rope=replace(layer.rope, theta=5e5)),
        "expected the rotation of model.layers.0.self_attn in layer 0": replace(layer, rope=None),
        "the key norm of": replace(layer, key_norm=lrattn.KeyNorm(torch.ones(32))),
        "the key bias of": replace(layer, keys=replace(layer.keys, bias=torch.ones(4, 32))),
        r"keys\.down in layer 0, to write latents": replace(layer, keys=replace(layer.keys, down=None)),
    }.items():
        with pytest.raises(ValueError, match=message):
            LatentCache(model, lrattn.Factors((changed, *factors.layers[1:])))
    with pytest.raises(
        ValueError, match=r"low-rank map of model\.layers\.0\.self_attn\.k_proj, got that of other weights"
    ):
        LatentCache(tiny.model("llama", seed=1), factors)
    with pytest.raises(
        ValueError, match=r"low-rank map of model\.layers\.1\.self_attn\.v_proj, got that of other weights"
    ):
        mixed = replace(factors.layers[1], values=factors.layers[2].values)
        LatentCache(model, lrattn.Factors((factors.layers[0], mixed, factors.layers[2])))
    with pytest.raises(ValueError, match="backend: expected"), latent_attention(model, factors, backend="bogus"):
        pass
    with pytest.raises(ValueError, match="factors: expected 3 layers as in the model, got 2"):
        LatentCache(model, lrattn.Factors(factors.layers[:2]))
    with pytest.raises(ValueError, match=r"use factors\.to\(device, dtype\)"), latent_attention(model.half(), factors):
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_models_stay_close_to_their_simulation(dtype):
    model, factors = compressed("qwen2", dtype=dtype)
    ids = tiny.tokens(2, 30)
    exact_model = tiny.model("qwen2").double()
    exact_factors = factors.to(dtype=torch.float64)
    with torch.no_grad():
        exact_model.load_state_dict(model.state_dict())
        exact = simulated(exact_model, exact_factors)(ids).logits
        plain = simulated(model, factors)(ids).logits.double()
        with latent_attention(model, factors):
            cache = LatentCache(model, factors)
            model(ids[:, :-4], past_key_values=cache)
            got = torch.cat([model(t, past_key_values=cache).logits for t in ids[:, -4:].split(1, 1)], 1).double()
    error, allowed = (x.square().mean().sqrt() for x in (got - exact[:, -4:], plain - exact))
    assert error <= 2 * allowed


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ("Phi3Config", "expected q_proj to be a Linear layer"),
        ("CohereConfig", "plain attention made of its parts differs"),
        ("GPTNeoXConfig", "expected layer 0 .GPTNeoXLayer. to have `self_attn`"),
        ("Gemma2Config", "it uses attn_logit_softcapping"),
        ("Olmo2Config", "expected k_norm to be an RMS norm over head_dim"),
        ("SmolLM3Config", r"layers\.1\.self_attn .* plain attention made of its parts differs"),
    ],
)
def test_models_with_other_parts_are_refused_with_the_reason(config, reason):
    extra = {"no_rope_layers": [1, 0, 1]} if config == "SmolLM3Config" else {}
    sizes = getattr(transformers, config)(**tiny.SIZES, **extra)
    model = tiny.AutoModelForCausalLM.from_config(sizes).eval()
    factors = lrattn.compress(tiny.model("llama"), method="svd", progress=False)
    with pytest.raises(ValueError, match=reason), latent_attention(model, factors):
        pass
