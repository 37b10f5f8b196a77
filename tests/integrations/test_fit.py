"""What does not fit is refused in one line before anything is written, and other weights warn."""

import warnings
from dataclasses import replace

import pytest
import tiny
import torch
from latents import random_factors
from passes import exact_ropes, fed
from projections import Quantised, replaced
from transformers import AttentionInterface, LlamaConfig

from lrattn.factors.record import Factors
from lrattn.integrations.transformers import LatentCache, latent_attention
from lrattn.models.interface import cache_argument
from lrattn.models.layers import attention_layers, sample

IDS = tiny.tokens(2, 12)


def made(family="llama"):
    model = tiny.model(family)
    factors = random_factors(model, 0.5, (4, 2), ropes=exact_ropes(model))
    model.set_attn_implementation("lrattn")
    return model, factors


@torch.no_grad()
def refused(model, factors, message, **given):
    """By a cache, which then holds nothing, and without one."""
    cache = LatentCache(factors)
    with pytest.raises(ValueError, match=message) as raised:
        model(IDS, **given, **cache_argument(cache))
    assert "\n" not in str(raised.value) and cache.get_seq_length() == 0
    assert not any(layer.pages[0].numel() or layer.window.keys.numel() for layer in cache.layers)
    with latent_attention(model, factors), pytest.raises(ValueError, match=message):
        model(IDS, **given)


def test_factors_of_another_model_are_refused():
    model, factors = made()
    for sizes, got in (({"num_key_value_heads": 8}, "8, 32"), ({"head_dim": 64}, "4, 64")):
        other = tiny.built(LlamaConfig(**tiny.SIZES | sizes), 0)
        told = r"factors: expected \(Hkv, D\) = \(4, 32\) in layer 0, as keys of LlamaAttention, got "
        refused(model, random_factors(other), rf"{told}\({got}\)")
    more = Factors((*factors.layers, factors.layers[0]))
    refused(model, more, "factors: expected at most 3 layers, as in the model, got 4")
    short, told = Factors(factors.layers[:2]), "factors: expected factors of layer 2, got those of 2 layers"
    with pytest.raises(ValueError, match=told):
        fed(model, IDS, 12, LatentCache(short))
    with latent_attention(model, short), pytest.raises(ValueError, match=told):
        model(IDS)


def test_another_dtype_or_device_is_refused_and_the_line_to_write_named():
    model, factors = made()
    told = "factors: expected torch.float32 on cpu in layer 0, as LlamaAttention, got"
    for kind in (torch.float64, torch.bfloat16):
        refused(model, factors.to(dtype=kind), rf"{told} {kind} on cpu; use factors\.to\(device, dtype\)")
    meta = replace(factors, layers=[layer.to("meta") for layer in factors.layers])
    refused(model, meta, f"{told} torch.float32 on meta; use ")
    fed(model.bfloat16(), IDS, 12, LatentCache(factors.to(dtype=torch.bfloat16)))


def test_positions_that_the_rope_does_not_have_are_refused():
    model, factors = made()
    at, told = torch.arange(500, 512)[None], "position_ids: expected at most 511, as the rope has it, got 512"
    refused(model, factors, told, position_ids=at + 1)
    refused(model, factors, r"positions: expected 0 \.\. 511 of the rope, got -1", position_ids=at - 501)
    for wrong in (at[:, 1:], at.repeat(3, 1)):
        keys = torch.zeros(2, 4, 12, 32)
        key, value = LatentCache(factors).update(keys, keys, 0)
        attend, module = AttentionInterface()["lrattn"], model.model.layers[0].self_attn
        with pytest.raises(ValueError, match=r"position_ids: expected shape \[2, 12\], got"):
            attend(module, torch.zeros(2, 8, 12, 32), key, value, None, position_ids=wrong)
    long = tiny.tokens(2, 513)
    for begin, positions in ((12, torch.arange(500, 513)[None]), (512, None)):
        cache = LatentCache(factors)
        fed(model, long[:, :begin], begin, cache, positions=positions)
        with pytest.raises(ValueError, match=told):
            fed(model, long[:, begin : begin + 1], 1, cache, positions=positions)
        assert cache.get_seq_length() == begin
    fed(model, long, 513, LatentCache(random_factors(tiny.model("llama"))))  # whose keys are stored as they are


def test_a_batch_stays_as_large_as_it_is():
    model, factors = made()
    cache = LatentCache(factors)
    fed(model, IDS, 12, cache)
    held = [x.nan_to_num() for layer in cache.layers for x in layer.tensors]  # free room holds anything
    with pytest.raises(ValueError, match="batch: expected 2 rows, as the cache holds, got 3"):
        fed(model, tiny.tokens(3, 4), 4, cache)
    assert all(map(torch.equal, held, [x.nan_to_num() for layer in cache.layers for x in layer.tensors]))
    cache.reset()
    fed(model, tiny.tokens(3, 4), 4, cache)


# ------------------------------------------------------------------------------------------------- other weights


def sampled(model, factors, dtype=None):
    """The same factors, which know the weights of a model, or of one of another dtype."""
    model = tiny.model("llama", dtype=dtype) if dtype else model
    return replace(factors, samples=tuple(sample(layer.module) for layer in attention_layers(model)))


def run(model, factors):
    """What a pass with a cache, one without, and both again warn of."""
    with warnings.catch_warnings(record=True) as found, torch.no_grad():
        warnings.simplefilter("always")
        for _ in range(2):
            model(IDS, **cache_argument(LatentCache(factors)))
            with latent_attention(model, factors):
                model(IDS)
    return [str(x.message) for x in found]


WARNING = (
    "factors: these are factors of other weights than LlamaAttention layer {} has; a fine-tune, an adapter or another "
    "model?"
)


def test_own_weights_do_not_warn_and_others_do_once_a_module():
    model, factors = made()
    known = sampled(model, factors)
    assert run(model, known) == [] and run(model, factors) == []
    other = tiny.model("llama", seed=1)
    other.set_attn_implementation("lrattn")
    assert run(other, factors) == []  # which know no weights
    assert run(other, known) == [WARNING.format(i) for i in range(3)]
    assert run(other, known) == []  # once
    of_other = random_factors(tiny.model("llama"), 0.5)
    assert run(model, sampled(tiny.model("llama", seed=1), of_other)) == [WARNING.format(i) for i in range(3)]


def test_one_layer_that_was_tuned_or_has_an_adapter_is_named():
    model, factors = made()
    known = sampled(model, factors)
    model.model.layers[2].self_attn.k_proj.register_parameter("lora_A", torch.nn.Parameter(torch.zeros(4)))
    assert run(model, known) == [WARNING.format(2)]
    for p in model.model.layers[1].self_attn.v_proj.parameters():
        p.data.mul_(1.01)
    assert run(model, replace(known, layers=[replace(x) for x in known.layers])) == [WARNING.format(i) for i in (1, 2)]


def test_weights_that_cannot_be_read_are_not_asked():
    """Norms beside them are none of theirs."""
    model, factors = made(family="qwen3")
    known = replace(factors, samples=tuple(sample(x.module) + 1 for x in attention_layers(tiny.model("qwen3"))))
    assert run(replaced(model, Quantised), known) == []


@pytest.mark.every(4)
@pytest.mark.parametrize("loaded", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("made_in", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_in_another_dtype_are_the_same(made_in, loaded):
    """Each model was rounded once from the same checkpoint; a change of a hundredth shows in all of them."""
    model, factors = made()
    model = model.to(loaded)
    known = sampled(model, factors.to(dtype=loaded), made_in)
    assert run(model, known) == []
    tuned = tiny.model("llama")
    with torch.no_grad():
        tuned.model.layers[0].self_attn.q_proj.weight.mul_(1.02)
    tuned.set_attn_implementation("lrattn")
    assert run(tuned.to(loaded), known) == [WARNING.format(0)]
