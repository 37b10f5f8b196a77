"""Which layers fill a cache, found by what attention is given; what cannot attend on latents is refused in one line."""

import architectures
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, SIZES
from heads import heads_of
from slowly import slow_unless
from torch import nn

import lrattn
from lrattn.models.layers import attention_layers, sample

QUICK = ("Phi-3", "Gemma-3, images", "Gemma-3n", "GPT-2", "Qwen2.5-VL")
MLA = SIZES | {"num_key_value_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 16,
               "qk_rope_head_dim": 8, "v_head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
               "moe_intermediate_size": 32, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}  # fmt: skip
OF_T5 = {"vocab_size": 160, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
OF_BERT = {"vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
OF_MAMBA = {"vocab_size": 160, "hidden_size": 64, "num_hidden_layers": 2}
OF_MINIMAX = {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2, "num_local_experts": 2}
OF_ZAMBA = SIZES | {"num_key_value_heads": 4, "n_mamba_heads": 2, "mamba_headdim": 64, "mamba_d_state": 8,
                    "layers_block_type": ["mamba", "hybrid", "mamba"], "hybrid_layer_ids": [1]}  # fmt: skip
NOT_GIVEN = "its attention is not given the keys and values that its cache returned"
NOT_BY = "attention that goes through transformers' AttentionInterface"
NOT_RUN = "to run on a few tokens with a cache of keys and values, got"
STATES = "layers that cache other things than keys and values, as linear attention, state spaces and convolutions do"
REFUSED = {  # the beginning of its config's name, what that says, what is told in the one or other release
    "keys that are made after the cache": ("DeepseekV3", MLA, f"{NOT_GIVEN}|expected keys and values of one shape"),
    "values that are changed after it": ("DiffLlama", SIZES, f"{NOT_GIVEN}|{NOT_BY}"),
    "an encoder": ("Bert", OF_BERT, NOT_GIVEN),
    "a state in the place of a cache": ("Mamba", OF_MAMBA, f"{NOT_RUN} {STATES}|that fill a cache, got none in Mamba"),
    "state spaces beside attention": ("Zamba2", OF_ZAMBA, f"{NOT_RUN} {STATES}: hybrid, "),
    "convolutions beside it": ("Lfm2", SIZES | {"layer_types": ["conv", "full_attention", "conv"]}, f"{STATES}: conv$"),
    "linear attention beside it": ("MiniMax", SIZES | OF_MINIMAX, f"{STATES}: linear_attention$"),
    "an encoder and a decoder": ("T5", OF_T5, f"{NOT_RUN} ValueError: |{NOT_BY}"),
}


def built(kind, settings):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**settings)
    seq2seq = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    return seq2seq.from_config(config).eval()


@pytest.mark.parametrize("name", slow_unless(QUICK, ARCHITECTURES))
def test_layers_are_those_of_the_cache_in_its_order(name):
    model = architectures.model(name)
    modules, found = dict(model.named_modules()), attention_layers(model)
    held = heads_of(model, architectures.tokens(1, 9))
    assert len(found) == len(held) == (2 if name == "Gemma-3n" else 3)
    for i, (layer, (keys, values)) in enumerate(zip(found, held, strict=True)):
        assert layer.module is modules[layer.name] and f".{i}." in layer.name
        assert (layer.num_kv_heads, layer.head_dim) == keys.shape[2:] == values.shape[2:]
        assert layer.dense == keys[0, 0].numel() and (layer.dtype, layer.device) == (keys.dtype, keys.device)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_finding_them_leaves_the_model_alone(dtype):
    model = architectures.model("Qwen3", dtype).train()
    model.model.layers[1].eval()
    modes = [m.training for m in model.modules()]
    with torch.inference_mode():
        assert {layer.dtype for layer in attention_layers(model)} == {dtype}
    assert [m.training for m in model.modules()] == modes and model.config._attn_implementation == "sdpa"
    assert not any(x.is_inference() for x in model.buffers())


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_attend_on_latents_is_refused_in_a_line(what):
    kind, settings, told = REFUSED[what]
    model = built(kind, settings)
    before = model.config._attn_implementation
    with pytest.raises(ValueError, match=rf"^model: [^\n]*({told})[^\n]*$") as raised:
        attention_layers(model)
    assert model.config._attn_implementation == before
    for run in (lrattn.calibrate, lrattn.compress):
        with pytest.raises(ValueError) as again:
            run(model, [architectures.tokens(1, 20)], progress=False)
        assert str(again.value) == str(raised.value)


def test_a_position_bias_is_refused():
    """As T5's layers hand theirs on."""
    model = architectures.model("Llama")
    model.model.layers[1].self_attn.register_forward_pre_hook(
        lambda _, args, kwargs: (args, kwargs | {"position_bias": torch.zeros(1)}), with_kwargs=True
    )
    with pytest.raises(ValueError, match=r"^model: LlamaAttention cannot attend on latents: it uses a position_bias$"):
        attention_layers(model)
    assert model.config._attn_implementation == "sdpa"


def test_values_of_another_size_than_keys_are_refused(monkeypatch):
    model, update = architectures.model("Llama"), transformers.DynamicCache.update
    for layer in model.model.layers:
        layer.self_attn.o_proj = nn.Linear(4 * 8, 64)
    monkeypatch.setattr(
        transformers.DynamicCache, "update", lambda cache, k, v, *a, **b: update(cache, k, v[..., :8], *a, **b)
    )
    told = r"model.layers.0.self_attn .*: expected keys and values of one shape, got \[1, 2, 4, 16\] and \[1, 2, 4, 8\]"
    with pytest.raises(ValueError, match=f"^model: {told}$"):
        attention_layers(model)


def test_a_cache_without_layers_is_refused():
    model = architectures.model("Llama", num_hidden_layers=0)
    with pytest.raises(ValueError, match=r"^model: expected layers that fill a cache, got none in LlamaForCausalLM$"):
        attention_layers(model)


def test_a_sample_tells_models_apart_and_finds_nothing_where_there_is_nothing_to_read():
    a, b = (attention_layers(architectures.model("Qwen2", seed=seed))[1].module for seed in (0, 1))
    assert torch.equal(sample(a), sample(a)) and not torch.equal(sample(a), sample(b))
    names = [name for name, _ in a.named_parameters()]
    assert len(names) == 7 and sample(a).shape == (8 * 7,) and sample(a).dtype == torch.float32
    with torch.no_grad():
        told = sample(a)
        for name, p in a.named_parameters():
            p[0] += 1
            assert not torch.equal(sample(a), told), name
            told = sample(a)
    assert sample(a.half()).dtype == torch.float16
    assert sample(nn.Module()) is None and sample(nn.Embedding(3, 4).to("meta")) is None


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int32, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("how", ["parameter", "buffer"])
def test_quantised_weights_are_not_told_by_the_norms_and_biases_beside_them(how, dtype):
    (layer, *_) = attention_layers(architectures.model("Qwen3"))
    codes = torch.ones(3, 3).to(dtype)
    layer.module.k_proj = nn.Module()
    layer.module.k_proj.register_buffer("mask", torch.ones(3, dtype=torch.bool))
    assert sample(layer.module) is not None
    if how == "buffer":
        layer.module.k_proj.register_buffer("codes", codes)
    else:
        layer.module.k_proj.codes = nn.Parameter(codes, requires_grad=False)
    assert sample(layer.module) is None
