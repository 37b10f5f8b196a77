"""Another attention function inside a block: right for every architecture, and gone when the block is left."""

import copy
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import architectures
import pytest
import torch
import transformers
from architectures import ARCHITECTURES, padded, with_image
from given import eager
from slowly import slow_unless
from torch import nn

from lrattn.models import interface
from lrattn.models.interface import attending, attention_set, exact_attention
from lrattn.models.states import evaluating, frozen

QUICK = ("Gemma-2", "Gemma-3, images", "Gemma-3n", "gpt-oss", "Llama-4", "GPT-2")
OTHERS = {  # whose attention does not go through the AttentionInterface
    "Bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "Falcon": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
    "Mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4},
}
TEXT = architectures.tokens(2, 40)


def implementations(model):
    """Of all configs that a model and the models in it have."""
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    return [config._attn_implementation for config in configs.values()]


def differing():
    """A model of a text and a tower whose configs say different things, and what they say."""
    model = architectures.model("Gemma-3, images")
    model.set_attn_implementation({"": "sdpa", "text_config": "eager", "vision_config": "sdpa"})
    assert sorted(implementations(model)) == ["eager", "sdpa", "sdpa"]
    return model, implementations(model)


@torch.no_grad()
@pytest.mark.parametrize("name", slow_unless(QUICK, ARCHITECTURES))
def test_exact_attention_is_the_model_s_own(name):
    """Windows, chunks, softcaps, sinks, scales, padding, towers and all: logits of live tokens."""
    model, names = eager(name), ("input_ids", "attention_mask")
    inputs = [{"input_ids": TEXT}, *(dict(zip(names, padded((37, 21, 5), side))) for side in ("left", "right"))]
    inputs += [with_image()] if "images" in name else []
    for arguments in inputs:
        live = arguments.get("attention_mask", torch.ones_like(arguments["input_ids"])).bool()
        want = model(**arguments, use_cache=False).logits[live]
        with attending(model, exact_attention):
            got = model(**arguments, use_cache=False).logits[live]
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * want.abs().max().item())
        assert torch.equal(model(**arguments, use_cache=False).logits[live], want)


@pytest.mark.parametrize("error", [None, KeyError, KeyboardInterrupt])
def test_every_config_is_what_it_was_however_the_block_is_left(error):
    model, before = differing()

    def broken(module, *args, **kwargs):
        raise error

    try:
        with attending(model, broken if error else exact_attention):
            assert set(implementations(model)) == {interface.INSIDE}
            model(input_ids=TEXT)
    except (KeyError, KeyboardInterrupt) as raised:
        assert type(raised) is error
    assert implementations(model) == before
    with attending(model, exact_attention):  # and another may begin
        model(input_ids=TEXT)


def test_configs_two_levels_down_are_put_back():
    """Each by itself: what an outer one says does not count for those in it."""
    model, before = differing()
    of_others = type("Outer", (transformers.PreTrainedConfig,), {"sub_configs": {"inner_config": type(model.config)}})
    outer = nn.Module()
    outer.inner, outer.config = model, of_others(attn_implementation="flash_attention_2")
    outer.config.inner_config = model.config
    outer.set_attn_implementation = lambda name: setattr(outer.config, "_attn_implementation", name)
    with attending(outer, exact_attention):
        assert set(implementations(outer)) == {interface.INSIDE}
    assert outer.config._attn_implementation == "flash_attention_2" and implementations(model) == before


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_that_does_not_use_the_interface_is_refused_and_left_alone(kind):
    config = getattr(transformers, f"{kind}Config")(vocab_size=160, **OTHERS[kind])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    before, logits = implementations(model), model(input_ids=TEXT).logits
    told = f"^model: expected attention that goes through .* AttentionInterface, got {kind}ForCausalLM, whose does not$"
    for block in (attending(model, exact_attention), attention_set(model, interface.INSIDE)):
        with pytest.raises(ValueError, match=told), block:
            pass
    assert implementations(model) == before and torch.equal(model(input_ids=TEXT).logits, logits)


@pytest.mark.parametrize("other", [nn.Linear(2, 2), nn.DataParallel(nn.Linear(2, 2))], ids=["Linear", "DataParallel"])
def test_what_is_no_model_of_transformers_is_refused(other):
    with pytest.raises(ValueError, match=f"^model: expected a model of transformers, got {type(other).__name__}$"):
        attending(other, exact_attention).__enter__()


def test_a_model_is_in_one_block_at_a_time():
    """Nor is another of the same config object, which says how both attend; nor a part of it."""
    model, other = architectures.model("Llama"), architectures.model("Llama", seed=1)
    twin = type(model)(model.config)
    for second, told in ((model, "already inside"), (model.model, "already inside"), (twin, "its config is that of")):
        with attending(model, exact_attention), pytest.raises(ValueError, match=f"model: {told}"):
            attending(second, exact_attention).__enter__()
    with attending(model, exact_attention), attending(other, exact_attention):
        assert implementations(other) == [interface.INSIDE]
        for second in (twin, copy.deepcopy(model)):
            with pytest.raises(
                ValueError, match=r"^model: its config is that of a model .*, or a copy of it; leave .*$"
            ):
                second(input_ids=TEXT)
    assert implementations(model) == implementations(other) == implementations(twin) == ["sdpa"]


def test_models_in_threads_attend_each_by_its_own_function():
    models = [eager(name) for name in ("Llama", "Qwen3", "Gemma-2", "GPT-2")]
    together = threading.Barrier(len(models), timeout=60)

    @torch.no_grad()
    def of(model):
        own, seen = set(model.modules()), []

        def watch(module, *args, **kwargs):
            together.wait()  # in every layer, all of them are inside
            seen.append(module in own)
            return exact_attention(module, *args, **kwargs)

        with attending(model, watch):
            return model(input_ids=TEXT, use_cache=False).logits, seen

    with ThreadPoolExecutor(len(models)) as pool:
        found = list(pool.map(of, models))
    for model, (got, seen) in zip(models, found, strict=True):
        assert seen == [True] * 3
        with torch.no_grad():
            want = model(input_ids=TEXT, use_cache=False).logits
        torch.testing.assert_close(got, want, rtol=0, atol=2e-5 * want.abs().max().item())


def test_nothing_of_a_block_or_a_model_is_held():
    model = architectures.model("Llama")

    def function(*args, **kwargs):
        return exact_attention(*args, **kwargs)

    with attending(model, function):
        model(input_ids=TEXT)
    held = weakref.ref(function), weakref.ref(model.model.layers[0].self_attn)
    del function, model
    gc.collect()
    assert [x() for x in held] == [None, None] and not len(interface._TAKEN)


def test_the_decoder_is_what_runs_the_layers():
    model = architectures.model("Gemma-3, images")
    assert interface.decoder_of(model) is model.model.language_model
    bare = architectures.model("Llama").model
    assert interface.decoder_of(bare) is bare and interface.decoder_of(nn.Linear(2, 2)).in_features == 2
    for name in ("Llama", "GPT-2", "Gemma-3, images"):
        assert interface.positions_of(architectures.model(name)) == 512


def test_tokens_are_of_the_vocabulary_and_where_the_weights_are():
    model = architectures.model("Llama")
    assert interface.tokens_for(model, 500).shape == (1, 500) and interface.tokens_for(model, 500).max() < 160
    meta = architectures.model("Llama")
    meta.model.embed_tokens.to("meta")
    assert interface.device_of(meta) == torch.device("cpu") == interface.device_of(meta.to("meta"))


def test_modes_and_gradients_are_put_back():
    model = architectures.model("Llama").train()
    model.model.layers[1].eval()
    model.lm_head.weight.requires_grad_(False)
    modes, needs = ([m.training for m in model.modules()], [p.requires_grad for p in model.parameters()])
    with pytest.raises(ZeroDivisionError), evaluating(model), frozen(model):
        assert not any(m.training for m in model.modules()) and not any(p.requires_grad for p in model.parameters())
        raise ZeroDivisionError
    assert [m.training for m in model.modules()] == modes and [p.requires_grad for p in model.parameters()] == needs
