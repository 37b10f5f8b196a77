"""What reads weights reads those of the keys and values that attention is given, or says what it cannot read."""

from functools import partial

import architectures
import pytest
import torch
from architectures import tokens
from given import given
from projections import Adapted, Clipped, Quantised
from torch import nn

import lrattn
from lrattn.models.layers import attention_layers
from lrattn.models.ropes import ropes_of
from lrattn.models.weights import bias, check_readable, linear, weight

READABLE = ("Llama", "Llama, yarn", "Qwen2", "Mistral", "Cohere-2", "GLM", "SmolLM3", "gpt-oss", "Granite", "OPT")
NORMED = ("Qwen3", "OLMo-2", "Gemma-3", "Cohere")
FUSED = ("Phi-3", "GPT-NeoX", "GPT-2")
UNREAD = "methods that read no weights, such as 'lrattn'"
NOT_MADE = r"^model: expected keys that are what model\.layers\.0\.self_attn\.k_proj makes, got others"
NOT_LINEAR = r"^model: expected {} to be a torch\.nn\.Linear, whose weights can be read, got "
READERS = {  # methods, rules of ranks and moments that read weights
    **{method: partial(lrattn.compress, method=method, keep=1.0, far=(0, 0)) for method in ("svd", "asvd", "lorc")},
    **{rule: partial(lrattn.compress, method="palu", ranks=rule, far=(0, 0)) for rule in ("fisher", "condition")},
    **{f"gathered {name}": partial(lrattn.calibrate, gather=[name]) for name in ("fisher", "magnitudes")},
}


def changed(change, name="k_proj", layer=1):
    model = architectures.model("Llama")
    attention = model.model.layers[layer].self_attn
    setattr(attention, name, change(getattr(attention, name)))
    return model


def readable(model):
    layers = attention_layers(model)
    check_readable(model, layers, ropes_of(model, layers))


@pytest.mark.parametrize("name", READABLE)
def test_weights_and_biases_make_the_keys_and_values(name):
    model, ids = architectures.model(name), tokens(1, 12)[0]
    readable(model)
    for layer, seen in zip(attention_layers(model), given(model, ids), strict=True):
        for side, heads in (("keys", seen.u), ("values", seen.v)):
            own, constant = weight(layer, side), bias(layer, side)
            assert own.dtype == torch.float64 and own.shape == (layer.dense, 64) and not own.requires_grad
            made = (seen.x @ own.T).view(heads.shape) + (0 if constant is None else constant.double())
            torch.testing.assert_close(made, heads, rtol=0, atol=1e-5)
            assert constant is None or constant.shape == (layer.num_kv_heads, layer.head_dim)
    assert (bias(layer, "keys") is None) == (name not in ("Qwen2", "GLM", "gpt-oss", "OPT"))


def test_a_bias_is_a_copy():
    (layer, *_) = attention_layers(architectures.model("Qwen2"))
    before = bias(layer, "keys")
    bias(layer, "keys").zero_()
    assert torch.equal(bias(layer, "keys"), before) and before.abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["Llama", "Qwen2"])
def test_16_bits_are_no_difference(name, dtype):
    readable(architectures.model(name, dtype))


@pytest.mark.parametrize("name", NORMED)
def test_keys_that_are_normed_after_their_projection_are_refused(name):
    with pytest.raises(ValueError, match=NOT_MADE):
        readable(architectures.model(name))


@pytest.mark.parametrize("side", ["keys", "values"])
def test_what_a_weight_does_not_say_is_seen_in_the_numbers(side):
    """Nothing is known of norms, clips or steps."""
    name = "k_proj" if side == "keys" else "v_proj"
    readable(changed(lambda base: base, name))
    told = rf"^model: expected {side} that are what model\.layers\.1\.self_attn\.{name} makes, got others"
    with pytest.raises(ValueError, match=told):
        readable(changed(Clipped, name))


@pytest.mark.parametrize("change, told", [
    (Adapted, r"projections\.Adapted"),
    (Quantised, r"weights of torch\.int8 on cpu"),
    (lambda base: base.to("meta"), r"weights of torch\.float32 on meta"),
    (lambda base: nn.Sequential(base), r"torch\.nn\.modules\.container\.Sequential"),
], ids=["LoRA", "8 bits", "offloaded", "a container"])  # fmt: skip
def test_projections_whose_weights_cannot_be_read_are_refused(change, told):
    layers = attention_layers(architectures.model("Llama"))
    layers[1].module.k_proj = change(layers[1].module.k_proj)
    expected = NOT_LINEAR.format(r"model\.layers\.1\.self_attn\.k_proj")
    for read in (linear, weight, bias):
        with pytest.raises(ValueError, match=f"{expected}{told}; {UNREAD}, need none$"):
            read(layers[1], "k_proj" if read is linear else "keys")
    assert weight(layers[0], "keys").shape == (32, 64)


@pytest.mark.parametrize("name", FUSED)
def test_fused_projections_are_refused(name):
    (layer, *_) = attention_layers(architectures.model(name))
    for side, projection in (("keys", "k_proj"), ("values", "v_proj")):
        with pytest.raises(ValueError, match=f"{NOT_LINEAR.format(f'{layer.name}.{projection}')}none; {UNREAD}"):
            weight(layer, side)


def unused(model, length=40):
    """Fails when the model is run on a text of the calibration."""

    def watch(_, __, kwargs):
        assert kwargs["input_ids"].shape[1] != length, "the model ran"

    model.register_forward_pre_hook(watch, with_kwargs=True)
    return model


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["Phi-3", "Qwen3", "LoRA"])
def test_methods_that_read_weights_refuse_such_models_before_the_work(reader, name):
    model, ids = changed(Adapted) if name == "LoRA" else architectures.model(name), [tokens(4, 40)]
    if (reader, name) == ("gathered magnitudes", "Qwen3"):  # of inputs, whatever is done after the projection
        assert READERS[reader](model, ids, progress=False).tokens == 160
        return
    with pytest.raises(ValueError, match=rf"^model: expected [^\n]*_proj[^\n]*{UNREAD}[^\n]*$"):
        READERS[reader](unused(model), ids, progress=False)


def test_kq_svd_reads_output_projections_alone():
    ids = [tokens(4, 40)]
    for model in (architectures.model("Phi-3"), architectures.model("Qwen3"), changed(Adapted)):
        assert lrattn.compress(model, ids, method="kq-svd", keep=1.0, progress=False).keep == 1.0
    attention = r"model\.layers\.1\.self_attn"
    for model, at in ((changed(Adapted, "o_proj"), attention), (architectures.model("GPT-2"), "tr.*")):
        with pytest.raises(ValueError, match=NOT_LINEAR.format(rf"{at}\.o_proj")):
            lrattn.compress(unused(model), ids, method="kq-svd", keep=1.0, progress=False)
