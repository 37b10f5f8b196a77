"""Factors that are not a model's, or do not reach as far as an engine reads: each is told before weights are read."""

import pytest

pytest.importorskip("vllm")

from dataclasses import replace
from types import SimpleNamespace

import tiny
import torch
from latents import joined_factors, random_factors
from passes import exact_ropes
from safetensors.torch import save_file

from lrattn.factors.selection import Selection
from lrattn.integrations.vllm import source
from lrattn.models.layers import sample_of

pytestmark = pytest.mark.vllm


def made(family, **more):
    model = tiny.model(family)
    return random_factors(model, 0.5, **{"ropes": exact_ropes(model), "chunk": 64} | more)


def told(family, folder="none", **more):
    """What vLLM's configuration says of a model."""
    config = tiny.CONFIGS[family]
    model = SimpleNamespace(
        hf_text_config=config, model=str(folder), uses_mrope=False, max_model_len=256,
        get_total_num_hidden_layers=lambda: config.num_hidden_layers,
        get_total_num_kv_heads=lambda: config.num_key_value_heads, get_head_size=lambda: config.head_dim,
    )  # fmt: skip
    vars(model).update(more)
    return SimpleNamespace(model_config=model)


@pytest.mark.parametrize("family", ["llama", "llama3", "gemma3", "qwen2"])
def test_factors_of_the_model_are_taken(family):
    source.check_model(told(family), made(family))


@pytest.mark.parametrize(
    "family, of, more, said",
    [
        ("llama3", "llama", {}, "expected keys turned as the model's config says"),
        ("llama", "llama3", {}, "expected keys turned as the model's config says"),
        ("llama", "mqa", {}, r"expected \(Hkv, D\) = \(4, 32\)"),
        ("llama", "llama", {"get_total_num_hidden_layers": lambda: 2}, "expected factors of 2 layers"),
        ("llama", "llama", {"uses_mrope": True}, "method 'lrattn-rotated'"),
    ],
)
def test_others_are_refused(family, of, more, said):
    with pytest.raises(ValueError, match=said):
        source.check_model(told(family, **more), made(of))


def test_factors_of_which_a_cache_holds_less_are_refused():
    """Pages hold every token of every layer: a policy, a donor or a row of several layers would be passed over."""
    shared = joined_factors(tiny.model("llama"), 2)
    for name, own in (
        ("select", replace(made("llama"), select=Selection("curdkv"))),
        ("donors", replace(made("llama"), donors=(0, 1, 0))),
        ("span", shared),
    ):
        with pytest.raises(
            ValueError, match=f"expected factors of a row for every token and layer, got some with {name}"
        ):
            source.check_model(told("llama"), own)


@pytest.mark.parametrize("form, reach", [({"chunk": None}, 512), ({}, 1 << 20), ({"ropes": None, "chunk": None}, 200)])
def test_a_model_that_reads_further_than_the_factors_reach_is_refused(form, reach):
    factors = made("llama", **form)
    if "ropes" in form:
        factors = replace(factors, layers=[replace(layer, max_position=reach) for layer in factors.layers])
    source.check_model(told("llama", max_model_len=reach), factors)
    with pytest.raises(ValueError, match=rf"positions 0 \.\. {reach - 1} in layer 0, .* set max_model_len={reach}"):
        source.check_model(told("llama", max_model_len=reach + 1), factors)


def test_other_weights_are_warned_of(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(source.logger, "warning", lambda *words: said.append(words))
    own = {f"{x}_proj.weight": torch.randn(8, 8) for x in "qkv"}
    factors = replace(made("llama"), samples=(sample_of(own),) * 3)
    for off in 0.0, 0.1:
        save_file({f"model.layers.0.self_attn.{name}": x + off for name, x in own.items()}, tmp_path / "w.safetensors")
        source.check_model(told("llama", tmp_path), factors)
        assert len(said) == bool(off), said
